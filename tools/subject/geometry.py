"""Subdivided, skinned parts cut from the file that export_makehuman.py writes."""

from pathlib import Path

import numpy as np
import scipy.sparse as sparse
import torch
from bake_head import DROPPED_EXPRESSIONS, ORIGIN_HEIGHT, turn_axes, vertex_normals

from avatar.head import embedded_head

JOINTS = ("root", "neck", "jaw", "left eye", "right eye")
NECK = JOINTS.index("neck")


def smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a cubic between (also where low > high: then it falls)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def wave_noise(points: np.ndarray, frequency: float, seed: int, waves: int = 24) -> np.ndarray:
    """Smooth noise of about unit variance: a sum of plane waves of random directions, (N, 3) to (N,)."""
    generator = np.random.default_rng(seed)
    directions = generator.normal(size=(waves, 3)) * frequency
    phases = generator.uniform(0, 2 * np.pi, waves)
    return np.sin(points @ directions.T + phases).sum(1) / np.sqrt(waves / 2)


def bump(points: np.ndarray, center, radii) -> np.ndarray:
    """An axis-aligned Gaussian of the given radii: (N, 3) to (N,)."""
    return np.exp(-(((points - center) / radii) ** 2).sum(1))


def apply_skinning(points: np.ndarray, weights: np.ndarray, bones: np.ndarray) -> np.ndarray:
    """Linear blend skinning: points (N, 3), weights (N, J), bones (J, 3, 4)."""
    transforms = np.einsum("nj,jab->nab", weights, bones)
    return np.einsum("nab,nb->na", transforms[..., :3], points) + transforms[..., 3]


def grid_faces(rows: int, columns: int, wrapped: bool = False) -> np.ndarray:
    """Triangles over a grid of vertices in row-major order whose columns close up, and its rows if `wrapped`."""
    row, column = np.indices((rows if wrapped else rows - 1, columns)).reshape(2, -1)
    below, beside = (row + 1) % rows * columns, (column + 1) % columns
    a, b, c, d = row * columns + column, row * columns + beside, below + column, below + beside
    return np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)])


def polyline_points(polyline: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Points at the given parts of a polyline's length: (N, 3) at (M,) in [0, 1]."""
    length = np.r_[0, np.linalg.norm(np.diff(polyline, axis=0), axis=1).cumsum()]
    return np.stack([np.interp(at * length[-1], length, polyline[:, axis]) for axis in range(3)], 1)


def loop_subdivision(faces: np.ndarray, count: int) -> tuple[sparse.csr_matrix, np.ndarray]:
    """One step of Loop's scheme: the matrix from `count` old to all new vertices, and the new faces.

    Source: Loop, "Smooth subdivision surfaces based on triangles", 1987; at boundaries cubic B-splines.
    """
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    edges, edge_of_side, sides = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
    edge_of_side = edge_of_side.ravel()
    opposite = np.concatenate([faces[:, 2], faces[:, 0], faces[:, 1]])
    inner = sides == 2
    rows = np.arange(len(edges))
    end_weight = np.where(inner, 3 / 8, 1 / 2)
    counted = inner[edge_of_side]
    edge_points = sparse.csr_matrix(
        (
            np.concatenate([end_weight, end_weight, np.full(counted.sum(), 1 / 8)]),
            (
                np.concatenate([rows, rows, edge_of_side[counted]]),
                np.concatenate([edges[:, 0], edges[:, 1], opposite[counted]]),
            ),
        ),
        shape=(len(edges), count),
    )

    def adjacency(pairs: np.ndarray) -> sparse.csr_matrix:
        ends = np.concatenate([pairs, pairs[:, ::-1]])
        return sparse.csr_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))

    neighbors = adjacency(edges)
    valence = np.maximum(np.asarray(neighbors.sum(1)).ravel(), 1)
    share = (5 / 8 - (3 / 8 + np.cos(2 * np.pi / valence) / 4) ** 2) / valence
    boundary = np.zeros(count, bool)
    boundary[edges[~inner]] = True
    smooth = sparse.diags(1 - valence * share) + sparse.diags(share) @ neighbors
    crease = sparse.diags(np.full(count, 3 / 4)) + adjacency(edges[~inner]) / 8
    vertex_points = sparse.diags(1.0 * ~boundary) @ smooth + sparse.diags(1.0 * boundary) @ crease

    middle = edge_of_side.reshape(3, -1) + count
    new_faces = np.concatenate(
        [
            np.stack([faces[:, 0], middle[0], middle[2]], 1),
            np.stack([faces[:, 1], middle[1], middle[0]], 1),
            np.stack([faces[:, 2], middle[2], middle[1]], 1),
            np.stack([middle[0], middle[1], middle[2]], 1),
        ]
    )
    return sparse.vstack([vertex_points, edge_points]).tocsr(), new_faces


class Body:
    """The unsubdivided body with everything that moves it; x right, y up, z to the viewer, metres."""

    def __init__(self, path: Path):
        source = dict(np.load(path))
        origin = np.array([0, ORIGIN_HEIGHT, 0])
        self.vertices = turn_axes(source["v"].astype(np.float64)) - origin
        names = [str(name) for name in source["names"]]
        kept = [row for row, name in enumerate(names) if name not in DROPPED_EXPRESSIONS]
        self.expression_names = [names[row] for row in kept]
        self.expressions = turn_axes(source["E"].astype(np.float64))[kept]
        weights = source["W"].astype(np.float64)
        self.weights = weights / weights.sum(1, keepdims=True)
        self.joints = turn_axes(source["J"].astype(np.float64)) - origin
        self.groups = {name[6:]: source[name] for name in source if name.startswith("group_")}
        self.masks = {
            name[5:]: self._mask_of_vertices(source, name) for name in source if name.startswith("mask_")
        }
        eyeballs = np.unique(np.concatenate([self.groups["helper-l-eye"], self.groups["helper-r-eye"]]))
        self.expressions[:, eyeballs] = 0  # the eye joints turn the eyeballs, the shapes of the lids must not
        self.head = embedded_head()
        if self.head.expression_names != self.expression_names:
            raise SystemExit(f"{path}: expressions differ from the embedded head's")

    def _mask_of_vertices(self, source: dict, name: str) -> np.ndarray:
        total, count = np.zeros((2, len(self.vertices)))
        np.add.at(total, source["group_body"], source[name][source["uv_group_body"]])
        np.add.at(count, source["group_body"], 1)
        return total / np.maximum(count, 1)

    def expressed(self, expression: np.ndarray) -> np.ndarray:
        """Vertices before skinning: (V, 3)."""
        return self.vertices + np.tensordot(expression, self.expressions, 1)

    def bones(self, pose: np.ndarray, expression: np.ndarray) -> np.ndarray:
        """The embedded head's own bone transforms, in metres: (J, 3, 4)."""
        parameters = (torch.tensor(values[None], dtype=torch.float32) for values in (expression, pose))
        bones = self.head.bone_transforms(*parameters)[0, 1:].double().numpy()
        bones[..., 3] /= self.head.scale
        return bones


class Part:
    """Some faces of the body, subdivided: `matrix` takes body vertices to its own."""

    def __init__(self, body: Body, faces: np.ndarray, subdivisions: int):
        self.indices, faces = np.unique(faces, return_inverse=True)
        self.faces = faces.reshape(-1, 3)
        self.matrix = sparse.identity(len(self.indices), format="csr")
        for _ in range(subdivisions):
            step, self.faces = loop_subdivision(self.faces, self.matrix.shape[0])
            self.matrix = step @ self.matrix
        self.body = body
        self.rest = self.of_body(body.vertices)
        self.weights = self.of_body(body.weights)
        self.offset = np.zeros_like(self.rest)  # added before skinning

    def of_body(self, values: np.ndarray) -> np.ndarray:
        """Values of the body's vertices (V, ...) at the part's."""
        return self.matrix @ values[self.indices]

    def crop(self, keep: np.ndarray) -> None:
        """Drop the faces (F,) that are not kept, and the vertices that only they use."""
        used, faces = np.unique(self.faces[keep], return_inverse=True)
        self.faces = faces.reshape(-1, 3)
        self.matrix = self.matrix[used]
        self.rest, self.weights, self.offset = self.rest[used], self.weights[used], self.offset[used]

    def normals(self) -> np.ndarray:
        return vertex_normals(self.rest, self.faces)

    def posed(self, expressed: np.ndarray, bones: np.ndarray) -> np.ndarray:
        return apply_skinning(self.of_body(expressed) + self.offset, self.weights, bones)
