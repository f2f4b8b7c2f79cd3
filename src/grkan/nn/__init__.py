"""Layers: the rational function alone, in front of a linear layer, and in a transformer's MLP."""

from .grkan import GRKAN
from .init import variance_gain
from .linear import RationalLinear
from .parameters import no_weight_decay, param_groups
from .rational import GroupRational

__all__ = ["GRKAN", "GroupRational", "RationalLinear", "no_weight_decay", "param_groups", "variance_gain"]
