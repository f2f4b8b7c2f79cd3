"""Tests for modules: whether one counts as a linear layer, and whether calling it runs only its forward."""

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

ORIGINAL_FORWARDS: dict[type, Any] = {nn.Linear: nn.Linear.forward}
"""The forward of classes when grkan was imported. Some tools replace that of nn.Linear."""

_ORIGINAL_CALL: Any = nn.Module.__call__
_ORIGINAL_CALL_IMPL: Any = nn.Module._call_impl
"""What a call of any module runs first. Tools that record or change calls replace them, of all modules or one class."""


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' Conv1D, GPT-2's linear layer, whose weight is (inputs, outputs)."""
    return _conv1d(module) is not None


def _conv1d(module: Any) -> type | None:
    named = (kind for kind in type(module).__mro__ if kind.__name__ == "Conv1D")
    return next((kind for kind in named if kind.__module__.startswith("transformers.")), None)


def linear_kind(module: Any) -> str | None:
    """Return the kind of a linear layer: "linear", "conv1d" (GPT-2's), or None for any other module.

    A subclass with a forward of its own (quantised, with adapters), an instance with one (Accelerate's offloading) and
    a parametrised layer compute something else, so they give None.
    """
    if not isinstance(module, nn.Module) or "forward" in vars(module) or hasattr(module, "parametrizations"):
        return None
    forward = type(module).forward
    if forward in (nn.Linear.forward, ORIGINAL_FORWARDS[nn.Linear]):
        return "linear"
    conv1d: Any = _conv1d(module)
    return "conv1d" if conv1d is not None and forward is conv1d.forward else None


def linear_width(module: Any) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer or a 1x1 convolution of any class; None for anything else."""
    if is_conv1d(module):
        return tuple(module.weight.shape)
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == (1, 1) == module.stride and module.padding == (0, 0) and module.groups == 1
        return (module.in_channels, module.out_channels) if plain else None
    width = getattr(module, "in_features", None), getattr(module, "out_features", None)
    is_layer = isinstance(module, nn.Module) and all(isinstance(number, int) for number in width)
    return width if is_layer else None  # type: ignore[return-value]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else.

    False for a subclass or a replacement (adapters, quantisation, parametrisations, FSDP); for a module with a hook,
    its own or a global one (pruning, feature extraction, tensor parallelism, profilers); and for an instance with a
    forward of its own (Accelerate's offloading), or a class that got another one, or another call, since grkan was
    imported.
    """
    if kind.forward is not ORIGINAL_FORWARDS.get(kind, kind.forward):
        return False
    if kind.__call__ is not _ORIGINAL_CALL or kind._call_impl is not _ORIGINAL_CALL_IMPL:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not (hooks or _has_any_global_hook()) and "forward" not in module.__dict__
