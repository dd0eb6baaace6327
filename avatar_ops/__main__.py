"""python -m avatar_ops: what is built, and what would run on this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import avatar_ops
from avatar_ops import _native
from avatar_ops._library import HAS_CUDA_KERNELS, NAMESPACE, TRITON_KERNELS

DEVICES = ("CPU", "CUDA")


def kernel_of(op: str, device: str) -> str:
    """What runs when `op` is called on `device`: 'C++', 'CUDA', 'Triton', 'torch ops' or '-' for nothing."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if has_kernel(op, device):
        if device == "CPU":
            return f"C++ ({_native.isa()})"
        return "Triton" if op.removeprefix(f"{NAMESPACE}::") in TRITON_KERNELS else "CUDA"
    composed = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
    return "torch ops" if any(has_kernel(op, key) for key in composed) else "-"


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    architectures = _native.cuda_architectures
    if not architectures:
        cuda = "not built"
    elif HAS_CUDA_KERNELS:
        cuda = f"built for {architectures}, loaded"
    else:
        cuda = f"built for {architectures}, not loaded (torch has no CUDA, or the library is missing)"
    count = torch.cuda.device_count()
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)]
    chosen = " (AVATAR_OPS_ISA)" if os.environ.get("AVATAR_OPS_ISA") else ""
    lines = [
        f"avatar_ops        {avatar_ops.__version__}",
        f"torch             {torch.__version__}",
        f"compiler          {_native.compiler}",
        f"processor         {platform.machine()}, {torch.get_num_threads()} threads",
        f"instruction set   {_native.isa()}{chosen}; available: {', '.join(_native.available_isas())}",
        f"CUDA kernels      {cuda}",
        f"triton            {triton_version()}",
        f"devices           {', '.join(['cpu', *devices])}",
        "",
    ]
    names = sorted(
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")
    )
    width = max(map(len, names)) - len(NAMESPACE) - 2
    lines.append(f"{'op':<{width}}  " + "  ".join(f"{device:<14}" for device in DEVICES).rstrip())
    for name in names:
        kernels = "  ".join(f"{kernel_of(name, device):<14}" for device in DEVICES)
        lines.append(f"{name.removeprefix(NAMESPACE + '::'):<{width}}  {kernels}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
