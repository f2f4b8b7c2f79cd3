"""Keep Liger's kernels from replacing the rational functions of a converted model."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import GrkanValueError
from ..nn import GroupRational
from .imports import put_around

_OF_MLPS = ("swiglu", "geglu")
"""Liger's options for kernels that compute an MLP with its original activation."""


def know_kernels(monkey_patch: ModuleType) -> None:
    """Let Liger patch a converted model, as Trainer does with use_liger_kernel=True, but not its MLPs."""
    put_around(monkey_patch, "_apply_liger_kernel_to_instance", _applying)
    put_around(monkey_patch, "_bind_method_to_module", _binding)


def _applying(apply: Callable[..., None]) -> Callable[..., None]:
    def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> None:
        if any(isinstance(module, GroupRational) for module in model.modules()):
            kwargs = {**dict.fromkeys(_OF_MLPS, False), **kwargs}
        apply(model, **kwargs)

    return _apply_liger_kernel_to_instance


def _binding(bind: Callable[..., None]) -> Callable[..., None]:
    def _bind_method_to_module(module: nn.Module, method_name: str, new_method: Callable[..., Any]) -> None:
        if method_name == "forward" and any(isinstance(child, GroupRational) for child in module.children()):
            raise GrkanValueError(
                f"a {type(module).__name__} must keep its forward, which calls a rational function; Liger's would "
                "compute the original activation. Pass swiglu=False and geglu=False to Liger"
            )
        bind(module, method_name, new_method)

    return _bind_method_to_module
