"""Turn a pretrained transformer into a KAT that computes the same function.

`structure` finds the MLPs, `calibrate` fits functions to their inputs, `convert` combines both, and `recipe` changes
the modules. A recipe is a conversion as data. Applying one needs neither SciPy nor timm: the modules that need them are
loaded on first use.
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
