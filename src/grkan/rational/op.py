"""The door to the rational function: checks, layout, dispatch and autograd.

`group_rational` is a Python function in front of the operator `grkan::group_rational`. The operator keeps x alone for
its backward, is opaque to torch.compile and export, and is where kernels come in. It cannot serve everything: an
operator with `torch.library.register_autograd` raises under torch.func, and under forward-mode AD it silently returns a
zero tangent; an `autograd.Function` with vmap and jvp rules would break `torch.compile(fullgraph=True)`. So the door
runs the plain PyTorch of `reference.py` wherever derivatives are taken by a transform (`_composite_needed`), and the
operator everywhere else.

A kernel sees one layout, [rows, groups, width] and contiguous, in which the scalars of a group lie side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import FORMS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BACKENDS = ("auto", "reference", "native")


@dataclass(frozen=True)
class Kernel:
    """F and its gradients on one device type.

    forward(x, numerator, denominator, form) and backward(grad, x, numerator, denominator, form) as `reference.rational`
    and `reference.rational_backward`, on contiguous [rows, groups, width] tensors.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


REFERENCE = Kernel(reference.rational, reference.rational_backward)

KERNELS: dict[str, Kernel] = {}
"""Native kernels by device type ("cpu", "cuda"); a device that is not here is served by the reference."""

_backend = "auto"


class set_backend:
    """Choose what computes the rational function, from here on or for a `with` block; process-wide.

    Named and used like `torch.set_grad_enabled`.

    Args:
        name: "auto", the native kernel where there is one and the reference elsewhere; "reference", plain PyTorch
            operations, differentiated by autograd, which any exporter understands; "native", the kernel or an error.

    Raises:
        ValueError: for another name.
        RuntimeError: for "native" when this installation has no kernel; a call on a device without one raises it, too.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}; got {name!r}")
        if name == "native" and not KERNELS:
            raise RuntimeError(
                "backend 'native' is not available: this installation of grkan has no compiled kernel; "
                "use 'auto' or 'reference'"
            )
        self._previous, _backend = _backend, name

    def __enter__(self) -> "set_backend":
        return self

    def __exit__(self, *_: object) -> None:
        global _backend
        _backend = self._previous


def group_rational(
    x: Tensor, numerator: Tensor, denominator: Tensor, *, form: str = "abs_of_sum", channel_dim: int = -1
) -> Tensor:
    """Apply to every group of channels its own rational function F(x) = P(x) / Q(x) (arXiv 2409.10594, Eq. 11 and 12).

    P(x) = a_0 + a_1 x + ... + a_m x^m. Q(x) = 1 + |b_1 x + ... + b_n x^n| for form "abs_of_sum", and
    Q(x) = 1 + |b_1| |x| + ... + |b_n| |x|^n for "sum_of_abs". Channels [k C/G, (k + 1) C/G) are group k.

    Args:
        x: any shape of at least one dimension, any strides; float16, bfloat16, float32 or float64. Arithmetic is
            float64 for float64 and float32 otherwise, and right for every finite x; F(+-inf) is the limit, NaN is NaN.
        numerator: (G, m + 1), a_0 first; or (1, m + 1), shared by all groups.
        denominator: (G, n), b_1 first, n >= 0; or (1, n), shared by all groups. G is the larger number of rows.
            Coefficients may have any floating dtype; their gradients have theirs.
        form: "abs_of_sum" or "sum_of_abs".
        channel_dim: the dimension of x that holds the channels; its size is a multiple of G.

    Returns:
        A tensor with shape, dtype and strides of `torch.empty_like(x)`, under autocast, too.

    Raises:
        TypeError: x or the coefficients are no tensors of a floating dtype.
        ValueError: shapes, devices, form or channel_dim do not fit.
        RuntimeError: the backend is "native" and there is no kernel for the device of x.
    """
    groups, dim = _check(x, numerator, denominator, form, channel_dim)
    kernel = KERNELS.get(x.device.type)
    if kernel is None and _backend == "native":
        raise RuntimeError(f"backend 'native' has no kernel for x on device {x.device}; it has {sorted(KERNELS)}")
    if _composite_needed():
        return _composite(x, numerator, denominator, form, dim, groups)
    return torch.ops.grkan.group_rational(x, numerator, denominator, form, dim)


def rational_linear(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    form: str = "abs_of_sum",
) -> Tensor:
    """A rational function in front of a linear layer.

    Equivalent to `F.linear(group_rational(x, numerator, denominator, form=form), weight, bias)`.

    Args:
        x: (..., in_features).
        numerator, denominator, form: as for `group_rational`; the groups divide in_features.
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features). Under autocast the dtype is autocast's, as with `F.linear`: x is cast before F is applied.

    Raises:
        TypeError, ValueError, RuntimeError: as for `group_rational`.
    """
    if isinstance(x, Tensor) and x.dtype in _DTYPES[:3] and _autocasts(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return F.linear(group_rational(x, numerator, denominator, form=form), weight, bias)


def _autocasts(device_type: str) -> bool:
    # Asking for a device that has no autocast, as meta, raises.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _composite_needed() -> bool:
    """Whether plain operations have to run: under torch.func, in forward-mode AD, or because the user chose them."""
    return (
        _backend == "reference"
        or forward_ad._current_level >= 0
        # Private, and the only way to ask; it has been there since torch 2.0.
        or torch._C._are_functorch_transforms_active()
    )


def _composite(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int, groups: int) -> Tensor:
    grouped = x.movedim(dim, -1).unflatten(-1, (groups, x.shape[dim] // groups))
    return reference.rational(grouped, numerator, denominator, form).flatten(-2).movedim(-1, dim)


def _composite_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    groups = max(numerator.shape[0], denominator.shape[0])
    shape = (groups, x.shape[dim] // groups)
    grad, grouped = (t.movedim(dim, -1).unflatten(-1, shape) for t in (grad, x))
    dx, da, db = reference.rational_backward(grad, grouped, numerator, denominator, form)
    return dx.flatten(-2).movedim(-1, dim), da, db


# The operators. Their dim is not negative; their arguments have passed `_check`.

torch.library.define(
    "grkan::group_rational", "(Tensor x, Tensor numerator, Tensor denominator, str form, int dim) -> Tensor"
)
torch.library.define(
    "grkan::group_rational_backward",
    "(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, str form, int dim) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("grkan::group_rational", "default")
def _forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    layout = _Layout(x, dim, max(numerator.shape[0], denominator.shape[0]))
    kernel = KERNELS.get(x.device.type, REFERENCE)
    return layout.restore(kernel.forward(layout.canonical(x), numerator, denominator, form))


@torch.library.impl("grkan::group_rational_backward", "default")
def _backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _Layout(x, dim, max(numerator.shape[0], denominator.shape[0]))
    kernel = KERNELS.get(x.device.type, REFERENCE)
    dx, da, db = kernel.backward(layout.canonical(grad), layout.canonical(x), numerator, denominator, form)
    return layout.restore(dx), da, db


@torch.library.register_fake("grkan::group_rational")
def _forward_fake(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("grkan::group_rational_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), numerator.new_empty(numerator.shape), denominator.new_empty(denominator.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, numerator, denominator, ctx.form, ctx.dim = inputs
    ctx.save_for_backward(x, numerator, denominator)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (grad, *ctx.saved_tensors, ctx.form, ctx.dim)
    # Grad mode is on in a backward that will itself be differentiated (create_graph=True).
    if torch.is_grad_enabled() or _composite_needed():
        gradients = _composite_backward(*arguments)
    else:
        gradients = torch.ops.grkan.group_rational_backward(*arguments)
    return (*gradients, None, None)


torch.library.register_autograd("grkan::group_rational", _autograd, setup_context=_setup_context)


class _Layout:
    """The way between a tensor like x and the contiguous [rows, groups, width] that a kernel reads.

    The dimensions are taken in the order in which `empty_like(x)` has them in memory, so a dense x of any memory format
    is used as it lies: rows are what comes before the channels, and what comes after them widens the groups.
    """

    def __init__(self, x: Tensor, dim: int, groups: int) -> None:
        self.shape = x.shape
        if x.is_contiguous():
            self.strides = x.stride()
            self.order = list(range(x.dim()))
        else:
            self.strides = torch.empty_like(x, device="meta").stride()
            self.order = sorted(range(x.dim()), key=lambda d: -self.strides[d])
        sizes = [x.shape[d] for d in self.order]
        position = self.order.index(dim)
        rows = 1
        for size in sizes[:position]:
            rows *= size
        width = x.shape[dim] // groups
        for size in sizes[position + 1 :]:
            width *= size
        self.grouped = (rows, groups, width)

    def canonical(self, t: Tensor) -> Tensor:
        return t.permute(self.order).contiguous().view(self.grouped)

    def restore(self, t: Tensor) -> Tensor:
        return t.as_strided(self.shape, self.strides)


def _check(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, channel_dim: int) -> tuple[int, int]:
    """Raise for arguments that do not fit; return the number of groups and the channel dimension, not negative."""
    for name, value in (("x", x), ("numerator", numerator), ("denominator", denominator)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64; got {_name(x.dtype)}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension; got a scalar tensor")
    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(map(repr, FORMS))}; got {form!r}")
    for name, value in (("numerator", numerator), ("denominator", denominator)):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating dtype; got {_name(value.dtype)}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {value.device}")
    if numerator.dim() != 2 or numerator.shape[0] == 0 or numerator.shape[1] == 0:
        raise ValueError(f"numerator must have shape (groups or 1, m + 1) with m >= 0; got {tuple(numerator.shape)}")
    if denominator.dim() != 2 or denominator.shape[0] == 0:
        raise ValueError(f"denominator must have shape (groups or 1, n) with n >= 0; got {tuple(denominator.shape)}")
    rows = (numerator.shape[0], denominator.shape[0])
    groups = max(rows)
    if min(rows) not in (1, groups):
        raise ValueError(
            f"numerator and denominator must have the same number of rows, or one of them a single row; "
            f"got {rows[0]} and {rows[1]}"
        )
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
        raise TypeError(f"channel_dim must be an int; got {type(channel_dim).__name__}")
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(
            f"channel_dim must lie in [{-x.dim()}, {x.dim() - 1}] for x of shape {tuple(x.shape)}; got {channel_dim}"
        )
    dim = channel_dim % x.dim()
    if x.shape[dim] % groups:
        raise ValueError(
            f"the channels of x must be divisible by the number of groups, {groups} (rows of the coefficients); "
            f"got {x.shape[dim]} channels in dimension {channel_dim} of shape {tuple(x.shape)}"
        )
    return groups, dim


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
