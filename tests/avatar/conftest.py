"""A tiny data set and configuration, so that whole runs take seconds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from avatar.camera import project
from avatar.head import embedded_head
from avatar.presets import make_config

TINY = (
    "size=32",
    "point_avatar.points=300",
    "point_avatar.sdf_width=48",
    "point_avatar.deformer_width=16",
    "point_avatar.texture_widths=[8]",
    "fit.steps_per_epoch=4",
    "fit.epochs=4",
    "fit.vgg=0",
    "fit.eikonal_samples=64",
    "fit.grow_epochs=[2]",
    "fit.prune_from=1",
    "fit.rebuild_optimizer=false",
    "fit.tracking_from=1",
    "fit.checkpoint_every=3",
    "fit.image_every=8",
    "fit.log_every=4",
    "teacher.features.randla_widths=[4,8]",
    "teacher.features.randla_neighbors=4",
    "teacher.features.gcn_widths=[8]",
    "teacher.features.gcn_neighbors=4",
    "teacher.features.gcn_output=8",
    "teacher.image_widths=[8]",
    "teacher.fusion_widths=[12]",
    "teacher.head_widths=[8]",
    "teacher.latent_width=8",
    "student.avatar.deformer_width=8",
    "student.avatar.texture_widths=[4]",
    "student.features.randla_widths=[4,4]",
    "student.features.randla_neighbors=3",
    "student.features.gcn_widths=[4]",
    "student.features.gcn_neighbors=3",
    "student.fusion_widths=[8]",
    "student.latent_width=8",
    "generator.channel_base=128",
    "generator.latent_size=16",
    "generator.style_size=16",
    "generator.mapping_layers=2",
    "generator.point_features=2",
    "discriminator.channel_base=128",
    "inverter.mapping_width=16",
    "inverter.mapping_layers=2",
    "teacher_training.epochs=1",
    "teacher_training.steps_per_epoch=5",
    "teacher_training.vgg=0",
    "teacher_training.checkpoint_every=2",
    "distill.epochs=1",
    "distill.warmup_steps=1",
    "distill.steps_per_epoch=5",
    "distill.vgg=0",
    "distill.kl_anchors=16",
    "distill.kl_points=64",
    "distill.eikonal_samples=32",
    "distill.checkpoint_every=2",
    "adversarial.pretrain_steps=3",
    "adversarial.rounds=2",
    "adversarial.optimization_steps=2",
    "adversarial.rendering_steps=2",
    "adversarial.batch=2",
    "adversarial.r1_every=2",
    "adversarial.path_length=1",
    "adversarial.path_length_every=2",
    "adversarial.splat_rgb=1",
    "adversarial.gan_from=1",
    "adversarial.vgg=0",
    "adversarial.optimization_vgg=0",
    "adversarial.checkpoint_every=2",
)


@pytest.fixture(scope="session")
def head():
    return embedded_head()


def write_dataset(root, head, *, size=48, frames=(6, 2), seed=0, semantic=True, subject="person"):
    """Write a data set of dots on white in the PointAvatar layout; returns its parameters per video."""
    random = np.random.default_rng(seed)
    intrinsics = [-4.2, 4.2, 0.5, 0.5]
    written = {}
    for video, count in zip(("train", "test"), frames, strict=True):
        folder = root / subject / subject / video
        for name in ("image", "mask", "semantic") if semantic else ("image", "mask"):
            (folder / name).mkdir(parents=True)
        entries = []
        for number in range(1, count + 1):
            expression = np.round(random.random(50) * 0.3, 4).tolist()
            pose = np.round(random.normal(size=15) * 0.1, 4).tolist()
            translation = [0.0, 0.06, -6.4]
            vertices = head(torch.tensor([expression]), torch.tensor([pose]))
            pixels = project(vertices, torch.tensor(intrinsics), torch.tensor([translation]), (size, size))
            x, y = pixels[0, :, :2].floor().long().clamp(0, size - 1).unbind(-1)
            image = np.full((size, size, 3), 255, np.uint8)
            matte = np.zeros((size, size), np.uint8)
            image[y, x] = np.array(
                [[200, 150, 120], [90, 70, 60], [240, 240, 220], [180, 60, 60], [40, 60, 90]]
            )[head.vertex_parts]
            matte[y, x] = 255
            Image.fromarray(image).save(folder / f"image/{number}.png")
            Image.fromarray(matte).save(folder / f"mask/{number}.png")
            if semantic:
                labels = np.where(np.arange(size)[:, None] > 0.8 * size, 16, 1) * (matte > 0)
                Image.fromarray(labels.astype(np.uint8)).save(folder / f"semantic/{number}.png")
            world = np.concatenate([np.eye(3), np.array(translation)[:, None]], 1).tolist()
            entries.append(
                {
                    "file_path": f"./image/{number}",
                    "world_mat": world,
                    "expression": expression,
                    "pose": pose,
                    "bbox": [-0.5, -0.5, 0.5, 0.5],
                    "flame_keypoints": [[0.0, 0.0]],
                }
            )
        content = {"frames": entries, "intrinsics": intrinsics, "shape_params": [0.0] * 100}
        (folder / "flame_params.json").write_text(json.dumps(content))
        written[video] = content
    return written


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, head):
    root = tmp_path_factory.mktemp("dataset")
    write_dataset(root, head)
    return root


@pytest.fixture
def tiny_config(dataset):
    return make_config(str(dataset), "small", 0, TINY)
