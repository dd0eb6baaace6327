import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_dataset
from PIL import Image

from avatar import cli
from avatar.config import EvaluateConfig
from avatar.data import load_frames
from avatar.evaluate import evaluate_model, open_image, render_frame
from avatar.imagenet_weights import WeightsUnavailable
from avatar.presets import make_config, to_json
from avatar.stages.fit import Fit, load_avatar

FAST = ("--set", *TINY, "fit.epochs=1")
FIT = ("--stages", "fit", *FAST)


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch):
    """LPIPS as on a machine that cannot have its weights."""

    def unavailable():
        raise WeightsUnavailable("no weights here")

    monkeypatch.setattr("avatar.metrics.Lpips", unavailable)


@pytest.fixture(scope="module")
def run_folder(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["train", str(dataset), "--out", str(folder), *FIT]) == 0
    return folder


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_writes_the_run_folder(run_folder, dataset):
    assert json.loads((run_folder / "config.json").read_text())["data"] == str(dataset)
    checkpoints = sorted(path.name for path in (run_folder / "checkpoints").iterdir())
    assert checkpoints == ["fit-0000003.safetensors", "fit-0000004.safetensors"]
    assert any((run_folder / "tensorboard").iterdir())


def test_evaluate_writes_metrics(run_folder, capsys):
    assert cli.main(["evaluate", str(run_folder)]) == 0
    content = json.loads((run_folder / "metrics.json").read_text())
    assert content["split"] == "test"
    assert content["frames"] == 2
    assert list(content["models"]) == ["point_avatar"]
    scores = content["models"]["point_avatar"]
    assert set(scores) == {"l1", "lpips", "ssim", "psnr", "no_cloth"}
    assert set(scores["no_cloth"]) == {"l1", "lpips", "ssim", "psnr", "l1_by_area", "psnr_by_area"}
    assert scores["no_cloth"]["l1_by_area"] > scores["no_cloth"]["l1"]
    assert scores["no_cloth"]["psnr_by_area"] < scores["no_cloth"]["psnr"]
    assert 0 < scores["l1"] < 1
    assert 0 < scores["psnr"] < 60
    assert scores["no_cloth"]["l1"] < scores["l1"]
    assert scores["lpips"] is None
    output = capsys.readouterr()
    assert "PSNR" in output.out
    assert "no LPIPS (no weights here)" in " ".join(output.err.split())


def test_evaluate_takes_the_split_and_a_moved_data_set(run_folder, tmp_path, head):
    write_dataset(tmp_path, head, semantic=False, frames=(3, 1))
    assert cli.main(["evaluate", str(run_folder), "--split", "train", "--data", str(tmp_path)]) == 0
    content = json.loads((run_folder / "metrics.json").read_text())
    assert (content["split"], content["frames"]) == ("train", 3)
    assert content["models"]["point_avatar"]["no_cloth"] is None


def test_refinement_brings_a_held_out_frame_nearer(run_folder, dataset, head):
    config = cli.read_config(run_folder)
    frames = load_frames(dataset, "test", config.size)
    avatar = load_avatar(run_folder, config, head)
    index = torch.tensor([0])

    def draw(*tracked):
        return avatar(*tracked)[1].image

    errors = []
    for steps in (0, 20):
        image = render_frame(draw, frames, index, EvaluateConfig(steps, 5e-3, open_image=False))
        assert torch.equal(image, (image * 255).round() / 255)
        errors.append((image - frames.image(index)).abs().mean())
    assert errors[1] < errors[0]
    assert all(parameter.grad is None for parameter in avatar.parameters())


def test_refinement_takes_models_that_the_camera_does_not_reach(dataset):
    frames = load_frames(dataset, "test", 32)

    def draw(expression, pose, camera):
        return (0.5 + expression.mean() + pose.mean()).expand(1, 3, 32, 32)

    image = render_frame(draw, frames, torch.tensor([0]), EvaluateConfig(1))
    assert image.shape == (1, 3, 32, 32)


def test_opening_removes_single_bright_pixels():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 2] = 1
    image[0, 0, 4:8, 4:8] = 1
    opened = open_image(image)
    assert opened[0, 0, 2, 2] == 0
    assert opened.sum() == 16


def test_perfect_rendering_scores_perfectly(dataset, monkeypatch):
    frames = load_frames(dataset, "test", 32)
    monkeypatch.setattr("avatar.evaluate.render_frame", lambda _, frames, index, __: frames.image(index))
    values = evaluate_model(None, frames, EvaluateConfig()).values
    assert values["l1"] == 0
    assert values["ssim"] == pytest.approx(1)
    assert values["psnr"] is None  # JSON has no infinity


def test_demo_trains_evaluates_and_draws(tmp_path, capsys):
    arguments = ["demo", "--out", str(tmp_path / "demo"), *FAST]
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "demo/metrics.json").read_text())["frames"] == 24
    assert json.loads((tmp_path / "demo/efficiency.json").read_text())["size"] == 32
    sheet = np.asarray(Image.open(tmp_path / "demo/demo.png"))
    assert sheet.shape[0] == 4 * 32
    assert sheet.shape[1] > 8 * 32
    models = json.loads((tmp_path / "demo/metrics.json").read_text())["models"]
    assert list(models) == ["point_avatar", "teacher", "student", "full"]
    printed = capsys.readouterr().out
    assert all(label in printed for label in cli.MODEL_LABELS.values())


def test_a_stage_that_stopped_early_carries_no_other(dataset, tmp_path, capsys, monkeypatch):
    command = ["train", str(dataset), "--out", str(tmp_path)]
    stopped = Path(f"{tmp_path}/checkpoints/fit-0000003.safetensors")
    assert cli.main([*command, *FIT]) == 0
    (tmp_path / "checkpoints/fit-0000004.safetensors").unlink()
    assert stopped.exists()
    capsys.readouterr()
    assert cli.main([*command, "--stages", "teacher", *FAST]) == 1
    assert "the stage 'fit' ended at step 3, before its end" in error_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "NONE", "--out", "OUT"], "no such folder"),
        (
            ["train", "DATA", "--out", "OUT", "--stages", "fit,paint"],
            "no stage 'paint' (stages: fit, teacher,",
        ),
        (["train", "DATA", "--out", "OUT", "--set", "fit.epoch=1"], "no option 'epoch'"),
        (["train", "DATA", "--out", "OUT", "--set", "fit.epochs"], "wants NAME=VALUE"),
        (["train", "DATA", "--out", "OUT", "--set", "fit.log_every=0"], "log_every=0: wants at least 1"),
        (["train", "DATA", "--out", "OUT", "--set", "fit.epochs=many"], "'many' does not fit int"),
        (["train", "DATA", "--out", "OUT", "--set", "fit=1"], "'fit' is a group"),
        (["train", "DATA", "--out", "OUT", "--device", "quantum"], "--device quantum"),
        (["train", "DATA", "--out", "FILE/run"], "--out"),
        (
            ["train", "DATA", "--out", "OUT", "--set", "head=/none.npz"],
            "/none.npz: not a readable head model",
        ),
        (["train", "DATA", "--out", "OUT", "--set", "size=96"], "size=96: size: got 96, expected 4"),
        (["train", "DATA", "--out", "OUT", "--set", "generator.channel_base=64"], "size=128:"),
        (["evaluate", "OUT"], "config.json: No such file or directory"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_errors_are_one_clear_line(arguments, message, dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {
        "NONE": tmp_path / "none",
        "DATA": dataset,
        "OUT": tmp_path / "out",
        "FILE/run": tmp_path / "file/run",
    }
    status = cli.main([str(places.get(argument, argument)) for argument in arguments])
    assert status == 1
    assert message in error_of(capsys)


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_unknown_commands_and_missing_arguments_fail():
    for arguments in (["paint"], ["train"], ["evaluate"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code


def test_another_configuration_is_refused(run_folder, dataset, capsys):
    before = (run_folder / "config.json").read_text()
    command = ["train", str(dataset), "--out", str(run_folder), *FIT]
    assert cli.main([*command[:-1], "fit.epochs=2", "--seed", "1"]) == 1
    message = error_of(capsys)
    assert "trained with another configuration: fit.epochs (1, here 2); seed (0, here 1)" in message
    assert (run_folder / "config.json").read_text() == before


def test_checkpoints_without_configuration_are_refused(dataset, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/fit-0000003.safetensors").write_text("")
    assert cli.main(["train", str(dataset), "--out", str(tmp_path), *FAST]) == 1
    assert "holds checkpoints but no config.json" in error_of(capsys)


def test_damaged_configuration_is_named(run_folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"data": "x", "brush": 1}')
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    assert "unknown option 'brush'" in error_of(capsys)
    (tmp_path / "config.json").write_text("{")
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    assert "config.json" in error_of(capsys)


def test_missing_perceptual_weights_are_an_error_with_advice(dataset, tmp_path, capsys, monkeypatch):
    def unavailable(**_):
        raise WeightsUnavailable("no weights here")

    monkeypatch.setattr("avatar.stages.loop.VggLoss", unavailable)
    command = ["train", str(dataset), "--out", str(tmp_path), "--set", *TINY, "fit.vgg=0.1"]
    assert cli.main(command) == 1
    assert "no weights here; or train without the perceptual loss: --set fit.vgg=0" in error_of(capsys)


def test_interrupt_saves_and_the_same_command_goes_on(dataset, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the middle of a step: the step ends, its state is saved."""
    step = Fit.step
    before = signal.getsignal(signal.SIGINT)

    def interrupted(self):
        if self.position.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    command = ["train", str(dataset), "--out", str(tmp_path), *FIT]
    monkeypatch.setattr(Fit, "step", interrupted)
    assert cli.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["fit-0000002.safetensors"]
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert cli.main(command) == 0


def test_presets_differ_and_overrides_are_typed():
    small, paper = make_config("x", "small"), make_config("x", "paper")
    assert (small.size, small.point_avatar.points, small.fit.epochs) == (128, small.point_avatar.points, 7)
    assert (paper.size, paper.point_avatar.points, paper.fit.epochs) == (512, 400, 63)
    assert paper.evaluate.refine_steps == 20
    changed = make_config(
        "x", "paper", 3, ("fit.rate=1", "fit.tracking_from=none", "point_avatar.texture_widths=[8,8]")
    )
    assert changed.seed == 3
    assert isinstance(changed.fit.rate, float)
    assert changed.fit.tracking_from is None
    assert changed.point_avatar.texture_widths == (8, 8)
    assert to_json(changed)["fit"]["rate"] == 1.0
    assert replace(changed, seed=0) != paper


@pytest.mark.parametrize("option", ["fit.decay", "adversarial.decay", "generator.condition"])
def test_none_names_a_choice_where_it_is_one(option):
    group, name = option.split(".")
    assert getattr(getattr(make_config("x", "small", 0, (f"{option}=none",)), group), name) == "none"
