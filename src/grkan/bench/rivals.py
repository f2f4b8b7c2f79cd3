"""The rivals: for one job, everything that does it, by name, as calls that can be timed.

Rivals are made anew for every contest, on its device. All of them get the same x. If they have trainable tensors, the
gradients of these are computed together with that of x.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.operations import count_operations
from ..models.spline import GRID, ORDER, SplineKAN, cubic_bases
from ..nn import GRKAN
from ..rational import dispatch, table
from ..rational.op import group_rational
from .contest import Rival, bytes_kept

GROUPS = 8

FORWARD, TRAINING = "forward", "forward + backward"
"""The names of the passes of functions and layers in tables and JSON."""

TRAIN_STEP, INFERENCE = "training step", "inference"
"""The names of the passes of whole models."""


def _pass(
    name: str, function: Callable[..., Tensor], x: Tensor, learned: Sequence[Tensor], grad: Tensor
) -> Callable[[], object]:
    """Return one pass of function(x, *learned), by its name."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x, *learned)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x, *learned), (x, *learned), grad)

    return forward if name == FORWARD else forward_and_backward


# The rational function. x is (..., C), C a multiple of the groups G; a is (G, m + 1), b is (G, n). As in grkan, the
# arithmetic is float32 for half types. All compute F with the denominator 1 + |A(x)|, in a straightforward way.


def rational_by_loop(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute F by a loop over the powers of x."""
    z = _grouped(x, a)
    numerator = sum(a[:, i, None] * z**i for i in range(a.shape[1]))
    inner = sum(b[:, j, None] * z ** (j + 1) for j in range(b.shape[1]))
    return (numerator / (1 + inner.abs())).flatten(-2).to(x.dtype)  # type: ignore[union-attr]


def rational_by_powers(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute F from all powers at once, in a new dimension, by a matrix product with the coefficients."""
    z = _grouped(x, a)
    powers = z.unsqueeze(-1) ** torch.arange(max(a.shape[1], b.shape[1] + 1), device=x.device)
    numerator = powers[..., : a.shape[1]] @ a.unsqueeze(-1)
    inner = powers[..., 1 : b.shape[1] + 1] @ b.unsqueeze(-1)
    return (numerator / (1 + inner.abs())).flatten(-3).to(x.dtype)


def rational_by_horner(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute F by Horner's method, as `rational/reference.py` does but without its handling of extreme x."""
    z = _grouped(x, a)
    numerator, inner = a[:, -1, None], b[:, -1, None]
    for i in range(a.shape[1] - 2, -1, -1):
        numerator = torch.addcmul(a[:, i, None], numerator, z)
    for j in range(b.shape[1] - 2, -1, -1):
        inner = torch.addcmul(b[:, j, None], inner, z)
    return (numerator / (1 + (inner * z).abs())).flatten(-2).to(x.dtype)


def spline(x: Tensor, coefficients: Tensor) -> Tensor:
    """Compute a B-spline of order 3 on [-1, 1] per group of channels; coefficients is (G, 11), for 8 intervals.

    Like the rational function, one spline serves a group of channels. (In the first KANs, each weight had its own.)
    """
    return (cubic_bases(_grouped(x, coefficients), GRID, 1.0) @ coefficients.unsqueeze(-1)).flatten(-3).to(x.dtype)


def _grouped(x: Tensor, coefficients: Tensor) -> Tensor:
    """Reshape (..., C) to (..., G, C / G), in float32 or wider."""
    return x.unflatten(-1, (coefficients.shape[0], -1)).to(torch.promote_types(x.dtype, torch.float32))


# Other functions between two linear layers. Half types are computed as in PyTorch's own activations, except for values
# that would leave their range.


def relu_squared(x: Tensor) -> Tensor:
    """Compute max(x, 0)^2 ("Primer", arXiv 2109.08668)."""
    return F.relu(x).square()


def swiglu(x: Tensor, value: Tensor) -> Tensor:
    """Compute SiLU(x) v: the gate of arXiv 2002.05202 without its three linear layers; two of them give x and v."""
    return F.silu(x) * value


def polynorm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute PolyNorm (arXiv 2411.03884): w_1 norm(x) + w_2 norm(x^2) + w_3 norm(x^3) + bias.

    norm divides by the root mean square of the last dimension; weight is (3,), bias ().
    """
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    y = sum(w * F.rms_norm(z**power, z.shape[-1:], eps=1e-6) for power, w in enumerate(weight, 1)) + bias
    return y.to(x.dtype)


def xielu(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Compute xIELU (arXiv 2411.13010), b = 1/2: a_p x^2 + b x where x > 0, a_n (e^x - 1 - x) + b x elsewhere.

    a_p = softplus(positive), a_n = b + softplus(negative), both scalars.
    """
    beta = 0.5
    a_p, a_n = F.softplus(positive), beta + F.softplus(negative)
    curved = torch.where(x > 0, a_p * x.square(), a_n * (torch.expm1(x.clamp(max=0)) - x))
    return (curved + beta * x).to(x.dtype)


class _Activation(NamedTuple):
    """A function of x, of its trainable tensors, and of a second input if it is a gate."""

    function: Callable[..., Tensor]
    learned: tuple[Tensor, ...] = ()
    second: tuple[Tensor, ...] = ()


def _installed_kernels(rational: tuple[Tensor, ...]) -> dict[str, _Activation]:
    """Return others' installed Triton kernels for the rational function: form sum_of_abs, for NVIDIA's GPUs only.

    github.com/Adamdad/rational_kat_cu, the released code, has a module kat_rational; github.com/OSU-STARLAB/FlashKAT
    (arXiv 2505.13813) has rational_kat; github.com/felippe-alves/rational_kat_cu has rational_kat_cu, and shares the
    numerator.
    """
    found = {}
    a, b = rational

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What autocast makes of these kernels, which are for float32."""
        return lambda x, *learned: function(x.float(), *learned).to(x.dtype)

    def load(module: str, name: str) -> Any:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return None

    if released := load("kat_rational", "RationalTriton1DGroup"):
        found["released Triton"] = _Activation(in_float32(lambda x, a, b: released.apply(x, a, b, GROUPS)), (a, b))
    if flash := load("rational_kat.kernels.flash_rational_triton", "FlashRationalTriton1DGroup"):
        found["FlashKAT"] = _Activation(in_float32(flash.apply), (a, b))
    if rat_cuda := load("rational_kat_cu", "rat_cuda"):
        shared = a[0].detach().clone().requires_grad_()
        found["felippe-alves' Triton"] = _Activation(
            in_float32(lambda x, a, b: rat_cuda(x.flatten(0, -2), a, b).view_as(x)), (shared, b)
        )
    return found


def _swish(order: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    """Return numerator and denominator of all groups, as trainable leaves."""
    rows = table.coefficients("swish", order)
    return tuple(torch.tensor([row] * GROUPS, device=device).requires_grad_() for row in rows)


def activations(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, pass_: str, compiles: bool
) -> dict[str, Rival]:
    """Return grkan's function, other ways to compute it, and other functions."""
    torch.manual_seed(0)
    x, value, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    x.requires_grad_()
    value.requires_grad_()
    rational, longer = (_swish(order, device) for order in ((5, 4), (7, 6)))
    curve = (torch.randn(GROUPS, GRID + ORDER, device=device).requires_grad_(),)
    poly = _leaves(device, [1 / 3] * 3, 0.0)
    bends = _leaves(device, math.log(math.expm1(0.8)), math.log(math.expm1(0.3)))  # a_p = a_n = 0.8
    entries = {
        "clone": _Activation(torch.clone),
        "GELU": _Activation(F.gelu),
        "SiLU": _Activation(F.silu),
        "ReLU squared": _Activation(relu_squared),
        "SwiGLU": _Activation(swiglu, second=(value,)),
        "PolyNorm": _Activation(polynorm, poly),
        "xIELU": _Activation(xielu, bends),
        "powers in a loop": _Activation(rational_by_loop, rational),
        "powers at once": _Activation(rational_by_powers, rational),
        "Horner": _Activation(rational_by_horner, rational),
        "B-spline": _Activation(spline, curve),
        "grkan (5,4)": _Activation(group_rational, rational),
        "grkan (7,6)": _Activation(group_rational, longer),
    }
    if device == "cuda":
        entries |= _installed_kernels(rational)
    if compiles:
        for name in ("PolyNorm", "xIELU", "Horner", "B-spline"):
            entries[f"{name}, compiled"] = entries[name]._replace(function=_compiled(entries[name].function))
    if device != "cpu":  # rivals that keep all powers or bases take tens of gigabytes for such tensors
        entries = {name: entry for name, entry in entries.items() if "powers" not in name and "spline" not in name}

    def traffic(name: str, entry: _Activation) -> int:
        """Count the bytes: a forward reads inputs and writes y; a backward reads inputs and grad and writes gradients.

        The backward of clone does nothing.
        """
        inputs = 1 + len(entry.second)
        tensors = inputs + 1 if pass_ == FORWARD or name == "clone" else 3 * inputs + 2
        return tensors * x.nbytes

    return {
        name: Rival(
            _pass(pass_, entry.function, x, entry.second + entry.learned, grad),
            {"bytes kept": bytes_kept(entry.function, x, entry.second, entry.learned)} if pass_ == TRAINING else {},
            traffic=traffic(name, entry),
        )
        for name, entry in entries.items()
    }


def _leaves(device: str, *values: Any) -> tuple[Tensor, ...]:
    """Return trainable tensors."""
    return tuple(torch.tensor(value, device=device).requires_grad_() for value in values)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function for one shape, which gives faster code than for all shapes."""
    torch.compiler.reset()  # a function may be compiled for a few shapes only
    return torch.compile(function, fullgraph=True, dynamic=False)


def why_no_compiler(device: str) -> str | None:
    """Return why `torch.compile` does not work here, or None if it does."""
    try:
        _compiled(torch.sin)(torch.zeros(16, device=device))
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return None


# A single call on next to nothing.


class _Nothing(torch.autograd.Function):
    """An operation of three arguments that computes nothing: it shows the cost of autograd in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def single_calls(device: str, pass_: str) -> dict[str, Rival]:
    """Return calls with a gradient on 192 scalars, and the parts of grkan's call."""
    x, grad = torch.randn(2, 1, 192, device=device)
    x.requires_grad_()
    a, b = learned = _swish((5, 4), device)
    kernel = dispatch.find_kernel(device) or dispatch.REFERENCE

    def alone() -> None:
        with torch.no_grad():
            kernel.forward(x, a, b, "abs_of_sum", 192 // GROUPS)
            if pass_ == TRAINING:
                kernel.backward(grad, x, a, b, "abs_of_sum", 192 // GROUPS, False)

    def rival(function: Callable[..., Tensor], *learned: Tensor) -> Rival:
        # Unlike elsewhere, the forward is recorded by autograd, because that is part of the call.
        return Rival(partial(function, x, *learned) if pass_ == FORWARD else _pass(pass_, function, x, learned, grad))

    return {
        "GELU": rival(F.gelu),
        "SiLU": rival(F.silu),
        "grkan": rival(group_rational, *learned),
        "its kernel, without autograd": Rival(alone),
        "an empty autograd.Function": rival(_Nothing.apply, *learned),
    }


# Layers and models. On a GPU they run as models are trained there, under autocast to bfloat16.


def precision_of(device: str) -> dict[str, str]:
    """Describe the precision of layers and models on a device, for the job of a contest."""
    return {"precision": "autocast to bfloat16"} if device == "cuda" else {}


def _precision(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()


def mlps(device: str, shape: tuple[int, int, int], pass_: str) -> dict[str, Rival]:
    """Return a transformer's MLP, pairs of B-spline KAN layers, and GRKAN: widths d, 4d, d; x is (N, tokens, d).

    B-splines need tens of gigabytes for the tensors of a GPU, so they are left out there.
    """
    from timm.layers import Mlp

    torch.manual_seed(0)
    x, grad = torch.randn(shape, device=device).requires_grad_(), torch.randn(shape, device=device)
    width = shape[-1]
    hidden = 4 * width
    products = 2 * 2 * width * hidden
    # Operations per token as the paper counts them: a B-spline KAN evaluates the bases anew for every weight.
    edge = round(9 * ORDER * (GRID + 1.5 * ORDER) + 2 * GRID - 2.5 * ORDER + 3)
    entries = {
        "Mlp": (Mlp(width, hidden), products),
        "B-spline KAN": (_spline_pair(width, hidden), 2 * width * hidden * edge),
        "B-spline KAN, hidden d": (_spline_pair(width, width), 2 * width * width * edge),
        "GRKAN": (GRKAN(width, hidden, num_groups=GROUPS), products + (2 * 5 + 2 * 4 + 3) * (width + hidden)),
    }
    if device == "cuda":
        entries = {name: entry for name, entry in entries.items() if "spline" not in name}
    rivals = {}
    for name, (module, operations) in entries.items():
        module.to(device)
        call = _pass(pass_, _functional(module, device), x, tuple(module.parameters()), grad)
        facts = {}
        if pass_ == TRAINING:
            with _precision(device):
                kept = bytes_kept(module, x)
            facts = {
                "parameters": sum(p.numel() for p in module.parameters()),
                "operations a token": operations,
                "multiply-adds a token": count_operations(module, shape[1:])["multiply_adds"] // shape[1],
                "bytes kept": kept,
            }
        rivals[name] = Rival(call, facts)
    return rivals


def _spline_pair(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(SplineKAN(width, hidden), SplineKAN(hidden, width))


def _functional(module: nn.Module, device: str) -> Callable[..., Tensor]:
    """Return a call of the module that ignores the given parameters; they are passed only to get their gradients."""

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        with _precision(device):
            return cast(Tensor, module(x)).to(x.dtype)

    return call


def vision_models(device: str, names: Sequence[str], batch: int, pass_: str) -> dict[str, Rival]:
    """Return models of timm's registry: a training step with AdamW, or inference."""
    import timm

    torch.manual_seed(0)
    rivals = {}
    for name in names:
        model = timm.create_model(name).to(device)
        images = torch.randn(batch, *model.default_cfg["input_size"], device=device)
        if pass_ == INFERENCE:
            rivals[name] = Rival(partial(_infer, model.eval(), images))
            continue
        labels = torch.randint(model.num_classes, (batch,), device=device)
        # A learning rate so low that the model does not change during the measurement.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8)
        parameters = sum(p.numel() for p in model.parameters())
        with _precision(device):
            facts = {"parameters": parameters, "bytes kept": bytes_kept(model, images)}
        rivals[name] = Rival(partial(_train_step, model, optimizer, images, labels), facts)
    return rivals


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    with _precision(images.device.type):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()


@torch.inference_mode()
def _infer(model: nn.Module, images: Tensor) -> Tensor:
    with _precision(images.device.type):
        return cast(Tensor, model(images))
