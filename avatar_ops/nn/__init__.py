"""Modules with parameters, built on the ops."""

from .edge_conv import EdgeConv
from .local_feature_aggregation import LocalFeatureAggregation
from .modulated_conv2d import ModulatedConv2d

__all__ = ["EdgeConv", "LocalFeatureAggregation", "ModulatedConv2d"]
