import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from conftest import TINY
from torch.utils.flop_counter import FlopCounterMode

from avatar import cli, measurement
from avatar.efficiency import MODELS, accountings, count, report, subject_of_preset, subject_of_run
from avatar.errors import AvatarError
from avatar.measurement import PREPARE, Timer, measure, measure_apart
from avatar.models.mlp import parameter_count
from avatar.models.pyramid import fir_macs
from avatar.presets import make_config
from avatar.run import Run
from avatar.stages.adversarial import create_networks
from avatar.stages.distill import create_student
from avatar.stages.fit import load_avatar
from avatar.stages.teacher import create_teacher

CPU = torch.device("cpu")
POINTS = 300
STUDENT_B = ("student.avatar.sdf_width=80", "student.features.randla_widths=[8,32,96,224]")


@pytest.fixture(scope="module")
def subject():
    """Tiny networks on the points a fit starts from."""
    return subject_of_preset(make_config("embedded", "small", 0, TINY), POINTS)


@pytest.fixture(scope="module")
def fitted(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = ("--stages", "fit", "--set", *TINY, "fit.epochs=3")
    assert cli.main(["train", str(dataset), "--out", str(folder), *options]) == 0
    return folder


def live_models(subject):
    """Whatever the models are made of."""
    avatar = subject.avatar()
    student = create_student(subject.config, avatar)
    networks = create_networks(subject.config, student)
    return {
        "avatar": avatar,
        "teacher": create_teacher(subject.config),
        "student": student.student,
        "generator": networks.renderer.generator,
        "discriminator": networks.discriminator,
        "inverter": networks.inverter,
    }


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def performed(call, *arguments):
    """Multiply-accumulates of the matrix products and convolutions that a call performs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("options", "parameters", "tera", "shares"),
    [
        ((), 1_062_457, (0.050, 0.075), (3.6, 7.1, 6.4)),
        (STUDENT_B, 1_223_081, (0.052, 0.085), (4.2, 7.5, 7.3)),
    ],
    ids=["A", "B"],
)
def test_paper_figures(options, parameters, tera, shares):
    """The teacher's 29.227 M parameters, and a student of at most 5 % of them and 10 % of its MACs."""
    content = report(subject_of_preset(make_config("embedded", "paper", 0, options)), {})
    assert (content["points"], content["size"]) == (400_000, 512)
    models = content["models"]

    def tera_macs(name):
        return tuple(round(models[name]["accountings"][key]["macs"] / 1e12, 3) for key in ("C1", "C2"))

    assert models["point_avatar"]["parameters"] == 633_195
    assert tera_macs("point_avatar") == (0.252, 0.712)
    assert models["teacher"]["parameters"] == 29_226_841
    assert tera_macs("teacher") == (0.701, 1.162)
    assert models["student"]["parameters"] == parameters
    assert tera_macs("student") == tera
    own, whole = models["student"], models["teacher"]
    ratios = [own["parameters"] / whole["parameters"]]
    ratios += [own["accountings"][name]["macs"] / whole["accountings"][name]["macs"] for name in ("C1", "C2")]
    assert tuple(round(100 * ratio, 1) for ratio in ratios) == shares
    assert ratios[0] <= 0.05
    assert max(ratios[1:]) <= 0.10


def test_parameters_are_those_of_the_live_networks(subject):
    totals = {name: sum(part.parameters for part in parts.values()) for name, parts in count(subject).items()}
    live = live_models(subject)
    numbers = {name: parameter_count(model) for name, model in live.items()}
    points = live["avatar"].points.numel()
    assert totals == {
        "point_avatar": numbers["avatar"] - points,
        "teacher": numbers["avatar"] - points + numbers["teacher"],
        "student": numbers["student"] - points,
        "generator": numbers["generator"],
        "discriminator": numbers["discriminator"],
        "inverter": numbers["inverter"],
    }


def test_macs_are_those_performed(subject):
    """By torch's own counter, wherever a part runs on torch's matrix products and convolutions alone."""
    counts, live = count(subject), live_models(subject)
    size = subject.config.size
    points = torch.rand(POINTS, 3)
    for name, avatar in (("point_avatar", live["avatar"]), ("student", live["student"].avatar)):
        parts = counts[name]
        assert performed(avatar.sdf, points) == parts["sdf"].macs
        network = avatar.deformer.residual.network
        assert performed(network, points) == parts["deformer"].macs
        assert performed(avatar.texture, points) == parts["texture"].macs
    for name in ("teacher", "student"):
        model, parts = live[name], counts[name]
        features = torch.rand(1, POINTS, model.features.out_channels)
        arguments = [features]
        if name == "teacher":
            image = torch.rand(1, 3, size, size)
            assert performed(model.image, image) == parts["image"].macs
            arguments.append(model.image(image))
        assert performed(model.fusion, *arguments) == parts["fusion"].macs
        assert performed(model.head, model.fusion(*arguments)) == parts["head"].macs
        pooled = torch.rand(1, 2 * model.fusion.out_channels)
        assert performed(model.latent, pooled) == parts["latent"].macs
    image = torch.rand(1, 3, size, size)
    assert performed(live["inverter"], image) == sum(part.macs for part in counts["inverter"].values())
    filtered = sum(2 * fir_macs(block.inputs, block.resolution) for block in live["discriminator"].blocks)
    judged = sum(part.macs for part in counts["discriminator"].values())
    assert performed(live["discriminator"], image) == judged - filtered
    assert performed(live["generator"].mapping, torch.rand(1, 16)) == counts["generator"]["mapping"].macs


def test_edges_count_once_each(subject):
    """RandLA-Net and EdgeConv run on kernels of their own: one more neighbour adds its edges."""
    more = make_config(
        "embedded",
        "small",
        0,
        (*TINY, "student.features.randla_neighbors=4", "student.features.gcn_neighbors=4"),
    )
    before, after = count(subject)["student"], count(subject_of_preset(more, POINTS))["student"]
    # EdgeConv 12 -> 4 on a quarter of the points; codes 10 -> d/2 -> d/2 and two d x d scores with d = 4 twice.
    assert after["gcn"].macs - before["gcn"].macs == POINTS // 4 * 12 * 4
    per_edge = 10 * 2 + 2 * 2 + 2 * 4 * 4
    assert after["randla"].macs - before["randla"].macs == (POINTS + POINTS // 4) * per_edge


def test_second_accounting_repeats_sdf_and_deformer(subject):
    parts = count(subject)["teacher"]
    counted = accountings(parts)
    once = sum(part.macs for part in parts.values())
    assert counted["C1"] == {"macs": once, "flops": 2 * once}
    again = once + 2 * parts["sdf"].macs + parts["deformer"].macs
    assert counted["C2"] == {"macs": again, "flops": 2 * again}


def check_format(content, *, measured):
    assert list(content) == ["points", "size", "models"]
    assert tuple(content["models"]) == MODELS
    kinds = (int, float) if measured else (type(None),)
    for model in content["models"].values():
        assert list(model) == [
            "parameters",
            "accountings",
            "peak_memory_bytes",
            "milliseconds",
            "parts",
        ]
        assert isinstance(model["milliseconds"], kinds)
        assert isinstance(model["peak_memory_bytes"], kinds)
        assert list(model["accountings"]) == ["C1", "C2"]
        parts = model["parts"].values()
        assert model["parameters"] == sum(part["parameters"] for part in parts)
        for name, units in model["accountings"].items():
            assert units["flops"] == 2 * units["macs"]
            assert units["macs"] == sum(part["accountings"][name]["macs"] for part in parts)


def test_command_without_run_counts_with_sizes_of_flame(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["efficiency", "--no-measure", "--points", "1000", "--size", "64"]) == 0
    content = json.loads((tmp_path / "efficiency.json").read_text())
    assert (content["points"], content["size"]) == (1000, 64)
    check_format(content, measured=False)
    output = capsys.readouterr().out
    assert "36 pose correctives" in output
    assert "student/teacher" in output
    assert "29.23M" in output


def test_command_counts_a_run_on_its_own_points_and_head(fitted, head, capsys):
    assert cli.main(["efficiency", str(fitted), "--no-measure"]) == 0
    content = json.loads((fitted / "efficiency.json").read_text())
    config = cli.read_config(fitted)
    avatar = load_avatar(fitted, config, head)
    assert avatar.num_points != config.point_avatar.points
    assert (content["points"], content["size"]) == (avatar.num_points, 32)
    part = content["models"]["point_avatar"]["parts"]["deformer"]
    assert part["parameters"] == parameter_count(avatar.deformer)
    assert "pose correctives" not in capsys.readouterr().out
    assert cli.main(["efficiency", str(fitted), "--no-measure", "--points", "77"]) == 0
    assert json.loads((fitted / "efficiency.json").read_text())["points"] == 77


def test_command_measures_a_run(fitted):
    assert cli.main(["efficiency", str(fitted), "--device", "cpu"]) == 0
    content = json.loads((fitted / "efficiency.json").read_text())
    check_format(content, measured=True)
    for name, model in content["models"].items():
        assert model["milliseconds"] > 0
        for part_name, part in model["parts"].items():
            assert (part["milliseconds"] is None) == (part_name == "jacobian"), (name, part_name)


def test_an_unfinished_run_is_counted_by_its_configuration(tmp_path):
    run = Run(tmp_path, make_config("embedded", "small", 0, TINY), CPU)
    assert run.stages_done() == []
    subject = subject_of_run(run)
    assert (subject.points, subject.folder) == (POINTS, None)


@pytest.mark.parametrize("model", PREPARE)
def test_measured_parts_are_counted_ones(subject, model):
    measurement = measure(subject, model, CPU)
    assert measurement.parts.keys() <= count(subject)[model].keys()
    frame = {name: value for name, value in measurement.parts.items() if name != "pyramid"}
    assert 0 < sum(frame.values()) <= measurement.milliseconds


def test_published_normals_are_measured_too(subject):
    config = make_config("embedded", "small", 0, (*TINY, "point_avatar.normals=jacobian"))
    assert "jacobian" in measure(subject_of_preset(config, POINTS), "point_avatar", CPU).parts


def test_timer_counts_inner_parts_as_the_outer_one():
    class Steps:
        def inner(self):
            return 1

        def outer(self):
            return self.inner() + 1

    steps, timer = Steps(), Timer(CPU)
    timer.watch("inner", steps, "inner")
    timer.watch("outer", steps, "outer")
    assert steps.outer() == 2
    assert set(timer.seconds) == {"outer"}
    steps.inner()
    assert set(timer.seconds) == {"outer", "inner"}


def test_a_killed_measurement_is_named(subject, monkeypatch):
    class Killed:
        def __init__(self, *_, **__):
            self.result = Future()
            self.result.set_exception(BrokenProcessPool())

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def submit(self, *_):
            return self.result

    monkeypatch.setattr(measurement, "ProcessPoolExecutor", Killed)
    with pytest.raises(AvatarError, match="--points 300: the process that measured 'teacher' was ended"):
        measure_apart(subject, "teacher", CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points", "0"], "--points 0: wants at least 1"),
        (["--size", "100"], "--size 100: wants a power of 2"),
        (["NONE"], "config.json: No such file or directory"),
        (["RUN", "--points", "0"], "--points 0: wants at least 1"),
        (["RUN", "--preset", "paper"], "a run has a configuration of its own"),
    ],
    ids=["points", "size", "run", "points of a run", "preset"],
)
def test_errors_are_one_clear_line(arguments, message, fitted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    places = {"NONE": str(tmp_path / "none"), "RUN": str(fitted)}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert cli.main(["efficiency", "--no-measure", *arguments]) == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "efficiency.json").exists()
