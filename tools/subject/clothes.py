"""A crew-neck shirt: the body's tights below a neckline, with folds, and a ribbed collar around the neck."""

import numpy as np
from scipy.interpolate import LinearNDInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

from .geometry import Body, Part, apply_skinning, grid_faces, smoothstep, wave_noise
from .skin import Skin

COLOR = np.array([0.045, 0.075, 0.125])
NECK_AXIS_Z = 0.022
COLLAR_HALF_HEIGHT, COLLAR_HALF_THICKNESS = 0.0100, 0.0034
SHIRT_GAP = 0.005


def neckline(angle: np.ndarray) -> np.ndarray:
    """Height of the collar's middle by the angle about the neck, 0 at the throat: lower in front."""
    return -0.116 - 0.026 * np.cos(angle) + 0.004 * np.cos(2 * angle)


def around_neck(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angle about the neck's axis, 0 at the throat, and distance from it: (N, 3) to (N,) and (N,)."""
    x, z = points[:, 0], points[:, 2] - NECK_AXIS_Z
    return np.arctan2(x, z), np.hypot(x, z)


class Shirt(Part):
    def __init__(self, body: Body, collar: "Collar"):
        faces = body.groups["helper-tights"]
        centers = body.vertices[faces].mean(1)
        keep = (centers[:, 1] < -0.05) & (centers[:, 1] > -0.30) & (np.abs(centers[:, 0]) < 0.30)
        super().__init__(body, faces[keep], subdivisions=2)
        # It begins under the collar's band.
        centers = self.rest[self.faces].mean(1)
        angle, distance = around_neck(centers)
        outside = distance - collar.distance_at(angle)
        below = neckline(angle) - centers[:, 1]
        self.crop((outside > 0.002) & (below > -0.004) | (distance > 0.14))
        pulled = self.rest * [1, 0.35, 0.6]  # folds run down from the shoulders
        folds = 0.0016 * wave_noise(pulled, 75, 41) + 0.0007 * wave_noise(pulled, 190, 42)
        folds *= smoothstep(self.rest[:, 1], -0.12, -0.16)
        # Near its edge it is tucked in below the collar.
        angle, distance = around_neck(self.rest)
        gap = np.interp(distance - collar.distance_at(angle), [0.003, 0.013], [-0.004, SHIRT_GAP])
        knit = 0.00012 * wave_noise(self.rest, 1400, 43)
        self.offset = self.normals() * (gap + folds.clip(-0.003, None) + knit)[:, None]
        shade = 1 + 0.05 * wave_noise(self.rest, 1700, 44) + 0.04 * wave_noise(self.rest, 100, 45)
        self.color = (COLOR * shade[:, None]).clip(0.005, 1)


class Collar:
    """A closed band of elliptic section around the neck; nearby skin gives its weights."""

    SECTORS, SECTION = 320, 20

    def __init__(self, skin: Skin):
        angle, radius = around_neck(skin.rest)
        y = skin.rest[:, 1]
        near = (y > -0.21) & (y < -0.05) & (radius < 0.15) & (skin.weights[:, 2] < 0.1)
        angle, radius, y = angle[near], radius[near], y[near]
        wrapped = np.concatenate([angle - 2 * np.pi, angle, angle + 2 * np.pi])
        # In metres both ways, so that the triangulation is fair.
        surface = LinearNDInterpolator(np.stack([0.06 * wrapped, np.tile(y, 3)], 1), np.tile(radius, 3))
        turn = np.linspace(-np.pi, np.pi, self.SECTORS, endpoint=False)
        section = np.linspace(0, 2 * np.pi, self.SECTION, endpoint=False)
        height = neckline(turn)
        upper, lower = (
            gaussian_filter1d(surface(0.06 * turn, height + d), 4, mode="wrap")
            for d in (0.8 * COLLAR_HALF_HEIGHT, -0.8 * COLLAR_HALF_HEIGHT)
        )
        # The band leans as the neck does there, and ribs run along it.
        rib = 1 + 0.10 * np.cos(turn * self.SECTORS / 4)[:, None]
        up = COLLAR_HALF_HEIGHT * np.cos(section)
        out = COLLAR_HALF_THICKNESS * (1.15 + np.sin(section) * rib)
        lean = (upper - lower) / (1.6 * COLLAR_HALF_HEIGHT)
        distance = ((upper + lower) / 2)[:, None] + lean[:, None] * up + out + 0.0012
        self.angles, self.distances = turn, (upper + lower) / 2
        self.rest = np.stack(
            [
                distance * np.sin(turn)[:, None],
                height[:, None] + up + 0 * distance,
                NECK_AXIS_Z + distance * np.cos(turn)[:, None],
            ],
            -1,
        ).reshape(-1, 3)
        nearest = cKDTree(skin.rest).query(self.rest, k=24)[1]
        self.weights = skin.weights[nearest].mean(1)
        self.faces = grid_faces(self.SECTORS, self.SECTION, wrapped=True)[:, ::-1]
        self.color = COLOR * (0.9 + 0.12 * np.cos(turn * self.SECTORS / 4))[:, None, None]
        self.color = np.broadcast_to(self.color, (self.SECTORS, self.SECTION, 3)).reshape(-1, 3)

    def distance_at(self, angle: np.ndarray) -> np.ndarray:
        """The skin's distance from the neck's axis at the band's middle."""
        return np.interp(angle, self.angles, self.distances, period=2 * np.pi)

    def posed(self, bones: np.ndarray) -> np.ndarray:
        return apply_skinning(self.rest, self.weights, bones)
