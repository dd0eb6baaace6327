import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_dataset
from PIL import Image

from avatar.camera import project
from avatar.data import load_frames
from avatar.data.point_avatar import resize
from avatar.errors import AvatarError
from avatar.run import EMBEDDED_SUBJECT


def test_layout_round_trip(tmp_path, head):
    written = write_dataset(tmp_path, head)
    frames = load_frames(tmp_path, "train", 48)
    entries = written["train"]["frames"]
    assert len(frames) == 6
    assert frames.names[0] == "train/1"
    assert frames.expression.tolist() == torch.tensor([entry["expression"] for entry in entries]).tolist()
    assert frames.pose.tolist() == torch.tensor([entry["pose"] for entry in entries]).tolist()
    assert torch.allclose(frames.translation, torch.tensor([0.0, 0.06, -6.4]).expand(6, 3))
    assert torch.allclose(frames.intrinsics, torch.tensor([-4.2, 4.2, 0.5, 0.5]).expand(6, 4))
    assert frames.shape.shape == (100,)
    path = tmp_path / "person/person/train"
    image = np.asarray(Image.open(path / "image/3.png"))
    assert np.array_equal(frames.images[2].permute(1, 2, 0).numpy(), image)
    assert np.array_equal(frames.labels[2, 0].numpy(), np.asarray(Image.open(path / "semantic/3.png")))
    assert len(load_frames(tmp_path, "test", 48)) == 2


def test_frames_are_composited_on_white_with_the_soft_matte(tmp_path, head):
    write_dataset(tmp_path, head, size=32, frames=(1, 1))
    folder = tmp_path / "person/person/train"
    Image.fromarray(np.full((32, 32, 3), 100, np.uint8)).save(folder / "image/1.png")
    Image.fromarray(np.full((32, 32), 128, np.uint8)).save(folder / "mask/1.png")
    frames = load_frames(tmp_path, "train", 32)
    assert (frames.images == round(255 - 155 * 128 / 255)).all()
    assert (frames.mattes == 128).all()


def test_semantic_labels_are_optional(tmp_path, head):
    write_dataset(tmp_path, head, semantic=False, frames=(1, 1))
    assert load_frames(tmp_path, "train", 16).labels is None


def test_resize_takes_the_mean_of_the_area():
    image = torch.arange(16.0).view(1, 4, 4)
    assert resize(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize(image, 8).shape == (1, 8, 8)


def test_published_splits_are_known(tmp_path, head):
    write_dataset(tmp_path, head, frames=(2, 1), semantic=False, subject="subject1")
    folder = tmp_path / "subject1/subject1"
    (folder / "train").rename(folder / "MVI_1810")
    (folder / "test").rename(folder / "MVI_1812")
    assert len(load_frames(tmp_path, "train", 16)) == 2
    assert load_frames(folder, "test", 16).names == ["MVI_1812/1"]


def test_videos_of_other_names_hold_out_the_last(tmp_path, head):
    write_dataset(tmp_path, head, frames=(2, 1), semantic=False)
    folder = tmp_path / "person/person"
    (folder / "train").rename(folder / "b")
    (folder / "test").rename(folder / "c")
    assert load_frames(tmp_path, "train", 16).names == ["b/1", "b/2"]
    assert load_frames(tmp_path, "test", 16).names == ["c/1"]
    shutil.rmtree(folder / "c")
    assert len(load_frames(tmp_path, "train", 16)) == 2
    with pytest.raises(AvatarError, match="no video for the split 'test'"):
        load_frames(tmp_path, "test", 16)


def test_embedded_subject_has_the_layout():
    frames = load_frames(EMBEDDED_SUBJECT, "test", 64)
    assert len(frames) == 24
    assert frames.expression.shape == (24, 50)
    assert (frames.images[:, :, 0, 0] == 255).all()
    assert len(load_frames(EMBEDDED_SUBJECT, "train", 64)) == 96


@pytest.mark.parametrize("split", ["train", "test"])
def test_embedded_subject_turns_blinks_and_opens_its_mouth(head, split):
    frames = load_frames(EMBEDDED_SUBJECT, split, 128)
    blink = frames.expression[:, head.expression_names.index("eyeBlinkLeft")]
    yaw, jaw = frames.pose[:, 4].rad2deg(), frames.pose[:, 6]
    assert yaw.min() < -30
    assert yaw.max() > 30
    for closed_or_open in (blink > 0.95, jaw > 0.2):
        begins = closed_or_open[1:] & ~closed_or_open[:-1]
        assert begins.sum() >= 2
    assert (frames.expression.amax(0) > 0.3).sum() >= 10
    seen = {label: (frames.labels == label).sum((1, 2, 3)) for label in range(18)}
    eyes = seen[4] + seen[5]
    assert eyes[blink > 0.99].max() < eyes[blink < 0.2].min()
    assert seen[11][jaw > 0.2].min() > seen[11][jaw < 0].max()
    for label in (1, 2, 3, 10, 12, 13, 14, 16, 17):
        assert (seen[label] > 0).all()
    assert set(torch.unique(frames.labels).tolist()) == {0, 1, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 16, 17}


def test_embedded_head_projects_onto_the_embedded_frames(head):
    """The layout's camera puts the posed head inside the matte, and its eyes on the labelled eyes."""
    frames = load_frames(EMBEDDED_SUBJECT, "test", 256)
    posed = head(frames.expression, frames.pose)
    pixels = project(posed, frames.intrinsics, frames.translation, frames.image_size)[..., :2].floor().long()
    skin = head.vertex_parts == head.part_names.index("skin")
    x, y = pixels[:, skin].clamp(0, 255).unbind(-1)
    rows = torch.arange(len(frames))[:, None]
    assert (frames.mattes[rows, 0, y, x] > 0).float().mean() > 0.98
    for label, side in ((4, 1), (5, -1)):
        eyeball = (head.vertex_parts == head.part_names.index("eyes")) & (head.template[:, 0] * side > 0)
        seen = frames.labels[:, 0] == label
        wide_open = (seen.sum((1, 2)) > 40).nonzero()[:, 0].tolist()
        assert len(wide_open) >= 8
        for frame in wide_open:
            center = seen[frame].nonzero().float().mean(0).flip(0)
            # What the lids leave open lies a centimetre before the eyeball's centre.
            assert (center - pixels[frame, eyeball].float().mean(0)).norm() < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("intrinsics"), "lacks 'intrinsics'"),
        (lambda c: c["frames"].clear(), "'frames' is empty"),
        (lambda c: c["frames"][1].pop("pose"), r"frames\[1\] lacks 'pose'"),
        (lambda c: c["frames"][1]["pose"].pop(), r"'frames\[1\]\.pose' has 14 numbers, wants 15"),
        (lambda c: c["frames"][1]["expression"].pop(), r"'frames\[1\]\.expression' has 49 numbers, wants 50"),
        (
            lambda c: c["frames"][0].update(world_mat=[[1, 0], [0, 1]]),
            r"world_mat' has 2 x 2 numbers, wants 3 x 4",
        ),
        (lambda c: c["frames"][0].update(pose=["a"] * 15), r"frames\[0\]\.pose' is not an array of numbers"),
        (lambda c: c["frames"][0].update(pose=[float("nan")] * 15), "holds a value that is not finite"),
        (lambda c: c["frames"][0].update(file_path="./image/77"), r"image/77\.png: .*No such file"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_rejects_broken_parameters(tmp_path, head, change, message):
    content = write_dataset(tmp_path, head, frames=(2, 1), semantic=False)["train"]
    change(content)
    path = tmp_path / "person/person/train/flame_params.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AvatarError, match=message) as caught:
        load_frames(tmp_path, "train", 16)
    assert str(tmp_path) in str(caught.value)


def test_rejects_what_is_no_data_set(tmp_path, head):
    with pytest.raises(AvatarError, match="no such folder"):
        load_frames(tmp_path / "none", "train", 16)
    with pytest.raises(AvatarError, match="no SUBJECT/SUBJECT/VIDEO"):
        load_frames(tmp_path, "train", 16)
    write_dataset(tmp_path, head, frames=(1, 1), semantic=False)
    with pytest.raises(AvatarError, match="no video for the split 'val'"):
        load_frames(tmp_path, "val", 16)
    write_dataset(tmp_path, head, frames=(1, 1), semantic=False, subject="other")
    with pytest.raises(AvatarError, match="several subjects"):
        load_frames(tmp_path, "train", 16)


def test_rejects_broken_pictures(tmp_path, head):
    write_dataset(tmp_path, head, frames=(1, 1), semantic=False)
    mask = tmp_path / "person/person/train/mask/1.png"
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(mask)
    with pytest.raises(AvatarError, match=r"mask/1\.png: 30 x 20, but its image is 48 x 48"):
        load_frames(tmp_path, "train", 16)
    mask.write_bytes(b"no picture")
    with pytest.raises(AvatarError, match=r"mask/1\.png: cannot identify"):
        load_frames(tmp_path, "train", 16)
