"""A pretrained transformer becomes a KAT that computes the same.

`structure` finds the MLPs, `calibrate` fits functions to what reaches them, `convert` puts both together, and `recipe`
changes the modules. A recipe, a conversion as data, is applied without SciPy and without timm; what needs them loads
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .recipe import apply_conversion_

if TYPE_CHECKING:
    from .convert import convert_
    from .report import ConversionReport

_LAZY = {"ConversionReport": ".report", "convert_": ".convert"}

__all__ = ["ConversionReport", "apply_conversion_", "convert_"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value
