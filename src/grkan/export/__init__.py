"""Export a KAT to copies and files that run without grkan."""

import sys
from types import ModuleType

from .door import FORMATS, export
from .plain import plain

__all__ = ["FORMATS", "export", "plain"]


class _Room(ModuleType):
    """Make this package callable, because importing `grkan.export` puts it in place of the function of that name."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _Room
