"""Keep timm's initialisers from replacing the starts of marked layers, see `grkan.nn.init.keep_start`."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..nn.init import starts_kept
from .imports import put_around


def know_named_apply(manipulate: ModuleType) -> None:
    """Make `named_apply`, with which timm initialises models, keep the starts of marked layers."""
    original = manipulate.named_apply
    put_around(manipulate, "named_apply", _keeping)
    for name, module in list(sys.modules.items()):
        # Modules imported earlier hold their own reference to the function.
        if name.startswith("timm.") and vars(module).get("named_apply") is original:
            vars(module)["named_apply"] = manipulate.named_apply


def _keeping(apply: Callable[..., Any]) -> Callable[..., Any]:
    def named_apply(fn: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        with starts_kept(module):
            return apply(fn, module, *args, **kwargs)

    return named_apply
