"""Custom kernels for point clouds and style-based generators, as torch ops."""

from importlib.metadata import PackageNotFoundError, version

from . import nn
from ._library import release_memory
from .bias_act import bias_act
from .composite_points import composite_points
from .edge_conv import edge_conv
from .edge_max import edge_max
from .edge_moments import edge_moments
from .knn import KNN, PointIndex, knn, knn_graph
from .local_attention_pool import local_attention_pool
from .modulated_conv2d import modulated_conv2d
from .random_sample import random_sample
from .rasterize_points import Fragments, rasterize_points
from .upfirdn2d import upfirdn2d

try:
    __version__ = version("avatar-ops")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "Fragments",
    "KNN",
    "PointIndex",
    "bias_act",
    "composite_points",
    "edge_conv",
    "edge_max",
    "edge_moments",
    "knn",
    "knn_graph",
    "local_attention_pool",
    "modulated_conv2d",
    "nn",
    "random_sample",
    "rasterize_points",
    "release_memory",
    "upfirdn2d",
]
