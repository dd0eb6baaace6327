"""Bake the embedded head: a bust in the FLAME layout, cut from the file that export_makehuman.py writes.

    python tools/bake_head.py makehuman.npz avatar/assets/head.npz

Keeps skin, eyeballs, teeth, tongue and a shirt; turns the axes to x right, y up, z towards the viewer with
the origin inside the head; metres. Expressions are the ARKit set without jawOpen (the jaw joint does it)
and tongueOut: exactly 50.
"""

import argparse
import os
from pathlib import Path

import numpy as np

ORIGIN_HEIGHT = 0.70
SHIRT_GAP = 0.004
DROPPED_EXPRESSIONS = ("jawOpen", "tongueOut")
IDENTITY_SHAPES = 100
PARTS = {
    "skin": ("body",),
    "eyes": ("helper-l-eye", "helper-r-eye"),
    "teeth": ("helper-upper-teeth", "helper-lower-teeth"),
    "tongue": ("helper-tongue",),
    "shirt": ("helper-tights",),
}


def turn_axes(vectors: np.ndarray) -> np.ndarray:
    return np.stack([vectors[..., 0], vectors[..., 2], -vectors[..., 1]], -1)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    corners = vertices[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], face_normals)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def crop(part: str, centers: np.ndarray) -> np.ndarray:
    """Which faces of a part stay: skin down to just under the collar, the shirt to the chest."""
    if part == "skin":
        return (centers[:, 1] > -0.14) & (np.abs(centers[:, 0]) < 0.30)
    if part == "shirt":
        return (centers[:, 1] < -0.105) & (centers[:, 1] > -0.27) & (np.abs(centers[:, 0]) < 0.28)
    return np.ones(len(centers), bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    source = np.load(arguments.input)

    origin = np.array([0, ORIGIN_HEIGHT, 0])
    vertices = turn_axes(source["v"].astype(np.float64)) - origin
    expressions = turn_axes(source["E"].astype(np.float64))
    shapes = turn_axes(source["S"].astype(np.float64))

    names = [str(name) for name in source["names"]]
    kept = [row for row, name in enumerate(names) if name not in DROPPED_EXPRESSIONS]
    expressions, names = expressions[kept], [names[row] for row in kept]

    faces, uv_faces, vertex_parts = [], [], np.zeros(len(vertices), np.int8)
    for label, (part, groups) in enumerate(PARTS.items()):
        triangles = np.concatenate([source[f"group_{group}"] for group in groups])
        texture = np.concatenate([source[f"uv_group_{group}"] for group in groups])
        keep = crop(part, vertices[triangles].mean(1))
        faces.append(triangles[keep])
        uv_faces.append(texture[keep])
        vertex_parts[triangles[keep]] = label
        if part == "shirt":
            vertices += SHIRT_GAP * vertex_normals(vertices, triangles[keep])
        if part == "eyes":
            # The eye joints turn the eyeballs; the shapes of the lids must not.
            expressions[:, np.unique(triangles)] = 0
    used, faces = np.unique(np.concatenate(faces), return_inverse=True)
    uv_used, uv_faces = np.unique(np.concatenate(uv_faces), return_inverse=True)

    strongest = np.argsort(-np.abs(shapes[:, used]).max((1, 2)), kind="stable")[:IDENTITY_SHAPES]
    strongest.sort()
    weights = source["W"][used].astype(np.float64)
    baked = {
        "v_template": vertices[used],
        "shapedirs": shapes[strongest][:, used].transpose(1, 2, 0),
        "expressions": expressions[:, used].transpose(1, 2, 0),
        "J": turn_axes(source["J"].astype(np.float64)) - origin,
        "J_shapedirs": turn_axes(source["JS"].astype(np.float64))[strongest].transpose(1, 2, 0),
        "weights": weights / weights.sum(1, keepdims=True),
        "uv": source["uv"][uv_used],
    }
    # Micrometres are plenty, and rounded numbers compress.
    baked = {name: np.round(array, 6).astype(np.float32) for name, array in baked.items()}
    baked |= {
        "faces": faces.reshape(-1, 3).astype(np.int32),
        "uv_faces": uv_faces.reshape(-1, 3).astype(np.int32),
        "parents": np.array([-1, 0, 1, 1, 1], np.int32),
        "expression_names": np.array(names),
        "vertex_parts": vertex_parts[used],
        "part_names": np.array(list(PARTS)),
    }
    temporary = arguments.output.with_name(arguments.output.name + ".part.npz")
    np.savez_compressed(temporary, **baked)
    os.replace(temporary, arguments.output)
    count, size = len(baked["faces"]), arguments.output.stat().st_size
    print(f"{arguments.output}: {len(used)} vertices, {count} faces, {size} bytes")


if __name__ == "__main__":
    main()
