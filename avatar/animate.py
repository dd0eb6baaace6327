"""Animation of a trained avatar: driven by tracked frames, turning, or with chosen expressions."""

import difflib
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import torch
from rich.progress import track
from torch import Tensor

from avatar.camera import Camera
from avatar.checkpoint import replace_file
from avatar.commands import RenderCommand
from avatar.data import Tracking, load_frames, load_tracking
from avatar.data.point_avatar import POSE_SIZE
from avatar.errors import AvatarError, Stopped
from avatar.evaluate import Draw
from avatar.head import HeadModel
from avatar.reporting import console, write_png
from avatar.run import Run, data_root, model_loaders

MODELS = ("full", "student", "teacher", "point_avatar")
ANGLES = ("jaw", "yaw", "pitch", "roll", "gaze_x", "gaze_y")
# Of H.264: 0 is lossless, 23 its default.
CONSTANT_RATE_FACTOR = 16


def render(run: Run, command: RenderCommand, should_stop: Callable[[], bool] = lambda: False) -> Path:
    """Draw what the command asks for and write it; returns the file.

    Raises:
        AvatarError: naming the option that is wrong.   Stopped: `should_stop` said so; nothing is written.
    """
    path = check_command(command)
    head = run.head()
    name, load = choose_model(run, command.model)
    size = choose_size(run, name, command.size)
    if command.drive is None or name == "teacher":
        check_training_data(run)
    truth = None
    if command.drive is not None:
        root = data_root(str(command.drive))
        if command.compare:
            driver = load_frames(root, command.split, size)
            truth = driver.images
        else:
            driver = load_tracking(root, command.split)
        if driver.expression.shape[1] != head.num_expressions:
            raise AvatarError(
                f"--drive {command.drive}: its frames have {driver.expression.shape[1]} expression coefficients, "
                f"the head of {run.folder} takes {head.num_expressions}"
            )
    else:
        driver = neutral_frame(load_tracking(data_root(run.config.data), "train"))
        driver = apply_settings(driver, command.expression, expression_names(head))
        if command.turntable:
            driver = turn(driver, command.frames, command.degrees)
    make_folder(path)
    pictures = draw_frames(load(), driver, size, run.device, f"render {path.name}", should_stop)
    if truth is not None:
        pictures = beside(truth, pictures)
    try:
        if path.suffix == ".png":
            write_png(path, *pictures)
        else:
            write_video(path, pictures, command.fps)
    except OSError as error:
        raise AvatarError(f"{path}: {error.strerror or error}") from error
    return path


def check_command(command: RenderCommand) -> Path:
    """The file to write, once the options are known to fit together."""
    still = bool(command.expression) and not command.turntable
    if command.drive is not None and (command.turntable or command.expression):
        other = "--turntable" if command.turntable else "--expression"
        raise AvatarError(f"--drive and {other} exclude each other: the data set sets expression and pose")
    if command.drive is None and not command.turntable and not command.expression:
        raise AvatarError("nothing to render: wants --drive DATA, --turntable or --expression NAME=VALUE ...")
    if command.compare and command.drive is None:
        raise AvatarError("--compare: only the frames of --drive DATA have true ones beside them")
    if command.degrees is not None and not (command.turntable and math.isfinite(command.degrees)):
        raise AvatarError(f"--degrees {command.degrees:g}: wants --turntable and a finite angle")
    for option, value in (("frames", command.frames), ("fps", command.fps), ("size", command.size)):
        if value is not None and value < 1:
            raise AvatarError(f"--{option} {value}: wants at least 1")
    suffix = ".png" if still else ".mp4"
    if command.out is None:
        name = "drive" if command.drive is not None else "turntable" if command.turntable else "expression"
        return command.run / "renders" / f"{name}{suffix}"
    if command.out.suffix.lower() != suffix:
        kind = "a picture" if still else "a film"
        raise AvatarError(f"--out {command.out}: {kind} wants a name that ends in {suffix}")
    if command.out.is_dir():
        raise AvatarError(f"--out {command.out}: is a folder")
    return command.out


def choose_model(run: Run, wanted: str | None) -> tuple[str, Callable[[], Draw]]:
    """A trained model by name, the best one by default, and what loads it."""
    loaders = model_loaders(run)
    if wanted is not None and wanted not in loaders:
        raise AvatarError(f"--model {wanted}: {run.folder} has not trained it (it has: {', '.join(loaders)})")
    name = wanted or next(name for name in MODELS if name in loaders)
    return name, loaders[name]


def choose_size(run: Run, model: str, wanted: int | None) -> int:
    trained = run.config.size
    if wanted not in (None, trained) and model == "full":
        raise AvatarError(
            f"--size {wanted}: the full method paints at {trained} x {trained} only; "
            "--model student or point_avatar take any size"
        )
    return wanted or trained


def check_training_data(run: Run) -> None:
    root = data_root(run.config.data)
    if not root.is_dir():
        raise AvatarError(f"{root}: no such folder (the run's training data; --data says where it is now)")


def make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AvatarError(f"--out {path}: {error.strerror}") from error


def expression_names(head: HeadModel) -> list[str]:
    """The head's own names, else expression_0, expression_1, ..."""
    return head.expression_names or [f"expression_{index}" for index in range(head.num_expressions)]


def neutral_frame(tracking: Tracking) -> Tracking:
    """One frame with the first one's camera, the mean expression and every joint at rest."""
    return Tracking(
        names=["neutral"],
        expression=tracking.expression.mean(0, keepdim=True),
        pose=torch.zeros(1, POSE_SIZE),
        translation=tracking.translation[:1],
        intrinsics=tracking.intrinsics[:1],
        shape=tracking.shape,
    )


def apply_settings(frame: Tracking, settings: tuple[str, ...], names: list[str]) -> Tracking:
    """A frame with `NAME=VALUE` settings of its expression (by `names`) and of the ANGLES of its pose, in degrees.

    Raises:
        AvatarError: a setting without value, an unknown name, a value that is no finite number.
    """
    expression, angles = frame.expression.clone(), {}
    for setting in settings:
        name, value = parse_setting(setting, [*names, *ANGLES])
        if name in ANGLES:
            angles[name] = value
        else:
            expression[:, names.index(name)] = value
    return replace(frame, expression=expression, pose=pose_of_angles(angles) if angles else frame.pose)


def parse_setting(setting: str, names: list[str]) -> tuple[str, float]:
    name, separator, text = setting.partition("=")
    if not separator:
        raise AvatarError(f"--expression {setting}: wants NAME=VALUE")
    if name not in names:
        spelling = {known.lower(): known for known in names}
        near = [spelling[match] for match in difflib.get_close_matches(name.lower(), spelling, n=5)]
        hint = f"near: {', '.join(near)}" if near else f"names: {', '.join(names)}"
        raise AvatarError(f"--expression {setting}: no expression or angle '{name}' ({hint})")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise AvatarError(f"--expression {setting}: '{text}' is not a finite number")
    return name, value


def pose_of_angles(angles: dict[str, float]) -> Tensor:
    """Axis-angles of root, neck, jaw and eyes: (1, 15).

    Args:
        angles: degrees by the names in ANGLES; 0 where absent. Positive yaw and gaze_x look to the right of the
            picture, pitch and gaze_y up; roll is clockwise in the picture; jaw opens. The neck carries the head's.
    """
    jaw, yaw, pitch, roll, gaze_x, gaze_y = (math.radians(angles.get(name, 0.0)) for name in ANGLES)
    neck = rotation_vector(yaw, -pitch, -roll)
    eye = rotation_vector(gaze_x, -gaze_y, 0.0)
    return torch.tensor([[0.0, 0.0, 0.0, *neck, jaw, 0.0, 0.0, *eye, *eye]])


def rotation_vector(y: float, x: float, z: float) -> tuple[float, ...]:
    """Axis-angle of a turn about z, then x, then y, all in radians."""
    (cx, sx), (cy, sy), (cz, sz) = ((math.cos(angle / 2), math.sin(angle / 2)) for angle in (x, y, z))
    # The product of the three turns' quaternions.
    real = cy * cx * cz + sy * sx * sz
    vector = (
        cy * sx * cz + sy * cx * sz,
        sy * cx * cz - cy * sx * sz,
        cy * cx * sz - sy * sx * cz,
    )
    length = math.hypot(*vector)
    if length < 1e-12:
        return 0.0, 0.0, 0.0
    # Of the two ways round, the shorter.
    angle = 2 * math.atan2(math.copysign(length, real), abs(real))
    return tuple(angle / length * value for value in vector)


def turn(frame: Tracking, count: int, degrees: float | None) -> Tracking:
    """`count` frames of the avatar turning about the vertical axis through its root, the first one as it is.

    Args:
        degrees: swings to this angle on either side and back; None: goes once round.
    """
    share = torch.arange(count) / count
    if degrees is None:
        angles = 2 * math.pi * share
    else:
        angles = math.radians(degrees) * torch.sin(2 * math.pi * share)
    repeated = {
        name: getattr(frame, name).repeat(count, 1)
        for name in ("expression", "pose", "translation", "intrinsics")
    }
    repeated["pose"][:, 1] = angles
    return replace(frame, names=[f"turn {number}" for number in range(1, count + 1)], **repeated)


def draw_frames(
    draw: Draw,
    tracking: Tracking,
    size: int,
    device: torch.device,
    label: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Tensor]:
    """Pictures (3, size, size) of tracked frames in [0, 1], one after the other, on the CPU.

    Raises:
        Stopped: `should_stop` said so.
    """
    for index in track(range(len(tracking)), label, console=console):
        if should_stop():
            raise Stopped("stopped; nothing was written")
        expression, pose, translation, intrinsics = (
            value[index : index + 1].to(device)
            for value in (tracking.expression, tracking.pose, tracking.translation, tracking.intrinsics)
        )
        with torch.no_grad():
            picture = draw(expression, pose, Camera(intrinsics, translation, (size, size)))
        yield picture[0].clamp(0, 1).cpu()


def beside(truth: Tensor, pictures: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pictures with true frames (F, 3, H, W) uint8 to their left."""
    for real, picture in zip(truth, pictures, strict=True):
        yield torch.cat([real / 255, picture], -1)


def write_video(path: Path, pictures: Iterable[Tensor], fps: int) -> None:
    """Encode pictures (3, H, W) in [0, 1] as H.264; odd sides get a white row or column more.

    Raises:
        AvatarError: the encoder failed. Then, as after any interruption, nothing is left of the film.
    """
    pictures = iter(pictures)
    first = next(pictures)
    height, width = first.shape[-2:]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    command += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p"]
    command += ["-c:v", "libx264", "-crf", str(CONSTANT_RATE_FACTOR), "-movflags", "+faststart", "-f", "mp4"]
    with replace_file(path) as temporary, tempfile.TemporaryFile() as messages:
        encoder = subprocess.Popen(
            # Ctrl-C is for this process alone, which then ends the encoder.
            [*command, f"file:{temporary}"],
            stdin=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,
        )
        try:
            feed(encoder, first, pictures)
            status = encoder.wait()
        finally:
            encoder.kill()
            encoder.wait()
        if status:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").strip().splitlines() or [f"status {status}"]
            raise AvatarError(f"{path}: the video encoder failed: {lines[0]}")


def feed(encoder: subprocess.Popen, first: Tensor, others: Iterator[Tensor]) -> None:
    """Send pictures to an encoder's input, as far as it takes them."""
    try:
        with encoder.stdin as file:
            file.write(to_bytes(first))
            for picture in others:
                file.write(to_bytes(picture))
    except BrokenPipeError:
        pass  # the encoder's own message says more


def to_bytes(picture: Tensor) -> bytes:
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy().tobytes()
