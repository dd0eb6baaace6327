"""modulated_conv2d's Triton kernels: what the launcher chooses, and what compilers make of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="comes with torch's CUDA builds")
from ahead_of_time import SHARED_BYTES, compile_for, launches

from avatar_ops.triton import modulated_conv2d as launcher

ROOT = Path(__file__).resolve().parents[2]
# (B, I, H, W), O, k and resampling of layers of StyleGAN2 at 512 pixels.
LAYERS = {
    "low": ((4, 512, 16, 16), 512, 3, {}),
    "middle": ((4, 512, 64, 64), 512, 3, {}),
    "up": ((4, 512, 32, 32), 256, 3, {"up": 2}),
    "down": ((4, 64, 256, 256), 128, 3, {"down": 2}),
    "rgb": ((4, 64, 512, 512), 3, 1, {}),
    "one": ((1, 1, 1, 1), 1, 3, {}),
    "one-up": ((1, 1, 1, 1), 1, 1, {"up": 2}),
}


def layer_launches(name, dtype, precision="tf32", wide=False):
    shape, outputs, k, options = LAYERS[name]
    up, down = options.get("up", 1), options.get("down", 1)
    rgb = k == 1

    def call():
        x = torch.empty(shape, dtype=dtype)
        weight = torch.empty(outputs, shape[1], k, k, dtype=dtype)
        styles = torch.empty(shape[:2], dtype=dtype)
        f = torch.empty(4) if up * down == 2 else None
        size = [length * up // down for length in shape[2:]]
        noise = None if rgb else torch.empty(1, 1, *size, dtype=dtype)
        bias = torch.empty(outputs, dtype=dtype)
        slope, gain = (1.0, 1.0) if rgb else (0.2, 2**0.5)
        launcher.modulated_conv2d(
            x, weight, styles, f, noise, bias, not rgb, up, down, k // 2, slope, gain, 256.0, 1e-8, False
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "processors", lambda device: 132)
        patch.setattr(launcher, "product_precision", lambda dtype: precision)
        if wide:
            patch.setattr(launcher, "WIDE_FROM", 0)
        return launches(call)


# A layer with its dtype and precision, and the architectures to compile it for unless --every-triton-shape asks
# for all: each kernel, precision and architecture once, and what needs most registers.
COMPILED = {
    ("low", torch.bfloat16, "tf32"): {90},
    ("middle", torch.float16, "tf32"): {80},
    ("middle", torch.bfloat16, "tf32"): set(),
    ("middle", torch.float32, "tf32"): set(),
    ("middle", torch.float32, "tf32x3"): {90},
    ("up", torch.bfloat16, "tf32"): {100},
    ("up", torch.float32, "tf32x3"): {80},
    ("down", torch.float32, "tf32"): {100},
    ("rgb", torch.bfloat16, "tf32"): {90},
    ("rgb", torch.float32, "tf32x3"): {80},
}


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("layer", COMPILED, ids=lambda layer: "-".join(map(str, layer)).replace("torch.", ""))
def test_compiles_without_spills_and_uses_matrix_units(layer, capability, pytestconfig):
    if capability not in COMPILED[layer] and not pytestconfig.getoption("every_triton_shape"):
        pytest.skip("asked for by --every-triton-shape")
    for launch in layer_launches(*layer):
        compiled = compile_for(launch, capability)
        assert compiled.local_accesses == 0, (launch.name, compiled)
        assert compiled.shared_bytes <= SHARED_BYTES[capability], (launch.name, compiled)
        if launch.name in ("convolve_kernel", "pointwise_kernel"):
            assert compiled.matrix_instructions, (launch.name, compiled)


def test_compiles_with_64_bit_indices():
    for launch in layer_launches("up", torch.bfloat16, wide=True):
        assert compile_for(launch, 90).local_accesses == 0, launch.name


@pytest.mark.parametrize("layer", ["one", "one-up"])
def test_compiles_with_sizes_that_become_constants(layer):
    for launch in layer_launches(layer, torch.float16):
        compile_for(launch, 80)


def test_product_precision_follows_the_switch_of_torch():
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        for switch, expected in (("ieee", "tf32x3"), ("tf32", "tf32")):
            convolutions.fp32_precision = switch
            assert launcher.product_precision(torch.float32) == expected
    finally:
        convolutions.fp32_precision = before


def test_launches_what_each_layer_needs():
    def names(layer):
        return [launch.name.removesuffix("_kernel") for launch in layer_launches(layer, torch.half)]

    assert names("low") == ["prepare", "modulate", "convolve", "finish"]
    assert names("middle") == names("down") == ["prepare", "modulate", "convolve"]
    assert names("up") == ["prepare", "modulate", "convolve", "finish"]
    assert names("rgb") == ["prepare", "pointwise"]


@pytest.mark.parametrize("itemsize", [2, 4])
def test_small_images_split_their_sums(itemsize):
    def choose(pixels):
        return launcher.choose_tile(itemsize, "tf32", pixels, 512, 512, 9, 1, 132)

    assert choose(4 * 4).splits > 1
    assert choose(512 * 512).splits == 1
    assert choose(4 * 4).pixels == 16
    assert choose(512 * 512).pixels > 16


VARIANTS = """
import torch
from avatar_ops.triton import modulated_conv2d as launcher

torch.manual_seed(0)
f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
for k, up, down, padding in ((3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 1), (1, 1, 1, 0)):
    x, weight, styles = torch.randn(2, 20, 5, 6), torch.randn(5, 20, k, k), torch.randn(2, 20)
    rows, columns = (size * up // down for size in x.shape[2:])
    noise, bias = torch.randn(2, 1, rows, columns), torch.randn(5)
    tensors = (x, weight, styles, f if up * down == 2 else None, noise, bias)

    def run(wide_from, processors, change=lambda t: t):
        launcher.WIDE_FROM, launcher.processors = wide_from, lambda device: processors
        changed = [t if t is None else change(t) for t in tensors]
        return launcher.modulated_conv2d(*changed, True, up, down, padding, 0.2, 1.4, 1.0, 1e-8, True)

    def restride(t):
        return t.contiguous(memory_format=torch.channels_last) if t is x else torch.stack([t, t], -1)[..., 0]

    expected = run(2**31, 1)
    assert all(map(torch.equal, run(0, 1, restride), expected))
    for split, whole in zip(run(2**31, 64), expected):
        torch.testing.assert_close(split, whole)
"""


def test_64_bit_indices_strides_and_split_sums_give_the_same_result():
    """In triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", VARIANTS], cwd=ROOT, env=environment, check=True)
