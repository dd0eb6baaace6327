"""Parameters and multiply-accumulates of every network, counted; memory and time, measured.

Linear layers and convolutions count, EdgeConv once per edge, derivatives not; a multiply-accumulate is two
floating-point operations. Weight normalisation's gains are folded into the weights, and learnable points are no
network's. Teacher and student include the point avatar they stand on.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from avatar.config import RunConfig
from avatar.errors import AvatarError
from avatar.head import HeadModel, embedded_head
from avatar.models.discriminator import Discriminator
from avatar.models.generator import Generator
from avatar.models.inverter import Inverter
from avatar.models.mlp import parameter_count
from avatar.models.point_avatar import PointAvatar
from avatar.models.student import Student
from avatar.models.teacher import Teacher
from avatar.run import EMBEDDED, Run, configured_head
from avatar.stages.fit import load_avatar

EFFICIENCY = "efficiency.json"
PAPER_POINTS = 400_000
MODELS = ("point_avatar", "teacher", "student", "generator", "discriminator", "inverter")
# How often a network is applied to each point: C1 once; C2 as in PointAvatar's published forward, which evaluates
# the SDF at the points and at as many samples twice over, and the deformer a second time for the normals.
PASSES = {"C1": {}, "C2": {"sdf": 3, "deformer": 2}}
# What takes time but has no layers of its own.
AVATAR_STEPS = ("warp", "jacobian", "splat")
PYRAMID = "pyramid"


@dataclass(frozen=True)
class Part:
    """What is counted under one name."""

    parameters: int = 0
    macs: int = 0  # one pass over all points, or over the image
    per_frame: bool = True  # else once per cloud


Counts = dict[str, dict[str, Part]]  # model -> part


@dataclass(frozen=True)
class Subject:
    """Whose networks are counted, and on how many points.

    They are measured with the weights training starts from, which changes no count.

    Args:
        config: of the networks.   points: N.
        folder: of the run whose fitted points are measured; None for the points a fit of N points starts from.
    """

    config: RunConfig
    points: int
    folder: Path | None = None
    is_stand_in: bool = False
    """Count with a head of FLAME's sizes in place of the embedded one."""

    def head(self) -> HeadModel:
        return flame_sized_head() if self.is_stand_in else configured_head(self.config)

    def avatar(self, points: int | None = None) -> PointAvatar:
        """The point avatar, on other points than the subject's where a number is given."""
        if self.folder is not None and points is None:
            return load_avatar(self.folder, self.config, self.head())
        head = self.head()
        config = replace(self.config.point_avatar, points=points or self.points)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            expressions = torch.zeros(head.num_expressions)
            return PointAvatar(config, head, expressions, torch.ones_like(expressions))


def flame_sized_head() -> HeadModel:
    """The embedded head with FLAME's 36 pose correctives, all zero; joints and expressions are as many."""
    head = embedded_head()
    head.pose_basis = head.pose_basis.new_zeros(*head.template.shape, 9 * (len(head.parents) - 1))
    return head


def subject_of_preset(config: RunConfig, points: int | None = None, size: int | None = None) -> Subject:
    """Networks before any training, on FLAME's sizes unless the configuration names a head of its own."""
    if points is None:
        growths = len(config.fit.grow_epochs or ())
        points = PAPER_POINTS if config.preset == "paper" else config.point_avatar.points * 2**growths
    return _subject(config, points, size, None, is_stand_in=config.head == EMBEDDED)


def subject_of_run(run: Run, points: int | None = None, size: int | None = None) -> Subject:
    """A run's networks, on its fitted points where it has them and no other number is asked for."""
    if points is not None:
        return _subject(run.config, points, size, None)
    if "fit" not in run.stages_done():
        return _subject(run.config, run.config.point_avatar.points, size, None)
    fitted = load_avatar(run.folder, run.config, run.head())
    return _subject(run.config, fitted.num_points, size, run.folder)


def _subject(
    config: RunConfig, points: int, size: int | None, folder: Path | None, is_stand_in: bool = False
) -> Subject:
    if points < 1:
        raise AvatarError(f"--points {points}: wants at least 1")
    size = config.size if size is None else size
    if size < 8 or size & (size - 1):
        raise AvatarError(f"--size {size}: wants a power of 2, at least 8")
    return Subject(replace(config, size=size), points, folder, is_stand_in)


def count(subject: Subject) -> Counts:
    """Parameters and multiply-accumulates of every model, part by part, for one frame."""
    config, points = subject.config, subject.points
    avatar = subject.avatar(points=1)
    student = Student(
        config.student,
        avatar.head,
        avatar.canonical_expression,
        avatar.expression_variance,
        avatar.points.detach(),
        avatar.radius,
        config.generator.latent_size,
    )
    with torch.device("meta"):
        teacher = Teacher(config.teacher, config.generator.latent_size)
        generator = Generator(config.generator, config.size)
        discriminator = Discriminator(config.discriminator, config.size)
        inverter = Inverter(config.inverter, config.generator, config.size)

    def of_parts(model: PointAvatar | Teacher | Student, macs: dict[str, int]) -> dict[str, Part]:
        return {name: Part(parameter_count(part), macs[name]) for name, part in model.parts().items()}

    def with_rest(network: Any, rest: str, name: str, *layers: Any) -> dict[str, Part]:
        """`layers` under one name, whatever else the network has under another."""
        part = Part(sum(map(parameter_count, layers)), sum(layer.macs() for layer in layers))
        whole = Part(parameter_count(network), network.macs())
        return {rest: Part(whole.parameters - part.parameters, whole.macs - part.macs), name: part}

    own = of_parts(avatar, avatar.macs(points))
    steps = {name: Part() for name in AVATAR_STEPS}
    on_graphs = steps | {PYRAMID: Part(per_frame=False)}
    buffers = {"buffers": Part()}
    return {
        "point_avatar": own | steps,
        "teacher": own | of_parts(teacher, teacher.macs(points, config.size)) | on_graphs,
        "student": of_parts(student, student.macs(points)) | on_graphs | buffers,
        "generator": with_rest(generator, "synthesis", "mapping", generator.mapping) | buffers,
        "discriminator": with_rest(
            discriminator, "features", "classifier", discriminator.hidden, discriminator.logit
        ),
        "inverter": with_rest(inverter, "features", "mapping", *inverter.mapping),
    }


def accountings(parts: dict[str, Part]) -> dict[str, dict[str, int]]:
    """Multiply-accumulates and floating-point operations in both accountings."""
    result = {}
    for name, passes in PASSES.items():
        macs = sum(part.macs * passes.get(part_name, 1) for part_name, part in parts.items())
        result[name] = {"macs": macs, "flops": 2 * macs}
    return result


@dataclass(frozen=True)
class Measurement:
    """One frame's pass."""

    peak_memory_bytes: int | None
    milliseconds: float
    parts: dict[str, float]  # milliseconds


def report(subject: Subject, measurements: dict[str, Measurement]) -> dict[str, Any]:
    """The content of efficiency.json; null where nothing was measured."""
    models = {}
    for name, parts in count(subject).items():
        measured = measurements.get(name)
        models[name] = {
            "parameters": sum(part.parameters for part in parts.values()),
            "accountings": accountings(parts),
            "peak_memory_bytes": measured and measured.peak_memory_bytes,
            "milliseconds": measured and measured.milliseconds,
            "parts": {
                part_name: {
                    "parameters": part.parameters,
                    "accountings": accountings({part_name: part}),
                    "milliseconds": measured and measured.parts.get(part_name),
                    "per_frame": part.per_frame,
                }
                for part_name, part in parts.items()
            },
        }
    return {"points": subject.points, "size": subject.config.size, "models": models}


def totals(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of sums; memory is left out, as no two models are measured in one process."""
    models = content["models"]
    # What a frame takes when rendered, and what all stages together train: the teacher includes the avatar.
    groups = {
        "rendered": ("student", "generator"),
        "all": tuple(name for name in models if name != "point_avatar"),
    }
    rows = {}
    for label, names in groups.items():
        members = [models[name] for name in names]
        times = [member["milliseconds"] for member in members]
        rows[label] = {
            "parameters": sum(member["parameters"] for member in members),
            "accountings": {
                accounting: {
                    unit: sum(member["accountings"][accounting][unit] for member in members)
                    for unit in ("macs", "flops")
                }
                for accounting in PASSES
            },
            "peak_memory_bytes": None,
            "milliseconds": None if None in times else sum(times),
        }
    return rows


def efficiency_table(content: dict[str, Any]) -> Table:
    """All models, their totals, and the student in per cent of the teacher."""
    table = Table(
        title=f"one frame of {content['points']:,} points, {content['size']} x {content['size']} pixels",
        caption="rendered = student + generator; all = teacher + student + the three others",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    headers = ("para-\nmeters", "MACs\nC1", "MACs\nC2", "FLOPs\nC1", "FLOPs\nC2", "peak\nMiB", "\nms")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    models = content["models"]
    for name, values in models.items():
        table.add_row(name.replace("_", " "), *_cells(values))
    table.add_section()
    for name, values in totals(content).items():
        table.add_row(name, *_cells(values))
    table.add_section()
    student, teacher = _numbers(models["student"]), _numbers(models["teacher"])
    shares = [own / other if own and other else None for own, other in zip(student, teacher, strict=True)]
    table.add_row("student/teacher", *("-" if share is None else f"{share:.1%}" for share in shares))
    return table


def parts_table(content: dict[str, Any]) -> Table:
    """What the models are made of."""
    table = Table(title="parts", box=box.SIMPLE)
    table.add_column("model")
    table.add_column("part")
    for name in ("parameters", "MACs C1", "MACs C2", "ms"):
        table.add_column(name, justify="right")
    for model, values in content["models"].items():
        for index, (name, part) in enumerate(values["parts"].items()):
            counts = [part["accountings"][accounting]["macs"] for accounting in PASSES]
            time = part["milliseconds"]
            table.add_row(
                "" if index else model.replace("_", " "),
                name if part["per_frame"] else f"{name} (once)",
                *(_short(number) if number else "-" for number in (part["parameters"], *counts)),
                "-" if time is None else f"{time:.1f}",
            )
        table.add_section()
    return table


def _numbers(values: dict[str, Any]) -> list[float | None]:
    units = [values["accountings"][name][unit] for unit in ("macs", "flops") for name in PASSES]
    return [values["parameters"], *units, values["peak_memory_bytes"], values["milliseconds"]]


def _cells(values: dict[str, Any]) -> list[str]:
    *counts, memory, time = _numbers(values)
    return [
        *map(_short, counts),
        "-" if memory is None else f"{memory / 2**20:,.0f}",
        "-" if time is None else f"{time:,.0f}",
    ]


def _short(number: int) -> str:
    """Four digits and a unit, in tera from a tenth: 0.701T, 29.23M."""
    for least, size, letter in ((1e11, 1e12, "T"), (1e8, 1e9, "G"), (1e5, 1e6, "M"), (1e3, 1e3, "k")):
        if number >= least:
            scaled = number / size
            return f"{scaled:.{3 if scaled < 10 else 2 if scaled < 100 else 1}f}{letter}"
    return str(number)
