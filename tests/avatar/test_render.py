import json
import math
import signal
from dataclasses import replace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import TINY, write_dataset
from PIL import Image

from avatar import cli
from avatar.animate import (
    ANGLES,
    apply_settings,
    draw_frames,
    expression_names,
    neutral_frame,
    pose_of_angles,
    render,
    turn,
    write_video,
)
from avatar.commands import RenderCommand
from avatar.config import STAGES, EvaluateConfig
from avatar.data import load_frames, load_tracking
from avatar.errors import AvatarError, Stopped
from avatar.evaluate import render_frame
from avatar.head import rotation_matrices
from avatar.presets import make_config
from avatar.run import Run, model_loaders, train

CPU = torch.device("cpu")
SHORT = (
    "fit.epochs=1",
    "teacher_training.steps_per_epoch=1",
    "distill.steps_per_epoch=1",
    "adversarial.pretrain_steps=1",
    "adversarial.rounds=0",
)


@pytest.fixture(scope="module")
def fitted(dataset, tmp_path_factory):
    """A run with the point avatar alone."""
    run = Run(tmp_path_factory.mktemp("fitted"), make_config(str(dataset), "small", 0, (*TINY, *SHORT)), CPU)
    train(run, STAGES[:1])
    return run


@pytest.fixture(scope="module")
def trained(fitted, tmp_path_factory):
    """A run with every model."""
    run = replace(fitted, folder=tmp_path_factory.mktemp("trained"))
    train(run, STAGES)
    return run


@pytest.fixture
def tracking(dataset):
    return load_tracking(dataset, "train")


def read_video(path):
    with imageio.get_reader(path) as reader:
        return np.stack(list(reader.iter_data())), reader.get_meta_data()


def read_picture(path):
    return np.asarray(Image.open(path)).astype(int)


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_tracking_is_read_without_images(tmp_path, head):
    write_dataset(tmp_path, head)
    frames = load_frames(tmp_path, "train", 16)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    for name, value in vars(load_tracking(tmp_path, "train")).items():
        expected = getattr(frames, name)
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


def test_drive_draws_what_evaluation_draws(trained, dataset):
    """Every model, and the best one by default."""
    frames = load_frames(dataset, "test", 32)
    plain = EvaluateConfig(refine_steps=0, open_image=False)
    for name, load in model_loaders(trained).items():
        drawn = list(draw_frames(load(), load_tracking(dataset, "test"), 32, CPU, name))
        assert len(drawn) == 2
        for number, picture in enumerate(drawn):
            evaluated = render_frame(load(), frames, torch.tensor([number]), plain)
            assert torch.equal(torch.floor(picture * 255) / 255, evaluated[0]), name
    path = render(trained, RenderCommand(trained.folder, drive=dataset))
    assert path == trained.folder / "renders/drive.mp4"
    video, _ = read_video(path)
    full = list(draw_frames(model_loaders(trained)["full"](), frames, 32, CPU, ""))
    assert video.shape == (2, 32, 32, 3)
    for shown, picture in zip(video, full, strict=True):
        assert np.abs(shown - picture.permute(1, 2, 0).numpy() * 255).mean() < 8


def test_generator_keeps_its_size_and_the_others_take_any(trained, tmp_path):
    command = RenderCommand(trained.folder, expression=("jaw=10",), size=48, out=tmp_path / "a.png")
    with pytest.raises(AvatarError, match="--size 48: the full method paints at 32 x 32 only"):
        render(trained, command)
    for name in ("student", "teacher", "point_avatar"):
        render(trained, replace(command, model=name))
        assert read_picture(tmp_path / "a.png").shape == (48, 48, 3)
    render(trained, replace(command, size=32))
    assert read_picture(tmp_path / "a.png").shape == (32, 32, 3)


def test_comparison_has_the_truth_on_the_left(fitted, dataset, tmp_path):
    out = tmp_path / "new/folder/a.mp4"
    command = RenderCommand(fitted.folder, drive=dataset, split="train", compare=True, out=out)
    video, data = read_video(render(fitted, replace(command, fps=10)))
    assert video.shape == (6, 32, 64, 3)
    assert data["fps"] == 10
    truth = load_frames(dataset, "train", 32).images.permute(0, 2, 3, 1).numpy()
    assert np.abs(video[:, :, :32].astype(int) - truth).mean() < 8


def test_turntable_goes_once_round(fitted, tmp_path, capsys):
    """From the front; through the command, with an expression and an odd size."""
    folder = str(fitted.folder)
    arguments = ["render", folder, "--turntable", "--frames", "4", "--size", "33"]
    assert cli.main([*arguments, "--expression", "jaw=20"]) == 0
    path = fitted.folder / "renders/turntable.mp4"
    assert capsys.readouterr().out == f"wrote {path}\n"
    video, data = read_video(path)
    assert video.shape == (4, 34, 34, 3)
    assert data["fps"] == 25
    still = tmp_path / "still.png"
    arguments = ["render", folder, "--expression", "jaw=20", "--size", "33", "--out", str(still)]
    assert cli.main(arguments) == 0
    front = read_picture(still)
    errors = [np.abs(frame[:33, :33] - front).mean() for frame in video]
    assert errors[0] < 8
    assert errors[0] == min(errors)
    # What the encoder adds to an odd size is white.
    assert (video[:, 33] > 240).all()


def test_turntable_turns_the_root_alone(tracking):
    front = neutral_frame(tracking)
    assert torch.equal(front.expression[0], tracking.expression.mean(0))
    assert torch.equal(front.translation[0], tracking.translation[0])
    turning = turn(front, 8, None)
    assert len(turning) == 8
    assert torch.allclose(turning.pose[:, 1], torch.arange(8) * math.pi / 4)
    turning.pose[:, 1] = 0
    assert not turning.pose.any()
    swinging = turn(front, 8, 30.0).pose[:, 1]
    assert torch.allclose(swinging[[0, 2, 4, 6]].rad2deg(), torch.tensor([0.0, 30, 0, -30]), atol=1e-4)


def test_settings_change_the_picture(fitted, tmp_path):
    pictures = {}
    for setting in ("yaw=0", "mouthPucker=1", "jaw=25", "yaw=30", "gaze_x=0"):
        path = render(fitted, RenderCommand(fitted.folder, expression=(setting,), out=tmp_path / "a.png"))
        pictures[setting] = read_picture(path)
    neutral = pictures.pop("yaw=0")
    assert np.array_equal(neutral, pictures.pop("gaze_x=0"))
    for picture in pictures.values():
        assert not np.array_equal(neutral, picture)
    path = render(fitted, RenderCommand(fitted.folder, expression=("yaw=0",)))
    assert path == fitted.folder / "renders/expression.png"


def test_settings_reach_the_coefficients_they_name(head, tracking):
    names = expression_names(head)
    frame = apply_settings(neutral_frame(tracking), ("jawLeft=0.5", "jaw=90"), names)
    expected = tracking.expression.mean(0)
    expected[names.index("jawLeft")] = 0.5
    assert torch.equal(frame.expression[0], expected)
    assert frame.pose[0, 6] == pytest.approx(math.pi / 2)
    head.expression_names, before = [], head.expression_names
    numbered = expression_names(head)
    head.expression_names = before
    assert numbered == [f"expression_{index}" for index in range(50)]
    frame = apply_settings(neutral_frame(tracking), ("expression_3=-1",), numbered)
    assert frame.expression[0, 3] == -1


@pytest.mark.parametrize(
    ("angle", "first", "expected"),
    [
        ("yaw", 3, (1, 0, 0)),
        ("pitch", 3, (0, 1, 0)),
        ("gaze_x", 9, (1, 0, 0)),
        ("gaze_y", 12, (0, 1, 0)),
        ("jaw", 6, (0, -1, 0)),
    ],
)
def test_angles_turn_the_gaze_where_they_say(angle, first, expected):
    """A quarter turn of what looks at the viewer, who sees x to the right and y up."""
    pose = pose_of_angles({angle: 90.0})
    looks = rotation_matrices(pose[0, first : first + 3]) @ torch.tensor([0.0, 0, 1])
    assert torch.allclose(looks, torch.tensor(expected).float(), atol=1e-6)


def test_roll_is_clockwise_and_angles_combine():
    top = rotation_matrices(pose_of_angles({"roll": 90.0})[0, 3:6]) @ torch.tensor([0.0, 1, 0])
    assert torch.allclose(top, torch.tensor([1.0, 0, 0]), atol=1e-6)
    for angles in ((40.0, 30.0, -20.0), (180.0, 0.0, 0.0), (300.0, 10.0, 5.0), (0.0, 0.0, 0.0)):
        yaw, pitch, roll = angles
        parts = [
            rotation_matrices(torch.tensor(vector).deg2rad())
            for vector in ([0.0, yaw, 0.0], [-pitch, 0.0, 0.0], [0.0, 0.0, -roll])
        ]
        pose = pose_of_angles(dict(zip(("yaw", "pitch", "roll"), angles, strict=True)))
        assert torch.allclose(rotation_matrices(pose[0, 3:6]), parts[0] @ parts[1] @ parts[2], atol=1e-5)
        assert pose[0, 3:6].norm() < math.pi + 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to render: wants --drive DATA, --turntable or --expression"),
        (["--drive", "DATA", "--turntable"], "--drive and --turntable exclude each other"),
        (["--drive", "DATA", "--expression", "jaw=1"], "--drive and --expression exclude each other"),
        (["--drive", "NONE"], "no such folder"),
        (["--turntable", "--compare"], "--compare: only"),
        (["--turntable", "--degrees", "nan"], "--degrees nan: wants"),
        (["--expression", "jaw=1", "--degrees", "3"], "--degrees 3: wants --turntable"),
        (["--turntable", "--frames", "0"], "--frames 0: wants at least 1"),
        (["--turntable", "--size", "-4"], "--size -4: wants at least 1"),
        (["--expression", "jaw"], "--expression jaw: wants NAME=VALUE"),
        (["--expression", "jaw=wide"], "'wide' is not a finite number"),
        (["--expression", "jaw=inf"], "'inf' is not a finite number"),
        (["--expression", "mouthsmile=1"], "(near: mouthSmileLeft, mouthSmileRight"),
        (["--expression", "zzz=1"], "names: browDownLeft,"),
        (["--expression", "jaw=1", "--out", "a.mp4"], "a picture wants a name that ends in .png"),
        (["--turntable", "--out", "a.gif"], "a film wants a name that ends in .mp4"),
        (["--turntable", "--out", "FOLDER"], "is a folder"),
        (["--turntable", "--out", "FILE"], "file/a.mp4: File exists"),
        (["--turntable", "--model", "student"], "has not trained it (it has: point_avatar)"),
        (["--turntable", "--data", "NONE"], "the run's training data; --data says where it is now"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value) or "nothing",
)
def test_errors_are_one_clear_line(arguments, message, fitted, dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    places = {
        "NONE": tmp_path / "none",
        "DATA": dataset,
        "FOLDER": tmp_path / "folder.mp4",
        "FILE": tmp_path / "file/a.mp4",
    }
    assert cli.main(["render", str(fitted.folder), *(str(places.get(name, name)) for name in arguments)]) == 1
    assert message in error_of(capsys)


def test_driver_must_have_the_heads_expressions(fitted, tmp_path, head, capsys):
    write_dataset(tmp_path, head, frames=(1, 1))
    path = tmp_path / "person/person/test/flame_params.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        frame["expression"] = frame["expression"][:10]
    path.write_text(json.dumps(content))
    assert cli.main(["render", str(fitted.folder), "--drive", str(tmp_path)]) == 1
    assert "its frames have 10 expression coefficients" in error_of(capsys)


def test_interrupted_film_leaves_nothing(fitted, tmp_path, capsys, monkeypatch):
    """Ctrl-C while frames are drawn; an older film of that name stays."""
    out = tmp_path / "a.mp4"
    out.write_bytes(b"older")

    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
        return torch.ones(1, 3, 32, 32)

    monkeypatch.setattr("avatar.animate.model_loaders", lambda _: {"point_avatar": lambda: interrupted})
    assert cli.main(["render", str(fitted.folder), "--turntable", "--out", str(out)]) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"older"


def test_failing_encoder_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "a.mp4"
    monkeypatch.setattr("avatar.animate.CONSTANT_RATE_FACTOR", "nonsense")
    with pytest.raises(AvatarError, match=r"a\.mp4: the video encoder failed: .*"):
        write_video(out, iter([torch.ones(3, 16, 16)] * 3), 25)
    assert not list(tmp_path.iterdir())


def test_drawing_stops_when_asked(fitted, tracking):
    load = model_loaders(fitted)["point_avatar"]
    with pytest.raises(Stopped, match="nothing was written"):
        next(draw_frames(load(), tracking, 16, CPU, "", lambda: True))


def test_every_angle_has_an_effect():
    poses = [pose_of_angles({name: 10.0}) for name in ANGLES]
    assert len({tuple(pose[0].tolist()) for pose in poses}) == len(ANGLES)
