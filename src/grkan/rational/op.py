"""Entry points of the rational function: checks, layout and autograd; `dispatch.py` has the kernels.

`group_rational` and `rational_linear` are Python functions that choose between three ways to compute the same result,
because no single mechanism of PyTorch covers every case:

* plain operations, those of `reference.py`, if a transform takes derivatives (`_composite_needed`): an operator with
  `torch.library.register_autograd` raises under torch.func, and under forward-mode AD it silently returns a zero
  tangent;
* the operators `grkan::group_rational` and `grkan::rational_linear` for torch.compile, export, `torch.jit.trace`, fake
  tensors and whatever else looks at operations (`_is_eager` says when nothing does): an `autograd.Function` with vmap
  and jvp rules would break `torch.compile(fullgraph=True)`;
* an `autograd.Function` around the kernel in plain eager mode. The operators would work too, but they cost 90 us more
  for a forward and a backward, a third of the time that GELU takes for 8x197x192 scalars on two cores.

The last two share their forward and backward. For the backward they keep only x and the coefficients.

A kernel sees one layout: memory without gaps, [rows, groups, width], in which the scalars of a group lie side by side.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.profiler as profiler
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..errors import GrkanTypeError, GrkanValueError
from . import dispatch, reference
from .arguments import check_form, check_integer
from .dispatch import Kernel
from .reference import FORMS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)

# Which of the three ways to take. These two functions use private interfaces of PyTorch, as there are no public ones.


def _composite_needed() -> bool:
    """Whether plain operations must run, because torch.func or forward mode takes derivatives."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()  # since 2.0


def _is_eager(x: Tensor, numerator: Tensor, denominator: Tensor) -> bool:
    """Whether the kernel can be called directly: no compiler, tracer, mode or transform is watching.

    Nor is any argument a special tensor, such as a subclass or a batch of gradients.
    """
    return not (
        is_dynamo_compiling()  # other compilers pass tensors of another type
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()  # since 2.0
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or type(x) not in _PLAIN
        or type(numerator) not in _PLAIN
        or type(denominator) not in _PLAIN
        or x.is_meta
        or x.is_nested
        # Tensors whose memory does not hold their values: zero tensors have no memory, negated ones the other sign.
        or x._is_zerotensor()
        or numerator._is_zerotensor()
        or denominator._is_zerotensor()
        or x.is_neg()
        or numerator.is_neg()
        or denominator.is_neg()
        or torch._C._functorch.is_legacy_batchedtensor(x)
    )


# A call: the checks of its arguments, and what follows from them.


# Shape, dtype, device and layout of x; then shape, dtype and device of the numerator, and of the denominator.
_Properties: TypeAlias = tuple[
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Size,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.dtype,
    torch.device,
]


class _Call(NamedTuple):
    form: str
    dim: int  # of the channels, not negative
    groups: int
    channels: int  # of a group
    width: int  # of a group if x is contiguous; 0 if x is empty, as its strides mean nothing
    device_type: str
    shapes: tuple[tuple[int, int], tuple[int, int]] | None  # of the coefficients, if they are given as vectors


def _call(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.layout,
    a_shape: torch.Size,
    a_dtype: torch.dtype,
    a_device: torch.device,
    b_shape: torch.Size,
    b_dtype: torch.dtype,
    b_device: torch.device,
    form: str,
    channel_dim: int,
    order: tuple[int, int] | None,
    num_groups: int | None,
    group_width: int | None,
) -> _Call:
    """Check x, the numerator a, the denominator b and the options of `_group_rational`; raise if they do not fit.

    It takes only these properties of the tensors, so that its results can be cached: a call like an earlier one is not
    checked again.
    """
    if dtype not in _DTYPES:
        raise GrkanTypeError(f"x must be float16, bfloat16, float32 or float64; got {_name(dtype)}")
    if layout is not torch.strided:
        raise GrkanTypeError(f"x must be dense, as x.to_dense() is; got layout {str(layout).removeprefix('torch.')}")
    shapes = None
    if order is not None:
        shapes = (
            _rows("numerator", a_shape, order[0] + 1, num_groups),
            _rows("denominator", b_shape, order[1], num_groups),
        )
    for name, its_dtype, its_device in (("numerator", a_dtype, a_device), ("denominator", b_dtype, b_device)):
        if not its_dtype.is_floating_point:
            raise GrkanTypeError(f"{name} must have a floating dtype; got {_name(its_dtype)}")
        if its_device != device:
            raise GrkanValueError(f"{name} must be on the device of x, {device}; got {its_device}")
    of_a, of_b = shapes or (a_shape, b_shape)
    if len(of_a) != 2 or of_a[0] == 0 or of_a[1] == 0:
        raise GrkanValueError(f"numerator must have shape (groups or 1, m + 1) with m >= 0; got {tuple(of_a)}")
    if len(of_b) != 2 or of_b[0] == 0:
        raise GrkanValueError(f"denominator must have shape (groups or 1, n) with n >= 0; got {tuple(of_b)}")
    groups = max(of_a[0], of_b[0])
    if min(of_a[0], of_b[0]) not in (1, groups):
        raise GrkanValueError(
            f"numerator and denominator must have the same number of rows, or one of them must have a single row; "
            f"got {of_a[0]} and {of_b[0]}"
        )
    if group_width is not None and shape[channel_dim:][:1] != (groups * group_width,):
        raise GrkanValueError(
            f"x must have {groups * group_width} channels in dimension {channel_dim}, as many as this function was "
            f"made for; got shape {tuple(shape)}. If x is this rank's shard of the channels, as in tensor "
            "parallelism, add grkan.GroupParallel() for this function to the plan"
        )
    if not shape:
        raise GrkanValueError("x must have at least one dimension; got a scalar tensor")
    if not -len(shape) <= channel_dim < len(shape):
        raise GrkanValueError(
            f"channel_dim must lie in [{-len(shape)}, {len(shape) - 1}] for x of shape {tuple(shape)}; "
            f"got {channel_dim}"
        )
    channels = shape[channel_dim]
    if channels % groups:
        raise GrkanValueError(
            f"the channels of x must be divisible by the number of groups, {groups} (rows of the coefficients); "
            f"got {channels} channels in dimension {channel_dim} of shape {tuple(shape)}"
        )
    dim, channels = channel_dim % len(shape), channels // groups
    width = channels * math.prod(shape[dim + 1 :])  # no question about other sizes, which may depend on data
    return _Call(form, dim, groups, channels, width, device.type, shapes)


def _rows(name: str, shape: torch.Size, columns: int, num_groups: int | None) -> tuple[int, int]:
    """Return the shape of the matrix whose rows lie one after the other in a vector of this shape."""
    if len(shape) != 1 or (shape[0] % columns if columns else shape[0]):
        raise GrkanValueError(f"{name} must be a vector of rows of {columns} coefficients; got shape {tuple(shape)}")
    rows = shape[0] // columns if columns else 1
    if num_groups is not None and (rows == 0 or num_groups % rows):
        raise GrkanValueError(
            f"{name} must be a vector of {num_groups} rows of {columns} coefficients, or an equal part of them; got "
            f"shape {tuple(shape)}. If a tool that prunes channels has changed it, exclude the rational functions there"
        )
    return rows, columns


_known_call = functools.lru_cache(maxsize=1024)(_call)


def _linear_call(
    weight_shape: torch.Size,
    weight_dtype: torch.dtype,
    weight_device: torch.device,
    bias_shape: torch.Size | None,
    bias_dtype: torch.dtype | None,
    bias_device: torch.device | None,
    autocasts: bool,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *others: Any,
) -> _Call:
    """Check the arguments of `_rational_linear`; x is described as it is before autocast."""
    call = _call(shape, dtype, device, *others)
    for name, its_dtype, its_device in (("weight", weight_dtype, weight_device), ("bias", bias_dtype, bias_device)):
        if its_device is not None and its_device != device:
            raise GrkanValueError(f"{name} must be on the device of x, {device}; got {its_device}")
        if its_dtype is not None and its_dtype != dtype and not autocasts:
            raise GrkanTypeError(f"{name} must have the dtype of x, {_name(dtype)}; got {_name(its_dtype)}")
    if len(weight_shape) != 2 or weight_shape[1] != shape[-1]:
        raise GrkanValueError(
            f"weight must have shape (out_features, {shape[-1]}) for x of shape {tuple(shape)}; "
            f"got {tuple(weight_shape)}"
        )
    if bias_shape is not None and bias_shape != weight_shape[:1]:
        raise GrkanValueError(f"bias must have shape ({weight_shape[0]},), the rows of weight; got {tuple(bias_shape)}")
    return call


_known_linear_call = functools.lru_cache(maxsize=1024)(_linear_call)


def _properties(x: Tensor, numerator: Tensor, denominator: Tensor) -> _Properties:
    """Collect the first arguments of `_call`."""
    return (
        x.shape,
        x.dtype,
        x.device,
        x.layout,
        numerator.shape,
        numerator.dtype,
        numerator.device,
        denominator.shape,
        denominator.dtype,
        denominator.device,
    )


def _check_tensors(**tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise GrkanTypeError(f"{name} must be a Tensor; got {type(value).__name__}")


def _untraced(function: Callable[[], _Call]) -> _Call:
    """Call function() hidden from torch.jit.trace, which turns sizes into tensors and warns if they are compared."""
    if not torch.jit.is_tracing():
        return function()
    tracing: Any = torch._C
    state = tracing._get_tracing_state()
    tracing._set_tracing_state(None)
    try:
        return function()
    finally:
        tracing._set_tracing_state(state)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Layout.


def _dense(x: Tensor, call: _Call) -> tuple[Tensor, int]:
    """For an x that is not contiguous, return it with memory [rows, groups, width] without gaps, and that width.

    The dimensions keep the order that `empty_like(x)` has in memory, so a dense x of any memory format is not copied.
    The dimensions before the channels become rows, and those after them widen the groups.
    """
    strides = torch.empty_like(x, device="meta").stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    inner = order[order.index(call.dim) + 1 :]
    return _with_strides(x, strides), call.channels * math.prod(x.shape[d] for d in inner)


def _with_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the same values with the given strides; copy only if the strides differ."""
    return (
        t if t.stride() == strides else torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
    )


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _as_rows(numerator: Tensor, denominator: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Return the coefficients as matrices, if they are not matrices already."""
    if call.shapes is None:
        return numerator, denominator
    return numerator.view(call.shapes[0]), denominator.view(call.shapes[1])


_UNSEEN = contextlib.nullcontext()
_LINEAR = F.linear


# F in plain, differentiable operations.


def _composite(
    x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int, shape: tuple[int, int] | None = None
) -> Tensor:
    """Compute F in plain operations. `shape` is (groups, channels of each); None: derived from the tensors."""
    shape = shape or _groups_and_channels(x, numerator, denominator, dim)
    # PyTorch's older ONNX exporter mishandles a movedim that moves nothing or counts from the end, and it turns the
    # sizes of an unflatten into constants.
    last = x.dim() - 1
    moved = x if dim == last else x.movedim(dim, last)
    grouped = moved.reshape(*moved.shape[:-1], *shape)
    y = reference.rational(grouped, numerator, denominator, form).reshape(moved.shape)
    return y if dim == last else y.movedim(last, dim)


def _exported(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int, shape: tuple[int, int]) -> Tensor:
    """Compute F by Horner's method, in float32 only and with coefficients for every channel, as `grkan.plain` does.

    An ONNX graph cannot branch, so `_composite` would treat every x as extreme: it would compute in float64, three
    times as slow.
    """
    groups, width = shape

    def columns(rows: Tensor) -> tuple[Tensor, ...]:
        wide = rows.float().expand(groups, -1).unsqueeze(1).expand(groups, width, -1).reshape(groups * width, -1)
        return tuple(column.reshape(-1, *(1,) * (x.dim() - dim - 1)) for column in wide.unbind(1))

    def horner(coefficients: Sequence[Tensor], z: Tensor) -> Tensor:
        *others, value = coefficients
        for coefficient in reversed(others):
            value = value * z + coefficient
        return value

    z = x.float()
    y = horner(columns(numerator), z).expand(x.shape)
    if denominator.shape[1]:
        t = z.abs() if form == "sum_of_abs" else z
        inner = t * horner(columns(denominator.abs() if form == "sum_of_abs" else denominator), t)
        y = y / (1.0 + inner.abs())
    return y.to(x.dtype)


def _composite_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _groups_and_channels(x, numerator, denominator, dim)
    grad, grouped = (t.movedim(dim, -1).unflatten(-1, shape) for t in (grad, x))
    dx, da, db = reference.rational_backward(grad, grouped, numerator, denominator, form)
    return dx.flatten(-2).movedim(-1, dim), da, db


def _groups_and_channels(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> tuple[int, int]:
    groups = max(numerator.shape[0], denominator.shape[0])
    return groups, x.shape[dim] // groups


# F and the linear layer by a kernel.


def _evaluate(x: Tensor, numerator: Tensor, denominator: Tensor, call: _Call, kernel: Kernel) -> Tensor:
    if call.shapes is not None:
        numerator, denominator = _as_rows(numerator, denominator, call)
    x, width = (x, call.width) if x.is_contiguous() else _dense(x, call)
    if not profiler._is_profiler_enabled:  # a profiler does not see kernels, as they are not PyTorch operators
        return kernel.forward(x, numerator, denominator, call.form, width)
    with profiler.record_function("grkan::forward"):
        return kernel.forward(x, numerator, denominator, call.form, width)


def _evaluate_linear(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: _Call,
    kernel: Kernel,
) -> Tensor:
    return F.linear(_evaluate(x, numerator, denominator, call, kernel), weight, bias)


def _gradients(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, call: _Call, kernel: Kernel, output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of x, numerator and denominator; and F(x), if `output` is true."""
    if call.shapes is not None:
        numerator, denominator = _as_rows(numerator, denominator, call)
    if call.width and x.is_contiguous():
        grad, width = grad.contiguous(), call.width
    else:
        x, width = _dense(x, call)
        grad = _with_strides(grad, x.stride())
    with profiler.record_function("grkan::backward") if profiler._is_profiler_enabled else _UNSEEN:
        dx, da, db, y = kernel.backward(grad, x, numerator, denominator, call.form, width, output)
    if call.shapes is not None:
        da, db = da.view(-1), db.view(-1)
    return dx, da, db, y


def _linear_gradients(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    call: _Call,
    kernel: Kernel,
    needs_f: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of x, numerator and denominator if `needs_f`, and of weight if `needs_weight`."""
    dx = da = db = f = None
    if needs_f:
        dx, da, db, f = _gradients(grad @ weight, x, numerator, denominator, call, kernel, needs_weight)
    elif needs_weight:
        f = _evaluate(x, numerator, denominator, call, kernel)
    return dx, da, db, None if f is None else _matrix(grad).T @ _matrix(f)


# The operators.


def _group_rational_operator(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    call = _known_call(*_properties(x, numerator, denominator), form, dim, None, None, None)
    return _evaluate(x, numerator, denominator, call, dispatch.kernel_for(call.device_type))


def _group_rational_backward_operator(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    call = _known_call(*_properties(x, numerator, denominator), form, dim, None, None, None)
    return _gradients(grad, x, numerator, denominator, call, dispatch.kernel_for(call.device_type))[:3]


def _rational_linear_operator(
    x: Tensor, numerator: Tensor, denominator: Tensor, weight: Tensor, bias: Tensor | None, form: str
) -> Tensor:
    return F.linear(_group_rational_operator(x, numerator, denominator, form, -1), weight, bias)


def _rational_linear_backward_operator(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    form: str,
    needs_f: bool,
    needs_weight: bool,
) -> tuple[Tensor, ...]:
    """Compute the gradients. Those not needed are empty tensors, as an operator must return tensors."""
    call = _known_call(*_properties(x, numerator, denominator), form, -1, None, None, None)
    kernel = dispatch.kernel_for(call.device_type)
    gradients = _linear_gradients(grad, x, numerator, denominator, weight, call, kernel, needs_f, needs_weight)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


_LIBRARY = torch.library.Library("grkan", "FRAGMENT")
for _schema, _implementation in {
    "group_rational(Tensor x, Tensor numerator, Tensor denominator, str form, int dim) -> Tensor": (
        _group_rational_operator
    ),
    "group_rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, str form, int dim) "
    "-> (Tensor, Tensor, Tensor)": _group_rational_backward_operator,
    "rational_linear(Tensor x, Tensor numerator, Tensor denominator, Tensor weight, Tensor? bias, str form) "
    "-> Tensor": _rational_linear_operator,
    "rational_linear_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, Tensor weight, str form, "
    "bool needs_f, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)": _rational_linear_backward_operator,
}.items():
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("grkan::group_rational", lib=_LIBRARY)
def _group_rational_fake(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("grkan::group_rational_backward", lib=_LIBRARY)
def _group_rational_backward_fake(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), numerator.new_empty(numerator.shape), denominator.new_empty(denominator.shape)


@torch.library.register_fake("grkan::rational_linear", lib=_LIBRARY)
def _rational_linear_fake(
    x: Tensor, numerator: Tensor, denominator: Tensor, weight: Tensor, bias: Tensor | None, form: str
) -> Tensor:
    return F.linear(torch.empty_like(x), weight, bias)


@torch.library.register_fake("grkan::rational_linear_backward", lib=_LIBRARY)
def _rational_linear_backward_fake(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    form: str,
    needs_f: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if needs_weight else 0)
    if not needs_f:
        return x.new_empty(0), x.new_empty(0), x.new_empty(0), dweight
    return torch.empty_like(x), numerator.new_empty(numerator.shape), denominator.new_empty(denominator.shape), dweight


# Autograd. Grad mode is on during a backward that will itself be differentiated (create_graph=True).


def _group_rational_vjp(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() or _composite_needed():
        return _composite_backward(grad, x, numerator, denominator, form, dim)
    return torch.ops.grkan.group_rational_backward(grad, x, numerator, denominator, form, dim)


def _rational_linear_vjp(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    form: str,
    needs_f: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, ...]:
    dx = da = db = dweight = None
    dim = x.dim() - 1
    if needs_f:
        dx, da, db = _group_rational_vjp(grad @ weight, x, numerator, denominator, form, dim)
    if needs_weight:
        plain = torch.is_grad_enabled() or _composite_needed()
        function = _composite if plain else torch.ops.grkan.group_rational
        dweight = _matrix(grad).T @ _matrix(function(x, numerator, denominator, form, dim))
    return dx, da, db, dweight


def _fused_rational_linear_vjp(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, weight: Tensor, form: str, *needs: bool
) -> tuple[Tensor | None, ...]:
    """Compute the gradients in one operator, for graphs whose forward is one: nothing looks at the matrix products."""
    if torch.is_grad_enabled() or _composite_needed():
        return _rational_linear_vjp(grad, x, numerator, denominator, weight, form, *needs)
    return torch.ops.grkan.rational_linear_backward(grad, x, numerator, denominator, weight, form, *needs)


def _group_rational_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, numerator, denominator, ctx.form, dim = inputs
    ctx.dim = dim % x.dim()
    ctx.save_for_backward(x, numerator, denominator)


def _group_rational_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, numerator, denominator = ctx.saved_tensors
    return *_group_rational_vjp(grad, x, numerator, denominator, ctx.form, ctx.dim), None, None


def _rational_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, numerator, denominator, weight, _, ctx.form = inputs
    ctx.save_for_backward(x, numerator, denominator, weight)


def _rational_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    def vjp(*needs: bool) -> tuple[Tensor | None, ...]:
        x, numerator, denominator, weight = ctx.saved_tensors
        return _fused_rational_linear_vjp(grad, x, numerator, denominator, weight, ctx.form, *needs)

    return *_linear_backward(ctx, grad, vjp), None


def _linear_backward(
    ctx: Any, grad: Tensor, vjp: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the five tensors of `rational_linear`; vjp(needs_f, needs_weight) gives all but bias."""
    if _autocasts(grad.device.type):  # the backward uses the dtypes of the forward, wherever it is called
        with torch.autocast(grad.device.type, enabled=False):
            return _linear_backward(ctx, grad, vjp)
    needs_f, (needs_weight, needs_bias) = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3:5]
    dx = da = db = dweight = None
    if needs_f or needs_weight:
        dx, da, db, dweight = vjp(needs_f, needs_weight)
    return (
        *((dx, da, db) if needs_f else (None, None, None)),
        dweight if needs_weight else None,
        _matrix(grad).sum(0) if needs_bias else None,
    )


torch.library.register_autograd(
    "grkan::group_rational", _group_rational_backward, setup_context=_group_rational_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "grkan::rational_linear", _rational_linear_backward, setup_context=_rational_linear_setup, lib=_LIBRARY
)


class _GroupRational(torch.autograd.Function):
    """The kernel in eager mode. The backward uses the kernel of the forward, even if the backend has changed since."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor, call: _Call, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.call, ctx.kernel = call, kernel
        return _evaluate(x, numerator, denominator, call, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, numerator, denominator = ctx.saved_tensors
        call = ctx.call
        if not torch.is_grad_enabled() and _is_eager(grad, numerator, denominator) and type(x) in _PLAIN:
            dx, da, db, _ = _gradients(grad, x, numerator, denominator, call, ctx.kernel)
        else:
            a, b = _as_rows(numerator, denominator, call)
            dx, da, db = _group_rational_vjp(grad, x, a, b, call.form, call.dim)
            da, db = da.reshape(numerator.shape), db.reshape(denominator.shape)
        return dx, da, db, None, None


class _RationalLinear(torch.autograd.Function):
    """The kernel in eager mode, followed by the linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        numerator: Tensor,
        denominator: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: _Call,
        kernel: Kernel,
    ) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator, weight)
        ctx.call, ctx.kernel = call, kernel
        return _evaluate_linear(x, numerator, denominator, weight, bias, call, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, numerator, denominator, weight = ctx.saved_tensors
        call = ctx.call

        def vjp(needs_f: bool, needs_weight: bool) -> tuple[Tensor | None, ...]:
            plain = type(x) in _PLAIN and type(weight) in _PLAIN
            if plain and not torch.is_grad_enabled() and _is_eager(grad, numerator, denominator):
                return _linear_gradients(
                    grad, x, numerator, denominator, weight, call, ctx.kernel, needs_f, needs_weight
                )
            a, b = _as_rows(numerator, denominator, call)
            # Compiled autograd takes the operator; whatever else looks at operations sees the matrix products.
            run = _fused_rational_linear_vjp if is_compiling() else _rational_linear_vjp
            dx, da, db, dweight = run(grad, x, a, b, weight, call.form, needs_f, needs_weight)
            if da is not None and db is not None and needs_f:
                da, db = da.reshape(numerator.shape), db.reshape(denominator.shape)
            return dx, da, db, dweight

        return *_linear_backward(ctx, grad, vjp), None, None


# Autocast.


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts x to in a linear layer, or None if it does not cast x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if _autocasts(kind) and x.dtype != torch.float64 else None


def _autocasts(device_type: str) -> bool:
    # The query raises for meta; torch.compile of PyTorch 2.10 cannot trace torch.amp.is_autocast_available.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight or bias as autocast does for a linear layer: a weight is cast once, then taken from the cache.

    Python has no access to that cache, but a matrix product does, and it saves its factors for the backward. So this
    runs an empty product and takes the saved factor: the cast weight, with its place in the graph.
    """
    if not torch.is_grad_enabled() and parameter.dtype == torch.float32:
        return parameter  # F.linear will do it
    if parameter.dim() != 2 or not (parameter.is_leaf and parameter.requires_grad) or parameter.dtype != torch.float32:
        return parameter.to(dtype)
    saved: list[Tensor] = []

    def save(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    # These hooks also hide the product from other hooks, such as those of offloading and checkpointing.
    empty = parameter.new_empty(0, parameter.shape[0], dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t), contextlib.suppress(RuntimeError):
        torch.mm(empty, parameter)  # fails if the cache holds the weight in the dtype of an outer autocast block
    for t in saved:
        if t.grad_fn is not None and t.shape == parameter.shape and t.dtype == dtype:
            return t
    return parameter.to(dtype)


# The entry points.


def group_rational(
    x: Tensor, numerator: Tensor, denominator: Tensor, *, form: str = "abs_of_sum", channel_dim: int = -1
) -> Tensor:
    """Apply a rational function F(x) = P(x) / Q(x) to each group of channels (arXiv 2409.10594, Eq. 11 and 12).

    P(x) = a_0 + a_1 x + ... + a_m x^m. Q(x) = 1 + |b_1 x + ... + b_n x^n| for form "abs_of_sum", and
    Q(x) = 1 + |b_1| |x| + ... + |b_n| |x|^n for "sum_of_abs". Channels [k C/G, (k + 1) C/G) are group k.

    Args:
        x: any shape of at least one dimension, any strides; float16, bfloat16, float32 or float64. Arithmetic is
            float64 for float64 and float32 otherwise, and accurate for every finite x, up to rounding errors relative
            to the sum of the absolute terms of a polynomial. F(+-inf) is the limit, NaN gives NaN. x may be nested.
        numerator: (G, m + 1), a_0 first; or (1, m + 1), shared by all groups.
        denominator: (G, n), b_1 first, n >= 0; or (1, n), shared by all groups. G is the larger number of rows.
            Coefficients may have any floating dtype; their gradients have the same one.
        form: "abs_of_sum" or "sum_of_abs".
        channel_dim: the dimension of x that holds the channels; its size is a multiple of G.

    Returns:
        A tensor with the shape, dtype and strides of `torch.empty_like(x)`, also under autocast.

    Raises:
        TypeError: x or the coefficients are not dense tensors of a floating dtype.
        ValueError: shapes, devices, form or channel_dim do not fit.
        RuntimeError: the backend is "native" and there is no kernel for the device of x.
    """
    if has_torch_function_variadic(x, numerator, denominator):
        return handle_torch_function(
            group_rational,
            (x, numerator, denominator),
            x,
            numerator,
            denominator,
            form=form,
            channel_dim=channel_dim,
        )
    return _group_rational(x, numerator, denominator, form, channel_dim)


def group_rational_of_vectors(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    order: tuple[int, int],
    form: str,
    channel_dim: int = -1,
    num_groups: int | None = None,
    group_width: int | None = None,
) -> Tensor:
    """Run `group_rational` for the layers, which keep their coefficients as vectors, one row after the other.

    Args:
        x, form, channel_dim: as for `group_rational`.
        numerator, denominator: (G (m + 1),) or (m + 1,), and (G n,) or (n,).
        order: (m, n).
        num_groups: the number of groups, of which the coefficients may be an equal part; None: any number.
        group_width: the number of channels that a group must have; None: any number.
    """
    if torch.jit.is_scripting():  # when a graph that torch.fx traced is scripted
        m, n = order
        b = denominator.view(-1, n) if n > 0 else denominator.view(1, 0)
        return torch.ops.grkan.group_rational(x, numerator.view(-1, m + 1), b, form, channel_dim)
    else:  # without the else TorchScript would compile this, too
        if has_torch_function_variadic(x, numerator, denominator):
            tensors = x, numerator, denominator
            return handle_torch_function(
                group_rational_of_vectors, tensors, *tensors, order, form, channel_dim, num_groups, group_width
            )
        return _group_rational(x, numerator, denominator, form, channel_dim, order, num_groups, group_width)


def _group_rational(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    form: str,
    channel_dim: int,
    order: tuple[int, int] | None = None,
    num_groups: int | None = None,
    group_width: int | None = None,
) -> Tensor:
    # A small tensor takes 2 us, so the time of the checks before it matters.
    if form not in FORMS or type(channel_dim) is not int:
        form, channel_dim = check_form(form), check_integer("channel_dim", channel_dim)
    if _is_eager(x, numerator, denominator) and dispatch.backend() != "reference":
        call = _known_call(
            x.shape,
            x.dtype,
            x.device,
            x.layout,
            numerator.shape,
            numerator.dtype,
            numerator.device,
            denominator.shape,
            denominator.dtype,
            denominator.device,
            form,
            channel_dim,
            order,
            num_groups,
            group_width,
        )
        kernel = dispatch.KERNELS.get(call.device_type) or dispatch.kernel_for(call.device_type, stacklevel=4)
        if torch.is_grad_enabled():
            return _GroupRational.apply(x, numerator, denominator, call, kernel)
        return _evaluate(x, numerator, denominator, call, kernel)
    _check_tensors(x=x, numerator=numerator, denominator=denominator)
    if x.is_nested:
        return _over_nested(
            lambda part, dim: _group_rational(part, numerator, denominator, form, dim, order, num_groups, group_width),
            x,
            channel_dim,
        )
    call = _untraced(
        lambda: _call(*_properties(x, numerator, denominator), form, channel_dim, order, num_groups, group_width)
    )
    dispatch.check_backend(call.device_type)
    numerator, denominator = _as_rows(numerator, denominator, call)
    if composite := _plain_operations():
        return composite(x, numerator, denominator, form, call.dim, (call.groups, call.channels))
    return torch.ops.grkan.group_rational(x, numerator, denominator, form, call.dim)


def rational_linear(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    form: str = "abs_of_sum",
) -> Tensor:
    """Apply a rational function and then a linear layer, keeping x as the only activation for the backward.

    Equivalent to `F.linear(group_rational(x, numerator, denominator, form=form), weight, bias)`. That would keep F(x),
    too; here the backward computes it again.

    Args:
        x: (..., in_features); may be nested.
        numerator, denominator, form: as for `group_rational`; the groups divide in_features.
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features). Under autocast the dtype is autocast's, as with `F.linear`: x is cast before F is applied.

    Raises:
        TypeError, ValueError, RuntimeError: as for `group_rational`; TypeError or ValueError if weight or bias do not
            fit.
    """
    tensors = x, numerator, denominator, weight, bias
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(rational_linear, tensors, *tensors, form=form)
    return _rational_linear(*tensors, form)


def rational_linear_of_vectors(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: tuple[int, int],
    form: str,
    num_groups: int | None = None,
    group_width: int | None = None,
) -> Tensor:
    """Run `rational_linear` for the layers, see `group_rational_of_vectors`."""
    tensors = x, numerator, denominator, weight, bias
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            rational_linear_of_vectors, tensors, *tensors, order, form, num_groups, group_width
        )
    return _rational_linear(*tensors, form, order, num_groups, group_width)


def _rational_linear(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: str,
    order: tuple[int, int] | None = None,
    num_groups: int | None = None,
    group_width: int | None = None,
) -> Tensor:
    options = check_form(form), -1, order, num_groups, group_width
    # A tool may have replaced F.linear; the fused backward is for PyTorch's.
    plain = type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN) and F.linear is _LINEAR
    eager = plain and _is_eager(x, numerator, denominator) and dispatch.backend() != "reference"
    if not eager:
        _check_tensors(x=x, numerator=numerator, denominator=denominator, weight=weight)
        if bias is not None:
            _check_tensors(bias=bias)
        if x.is_nested:
            return _over_nested(
                lambda part, _: _rational_linear(
                    part, numerator, denominator, weight, bias, form, order, num_groups, group_width
                ),
                x,
                -1,
            )

    def call_of(check: Callable[..., _Call], dtype: torch.dtype | None) -> _Call:
        of_bias = (None, None, None) if bias is None else (bias.shape, bias.dtype, bias.device)
        of_linear = weight.shape, weight.dtype, weight.device, *of_bias, dtype is not None
        return check(*of_linear, *_properties(x, numerator, denominator), *options)

    dtype = _autocast_dtype(x)
    if eager:
        call = call_of(_known_linear_call, dtype)
        kernel = dispatch.KERNELS.get(call.device_type) or dispatch.kernel_for(call.device_type, stacklevel=4)
        if dtype is not None:
            x, weight, bias = x.to(dtype), _autocast(weight, dtype), None if bias is None else _autocast(bias, dtype)
        run = _RationalLinear.apply if torch.is_grad_enabled() else _evaluate_linear
        return run(x, numerator, denominator, weight, bias, call, kernel)
    call = _untraced(lambda: call_of(_linear_call, dtype))
    dispatch.check_backend(call.device_type)
    numerator, denominator = _as_rows(numerator, denominator, call)
    if dtype is not None:
        x = x.to(dtype)
    if composite := _plain_operations():
        y = composite(x, numerator, denominator, form, call.dim, (call.groups, call.channels))
    elif is_compiling() and type(x) in _PLAIN and type(weight) in _PLAIN and F.linear is _LINEAR:
        if dtype is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return torch.ops.grkan.rational_linear(x, numerator, denominator, weight, bias, form)
    else:
        y = torch.ops.grkan.group_rational(x, numerator, denominator, form, call.dim)
    return F.linear(y, weight, bias)  # known to autocast and to tools that count or intercept operations


def _plain_operations() -> Callable[..., Tensor] | None:
    """Return the form of F in plain operations if the caller needs one, else None.

    PyTorch's ONNX exporters know no operator of ours. A decomposition for them in PyTorch's table would be simpler, but
    where the environment variable CI is set Inductor refuses every operator that has one, and the table has no way out.
    """
    traced = torch.jit.is_tracing() or is_exporting()
    if traced and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        return _exported
    return _composite if dispatch.backend() == "reference" or _composite_needed() else None


def _over_nested(function: Callable[[Tensor, int], Tensor], x: Any, channel_dim: int) -> Tensor:
    """Apply function(part, channel_dim) to the parts of a nested tensor; a jagged one holds them in one piece."""
    jagged = x.layout is torch.jagged
    dim = channel_dim % x.dim() if -x.dim() <= channel_dim < x.dim() else 0
    if dim == 0 or (jagged and dim == x._ragged_idx):
        raise GrkanValueError(
            "channel_dim must be a dimension in which all parts of the nested tensor have the same size; "
            f"got {channel_dim} for {x.dim()} dimensions"
        )
    if not jagged:
        return torch.nested.as_nested_tensor([function(part, dim - 1) for part in x.unbind()])
    return torch.nested.nested_tensor_from_jagged(
        function(x.values(), dim - 1),
        x.offsets(),
        x.lengths(),
        x._ragged_idx,
        x._maybe_min_seqlen,
        x._maybe_max_seqlen,
    )
