"""A KAT leaves Python: copies and files that need nothing of grkan to run."""

import sys
from types import ModuleType

from .door import FORMATS, export
from .plain import plain

__all__ = ["FORMATS", "export", "plain"]


class _Room(ModuleType):
    """An import of `grkan.export` puts this package where the function of that name was: so it can be called, too."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _Room
