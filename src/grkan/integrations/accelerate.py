"""Support for Accelerate, which loads a checkpoint tensor by tensor and knows only parameters and buffers."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..nn import GroupRational
from .imports import put_around


def know_extra_state(modeling: ModuleType) -> None:
    """Let `load_checkpoint_and_dispatch` read the extra state of rational functions, on which it would fail."""
    put_around(modeling, "set_module_tensor_to_device", _placing)


def _placing(place: Callable[..., Any]) -> Callable[..., Any]:
    def set_module_tensor_to_device(
        module: nn.Module, tensor_name: str, device: Any, value: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        owner, _, name = tensor_name.rpartition(".")
        if name != "_extra_state" or not isinstance(part := module.get_submodule(owner), GroupRational):
            place(module, tensor_name, device, value, *args, **kwargs)
        elif value is not None:
            part.set_extra_state(value)

    return set_module_tensor_to_device
