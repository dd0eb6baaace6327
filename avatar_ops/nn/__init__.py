"""Modules with parameters, built on the ops."""

from .edge_conv import EdgeConv
from .modulated_conv2d import ModulatedConv2d

__all__ = ["EdgeConv", "ModulatedConv2d"]
