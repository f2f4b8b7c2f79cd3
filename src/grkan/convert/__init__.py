"""A pretrained transformer becomes a KAT that computes the same.

`structure` finds the MLPs, `calibrate` fits functions to what reaches them, `convert` puts both together, and
`grkan.models.conversion` changes the modules.
"""

from ..models.conversion import apply_conversion_
from .convert import convert_
from .report import ConversionReport

__all__ = ["ConversionReport", "apply_conversion_", "convert_"]
