"""The two presets, overrides of single options, and configurations as JSON."""

import dataclasses
import json
import types
import typing
from dataclasses import replace
from typing import Any, Literal

from avatar.config import (
    AdversarialConfig,
    DiscriminatorConfig,
    DistillConfig,
    EvaluateConfig,
    FitConfig,
    GeneratorConfig,
    InverterConfig,
    PointAvatarConfig,
    PointFeaturesConfig,
    Preset,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from avatar.errors import AvatarError

SMALL_POINT_AVATAR = PointAvatarConfig(
    sdf_width=64,
    sdf_layers=6,
    sdf_skip=3,
    deformer_width=64,
    texture_widths=(32, 32),
    deformer="head",
    normals="skinning",
    points=9000,
    start="surface",
    dense_share=4.0,
    radius=0.04,
    jaw_opening=0.12,
)
SMALL_FIT = FitConfig(
    epochs=7,
    steps_per_epoch=100,
    batch_max=1,
    grow_epochs=(2,),
    prune_from=1,
    prune_until=1,
    rebuild_optimizer=False,
    rate=2e-3,
    point_rate=5e-4,
    deformer_rate=2e-4,
    decay="linear",
    tracking_from=None,
    vgg_every=2,
    vgg_size=None,
    vgg_from=2,
    eikonal_samples=2000,
    flame=1.0,
    flame_halvings=(),
    checkpoint_every=50,
    image_every=200,
    log_every=10,
)

SMALL_TEACHER = TeacherConfig(
    features=PointFeaturesConfig(
        randla_widths=(16, 32, 64, 128),
        randla_neighbors=12,
        gcn_widths=(32, 32),
        gcn_neighbors=16,
        gcn_output=64,
        norm_momentum=0.1,
    ),
    resnet="resnet18",
    image_widths=(128, 64),
    fusion_widths=(96, 64),
    head_widths=(64,),
    latent_width=256,
)
SMALL_STUDENT = StudentConfig(
    avatar=replace(
        SMALL_POINT_AVATAR,
        sdf_width=48,
        sdf_layers=5,
        sdf_skip=5,
        deformer_width=32,
        deformer_layers=3,
        texture_widths=(32,),
    ),
    features=PointFeaturesConfig(
        randla_widths=(8, 16, 32, 48),
        randla_neighbors=8,
        gcn_widths=(32, 32),
        gcn_neighbors=8,
        gcn_output=None,
        gcn_level=1,
        norm_momentum=0.1,
    ),
    fusion_widths=(32, 32),
    latent_width=256,
)
SMALL_GENERATOR = GeneratorConfig(channel_base=4096, channel_max=128, latent_size=256, style_size=256)
SMALL_TEACHER_TRAINING = TeacherTrainingConfig(
    epochs=2,
    steps_per_epoch=50,
    batch_max=1,
    decay="linear",
    norm_frozen_from=0.6,
    vgg_size=None,
    vgg_every=2,
    checkpoint_every=50,
    image_every=50,
    log_every=10,
)
SMALL_DISTILL = DistillConfig(
    epochs=6,
    steps_per_epoch=50,
    batch_max=1,
    decay="linear",
    rate=4e-3,
    point_rate=5e-4,
    warmup_steps=250,
    kl_anchors=256,
    kl_points=2048,
    match=0.5,
    norm_frozen_from=0.6,
    vgg_size=None,
    vgg_every=2,
    eikonal_samples=1000,
    checkpoint_every=50,
    image_every=100,
    log_every=10,
)
SMALL_ADVERSARIAL = AdversarialConfig(
    pretrain_steps=400,
    rounds=2,
    optimization_steps=25,
    rendering_steps=50,
    batch=1,
    decay="linear",
    generator_rate=0.004,
    condition_rate=0.01,
    student_rate=2e-4,
    splat_rgb=1.0,
    inverter_every=2,
    gan_from=300,
    ema_images=30.0,
    checkpoint_every=50,
    image_every=100,
    log_every=10,
)


def make_config(data: str, preset: Preset, seed: int = 0, overrides: tuple[str, ...] = ()) -> RunConfig:
    """A preset's configuration with `NAME=VALUE` overrides, names dotted as in `fit.epochs`."""
    if preset == "small":
        config = RunConfig(
            data=data,
            size=128,
            point_avatar=SMALL_POINT_AVATAR,
            teacher=SMALL_TEACHER,
            student=SMALL_STUDENT,
            generator=SMALL_GENERATOR,
            discriminator=DiscriminatorConfig(channel_base=4096, channel_max=128),
            inverter=InverterConfig(mapping_width=256),
            fit=SMALL_FIT,
            teacher_training=SMALL_TEACHER_TRAINING,
            distill=SMALL_DISTILL,
            adversarial=SMALL_ADVERSARIAL,
            evaluate=EvaluateConfig(refine_steps=0, open_image=False),
        )
    else:
        config = RunConfig(data=data, preset=preset)
    config = dataclasses.replace(config, seed=seed)
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise AvatarError(f"--set {override}: wants NAME=VALUE")
        config = _override(config, name.split("."), text, override)
    return config


def _override(config: Any, path: list[str], text: str, override: str) -> Any:
    fields = typing.get_type_hints(type(config))
    if path[0] not in fields:
        raise AvatarError(f"--set {override}: no option '{path[0]}' (options: {', '.join(sorted(fields))})")
    current = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise AvatarError(f"--set {override}: '{path[0]}' has no options of its own")
        value = _override(current, path[1:], text, override)
    else:
        if dataclasses.is_dataclass(current):
            raise AvatarError(f"--set {override}: '{path[0]}' is a group; name one of its options")
        try:
            value = _typed(_decode(text, fields[path[0]]), fields[path[0]])
        except (TypeError, ValueError):
            raise AvatarError(
                f"--set {override}: '{text}' does not fit {_describe(fields[path[0]])}"
            ) from None
        if path[0].endswith("_every") and value < 1:
            raise AvatarError(f"--set {override}: wants at least 1")
    return dataclasses.replace(config, **{path[0]: value})


def _decode(text: str, hint: Any) -> Any:
    """What the text of an override says, for `_typed`."""
    if typing.get_origin(hint) is Literal:
        return text  # "none" is a name here
    if text.lower() == "none":
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "null") else text)
    except ValueError:
        return text


def _typed(raw: Any, hint: Any) -> Any:
    """`raw`, decoded from JSON, as the annotated type; ValueError or TypeError where it does not fit."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        unknown = raw.keys() - hints.keys()
        if unknown:
            raise ValueError(f"unknown option '{sorted(unknown)[0]}'")
        return hint(**{name: _typed(value, hints[name]) for name, value in raw.items()})
    if origin is Literal:
        if raw not in typing.get_args(hint):
            raise ValueError(raw)
        return raw
    if origin in (types.UnionType, typing.Union):
        if raw is None:
            return None
        return _typed(raw, next(option for option in typing.get_args(hint) if option is not type(None)))
    if origin is tuple:
        return tuple(_typed(item, typing.get_args(hint)[0]) for item in raw)
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if type(raw) is not hint:
        raise ValueError(raw)
    return raw


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")


def to_json(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(content: dict[str, Any], source: str) -> RunConfig:
    """The configuration in a run's config.json.

    Raises:
        AvatarError: an option that does not exist or does not fit.
    """
    try:
        return _typed(content, RunConfig)
    except (AttributeError, TypeError, ValueError) as error:
        raise AvatarError(f"{source}: not a configuration of this version ({error})") from error


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """Options in which two configurations differ, as 'fit.epochs (8, here 4)'."""
    found = []
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} ({a}, here {b})")
    return found
