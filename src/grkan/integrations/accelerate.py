"""Support for Accelerate, which loads a state dict tensor by tensor and knows only parameters and buffers."""

from collections.abc import Callable
from contextlib import ExitStack
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


def know_sharded_loading(fsdp_utils: ModuleType) -> None:
    """Let Accelerate load a model sharded by FSDP2 from its first process (`cpu_ram_efficient_loading`)."""
    put_around(fsdp_utils, "fsdp2_load_full_state_dict", _scattering)


def _scattering(load: Callable[..., Any]) -> Callable[..., Any]:
    def fsdp2_load_full_state_dict(accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # It takes every entry for a sharded tensor. The model is the same in all processes, so nothing needs a check.
        named = model.named_modules(remove_duplicate=False)
        extra = {f"{name}._extra_state".lstrip(".") for name, module in named if isinstance(module, GroupRational)}

        def leave_out(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
            for key in extra & state.keys():
                del state[key]

        def not_missing(_: nn.Module, keys: Any) -> None:
            keys.missing_keys[:] = [key for key in keys.missing_keys if key not in extra]

        with ExitStack() as stack:
            if extra:
                stack.callback(model.register_state_dict_post_hook(leave_out).remove)
                stack.callback(model.register_load_state_dict_post_hook(not_missing).remove)
            return load(accelerator, model, *args, **kwargs)

    return fsdp2_load_full_state_dict
