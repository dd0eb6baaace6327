"""Custom kernels for point clouds and style-based generators, as torch ops."""

from importlib.metadata import PackageNotFoundError, version

from .edge_max import edge_max

try:
    __version__ = version("avatar-ops")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["edge_max"]
