"""bias_act against the eager composition and torch.compile of it."""

import pytest
import torch
import torch.nn.functional as F

import avatar_ops


def ours(x, bias, clamp):
    return avatar_ops.bias_act(x, bias, activation="lrelu", clamp=clamp)


def composed(x, bias, clamp):
    y = F.leaky_relu(x + bias.view(1, -1, *[1] * (x.dim() - 2)), 0.2) * 2**0.5
    return y if clamp is None else y.clamp(-clamp, clamp)


def forward(function, x, bias, clamp):
    with torch.no_grad():
        return function(x, bias, clamp)


def forward_backward(function, x, bias, clamp):
    leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
    y = function(*leaves, clamp)
    return torch.autograd.grad(y, leaves, y.detach())


@pytest.mark.parametrize("clamp", [None, 256.0])
@pytest.mark.parametrize(("run", "suffix"), [(forward, ""), (forward_backward, " + backward")])
@pytest.mark.parametrize("shape", [(4, 512, 16, 16), (4, 128, 128, 128), (65536, 32)], ids=str)
def test_bias_act(compare, shape, run, suffix, clamp):
    x, bias = torch.randn(shape), torch.randn(shape[1])
    compiled = torch.compile(composed, dynamic=False)
    compare(
        f"bias_act {' x '.join(map(str, shape))}{' clamp' if clamp else ''}{suffix}",
        ours=lambda: run(ours, x, bias, clamp),
        peers={
            "torch eager": lambda: run(composed, x, bias, clamp),
            "torch.compile": lambda: run(compiled, x, bias, clamp),
        },
        memory=True,
    )
