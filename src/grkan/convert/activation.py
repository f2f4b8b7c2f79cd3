"""Recognise an activation: any function that maps each scalar independently, which is tested numerically."""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..nn import GroupRational
from ..rational import table

# The most modules that an activation may consist of. StarReLU, for example, has several.
_MOST_PARTS = 8


@dataclass
class Activation:
    """An elementwise function."""

    name: str
    """The name that `grkan.fit` has for the function, or else the name of its class."""
    function: Callable[[Tensor], Tensor]
    """A pure function of float64 tensors on the CPU."""
    channels: tuple[Callable[[Tensor], Tensor], ...] = ()
    """One function per channel, if the channels have their own parameters."""

    def of_group(self, group: int, groups: int) -> "Activation":
        """Return the function of one group. All channels of a group share it."""
        return replace(self, function=self.channels[group * len(self.channels) // groups]) if self.channels else self

    def alike(self, groups: int) -> bool:
        """Return whether all channels of each group have the same function."""
        if not self.channels:
            return True
        if len(self.channels) % groups:
            return False
        x = torch.linspace(-6.0, 6.0, 25, dtype=torch.float64, device="cpu")
        y = torch.stack([function(x) for function in self.channels]).reshape(groups, -1, len(x))
        return bool(((y - y[:, :1]).abs() <= 1e-3 * y.abs().amax((1, 2), keepdim=True)).all())


class Called(nn.Module):
    """A child module that wraps a function called in `forward`."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function: Any = function

    def forward(self, x: Tensor) -> Any:
        """Call the function."""
        return self.function(x)


def as_activation(candidate: Any, owner: nn.Module | None = None) -> Activation | None:
    """Return the activation that `candidate` computes, or None if it is not one.

    The candidate is tried on a few numbers. It must map each number independently, also in training, and must not be a
    straight line. Its backward must give its slope, unlike that of a straight-through estimator. A module may have
    parameters: each either a single number or one number per channel.

    Args:
        owner: the module that holds the candidate, if that is a function: it may ask for its mode.
    """
    channels: tuple[Callable[[Tensor], Tensor], ...] = ()
    if isinstance(candidate, nn.Module):
        label = type(candidate).__name__
        if any(True for _ in candidate.children()) or candidate._parameters or candidate._buffers:
            if (parts := _of_parameters(candidate)) is None:
                return None
            candidate, channels = parts
        run = candidate.forward
        held = (value for part in candidate.modules() for value in vars(part).values() if callable(value))
        if not isinstance(candidate, Called) and any(map(reaches_tensor, held)):
            return None
    else:
        run, label = candidate, getattr(candidate, "__name__", type(candidate).__name__)

    def function(x: Tensor) -> Tensor:
        return run(x.clone())

    whole = candidate if isinstance(candidate, nn.Module) else owner
    modes = {} if whole is None else {module: module.training for module in whole.modules()}
    try:
        _set_modes(modes, False)
        with torch.no_grad(), torch.random.fork_rng([]):
            x = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64, device="cpu")
            y = function(x)
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
                return None
            if torch.allclose(y.diff(n=2), torch.zeros(1, dtype=y.dtype), atol=1e-9):  # a scale, or the identity
                return None
            if modes:
                _set_modes(modes, True)
                if not torch.equal(function(x), y):  # it has dropout, or another random part
                    return None
                _set_modes(modes, False)
            square = function(x[:96].flip(0).reshape(2, 3, 4, 4))
            if square.shape != (2, 3, 4, 4) or not torch.allclose(square.flatten(), y[:96].flip(0), 1e-9, 1e-12):
                return None
            if not _has_its_slope(function, x):
                return None
            name = next((n for n in table.NAMES if torch.allclose(table.exact(n)(x), y, 1e-7, 1e-9)), label)
    except Exception:  # it needs a different input, or more than one tensor
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Activation(name, function, channels)


def _set_modes(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


def _has_its_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Return whether the gradient that autograd gives for a function is its slope; also True if there is none."""
    try:
        with torch.enable_grad():
            z = x.clone().requires_grad_()
            y = function(z)
            if not y.requires_grad:
                return True
            (gradient,) = torch.autograd.grad(y.sum(), z)
    except Exception:  # a function for inference alone
        return True
    step = 1e-3
    slope = (function(x + step) - function(x - step)) / (2 * step)
    same = torch.isclose(gradient, slope, 1e-2, 1e-2)
    return int(same.sum()) >= 0.9 * len(x)  # not at its kinks


def reaches_tensor(function: Any, depth: int = 4) -> bool:
    """Return whether a function uses a tensor that it holds, such as a learned factor, which may change."""
    if isinstance(function, Tensor):
        return True
    if depth == 0 or isinstance(function, (type, nn.Module)):
        return False
    if isinstance(function, (list, tuple)):
        held = list(function)
    elif isinstance(function, dict):
        held = list(function.values())
    elif isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
    else:
        code = getattr(function, "__code__", None)
        names = () if code is None else code.co_names
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
        defaults = [*(getattr(function, "__defaults__", None) or ()), getattr(function, "__kwdefaults__", None) or {}]
        own = {} if isinstance(function, ModuleType) else getattr(function, "__dict__", {})
        held = [*cells, getattr(function, "__self__", None), *defaults, *own.values()]
        # It may use more of a module than it calls, as in lambda x: x * self.beta.
        for module in [value for value in held if isinstance(value, nn.Module)]:
            held += [value for name in names if isinstance(value := getattr(module, name, None), Tensor)]
    return any(reaches_tensor(value, depth - 1) for value in held)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # its variable has no value
        return False


def _of_parameters(module: nn.Module) -> tuple[nn.Module, tuple[Callable[[Tensor], Tensor], ...]] | None:
    """Reduce a module with parameters to a single channel, and return it with one function per channel if they differ.

    Returns None if the parameters do not belong to channels, or if the module has more parts than an activation.
    """
    parts = list(module.modules())
    if len(parts) > _MOST_PARTS or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    if any(isinstance(part, (_DropoutNd, GroupRational)) or "Norm" in type(part).__name__ for part in parts):
        return None
    states = [*module.parameters(), *module.buffers()]
    if any(t.is_meta or max(t.shape, default=1) != t.numel() for t in states):
        return None
    sizes = {t.numel() for t in states if t.is_floating_point()} - {1}
    if len(sizes) > 1:
        return None
    try:
        whole = copy.deepcopy(module).requires_grad_(False).to("cpu", torch.float64).eval()
        if not sizes:
            return whole, ()
        width = next(iter(sizes))
        x = torch.linspace(-6.0, 6.0, 5, dtype=torch.float64, device="cpu")[:, None].repeat(1, width)
        y = whole(x.clone())
        if torch.allclose(y.diff(n=2, dim=0), torch.zeros(1, dtype=y.dtype), atol=1e-9):  # a scale, a norm
            return None
        ones = [_single(whole, channel) for channel in range(width)]
        x += torch.linspace(0.0, 1.0, width, dtype=torch.float64, device="cpu")
        alone = torch.stack([one(x[:, i].clone()) for i, one in enumerate(ones)], 1)
        if not torch.allclose(whole(x.clone()), alone, 1e-9, 1e-12):
            return None
    except Exception:  # whatever its forward does
        return None
    return ones[0], tuple(lambda x, one=one: one(x.clone()) for one in ones)


def _single(module: nn.Module, channel: int) -> nn.Module:
    """Return a copy of the module for one channel."""
    one = copy.deepcopy(module)
    for tensor in (*one.parameters(), *one.buffers()):
        if tensor.numel() > 1:
            tensor.data = tensor.data.flatten()[channel : channel + 1].clone()
    return one
