"""Run parts of a model to see how they use an activation."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn.kinds import linear_width
from ..nn.modes import evaluating
from .site import NotFoundError, Site


def _probe(first: Any, shape: tuple[int, ...]) -> Tensor | None:
    """Return an input for a module that begins with `first`, or None if `first` has no usable weight."""
    weight = getattr(first, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)  # the global one is the user's
    return torch.randn(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)


def runs_its_parts(parent: nn.Module, parts: dict[str, str | None], width: int, conv: bool) -> bool:
    """Return whether a module's `forward` runs its parts in timm's order; also True if that cannot be tried.

    It must run the same operations as its parts. Equal results would not be enough: a limit, for example, may change
    nothing on the input that is tried.
    """
    x = _probe(parent._modules["fc1"], (2, width, 3, 3) if conv else (2, 3, width))
    if x is None:
        return True
    with evaluating(parent), torch.random.fork_rng([x.device] if x.is_cuda else []):
        try:
            given, again = x.clone(), x.clone()
            with _Operations() as whole:
                y = parent(given)
            with _Operations() as of_parts:
                for key in parts.values():
                    x = x if key is None else parent._modules[key](x)  # type: ignore[misc]
            # Its parts stay in eval mode; what differs now is in its forward, such as dropout.
            parent.training = True
            with _Operations() as in_training:
                trained = parent(again)
        except Exception:  # the forward of another class may need anything
            return False
        if not whole.names == of_parts.names == in_training.names:
            return False
        if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(x, y, 1e-3, 1e-5):
            return False
        return torch.allclose(y, trained, 1e-3, 1e-5)


class _Operations(TorchDispatchMode):
    """A context manager that notes the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def try_alone(site: Site, around: Sequence[nn.Module]) -> bool | None:
    """Run the modules around a site by themselves until one of them calls the activation.

    Returns:
        Whether the input of the second linear layer is the output of the activation; None if nothing was seen.

    Raises:
        NotFoundError: the activation also gets inputs of another width.
    """
    inputs = (linear_width(site.first) or (0, 0))[0]
    for module in around:
        for shape in [(1, 2, inputs), (2, inputs)] if site.channel_dim == -1 else [(1, inputs, 3, 2)]:
            x = _probe(site.first, shape)
            if x is None:
                return None
            seen: list[Tensor] = []
            watched = Watched(site, seen.append)
            with contextlib.suppress(Exception), evaluating(module), watched:  # it may need more arguments
                module(x)
            if any(x.dim() < -site.channel_dim or x.shape[site.channel_dim] != site.width for x in seen):
                raise NotFoundError(f"it is also used for inputs of other shapes: {tuple(seen[-1].shape)}")
            if watched.calls and (site.second is None or watched.followed or watched.strangers):
                return watched.agrees
    return None


def _equal(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors hold the same numbers in the same order."""
    if x is y or x.numel() != y.numel():
        return x is y
    if x.is_nested or y.is_nested:
        return x.is_nested and y.is_nested and all(map(torch.equal, x.unbind(), y.unbind()))
    return torch.equal(x.reshape(-1), y.reshape(-1))


class Watched(nn.Module):
    """A context manager that puts this module in the place of an activation, which it calls, and watches the tensors.

    Args:
        site: the site of the activation.
        record: called with every input of the activation.
        keeps_input: whether an activation that works in place gets a copy, as if a rational function took its place.
    """

    def __init__(
        self, site: Site, record: Callable[[Tensor], object] = lambda _: None, keeps_input: bool = False
    ) -> None:
        super().__init__()
        self.site, self.record, self.keeps_input = site, record, keeps_input
        self.calls = self.followed = self.strangers = 0
        self.output: Tensor | None = None
        self.watching = True
        vars(self)["activation"] = getattr(site.parent, site.slot)  # not a child, because it belongs to the model

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the activation."""
        if isinstance(x, Tensor):
            self.record(x.reshape(-1, 1) if self.site.shared and not x.is_nested else x)
        y = vars(self)["activation"](x.clone() if self.keeps_input else x, *args, **kwargs)
        if self.watching:
            self.calls, self.output = self.calls + 1, y
        return y

    @property
    def agrees(self) -> bool | None:
        """Whether every output went to the second linear layer and nothing else did; None if there was no call."""
        return self.calls == self.followed and not self.strangers if self.calls else None

    def stop_watching(self) -> None:
        """Stop comparing."""
        self.watching, self.output = False, None

    def compare(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Compare the second linear layer's input with the activation's output. A forward pre-hook of that layer."""
        if not self.watching:
            return
        x, y, self.output = inputs[0] if inputs else None, self.output, None
        same = isinstance(x, Tensor) and isinstance(y, Tensor) and _equal(x, y)
        self.followed += same
        self.strangers += not same

    def __enter__(self) -> "Watched":
        parent, slot = self.site.parent, self.site.slot
        self.in_children = slot in parent._modules
        vars(parent).pop(slot, None)
        parent._modules[slot] = self
        self.fast_path = getattr(parent, "activation_relu_or_gelu", None)
        if self.fast_path:  # PyTorch's encoder layer calls none of its parts on this path
            parent.activation_relu_or_gelu = 0  # type: ignore[assignment]
        second = self.site.second
        self.hook = None if second is None else second.register_forward_pre_hook(self.compare)
        return self

    def __exit__(self, *_: object) -> None:
        parent, slot = self.site.parent, self.site.slot
        if self.in_children:
            parent._modules[slot] = vars(self)["activation"]
        else:
            del parent._modules[slot]
            vars(parent)[slot] = vars(self)["activation"]
        if self.fast_path:
            parent.activation_relu_or_gelu = self.fast_path
        if self.hook is not None:
            self.hook.remove()
