"""The named functions: their exact definitions, and the coefficients of the rational functions fitted to them.

`python -m grkan.rational.fit` made `coefficients.json`; `fit.py` says how, and why on the interval [-10, 10]. The file
covers every name in both forms at the orders (5, 4) and (7, 6), except the identity, which needs no table. Reading it
needs only torch.
"""

import difflib
import json
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import GrkanTypeError, GrkanValueError
from .arguments import check_form


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "squared_relu": _squared_relu,
}

_ALIASES = {"swish": "silu"}

NAMES = tuple(_EXACT)
"""Every name, without aliases."""

DEFAULT_INTERVAL = (-10.0, 10.0)
"""The interval of a fit if none is given."""


class NotInTableError(KeyError):
    """The table has no coefficients of this order; `grkan.fit` can find them."""


def canonical_name(name: str, argument: str = "name") -> str:
    """Return the name itself, or the name that it is an alias of: "swish" gives "silu".

    Raises:
        TypeError: `name` is not a string; the messages call it `argument`.
        ValueError: no function has that name; the message lists all names, then the nearest one.
    """
    if not isinstance(name, str):
        raise GrkanTypeError(f"{argument} must be a string; got {type(name).__name__}")
    canonical = _ALIASES.get(name, name)
    if canonical not in _EXACT:
        known = [*NAMES, *_ALIASES]
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise GrkanValueError(
            f"{argument} must be one of {', '.join(map(repr, known))}; got {name!r}; {hint}".rstrip("; ")
        )
    return canonical


def exact(name: str) -> Callable[[Tensor], Tensor]:
    """Return the exact function of a name, for tensors of any floating dtype; gelu uses erf, leaky_relu slope 0.01.

    Raises:
        TypeError, ValueError: as for `canonical_name`.
    """
    return _EXACT[canonical_name(name)]


def coefficients(name: str, order: tuple[int, int], form: str = "abs_of_sum") -> tuple[list[float], list[float]]:
    """Look up the coefficients of F for a name.

    The identity is exact for every order with m >= 1, without a table: a_1 = 1 and all others 0.

    Args:
        name: one of `NAMES`, or "swish".
        order: (m, n), the degrees of numerator and denominator.
        form: "abs_of_sum" or "sum_of_abs".

    Returns:
        numerator, m + 1 numbers, a_0 first; denominator, n numbers, b_1 first.

    Raises:
        TypeError, ValueError: an unknown name or form.
        NotInTableError: the table does not cover the order; it is a KeyError.
    """
    m, n = order
    if canonical_name(name) == "identity" and m >= 1:
        check_form(form)
        return [0.0, 1.0] + [0.0] * (m - 1), [0.0] * n
    entry = _entry(name, order, form)
    if entry is None:
        orders = ", ".join(sorted({str(key[2]) for key in _table()}))
        raise NotInTableError(
            f"the table has no {name!r} of order {tuple(order)}; it has {orders}; use grkan.fit for others"
        )
    return list(entry["numerator"]), list(entry["denominator"])


def interval(name: str, order: tuple[int, int], form: str = "abs_of_sum") -> tuple[float, float]:
    """Return the interval of the table's fit, or `DEFAULT_INTERVAL` for an order that the table does not cover.

    Raises:
        TypeError, ValueError: an unknown name or form.
    """
    entry = _entry(name, order, form)
    return DEFAULT_INTERVAL if entry is None else (entry["interval"][0], entry["interval"][1])


def _entry(name: str, order: tuple[int, int], form: str) -> dict[str, Any] | None:
    check_form(form)
    return _table().get((canonical_name(name), form, tuple(order)))


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, str, tuple[int, ...]], dict[str, Any]]:
    text = resources.files(__package__).joinpath("coefficients.json").read_text(encoding="utf-8")
    return {(entry["name"], entry["form"], tuple(entry["order"])): entry for entry in json.loads(text)}
