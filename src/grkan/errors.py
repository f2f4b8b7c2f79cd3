"""The errors that grkan raises for a caller's mistake.

Each is also the built-in error that Python programmers expect: `except ValueError` catches a `GrkanValueError`. Any
other error is a bug, of grkan or of a library, and keeps its traceback even on the command line. Problems with files
stay the OSErrors that Python raises.
"""

from collections.abc import Sequence

_SHOWN = 3


class GrkanError(Exception):
    """A mistake of the caller; the message names the argument, the value, and what would be right."""


class GrkanValueError(GrkanError, ValueError):
    """A wrong value or shape."""


class GrkanTypeError(GrkanError, TypeError):
    """A wrong type or dtype."""


class GrkanRuntimeError(GrkanError, RuntimeError):
    """Something that was requested is not available here, such as a compiled kernel."""


class GrkanImportError(GrkanError, ImportError):
    """A package that an optional part of grkan needs is missing."""


def first_of(problems: Sequence[str]) -> str:
    """Return the first problems, or names, for a message that is still readable, and the number of the others."""
    others = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f", and {others} more" if others > 0 else "")
