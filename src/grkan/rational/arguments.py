"""Argument checks that fits, layers and models share.

Each check returns the value, or raises a TypeError or ValueError that names the argument, the value, and what would be
right.
"""

import operator
import reprlib
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrkanTypeError, GrkanValueError
from .reference import FORMS


def check_flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise GrkanTypeError(f"{name} must be a bool; got {value!r}")
    return value


def check_integer(name: str, value: int) -> int:
    """Return the value as an int; integers of numpy and torch are accepted."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise GrkanTypeError(f"{name} must be an int; got {value!r}") from None


def check_positive(name: str, value: int) -> int:
    value = check_integer(name, value)
    if value < 1:
        raise GrkanValueError(f"{name} must be at least 1; got {value}")
    return value


def check_probability(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise GrkanTypeError(f"{name} must be a number; got {value!r}")
    if not 0 <= value <= 1:
        raise GrkanValueError(f"{name} must lie in [0, 1]; got {value}")
    return float(value)


def check_not_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise GrkanTypeError(f"{name} must be a number; got {value!r}")
    if not value >= 0:
        raise GrkanValueError(f"{name} must not be negative; got {value}")
    return value


def check_pair(name: str, value: Any, check: Callable[[str, Any], Any]) -> tuple[Any, Any]:
    """Check a pair, or one value that stands for both."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise GrkanValueError(f"{name} must be one value or a pair; got {value!r}")
    return check(name, pair[0]), check(name, pair[1])


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Check that the value is one of a few strings; None may be among them."""
    known = " or ".join(map(repr, choices))
    if not isinstance(value, str) and not (value is None and None in choices):
        raise GrkanTypeError(f"{name} must be {known}; got {value!r}")
    if value not in choices:
        raise GrkanValueError(f"{name} must be {known}; got {value!r}")
    return value


def check_form(form: str) -> str:
    # Every call of group_rational runs this, so test before building any message.
    return form if form in FORMS else str(check_choice("form", form, FORMS))


def check_order(order: tuple[int, int]) -> tuple[int, int]:
    message = f"order must be a pair (m, n) of ints, m >= 0 and n >= 0; got {order!r}"
    if not isinstance(order, Sequence) or isinstance(order, str):
        raise GrkanTypeError(message)
    if len(order) != 2:
        raise GrkanValueError(message)
    try:
        m, n = (check_integer("order", degree) for degree in order)
    except TypeError:
        raise GrkanTypeError(message) from None
    if min(m, n) < 0:
        raise GrkanValueError(message)
    return m, n


def check_groups(name: str, features: int, num_groups: int) -> int:
    """Return the number of features, after checking that num_groups divides it."""
    features, num_groups = check_positive(name, features), check_positive("num_groups", num_groups)
    if features % num_groups:
        raise GrkanValueError(f"{name} must be divisible by num_groups, {num_groups}; got {features}")
    return features


def check_module(name: str, value: nn.Module) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise GrkanTypeError(f"{name} must be a torch.nn.Module; got {_short(value)}")
    return value


def to_float64(name: str, values: Any) -> Tensor:
    """Convert real numbers of any kind to a float64 tensor on the CPU."""
    try:
        # Go through Python numbers: then the array's dtype and layout do not matter, and complex numbers fail.
        values = values.tolist() if hasattr(values, "tolist") else values
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise GrkanTypeError(f"{name} must be numbers; got {_short(values)}") from None


def evaluate(name: str, function: Callable[[Any], Any], x: Tensor) -> Tensor:
    """Compute function(x); the function takes numpy arrays or, if it fails on those, tensors.

    Args:
        name: the name of the argument, for error messages.
        function: maps an array to an array of its shape; it may overwrite its argument.
        x: float64, on the CPU.

    Raises:
        TypeError: the function takes neither arrays nor tensors, or does not return real numbers.
        ValueError: the result has another shape than x.
    """
    with torch.no_grad():
        try:
            values = function(x.clone().numpy())
        except (AttributeError, RuntimeError, TypeError) as of_arrays:  # a RuntimeError where there is no numpy
            try:
                values = function(x.clone())
            except Exception as of_tensors:
                raise GrkanTypeError(
                    f"{name} must take a float64 array or tensor; got {_short(function)}, which raises "
                    f"{str(of_arrays)!r} for an array and {str(of_tensors)!r} for a tensor"
                ) from of_tensors
    result = to_float64(f"the result of {name}", values)
    if result.shape != x.shape:
        raise GrkanValueError(
            f"{name} must return an array of the same shape as its argument, "
            f"{tuple(x.shape)}; got {tuple(result.shape)}"
        )
    return result


def _short(value: Any) -> str:
    """Shorten the repr of a value to one line."""
    return " ".join(reprlib.repr(value).split())
