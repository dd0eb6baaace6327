"""Hair and brows as strands grown on the skin in the rest pose; the neck's bone carries them rigidly."""

import numpy as np
from scipy.spatial import cKDTree

from .geometry import NECK, smoothstep, wave_noise
from .skin import Skin

# How steeply the segments of a strand leave the skull: up at first, down to it at the tip.
RISE = (0.88, 0.55, 0.26, 0.04, -0.10, -0.20, -0.28)
POINTS = 2 + len(RISE)
LOWEST_HAIR = 0.0006
CLUMPS = 420
PARTING = 0.026  # x of the parting, on the subject's left


class Hair:
    """Side-swept hair: strands (N, POINTS, 3) and a shade in {0, 1, 2} for each."""

    def __init__(self, skin: Skin, count: int = 9000, seed: int = 1):
        self.generator = np.random.default_rng(seed)
        head = skin.weights[:, NECK] > 0.9
        normals = skin.normals()
        self.scalp_points, self.scalp_normals = skin.rest[head], normals[head]
        self.scalp_tree = cKDTree(self.scalp_points)

        centers, *grounds = self._roots(skin, normals, CLUMPS, power=0.5)
        guides = self._grow(centers, *grounds, wander=0.30)
        roots, *grounds = self._roots(skin, normals, count, power=1.0)
        strands = self._grow(roots, *grounds, wander=0.16)
        # Tips gather towards the guide nearest to the root, some strands hardly at all.
        nearest = cKDTree(centers).query(roots)[1]
        along = np.linspace(0, 1, POINTS)[None, :, None]
        gathering = self.generator.beta(2.0, 1.6, count)[:, None, None] * 0.85 * along**1.2
        course = guides[nearest] - centers[nearest][:, None]
        span = np.linalg.norm(guides[nearest, -1] - centers[nearest], axis=1)
        reach = np.linalg.norm(strands[:, -1] - roots, axis=1) / (span + 1e-9)
        target = roots[:, None] + course * reach.clip(0, 1)[:, None, None]
        target += 0.35 * (centers[nearest] - roots)[:, None] * along
        strands += gathering * (target - strands)
        above, up = self._height(strands[:, 1:])
        strands[:, 1:] += up * (LOWEST_HAIR - above).clip(0)[..., None]
        self.strands = strands
        self.shades = self.generator.choice(3, count, p=[0.30, 0.45, 0.25])

    def _roots(self, skin: Skin, normals: np.ndarray, count: int, power: float) -> tuple[np.ndarray, ...]:
        """Random roots (count, 3), their normals and the scalp's density there, more where it is denser."""
        corners = skin.rest[skin.faces]
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        weight = area * skin.scalp[skin.faces].mean(1) ** power
        faces = skin.faces[self.generator.choice(len(area), count, p=weight / weight.sum())]
        shares = self.generator.dirichlet([1, 1, 1], count)
        root = np.einsum("nk,nkd->nd", shares, skin.rest[faces])
        normal = np.einsum("nk,nkd->nd", shares, normals[faces])
        density = np.einsum("nk,nk->n", shares, skin.scalp[faces])
        return root, normal / np.linalg.norm(normal, axis=1, keepdims=True), density

    def _style(self, root: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Per root: the way hair falls (N, 3), its length, its lift off the skull, and how much it is a side."""
        x, y, z = root.T
        side = smoothstep(y - 0.25 * (0.03 - z).clip(0, None), 0.088, 0.050)
        away = np.tanh((x - PARTING) / 0.006)
        sweep = np.stack([away, -0.15 - 0 * x, np.where(z > 0.07, 0.35, -0.25)], 1)
        # At the front it rises, goes across and falls back; behind the crown it goes down.
        back = smoothstep(z, 0.035, -0.01)[:, None]
        sweep = sweep * (1 - back) + np.array([0, -0.6, -0.8]) * back
        down = np.stack([0.15 * np.sign(x), -1 + 0 * x, np.where(z > 0.05, -0.55, -0.25)], 1)
        flow = sweep * (1 - side[:, None]) + down * side[:, None]
        nape = smoothstep(y, 0.02, -0.03) * smoothstep(z, 0.03, -0.02)
        length = 0.074 * (1 - side) + 0.040 * side
        length *= 1 - 0.45 * nape
        temple = side * smoothstep(z, 0.045, 0.075)
        length *= 1 - 0.40 * temple
        # Cut around the ears.
        above_ear = smoothstep(np.abs(x), 0.055, 0.065) * smoothstep(np.abs(z - 0.015), 0.060, 0.035)
        length = np.minimum(length, length + above_ear * ((y - 0.010).clip(0.010) - length))
        lift = 0.015 * (1 - side) + 0.010 * side * (1 - 0.8 * nape)
        return flow, length, lift, side

    def _grow(self, root: np.ndarray, normal: np.ndarray, density: np.ndarray, wander: float) -> np.ndarray:
        """Strands (N, POINTS, 3): they rise from their roots, then follow the style along the skull."""
        count = len(root)
        flow, length, lift, side = self._style(root)
        swirl = np.stack([wave_noise(root, 70, 31 + axis) for axis in range(3)], 1)
        flow = flow + 0.30 * swirl + self.generator.normal(0, wander, (count, 3))
        # Thin, short hairs at the hairline.
        length *= self.generator.uniform(0.6, 1.1, count) * (0.30 + 0.70 * smoothstep(density, 0.05, 0.9))
        lift *= self.generator.beta(1.6, 1.4, count) * 1.8 * (0.35 + 0.65 * density)
        step = length / (POINTS - 1)
        curl = self.generator.normal(0, 1, (count, 3))
        phase = self.generator.uniform(0, 2 * np.pi, count)
        points = [root - 0.001 * normal, root + 0.3 * step[:, None] * normal]
        for k, outward in enumerate(RISE, start=2):
            _, up = self._height(points[-1])
            tangent = flow - (flow * up).sum(1, keepdims=True) * up
            tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-9
            rise = outward * (1 - 0.35 * side)
            direction = tangent * np.sqrt(1 - rise**2)[:, None] + up * rise[:, None]
            direction += 0.05 * curl * np.sin(phase + 1.1 * k)[:, None]
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            here = points[-1] + direction * step[:, None]
            # What lies lower than it should rises half the way, and nothing stays inside the skull.
            above, up = self._height(here)
            missing = np.maximum(0.5 * (lift * min(k / 4, 1) - above), 2 * LOWEST_HAIR - above)
            points.append(here + up * missing.clip(0)[:, None])
        return np.stack(points, 1)

    def _height(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How high points (..., 3) lie above the skull (...), and which way is up there (..., 3)."""
        nearest = self.scalp_tree.query(points)[1]
        up = self.scalp_normals[nearest]
        return ((points - self.scalp_points[nearest]) * up).sum(-1), up

    def posed(self, bones: np.ndarray) -> np.ndarray:
        bone = bones[NECK]
        return self.strands @ bone[:, :3].T + bone[:, 3]


class Brows:
    """Short hairs rooted at skin vertices, which carry them; the two sides differ a little."""

    POINTS = 4

    def __init__(self, skin: Skin, count: int = 420, seed: int = 2):
        generator = np.random.default_rng(seed)
        front = np.flatnonzero((skin.rest[:, 2] > 0.08) & (skin.lids < 0.9))
        tree, normals = cKDTree(skin.rest[front, :2]), skin.normals()
        eye_height = skin.eyes[0, 1]
        offsets, vertices = [], []
        for side, height, thickness in ((1, 0.0009, 1.0), (-1, 0.0, 1.1)):
            along = generator.beta(1.15, 1.25, count)
            x = side * (0.0125 + 0.0415 * along)
            y = eye_height + height + np.interp(along, [0, 0.3, 0.65, 1], [0.0180, 0.0212, 0.0230, 0.0165])
            width = thickness * np.interp(along, [0, 0.12, 0.5, 1], [0.0026, 0.0034, 0.0026, 0.0006])
            y += generator.normal(0, 0.5, count).clip(-1.3, 1.3) * width
            vertex = front[tree.query(np.stack([x, y], 1))[1]]
            root = np.stack([x, y, skin.rest[vertex, 2]], 1)
            normal = normals[vertex]
            angle = np.interp(along, [0, 0.25, 0.6, 1], [1.25, 0.50, 0.10, -0.35])
            angle += generator.normal(0, 0.22, count)
            direction = np.stack([side * np.cos(angle), np.sin(angle), 0 * angle], 1)
            direction -= (direction * normal).sum(1, keepdims=True) * normal
            length = generator.uniform(0.0045, 0.0085, count) * np.interp(along, [0, 0.2, 1], [0.7, 1, 0.8])
            s = np.linspace(0, 1, self.POINTS)[None, :, None]
            strands = root[:, None] + direction[:, None] * length[:, None, None] * s
            strands = strands + normal[:, None] * (0.0002 + 0.0009 * np.sin(2.4 * s))
            offsets.append(strands - skin.rest[vertex][:, None])
            vertices.append(vertex)
        self.offsets, self.vertices = np.concatenate(offsets), np.concatenate(vertices)
        self.sides = np.repeat([0, 1], count)

    def posed(self, skin_points: np.ndarray, bones: np.ndarray) -> np.ndarray:
        return skin_points[self.vertices][:, None] + self.offsets @ bones[NECK][:, :3].T
