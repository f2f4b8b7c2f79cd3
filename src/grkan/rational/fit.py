"""Coefficients for any target function: minimax on an interval, or weighted least squares on samples.

**Minimax.** If the sign of A is prescribed, Q is linear in its coefficients, and whether an error of t can be reached
is a linear feasibility problem, |f Q - P| <= t Q. The differential correction algorithm (Cheney and Loeb 1961;
Barrodale, Powell and Roberts 1972) solves a few such linear programs and converges to the global optimum from any
start. The form sum_of_abs has one sign pattern, b >= 0. For abs_of_sum two are tried: A has one sign everywhere, or it
changes sign at zero. Sequential linear programming on F itself then polishes the best fits, with the extrema of F
among the points: so the result does not depend on the grid, and A may change sign anywhere.
F(x) -> F(x / s) makes every scale the same problem. On an interval that is narrow for its distance from zero, the
powers of x are nearly alike. So P and A / x are sought as sums of the interval's Chebyshev polynomials, bounded so that
rounding the coefficients of x^k has no visible effect. A target that is constant or linear there is met exactly.

**Least squares.** For each sign pattern the linearised problem is solved a few times, each time divided by the last Q
(Sanathanan and Koerner 1963). The results, and the table's entry, are the starts of a nonlinear least squares
iteration.

**The table's interval is [-10, 10]**, for every name. Most pre-activations of a transformer lie within a few units of
zero, and a few go beyond 10. A fit on [-3, 3] is ten times as exact there and useless at 10; on [-10, 10] the largest
error at order (5, 4) is 0.007 for GELU and 0.002 for SiLU. No order works on the whole line: with m = n + 1, F has the
same slope at both ends, up to the sign, so on one side it misses ReLU and its smooth relatives by half the distance or
more. The best fit on the interval alone can be much worse outside, and even turn back. So, where the order allows it,
a fit for the table must also stay within 1.5 (distance to the interval) (largest |f| on it) / (its length) of the
target, up to one length of the interval beyond each end. A zero of A is a spike of F, and must lie 1.5 times as far
from zero.

`python -m grkan.rational.fit` makes `coefficients.json` again.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import GrkanImportError, GrkanTypeError, GrkanValueError
from ..writing import write_bytes
from . import reference, table
from .arguments import check_form, check_order, evaluate
from .reference import FORMS

try:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from scipy.integrate import trapezoid
    from scipy.optimize import least_squares, linprog, nnls
except ImportError as error:
    raise GrkanImportError('grkan.fit needs NumPy and SciPy; install them with: pip install "grkan[fit]"') from error

Array = NDArray[Any]  # float64 throughout
Function = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Rational:
    """A rational function F = P / Q.

    Calling it evaluates F in float64: a float gives a float, an array gives an array of its shape.
    """

    numerator: Array
    """float64, (m + 1,), a_0 first."""
    denominator: Array
    """float64, (n,), b_1 first."""
    form: str
    """"abs_of_sum" or "sum_of_abs"."""

    @property
    def order(self) -> tuple[int, int]:
        """(m, n), the degrees of numerator and denominator."""
        return len(self.numerator) - 1, len(self.denominator)

    @overload
    def __call__(self, x: float) -> float: ...
    @overload
    def __call__(self, x: ArrayLike) -> Array: ...
    def __call__(self, x: Any) -> Any:
        """Evaluate F(x)."""
        values = np.asarray(x, dtype=np.float64)
        y = _evaluate(self.numerator, self.denominator, self.form, values)
        return float(y) if values.ndim == 0 else y


@dataclass(frozen=True, eq=False)
class RationalFit(Rational):
    """A rational function F = P / Q fitted to a target, with its errors.

    Calling it evaluates F in float64: a float gives a float, an array gives an array of its shape.
    """

    interval: tuple[float, float]
    """Where the errors were measured."""
    max_error: float
    """The largest |F - target| on the interval."""
    rms_error: float
    """The root of the mean of (F - target)^2 over the interval, uniformly weighted, even if the fit had weights."""

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.form} rational of order {self.order}: "
            f"off by at most {self.max_error:.3g}, rms {self.rms_error:.3g}, on [{low:g}, {high:g}]\n"
            f"numerator   {' '.join(f'{c:.9g}' for c in self.numerator)}\n"
            f"denominator {' '.join(f'{c:.9g}' for c in self.denominator)}"
        )


def fit(
    target: str | Function,
    order: tuple[int, int] = (5, 4),
    *,
    form: str = "abs_of_sum",
    interval: tuple[float, float] | None = None,
    samples: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> RationalFit:
    """Find the rational function of an order that is closest to a target; it has no poles, in either form.

    Without samples, minimise the largest error on the interval; with samples, sum_i weights_i (F(x_i) - f(x_i))^2.
    On one machine, the same arguments give the same bits.

    Args:
        target: a name ("gelu", "silu" = "swish", "tanh", ...; `grkan.rational.table.NAMES` has all), or a callable
            that maps a 1-D float64 numpy array, or else a tensor, to one of the same shape.
        order: (m, n), the degrees of numerator and denominator, each from 0 to 16.
        form: "abs_of_sum" or "sum_of_abs", the denominator's form (see `grkan.group_rational`).
        interval: (low, high). Without samples, the error is minimised and measured there; None means (-10, 10) for a
            callable, and for a name a fit like the table's: on the table's interval, and held near the target beyond
            it. With samples, the interval only says where errors are measured; None means the range of the samples.
        samples: 1-D, the points to fit at, or the centres of a histogram's bins.
        weights: 1-D, one for each sample, not negative and not all zero; None: equal weights.

    Returns:
        A `RationalFit`.

    Raises:
        TypeError: target, order, form, interval, samples or weights have a wrong type; or target takes neither an
            array nor a tensor, or does not return real numbers.
        ValueError: the name or form is unknown; interval, order, samples or weights make no sense; target returns
            another shape or values that are not finite; or the coefficients are not normal numbers of float64, as those
            for a target that is never above 1e-310.
    """
    m, n = check_order(order)
    if max(m, n) > _LARGEST_ORDER:
        raise GrkanValueError(f"order must be at most ({_LARGEST_ORDER}, {_LARGEST_ORDER}) for a fit; got ({m}, {n})")
    check_form(form)
    f = _as_function(target)
    if samples is not None:
        x, w = _checked_samples(samples, weights)
        bounds = (float(x.min()), float(x.max())) if interval is None else _checked_interval(interval)
        return measured(next(local_fits(target, (m, n), form, x, w)), target, bounds)
    if weights is not None:
        raise GrkanValueError("weights need samples; got weights without samples")
    if interval is not None:
        bounds, guarded = _checked_interval(interval), False
    elif isinstance(target, str):
        bounds, guarded = table.interval(target, (m, n), form), True
    else:
        bounds, guarded = table.DEFAULT_INTERVAL, False
    return _minimax(f, bounds, m, n, form, guarded)


def local_fits(
    target: str | Function,
    order: tuple[int, int],
    form: str,
    samples: Array,
    weights: Array,
    starts: Sequence[Rational] = (),
) -> Iterator[Rational]:
    """Yield the function that `fit` finds for samples, then the other local optima found on the way, best first.

    Args:
        starts: further functions to start from, of the same order and form.
    """
    f = _as_function(target)
    given = [(start.numerator, start.denominator) for start in starts]
    if (entry := _table_entry(target, order, form)) is not None:
        given.append(entry)
    for a, b in _least_squares(samples, f(samples), weights, *order, form, given):
        yield Rational(a, b, form)


def measured(found: Rational, target: str | Function, interval: tuple[float, float]) -> RationalFit:
    """Measure the errors of a function on an interval, which takes as long as finding it."""
    return _measured(_as_function(target), found.numerator, found.denominator, found.form, interval)


# The solvers work on u = x / scale in [-1, 1] and on values divided by the largest one, so powers are harmless and
# tolerances mean the same for every target. p holds the coefficients of P, then those of A; z those of both in a
# `_Basis`.

# The smallest Q(0), relative to the largest coefficient of Q. It bounds b if the best F has Q(0) = 0.
_SMALLEST_CONSTANT = 1e-6

# Above this order float64 cannot tell the powers apart: tanh at (20, 20) came out worse than at (5, 4).
_LARGEST_ORDER = 16

# The error allowed outside the interval, in units of (largest |f| on the interval) (distance to it) / (its length).
_GUARD = 1.5

# A keeps its sign at these multiples of the points outside. A zero of A is a spike of F, and an optimum may put one
# just beyond the last point where it is forbidden. Forbidding zeros up to |x| = 240 costs GELU at order (7, 6) 9%.
_FAR = (1.0, 1.5)

_EXACT_ENOUGH = 1e-14

# Errors up to this fraction of the largest |f| are rounding errors.
_ROUNDING = 4 * float(np.finfo(np.float64).eps)

# The largest coefficients of x^k allowed for a coefficient of 1 in the basis; and the most iterations of a linear
# program, which takes 15 to 60 but may never end if columns are alike.
_LARGEST_GROWTH = 1e12
_LINEAR_PROGRAM_ITERATIONS = 1000

# Least squares start from fits with weights / (1 + (u / nearness)^2): inf keeps the weights, others stress u near zero.
_NEARNESSES = (math.inf, 0.1, 0.01)

# Other local minima are kept if their sum of squares is at most this many times the best one.
_WORSE = 4.0

# The most points of a linear program; if there are more, those with the smallest errors are left out.
_MOST_POINTS = 600


class _Basis:
    """Basis polynomials in u: T_k for P and u T_k for A, where T_k are the Chebyshev polynomials of [low, high].

    In the form sum_of_abs the basis of A is |u|^j, because its coefficients must not be negative. A polynomial whose
    coefficients of u^k are too large is replaced by 0.
    """

    def __init__(self, low: float, high: float, m: int, n: int, form: str) -> None:
        self.low, self.high, self.m, self.n, self.form = low, high, m, n, form
        self._centre, self._half = (low + high) / 2, (high - low) / 2 or 1.0
        chebyshev = [np.array([1.0]), np.array([-self._centre, 1.0]) / self._half]
        with np.errstate(over="ignore", invalid="ignore"):
            while len(chebyshev) < max(m + 1, n):
                longer = 2 * np.convolve(chebyshev[1], chebyshev[-1])
                longer[:-2] -= chebyshev[-2]
                chebyshev.append(longer)
            growth = np.array([np.abs(polynomial).sum() for polynomial in chebyshev])
        usable = growth <= _LARGEST_GROWTH
        matrix = np.zeros((m + 1 + n, m + 1 + n))
        for k in np.flatnonzero(usable[: m + 1]):
            matrix[: k + 1, k] = chebyshev[k]
        if form == "sum_of_abs":
            matrix[m + 1 :, m + 1 :] = np.eye(n)
        else:
            for k in np.flatnonzero(usable[:n]):
                matrix[m + 1 : m + 2 + k, m + 1 + k] = chebyshev[k]
        self.matrix: Array = matrix
        """p = matrix @ z."""
        self.growth: Array = np.abs(matrix).sum(axis=0)
        """How much larger the coefficients in p are than z."""

    def columns(self, u: Array) -> tuple[Array, Array]:
        """Evaluate the basis polynomials of P, and those of A."""
        t = np.polynomial.chebyshev.chebvander((u - self._centre) / self._half, max(self.m, self.n))
        of_a = _powers(np.abs(u), self.n)[:, 1:] if self.form == "sum_of_abs" else u[:, None] * t[:, : self.n]
        return t[:, : self.m + 1] * (self.growth[: self.m + 1] > 0), of_a * (self.growth[self.m + 1 :] > 0)

    def signed_columns(self, u: Array, crosses: bool) -> tuple[Array, Array]:
        """Evaluate the same, but with those of A multiplied by the sign of A: then Q = 1 + their sum."""
        of_p, of_a = self.columns(u)
        return of_p, np.where(u < 0, -1.0, 1.0)[:, None] * of_a if crosses else of_a

    def limits(self, error: float) -> Array:
        """Return how large each z may be so that rounding errors of the coefficients stay below an error."""
        limits = error / (2 * _ROUNDING * np.maximum(self.growth, 1.0))
        return np.where((limits < 1e-9) | (self.growth == 0), 0.0, np.where(limits > 1e6, np.inf, limits))


@dataclass(frozen=True)
class _Problem:
    """A fit to y: |F - y| should be small on the basis's interval, and about `allowed` at most at the points `outside`.

    The points below the interval come first, then as many above it. Linear programs use only those marked in `held`.
    """

    y: Function
    basis: _Basis
    outside: Array
    allowed: Array
    held: Array

    def error(self, z: Array, u: Array) -> Array:
        return _values(self.basis.matrix @ z, self.basis.m, u, self.basis.form)[0] - self.y(u)

    def extrema(self, p: Array) -> tuple[float, Array]:
        """Return the largest |F - y| for p, and the places where the error is large."""
        basis = self.basis

        def error(u: Array) -> Array:
            return _values(p, basis.m, u, basis.form)[0] - self.y(u)

        return _extrema(error, basis.low, basis.high, _narrow_places(p[basis.m + 1 :], basis.form))

    def is_sane(self, z: Array) -> bool:
        """Whether F is close enough outside, and has no spike there: |A| falls to zero where A changes sign."""
        b = z[self.basis.m + 1 :]
        inner = [(self.basis.columns(factor * self.outside)[1] @ b).reshape(2, -1) for factor in _FAR]
        sides = np.hstack(inner)
        # An A that only touches zero may be negative by a rounding error.
        rounding = 1e-12 * np.abs(sides).max(initial=0.0)
        crosses = self.basis.form == "abs_of_sum" and any(
            side.max(initial=0.0) > rounding and side.min(initial=0.0) < -rounding for side in sides
        )
        return not crosses and bool(np.all(np.abs(self.error(z, self.outside)) <= self.allowed * 1.02))


def _minimax(f: Function, interval: tuple[float, float], m: int, n: int, form: str, guarded: bool) -> RationalFit:
    """Minimise the largest error on the interval; if guarded, also keep F close to the target outside."""
    low, high = interval
    scale = max(abs(low), abs(high))
    x = _grid(low, high, 2001)
    values = f(x)
    size = float(np.abs(values).max()) or 1.0
    lines = [_measured(f, a, np.zeros(n), form, interval) for a in _lines(f, x, values, m)]
    simple = min(lines, key=lambda line: line.max_error)
    if simple.max_error <= _ROUNDING * size:
        return simple
    distance = np.linspace(0.02, 1.0, 241) ** 1.5  # to the interval, in lengths of it
    outside = np.concatenate([low - distance * (high - low), high + distance * (high - low)]) / scale
    allowed, held = np.tile(_GUARD * distance, 2), np.tile(np.arange(241) % 10 == 0, 2)
    basis = _Basis(low / scale, high / scale, m, n, form)
    points = _grid(low / scale, high / scale, 81)

    def problem(count: int) -> _Problem:
        return _Problem(lambda u: f(u * scale) / size, basis, outside[:count], allowed[:count], held[:count])

    p = _best(problem(len(outside)), points) if guarded else None
    if p is not None:
        return _measured(f, *_unscaled(p, m, scale, size), form, interval)
    p = _best(problem(0), points)
    assert p is not None  # without a guard, the linearised problem gives at least one candidate
    found = _measured(f, *_unscaled(p, m, scale, size), form, interval)
    return simple if simple.max_error <= found.max_error else found


def _lines(f: Function, x: Array, values: Array, m: int) -> list[Array]:
    """Return the numerators of the best constant and of the secant, which equals the target if that is linear."""
    lowest, highest = values.min(), values.max()
    _, peaks = _extrema(lambda u: f(u) - (lowest / 2 + highest / 2), x[0], x[-1])
    of_peaks = f(peaks)
    lowest, highest = min(lowest, of_peaks.min()), max(highest, of_peaks.max())
    found = [np.array([lowest / 2 + highest / 2] + [0.0] * m)]
    if m >= 1:
        slope = (values[-1] - values[0]) / (x[-1] - x[0])
        found.append(np.array([values[0] - slope * x[0], slope] + [0.0] * (m - 1)))
    return [a for a in found if np.isfinite(a).all()]


def _best(problem: _Problem, points: Array) -> Array | None:
    """Return the p of the best polished fit over all sign patterns, or None if there is no fit."""
    basis = problem.basis
    weights = np.full(len(points), 1 / len(points))
    candidates = _linearised(basis, points, problem.y(points), weights)
    for crosses in _patterns(points, basis.n, basis.form):
        candidate = _differential_correction(problem, points, crosses)
        if candidate is not None:
            candidates.append(candidate)
    candidates = [z for z in candidates if problem.is_sane(z)]
    candidates.sort(key=lambda z: float(np.abs(problem.error(z, points)).max()))
    polished = [_polished(problem, z, points) for z in candidates[:2]]
    return _cleaned(problem, *min(polished, key=lambda result: result[0])) if polished else None


def _cleaned(problem: _Problem, error: float, z: Array) -> Array:
    """Return the p of z with tiny coefficients set to 0, as long as the error of the fit stays the same."""
    basis = problem.basis
    p = basis.matrix @ z
    for limit in (1e-8, 1e-10, 1e-12, 1e-14):
        cleaned = np.where(np.abs(p) < limit, 0.0, p)
        if problem.extrema(cleaned)[0] <= error * (1 + 1e-4) + _ROUNDING:
            return cleaned
    return p


def _differential_correction(problem: _Problem, points: Array, crosses: bool) -> Array | None:
    """Find the best fit on the points for one sign pattern of A, by linear programs; None if there is none.

    Q = q_0 + s A has a free q_0; the division by it at the end normalises to q_0 = 1.
    """
    basis = problem.basis
    m, n = basis.m, basis.n
    outside, allowed = problem.outside[problem.held], problem.allowed[problem.held]
    y, beyond = problem.y(points), problem.y(outside)

    def columns(u: Array) -> tuple[Array, Array]:
        of_p, of_a = basis.signed_columns(u, crosses)
        return of_p, np.hstack([np.ones((len(u), 1)), of_a])

    va, vq = columns(points)
    outer_a, outer_q = columns(outside)
    fixed = [  # |F - y| <= allowed outside
        np.hstack([-outer_a, (beyond - allowed)[:, None] * outer_q, np.zeros((len(beyond), 1))]),
        np.hstack([outer_a, -(beyond + allowed)[:, None] * outer_q, np.zeros((len(beyond), 1))]),
    ]
    if basis.form == "abs_of_sum":  # s A >= 0
        for u in (points, *(factor * outside for factor in _FAR)):
            keep = -columns(u)[1] / np.maximum(np.abs(u), 1.0)[:, None] ** n
            keep[:, 0] = 0.0
            fixed.append(np.hstack([np.zeros((len(u), m + 1)), keep, np.zeros((len(u), 1))]))

    best, error, q = None, float(np.abs(y).max()), np.ones_like(points)
    for _ in range(40):
        if error < _EXACT_ENOUGH:
            break
        minus_t = np.full((len(points), 1), -1.0)
        rows = [
            np.hstack([-va / q[:, None], ((y - error) / q)[:, None] * vq, minus_t]),
            np.hstack([va / q[:, None], (-(y + error) / q)[:, None] * vq, minus_t]),
        ]
        highest = basis.limits(error)
        highest[m + 1 :] = np.minimum(highest[m + 1 :], 1.0)
        lowest = -highest
        if basis.form == "sum_of_abs":
            lowest[m + 1 :] = 0.0
        limits = [*zip(lowest, highest, strict=True), (None, None)]
        limits.insert(m + 1, (_SMALLEST_CONSTANT, 1.0))
        matrix = np.vstack(rows + fixed)
        solution = _solve(matrix, np.zeros(len(matrix)), limits)
        if solution is None:
            break
        a, b = solution[: m + 1], solution[m + 1 : -1]
        q = vq @ b
        reached = float(np.abs(va @ a / q - y).max())
        if best is not None and not reached < error:
            break
        converged = best is not None and reached > error * (1 - 1e-4)
        best, error = np.concatenate([a, b[1:]]) / b[0], reached
        if converged:
            break
    return best


def _polished(problem: _Problem, z: Array, points: Array) -> tuple[float, Array]:
    """Minimise the largest error on the whole interval, starting from z, by sequential linear programs.

    Returns:
        The error at the local minimum, and its z.
    """
    error, extrema = problem.extrema(problem.basis.matrix @ z)
    keep_signs = False
    for _ in range(50):
        if error < _EXACT_ENOUGH:
            break
        points = np.union1d(points, extrema)
        if len(points) > _MOST_POINTS:
            points = np.sort(points[np.argsort(-np.abs(problem.error(z, points)), kind="stable")[:_MOST_POINTS]])
        step = _step(problem, z, error, points, keep_signs)
        before = error
        for length in 0.5 ** np.arange(12) if step is not None else ():
            moved = z + length * step
            if problem.basis.form == "sum_of_abs":
                moved[problem.basis.m + 1 :] = np.maximum(moved[problem.basis.m + 1 :], 0.0)
            reached, peaks = problem.extrema(problem.basis.matrix @ moved)
            points = np.union1d(points, peaks)
            if reached < error and problem.is_sane(moved):
                z, error, extrema = moved, reached, peaks
                break
        if error < before * (1 - 1e-6):
            keep_signs = False
        elif keep_signs or problem.basis.form == "sum_of_abs":
            break
        else:
            # Where A touches zero, |A| has a kink that the linear step ignores; keep the next step on this side of it.
            keep_signs = True
    return error, z


def _step(problem: _Problem, z: Array, error: float, points: Array, keep_signs: bool) -> Array | None:
    """Find the d that minimises the largest |e(u) + J(u) d| over the points; `keep_signs` keeps the sign of A(u)."""
    basis = problem.basis
    residual, jacobian = problem.error(z, points), _jacobian(basis, z, points)
    outside, allowed = problem.outside[problem.held], problem.allowed[problem.held]
    beyond, outer = problem.error(z, outside), _jacobian(basis, z, outside)
    rows = [jacobian, -jacobian, outer, -outer]
    right = [-residual, residual, allowed - beyond, allowed + beyond]
    if basis.form == "abs_of_sum":
        for u in (points if keep_signs else points[:0], *(factor * outside for factor in _FAR)):
            of_a = basis.columns(u)[1] / np.maximum(np.abs(u), 1.0)[:, None] ** basis.n
            inner = of_a @ z[basis.m + 1 :]
            rows.append(np.hstack([np.zeros((len(u), basis.m + 1)), np.where(inner < 0, of_a.T, -of_a.T).T]))
            right.append(np.abs(inner))
    bounded = np.zeros(sum(map(len, right)))
    bounded[: 2 * len(points)] = -1.0  # the rows that must be <= t
    matrix = np.hstack([np.vstack(rows), bounded[:, None]])
    highest = basis.limits(error)
    highest[basis.m + 1 :] = np.minimum(highest[basis.m + 1 :], 1 / _SMALLEST_CONSTANT)
    highest = np.maximum(highest, np.abs(z))
    lowest = -highest
    if basis.form == "sum_of_abs":
        lowest[basis.m + 1 :] = 0.0
    # In units of the current error, so that the solver's tolerance is relative to it.
    limits = [*zip((lowest - z) / error, (highest - z) / error, strict=True), (None, None)]
    solution = _solve(matrix, np.concatenate(right) / error, limits)
    return None if solution is None else error * solution[:-1]


def _least_squares(
    x: Array, values: Array, weights: Array, m: int, n: int, form: str, starts: Sequence[tuple[Array, Array]]
) -> Iterator[tuple[Array, Array]]:
    """Yield the coefficients with the smallest weighted sum of squares, then other local optima in increasing order."""
    scale, size = float(np.abs(x).max()) or 1.0, float(np.abs(values).max()) or 1.0
    u, y = x / scale, values / size
    basis = _Basis(float(u.min()), float(u.max()), m, n, form)
    candidates = []
    for nearness in _NEARNESSES:
        candidates += _linearised(basis, u, y, weights / (1 + (u / nearness) ** 2))
    for a, b in starts:
        with np.errstate(all="ignore"):
            p = np.concatenate([a * scale ** np.arange(m + 1) / size, b * scale ** np.arange(1, n + 1)])
        if np.isfinite(p).all():
            candidates.append(np.linalg.lstsq(basis.matrix, p, rcond=None)[0])
    constant = np.zeros(m + n + 1)
    constant[0] = np.average(y, weights=weights)
    for z in _SumOfSquares(basis, u, y, weights).minimised([*candidates, constant]):
        yield _unscaled(basis.matrix @ z, m, scale, size)


class _SumOfSquares:
    """The sum of weights (F(u) - y)^2 as a function of z, with a method that minimises it."""

    def __init__(self, basis: _Basis, u: Array, y: Array, weights: Array) -> None:
        self.basis, self.y, self.roots = basis, y, np.sqrt(weights)
        self.positive = basis.form == "sum_of_abs"
        powers = _powers(u, max(basis.m, basis.n))
        self.powers = powers[:, : basis.m + 1], np.abs(powers[:, 1:]) if self.positive else powers[:, 1:]
        self.columns = basis.columns(u)

    def residuals(self, z: Array) -> Array:
        p = self.basis.matrix @ self.signed(z)
        self.a = self.powers[1][:, : self.basis.n] @ p[self.basis.m + 1 :]
        self.q = 1.0 + np.abs(self.a)
        self.f = self.powers[0] @ p[: self.basis.m + 1] / self.q
        return self.roots * (self.f - self.y)

    def signed(self, z: Array) -> Array:
        """Return z with absolute values for the coefficients of A if those must be positive."""
        return np.append(z[: self.basis.m + 1], np.abs(z[self.basis.m + 1 :])) if self.positive else z

    def jacobian(self, z: Array) -> Array:
        self.residuals(z)
        of_p, of_a = self.columns
        slope = np.where(self.a < 0, 1.0, -1.0) * self.f / self.q
        of_a = slope[:, None] * of_a
        if self.positive:
            of_a = np.where(z[self.basis.m + 1 :] < 0, -1.0, 1.0) * of_a
        return self.roots[:, None] * np.hstack([of_p / self.q[:, None], of_a])

    def __call__(self, z: Array) -> float:
        with np.errstate(all="ignore"):
            return float(np.square(self.residuals(z)).sum())

    def minimised(self, starts: list[Array]) -> list[Array]:
        """Return the z of the local minima found, smallest first: a few steps from each start, more from the best."""
        found = sorted((self._descended(z, 15) for z in starts if math.isfinite(self(z))), key=self)
        found = sorted([*(self._descended(z, 200) for z in found[:3]), *found[3:], starts[-1]], key=self)
        sums = [self(z) for z in found]
        new = [this != last and this <= _WORSE * sums[0] for this, last in zip(sums, [None, *sums], strict=False)]
        return [self.signed(z) for z, is_new in zip(found, new, strict=True) if is_new]

    def _descended(self, z: Array, steps: int) -> Array:
        """Take steps of Levenberg-Marquardt's method.

        MINPACK gets one more residual, a tiny multiple of one more coefficient. Without them, its `qrfac` in SciPy 1.17
        reads past the last column if columns of the Jacobian are nearly alike, and what lies there decides the way.
        """
        m, n, tiny = len(self.y), len(z), 1e-150
        rows = max(m, n) + 1  # there must be at least as many residuals as coefficients

        def residuals(longer: Array) -> Array:
            padded = np.zeros(rows)
            padded[:m], padded[-1] = self.residuals(longer[:-1]), tiny * longer[-1]
            return padded

        def jacobian(longer: Array) -> Array:
            padded = np.zeros((rows, n + 1))
            padded[:m, :n], padded[-1, -1] = self.jacobian(longer[:-1]), tiny
            return padded

        options: dict[str, Any] = {"ftol": 1e-9, "xtol": 1e-12, "gtol": 1e-15, "max_nfev": steps}
        start = np.append(z, 0.0)
        return least_squares(residuals, start, jac=jacobian, x_scale="jac", method="lm", **options).x[:-1]


def _linearised(basis: _Basis, u: Array, y: Array, weights: Array) -> list[Array]:
    """Fit by Sanathanan and Koerner: minimise |P - y Q|^2 / (last Q)^2. Return the best round for each sign pattern."""
    roots, found = np.sqrt(weights), []
    for crosses in _patterns(u, basis.n, basis.form):
        of_p, of_a = basis.signed_columns(u, crosses)
        q, best = np.ones_like(u), (math.inf, np.zeros(basis.m + basis.n + 1))
        for _ in range(6):
            row = (roots / q)[:, None]
            if basis.form == "abs_of_sum":
                z = np.linalg.lstsq(row * np.hstack([of_p, -y[:, None] * of_a]), row[:, 0] * y, rcond=None)[0]
            else:
                z = _nonnegative(row * of_p, row * -y[:, None] * of_a, row[:, 0] * y)
            values, q = _values(basis.matrix @ z, basis.m, u, basis.form)
            loss = float(np.square(roots * (values - y)).sum())
            if not loss < best[0]:
                break
            best = loss, z
        found.append(best[1])
    return found


def _nonnegative(first: Array, second: Array, right: Array) -> Array:
    """Minimise |first a + second b - right|^2 for b >= 0; projecting out `first` leaves a problem in b alone."""
    basis = np.linalg.qr(first)[0]
    b = np.zeros(second.shape[1])
    if second.shape[1]:
        left, rest = second - basis @ (basis.T @ second), right - basis @ (basis.T @ right)
        try:
            b = nnls(left, rest)[0]
        except RuntimeError:  # it does not converge if columns are alike
            b = np.maximum(np.linalg.lstsq(left, rest, rcond=None)[0], 0.0)
    a = np.linalg.lstsq(first, right - second @ b, rcond=None)[0]
    return np.concatenate([a, b])


def _patterns(u: Array, n: int, form: str) -> tuple[bool, ...]:
    """Return the sign patterns to try. A(0) = 0: A changes sign there (True), or it has one sign throughout (False)."""
    return (False, True) if form == "abs_of_sum" and n and u.min() < 0 < u.max() else (False,)


def _powers(u: Array, degree: int) -> Array:
    return np.vander(u, degree + 1, increasing=True)


def _values(p: Array, m: int, u: Array, form: str) -> tuple[Array, Array]:
    """Compute F and Q; the form sum_of_abs requires b >= 0."""
    b = p[m + 1 :]
    q = 1.0 + np.abs(_powers(np.abs(u) if form == "sum_of_abs" else u, len(b))[:, 1:] @ b)
    return _powers(u, m) @ p[: m + 1] / q, q


def _jacobian(basis: _Basis, z: Array, u: Array) -> Array:
    """Compute dF/dz; the form sum_of_abs requires b >= 0."""
    of_p, of_a = basis.columns(u)
    values, q = _values(basis.matrix @ z, basis.m, u, basis.form)
    slope = np.where(of_a @ z[basis.m + 1 :] < 0, 1.0, -1.0) * values / q
    return np.hstack([of_p / q[:, None], slope[:, None] * of_a])


def _solve(rows: Array, right: Array, limits: Sequence[tuple[Any, Any]]) -> Array | None:
    """Find the z within limits with rows @ z <= right and the smallest last component; None if the solver fails."""
    objective = np.zeros(rows.shape[1])
    objective[-1] = 1.0
    options = {
        "primal_feasibility_tolerance": 1e-10,
        "dual_feasibility_tolerance": 1e-10,
        "maxiter": _LINEAR_PROGRAM_ITERATIONS,
    }
    for method in ("highs-ds", "highs-ipm"):  # sometimes one gives up on a problem that the other solves
        result = linprog(objective, A_ub=rows, b_ub=right, bounds=limits, method=method, options=options)
        if result.success:
            return np.asarray(result.x)
    return None


def _unscaled(p: Array, m: int, scale: float, size: float) -> tuple[Array, Array]:
    """Convert a fit in u = x / scale to values / size into coefficients in x for the values."""
    with np.errstate(all="ignore"):
        unscaled = p / scale ** np.concatenate([np.arange(m + 1.0), np.arange(1.0, len(p) - m)])
        unscaled[: m + 1] *= size
    lost = ~np.isfinite(unscaled) | (np.abs(p) > 1e-8) & (np.abs(unscaled) < np.finfo(np.float64).tiny)
    if lost.any():
        raise GrkanValueError(
            f"order ({m}, {len(p) - m - 1}) needs coefficients outside the "
            f"normal range of float64 for |x| up to {scale:g} and "
            f"|target| up to {size:g}; scale both closer to 1"
        )
    return unscaled[: m + 1], unscaled[m + 1 :]


def _evaluate(numerator: Array, denominator: Array, form: str, x: Array) -> Array:
    """Compute F(x) by its definition, `reference.rational`, in float64."""
    a, b = (torch.from_numpy(np.array(c, dtype=np.float64)[None]) for c in (numerator, denominator))
    y = reference.rational(torch.from_numpy(np.array(x).reshape(1, -1)), a, b, form)
    return np.asarray(y.numpy().reshape(np.shape(x)))


def _grid(low: float, high: float, count: int) -> Array:
    """Return points of the interval, denser at its ends (Chebyshev's) and around zero, where activations bend."""
    x = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0, np.pi, count))
    around_zero = np.linspace(-1, 1, count // 2 * 2 + 1)
    around_zero = max(abs(low), abs(high)) * np.sinh(8 * around_zero) / math.sinh(8)
    inside = around_zero[(around_zero > low) & (around_zero < high)]
    return np.union1d([low, *np.clip(x, low, high), high], inside)


def _narrow_places(b: Array, form: str) -> Array:
    """Return places where a grid may miss details of F: zeros of A, kinks of |A|, and around poles of P / (1 +- A).

    Args:
        b: the coefficients of A for F as a function of u = x / scale.
    """
    # Smaller coefficients have no visible effect for |x| <= 1, and the roots could overflow.
    b = np.trim_zeros(np.where(np.abs(b) < 1e-14 * max(1.0, np.abs(b).max(initial=0.0)), 0.0, b), "b")
    if not len(b):
        return b
    kinks, poles = np.roots([*b[::-1], 0.0]), np.concatenate([np.roots([*b[::-1], constant]) for constant in (1, -1)])
    about = poles.real[:, None] + poles.imag[:, None] * np.array([-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0])
    x = np.concatenate([kinks.real, about.reshape(-1)])
    return np.concatenate([x, -x]) if form == "sum_of_abs" else x


def _extrema(error: Function, low: float, high: float, more: Sequence[float] | Array = ()) -> tuple[float, Array]:
    """Find the largest |error| on [low, high], and where the local maxima of at least half of it lie.

    Args:
        more: points to look at besides the grid, clipped to [low, high].
    """
    x = _grid(low, high, 2001)
    if len(more):
        x = np.union1d(x, np.clip(more, low, high))
    size = np.abs(error(x))
    neighbours = np.pad(size, 1, constant_values=-1.0)
    peaks = np.flatnonzero((size >= neighbours[:-2]) & (size >= neighbours[2:]) & (size >= size.max() / 2))
    # A constant |error| has a peak everywhere; a few of them are enough.
    peaks = peaks[:: max(1, len(peaks) // 64)]
    left, right = x[np.maximum(peaks - 1, 0)], x[np.minimum(peaks + 1, len(x) - 1)]
    best_x, best = x[peaks], size[peaks]
    for _ in range(4):
        inner = np.linspace(left, right, 17)
        values = np.abs(error(inner.reshape(-1))).reshape(inner.shape)
        at = values.argmax(axis=0), np.arange(len(peaks))
        best_x, best = np.where(values[at] > best, inner[at], best_x), np.maximum(values[at], best)
        width = (right - left) / 16
        left, right = np.maximum(best_x - width, low), np.minimum(best_x + width, high)
    return max(float(size.max()), float(best.max())), best_x


def _measured(f: Function, a: Array, b: Array, form: str, interval: tuple[float, float]) -> RationalFit:
    low, high = interval
    scale = max(abs(low), abs(high)) or 1.0

    def error(x: Array) -> Array:
        return _evaluate(a, b, form, x) - f(x)

    largest, _ = _extrema(error, low, high, scale * _narrow_places(b * scale ** np.arange(1.0, len(b) + 1), form))
    if not math.isfinite(largest):
        raise GrkanValueError(f"interval must lie where F and target can be computed; got {interval}")
    x = _grid(low, high, 2001)
    relative = error(x) / (largest or 1.0)
    rms = largest * (math.sqrt(trapezoid(np.square(relative), x) / (high - low)) if low < high else 1.0)
    return RationalFit(a, b, form, interval, largest, rms)


def _as_function(target: str | Function) -> Function:
    """Return the target as a function on 1-D float64 arrays that checks its values."""
    values: Callable[[Tensor], Tensor]
    if isinstance(target, str):
        values = table.exact(table.canonical_name(target, "target"))
    elif callable(target):
        values = partial(evaluate, "target", target)
    else:
        raise GrkanTypeError(f"target must be a name or a callable on numpy arrays; got {type(target).__name__}")

    def checked(x: Array) -> Array:
        y = values(torch.tensor(x, device="cpu")).numpy()
        wrong = np.flatnonzero(~np.isfinite(y))
        if len(wrong):
            raise GrkanValueError(f"target must be finite where it is fitted; got {y[wrong[0]]} at x = {x[wrong[0]]:g}")
        return y

    return checked


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        bounds = () if isinstance(interval, str) else tuple(float(bound) for bound in interval)
    except (TypeError, ValueError):
        raise GrkanTypeError(f"interval must be two numbers (low, high); got {interval!r}") from None
    if len(bounds) != 2 or not all(map(math.isfinite, bounds)) or not bounds[0] < bounds[1]:
        raise GrkanValueError(f"interval must be two finite numbers, low < high; got {interval!r}")
    return bounds


def _checked_samples(samples: ArrayLike, weights: ArrayLike | None) -> tuple[Array, Array]:
    """Return the checked samples, and weights that sum to 1."""
    x = _checked_vector("samples", samples)
    if weights is None:
        return x, np.full(len(x), 1 / len(x))
    w = _checked_vector("weights", weights)
    if len(w) != len(x):
        raise GrkanValueError(f"weights must hold one value for each of the {len(x)} samples; got {len(w)}")
    if w.min() < 0:
        raise GrkanValueError(f"weights must not be negative; got {w.min():g} at index {w.argmin()}")
    if w.max() == 0:
        raise GrkanValueError("weights must not all be zero")
    w = w / w.max()
    return x, w / w.sum()


def _checked_vector(name: str, values: ArrayLike) -> Array:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise GrkanTypeError(f"{name} must be a 1-D array of numbers; got {type(values).__name__}") from None
    if vector.ndim != 1 or len(vector) == 0:
        raise GrkanValueError(f"{name} must be 1-D and not empty; got shape {vector.shape}")
    wrong = np.flatnonzero(~np.isfinite(vector))
    if len(wrong):
        raise GrkanValueError(f"{name} must be finite; got {vector[wrong[0]]} at index {wrong[0]}")
    return vector


def _table_entry(target: str | Function, order: tuple[int, int], form: str) -> tuple[Array, Array] | None:
    if not isinstance(target, str):
        return None
    try:
        a, b = table.coefficients(target, order, form)
    except table.NotInTableError:
        return None
    return np.array(a), np.array(b)


def make_table() -> Iterator[dict[str, Any]]:
    """Fit every name in both forms at the orders (5, 4) and (7, 6); yield the entries of `coefficients.json`."""
    for name in table.NAMES:
        if name == "identity":  # exact, and not in the file
            continue
        for order in ((5, 4), (7, 6)):
            for form in FORMS:
                f, interval = _as_function(name), table.DEFAULT_INTERVAL
                made = _minimax(f, interval, *order, form, guarded=True)
                yield {
                    "name": name,
                    "form": form,
                    "order": list(order),
                    "interval": list(made.interval),
                    "numerator": made.numerator.tolist(),
                    "denominator": made.denominator.tolist(),
                    "max_error": made.max_error,
                    "rms_error": made.rms_error,
                }


def _main() -> None:
    path = Path(__file__).with_name("coefficients.json")
    lines = []
    for entry in make_table():
        lines.append(json.dumps(entry))
        print("{name:13} {form:11} {order} on {interval}: max {max_error:.3g}, rms {rms_error:.3g}".format_map(entry))
    write_bytes(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
    print(f"wrote {len(lines)} fits to {path}")


if __name__ == "__main__":
    _main()
