"""modulated_conv2d against the grouped and the scaled form, eager and compiled."""

import pytest
import torch
from peers_modulated_conv2d import modulated_conv2d_peers

import avatar_ops

BATCH = 4
# Channels in and out, size of the input.
LAYERS = [(512, 512, 16), (512, 512, 32), (256, 256, 64), (128, 128, 128), (64, 64, 256)]


def layer_tensors(channels, outputs, size, size_out, dtype=torch.float32):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype) / 8
    return (
        torch.randn(BATCH, channels, size, size, dtype=dtype),
        torch.randn(outputs, channels, 3, 3, dtype=dtype),
        torch.randn(BATCH, channels, dtype=dtype) + 1,
        torch.randn(BATCH, 1, size_out, size_out, dtype=dtype),
        torch.randn(outputs, dtype=dtype),
        torch.outer(taps, taps),
    )


def flipped(tensors):
    """The op correlates in its up-sampling too, the peers' transposed convolution convolves."""
    x, weight, *rest = tensors
    return (x, weight.flip(2, 3), *rest)


def ours(x, weight, styles, noise, bias, f, **options):
    # Without resample_filter it is the peers' f.
    return avatar_ops.modulated_conv2d(
        x, weight, styles, noise=noise, bias=bias, activation="lrelu", **options
    )


def forward(layer, tensors):
    with torch.no_grad():
        return layer(*tensors)


def forward_backward(layer, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors[:5]]
    y = layer(*leaves, tensors[5])
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


def run_case(compare, name, run, tensors, **options):
    own_tensors = flipped(tensors) if options.get("up") == 2 else tensors
    compare(
        name,
        ours=lambda: run(lambda *t: ours(*t, **options), own_tensors),
        peers=modulated_conv2d_peers(run, *tensors, **options),
        memory=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "outputs", "size"), LAYERS)
def test_modulated_conv2d_forward(compare, channels, outputs, size, dtype):
    tensors = layer_tensors(channels, outputs, size, size, dtype)
    kind = str(dtype).removeprefix("torch.")
    run_case(compare, f"modulated_conv2d {channels}@{size} B={BATCH} {kind}", forward, tensors)


@pytest.mark.parametrize(("channels", "outputs", "size"), LAYERS)
def test_modulated_conv2d_forward_backward(compare, channels, outputs, size):
    tensors = layer_tensors(channels, outputs, size, size)
    run_case(compare, f"modulated_conv2d {channels}@{size} B={BATCH} + backward", forward_backward, tensors)


@pytest.mark.parametrize(("run", "suffix"), [(forward, ""), (forward_backward, " + backward")])
def test_modulated_conv2d_up(compare, run, suffix):
    tensors = layer_tensors(256, 128, 64, 128)
    run_case(compare, f"modulated_conv2d 256@64 -> 128@128 B={BATCH}{suffix}", run, tensors, up=2)


@pytest.mark.parametrize(("run", "suffix"), [(forward, ""), (forward_backward, " + backward")])
def test_modulated_conv2d_down(compare, run, suffix):
    tensors = layer_tensors(128, 256, 128, 64)
    run_case(compare, f"modulated_conv2d 128@128 -> 256@64 B={BATCH}{suffix}", run, tensors, down=2)
