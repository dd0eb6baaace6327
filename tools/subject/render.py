"""One frame through Mitsuba's scalar path tracer: colour, matte and labels."""

import tempfile
from pathlib import Path

import mitsuba
import numpy as np
from bake_head import vertex_normals

from .clothes import Collar, Shirt
from .eyes import Eyeball, Lashes, Teeth, Tongue
from .geometry import Body
from .hair import Brows, Hair
from .skin import CLOTH, HAIR, LEFT_BROW, LEFT_EYE, MOUTH, RIGHT_BROW, RIGHT_EYE, Skin

mitsuba.set_variant("scalar_rgb")

FIELD_OF_VIEW = 13.5  # degrees
CAMERA_DISTANCE, CAMERA_DROP = 1.60, 0.015  # metres, from the head's origin
MAX_DEPTH = 5
LABEL_SUPERSAMPLING = 3
VERTEX_COLOR = {"type": "mesh_attribute", "name": "vertex_color"}
VERTEX_ROUGHNESS = {"type": "mesh_attribute", "name": "vertex_roughness"}
MATERIALS = {
    "skin": {
        "type": "twosided",
        "bsdf": {
            "type": "principled",
            "base_color": VERTEX_COLOR,
            "roughness": VERTEX_ROUGHNESS,
            "specular": 0.45,
            "flatness": 0.6,
            "sheen": 0.15,
            "sheen_tint": 0.7,
        },
    },
    "eye": {
        "type": "principled",
        "base_color": VERTEX_COLOR,
        "roughness": 0.25,
        "specular": 0.5,
        "clearcoat": 1.0,
        "clearcoat_gloss": 0.97,
    },
    "wet": {
        "type": "principled",
        "base_color": {"type": "rgb", "value": [0.55, 0.36, 0.32]},
        "roughness": 0.2,
        "specular": 0.9,
        "clearcoat": 1.0,
        "clearcoat_gloss": 0.95,
    },
    "mouth": {
        "type": "twosided",
        "bsdf": {"type": "principled", "base_color": VERTEX_COLOR, "roughness": 0.28, "specular": 0.5},
    },
    "cloth": {
        "type": "twosided",
        "bsdf": {
            "type": "principled",
            "base_color": VERTEX_COLOR,
            "roughness": 0.9,
            "specular": 0.2,
            "sheen": 0.6,
            "sheen_tint": 0.4,
        },
    },
    "lash": {"type": "diffuse", "reflectance": {"type": "rgb", "value": [0.018, 0.012, 0.009]}},
} | {
    f"hair{shade}": {
        "type": "hair",
        "eumelanin": eumelanin,
        "pheomelanin": pheomelanin,
        "longitudinal_roughness": 0.32,
        "azimuthal_roughness": 0.40,
    }
    for shade, (eumelanin, pheomelanin) in enumerate([(1.2, 0.35), (1.7, 0.40), (2.4, 0.40)])
}


def look_at(origin: list[float], target: list[float]):
    return mitsuba.ScalarTransform4f().look_at(origin, target, [0, 1, 0])


def softbox(origin: list[float], half_size: float, radiance: list[float]) -> dict:
    return {
        "type": "rectangle",
        "to_world": look_at(origin, [0, 0, 0.05]) @ mitsuba.ScalarTransform4f().scale(half_size),
        "emitter": {"type": "area", "radiance": {"type": "rgb", "value": radiance}},
    }


LIGHTS = {
    "surroundings": {"type": "constant", "radiance": {"type": "rgb", "value": [0.30, 0.31, 0.33]}},
    "key": ([1.0, 0.75, 1.5], 0.55, [6.4, 5.8, 5.1]),
    "fill": ([-0.7, 0.0, 2.0], 0.6, [1.9, 1.95, 2.05]),
    "rim": ([-0.9, 0.7, -0.9], 0.45, [2.4, 2.5, 2.7]),
}


class Subject:
    """All parts of the subject, made once; `scene` poses them."""

    def __init__(self, source: Path, hairs: int):
        self.body = Body(source)
        self.skin = Skin(self.body)
        self.hair, self.brows = Hair(self.skin, hairs), Brows(self.skin)
        self.eyeballs = [Eyeball(self.body, joint) for joint in (3, 4)]
        self.lashes = [Lashes(self.body, side, joint) for side, joint in (("l", 3), ("r", 4))]
        self.teeth, self.tongue = Teeth(self.body), Tongue(self.body)
        self.collar = Collar(self.skin)
        self.shirt = Shirt(self.body, self.collar)
        self.folder = Path(tempfile.mkdtemp(prefix="subject-"))

    def scene(self, pose: np.ndarray, expression: np.ndarray) -> "PosedScene":
        posed = PosedScene(self.folder)
        expressed, bones = self.body.expressed(expression), self.body.bones(pose, expression)
        skin = self.skin
        skin_points = skin.posed(expressed, bones)
        posed.add_mesh("skin", "skin", skin_points, skin.faces, skin.color, skin.classes, skin.roughness)
        for part, name, material, label in (
            (self.teeth, "teeth", "mouth", MOUTH),
            (self.tongue, "tongue", "mouth", MOUTH),
            (self.shirt, "shirt", "cloth", CLOTH),
        ):
            posed.add_mesh(name, material, part.posed(expressed, bones), part.faces, part.color, label)
        collar = self.collar
        posed.add_mesh("collar", "cloth", collar.posed(bones), collar.faces, collar.color, CLOTH)
        for k, (eyeball, lashes) in enumerate(zip(self.eyeballs, self.lashes, strict=True)):
            label = (LEFT_EYE, RIGHT_EYE)[k]
            posed.add_mesh(f"eye{k}", "eye", eyeball.posed(bones), eyeball.faces, eyeball.color, label)
            strands, wet = lashes.posed(expressed, bones, skin.eyes)
            posed.add_curves(f"lash{k}", "lash", strands, (0.00013, 0.00004), label)
            posed.add_curves(f"wet{k}", "wet", wet[None], (0.0004, 0.0004), label)
        brows, hair = self.brows.posed(skin_points, bones), self.hair.posed(bones)
        for side, label in enumerate((LEFT_BROW, RIGHT_BROW)):
            posed.add_curves(
                f"brow{side}", "hair1", brows[self.brows.sides == side], (0.00014, 0.00005), label
            )
        for shade in range(3):
            strands = hair[self.hair.shades == shade]
            posed.add_curves(f"hair{shade}", f"hair{shade}", strands, (0.00023, 0.00008), HAIR)
        return posed


class PosedScene:
    """A scene in the making, with the label of each shape (a number, or one per face)."""

    def __init__(self, folder: Path):
        self.folder, self.labels = folder, {}
        self.content = {"type": "scene"}
        for name, light in LIGHTS.items():
            self.content[name] = light if isinstance(light, dict) else softbox(*light)

    def add_mesh(self, name, material, points, faces, color, label, roughness=None) -> None:
        properties = mitsuba.Properties()
        properties["bsdf"] = mitsuba.load_dict(MATERIALS[material])
        mesh = mitsuba.Mesh(name, len(points), len(faces), has_vertex_normals=True, props=properties)
        attributes = {"vertex_color": color}
        if roughness is not None:
            attributes["vertex_roughness"] = roughness[:, None]
        for attribute, values in attributes.items():
            mesh.add_attribute(attribute, values.shape[1], values.ravel().tolist())
        parameters = mitsuba.traverse(mesh)
        parameters["vertex_positions"] = points.astype(np.float32).ravel()
        parameters["vertex_normals"] = vertex_normals(points, faces).astype(np.float32).ravel()
        parameters["faces"] = faces.astype(np.uint32).ravel()
        parameters.update()
        self.content[name], self.labels[name] = mesh, label

    def add_curves(self, name, material, strands, radii, label) -> None:
        """B-splines through strands (N, P, 3) that taper from the first radius to the second."""
        # Doubled ends make the curve reach them.
        strands = np.concatenate([strands[:, :1], strands, strands[:, -1:]], 1)
        radius = np.linspace(*radii, strands.shape[1] - 2)
        radius = np.broadcast_to(np.r_[radius[0], radius, radius[-1]], strands.shape[:2])
        rows = np.concatenate([strands, radius[..., None]], 2)
        path = self.folder / f"{name}.txt"
        line = "%.6f %.6f %.6f %.6f\n"
        strand = line * rows.shape[1] + "\n"
        path.write_text(strand * len(rows) % tuple(rows.ravel()))
        self.content[name] = {
            "type": "bsplinecurve",
            "filename": str(path),
            "bsdf": MATERIALS[material],
            "id": name,
        }
        self.labels[name] = label

    def render(self, size: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Straight colours (H, W, 3), matte (H, W) and labels (H, W), all uint8."""
        scene = mitsuba.load_dict(self.content)
        integrator = mitsuba.load_dict(
            {"type": "path", "max_depth": MAX_DEPTH, "rr_depth": 3, "hide_emitters": True}
        )
        image = np.array(
            mitsuba.render(scene, sensor=camera(size, samples), integrator=integrator, seed=seed)
        )
        alpha = image[..., 3].clip(0, 1)
        straight = image[..., :3] / np.maximum(image[..., 3:], 1e-6)
        matte = (alpha * 255).round().astype(np.uint8)
        color = (encode_srgb(straight) * 255).round().astype(np.uint8)
        color[matte == 0] = 255
        return color, matte, self._label(scene, size, matte)

    def _label(self, scene, size: int, matte: np.ndarray) -> np.ndarray:
        """The label of most of a pixel's samples on the subject; 0 where there are none."""
        integrator = mitsuba.load_dict({"type": "aov", "aovs": "shape:shape_index,face:prim_index"})
        fine = size * LABEL_SUPERSAMPLING
        sensor = camera(fine, 1, rfilter="box")
        channels = np.array(mitsuba.render(scene, sensor=sensor, integrator=integrator, seed=0))
        shape, face = (channels[..., -2 + k].round().astype(int) for k in range(2))
        labels = np.zeros(shape.shape, np.uint8)
        for number, item in enumerate(scene.shapes(), start=1):  # 0 is the background
            label = self.labels.get(item.id(), 0)
            here = shape == number
            labels[here] = label[face[here]] if isinstance(label, np.ndarray) else label
        blocks = labels.reshape(size, LABEL_SUPERSAMPLING, size, LABEL_SUPERSAMPLING).swapaxes(1, 2)
        votes = np.stack([(blocks == label).sum((2, 3)) for label in range(HAIR + 1)], -1)
        best = votes[..., 1:].argmax(-1) + 1
        return np.where((matte > 0) & (votes[..., 1:].max(-1) > 0), best, 0).astype(np.uint8)


def camera(size: int, samples: int, rfilter: str = "gaussian"):
    return mitsuba.load_dict(
        {
            "type": "perspective",
            "fov": FIELD_OF_VIEW,
            "to_world": look_at([0, -CAMERA_DROP, CAMERA_DISTANCE], [0, -CAMERA_DROP, 0]),
            "film": {
                "type": "hdrfilm",
                "width": size,
                "height": size,
                "pixel_format": "rgba",
                "rfilter": {"type": rfilter},
            },
            "sampler": {"type": "multijitter" if samples > 1 else "independent", "sample_count": samples},
        }
    )


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB in [0, 1] (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    return np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-8) ** (1 / 2.4) - 0.055
    )
