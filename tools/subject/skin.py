"""The skin: its colour, roughness and relief, painted in the rest pose, and the class of every face."""

import numpy as np

from .geometry import NECK, Body, Part, bump, smoothstep, wave_noise

# BiSeNet's classes.
SKIN, LEFT_BROW, RIGHT_BROW, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR = 1, 2, 3, 4, 5, 7, 8
NOSE, MOUTH, UPPER_LIP, LOWER_LIP, NECK_SKIN, CLOTH, HAIR = 10, 11, 12, 13, 14, 16, 17

LOWEST, WIDEST = -0.24, 0.24  # metres: what the camera can see, and what the shirt hides
BASE = np.array([0.64, 0.375, 0.275])
LIPS = np.array([0.46, 0.19, 0.17])
INSIDE = np.array([0.50, 0.19, 0.17])
HAIR_BROWN = np.array([0.085, 0.050, 0.030])
LID_CLEARANCE = 0.0004
MOLES = (  # near which point, and how large
    (0.041, -0.030, 0.098, 0.0011),
    (-0.026, 0.006, 0.128, 0.0008),
    (-0.051, -0.045, 0.085, 0.0010),
    (0.024, -0.078, 0.105, 0.0008),
    (-0.018, 0.064, 0.135, 0.0008),
)
EYE_RADIUS, CORNEA_HEIGHT = 0.0163, 0.0006


class Skin(Part):
    """The skin with per-vertex `color` (V, 3) and `roughness` (V,) and per-face `classes` (F,)."""

    def __init__(self, body: Body, subdivisions: int = 2):
        faces = body.groups["body"]
        centers = body.vertices[faces].mean(1)
        keep = (centers[:, 1] > LOWEST) & (np.abs(centers[:, 0]) < WIDEST)
        super().__init__(body, faces[keep], subdivisions)
        self.lips, self.ears, self.lids, self.inside = (
            self.of_body(body.masks[name]) for name in ("lips", "ears", "eyelids", "inside-mouth")
        )
        self.eyes = body.joints[3:]
        self.scalp = self._scalp_density()
        self.color = self._paint()
        self.roughness = self._roughness()
        self.classes = self._classify()
        relief = 1 - np.maximum(self.lids, self.inside).clip(0, 1)
        relief *= wave_noise(self.rest, 1500, 11) + 0.7 * wave_noise(self.rest, 2600, 12)
        self.offset = self.normals() * (4e-5 * relief)[:, None]

    def _scalp_density(self) -> np.ndarray:
        """How much hair grows, in [0, 1]: an uneven hairline behind which it thickens over a centimetre."""
        around = self.rest - [0, 0.03, 0.03]
        azimuth = np.arctan2(np.abs(around[:, 0]), around[:, 2])
        height = np.interp(
            azimuth,
            [0, 0.30, 0.55, 0.85, 1.10, 1.30, 1.48, 1.62, 1.85, 2.3, 3.14],
            [0.087, 0.090, 0.092, 0.076, 0.050, 0.030, 0.004, 0.012, -0.008, -0.040, -0.052],
        )
        uneven = 0.0035 * wave_noise(self.rest, 160, 21) + 0.002 * wave_noise(self.rest, 420, 22)
        # A little higher above the subject's left temple than above the right.
        uneven += 0.004 * smoothstep(self.rest[:, 0], 0.02, 0.05)
        density = smoothstep(self.rest[:, 1] - height + uneven, -0.005, 0.008)
        head = (self.weights[:, NECK] > 0.9) & (self.rest[:, 2] < 0.14)
        return density * head * (self.ears < 0.25) * (self.inside < 0.1)

    def _paint(self) -> np.ndarray:
        y, z = self.rest[:, 1], self.rest[:, 2]
        color = BASE * np.ones((len(self.rest), 1))
        # Mottling: blood in patches of a centimetre, melanin in specks of two millimetres.
        blood = 0.35 * wave_noise(self.rest, 150, 1) + 0.3 * wave_noise(self.rest, 420, 2)
        color *= 1 - 0.035 * blood[:, None] * [0.3, 1.0, 1.0]
        specks = smoothstep(wave_noise(self.rest, 1250, 3), 1.3, 2.2)
        freckled = bump(self.rest, [0.004, 0.004, 0.12], [0.05, 0.022, 0.05])
        color *= 1 - (specks * (0.06 + 0.16 * freckled))[:, None] * [0.6, 0.9, 1.0]
        color *= 1 - 0.03 * wave_noise(self.rest, 1900, 4)[:, None]

        cheeks = sum(bump(self.rest, [s * 0.046, -0.014, 0.10], [0.020, 0.019, 0.05]) for s in (1, -0.96))
        tip = bump(self.rest, [0, -0.004, 0.155], [0.016, 0.016, 0.022])
        chin = bump(self.rest, [0.002, -0.082, 0.115], [0.020, 0.014, 0.03])
        redness = 0.75 * cheeks + 0.9 * tip + 0.4 * chin + 0.8 * self.ears.clip(0, 1)
        color *= 1 - redness[:, None] * [0.02, 0.17, 0.19]
        forehead = bump(self.rest, [0, 0.075, 0.12], [0.05, 0.03, 0.05])
        color *= 1 + forehead[:, None] * [0.03, 0.05, 0.03]
        under_eyes = sum(
            bump(self.rest, eye + np.array([-0.003 * np.sign(eye[0]), -0.0175, 0.013]), [0.014, 0.0055, 0.02])
            for eye in self.eyes
        )
        color *= 1 - under_eyes[:, None] * [0.13, 0.17, 0.11]
        color *= 1 - self.lids[:, None].clip(0, 1) * [0.06, 0.13, 0.10]
        stubble = smoothstep(y, -0.012, -0.040) * smoothstep(z, 0.05, 0.09) * smoothstep(y, -0.118, -0.095)
        stubble *= 1 - 0.8 * bump(self.rest, [0, -0.03, 0.12], [0.075, 0.03, 0.09])
        mustache = bump(self.rest, [0, -0.0185, 0.14], [0.026, 0.006, 0.03])
        stubble = (stubble + 0.6 * mustache) * (1 - smoothstep(self.lips, 0.1, 0.5))
        grain = 1 + 0.5 * wave_noise(self.rest, 2300, 5)
        color *= 1 - 0.14 * (stubble * grain)[:, None].clip(0, 2) * [1.0, 0.85, 0.65]
        for *center, radius in MOLES:
            nearest = self.rest[((self.rest - center) ** 2).sum(1).argmin()]
            color *= 1 - 0.6 * bump(self.rest, nearest, radius)[:, None] * [0.8, 1.0, 1.0]

        def cover(amount: np.ndarray, paint: np.ndarray) -> None:
            color[:] = color * (1 - amount[:, None]) + paint * amount[:, None]

        creases = 1 + 0.10 * wave_noise(self.rest * [1, 0.15, 0.15], 2600, 6)
        cover(0.85 * smoothstep(self.lips, 0.15, 0.75), LIPS * creases[:, None])
        cover(smoothstep(self.inside, 0.3, 0.7), INSIDE)
        cover(0.75 * self.scalp, HAIR_BROWN)
        return color.clip(0.005, 0.95)

    def _roughness(self) -> np.ndarray:
        """Oily along forehead and nose, matt on the cheeks, moist on the lips and within the mouth."""
        oily = bump(self.rest, [0, 0.07, 0.13], [0.035, 0.028, 0.05])
        oily += bump(self.rest, [0, 0.005, 0.15], [0.012, 0.028, 0.03])
        oily += 0.5 * bump(self.rest, [0, -0.08, 0.12], [0.016, 0.012, 0.03])
        roughness = 0.50 - 0.12 * oily.clip(0, 1)
        roughness += 0.05 * wave_noise(self.rest, 300, 7) + 0.035 * wave_noise(self.rest, 1700, 8)
        wet = np.maximum(0.8 * smoothstep(self.lips, 0.3, 0.8), smoothstep(self.inside, 0.3, 0.7))
        return (roughness * (1 - wet) + 0.30 * wet).clip(0.22, 0.8)

    def _classify(self) -> np.ndarray:
        centers = self.rest[self.faces].mean(1)
        x, y, z = centers.T

        def of_faces(values: np.ndarray) -> np.ndarray:
            return values[self.faces].mean(1)

        classes = np.full(len(self.faces), SKIN, np.uint8)
        neck = (of_faces(self.weights[:, 0]) > 0.04) | (y < -0.078 - 0.25 * (0.115 - z).clip(0, None))
        classes[neck] = NECK_SKIN
        ridge = np.interp(y, [-0.016, -0.008, 0.006, 0.030], [0.020, 0.021, 0.014, 0.009])
        classes[(np.abs(x) < ridge) & (y > -0.014) & (y < 0.030) & (z > 0.12)] = NOSE
        ears = of_faces(self.ears) > 0.4
        classes[ears] = np.where(x[ears] > 0, LEFT_EAR, RIGHT_EAR)
        lips = of_faces(self.lips) > 0.45
        lower = of_faces(self.weights[:, 2]) > 0.35
        classes[lips] = np.where(lower[lips], LOWER_LIP, UPPER_LIP)
        classes[of_faces(self.inside) > 0.5] = MOUTH
        return classes

    def posed(self, expressed: np.ndarray, bones: np.ndarray) -> np.ndarray:
        return apply_lid_contact(super().posed(expressed, bones), self.eyes, bones)


def apply_lid_contact(points: np.ndarray, eyes: np.ndarray, bones: np.ndarray) -> np.ndarray:
    """Lift what a half-closed lid's straight path has sunk into the eyeballs back onto them.

    Args:
        points: (N, 3) posed.   eyes: (2, 3) rest centres.   bones: (J, 3, 4).
    """
    points = points.copy()
    for eye, bone in zip(eyes, bones[3:], strict=True):
        center = bone[:, :3] @ eye + bone[:, 3]
        forward = bone[:, 2]
        ray = points - center
        distance = np.linalg.norm(ray, axis=1)
        near = np.flatnonzero(distance < 0.022)
        direction = ray[near] / distance[near, None]
        height = eyeball_radius(np.arccos((direction @ forward).clip(-1, 1))) + LID_CLEARANCE
        raised = np.maximum(distance[near], height)
        points[near] = center + direction * raised[:, None]
    return points


def eyeball_radius(polar: np.ndarray) -> np.ndarray:
    """Distance of the eyeball's surface from its centre, `polar` radians off the gaze: the cornea bulges."""
    return EYE_RADIUS + CORNEA_HEIGHT * smoothstep(polar, 0.50, 0.0)
