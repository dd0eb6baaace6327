"""Blendshape and skinning head in the FLAME layout.

A vertex is posed as in Li et al., "Learning a model of facial shape and expression from 4D scans" (FLAME),
TOG 2017, eq. 2: blendshapes for identity and expression, optional pose correctives, linear blend skinning
about five joints (root, neck, jaw, left eye, right eye).
"""

import copy
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from avatar.errors import AvatarError
from avatar.head.flame import read_flame

ASSET = Path(__file__).parent.parent / "assets" / "head.npz"
# PointAvatar and IMavatar enlarge the head model so that it fills the cube their networks expect.
SCALE = 4.0


def rotation_matrices(axis_angle: Tensor) -> Tensor:
    """Rodrigues' formula: (..., 3) axis-angle to (..., 3, 3), differentiable at zero."""
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    square = (axis_angle**2).sum(-1)[..., None, None]
    small = square < 1e-8
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    sine = torch.where(small, 1 - square / 6, torch.sin(angle) / angle)
    cosine = torch.where(small, 0.5 - square / 24, (1 - torch.cos(angle)) / angle**2)
    identity = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    return identity + sine * cross + cosine * (cross @ cross)


class HeadModel(nn.Module):
    """Template, bases and skinning of one head; identity is baked in by `with_shape`.

    Buffers (V vertices, E expressions, P pose features, J joints):
        template (V, 3), expression_basis (V, 3, E), pose_basis (V, 3, P), joints (J, 3),
        weights (V, J), faces (F, 3), parents (J,), shape_basis (V, 3, S), joint_shape_basis (J, 3, S),
        joint_expression_basis (J, 3, E), vertex_parts (V,): index into part_names.
    """

    def __init__(self, arrays: dict[str, np.ndarray], scale: float = SCALE):
        super().__init__()
        vertices = arrays["v_template"]

        def keep(name: str, array: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
            self.register_buffer(
                name, torch.as_tensor(np.ascontiguousarray(array)).to(dtype), persistent=False
            )

        keep("template", vertices * scale)
        keep("expression_basis", arrays["expressions"] * scale)
        keep("shape_basis", arrays.get("shapedirs", np.zeros((*vertices.shape, 0))) * scale)
        keep("pose_basis", arrays.get("posedirs", np.zeros((*vertices.shape, 0))) * scale)
        keep("joints", arrays["J"] * scale)
        joints, expressions = len(arrays["J"]), arrays["expressions"].shape[-1]
        keep("joint_shape_basis", arrays.get("J_shapedirs", np.zeros((joints, 3, 0))) * scale)
        still_joints = np.zeros((joints, 3, expressions))
        keep("joint_expression_basis", arrays.get("J_expressions", still_joints) * scale)
        keep("weights", arrays["weights"])
        keep("faces", arrays["faces"], torch.int64)
        keep("parents", arrays["parents"], torch.int64)
        keep("vertex_parts", arrays.get("vertex_parts", np.zeros(len(vertices))), torch.int64)
        self.parent_list = [int(parent) for parent in arrays["parents"]]
        self.part_names = [str(name) for name in arrays.get("part_names", ["skin"])]
        self.expression_names = [str(name) for name in arrays.get("expression_names", [])]
        self.scale = scale

    @property
    def num_expressions(self) -> int:
        return self.expression_basis.shape[-1]

    @property
    def num_pose_features(self) -> int:
        return self.pose_basis.shape[-1]

    def with_shape(self, shape: Tensor) -> "HeadModel":
        """A copy with identity coefficients (S,) baked into the template and the joints."""
        available = self.shape_basis.shape[-1]
        used = min(len(shape), available)
        if shape[used:].any():
            raise AvatarError(f"shape_params has {len(shape)} coefficients, the head model only {available}")
        shaped = copy.deepcopy(self)
        shaped.template += self.shape_basis[..., :used] @ shape[:used]
        if self.joint_shape_basis.shape[-1]:
            shaped.joints += self.joint_shape_basis[..., :used] @ shape[:used]
        return shaped

    def pose_features(self, pose: Tensor) -> Tensor:
        """Rotation matrices of every joint but the root, less identity, flattened: (B, 9 (J - 1))."""
        rotations = rotation_matrices(pose.unflatten(-1, (-1, 3)))[..., 1:, :, :]
        features = rotations - torch.eye(3, dtype=pose.dtype, device=pose.device)
        return features.flatten(-3)[..., : self.num_pose_features]

    def bone_transforms(self, expression: Tensor, pose: Tensor) -> Tensor:
        """Rigid transforms of the bones relative to the rest pose: (B, J + 1, 3, 4).

        A bone that never moves comes first (the "ghost" of IMavatar, for what belongs to no joint). The joints
        follow the vertices of the expression, as in FLAME's own code; the paper has them follow identity only.
        """
        rotations = rotation_matrices(pose.unflatten(-1, (-1, 3)))
        joints = self.joints + torch.einsum("jde,be->bjd", self.joint_expression_basis, expression)
        joints = joints[..., None]
        world: list[tuple[Tensor, Tensor]] = []
        for joint, parent in enumerate(self.parent_list):
            local, position = rotations[:, joint], joints[:, joint]
            if parent >= 0:
                turned, origin = world[parent]
                offset = joints[:, joint] - joints[:, parent]
                local, position = turned @ local, turned @ offset + origin
            world.append((local, position))
        bones = [
            torch.cat([turned, position - turned @ joints[:, joint]], -1)
            for joint, (turned, position) in enumerate(world)
        ]
        still = torch.eye(3, 4, dtype=pose.dtype, device=pose.device).expand_as(bones[0])
        return torch.stack([still, *bones], -3)

    def weights_with_ghost(self) -> Tensor:
        """Skinning weights over the bones of `bone_transforms`: (V, J + 1), none on the ghost."""
        return torch.cat([torch.zeros_like(self.weights[:, :1]), self.weights], 1)

    def forward(self, expression: Tensor, pose: Tensor) -> Tensor:
        """Posed vertices.

        Args:
            expression: (B, E).   pose: (B, 3 J) axis-angle.

        Returns:
            (B, V, 3).
        """
        offsets = torch.einsum("vde,be->bvd", self.expression_basis, expression)
        if self.num_pose_features:
            offsets = offsets + torch.einsum("vdp,bp->bvd", self.pose_basis, self.pose_features(pose))
        transforms = blend_transforms(self.weights_with_ghost(), self.bone_transforms(expression, pose))
        return apply_transforms(transforms, self.template + offsets)


def blend_transforms(weights: Tensor, bones: Tensor) -> Tensor:
    """Linear blend skinning matrices: (N, J), (B, J, 3, 4) to (B, N, 3, 4)."""
    return (weights @ bones.flatten(-2)).unflatten(-1, (3, 4))


def apply_transforms(transforms: Tensor, points: Tensor) -> Tensor:
    """Affine maps (..., N, 3, 4) of points (..., N, 3)."""
    return (transforms[..., :3] @ points[..., None])[..., 0] + transforms[..., 3]


def load_head(path: Path) -> HeadModel:
    """Read a head from an npz file in the FLAME layout (see tools/bake_head.py) or from FLAME's own pickle."""
    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        return HeadModel(read_npz(path))
    return HeadModel(read_flame(path))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise AvatarError(f"{path}: not a readable head model ({error})") from error
    missing = {"v_template", "expressions", "J", "weights", "parents", "faces"} - arrays.keys()
    if missing:
        raise AvatarError(f"{path}: lacks {', '.join(sorted(missing))}")
    return arrays


def embedded_head() -> HeadModel:
    """The CC0 head that comes with the package: 50 expressions, no pose correctives."""
    return HeadModel(read_npz(ASSET))
