"""Layers: the rational function as a module, in front of a linear layer, and as a transformer's MLP."""

from .grkan import GRKAN
from .init import variance_gain
from .rational import GroupRational, RationalConv1D, RationalLinear, no_weight_decay

__all__ = ["GRKAN", "GroupRational", "RationalConv1D", "RationalLinear", "no_weight_decay", "variance_gain"]
