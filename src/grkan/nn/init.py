"""Variance-preserving initialisation."""

import copy
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

from ..errors import GrkanRuntimeError, GrkanTypeError, GrkanValueError
from ..rational import reference, table
from ..rational.arguments import check_form, evaluate, to_float64
from .kinds import is_conv1d

WEIGHT_INITS = ("variance_preserving", "trunc_normal")

# The normal density is 2e-32 at 12. Most functions have kinks at whole numbers, or none; a kink between two steps of
# 1/512 causes an error below 1e-6.
_REACH, _STEPS_PER_UNIT = 12, 512

# How many values of a weight are compared to see if an initialiser wrote to it: writing to `.data` counts no version.
_SAMPLE = 16
_keeping = threading.local()


@unset_fake_temporarily()
def variance_gain(function_or_numerator: Any, denominator: Any = None, *, form: str = "abs_of_sum") -> float:
    """Compute the gain alpha = 1 / E[F(z)^2] for z standard normal (arXiv 2409.10594, Eq. 20 and Table 3).

    A weight w ~ N(0, alpha / d) after F keeps the mean square of a standard normal input of width d.

    Args:
        function_or_numerator: a name of `grkan.fit`, meaning the exact function and not a fit to it; a callable on
            numpy arrays or tensors; a `RationalFit` or a `GroupRational`; or the numerator of coefficients, (m + 1,)
            or (G or 1, m + 1), with a_0 first.
        denominator: (n,) or (G or 1, n), with b_1 first; only for a numerator.
        form: "abs_of_sum" or "sum_of_abs", for coefficients. A `RationalFit` or a `GroupRational` has its own.

    Returns:
        The gain, by Simpson's rule in float64. For several groups 1 / (mean over the groups of E[F^2]).

    Raises:
        TypeError: the function is none of these things; a numerator comes without a denominator; or a callable takes
            neither arrays nor tensors, or does not return real numbers.
        ValueError: the name or form is unknown; shapes do not fit; or the function is zero or not finite.
    """
    check_form(form)
    f = function_or_numerator
    z = torch.arange(-_REACH * _STEPS_PER_UNIT, _REACH * _STEPS_PER_UNIT + 1, dtype=torch.float64, device="cpu")
    z /= _STEPS_PER_UNIT
    density = torch.exp(-0.5 * z * z) / (2 * torch.pi) ** 0.5
    with torch.no_grad():
        if denominator is not None:
            values = _evaluate(f, denominator, form, z)
        elif isinstance(f, str):
            values = table.exact(table.canonical_name(f, "function_or_numerator"))(z)
        elif (found := fitted(f)) is not None:
            values = _evaluate(*found, z)
        elif callable(f):
            values = evaluate("function_or_numerator", f, z)
        else:
            raise GrkanTypeError(
                "function_or_numerator must be a name, a callable, a RationalFit, or a numerator with its denominator; "
                f"got {type(f).__name__} and no denominator"
            )
    integrand = values.square() * density
    fine, coarse = torch.trapezoid(integrand, z), torch.trapezoid(integrand[..., ::2], z[::2])
    power = ((4 * fine - coarse) / 3).mean().item()
    if not 0 < power < float("inf"):
        raise GrkanValueError(f"E[F(z)^2] must be positive and finite, because the gain is its inverse; got {power}")
    return 1.0 / power


def fitted(value: Any) -> tuple[Any, Any, str] | None:
    """Return numerator, denominator and form of a `GroupRational`, a `RationalFit` or a look-alike, or None.

    It looks at attributes because importing the classes would need SciPy, or be circular.
    """
    if not all(hasattr(value, name) for name in ("numerator", "denominator", "form")):
        return None
    coefficients = value.coefficients() if hasattr(value, "coefficients") else (value.numerator, value.denominator)
    return (*coefficients, value.form)


@unset_fake_temporarily()
def initial_gain(act: Any) -> float:
    """Compute the gain of a module's initial function; parameters are not read, as they have no values on meta."""
    if not hasattr(act, "initial_coefficients"):
        return variance_gain(act)
    return variance_gain(*act.initial_coefficients(), form=act.form)


def init_linear_(layer: Any, gain: float, scheme: str = "variance_preserving") -> None:
    """Draw the weight of a linear layer, and set its bias to zero.

    Args:
        layer: a linear layer, a convolution, or transformers' Conv1D.
        gain: alpha; "variance_preserving" draws from N(0, alpha / fan_in).
        scheme: "variance_preserving"; or "trunc_normal", the standard deviation 0.02 whatever the gain, which is the
            effect of the released code's initialisation.
    """
    for _, draw in _parts_of_linear(layer, gain, scheme):
        draw()


def init_stacks_(module: Any, starts: Mapping[str, tuple[float, int]]) -> None:
    """Draw the linear layers of experts, whose weights are stacked in one parameter, and set their biases to zero.

    Args:
        module: holds the parameters, and maybe their biases, under the same name with "_bias".
        starts: for the name of each parameter, (experts, rows, columns): the gain, and the dimension of the inputs.
    """
    for _, draw in _parts_of_stacks(module, starts):
        draw()


def _parts_of_linear(layer: Any, gain: float, scheme: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the names of the parameters, each with a function that initialises it."""
    weight = layer.weight
    fan_in = weight.shape[0] if is_conv1d(layer) else math.prod(weight.shape[1:])
    yield "weight", partial(_draw, weight, gain / fan_in, scheme)
    if layer.bias is not None:
        yield "bias", partial(nn.init.zeros_, layer.bias)


def _parts_of_stacks(
    module: Any, starts: Mapping[str, tuple[float, int]]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the names of the parameters, each with a function that initialises it."""
    for name, (gain, inputs) in starts.items():
        weight = getattr(module, name)
        yield name, partial(_draw, weight, gain / weight.shape[inputs], "variance_preserving")
        if isinstance(bias := getattr(module, f"{name}_bias", None), nn.Parameter):
            yield f"{name}_bias", partial(nn.init.zeros_, bias)


def _draw(weight: Tensor, variance: float, scheme: str) -> None:
    # Draw a sharded weight whole: on a CPU, processes with the same seed would draw the same values for their parts.
    drawn = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if is_sharded(weight) else weight
    if scheme == "trunc_normal":
        nn.init.trunc_normal_(drawn, std=0.02)
    else:
        nn.init.normal_(drawn, std=variance**0.5)
    if drawn is not weight:
        assign_(weight, drawn, src_rank=0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing the module that defines DTensor."""
    return hasattr(tensor, "placements")


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor is on the device "meta", or was made under PyTorch's `FakeTensorMode`."""
    return tensor.is_meta or is_fake(tensor)


def assign_(parameter: Tensor, values: Tensor, src_rank: int | None = None) -> None:
    """Set a parameter, whole or sharded, to values of its shape.

    Args:
        parameter: on any device; a DTensor takes its part.
        values: of any dtype and device.
        src_rank: the rank whose values all processes take; None if all have the same.
    """
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        values = values.to(sharded.device, sharded.dtype)
        values = distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=src_rank)
    with torch.no_grad():
        parameter.copy_(values)


class Method:
    """A function as a method of one module: an attribute of that module that calls function(module, *args).

    It does not keep the module alive. A partial would, and then the memory of a deleted model stayed in use until
    Python's garbage collector ran. A copy of the module gets a method of the copy.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, *args: Any) -> None:
        self.function, self.args = function, args
        self.module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        module = self.module()
        if module is None:
            raise GrkanRuntimeError("this is a shallow copy of a layer that no longer exists; use copy.deepcopy")
        return self.function(module, *self.args, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Method":
        module: Any = self.module()
        return Method(self.function, memo.get(id(module), module), *copy.deepcopy(self.args, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Method, (self.function, self.module(), *self.args)


def remember_start(layer: nn.Module, gain: float, scheme: str = "variance_preserving") -> None:
    """Make `layer.reset_parameters()` call `init_linear_` with this gain and scheme.

    Sharders and deferred initialisation call it on all modules, in any order. A subclass of the linear layer is no
    option, because quantisers and adapters go by the class.
    """
    layer.reset_parameters = Method(init_linear_, layer, gain, scheme)  # type: ignore[assignment]


def keep_start(layer: nn.Module, gain: float) -> None:
    """Call `remember_start`, and mark the layer so that `starts_kept` protects its start from other initialisers."""
    remember_start(layer, gain)
    layer.keeps_start = True  # type: ignore[assignment]


def keep_stacks_start(module: nn.Module, starts: Mapping[str, tuple[float, int]]) -> None:
    """As `keep_start`, for a module with stacked weights; see `init_stacks_` for the arguments."""
    module.reset_parameters = Method(init_stacks_, module, starts)  # type: ignore[assignment]
    module.keeps_start = True  # type: ignore[assignment]


def _kept(layer: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the names of the parameters whose start is kept, each with a function that initialises it."""
    start = layer.reset_parameters
    parts = _parts_of_stacks if start.function is init_stacks_ else _parts_of_linear
    return parts(layer, *start.args)


@contextmanager
def starts_kept(module: nn.Module) -> Iterator[None]:
    """Draw anew, after the block, what the block wrote to the layers in `module` that `keep_start` marked.

    Parameters that the block does not write to stay, such as weights that transformers has loaded.
    """
    if getattr(_keeping, "now", False):  # an initialiser that is called by another one
        yield
        return
    layers: list[Any] = [layer for layer in module.modules() if getattr(layer, "keeps_start", False)]
    before = [(layer, name, _trace(getattr(layer, name))) for layer in layers for name, _ in _kept(layer)]
    _keeping.now = True
    try:
        yield
    finally:
        _keeping.now = False
    for layer, name, trace in before:
        if _differs(trace, _trace(getattr(layer, name))):
            dict(_kept(layer))[name]()


def _trace(tensor: Tensor) -> tuple[Any, ...]:
    """Record what shows later whether a tensor was replaced or written to."""
    if has_no_values(tensor):
        return tensor, 0, None
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    version = 0 if tensor.is_inference() else tensor._version
    return tensor, version, local.detach().flatten()[:_SAMPLE].clone()


def _differs(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    (tensor, version, sample), (now, version_now, sample_now) = before, after
    if tensor is not now or version != version_now:
        return True
    if sample is None or sample_now is None:
        return sample is not sample_now
    # Uninitialised memory may hold NaN, which is not equal to itself.
    return sample.shape != sample_now.shape or not torch.allclose(sample, sample_now, 0.0, 0.0, equal_nan=True)


def _evaluate(numerator: Any, denominator: Any, form: str, z: Tensor) -> Tensor:
    """Compute F of every group at z: [G, len(z)]."""
    a = torch.atleast_2d(to_float64("numerator", numerator))
    b = torch.atleast_2d(to_float64("denominator", denominator))
    groups = max(len(a), len(b))
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] == 0 or min(len(a), len(b)) not in (1, groups):
        raise GrkanValueError(
            "numerator must have shape (m + 1,) or (groups or 1, m + 1), and denominator (n,) or (groups or 1, n); "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return reference.rational(z.expand(groups, -1), a, b, form)
