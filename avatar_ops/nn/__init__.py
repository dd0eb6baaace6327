"""Modules on the ops."""

from .modulated_conv2d import ModulatedConv2d

__all__ = ["ModulatedConv2d"]
