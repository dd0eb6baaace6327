"""Custom kernels for point clouds and style-based generators, as torch ops."""

from importlib.metadata import PackageNotFoundError, version

from .composite_points import composite_points
from .edge_max import edge_max
from .rasterize_points import Fragments, rasterize_points

try:
    __version__ = version("avatar-ops")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["Fragments", "composite_points", "edge_max", "rasterize_points"]
