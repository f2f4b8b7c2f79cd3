"""The shared checks: what they let through, and what they say to the rest."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grkan.rational import arguments, table


@pytest.mark.parametrize("seven", [7, np.int64(7), np.uint8(7), torch.tensor(7)])
def test_integers_of_any_kind_come_back_as_int(seven):
    assert type(arguments.check_integer("k", seven)) is int
    assert arguments.check_positive("k", seven) == 7
    order = arguments.check_order([seven, seven])
    assert order == (7, 7)
    assert [type(degree) for degree in order] == [int, int]


@pytest.mark.parametrize("value", ["7", 7.0, None, True, torch.tensor(7.5), np.array([7, 7]), int], ids=repr)
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match="k must be an int; got "):
        arguments.check_integer("k", value)


def test_a_pair_or_one_value_for_both():
    assert arguments.check_pair("drop", 0.5, arguments.check_probability) == (0.5, 0.5)
    assert arguments.check_pair("drop", (0, np.float32(1)), arguments.check_probability) == (0.0, 1.0)
    assert arguments.check_pair("bias", [True, False], arguments.check_flag) == (True, False)


def test_a_choice():
    assert arguments.check_choice("k", None, (None, "a")) is None
    assert arguments.check_choice("k", "a", (None, "a")) == "a"
    with pytest.raises(ValueError, match="k must be None or 'a'; got 'b'"):
        arguments.check_choice("k", "b", (None, "a"))
    with pytest.raises(TypeError, match="k must be None or 'a'; got 3"):
        arguments.check_choice("k", 3, (None, "a"))
    with pytest.raises(TypeError, match="k must be 'a'; got None"):
        arguments.check_choice("k", None, ("a",))


def test_real_numbers_of_any_kind_become_float64():
    third = 1 / 3
    backwards = np.array([third, 2.0])[::-1]
    long = np.array([2, third], dtype=np.longdouble)
    for values in ([2, third], backwards, long, torch.tensor([2, third], dtype=torch.float64)):
        assert arguments.to_float64("k", values).tolist() == [2.0, third]
    assert arguments.to_float64("k", nn.Parameter(torch.ones(1, dtype=torch.bfloat16))).dtype == torch.float64
    with torch.device("meta"):
        assert not arguments.to_float64("k", [1.0]).is_meta


@pytest.mark.parametrize(
    "values", ["1", None, [1j], np.array([1j]), torch.ones(1, device="meta"), nn.GELU(), [10**400]]
)
def test_what_are_no_numbers(values):
    with pytest.raises(TypeError, match="k must be numbers; got"):
        arguments.to_float64("k", values)


GELU = table.exact("gelu")(torch.linspace(-3, 3, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: np.vectorize(lambda v: v * (1 + math.erf(v / 2**0.5)) / 2)(x),
        lambda x: [v * (1 + math.erf(v / 2**0.5)) / 2 for v in x],
        lambda x: x * (1 + (x / 2**0.5).erf()) / 2,
        lambda x: torch.mul(x, torch.special.ndtr(x)),
        F.gelu,
        nn.GELU(),
        nn.Sequential(nn.GELU(), nn.Hardtanh(-9, 9, inplace=True)),
    ],
    ids=["array", "list", "tensor method", "tensor function", "F.gelu", "module", "modules"],
)
def test_functions_on_arrays_and_on_tensors(function):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(arguments.evaluate("f", function, x), GELU, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("in_place", [lambda x: np.exp(x, out=x), nn.ReLU(inplace=True)])
def test_a_function_may_overwrite_its_argument(in_place):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    arguments.evaluate("f", in_place, x)
    assert torch.equal(x, torch.linspace(-3, 3, 7, dtype=torch.float64))


def broken(x):
    raise KeyError("the user's own")


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (nn.GELU, TypeError, "the result of f must be numbers; got GELU"),
        (lambda x: nn.Sequential(nn.GELU()), TypeError, "the result of f must be numbers; got Sequential"),
        (nn.Tanh, TypeError, "f must take a float64 array or tensor; got .*positional argument"),
        (lambda x: "a", TypeError, "the result of f must be numbers; got 'a'"),
        (lambda x: x + 1j, TypeError, "the result of f must be numbers"),
        (lambda x: x.nonsense(), TypeError, "'numpy.ndarray' object has no .*'Tensor' object has no attribute"),
        (nn.Linear(3, 3), TypeError, "f must take a float64 array or tensor; got .* for a tensor"),
        (lambda x: x[:-1], ValueError, r"f must return an array of the same shape as its argument, \(7,\); got \(6,\)"),
        (lambda x: 1.0, ValueError, r"f must return an array of the same shape as its argument, \(7,\); got \(\)"),
        (broken, KeyError, "the user's own"),
    ],
)
def test_functions_that_cannot_be_evaluated(function, error, match):
    with pytest.raises(error, match=match) as caught:
        arguments.evaluate("f", function, torch.linspace(-3, 3, 7, dtype=torch.float64))
    assert "\n" not in str(caught.value)
