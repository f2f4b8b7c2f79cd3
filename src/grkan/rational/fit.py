"""Coefficients for any target function: minimax on an interval, or weighted least squares on samples.

**Minimax.** Where the sign of A is prescribed, Q is linear in its coefficients, and whether an error of t can be
reached is a linear feasibility problem, |f Q - P| <= t Q. The differential correction algorithm (Cheney and Loeb
1961; Barrodale, Powell and Roberts 1972) solves a few such linear programs and converges to the global optimum from
any start. In the form sum_of_abs there is one sign pattern, b >= 0. In abs_of_sum two are tried: A has one sign
everywhere, or it changes sign at zero. The best fits are polished by sequential linear programming on F itself, with
its extrema among the points: that takes the grid out of the result and lets A change sign where it wants.
F(x) -> F(x / s) makes every scale the same problem. Far from zero, for the width of the interval, the powers of x are
hardly told apart; so P and A / x are sought as sums of the interval's Chebyshev polynomials, and in such a way that
rounding the coefficients of x^k does not show. A target that is constant or linear there is met as that.

**Least squares.** The linearised problem is solved a few times, each time divided by the last Q (Sanathanan and
Koerner 1963), for each pattern. The results, and the table's entry, are the starts of a nonlinear least squares
iteration.

**The table's interval is [-10, 10]**, for every name. The pre-activations of a transformer lie within a few units of
zero, and a few go beyond 10. A fit on [-3, 3] is ten times as exact there and useless at 10; on [-10, 10] the largest
error at order (5, 4) is 0.007 for GELU and 0.002 for SiLU. No order holds on the whole line: with m = n + 1, F has
the same slope at both ends, up to the sign, so on one of the sides ReLU and its smooth relatives are missed by half
the distance or more. What is best on the interval alone can be much worse out there, and even turn back. So a fit for
the table also has to stay within 1.5 (distance to the interval) (largest |f| on it) / (its length) of the target, up
to one length of the interval beyond each end, where the order allows it. A zero of A is a spike of F, and is kept 1.5
times as far from zero.

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
class RationalFit:
    """A rational function F = P / Q that stands for a target, and how far it is from it.

    Calling it evaluates F in float64: a float gives a float, an array an array of its shape.
    """

    numerator: Array
    """float64, (m + 1,), a_0 first."""
    denominator: Array
    """float64, (n,), b_1 first."""
    form: str
    """"abs_of_sum" or "sum_of_abs"."""
    interval: tuple[float, float]
    """Where the errors were measured."""
    max_error: float
    """The largest |F - target| on the interval."""
    rms_error: float
    """The root of the mean of (F - target)^2 over the interval, all of it alike, whatever the weights of a fit were."""

    @property
    def order(self) -> tuple[int, int]:
        """(m, n), the degrees of numerator and denominator."""
        return len(self.numerator) - 1, len(self.denominator)

    @overload
    def __call__(self, x: float) -> float: ...
    @overload
    def __call__(self, x: ArrayLike) -> Array: ...
    def __call__(self, x: Any) -> Any:
        """F(x)."""
        values = np.asarray(x, dtype=np.float64)
        y = _evaluate(self.numerator, self.denominator, self.form, values)
        return float(y) if values.ndim == 0 else y

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
    """The rational function of an order that is closest to a target; it has no poles, in either form.

    Without samples the largest error on the interval is minimised, with samples sum_i weights_i (F(x_i) - f(x_i))^2.
    The same arguments give the same bits.

    Args:
        target: a name ("gelu", "silu" = "swish", "tanh", ...; `grkan.rational.table.NAMES` has all), or a callable
            that maps a 1-D float64 numpy array, or else a tensor, to one of the same shape.
        order: (m, n), the degrees of numerator and denominator; either may be 0, and neither be above 16.
        form: "abs_of_sum" or "sum_of_abs", the denominator's form (see `grkan.group_rational`).
        interval: (low, high). Without samples it is where the error is minimised and measured; None means (-10, 10) for
            a callable, and for a name the fit that the table holds: on the table's interval, and held near the target
            beyond it. With samples it is where the errors are measured, and nothing else; None means their range.
        samples: 1-D, the points to fit at, or the centres of a histogram's bins.
        weights: 1-D, one for each sample, not negative and not all zero; None weighs all alike.

    Returns:
        A `RationalFit`.

    Raises:
        TypeError: target, order, form, interval, samples or weights are of a wrong type; a target that takes neither
            an array nor a tensor, or returns no real numbers.
        ValueError: an unknown name or form; an interval, order, samples or weights that make no sense; a target that
            returns another shape or values that are not finite.
    """
    m, n = check_order(order)
    if max(m, n) > _LARGEST_ORDER:
        raise GrkanValueError(f"order must be at most ({_LARGEST_ORDER}, {_LARGEST_ORDER}) for a fit; got ({m}, {n})")
    check_form(form)
    f = _as_function(target)
    if samples is not None:
        x, w = _checked_samples(samples, weights)
        bounds = (float(x.min()), float(x.max())) if interval is None else _checked_interval(interval)
        return next(local_fits(target, (m, n), form, x, w, bounds))
    if weights is not None:
        raise GrkanValueError("weights belong to samples; got weights and no samples")
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
    interval: tuple[float, float],
    starts: Sequence[RationalFit] = (),
) -> Iterator[RationalFit]:
    """`fit` to samples, and the other local optima that it finds on its way, from the best on.

    Args:
        starts: fits of the same order and form to start from, too.
    """
    f = _as_function(target)
    given = [(start.numerator, start.denominator) for start in starts]
    if (entry := _table_entry(target, order, form)) is not None:
        given.append(entry)
    for a, b in _least_squares(samples, f(samples), weights, *order, form, given):
        yield _measured(f, a, b, form, interval)


# The solvers work on u = x / scale in [-1, 1] and on values divided by their largest, where powers are harmless and
# tolerances mean the same for every target. p holds the coefficients of P, then those of A; z those in a `_Basis`.

# The smallest Q(0), relative to the largest coefficient of Q. It bounds b where the best F has Q(0) = 0.
_SMALLEST_CONSTANT = 1e-6

# Beyond it float64 cannot tell the powers apart: tanh at (20, 20) came out worse than at (5, 4).
_LARGEST_ORDER = 16

# The error that is allowed outside, in (largest |f| on the interval) (distance to it) / (its length).
_GUARD = 1.5

# A keeps its sign at these multiples of the points outside. A zero of A is a spike of F, and an optimum may put one
# just behind the last point where it is forbidden. Forbidden up to |x| = 240, it costs GELU at order (7, 6) 9%.
_FAR = (1.0, 1.5)

_EXACT_ENOUGH = 1e-14

# Errors that are rounding: this many units in the last place of the largest |f|.
_ROUNDING = 4 * float(np.finfo(np.float64).eps)

# What the coefficients of x^k may come to, for coefficients of one in the basis, and iterations of a linear program,
# which has 15 to 60 of them and may go on for ever where columns are alike.
_LARGEST_GROWTH = 1e12
_LINEAR_PROGRAM_ITERATIONS = 1000

# Least squares start from fits to the weights, and to the weights by 1 + (u / nearness)^2, which see what is near zero.
_NEARNESSES = (math.inf, 0.1, 0.01)

# How much larger the sum of squares at another local minimum may be than at the best.
_WORSE = 4.0

# Points of a linear program; beyond them those with the smallest errors are left out.
_MOST_POINTS = 600


class _Basis:
    """The polynomials of u that P and A are sums of: T_k and u T_k, Chebyshev's for [low, high].

    In the form sum_of_abs those of A are |u|^j, as their coefficients must not be negative. A polynomial that takes too
    large coefficients of u^k is 0 here.
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
        """How much larger than z the coefficients in p are."""

    def columns(self, u: Array) -> tuple[Array, Array]:
        """The values of the polynomials of P, and of those of A."""
        t = np.polynomial.chebyshev.chebvander((u - self._centre) / self._half, max(self.m, self.n))
        of_a = _powers(np.abs(u), self.n)[:, 1:] if self.form == "sum_of_abs" else u[:, None] * t[:, : self.n]
        return t[:, : self.m + 1] * (self.growth[: self.m + 1] > 0), of_a * (self.growth[self.m + 1 :] > 0)

    def signed_columns(self, u: Array, crosses: bool) -> tuple[Array, Array]:
        """The same, those of A with the sign that A has: then Q = 1 + their sum."""
        of_p, of_a = self.columns(u)
        return of_p, np.where(u < 0, -1.0, 1.0)[:, None] * of_a if crosses else of_a

    def limits(self, error: float) -> Array:
        """How large each z may be for rounding of the coefficients to stay below an error."""
        limits = error / (2 * _ROUNDING * np.maximum(self.growth, 1.0))
        return np.where((limits < 1e-9) | (self.growth == 0), 0.0, np.where(limits > 1e6, np.inf, limits))


@dataclass(frozen=True)
class _Problem:
    """|F(u) - y(u)| is to be small on the basis's interval, and `allowed`, or hardly more, at the points `outside`.

    The points below the interval come first, then as many above it. Linear programs see those that are `held`.
    """

    y: Function
    basis: _Basis
    outside: Array
    allowed: Array
    held: Array

    def error(self, z: Array, u: Array) -> Array:
        return _values(self.basis.matrix @ z, self.basis.m, u, self.basis.form)[0] - self.y(u)

    def extrema(self, p: Array) -> tuple[float, Array]:
        """The largest |F - y| of a p, and where it is large."""
        basis = self.basis

        def error(u: Array) -> Array:
            return _values(p, basis.m, u, basis.form)[0] - self.y(u)

        return _extrema(error, basis.low, basis.high, _narrow_places(p[basis.m + 1 :], basis.form))

    def is_sane(self, z: Array) -> bool:
        """Whether F is near enough outside, with no spike: |A| falls to zero where A changes sign."""
        b = z[self.basis.m + 1 :]
        inner = [(self.basis.columns(factor * self.outside)[1] @ b).reshape(2, -1) for factor in _FAR]
        sides = np.hstack(inner)
        crosses = self.basis.form == "abs_of_sum" and any(np.any(side > 0) and np.any(side < 0) for side in sides)
        return not crosses and bool(np.all(np.abs(self.error(z, self.outside)) <= self.allowed * 1.02))


def _minimax(f: Function, interval: tuple[float, float], m: int, n: int, form: str, guarded: bool) -> RationalFit:
    """The fit with the smallest largest error on the interval, held close outside, too, if guarded."""
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
    assert p is not None  # without a guard, the linearised problem is a candidate at least
    found = _measured(f, *_unscaled(p, m, scale, size), form, interval)
    return simple if simple.max_error <= found.max_error else found


def _lines(f: Function, x: Array, values: Array, m: int) -> list[Array]:
    """The numerators of the best constant, and of the secant, which is the function itself where that is linear."""
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
    """The p of the best polished fit over all sign patterns; None if none is possible."""
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
    """The p of z, without the coefficients that are there by rounding only: the fit is the same where they are 0."""
    basis = problem.basis
    p = basis.matrix @ z
    for limit in (1e-8, 1e-10, 1e-12, 1e-14):
        cleaned = np.where(np.abs(p) < limit, 0.0, p)
        if problem.extrema(cleaned)[0] <= error * (1 + 1e-4) + _ROUNDING:
            return cleaned
    return p


def _differential_correction(problem: _Problem, points: Array, crosses: bool) -> Array | None:
    """The best fit on the points for one sign pattern of A, by linear programs; None if there is none.

    Q = q_0 + s A, with q_0 free: dividing by it at the end normalises to q_0 = 1.
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
    """A local minimum near z of the largest error on the whole interval, and its z, by sequential linear programs."""
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
            # Where A touches zero, |A| has a kink that no step across it foresees; the next one stays on this side.
            keep_signs = True
    return error, z


def _step(problem: _Problem, z: Array, error: float, points: Array, keep_signs: bool) -> Array | None:
    """The d with the smallest largest |e(u) + J(u) d| over the points, with A(u) kept on its side of zero if asked."""
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
    bounded[: 2 * len(points)] = -1.0  # the rows that are to be <= t
    matrix = np.hstack([np.vstack(rows), bounded[:, None]])
    highest = basis.limits(error)
    highest[basis.m + 1 :] = np.minimum(highest[basis.m + 1 :], 1 / _SMALLEST_CONSTANT)
    highest = np.maximum(highest, np.abs(z))
    lowest = -highest
    if basis.form == "sum_of_abs":
        lowest[basis.m + 1 :] = 0.0
    # In units of the present error, so that the solver's tolerance is relative to it.
    limits = [*zip((lowest - z) / error, (highest - z) / error, strict=True), (None, None)]
    solution = _solve(matrix, np.concatenate(right) / error, limits)
    return None if solution is None else error * solution[:-1]


def _least_squares(
    x: Array, values: Array, weights: Array, m: int, n: int, form: str, starts: Sequence[tuple[Array, Array]]
) -> Iterator[tuple[Array, Array]]:
    """The coefficients with the smallest weighted sum of squares, then other local optima, of smaller ones first."""
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
    """The sum of weights (F(u) - y)^2 as a function of z, and its minimisation."""

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
        return self._padded(self.roots * (self.f - self.y))

    def signed(self, z: Array) -> Array:
        """z, with the coefficients of A that have to be positive so."""
        return np.append(z[: self.basis.m + 1], np.abs(z[self.basis.m + 1 :])) if self.positive else z

    def jacobian(self, z: Array) -> Array:
        self.residuals(z)
        of_p, of_a = self.columns
        slope = np.where(self.a < 0, 1.0, -1.0) * self.f / self.q
        of_a = slope[:, None] * of_a
        if self.positive:
            of_a = np.where(z[self.basis.m + 1 :] < 0, -1.0, 1.0) * of_a
        return self._padded(self.roots[:, None] * np.hstack([of_p / self.q[:, None], of_a]))

    def _padded(self, rows: Array) -> Array:
        """At least as many residuals as coefficients, which Levenberg-Marquardt wants."""
        missing = len(self.basis.matrix) - len(rows)
        return rows if missing <= 0 else np.pad(rows, ((0, missing), (0, 0))[: rows.ndim])

    def __call__(self, z: Array) -> float:
        with np.errstate(all="ignore"):
            return float(np.square(self.residuals(z)).sum())

    def minimised(self, starts: list[Array]) -> list[Array]:
        """The z of the local minima that are found, the smallest first: a few steps from each start, more from some."""
        found = sorted((self._descended(z, 15) for z in starts if math.isfinite(self(z))), key=self)
        found = sorted([*(self._descended(z, 200) for z in found[:3]), *found[3:], starts[-1]], key=self)
        sums = [self(z) for z in found]
        new = [this != last and this <= _WORSE * sums[0] for this, last in zip(sums, [None, *sums], strict=False)]
        return [self.signed(z) for z, is_new in zip(found, new, strict=True) if is_new]

    def _descended(self, z: Array, steps: int) -> Array:
        options: dict[str, Any] = {"ftol": 1e-9, "xtol": 1e-12, "gtol": 1e-15, "max_nfev": steps}
        return least_squares(self.residuals, z, jac=self.jacobian, x_scale="jac", method="lm", **options).x


def _linearised(basis: _Basis, u: Array, y: Array, weights: Array) -> list[Array]:
    """Fits by Sanathanan and Koerner: |P - y Q|^2 / (last Q)^2 is minimised; the best round for each pattern."""
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
    """Minimise |first a + second b - right|^2 for b >= 0; what a cannot reach is a problem in b alone."""
    basis = np.linalg.qr(first)[0]
    b = np.zeros(second.shape[1])
    if second.shape[1]:
        left, rest = second - basis @ (basis.T @ second), right - basis @ (basis.T @ right)
        try:
            b = nnls(left, rest)[0]
        except RuntimeError:  # columns that are alike, among which it goes round in circles
            b = np.maximum(np.linalg.lstsq(left, rest, rcond=None)[0], 0.0)
    a = np.linalg.lstsq(first, right - second @ b, rcond=None)[0]
    return np.concatenate([a, b])


def _patterns(u: Array, n: int, form: str) -> tuple[bool, ...]:
    """The sign patterns to try. A(0) = 0: A crosses zero there (True), or touches it and has one sign (False)."""
    return (False, True) if form == "abs_of_sum" and n and u.min() < 0 < u.max() else (False,)


def _powers(u: Array, degree: int) -> Array:
    return np.vander(u, degree + 1, increasing=True)


def _values(p: Array, m: int, u: Array, form: str) -> tuple[Array, Array]:
    """F and Q; in the form sum_of_abs for b >= 0."""
    b = p[m + 1 :]
    q = 1.0 + np.abs(_powers(np.abs(u) if form == "sum_of_abs" else u, len(b))[:, 1:] @ b)
    return _powers(u, m) @ p[: m + 1] / q, q


def _jacobian(basis: _Basis, z: Array, u: Array) -> Array:
    """dF/dz; in the form sum_of_abs for b >= 0."""
    of_p, of_a = basis.columns(u)
    values, q = _values(basis.matrix @ z, basis.m, u, basis.form)
    slope = np.where(of_a @ z[basis.m + 1 :] < 0, 1.0, -1.0) * values / q
    return np.hstack([of_p / q[:, None], slope[:, None] * of_a])


def _solve(rows: Array, right: Array, limits: Sequence[tuple[Any, Any]]) -> Array | None:
    """The z within limits with the smallest last component and rows @ z <= right; None where the solver finds none."""
    objective = np.zeros(rows.shape[1])
    objective[-1] = 1.0
    options = {
        "primal_feasibility_tolerance": 1e-10,
        "dual_feasibility_tolerance": 1e-10,
        "maxiter": _LINEAR_PROGRAM_ITERATIONS,
    }
    for method in ("highs-ds", "highs-ipm"):  # now and then one of them gives up on a problem that the other solves
        result = linprog(objective, A_ub=rows, b_ub=right, bounds=limits, method=method, options=options)
        if result.success:
            return np.asarray(result.x)
    return None


def _unscaled(p: Array, m: int, scale: float, size: float) -> tuple[Array, Array]:
    """The coefficients in x of a fit in u = x / scale to values divided by size."""
    with np.errstate(all="ignore"):
        unscaled = p / scale ** np.concatenate([np.arange(m + 1.0), np.arange(1.0, len(p) - m)])
        unscaled[: m + 1] *= size
    lost = ~np.isfinite(unscaled) | (np.abs(p) > 1e-8) & (np.abs(unscaled) < np.finfo(np.float64).tiny)
    if lost.any():
        raise GrkanValueError(
            f"order ({m}, {len(p) - m - 1}) needs coefficients beyond float64 for |x| to {scale:g} and |target| to "
            f"{size:g}; bring both nearer to 1"
        )
    return unscaled[: m + 1], unscaled[m + 1 :]


def _evaluate(numerator: Array, denominator: Array, form: str, x: Array) -> Array:
    """F(x) by its definition, `reference.rational`, in float64."""
    a, b = (torch.from_numpy(np.array(c, dtype=np.float64)[None]) for c in (numerator, denominator))
    y = reference.rational(torch.from_numpy(np.array(x).reshape(1, -1)), a, b, form)
    return np.asarray(y.numpy().reshape(np.shape(x)))


def _grid(low: float, high: float, count: int) -> Array:
    """Points of the interval, closer at its ends (Chebyshev's) and around zero, where activations have their bend."""
    x = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0, np.pi, count))
    around_zero = np.linspace(-1, 1, count // 2 * 2 + 1)
    around_zero = max(abs(low), abs(high)) * np.sinh(8 * around_zero) / math.sinh(8)
    inside = around_zero[(around_zero > low) & (around_zero < high)]
    return np.union1d([low, *np.clip(x, low, high), high], inside)


def _narrow_places(b: Array, form: str) -> Array:
    """Where F may have more than a grid sees: zeros of A, where |A| has a kink, and about the poles of P / (1 +- A).

    Args:
        b: of F as a function of u = x / scale.
    """
    # Of a smaller coefficient nothing is seen for |x| <= 1, and the roots could overflow.
    b = np.trim_zeros(np.where(np.abs(b) < 1e-14 * max(1.0, np.abs(b).max(initial=0.0)), 0.0, b), "b")
    if not len(b):
        return b
    kinks, poles = np.roots([*b[::-1], 0.0]), np.concatenate([np.roots([*b[::-1], constant]) for constant in (1, -1)])
    about = poles.real[:, None] + poles.imag[:, None] * np.array([-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0])
    x = np.concatenate([kinks.real, about.reshape(-1)])
    return np.concatenate([x, -x]) if form == "sum_of_abs" else x


def _extrema(error: Function, low: float, high: float, more: Sequence[float] | Array = ()) -> tuple[float, Array]:
    """The largest |error| on [low, high], and where the local maxima of at least half of it are.

    Args:
        more: points that have to be looked at besides the grid's, those inside.
    """
    x = _grid(low, high, 2001)
    if len(more):
        x = np.union1d(x, np.clip(more, low, high))
    size = np.abs(error(x))
    neighbours = np.pad(size, 1, constant_values=-1.0)
    peaks = np.flatnonzero((size >= neighbours[:-2]) & (size >= neighbours[2:]) & (size >= size.max() / 2))
    # A constant |error| has a peak everywhere; a few of them say enough.
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
        raise GrkanValueError(f"interval must not reach beyond what F and target can be computed for; got {interval}")
    x = _grid(low, high, 2001)
    relative = error(x) / (largest or 1.0)
    rms = largest * (math.sqrt(trapezoid(np.square(relative), x) / (high - low)) if low < high else 1.0)
    return RationalFit(a, b, form, interval, largest, rms)


def _as_function(target: str | Function) -> Function:
    """The target on 1-D float64 arrays, checked."""
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
    """The samples, and weights that sum to 1."""
    x = _checked_vector("samples", samples)
    if weights is None:
        return x, np.full(len(x), 1 / len(x))
    w = _checked_vector("weights", weights)
    if len(w) != len(x):
        raise GrkanValueError(f"weights must be as many as samples, {len(x)}; got {len(w)}")
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
    """Fit every name in both forms at the orders (5, 4) and (7, 6): the entries of `coefficients.json`."""
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
