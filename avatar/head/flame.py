"""Reader of FLAME's model file, `generic_model.pkl` of FLAME 2020 (https://flame.is.tue.mpg.de, licensed)."""

import pickle
from pathlib import Path

import numpy as np

from avatar.errors import AvatarError
from avatar.unpickle import as_array, unpickle

IDENTITY_BASES = 300  # in the file, before those of expression
USED_IDENTITY_BASES = 100
USED_EXPRESSION_BASES = 50
JOINTS = 5
POSE_BASES = 9 * (JOINTS - 1)
NO_PARENT = (-1, 2**32 - 1)  # signed and unsigned


def read_flame(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a FLAME model as HeadModel takes them, with nothing in the file run.

    Returns:
        v_template (V, 3), shapedirs (V, 3, 100), expressions (V, 3, 50), posedirs (V, 3, 36), J (5, 3),
        J_shapedirs (5, 3, 100), J_expressions (5, 3, 50), weights (V, 5), faces (F, 3) int64,
        parents (5,) int64, -1 for the root. Unscaled, in metres.

    Raises:
        AvatarError: naming the file and what it lacks, holds in a wrong shape, or may not hold.
    """
    try:
        model = unpickle(path.read_bytes())
    except OSError as error:
        raise AvatarError(f"{path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise AvatarError(f"{path}: not a readable head model ({error})") from error
    if not isinstance(model, dict):
        raise AvatarError(f"{path}: not a FLAME model (a pickled {type(model).__name__}, wants a dict)")
    names = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f", "kintree_table")
    missing = [name for name in names if name not in model]
    if missing:
        raise AvatarError(f"{path}: lacks {', '.join(missing)}")
    arrays = {}
    for name in names:
        try:
            arrays[name] = as_array(model[name])
        except pickle.UnpicklingError as error:
            raise AvatarError(f"{path}: {name} cannot be had ({error})") from error
    _check(path, arrays)

    template, regressor = arrays["v_template"], arrays["J_regressor"]
    identity = arrays["shapedirs"][..., :USED_IDENTITY_BASES]
    expressions = arrays["shapedirs"][..., IDENTITY_BASES : IDENTITY_BASES + USED_EXPRESSION_BASES]
    parents = arrays["kintree_table"][0].astype(np.int64)
    parents[0] = -1
    return {
        "v_template": template,
        "shapedirs": identity,
        "expressions": expressions,
        "posedirs": arrays["posedirs"],
        "J": regressor @ template,
        "J_shapedirs": np.einsum("jv,vds->jds", regressor, identity),
        "J_expressions": np.einsum("jv,vde->jde", regressor, expressions),
        "weights": arrays["weights"],
        "faces": arrays["f"].astype(np.int64),
        "parents": parents,
    }


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    vertices = max(arrays["v_template"].shape[:1], default=0)
    bases = max((IDENTITY_BASES + USED_EXPRESSION_BASES, *arrays["shapedirs"].shape[-1:]))
    wanted = {
        "v_template": (vertices, 3),
        "shapedirs": (vertices, 3, bases),
        "posedirs": (vertices, 3, POSE_BASES),
        "J_regressor": (JOINTS, vertices),
        "weights": (vertices, JOINTS),
        "f": (max(arrays["f"].shape[:1], default=0), 3),
        "kintree_table": (2, JOINTS),
    }
    for name, shape in wanted.items():
        got = arrays[name].shape
        if got != shape or 0 in got:
            more = f" ({IDENTITY_BASES} of identity, then expressions)" if name == "shapedirs" else ""
            raise AvatarError(f"{path}: {name} has shape {got}, wants {shape}{more}")
        if not np.isfinite(arrays[name]).all():
            raise AvatarError(f"{path}: {name} holds numbers that are not finite")
    faces = arrays["f"]
    if faces.min() < 0 or faces.max() >= vertices:
        raise AvatarError(f"{path}: f names vertices {faces.min()} to {faces.max()}, of {vertices}")
    root, *parents = arrays["kintree_table"][0].tolist()
    if root not in NO_PARENT or not all(0 <= parent <= joint for joint, parent in enumerate(parents)):
        raise AvatarError(
            f"{path}: kintree_table has parents {[root, *parents]}, wants -1, then earlier joints"
        )
