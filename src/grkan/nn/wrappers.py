"""Wrappers that other libraries put around a model: parallelism, compilation, averages of the weights."""

from typing import Any

from torch import nn

from ..errors import GrkanValueError
from .init import is_sharded

# The class of a wrapper -> the attribute that holds the model. Names, so that none of their libraries is imported.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "_FabricModule": "module",  # Lightning Fabric's
}

# These wrappers do not depend on the parameters that the model had when it was wrapped.
_OPEN = ("OptimizedModule", "DataParallel")

_NAMES_OF_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside any number of wrappers."""
    while (kind := _kind(model)) is not None:
        model = getattr(model, _WRAPPERS[kind])
    return model


def unwrap_to_change(model: nn.Module) -> nn.Module:
    """Return the model inside any number of wrappers, in order to change its parameters.

    Raises:
        ValueError: a wrapper, or FSDP2, keeps a list of the parameters.
    """
    inner: Any = model
    while (kind := _kind(inner)) is not None:
        if kind not in _OPEN:
            raise GrkanValueError(
                f"model must be converted before it is wrapped, because {kind} keeps a list of the parameters; convert "
                f"the module inside, .{_WRAPPERS[kind]}, and wrap it again"
            )
        inner = getattr(inner, _WRAPPERS[kind])
    for name, module in inner.named_modules():
        if (kind := _kind(module)) is not None and kind not in _OPEN:
            raise GrkanValueError(
                "model must be converted before its modules are wrapped, because "
                f"{kind} keeps a list of the parameters; "
                f"{name} is wrapped"
            )
    if sharded := [name for name, parameter in inner.named_parameters() if is_sharded(parameter)]:
        raise GrkanValueError(f"model must be converted before it is sharded; its {sharded[0]} is a DTensor")
    return inner


def plain_name(name: str) -> str:
    """Remove from the name of a module or parameter those of wrappers around its parts (compiled, checkpointed)."""
    return ".".join(part for part in name.split(".") if part not in _NAMES_OF_WRAPPERS)


def _kind(model: nn.Module) -> str | None:
    names = (kind.__name__ for kind in type(model).__mro__)
    return next((name for name in names if name in _WRAPPERS), None)
