"""Package rendered frames of the embedded subject in the PointAvatar layout.

    python tools/package_subject.py INPUT avatar/assets/subject

INPUT holds image/K.png (256 x 256, rendered over white), mask/K.png and params.json with, per frame, `pose`
(15), `expression` (50) and `test`. Training and test frames become two videos. Colours are stored straight
(not premultiplied by the matte), so that compositing them on white gives the rendered frames back. Semantic
labels come from the posed head: hair is what the matte shows beyond it, and the scalp counts as skin.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import avatar_ops
from avatar.camera import project
from avatar.head import HeadModel, embedded_head

SUBJECT = "embedded"
FIELD_OF_VIEW = math.radians(13.5)
# BiSeNet's classes: 1 skin, 4 eye, 11 mouth, 16 cloth, 17 hair.
LABELS = {"skin": 1, "eyes": 4, "teeth": 11, "tongue": 11, "shirt": 16}
HAIR = 17
SURFACE_SAMPLES = 400_000
CAMERA_DISTANCE, CAMERA_DROP = 1.60, 0.015  # metres, from the head's origin


def straight_colors(image: np.ndarray, matte: np.ndarray) -> np.ndarray:
    """Undo compositing on white: c = a f + (1 - a) solved for f; white where nothing is seen."""
    alpha = matte[..., None].astype(np.float64) / 255
    straight = 255 - (255 - image.astype(np.float64)) / np.maximum(alpha, 1 / 255)
    return np.where(alpha > 0, straight.round().clip(0, 255), 255).astype(np.uint8)


class Labeller:
    """Labels of the visible surface, by samples spread over the head's faces."""

    def __init__(self, head: HeadModel):
        self.corners = head.faces
        area = torch.linalg.cross(
            *(head.template[self.corners][:, [1, 2]] - head.template[self.corners][:, :1]).unbind(1)
        )
        generator = torch.Generator().manual_seed(0)
        self.faces = torch.multinomial(
            area.norm(dim=1), SURFACE_SAMPLES, replacement=True, generator=generator
        )
        shares = -torch.rand(SURFACE_SAMPLES, 3, generator=generator).clamp_min(1e-9).log()
        self.shares = shares / shares.sum(1, keepdim=True)
        labels = torch.tensor([LABELS[name] for name in head.part_names], dtype=torch.uint8)
        self.labels = labels[head.vertex_parts[self.corners[self.faces, 0]]]

    def __call__(self, pixels: torch.Tensor, matte: np.ndarray) -> np.ndarray:
        """Labels (H, W) for vertices projected to pixels (V, 3); 0 where the matte is empty."""
        samples = (self.shares[..., None] * pixels[self.corners[self.faces]]).sum(1)
        result = np.where(matte > 0, HAIR, 0).astype(np.uint8)
        # Cloth hangs a little over the mesh; hair much more.
        for radius, wanted in ((3.0, (LABELS["shirt"],)), (0.9, tuple(LABELS.values()))):
            indices = avatar_ops.rasterize_points(samples, matte.shape, radius, 1).indices[..., 0]
            label = torch.where(indices >= 0, self.labels[indices.clamp_min(0)], 0).numpy()
            result = np.where(np.isin(label, wanted) & (matte > 0), label, result)
        return result


def write_png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    parameters = json.loads((arguments.input / "params.json").read_text())
    head = embedded_head()
    if parameters["names"] != head.expression_names:
        raise SystemExit("params.json: `names` differ from the embedded head's expressions")
    focal = 0.5 / math.tan(FIELD_OF_VIEW / 2)
    intrinsics = [-focal, focal, 0.5, 0.5]
    translation = [0.0, CAMERA_DROP * head.scale, -CAMERA_DISTANCE * head.scale]
    world_mat = np.concatenate([np.eye(3), np.array(translation)[:, None]], 1).tolist()
    labeller = Labeller(head)
    face = head.weights[:, 1:].sum(1) > 0.5
    face &= head.template[:, 2] > head.joints[2, 2]

    videos: dict[str, list] = {"train": [], "test": []}
    for number, frame in enumerate(parameters["frames"], start=1):
        video = videos["test" if frame["test"] else "train"]
        image = np.asarray(Image.open(arguments.input / f"image/{number}.png").convert("RGB"))
        matte = np.asarray(Image.open(arguments.input / f"mask/{number}.png").convert("L"))
        folder = arguments.output / SUBJECT / SUBJECT / ("test" if frame["test"] else "train")
        name = f"{len(video) + 1}.png"
        write_png(folder / "image" / name, straight_colors(image, matte))
        write_png(folder / "mask" / name, matte)

        camera = torch.tensor(intrinsics), torch.tensor([translation])
        expression, pose = torch.tensor([frame["expression"]]), torch.tensor([frame["pose"]])
        pixels = project(head(expression, pose), *camera, matte.shape)[0]
        write_png(folder / "semantic" / name, labeller(pixels, matte))
        outline = pixels[face, :2] * 2 / torch.tensor(matte.shape[::-1]) - 1
        bounds = torch.cat([outline.amin(0), outline.amax(0)])
        video.append(
            {
                "file_path": f"./image/{len(video) + 1}",
                "world_mat": world_mat,
                "expression": [round(value, 6) for value in frame["expression"]],
                "pose": [round(value, 6) for value in frame["pose"]],
                "bbox": [round(value, 5) for value in bounds.tolist()],
            }
        )
    for name, frames in videos.items():
        content = {
            "frames": frames,
            "intrinsics": intrinsics,
            "shape_params": [0.0] * head.shape_basis.shape[-1],
        }
        path = arguments.output / SUBJECT / SUBJECT / name / "flame_params.json"
        path.write_text(json.dumps(content, separators=(",", ":")))


if __name__ == "__main__":
    main()
