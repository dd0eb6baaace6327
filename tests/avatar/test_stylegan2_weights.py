import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from avatar.config import GeneratorConfig
from avatar.errors import AvatarError
from avatar.models.generator import Generator
from avatar.models.stylegan2_weights import export_generator, import_generator, read_weights

WIDTHS = {4: 12, 8: 12, 16: 8, 32: 4}
LATENT, STYLE = 7, 10


def published_weights(mapping_layers=3):
    """Random weights under the published names."""
    weights = {"mapping.w_avg": torch.randn(STYLE)}
    for index in range(mapping_layers):
        inputs = STYLE if index else LATENT
        weights[f"mapping.fc{index}.weight"] = torch.randn(STYLE, inputs) * 100
        weights[f"mapping.fc{index}.bias"] = torch.randn(STYLE) * 30
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    previous = None
    for resolution, width in WIDTHS.items():
        prefix = f"synthesis.b{resolution}"
        weights[f"{prefix}.resample_filter"] = torch.outer(taps, taps)
        layers = {"conv1": (width, width, 3), "torgb": (width, 3, 1)}
        if previous is None:
            weights[f"{prefix}.const"] = torch.randn(width, resolution, resolution)
        else:
            layers["conv0"] = (previous, width, 3)
        for name, (inputs, outputs, kernel) in layers.items():
            layer = f"{prefix}.{name}"
            weights[f"{layer}.weight"] = torch.randn(outputs, inputs, kernel, kernel)
            weights[f"{layer}.bias"] = torch.randn(outputs)
            weights[f"{layer}.affine.weight"] = torch.randn(inputs, STYLE)
            weights[f"{layer}.affine.bias"] = 1 + torch.randn(inputs)
            if name != "torgb":
                weights[f"{layer}.noise_const"] = torch.randn(resolution, resolution)
                weights[f"{layer}.noise_strength"] = torch.randn(())
                weights[f"{layer}.resample_filter"] = torch.outer(taps, taps)
        previous = width
    return weights


def dense(x, weights, name, rate=1.0):
    weight = weights[f"{name}.weight"]
    return F.linear(x, weight * rate / weight.shape[1] ** 0.5, weights[f"{name}.bias"] * rate)


def published_convolution(x, style, weights, name, up=False):
    """One image's layer: its own filters, of unit norm; up-sampling is zero insertion, convolution, then the FIR."""
    own = weights[f"{name}.weight"] * style[None, :, None, None]
    own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
    if up:
        channels, size = x.shape[0], x.shape[1]
        stuffed = x.new_zeros(channels, 2 * size - 1, 2 * size - 1)
        stuffed[:, ::2, ::2] = x
        # A true convolution of the stuffed image, over all places where anything overlaps.
        x = F.conv2d(stuffed[None], own.flip(2, 3), padding=2)[0]
        fir = weights[f"{name}.resample_filter"] * 4
        x = F.conv2d(F.pad(x, (1, 1, 1, 1))[:, None], fir.flip(0, 1)[None, None])[:, 0]
    else:
        x = F.conv2d(x[None], own, padding=1)[0]
    x = x + weights[f"{name}.noise_const"] * weights[f"{name}.noise_strength"]
    x = x + weights[f"{name}.bias"][:, None, None]
    return torch.where(x < 0, 0.2 * x, x) * 2**0.5


def published_images(weights, z, truncation=1.0):
    """Images in [-1, 1] from the formulas of the published network, one at a time."""
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for index in range(sum(name.startswith("mapping.fc") for name in weights) // 2):
        w = dense(w, weights, f"mapping.fc{index}", 0.01)
        w = torch.where(w < 0, 0.2 * w, w) * 2**0.5
    mean = weights["mapping.w_avg"]
    images = []
    for style_code in mean + truncation * (w - mean):
        x, image = weights["synthesis.b4.const"], None
        for resolution in WIDTHS:
            prefix = f"synthesis.b{resolution}"
            for name in ("conv0", "conv1"):
                if f"{prefix}.{name}.weight" in weights:
                    style = dense(style_code, weights, f"{prefix}.{name}.affine")
                    x = published_convolution(x, style, weights, f"{prefix}.{name}", up=name == "conv0")
            style = dense(style_code, weights, f"{prefix}.torgb.affine") / x.shape[0] ** 0.5
            painted = torch.einsum("oi,ihw->ohw", weights[f"{prefix}.torgb.weight"][:, :, 0, 0] * style, x)
            painted = painted + weights[f"{prefix}.torgb.bias"][:, None, None]
            if image is not None:
                fir = weights[f"{prefix}.resample_filter"].flip(0, 1)[None, None]
                stuffed = image.new_zeros(3, 1, resolution, resolution)
                stuffed[:, 0, ::2, ::2] = image
                painted = painted + 4 * F.conv2d(F.pad(stuffed, (2, 1, 2, 1)), fir)[:, 0]
            image = painted
        images.append(image)
    return torch.stack(images)


@pytest.mark.parametrize("truncation", [1.0, 0.6])
def test_paints_what_the_published_network_paints(truncation):
    weights = published_weights()
    generator, mean_style = import_generator(weights)
    z = torch.randn(2, LATENT)
    with torch.no_grad():
        styles = mean_style.lerp(generator.mapping(z), truncation)
        image = 2 * generator.synthesize(styles, noise="constant").image - 1
    torch.testing.assert_close(image, published_images(weights, z, truncation), rtol=0, atol=1e-4)


def test_returns_the_same_weights():
    weights = published_weights()
    generator, mean_style = import_generator(weights)
    returned = export_generator(generator, mean_style)
    assert returned.keys() == weights.keys()
    for name, value in returned.items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-8 if "filter" in name else 0)
        assert value.is_contiguous()


@pytest.mark.parametrize(("base", "size"), [(16384, 256), (32768, 1024), (16384, 16)])
def test_tells_the_sizes_of_published_networks(base, size):
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(channel_base=base, condition="none"), size)
        weights = export_generator(generator)
    weights = {name: value for name, value in weights.items() if not name.endswith("filter")}
    with torch.device("meta"):
        imported = import_generator(weights).generator
    assert [tuple(p.shape) for p in imported.parameters()] == [tuple(p.shape) for p in generator.parameters()]


def test_clamps_every_layer():
    weights = published_weights()
    z = torch.randn(2, LATENT)
    generator = import_generator(weights, clamp=0.25).generator
    image, features = generator(z, noise="constant")
    assert all(0.2 < x.abs().max() <= 0.25 for x in features)
    assert (2 * image - 1).abs().max() > 0.25  # a sum over resolutions


def test_reads_files_without_running_them(tmp_path):
    weights = published_weights()
    torch.save(weights, tmp_path / "generator.pt")
    save_file(weights, tmp_path / "generator.safetensors")
    for name in ("generator.pt", "generator.safetensors"):
        read = read_weights(tmp_path / name)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], weights[key]) for key in weights)


class Dangerous:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Dangerous()), pickle.dumps({"a": 1}), b"", b"text", None, "number"],
    ids=["code", "no tensors", "empty", "text", "missing", "a number"],
)
@pytest.mark.parametrize("suffix", ["pkl", "safetensors"])
def test_rejects_other_files(tmp_path, capsys, content, suffix):
    path = tmp_path / f"generator.{suffix}"
    if content == "number":
        torch.save(3.0, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(AvatarError, match=r"generator\.\w+: expected a state dict"):
        read_weights(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mapping.embed.weight": torch.zeros(3, 3)}, r"mapping\.embed\.weight: unknown"),
        ({"synthesis.b8.skip.weight": torch.zeros(12, 12, 1, 1)}, r"synthesis\.b8\.skip\.weight: unknown"),
        ({"synthesis.b8.conv0.weight": None}, r"synthesis\.b8\.conv0\.weight: missing, expected shape"),
        ({"mapping.w_avg": torch.zeros(3)}, r"mapping\.w_avg: got shape \(3,\), expected \(10,\)"),
        ({"mapping.fc0.weight": None}, r"mapping\.fc0\.weight: expected a tensor of 2 dimensions"),
        ({"synthesis.b8.resample_filter": torch.ones(4, 4)}, r"resample_filter: expected the filter"),
        ({"synthesis.b16.conv1.weight": torch.zeros(5, 5, 3, 3)}, r"b16\.conv1\.weight: got 5 outputs"),
        ({"synthesis.b64.const": torch.zeros(1)}, r"conv1\.weight: expected a tensor of 4"),
        ({"synthesis.b24.const": torch.zeros(1)}, r"got resolutions \[4, 8, 16, 24, 32\]"),
    ],
)
def test_rejects_other_networks(changes, message):
    weights = published_weights() | changes
    with pytest.raises(AvatarError, match=message):
        import_generator({name: value for name, value in weights.items() if value is not None})


def test_exports_unconditioned_generators_alone():
    config = GeneratorConfig(channel_base=64, channel_max=8, latent_size=4, style_size=4, mapping_layers=1)
    with pytest.raises(AvatarError, match="generator: expected one without condition"):
        export_generator(Generator(config, 16))
