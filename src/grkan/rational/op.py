"""The door to the rational function: checks, layout, dispatch and autograd.

`group_rational` and `rational_linear` are Python functions in front of three ways to compute the same, because no
single one of PyTorch's serves everything:

* plain operations, those of `reference.py`, wherever derivatives are taken by a transform (`_composite_needed`): an
  operator with `torch.library.register_autograd` raises under torch.func, and under forward-mode AD it silently returns
  a zero tangent;
* the operators `grkan::group_rational` and `grkan::rational_linear` for torch.compile, export, fake tensors and
  whatever else looks at operations (`_is_eager` says when not): an `autograd.Function` with vmap and jvp rules would
  break `torch.compile(fullgraph=True)`;
* an `autograd.Function` around the kernel in plain eager mode. The operators would do, but they cost 90 us more for a
  forward and a backward, which is a third of the time that GELU takes for 8x197x192 scalars on two cores.

The last two share their forward and backward. They keep x and the coefficients for the backward and nothing else.

A kernel sees one layout: memory without gaps, [rows, groups, width], in which the scalars of a group lie side by side.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from ..errors import GrkanRuntimeError, GrkanTypeError, GrkanValueError
from . import cpu, reference
from .arguments import check_choice, check_form, check_integer

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BACKENDS = ("auto", "reference", "native")


@dataclass(frozen=True)
class Kernel:
    """F and its gradients on one device type.

    forward(x, numerator, denominator, form, width) gives F(x), and
    backward(grad, x, numerator, denominator, form, width, output) the gradients of x, numerator and denominator, and
    F(x) as a fourth result if `output` is true, None otherwise.

    x and grad have any shape, but both lie in memory alike and without gaps, as [rows, groups, width]; results of their
    shape are like `empty_like(x)`. The number of groups is the larger number of rows of the coefficients.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


def _reference_forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int) -> Tensor:
    groups = max(numerator.shape[0], denominator.shape[0])
    y = reference.rational(_canonical(x, groups, width), numerator, denominator, form)
    return y.as_strided(x.shape, x.stride())


def _reference_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    groups = max(numerator.shape[0], denominator.shape[0])
    grad, z = (_canonical(t, groups, width) for t in (grad, x))
    dx, da, db = reference.rational_backward(grad, z, numerator, denominator, form)
    y = _reference_forward(x, numerator, denominator, form, width) if output else None
    return dx.as_strided(x.shape, x.stride()), da, db, y


def _canonical(t: Tensor, groups: int, width: int) -> Tensor:
    rows = t.numel() // max(groups * width, 1)
    return t.as_strided((rows, groups, width), (groups * width, width, 1))


REFERENCE = Kernel(_reference_forward, _reference_backward)

KERNELS: dict[str, Kernel] = {}
"""Native kernels by device type, "cpu" and "cuda" (PyTorch's name for AMD's GPUs, too); a device that is not here is
served by the reference. "xpu" is not: extreme x are computed in float64, which not all of Intel's GPUs have."""

TRITON = (3, 6)
"""The version of Triton that the GPU kernel needs: that of the oldest PyTorch that grkan supports."""


def _load_cpu_kernel() -> None:
    try:
        if cpu.load():
            KERNELS["cpu"] = Kernel(cpu.forward, cpu.backward)
    except OSError as error:
        warnings.warn(
            f"grkan's kernel cannot be loaded, so F is computed by plain PyTorch operations: {error}; to build it for "
            f"this version of PyTorch: {BUILD_COMMAND}",
            RuntimeWarning,
            stacklevel=2,
        )


BUILD_COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps ."
_load_cpu_kernel()


def _load_gpu_kernel() -> None:
    global _why_no_gpu_kernel
    try:
        import triton

        _why_no_gpu_kernel = why_too_old(triton.__version__)
        if _why_no_gpu_kernel:
            return
        from . import gpu

        if torch.cuda.is_available():
            gpu.try_out()
    except Exception as error:  # Triton calls compilers and drivers, of which each can be broken in its own way
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        problem = "Triton is missing" if missing else f"Triton does not work: {type(error).__name__}: {error}"
        _why_no_gpu_kernel = f"{problem}; version {_TRITON} or newer is needed"
    else:
        KERNELS["cuda"] = Kernel(gpu.forward, gpu.backward)


def why_too_old(triton_version: str) -> str:
    """What to say of a Triton that is older than TRITON; nothing of another."""
    old = tuple(int(part) for part in triton_version.split(".")[:2]) < TRITON
    return f"Triton is version {triton_version}, and {_TRITON} or newer is needed" if old else ""


_TRITON = ".".join(map(str, TRITON))
TRITON_COMMAND = f'pip install "triton>={_TRITON}"'
_gpu_kernel_wanted = False
_why_no_gpu_kernel = ""


def find_kernel(device_type: str) -> Kernel | None:
    """The GPU kernel is loaded when it is first wanted: Triton alone would add half a second to `import grkan`."""
    global _gpu_kernel_wanted
    if device_type == "cuda" and not _gpu_kernel_wanted:
        _gpu_kernel_wanted = True
        _load_gpu_kernel()
    return KERNELS.get(device_type)


_backend = "auto"


class set_backend:
    """Choose what computes the rational function, from here on or for a `with` block; process-wide.

    Named and used like `torch.set_grad_enabled`.

    Args:
        name: "auto", the native kernel where there is one and the reference elsewhere; "reference", plain PyTorch
            operations, differentiated by autograd, which any exporter understands; "native", the kernel or an error.

    Raises:
        TypeError, ValueError: for another name.
        RuntimeError: for "native" when this installation has no kernel; a call on a device without one raises it, too.
    """

    def __init__(self, name: str) -> None:
        global _backend
        check_choice("backend", name, _BACKENDS)
        if name == "native" and not KERNELS and not (torch.cuda.is_available() and find_kernel("cuda")):
            for_gpu = f"; for the GPU, {_why_no_gpu_kernel}: {TRITON_COMMAND}" if torch.cuda.is_available() else ""
            raise GrkanRuntimeError(
                "backend 'native' is not available: this installation of grkan has no compiled kernel; use 'auto' or "
                f"'reference', or build it, in the folder of grkan's source: {BUILD_COMMAND}{for_gpu}"
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
            float64 for float64 and float32 otherwise, and right for every finite x, up to rounding errors relative to
            the sum of the absolute terms of a polynomial; F(+-inf) is the limit, NaN is NaN.
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
    _check_backend(x.device.type)
    if _composite_needed():
        return _composite(x, numerator, denominator, form, dim, groups)
    if _is_eager(x, numerator, denominator):
        run = _GroupRational.apply if torch.is_grad_enabled() else _forward
        return run(x, numerator, denominator, form, dim)
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
    """A rational function in front of a linear layer, with x as the only activation that is kept for the backward.

    Equivalent to `F.linear(group_rational(x, numerator, denominator, form=form), weight, bias)`, which keeps F(x), too:
    here the backward computes it again.

    Args:
        x: (..., in_features).
        numerator, denominator, form: as for `group_rational`; the groups divide in_features.
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features). Under autocast the dtype is autocast's, as with `F.linear`: x is cast before F is applied.

    Raises:
        TypeError, ValueError, RuntimeError: as for `group_rational`; or weight and bias are not what they should be.
    """
    groups, dim = _check(x, numerator, denominator, form, -1)
    _check_linear(x, weight, bias)
    _check_backend(x.device.type)
    if x.dtype != torch.float64 and _autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise GrkanTypeError(f"{name} must have the dtype of x, {_name(x.dtype)}; got {_name(value.dtype)}")
    if _composite_needed():
        return F.linear(_composite(x, numerator, denominator, form, dim, groups), weight, bias)
    if _is_eager(x, numerator, denominator, weight, bias):
        run = _RationalLinear.apply if torch.is_grad_enabled() else _linear_forward
        return run(x, numerator, denominator, weight, bias, form)
    if torch.compiler.is_compiling() and type(x) in _PLAIN and type(weight) in _PLAIN:
        return torch.ops.grkan.rational_linear(x, numerator, denominator, weight, bias, form)
    # Whoever counts or intercepts operations is to see the linear one.
    return F.linear(torch.ops.grkan.group_rational(x, numerator, denominator, form, dim), weight, bias)


def _autocasts(device_type: str) -> bool:
    # Asking for a device that has no autocast, as meta, raises.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


# Which way to go. These two functions ask PyTorch what it does not tell in public.


def _composite_needed() -> bool:
    """Whether plain operations have to run: under torch.func, in forward-mode AD, or because the user chose them."""
    return (
        _backend == "reference"
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()  # since 2.0
    )


def _is_eager(*tensors: Tensor | None) -> bool:
    """Whether nobody looks at the operations: no compiler, no mode, no subclass of Tensor, no batch of gradients."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # since 2.0
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_meta or torch._C._functorch.is_legacy_batchedtensor(t)):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)


def _check_backend(device_type: str) -> None:
    # A compiled graph would be guarded by whether the GPU kernel had been loaded; the operator in it asks once more.
    if device_type == "meta" or _backend == "reference" or (device_type != "cpu" and torch.compiler.is_compiling()):
        return
    _kernel(device_type, stacklevel=4)


def _kernel(device_type: str, stacklevel: int = 2) -> Kernel:
    """The native kernel or the reference; an error for the backend "native", a notice otherwise, if that is slow."""
    kernel = find_kernel(device_type)
    if kernel is not None:
        return kernel
    how = f"; {_why_no_gpu_kernel}: {TRITON_COMMAND}" if device_type == "cuda" and _why_no_gpu_kernel else ""
    if _backend == "native":
        raise GrkanRuntimeError(
            f"backend 'native' has no kernel for x on device {device_type}; it has {sorted(KERNELS)}{how}"
        )
    if device_type in ("cpu", "cuda") and device_type not in _noticed and _backend == "auto":
        _noticed.add(device_type)
        if device_type == "cpu":
            how = f"; to build it, with a C++ compiler, in the folder of grkan's source: {BUILD_COMMAND}"
        warnings.warn(
            f"this installation of grkan has no kernel for the {'CPU' if device_type == 'cpu' else 'GPU'}, so F is "
            f"computed by plain PyTorch operations, some ten times slower{how}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
    return REFERENCE


_noticed: set[str] = set()


# F and the linear layer by plain, differentiable operations.


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


# The same by a kernel. These are the operators, and what the autograd functions call; dim is not negative, and the
# arguments have passed `_check`.


def _forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    x, width = _dense(x, dim, max(numerator.shape[0], denominator.shape[0]))
    return _kernel(x.device.type).forward(x, numerator, denominator, form, width)


def _backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, width = _dense(x, dim, max(numerator.shape[0], denominator.shape[0]))
    kernel = _kernel(x.device.type)
    return kernel.backward(_with_strides(grad, x.stride()), x, numerator, denominator, form, width, False)[:3]


def _linear_forward(
    x: Tensor, numerator: Tensor, denominator: Tensor, weight: Tensor, bias: Tensor | None, form: str
) -> Tensor:
    return F.linear(_forward(x, numerator, denominator, form, x.dim() - 1), weight, bias)


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    weight: Tensor,
    form: str,
    needs_f: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, numerator and denominator if `needs_f`, that of weight if `needs_weight`; else empty."""
    if needs_f:
        x, width = _dense(x, x.dim() - 1, max(numerator.shape[0], denominator.shape[0]))
        kernel = _kernel(x.device.type)
        df = _with_strides(grad @ weight, x.stride())
        dx, da, db, f = kernel.backward(df, x, numerator, denominator, form, width, needs_weight)
    else:
        dx, da, db = (x.new_empty(0) for _ in range(3))
        f = _forward(x, numerator, denominator, form, x.dim() - 1) if needs_weight else None
    return dx, da, db, x.new_empty(0) if f is None else _rows(grad).T @ _rows(f)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


_LIBRARY = torch.library.Library("grkan", "FRAGMENT")
for _schema, _implementation in {
    "group_rational(Tensor x, Tensor numerator, Tensor denominator, str form, int dim) -> Tensor": _forward,
    "group_rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, str form, int dim) "
    "-> (Tensor, Tensor, Tensor)": _backward,
    "rational_linear(Tensor x, Tensor numerator, Tensor denominator, Tensor weight, Tensor? bias, str form) "
    "-> Tensor": _linear_forward,
    "rational_linear_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, Tensor weight, str form, "
    "bool needs_f, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)": _linear_backward,
}.items():
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("grkan::group_rational", lib=_LIBRARY)
def _forward_fake(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("grkan::group_rational_backward", lib=_LIBRARY)
def _backward_fake(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), numerator.new_empty(numerator.shape), denominator.new_empty(denominator.shape)


@torch.library.register_fake("grkan::rational_linear", lib=_LIBRARY)
def _linear_forward_fake(
    x: Tensor, numerator: Tensor, denominator: Tensor, weight: Tensor, bias: Tensor | None, form: str
) -> Tensor:
    return F.linear(torch.empty_like(x), weight, bias)


@torch.library.register_fake("grkan::rational_linear_backward", lib=_LIBRARY)
def _linear_backward_fake(
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


# Autograd, for the operators and for eager mode alike: both give a `ctx` of the same kind.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, numerator, denominator, ctx.form, ctx.dim = inputs
    ctx.save_for_backward(x, numerator, denominator)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad, *ctx.saved_tensors)
    arguments = (*tensors, ctx.form, ctx.dim)
    # Grad mode is on in a backward that will itself be differentiated (create_graph=True).
    if torch.is_grad_enabled() or _composite_needed():
        gradients = _composite_backward(*arguments)
    elif _is_eager(*tensors):
        gradients = _backward(*arguments)
    else:
        gradients = torch.ops.grkan.group_rational_backward(*arguments)
    return (*gradients, None, None)


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, numerator, denominator, weight, _, ctx.form = inputs
    ctx.save_for_backward(x, numerator, denominator, weight)


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, numerator, denominator, weight = ctx.saved_tensors
    if _autocasts(x.device.type):  # the backward has the dtypes of the forward, wherever it is called
        with torch.autocast(x.device.type, enabled=False):
            return _linear_autograd(ctx, grad)
    needs_f, needs_weight, needs_bias = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    dx = da = db = dweight = None
    if torch.is_grad_enabled() or _composite_needed():
        dim, groups = x.dim() - 1, max(numerator.shape[0], denominator.shape[0])
        if needs_f:
            dx, da, db = _composite_backward(grad @ weight, x, numerator, denominator, ctx.form, dim)
        if needs_weight:
            dweight = _rows(grad).T @ _rows(_composite(x, numerator, denominator, ctx.form, dim, groups))
    elif needs_f or needs_weight:
        eager = _is_eager(grad, x, numerator, denominator, weight)
        backward = _linear_backward if eager else torch.ops.grkan.rational_linear_backward
        dx, da, db, dweight = backward(grad, x, numerator, denominator, weight, ctx.form, needs_f, needs_weight)
    dbias = _rows(grad).sum(0) if needs_bias else None
    return (*((dx, da, db) if needs_f else (None,) * 3), dweight if needs_weight else None, dbias, None)


torch.library.register_autograd("grkan::group_rational", _autograd, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd(
    "grkan::rational_linear", _linear_autograd, setup_context=_linear_setup_context, lib=_LIBRARY
)


class _GroupRational(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup_context(ctx, inputs, inputs[0])
        return _forward(*inputs)

    backward = staticmethod(_autograd)


class _RationalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _linear_setup_context(ctx, inputs, inputs[0])
        return _linear_forward(*inputs)

    backward = staticmethod(_linear_autograd)


# Layout.


def _dense(x: Tensor, dim: int, groups: int) -> tuple[Tensor, int]:
    """A tensor like x whose memory is [rows, groups, width] without gaps, and that width.

    The dimensions are taken in the order in which `empty_like(x)` has them in memory, so a dense x of any memory format
    is used as it lies: rows are what comes before the channels, and what comes after them widens the groups.
    """
    width = x.shape[dim] // groups
    if x.is_contiguous():
        return x, width if dim == x.dim() - 1 else width * math.prod(x.shape[dim + 1 :])
    strides = torch.empty_like(x, device="meta").stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    return _with_strides(x, strides), width * math.prod(x.shape[d] for d in order[order.index(dim) + 1 :])


def _with_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same numbers with other strides; no copy where they are the same."""
    return (
        t if t.stride() == strides else torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
    )


def _check(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, channel_dim: int) -> tuple[int, int]:
    """Raise for arguments that do not fit; return the number of groups and the channel dimension, not negative."""
    for name, value in (("x", x), ("numerator", numerator), ("denominator", denominator)):
        if not isinstance(value, Tensor):
            raise GrkanTypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    if x.dtype not in _DTYPES:
        raise GrkanTypeError(f"x must be float16, bfloat16, float32 or float64; got {_name(x.dtype)}")
    shape, device = x.shape, x.device
    if not shape:
        raise GrkanValueError("x must have at least one dimension; got a scalar tensor")
    check_form(form)
    for name, value in (("numerator", numerator), ("denominator", denominator)):
        if not value.dtype.is_floating_point:
            raise GrkanTypeError(f"{name} must have a floating dtype; got {_name(value.dtype)}")
        if value.device != device:
            raise GrkanValueError(f"{name} must be on the device of x, {device}; got {value.device}")
    of_a, of_b = numerator.shape, denominator.shape
    if len(of_a) != 2 or of_a[0] == 0 or of_a[1] == 0:
        raise GrkanValueError(f"numerator must have shape (groups or 1, m + 1) with m >= 0; got {tuple(of_a)}")
    if len(of_b) != 2 or of_b[0] == 0:
        raise GrkanValueError(f"denominator must have shape (groups or 1, n) with n >= 0; got {tuple(of_b)}")
    groups = max(of_a[0], of_b[0])
    if min(of_a[0], of_b[0]) not in (1, groups):
        raise GrkanValueError(
            f"numerator and denominator must have the same number of rows, or one of them a single row; "
            f"got {of_a[0]} and {of_b[0]}"
        )
    channel_dim = check_integer("channel_dim", channel_dim)
    if not -len(shape) <= channel_dim < len(shape):
        raise GrkanValueError(
            f"channel_dim must lie in [{-len(shape)}, {len(shape) - 1}] for x of shape {tuple(shape)}; "
            f"got {channel_dim}"
        )
    if shape[channel_dim] % groups:
        raise GrkanValueError(
            f"the channels of x must be divisible by the number of groups, {groups} (rows of the coefficients); "
            f"got {shape[channel_dim]} channels in dimension {channel_dim} of shape {tuple(shape)}"
        )
    return groups, channel_dim % len(shape)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if name == "bias" and value is None:
            continue
        if not isinstance(value, Tensor):
            raise GrkanTypeError(f"{name} must be a Tensor; got {type(value).__name__}")
        if value.device != x.device:
            raise GrkanValueError(f"{name} must be on the device of x, {x.device}; got {value.device}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise GrkanValueError(
            f"weight must have shape (out_features, {x.shape[-1]}) for x of shape {tuple(x.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise GrkanValueError(f"bias must have shape ({weight.shape[0]},), the rows of weight; got {tuple(bias.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
