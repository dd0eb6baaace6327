"""Peak memory and time of one frame's pass through a model, each in a fresh process."""

import ctypes
import gc
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from avatar.camera import Camera
from avatar.efficiency import MODELS, PYRAMID, Measurement, Subject
from avatar.errors import AvatarError
from avatar.models.discriminator import Discriminator
from avatar.models.inverter import Inverter
from avatar.models.point_avatar import PointAvatar
from avatar.models.refined import pool_features
from avatar.models.renderer import Renderer, RenderInput
from avatar.reporting import console
from avatar.stages.distill import create_student
from avatar.stages.teacher import TeacherModel, create_teacher

Pass = Callable[[], object]

WARM_UP_POINTS = 256
SLOW_PASS = 20.0  # seconds; a pass this long is not repeated
REPEATS = 3
REPEAT_SECONDS = 1.0
# Frames a head in front: focal length relative to the image, distance in head units.
FOCAL, DISTANCE = 4.2, 6.4


class Timer:
    """Seconds spent in named parts; a part within another counts as the outer one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.is_inside = False

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str):
        if self.is_inside:
            yield
            return
        self.is_inside, start = True, self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start
            self.is_inside = False

    def watch(self, name: str, owner: object, method: str = "forward") -> None:
        """Count every call of an object's method under a name."""
        call = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.part(name):
                return call(*args, **kwargs)

        setattr(owner, method, timed)


def watch_avatar(timer: Timer, avatar: PointAvatar) -> None:
    timer.watch("sdf", avatar, "sdf_and_gradient")
    timer.watch("deformer", avatar.deformer)
    timer.watch("texture", avatar.texture)
    timer.watch("warp", avatar, "warp")
    timer.watch("jacobian", avatar, "warp_jacobian")
    timer.watch("splat", avatar, "draw")


def camera(subject: Subject, device: torch.device) -> Camera:
    size = subject.config.size
    return Camera(
        torch.tensor([[-FOCAL, FOCAL, 0.5, 0.5]], device=device),
        torch.tensor([[0.0, 0.0, -DISTANCE]], device=device),
        (size, size),
    )


def rest_pose(avatar: PointAvatar) -> tuple[Tensor, Tensor]:
    """Expression (1, E) and pose (1, 15)."""
    return avatar.canonical_expression[None], avatar.canonical_pose[None]


def prepare_point_avatar(subject: Subject, device: torch.device, timer: Timer) -> Pass:
    avatar = subject.avatar().to(device).eval()
    watch_avatar(timer, avatar)
    return lambda: avatar(*rest_pose(avatar), camera(subject, device))


def prepare_teacher(subject: Subject, device: torch.device, timer: Timer) -> Pass:
    avatar = subject.avatar().to(device).eval()
    teacher = create_teacher(subject.config).to(device).eval()
    with timer.part(PYRAMID):
        model = TeacherModel(subject.config, avatar, teacher)
    image = torch.rand(1, 3, subject.config.size, subject.config.size, device=device)
    watch_avatar(timer, avatar)
    for name, part in teacher.parts().items():
        timer.watch(name, part)

    def frame() -> object:
        refined = model.refine(*rest_pose(avatar), image)
        splats = avatar.draw(refined.posed, refined.colors, camera(subject, device))
        return splats, teacher.latent(pool_features(refined.features))

    return frame


def prepare_student(subject: Subject, device: torch.device, timer: Timer) -> Pass:
    with timer.part(PYRAMID):
        model = create_student(subject.config, subject.avatar().to(device))
    student = model.student.to(device).eval()
    watch_avatar(timer, student.avatar)
    for name, part in student.parts().items():
        if name not in student.avatar.parts():
            timer.watch(name, part)

    def frame() -> object:
        refined = model.refine(*rest_pose(student.avatar))
        splats = model.draw(refined, camera(subject, device))
        with timer.part("buffers"):
            given = RenderInput.of(refined, splats)
        return given, student.latent(given.pooled)

    return frame


def prepare_generator(subject: Subject, device: torch.device, timer: Timer) -> Pass:
    config = subject.config
    student = create_student(config, subject.avatar().to(device))
    student.student.to(device).eval()
    refined = student.refine(*rest_pose(student.student.avatar))
    given = RenderInput.of(refined, student.draw(refined, camera(subject, device)))
    renderer = Renderer(config, subject.points, refined.features.shape[-1]).to(device).eval()
    z = renderer.latent(given.pooled)
    generator = renderer.generator
    timer.watch("mapping", generator.mapping)
    timer.watch("synthesis", generator, "synthesize")

    def frame() -> object:
        with timer.part("buffers"):
            buffers = renderer.condition(given)
        return generator(z, buffers, noise="constant").image

    return frame


def prepare_discriminator(subject: Subject, device: torch.device, timer: Timer) -> Pass:
    size = subject.config.size
    network = Discriminator(subject.config.discriminator, size).to(device).eval()
    image = torch.rand(1, 3, size, size, device=device)
    for layer in (network.from_rgb, *network.blocks, network.conv):
        timer.watch("features", layer)
    for layer in (network.hidden, network.logit):
        timer.watch("classifier", layer)
    return lambda: network(image)


def prepare_inverter(subject: Subject, device: torch.device, timer: Timer) -> Pass:
    config = subject.config
    network = Inverter(config.inverter, config.generator, config.size).to(device).eval()
    image = torch.rand(1, 3, config.size, config.size, device=device)
    for layer in (network.from_rgb, *network.maps, *network.downs):
        timer.watch("features", layer)
    timer.watch("mapping", network.mapping)
    return lambda: network(image)


PREPARE = {
    "point_avatar": prepare_point_avatar,
    "teacher": prepare_teacher,
    "student": prepare_student,
    "generator": prepare_generator,
    "discriminator": prepare_discriminator,
    "inverter": prepare_inverter,
}


class PeakMemory:
    """Growth of a device's memory since this was made, at its highest after `reset`.

    On a CPU this is the resident set of the process, and None where the system does not tell.
    """

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device):
        self.device = device
        self.before = self._release_and_read("VmRSS:")

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._release_and_read("VmRSS:")
        try:
            self.RESET.write_text("5")
        except OSError:
            self.before = None

    def growth(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return None if self.before is None else max(self._read("VmHWM:") - self.before, 0)

    def _release_and_read(self, field: str) -> int | None:
        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        try:
            ctypes.CDLL(None).malloc_trim(0)
            return self._read(field)
        except (OSError, AttributeError, StopIteration):
            return None

    def _read(self, field: str) -> int:
        line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


@torch.no_grad()
def measure(subject: Subject, model: str, device: torch.device) -> Measurement:
    """Measure one model in this process.

    Memory is that of the model with its inputs and the pass; what libraries take once and for all is not
    counted. A pass of more than 20 s is timed once, a shorter one repeatedly after a warm-up; the fastest counts,
    as others may use the machine.
    """
    prepare = PREPARE[model]
    gc.freeze()  # collections then look at what is made here only, and quickly
    few = replace(subject, points=min(WARM_UP_POINTS, subject.points), folder=None)
    prepare(few, device, Timer(device))()
    memory = PeakMemory(device)
    timer = Timer(device)
    run = prepare(subject, device, timer)
    once = dict(timer.seconds)
    memory.reset()

    def timed() -> tuple[float, dict[str, float]]:
        timer.seconds.clear()
        start = timer.now()
        run()
        return timer.now() - start, dict(timer.seconds)

    passes = [timed()]
    peak = memory.growth()
    if passes[0][0] <= SLOW_PASS:
        passes.clear()
        while len(passes) < REPEATS and sum(seconds for seconds, _ in passes) < REPEAT_SECONDS:
            passes.append(timed())
    gc.unfreeze()
    seconds, parts = min(passes, key=lambda each: each[0])
    milliseconds = {name: 1000 * value for name, value in (once | parts).items()}
    return Measurement(peak, 1000 * seconds, milliseconds)


def measure_apart(subject: Subject, model: str, device: torch.device) -> Measurement:
    """Measure one model in a fresh process.

    Raises:
        AvatarError: the process did not survive.
    """
    # A fork server imports once and has no threads yet; it does not exist everywhere.
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, subject, model, device).result()
        except BrokenProcessPool as error:
            raise AvatarError(
                f"--points {subject.points}: the process that measured '{model}' was ended, perhaps for want of "
                "memory; try fewer points or --no-measure"
            ) from error


def measure_all(subject: Subject, device: torch.device) -> dict[str, Measurement]:
    """Every model's measurement; see `measure`."""
    return {name: measure_apart(subject, name, device) for name in track(MODELS, "measure", console=console)}
