"""The functions that have a name: their exact values, and that the stored coefficients do what their entries say."""

import json
import math
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import torch
from numpy.polynomial.polynomial import polyval

from grkan.rational import table
from grkan.rational.reference import FORMS

ORDERS = [(5, 4), (7, 6)]
ENTRIES = json.loads(resources.files("grkan.rational").joinpath("coefficients.json").read_text())


def label(entry):
    return f"{entry['name']}-{entry['form']}-{entry['order']}"


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Each function by its formula, one float at a time.
FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "tanh": math.tanh,
    "sigmoid": sigmoid,
    "softplus": lambda x: math.log1p(math.exp(x)),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    "squared_relu": lambda x: max(x, 0.0) ** 2,
}


def test_every_name_has_its_formula_here():
    assert set(table.NAMES) == set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_exact_is_the_formula(name):
    x = np.linspace(-9, 9, 181)
    expected = torch.tensor([FORMULAS[name](float(v)) for v in x], dtype=torch.float64)
    torch.testing.assert_close(table.exact(name)(torch.from_numpy(x)), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_keeps_the_dtype(dtype):
    for name in table.NAMES:
        assert table.exact(name)(torch.ones(2, dtype=dtype)).dtype == dtype, name


def test_swish_is_silu():
    assert table.canonical_name("swish") == table.canonical_name("silu") == "silu"
    assert table.coefficients("swish", (5, 4), "abs_of_sum") == table.coefficients("silu", (5, 4), "abs_of_sum")


def test_an_unknown_name_is_answered_with_the_names():
    with pytest.raises(ValueError, match=r"'hardswish'.*'swish'; got 'Gelu'; did you mean 'gelu'\?$"):
        table.canonical_name("Gelu")
    with pytest.raises(ValueError, match=r"got 'xyz'$"):
        table.canonical_name("xyz")


def test_a_name_is_a_string():
    with pytest.raises(TypeError, match=r"name must be a string; got int"):
        table.canonical_name(3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), ORDERS)
@pytest.mark.parametrize("name", table.NAMES)
def test_the_table_covers_every_name(name, m, n, form):
    numerator, denominator = table.coefficients(name, (m, n), form)
    assert (len(numerator), len(denominator)) == (m + 1, n)
    assert all(isinstance(c, float) and math.isfinite(c) for c in numerator + denominator)
    low, high = table.interval(name, (m, n), form)
    assert low < 0 < high


@pytest.mark.parametrize("order", [(1, 0), (1, 3), (5, 4), (6, 0), (9, 2)])
def test_the_identity_needs_no_table(order):
    m, n = order
    assert table.coefficients("identity", order, "sum_of_abs") == ([0.0, 1.0] + [0.0] * (m - 1), [0.0] * n)


@pytest.mark.parametrize(("name", "order"), [("gelu", (3, 2)), ("identity", (0, 4))])
def test_an_order_outside_of_the_table(name, order):
    with pytest.raises(table.NotInTableError, match=rf"no '{name}' of order \({order[0]}, {order[1]}\).*grkan.fit"):
        table.coefficients(name, order, "abs_of_sum")
    assert table.interval(name, order, "abs_of_sum") == table.DEFAULT_INTERVAL


def test_not_in_table_is_a_key_error():
    assert issubclass(table.NotInTableError, KeyError)


@pytest.mark.parametrize("name", ["gelu", "identity"])
@pytest.mark.parametrize("function", [table.coefficients, table.interval])
def test_an_unknown_form(function, name):
    with pytest.raises(ValueError, match=r"form must be 'abs_of_sum' or 'sum_of_abs'; got 'both'"):
        function(name, (5, 4), "both")


def test_coefficients_are_the_callers_to_change():
    numerator, denominator = table.coefficients("gelu", (5, 4), "abs_of_sum")
    numerator[0] = denominator[0] = 7.0
    again = table.coefficients("gelu", (5, 4), "abs_of_sum")
    assert 7.0 not in again[0]
    assert 7.0 not in again[1]


def evaluate(entry, x):
    numerator, denominator = np.array(entry["numerator"]), np.array(entry["denominator"])
    if entry["form"] == "abs_of_sum":
        q = 1 + np.abs(polyval(x, np.append(0.0, denominator)))
    else:
        q = 1 + polyval(np.abs(x), np.append(0.0, np.abs(denominator)))
    return polyval(x, numerator) / q


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_the_stored_errors_are_true(entry):
    x = np.linspace(*entry["interval"], 200_001)
    error = evaluate(entry, x) - table.exact(entry["name"])(torch.from_numpy(x)).numpy()
    # The extrema lie between the points, but not by much.
    assert np.abs(error).max() == pytest.approx(entry["max_error"], rel=1e-3)
    assert np.sqrt(np.mean(error**2)) == pytest.approx(entry["rms_error"], rel=1e-3)


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_beyond_the_interval_the_fits_stay_near_their_targets(entry):
    low, high = entry["interval"]
    f = table.exact(entry["name"])
    largest = f(torch.linspace(low, high, 1001, dtype=torch.float64)).abs().max().item()
    distance = np.linspace(0.02, 1, 5000)
    x = np.concatenate([low - distance * (high - low), high + distance * (high - low)])
    error = np.abs(evaluate(entry, x) - f(torch.from_numpy(x)).numpy())
    # The factor that fit.py gives, and what it tolerates.
    assert (error <= 1.03 * 1.5 * largest * np.tile(distance, 2)).all()
    if entry["form"] == "abs_of_sum":  # a zero of A would be a spike
        zeros = np.roots([*entry["denominator"][::-1], 0.0])
        assert not np.any((np.abs(zeros.imag) < 1e-9) & (np.abs(zeros) > high) & (np.abs(zeros) < 1.49 * 3 * high))


@pytest.mark.parametrize(
    ("name", "order", "bound"),
    [
        ("gelu", (5, 4), 6.7e-3),
        ("silu", (5, 4), 1.7e-3),
        ("tanh", (5, 4), 9.8e-4),
        ("gelu", (7, 6), 3.4e-3),
        ("silu", (7, 6), 4.0e-6),
    ],
)
def test_the_default_form_is_this_close_on_minus_10_to_10(name, order, bound):
    entry = next(e for e in ENTRIES if (e["name"], e["form"], tuple(e["order"])) == (name, "abs_of_sum", order))
    assert entry["interval"] == [-10, 10]
    assert entry["max_error"] <= bound


def test_the_table_is_read_with_torch_alone():
    code = """
import sys
sys.modules["scipy"] = None
from grkan.rational import table
print(len(table.coefficients("gelu", (5, 4), "abs_of_sum")[0]), [m for m in sys.modules if m.startswith("scipy.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "6 []\n", done.stderr
