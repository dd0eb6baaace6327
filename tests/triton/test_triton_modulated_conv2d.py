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


def layer_launches(name, dtype, precision="ieee", wide=False):
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


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize(
    ("layer", "dtype", "precision"),
    [
        ("low", torch.bfloat16, "ieee"),
        ("middle", torch.float16, "ieee"),
        ("middle", torch.float32, "tf32"),
        ("middle", torch.float32, "ieee"),
        ("up", torch.bfloat16, "ieee"),
        ("down", torch.bfloat16, "ieee"),
        ("rgb", torch.bfloat16, "ieee"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_compiles_without_spills(layer, dtype, precision, capability):
    for launch in layer_launches(layer, dtype, precision):
        compiled = compile_for(launch, capability)
        assert compiled.local_accesses == 0, launch.name
        assert compiled.shared_bytes <= SHARED_BYTES[capability]
        if launch.name in ("convolve_kernel", "pointwise_kernel"):
            on_matrix_units = dtype != torch.float32 or precision == "tf32"
            assert bool(compiled.matrix_instructions) == on_matrix_units


def test_compiles_with_64_bit_indices():
    for launch in layer_launches("up", torch.bfloat16, wide=True):
        assert compile_for(launch, 90).local_accesses == 0, launch.name


@pytest.mark.parametrize("layer", ["one", "one-up"])
def test_compiles_with_sizes_that_become_constants(layer):
    for launch in layer_launches(layer, torch.float16):
        compile_for(launch, 80)


def test_product_precision_follows_the_switch_of_torch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            assert launcher.product_precision(torch.float32) == precision
            assert launcher.product_precision(torch.float64) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_launches_what_each_layer_needs():
    def names(layer):
        return [launch.name.removesuffix("_kernel") for launch in layer_launches(layer, torch.half)]

    assert names("low") == ["prepare", "modulate", "convolve", "finish"]
    assert names("middle") == names("down") == ["prepare", "modulate", "convolve"]
    assert names("up") == ["prepare", "modulate", "convolve", "finish"]
    assert names("rgb") == ["prepare", "pointwise"]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_small_images_split_their_sums(itemsize):
    def choose(pixels):
        return launcher.choose_tile(itemsize, "ieee", pixels, 512, 512, 9, 1, 132)

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
    x, weight, styles = torch.randn(2, 20, 4, 6), torch.randn(5, 20, k, k), torch.randn(2, 20)
    options = (f if up * down == 2 else None, None, torch.randn(5), True, up, down, padding, 0.2, 1.4, 1.0)

    def run(wide_from, processors):
        launcher.WIDE_FROM, launcher.processors = wide_from, lambda device: processors
        return launcher.modulated_conv2d(x, weight, styles, *options, 1e-8, True)

    for wide, narrow, split in zip(run(0, 1), run(2**31, 1), run(2**31, 64)):
        assert torch.equal(wide, narrow)
        torch.testing.assert_close(split, narrow)
"""


def test_64_bit_indices_and_split_sums_give_the_same_result():
    """In triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", VARIANTS], cwd=ROOT, env=environment, check=True)
