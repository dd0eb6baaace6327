"""Weights of StyleGAN2's published PyTorch generators, to and from `avatar.models.generator.Generator`.

The names are those of the state dict of `Generator` in stylegan2-ada-pytorch and, of StyleGAN2's architecture, in the
stylegan3 repository. Their snapshots are pickles that need that code to be read; saved once with it, the weights are
plain tensors:

    torch.save(network.state_dict(), "generator.pt")     # or safetensors.torch.save_file(...)

    generator, mean_style = import_generator(read_weights(Path("generator.pt")))
    styles = generator.mapping(z)
    image = generator.synthesize(mean_style.lerp(styles, 0.7), noise="constant").image    # truncation 0.7

What differs: images are in [0, 1] here and in [-1, 1] there, and up-sampling convolutions hold their filters flipped.

Source: Karras et al., Training Generative Adversarial Networks with Limited Data, NeurIPS 2020, and its code.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from avatar.config import GeneratorConfig
from avatar.errors import AvatarError
from avatar.models.generator import Generator
from avatar_ops.nn import ModulatedConv2d

MEAN_STYLE = "mapping.w_avg"
FILTER = "resample_filter"


class ImportedGenerator(NamedTuple):
    generator: Generator
    mean_style: Tensor  # (style_size,), the mean of mapped codes, for truncation


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of what torch.save wrote of a state dict; nothing in it is run.

    Raises:
        AvatarError: not such a file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind may fail anywhere in the reader
        reason = str(error).split("\n", 1)[0]
        raise AvatarError(
            f"{path}: expected a state dict of tensors, as safetensors or by torch.save ({reason})"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AvatarError(f"{path}: expected a state dict of tensors, got {type(content).__name__}")
    return dict(content)


def import_generator(weights: Mapping[str, Tensor], *, clamp: float | None = None) -> ImportedGenerator:
    """A generator with published weights; its sizes are read off them.

    Args:
        weights: state dict of an unconditional generator with skip connections.
        clamp: largest magnitude of what a layer gives. Networks trained in half precision have 256, which is not
            part of the state dict and hardly ever reached.

    Raises:
        AvatarError: a tensor is missing, unknown or of another shape, or the network of another kind.
    """
    generator = Generator(_config(weights), _resolutions(weights)[-1])
    expected = {name: (target, flipped) for name, target, flipped in _tensors(generator)}
    filters = set(_filter_names(generator))
    for name in weights:
        if name not in expected and name not in filters and name != MEAN_STYLE:
            raise AvatarError(f"{name}: unknown; expected an unconditional generator with skip connections")
    for name in filters & weights.keys():
        taps = _filter(generator)
        if weights[name].shape != taps.shape or not torch.allclose(weights[name].to(taps), taps):
            raise AvatarError(f"{name}: expected the filter [1, 3, 3, 1] in both directions, of sum 1")
    with torch.no_grad():
        for name, (target, flipped) in expected.items():
            value = _get(weights, name, tuple(target.shape))
            target.copy_(value.flip(2, 3) if flipped else value)
    for layer in generator.modules():
        if isinstance(layer, ModulatedConv2d):
            layer.clamp = clamp
    return ImportedGenerator(
        generator, _get(weights, MEAN_STYLE, (generator.config.style_size,)).float().clone()
    )


def export_generator(generator: Generator, mean_style: Tensor | None = None) -> dict[str, Tensor]:
    """The state dict under the published names: what `load_state_dict` of those networks takes.

    Args:
        generator: without condition, from a constant of 4 x 4.
        mean_style: (style_size,), by default 0.

    Raises:
        AvatarError: the generator is of another kind.
    """
    if generator.is_conditioned or generator.resolutions[0] != 4:
        raise AvatarError("generator: expected one without condition whose first resolution is 4")
    weights = {
        name: (value.flip(2, 3) if flipped else value).detach().clone()
        for name, value, flipped in _tensors(generator)
    }
    for name in _filter_names(generator):
        weights[name] = _filter(generator).clone()
    if mean_style is None:
        mean_style = generator.constant.new_zeros(generator.config.style_size)
    weights[MEAN_STYLE] = mean_style.detach().clone()
    return weights


def _get(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in weights:
        raise AvatarError(f"{name}: missing, expected shape {shape}")
    if weights[name].shape != shape:
        raise AvatarError(f"{name}: got shape {tuple(weights[name].shape)}, expected {shape}")
    return weights[name]


def _resolutions(weights: Mapping[str, Tensor]) -> list[int]:
    found = {int(match[1]) for name in weights if (match := re.match(r"synthesis\.b(\d+)\.", name))}
    resolutions = sorted(found)
    if not resolutions or resolutions != [4 * 2**index for index in range(len(resolutions))]:
        raise AvatarError(f"synthesis.b*: got resolutions {resolutions}, expected 4, 8, 16, ...")
    return resolutions


def _config(weights: Mapping[str, Tensor]) -> GeneratorConfig:
    """The sizes that the shapes of the weights tell."""

    def size(name: str, rank: int, axis: int) -> int:
        if name not in weights or weights[name].dim() != rank:
            raise AvatarError(f"{name}: expected a tensor of {rank} dimensions")
        return weights[name].shape[axis]

    widths = {
        resolution: size(f"synthesis.b{resolution}.conv1.weight", 4, 0)
        for resolution in _resolutions(weights)
    }
    most = max(widths.values())
    # Widths halve where they are below the largest; where none is, any base from this one on gives them.
    bases = [resolution * width for resolution, width in widths.items() if width < most]
    base = max(bases, default=most * max(widths))
    for resolution, width in widths.items():
        if width != min(base // resolution, most):
            raise AvatarError(
                f"synthesis.b{resolution}.conv1.weight: got {width} outputs, expected "
                f"{min(base // resolution, most)}, as {base} / resolution, at most {most}"
            )
    layers = sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in weights)
    return GeneratorConfig(
        channel_base=base,
        channel_max=most,
        latent_size=size("mapping.fc0.weight", 2, 1),
        style_size=size("mapping.fc0.weight", 2, 0),
        mapping_layers=layers,
        condition="none",
    )


def _layers(generator: Generator) -> Iterator[tuple[str, ModulatedConv2d, Tensor | None]]:
    """Published name, layer and map of constant noise of every modulated convolution."""
    for index, block in enumerate(generator.blocks):
        maps = getattr(generator, f"noise_{index}")[:, 0, 0]
        prefix = f"synthesis.b{block.resolution}"
        # The first resolution lacks the convolution that doubles the size.
        convolutions = [block.first] if block.second is None else [block.first, block.second]
        names = ("conv1",) if block.second is None else ("conv0", "conv1")
        for name, layer, noise in zip(names, convolutions, maps, strict=True):
            yield f"{prefix}.{name}", layer, noise
        yield f"{prefix}.torgb", block.to_rgb, None


def _tensors(generator: Generator) -> Iterator[tuple[str, Tensor, bool]]:
    """Published name, our tensor or view of it, and whether one is the other flipped in height and width."""
    for index, layer in enumerate(generator.mapping.layers):
        yield f"mapping.fc{index}.weight", layer.weight, False
        yield f"mapping.fc{index}.bias", layer.bias, False
    yield f"synthesis.b{generator.resolutions[0]}.const", generator.constant[0], False
    for name, layer, noise in _layers(generator):
        yield f"{name}.weight", layer.weight, layer.up == 2
        yield f"{name}.bias", layer.bias, False
        yield f"{name}.affine.weight", layer.affine_weight, False
        yield f"{name}.affine.bias", layer.affine_bias, False
        if noise is not None:
            yield f"{name}.noise_const", noise, False
            yield f"{name}.noise_strength", layer.noise_strength, False


def _filter_names(generator: Generator) -> Iterator[str]:
    for resolution in generator.resolutions:
        yield f"synthesis.b{resolution}.{FILTER}"
    for name, _, noise in _layers(generator):
        if noise is not None:
            yield f"{name}.{FILTER}"


def _filter(generator: Generator) -> Tensor:
    return torch.outer(generator.filter, generator.filter)
