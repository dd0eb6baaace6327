"""Eyeballs, lashes and the inside of the mouth."""

import numpy as np

from .geometry import Body, Part, grid_faces, polyline_points, smoothstep
from .skin import apply_lid_contact, eyeball_radius

IRIS_EDGE, PUPIL_EDGE = 0.385, 0.145  # radians off the gaze
SCLERA = np.array([0.70, 0.655, 0.62])
IRIS_INNER, IRIS_OUTER = np.array([0.20, 0.125, 0.055]), np.array([0.10, 0.155, 0.165])


class Eyeball:
    """An analytic eyeball: sphere with a corneal bulge, painted by its angles about the gaze."""

    def __init__(self, body: Body, joint: int, rings: int = 80, sectors: int = 128):
        # Rings crowd towards the iris, where the paint is fine.
        polar = np.pi * np.linspace(0, 1, rings) ** 1.7
        angle = np.linspace(0, 2 * np.pi, sectors, endpoint=False)
        polar, angle = (grid.ravel() for grid in np.meshgrid(polar, angle, indexing="ij"))
        direction = np.stack([np.sin(polar) * np.cos(angle), np.sin(polar) * np.sin(angle), np.cos(polar)], 1)
        self.rest = body.joints[joint] + direction * eyeball_radius(polar)[:, None]
        self.faces = grid_faces(rings, sectors)
        self.joint = joint
        self.color = self._paint(polar, angle)

    @staticmethod
    def _paint(polar: np.ndarray, angle: np.ndarray) -> np.ndarray:
        veins = np.sin(7 * angle + 4 * np.sin(3 * angle) + 9 * polar).clip(0, 1) ** 12
        red = smoothstep(polar, 0.5, 1.3)[:, None]
        color = SCLERA * (1 - red * [0.06, 0.24, 0.26]) * (1 - 0.25 * red * veins[:, None] * [0.2, 1, 1])
        fibres = 1 + 0.30 * np.sin(41 * angle + 2 * np.sin(5 * angle)) + 0.20 * np.sin(19 * angle + 1.3)
        depth = smoothstep(polar, 0.16, 0.33)[:, None]
        iris = (IRIS_INNER * (1 - depth) + IRIS_OUTER * depth) * fibres[:, None]
        iris *= 1 - 0.80 * np.exp(-(((polar - IRIS_EDGE) / 0.045) ** 2))[:, None]
        inside = smoothstep(polar, IRIS_EDGE + 0.03, IRIS_EDGE - 0.015)[:, None]
        color = color * (1 - inside) + iris * inside
        color *= smoothstep(polar, PUPIL_EDGE - 0.015, PUPIL_EDGE + 0.015)[:, None]
        return color.clip(0.004, 0.9)

    def posed(self, bones: np.ndarray) -> np.ndarray:
        bone = bones[self.joint]
        return self.rest @ bone[:, :3].T + bone[:, 3]


class Lashes:
    """Curves from the lid's edge to the outer edge of the body's lash cards, curled, and the wet line."""

    POINTS = 5

    def __init__(self, body: Body, side: str, joint: int):
        self.cards, self.eye = [], body.joints[joint]
        generator = np.random.default_rng(joint)
        for card, count, shortening in (("2", 90, 1.0), ("1", 45, 0.62)):
            part = Part(body, body.groups[f"helper-{side}-eyelashes-{card}"], 0)
            root, tip = self._edges(part)
            along = (np.arange(count) + generator.uniform(0.1, 0.9, count)) / count
            shift = 0.95 * along + generator.normal(0, 0.018, count)
            reach = shortening * generator.uniform(0.65, 1.05, count)
            reach *= 1 - 0.55 * smoothstep(np.abs(along - 0.45), 0.30, 0.55)
            self.cards.append((part, root, tip, along, shift.clip(0, 1), reach))

    def _edges(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """The card's boundary on the lid and the one at the tips, both by rising |x|."""
        edges = np.sort(
            np.concatenate([part.faces[:, [0, 1]], part.faces[:, [1, 2]], part.faces[:, [2, 0]]]), 1
        )
        edges, count = np.unique(edges, axis=0, return_counts=True)
        boundary = np.unique(edges[count == 1])
        distance = np.linalg.norm(part.rest[boundary] - self.eye, axis=1)
        middle = (np.quantile(distance, 0.1) + np.quantile(distance, 0.9)) / 2
        return tuple(
            chosen[np.argsort(np.abs(part.rest[chosen, 0]))]
            for chosen in (boundary[distance < middle], boundary[distance >= middle])
        )

    def posed(
        self, expressed: np.ndarray, bones: np.ndarray, eyes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lashes (N, POINTS, 3) and the wet line on the lower lid's edge (M, 3)."""
        curves = []
        for part, root, tip, along, shift, reach in self.cards:
            points = part.posed(expressed, bones)
            start, end = polyline_points(points[root], along), polyline_points(points[tip], shift)
            end = start + (end - start) * reach[:, None]
            s = np.linspace(0, 1, self.POINTS)[None, :, None]
            # A quadratic curve that leaves the lid outwards and bends up to the tip.
            middle = (start + end) / 2
            middle += 0.18 * np.linalg.norm(end - start, axis=1)[:, None] * bones[1][:, 2]
            curve = (1 - s) ** 2 * start[:, None] + 2 * s * (1 - s) * middle[:, None] + s**2 * end[:, None]
            curves.append(apply_lid_contact(curve.reshape(-1, 3), eyes, bones).reshape(curve.shape))
            edge = polyline_points(points[root], np.linspace(0.06, 0.94, 14))
        center = bones[1][:, :3] @ self.eye + bones[1][:, 3]
        ray = edge - center
        wet = center + ray / np.linalg.norm(ray, axis=1, keepdims=True) * (
            eyeball_radius(np.array(1.0)) + 3e-4
        )
        return np.concatenate(curves), wet


class Teeth(Part):
    """Both rows with gums and the gaps between the teeth painted on."""

    ENAMEL, GUM = np.array([0.74, 0.69, 0.58]), np.array([0.42, 0.14, 0.13])

    def __init__(self, body: Body):
        super().__init__(
            body, np.concatenate([body.groups["helper-upper-teeth"], body.groups["helper-lower-teeth"]]), 4
        )
        x, y, z = self.rest.T
        upper = self.weights[:, 2] < 0.5
        arch = np.arctan2(x, z - 0.098) / 0.235  # one unit a tooth
        gap = np.exp(-(((arch - np.round(arch)) / 0.11) ** 2))
        neck = np.where(upper, smoothstep(y, -0.0285, -0.0262), smoothstep(y, -0.050, -0.053))
        neck = np.clip(neck - 0.25 * (1 - gap), 0, 1)
        deep = smoothstep(z, 0.128, 0.105)
        enamel = self.ENAMEL * (1 - 0.5 * gap[:, None]) * (1 - 0.35 * deep[:, None])
        self.color = enamel * (1 - neck[:, None]) + self.GUM * neck[:, None]


class Tongue(Part):
    def __init__(self, body: Body):
        super().__init__(body, body.groups["helper-tongue"], 1)
        groove = np.exp(-((self.rest[:, 0] / 0.0025) ** 2))
        self.color = np.array([0.60, 0.25, 0.23]) * (1 - 0.25 * groove[:, None])
        self.offset = -self.normals() * (0.0006 * groove)[:, None]
