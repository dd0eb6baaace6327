"""What launchers of Triton kernels would start, found without a GPU, and what compilers make of it."""

from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
from triton_compile import Compiled, Launch, compile_launch, recorder

# Bytes of shared memory that a block may have, by compute capability.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def launches(call) -> list[Launch]:
    """What `call` would launch. Tensors that it makes have no data."""
    started = []
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(JITFunction, "run", recorder(started))
        call()
    return started


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch's kernel for a compute capability (80, 90, 100), trusting no cache on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_ALWAYS_COMPILE", "1")
        return compile_launch(launch, capability)
