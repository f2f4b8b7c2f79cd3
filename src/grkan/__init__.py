"""grkan: the Kolmogorov-Arnold Transformer as a library."""

from ._version import __version__
from .rational.op import group_rational, rational_linear, set_backend

__all__ = ["__version__", "group_rational", "rational_linear", "set_backend"]
