"""A KAT leaves Python: copies and files that need nothing of grkan to run."""

from .plain import plain

__all__ = ["plain"]
