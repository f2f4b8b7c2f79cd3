"""The definition against exact arithmetic: values and gradients in mpmath, over the whole range of x."""

import itertools
import math

import hypothesis.strategies as st
import mpmath
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings

from grkan.rational import cpu
from grkan.rational.reference import FORMS, rational, rational_backward

mpmath.mp.dps = 60
EXTREMES = [1e-30, 1e-20, 1e-10, 1e-3, 0.5, 1.0, 30.0, 1e3, 6e4, 1e6, 4e7, 1e10, 1e20, 1e30, 3e38]
BOTH_SIGNS = [sign * x for x in EXTREMES for sign in (1, -1)]

# (numerator, denominator): what breaks a formula that is only right in the middle.
COEFFICIENTS = {
    "identity": ([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    "full": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.05], [0.3, -0.5, 0.2, 0.07]),
    "negative leading": ([-0.1, 0.9, 0.4, -0.3, 0.2, -0.05], [0.3, 0.5, -0.2, -0.07]),
    "b partly zero": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.05], [0.0, 0.5, 0.0, 0.0]),
    "b_1 = 0": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.05], [0.0, -0.5, 0.0, 0.2]),
    "only b_1": ([0.1, 0.9, 0.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]),
    "a_m = 0": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.0], [0.3, -0.5, 0.2, 0.07]),
    "falls to zero": ([0.1, 0.9, 0.0, 0.0, 0.0, 0.0], [0.3, -0.5, 0.2, 0.07]),
    "b tiny": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.05], [0.0, 0.0, 0.0, 1e-20]),
    "grows beyond float32": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.05], [0.0, 0.0, 0.0, 0.0]),
    "order (7, 6)": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.05, -0.02, 0.01], [0.3, -0.5, 0.2, 0.07, 0.0, 0.02]),
    "polynomial": ([0.1, 0.9, -0.4], []),
    "constant": ([0.7], []),
    "constant over Q": ([0.7], [0.5, 0.2]),
    "order (3, 6)": ([0.1, 0.9, -0.4, 0.3], [0.3, -0.5, 0.2, 0.07, 0.1, 0.02]),
    "order (7, 7)": ([0.1, 0.9, -0.4, 0.3, 0.2, 0.05, -0.02, 0.01], [0.3, -0.5, 0.2, 0.07, 0.1, 0.02, 0.3]),
}
GRADIENTS = [1e-38, 1e-20, 1.0, 1e38]
KERNELS = {}  # the CPU kernel if it is built, with every instruction set


@pytest.fixture(scope="module", autouse=True)
def every_kernel(instruction_sets):
    KERNELS.update(instruction_sets)


def exact(x, a, b, form):
    """(F, dF/dx, [dF/da_i], [dF/db_j]), each as (value, scale): scale is what rounding errors are relative to."""
    x, a, b = mpmath.mpf(x), [mpmath.mpf(c) for c in a], [mpmath.mpf(c) for c in b]
    t = abs(x) if form == "sum_of_abs" else x
    sign_x = mpmath.mpf(-1 if x < 0 and form == "sum_of_abs" else 1)
    magnitudes = [abs(c) for c in b] if form == "sum_of_abs" else b
    inner = sum((c * t**j for j, c in enumerate(magnitudes, 1)), mpmath.mpf(0))
    slope = sign_x * sum((j * c * t ** (j - 1) for j, c in enumerate(magnitudes, 1)), mpmath.mpf(0))
    sign = -1 if inner < 0 else 1
    p, dp = sum(c * x**i for i, c in enumerate(a)), sum(i * c * x ** (i - 1) for i, c in enumerate(a) if i)
    q = 1 + abs(inner)

    def absolute(coefficients, first):
        return sum((abs(c * x**k) for k, c in enumerate(coefficients, first)), mpmath.mpf(0))

    p_scale, inner_scale = absolute(a, 0), absolute(b, 1)
    dp_scale = sum((i * abs(c * x ** (i - 1)) for i, c in enumerate(a) if i), mpmath.mpf(0))
    slope_scale = sum((j * abs(c * x ** (j - 1)) for j, c in enumerate(b, 1)), mpmath.mpf(0))
    q_error = 1 + inner_scale / q
    value = (p / q, p_scale / q * q_error)
    dx = (
        dp / q - sign * p * slope / q**2,
        (dp_scale / q + p_scale * slope_scale / q**2) * q_error,
    )
    da = [(x**i / q, abs(x) ** i / q * q_error) for i in range(len(a))]
    signs_b = [mpmath.mpf(-1 if c < 0 and form == "sum_of_abs" else 1) for c in b]
    db = [(-sign * s * p * t**j / q**2, p_scale * abs(x) ** j / q**2 * q_error) for j, s in enumerate(signs_b, 1)]
    return value, dx, da, db


def exact_slopes(x, a, b, form):
    """(d2F/dx2, [d2F/dx da_i], [d2F/dx db_j]), each as (value, scale)."""
    x, a, b = mpmath.mpf(x), [mpmath.mpf(c) for c in a], [mpmath.mpf(c) for c in b]
    absolute = form == "sum_of_abs"
    t = abs(x) if absolute else x
    sign_x = -1 if absolute and x < 0 else 1
    magnitudes = [abs(c) for c in b] if absolute else b

    def derivative(coefficients, first, x, order):
        """Of a polynomial, and the sum of the absolute terms."""
        terms = [c * mpmath.ff(k, order) * x ** max(k - order, 0) for k, c in enumerate(coefficients, first)]
        return sum(terms, mpmath.mpf(0)), sum(map(abs, terms), mpmath.mpf(0))

    p, inner = ([derivative(c, first, y, k) for k in range(3)] for c, first, y in ((a, 0, x), (magnitudes, 1, t)))
    inner[1] = sign_x * inner[1][0], inner[1][1]
    s, q = -1 if inner[0][0] < 0 else 1, 1 + abs(inner[0][0])
    q_error = 1 + inner[0][1] / q

    def add(*terms):
        """The sum of factor, numbers, and power of Q that divides them."""
        value = sum(factor * mpmath.fprod(n[0] for n in numbers) / q**k for factor, numbers, k in terms)
        scale = sum(abs(factor) * mpmath.fprod(n[1] for n in numbers) / q**k for factor, numbers, k in terms)
        return value, scale * q_error**3

    def power(x, k, factor=1):
        value = factor * x**k if k >= 0 else mpmath.mpf(0)
        return value, abs(value)

    second = add(
        (1, [p[2]], 1), (-2 * s, [p[1], inner[1]], 2), (-s, [p[0], inner[2]], 2), (2, [p[0], inner[1], inner[1]], 3)
    )
    of_a = [add((1, [power(x, i - 1, i)], 1), (-s, [power(x, i), inner[1]], 2)) for i in range(len(a))]
    of_b = []
    for j, c in enumerate(b, 1):
        sign_b = -1 if absolute and c < 0 else 1
        term, slope = power(t, j, sign_b), power(t, j - 1, sign_b * sign_x * j)
        of_b.append(add((-s, [p[1], term], 2), (-s, [p[0], slope], 2), (2, [p[0], inner[1], term], 3)))
    return second, of_a, of_b


def assert_rounds_to(actual, expected, dtype, what):
    """`actual` is `expected` up to 32 units in the last place of the terms that it is a sum of."""
    value, scale = expected
    info = torch.finfo(dtype)
    tolerance = 32 * info.eps * scale + 32 * info.tiny * info.eps
    if abs(value) + tolerance > info.max:
        assert abs(value) <= info.max or actual == math.copysign(math.inf, value), (
            f"{what}: {actual}, not {mpmath.nstr(value, 8)}"
        )
        return
    assert abs(mpmath.mpf(actual) - value) <= tolerance, f"{what}: {actual}, not {mpmath.nstr(value, 8)}"


def every_way(x, a, b, form, dtype):
    """Yield (name, F, dx, da, db) for one scalar: autograd of the definition, the closed form, a kernel if built."""
    x = torch.tensor([[x]], dtype=dtype, requires_grad=True)
    a = torch.tensor([a], dtype=dtype, requires_grad=True)
    b = torch.tensor([b], dtype=dtype, requires_grad=True)
    y = rational(x, a, b, form)
    gradients = torch.autograd.grad(y, (x, a, b), allow_unused=True, materialize_grads=True)
    closed = rational_backward(torch.ones_like(y), x, a, b, form)
    found = {"autograd": (y, *gradients), "closed form": (y, *closed)}
    inputs = [t.detach() for t in (x, a, b)]
    for name, computing in KERNELS.items():
        with computing():
            dx, da, db, y2 = cpu.backward(torch.ones_like(inputs[0]), *inputs, form, 1, True)
            found[f"the kernel's forward, {name}"] = (cpu.forward(*inputs, form, 1), dx, da, db)
            found[f"the kernel's backward, {name}"] = (y2, dx, da, db)
    for name, (y, dx, da, db) in found.items():
        yield name, y.item(), dx.item(), da[0].tolist(), db[0].tolist()


def assert_exact(x, a, b, form, dtype):
    # What the function sees are the rounded numbers.
    x, a, b = (torch.tensor(v, dtype=dtype).tolist() for v in (x, a, b))
    value, dx, da, db = exact(x, a, b, form)
    for way, got_value, got_dx, got_da, got_db in every_way(x, a, b, form, dtype):
        assert_rounds_to(got_value, value, dtype, f"F({x}) by {way}")
        assert_rounds_to(got_dx, dx, dtype, f"F'({x}) by {way}")
        for i, (got, expected) in enumerate(zip(got_da, da, strict=True)):
            assert_rounds_to(got, expected, dtype, f"da_{i}({x}) by {way}")
        for j, (got, expected) in enumerate(zip(got_db, db, strict=True), 1):
            assert_rounds_to(got, expected, dtype, f"db_{j}({x}) by {way}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_float32_is_exact_over_the_whole_range(name, form):
    for x in BOTH_SIGNS:
        assert_exact(x, *COEFFICIENTS[name], form, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_float64_is_exact_up_to_1e40(name, form):
    for x in [*BOTH_SIGNS, 1e40, -1e40]:
        assert_exact(x, *COEFFICIENTS[name], form, torch.float64)


def each_with_each(xs, a, b, dtype):
    """x, grad, numerator and denominator, in which each x meets each gradient in a group of its own."""
    x, grad = (torch.tensor(v, dtype=dtype)[None, :, None] for v in zip(*itertools.product(xs, GRADIENTS), strict=True))
    return x, grad, *(torch.tensor([c], dtype=dtype).expand(x.shape[1], -1).contiguous() for c in (a, b))


def times(grad, expected):
    """`exact` and `exact_slopes`, flat, times a gradient."""
    flat = [pair for entry in expected for pair in (entry if isinstance(entry, list) else [entry])]
    return [(value * grad, scale * abs(grad)) for value, scale in flat]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["identity", "full", "b_1 = 0", "b tiny", "order (3, 6)", "order (7, 6)", "order (7, 7)"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_large_gradients(dtype, name, form):
    """Nothing overflows or underflows on the way to a derivative of first or second order that does not itself."""
    xs = [1e-20, -0.5, 30.0, -4e3, 5e5, -1e20, 3e38, *([6e36, -1e40] if dtype is torch.float64 else [])]
    x, grad, a, b = each_with_each(xs, *COEFFICIENTS[name], dtype)
    # What is beside a scalar decides on the arithmetic, so each is computed alone, too.
    alone = [rational_backward(grad[:, i : i + 1], x[:, i : i + 1], a[:1], b[:1], form) for i in range(x.shape[1])]
    dx, da, db = zip(*alone, strict=True)
    found = {"closed form, alone": (torch.cat(dx, 1), torch.cat(da), torch.cat(db))}
    leaves = [t.requires_grad_() for t in (x, a, b)]
    found["autograd"] = torch.autograd.grad(rational(*leaves, form), leaves, grad, create_graph=True)
    found["closed form"] = rational_backward(grad, *leaves, form)
    slopes = {way: torch.autograd.grad(found[way][0].sum(), leaves) for way in ("autograd", "closed form")}
    for i, (at, g) in enumerate(zip(x.flatten().tolist(), grad.flatten().tolist(), strict=True)):
        numbers = at, a[0].tolist(), b[0].tolist(), form
        for kind, results, wanted in (
            ("first", found, exact(*numbers)[1:]),
            ("second", slopes, exact_slopes(*numbers)),
        ):
            for way, result in results.items():
                actual = torch.cat([result[0][0, i], *(t[i] for t in result[1:])]).tolist()
                for k, (got, pair) in enumerate(zip(actual, times(g, wanted), strict=True)):
                    assert_rounds_to(got, pair, dtype, f"{kind} derivative {k} at {at}, grad {g}, by {way}")


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
coefficient = st.floats(-16, 16, width=32).filter(lambda c: c == 0 or abs(c) > 1e-6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    x=finite,
    a=st.lists(coefficient, min_size=1, max_size=8),
    b=st.lists(coefficient, min_size=0, max_size=7),
    form=st.sampled_from(FORMS),
)
@example(x=-0.0, a=[0.0, 1.0], b=[0.0, 0.0], form="abs_of_sum")
@example(x=524288.0, a=[1.0] * 6, b=[1.0] * 4, form="abs_of_sum")
@example(x=16777216.0, a=[0.0] * 5 + [1e6], b=[0.0] * 3 + [1e6], form="abs_of_sum")  # room for the coefficients, too
@example(x=5442924.0, a=[1.0], b=[0.0, 0.0, 1.0], form="abs_of_sum")  # 1/Q^2 is no normal float32, F' is
@example(x=1e-30, a=[1.0], b=[0.0, 0.0, -1.0], form="abs_of_sum")  # A is no float32, but it has a sign
@example(x=-1e-30, a=[1.0], b=[1e-30, -1.0], form="abs_of_sum")
def test_any_finite_x_and_any_order(x, a, b, form):
    # Within rounding of a root of A the sign of the kink, and so the derivative, is anybody's guess.
    terms = [mpmath.mpf(c) * mpmath.mpf(x) ** j for j, c in enumerate(b, 1)]
    assume(form == "sum_of_abs" or sum(terms) == 0 or abs(sum(terms)) > 1e-4 * sum(map(abs, terms)))
    assert_exact(x, a, b, form, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_sign_of_both_zeros_is_plus_one(zero, form):
    """F = (1 + x) / (1 + |b x|) at b = 0: dF/db = -(1 + x) |x| for x > 0, and the kink of Q at 0 counts as rising."""
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[zero]], requires_grad=True)
    x = torch.tensor([[3.0]], requires_grad=True)
    assert torch.autograd.grad(rational(x, a, b, form), b)[0].item() == -12.0
    b = torch.tensor([[0.5]])
    x = torch.tensor([[zero]], requires_grad=True)
    for dx in (
        torch.autograd.grad(rational(x, a, b, form), x)[0],
        rational_backward(torch.ones(1, 1), x, a, b, form)[0],
    ):
        assert dx.item() == 0.5  # P' - P |b| = 1 - 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("a", "b", "limits", "slopes"),
    [
        ([0.0, 1.0], [0.0], (math.inf, -math.inf), (1.0, 1.0)),
        ([0.0, 0.0], [0.0], (0.0, 0.0), (0.0, 0.0)),
        ([1.0, 2.0, 3.0], [0.0, -0.5], (6.0, 6.0), (0.0, 0.0)),
        ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, -0.5], (8.0, -8.0), (0.0, 0.0)),
        ([1.0, 2.0, 3.0, 4.0], [2.0, 0.5], (math.inf, -math.inf), (8.0, 8.0)),
        ([1.0, 2.0, 3.0, 4.0, 0.0], [2.0, 0.5, 0.0], (math.inf, -math.inf), (8.0, 8.0)),
        ([1.0, 2.0, -3.0], [0.5], (-math.inf, -math.inf), (-6.0, 6.0)),
        ([1.0, 2.0, 3.0], [0.0], (math.inf, math.inf), (math.inf, -math.inf)),
        ([1.0, 2.0], [0.0, 0.5], (0.0, 0.0), (0.0, 0.0)),
        ([7.0], [], (7.0, 7.0), (0.0, 0.0)),
    ],
)
def test_infinite_x_gives_the_limits(a, b, limits, slopes, form, dtype):
    x = torch.tensor([[math.inf, -math.inf]], dtype=dtype, requires_grad=True)
    a = torch.tensor([a], requires_grad=True)
    b = torch.tensor([b], requires_grad=True)
    y = rational(x, a, b, form)
    assert y.tolist() == [list(limits)]
    gradients = torch.autograd.grad(y.sum(), (x, a, b), allow_unused=True, materialize_grads=True)
    closed = rational_backward(torch.ones_like(y), x, a, b, form)
    found = [gradients, closed]
    for computing in KERNELS.values():
        with computing():
            *of_kernel, y = cpu.backward(*(t.detach() for t in (torch.ones_like(y), x, a, b)), form, 2, True)
        assert y.tolist() == [list(limits)]
        found.append(of_kernel)
    for dx, da, db in found:
        assert dx.tolist() == [list(slopes)]
        assert not da.any()
        assert not db.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(5, 4), (0, 0), (0, 2), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_stays_nan_and_stays_alone(dtype, order, form):
    x = torch.tensor([[math.nan, 1.0, math.inf]], dtype=dtype)
    y = rational(x, torch.ones(1, order[0] + 1), torch.ones(1, order[1]), form)
    assert y.isnan().tolist() == [[True, False, False]]


def test_a_large_neighbour_changes_nothing_but_rounding():
    """One x that needs float64 sends the whole tensor there."""
    torch.manual_seed(0)
    x, a, b = torch.randn(1, 64), torch.randn(1, 6), torch.randn(1, 4)
    alone = rational(x, a, b, "abs_of_sum")
    beside = rational(torch.cat([x, torch.full((1, 1), 1e30)], 1), a, b, "abs_of_sum")[:, :-1]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)


def test_closed_form_is_the_derivative_of_the_definition():
    torch.manual_seed(0)
    for form, (m, n) in itertools.product(FORMS, [(5, 4), (7, 6), (0, 0), (0, 3), (2, 0), (1, 1), (2, 5)]):
        x, grad = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
        for rows_a, rows_b in ((4, 4), (1, 4), (4, 1)):
            inputs = [x, torch.randn(rows_a, m + 1).double(), torch.randn(rows_b, n).double()]
            inputs = [t.requires_grad_() for t in inputs]
            expected = torch.autograd.grad(
                rational(*inputs, form), inputs, grad, allow_unused=True, materialize_grads=True
            )
            for actual, wanted in zip(rational_backward(grad, *inputs, form), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
