"""What arguments have to be: the checks that fits, layers and models share.

Each returns what it checked, or raises a TypeError or ValueError that names the argument, the value, and what would be
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
    """An int, also from one of numpy or torch."""
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
    """A pair, or one value for both."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise GrkanValueError(f"{name} must be one value or a pair; got {value!r}")
    return check(name, pair[0]), check(name, pair[1])


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """One of a few strings; None may be among them."""
    known = " or ".join(map(repr, choices))
    if not isinstance(value, str) and not (value is None and None in choices):
        raise GrkanTypeError(f"{name} must be {known}; got {value!r}")
    if value not in choices:
        raise GrkanValueError(f"{name} must be {known}; got {value!r}")
    return value


def check_form(form: str) -> str:
    # Asked at every call of group_rational: the answer comes before the message is made.
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
    """The features, which the groups divide."""
    features, num_groups = check_positive(name, features), check_positive("num_groups", num_groups)
    if features % num_groups:
        raise GrkanValueError(f"{name} must be divisible by num_groups; got {features} and {num_groups}")
    return features


def check_module(name: str, value: nn.Module) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise GrkanTypeError(f"{name} must be a torch.nn.Module; got {_short(value)}")
    return value


def to_float64(name: str, values: Any) -> Tensor:
    """Real numbers of any kind as a float64 tensor on the CPU."""
    try:
        # By way of Python's numbers: neither a dtype nor the layout of an array gets in the way, and none becomes real.
        values = values.tolist() if hasattr(values, "tolist") else values
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise GrkanTypeError(f"{name} must be numbers; got {_short(values)}") from None


def evaluate(name: str, function: Callable[[Any], Any], x: Tensor) -> Tensor:
    """function(x), for a function on numpy arrays or, where it takes none, on tensors.

    Args:
        name: what the user calls the function.
        function: maps an array to an array of its shape; it may overwrite its argument.
        x: float64, on the CPU.

    Raises:
        TypeError: the function takes neither, or returns something else than real numbers.
        ValueError: it returns another shape.
    """
    with torch.no_grad():
        try:
            values = function(x.clone().numpy())
        except (AttributeError, RuntimeError, TypeError) as of_arrays:  # a RuntimeError where there is no numpy
            try:
                values = function(x.clone())
            except Exception as of_tensors:
                raise GrkanTypeError(
                    f"{name} must take a float64 array or tensor; got {_short(function)}, which says "
                    f"{str(of_arrays)!r} to an array and {str(of_tensors)!r} to a tensor"
                ) from of_tensors
    result = to_float64(f"what {name} returns", values)
    if result.shape != x.shape:
        raise GrkanValueError(
            f"{name} must return an array of the shape of its argument, {tuple(x.shape)}; got {tuple(result.shape)}"
        )
    return result


def _short(value: Any) -> str:
    """A representation that fits on one line."""
    return " ".join(reprlib.repr(value).split())
