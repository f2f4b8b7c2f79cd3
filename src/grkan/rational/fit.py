"""Coefficients for any target function: minimax on an interval, or weighted least squares on samples.

**Minimax.** Where the sign of A is prescribed, Q is linear in its coefficients, and whether an error of t can be
reached is a linear feasibility problem, |f Q - P| <= t Q. The differential correction algorithm (Cheney and Loeb
1961; Barrodale, Powell and Roberts 1972) solves a few such linear programs and converges to the global optimum from
any start. In the form sum_of_abs there is one sign pattern, b >= 0. In abs_of_sum two are tried: A has one sign
everywhere, or it changes sign at zero. The best fits are polished by sequential linear programming on F itself, with
its extrema among the points: that takes the grid out of the result and lets A change sign where it wants.

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
        order: (m, n), the degrees of numerator and denominator; either may be 0.
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
    check_form(form)
    f = _as_function(target)
    if samples is not None:
        x, w = _checked_samples(samples, weights)
        start = _table_entry(target, (m, n), form)
        a, b = _least_squares(x, f(x), w, m, n, form, start)
        bounds = (float(x.min()), float(x.max())) if interval is None else _checked_interval(interval)
        return _measured(f, a, b, form, bounds)
    if weights is not None:
        raise GrkanValueError("weights belong to samples; got weights and no samples")
    if interval is not None:
        bounds, guarded = _checked_interval(interval), False
    elif isinstance(target, str):
        bounds, guarded = table.interval(target, (m, n), form), True
    else:
        bounds, guarded = table.DEFAULT_INTERVAL, False
    a, b = _minimax(f, bounds, m, n, form, guarded)
    return _measured(f, a, b, form, bounds)


# The solvers work on u = x / scale in [-1, 1] and on values divided by their largest, where powers are harmless and
# tolerances mean the same for every target. p holds the coefficients of P, then those of A.

# The smallest Q(0), relative to the largest coefficient of Q. It bounds b where the best F has Q(0) = 0.
_SMALLEST_CONSTANT = 1e-6

# The error that is allowed outside, in (largest |f| on the interval) (distance to it) / (its length).
_GUARD = 1.5

# A keeps its sign at these multiples of the points outside. A zero of A is a spike of F, and an optimum may put one
# just behind the last point where it is forbidden. Forbidden up to |x| = 240, it costs GELU at order (7, 6) 9%.
_FAR = (1.0, 1.5)

_EXACT_ENOUGH = 1e-14


@dataclass(frozen=True)
class _Problem:
    """|F(u) - y(u)| is to be small on [low, high], and `allowed`, or hardly more, at the points `outside`.

    The points below the interval come first, then as many above it. Linear programs see those that are `held`.
    """

    y: Function
    low: float
    high: float
    m: int
    n: int
    form: str
    outside: Array
    allowed: Array
    held: Array

    def error(self, p: Array, u: Array) -> Array:
        return _values(p, self.m, u, self.form)[0] - self.y(u)

    def extrema(self, p: Array) -> tuple[float, Array]:
        return _extrema(lambda u: self.error(p, u), self.low, self.high)

    def is_sane(self, p: Array) -> bool:
        """Whether F is near enough outside, with no spike: |A| falls to zero where A changes sign."""
        inner = [(_powers(factor * self.outside, self.n)[:, 1:] @ p[self.m + 1 :]).reshape(2, -1) for factor in _FAR]
        crosses = self.form == "abs_of_sum" and any(np.any(side > 0) and np.any(side < 0) for side in np.hstack(inner))
        return not crosses and bool(np.all(np.abs(self.error(p, self.outside)) <= self.allowed * 1.02))


def _minimax(
    f: Function, interval: tuple[float, float], m: int, n: int, form: str, guarded: bool
) -> tuple[Array, Array]:
    """The coefficients with the smallest largest error on the interval, held close outside, too, if guarded."""
    low, high = interval
    scale = max(abs(low), abs(high))
    points = _grid(low / scale, high / scale, 81)
    values = f(points * scale)
    size = float(np.abs(values).max()) or 1.0
    distance = np.linspace(0.02, 1.0, 241) ** 1.5  # to the interval, in lengths of it
    outside = np.concatenate([low - distance * (high - low), high + distance * (high - low)]) / scale
    allowed, held = np.tile(_GUARD * distance, 2), np.tile(np.arange(241) % 10 == 0, 2)

    def problem(count: int) -> _Problem:
        bounds = low / scale, high / scale
        guard = outside[:count], allowed[:count], held[:count]
        return _Problem(lambda u: f(u * scale) / size, *bounds, m, n, form, *guard)

    p = _best(problem(len(outside)), points) if guarded else None
    if p is None:
        p = _best(problem(0), points)
    assert p is not None  # without a guard, the linearised problem is a candidate at least
    return _unscaled(p, m, scale, size)


def _best(problem: _Problem, points: Array) -> Array | None:
    """The best polished fit over all sign patterns; None if none is possible."""
    weights = np.full(len(points), 1 / len(points))
    candidates = _linearised(points, problem.y(points), weights, problem.m, problem.n, problem.form)
    for crosses in _patterns(points, problem.n, problem.form):
        candidate = _differential_correction(problem, points, crosses)
        if candidate is not None:
            candidates.append(candidate)
    candidates = [p for p in candidates if problem.is_sane(p)]
    candidates.sort(key=lambda p: float(np.abs(problem.error(p, points)).max()))
    polished = [_polished(problem, p, points) for p in candidates[:2]]
    return min(polished, key=lambda result: result[0])[1] if polished else None


def _differential_correction(problem: _Problem, points: Array, crosses: bool) -> Array | None:
    """The best fit on the points for one sign pattern of A, by linear programs; None if there is none.

    Q = q_0 + s A, with q_0 free: dividing by it at the end normalises to q_0 = 1.
    """
    m, n = problem.m, problem.n
    outside, allowed = problem.outside[problem.held], problem.allowed[problem.held]
    y, beyond = problem.y(points), problem.y(outside)
    va, vq = _powers(points, m), _signed_powers(points, n, problem.form, crosses)
    outer_a, outer_q = _powers(outside, m), _signed_powers(outside, n, problem.form, crosses)
    fixed = [  # |F - y| <= allowed outside
        np.hstack([-outer_a, (beyond - allowed)[:, None] * outer_q, np.zeros((len(beyond), 1))]),
        np.hstack([outer_a, -(beyond + allowed)[:, None] * outer_q, np.zeros((len(beyond), 1))]),
    ]
    if problem.form == "abs_of_sum":  # s A >= 0
        for u in (points, *(factor * outside for factor in _FAR)):
            keep = -_signed_powers(u, n, problem.form, crosses) / np.maximum(np.abs(u), 1.0)[:, None] ** n
            keep[:, 0] = 0.0
            fixed.append(np.hstack([np.zeros((len(u), m + 1)), keep, np.zeros((len(u), 1))]))
    lowest = 0.0 if problem.form == "sum_of_abs" else -1.0
    limits = [(None, None)] * (m + 1) + [(_SMALLEST_CONSTANT, 1.0)] + [(lowest, 1.0)] * n + [(None, None)]

    best, error, q = None, float(np.abs(y).max()), np.ones_like(points)
    for _ in range(40):
        if error < _EXACT_ENOUGH:
            break
        minus_t = np.full((len(points), 1), -1.0)
        rows = [
            np.hstack([-va / q[:, None], ((y - error) / q)[:, None] * vq, minus_t]),
            np.hstack([va / q[:, None], (-(y + error) / q)[:, None] * vq, minus_t]),
        ]
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


def _polished(problem: _Problem, p: Array, points: Array) -> tuple[float, Array]:
    """A local minimum near p of the largest error on the whole interval, and its p, by sequential linear programs."""
    error, extrema = problem.extrema(p)
    keep_signs = False
    for _ in range(50):
        if error < _EXACT_ENOUGH:
            break
        points = np.union1d(points, extrema)
        step = _step(problem, p, error, points, keep_signs)
        before = error
        for length in 0.5 ** np.arange(12) if step is not None else ():
            moved = p + length * step
            if problem.form == "sum_of_abs":
                moved[problem.m + 1 :] = np.maximum(moved[problem.m + 1 :], 0.0)
            reached, peaks = problem.extrema(moved)
            points = np.union1d(points, peaks)
            if reached < error and problem.is_sane(moved):
                p, error, extrema = moved, reached, peaks
                break
        if error < before * (1 - 1e-6):
            keep_signs = False
        elif keep_signs or problem.form == "sum_of_abs":
            break
        else:
            # Where A touches zero, |A| has a kink that no step across it foresees; the next one stays on this side.
            keep_signs = True
    return error, p


def _step(problem: _Problem, p: Array, error: float, points: Array, keep_signs: bool) -> Array | None:
    """The d with the smallest largest |e(u) + J(u) d| over the points, with A(u) kept on its side of zero if asked."""
    m, form = problem.m, problem.form
    residual, jacobian = problem.error(p, points), _jacobian(p, m, points, form)
    outside, allowed = problem.outside[problem.held], problem.allowed[problem.held]
    beyond, outer = problem.error(p, outside), _jacobian(p, m, outside, form)
    rows = [jacobian, -jacobian, outer, -outer]
    right = [-residual, residual, allowed - beyond, allowed + beyond]
    if form == "abs_of_sum":
        for u in (points if keep_signs else points[:0], *(factor * outside for factor in _FAR)):
            powers = _powers(u, problem.n)[:, 1:] / np.maximum(np.abs(u), 1.0)[:, None] ** problem.n
            inner = powers @ p[m + 1 :]
            rows.append(np.hstack([np.zeros((len(u), m + 1)), np.where(inner < 0, powers.T, -powers.T).T]))
            right.append(np.abs(inner))
    bounded = np.zeros(sum(map(len, right)))
    bounded[: 2 * len(points)] = -1.0  # the rows that are to be <= t
    matrix = np.hstack([np.vstack(rows), bounded[:, None]])
    # In units of the present error, so that the solver's tolerance is relative to it.
    highest = 1 / _SMALLEST_CONSTANT
    lowest = 0.0 if form == "sum_of_abs" else -highest
    limits = (
        [(None, None)] * (m + 1) + [((lowest - b) / error, (highest - b) / error) for b in p[m + 1 :]] + [(None, None)]
    )
    solution = _solve(matrix, np.concatenate(right) / error, limits)
    return None if solution is None else error * solution[:-1]


def _least_squares(
    x: Array, values: Array, weights: Array, m: int, n: int, form: str, start: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """The coefficients with the smallest weighted sum of squares, from the linearised problem and from `start`."""
    scale, size = float(np.abs(x).max()) or 1.0, float(np.abs(values).max()) or 1.0
    u, y, roots = x / scale, values / size, np.sqrt(weights)
    candidates = _linearised(u, y, weights, m, n, form)
    if start is not None:
        a, b = start
        candidates.append(np.concatenate([a * scale ** np.arange(m + 1) / size, b * scale ** np.arange(1, n + 1)]))
    if form == "sum_of_abs":
        for p in candidates:
            p[m + 1 :] = np.abs(p[m + 1 :])
    # Levenberg-Marquardt, which has no bounds, wants at least as many residuals as coefficients.
    missing = max(0, m + n + 1 - len(u))

    def residuals(p: Array) -> Array:
        values, _ = _values(p, m, u, form)
        return np.pad(roots * (values - y), (0, missing))

    def jacobian(p: Array) -> Array:
        return np.pad(roots[:, None] * _jacobian(p, m, u, form), ((0, missing), (0, 0)))

    def loss(p: Array) -> float:
        return float(np.square(residuals(p)).sum())

    candidates = sorted((p for p in candidates if math.isfinite(loss(p))), key=loss)[:2]
    options: dict[str, Any] = {"method": "lm"}
    if form == "sum_of_abs" and n:
        lowest = np.concatenate([np.full(m + 1, -np.inf), np.zeros(n)])
        options = {"method": "trf", "bounds": (lowest, np.full(m + n + 1, np.inf))}
    for p in candidates[:]:
        result = least_squares(
            residuals, p, jac=jacobian, x_scale="jac", ftol=1e-9, xtol=1e-12, gtol=1e-15, max_nfev=200, **options
        )
        candidates.append(result.x)
    return _unscaled(min(candidates, key=loss), m, scale, size)


def _linearised(u: Array, y: Array, weights: Array, m: int, n: int, form: str) -> list[Array]:
    """Fits by Sanathanan and Koerner: |P - y Q|^2 / (last Q)^2 is minimised; the best round for each pattern."""
    roots, found = np.sqrt(weights), []
    for crosses in _patterns(u, n, form):
        va, vb = _powers(u, m), _signed_powers(u, n, form, crosses)[:, 1:]
        q, best = np.ones_like(u), (math.inf, np.zeros(m + n + 1))
        for _ in range(6):
            row = (roots / q)[:, None]
            if form == "abs_of_sum":
                p = np.linalg.lstsq(row * np.hstack([va, -y[:, None] * vb]), row[:, 0] * y, rcond=None)[0]
            else:
                p = _nonnegative(row * va, row * -y[:, None] * vb, row[:, 0] * y)
            values, q = _values(p, m, u, form)
            loss = float(np.square(roots * (values - y)).sum())
            if not loss < best[0]:
                break
            best = loss, p
        found.append(best[1])
    return found


def _nonnegative(first: Array, second: Array, right: Array) -> Array:
    """Minimise |first a + second b - right|^2 for b >= 0; what a cannot reach is a problem in b alone."""
    basis = np.linalg.qr(first)[0]
    b = np.zeros(second.shape[1])
    if second.shape[1]:
        b = nnls(second - basis @ (basis.T @ second), right - basis @ (basis.T @ right))[0]
    a = np.linalg.lstsq(first, right - second @ b, rcond=None)[0]
    return np.concatenate([a, b])


def _patterns(u: Array, n: int, form: str) -> tuple[bool, ...]:
    """The sign patterns to try. A(0) = 0: A crosses zero there (True), or touches it and has one sign (False)."""
    return (False, True) if form == "abs_of_sum" and n and u.min() < 0 < u.max() else (False,)


def _powers(u: Array, degree: int) -> Array:
    return np.vander(u, degree + 1, increasing=True)


def _signed_powers(u: Array, n: int, form: str, crosses: bool) -> Array:
    """The columns by which Q = q_0 + ... is linear in its coefficients: 1, and the powers with the sign that A has."""
    if form == "sum_of_abs":
        return _powers(np.abs(u), n)
    powers = _powers(u, n)
    if crosses:
        powers[u < 0, 1:] *= -1.0
    return powers


def _values(p: Array, m: int, u: Array, form: str) -> tuple[Array, Array]:
    """F and Q; in the form sum_of_abs for b >= 0."""
    b = p[m + 1 :]
    q = 1.0 + np.abs(_powers(np.abs(u) if form == "sum_of_abs" else u, len(b))[:, 1:] @ b)
    return _powers(u, m) @ p[: m + 1] / q, q


def _jacobian(p: Array, m: int, u: Array, form: str) -> Array:
    """dF/dp; in the form sum_of_abs for b >= 0."""
    powers = _powers(np.abs(u) if form == "sum_of_abs" else u, len(p) - m - 1)[:, 1:]
    values, q = _values(p, m, u, form)
    slope = np.where(powers @ p[m + 1 :] < 0, 1.0, -1.0) * values / q
    return np.hstack([_powers(u, m) / q[:, None], slope[:, None] * powers])


def _solve(rows: Array, right: Array, limits: Sequence[tuple[float | None, float | None]]) -> Array | None:
    """The z within limits with the smallest last component and rows @ z <= right; None where the solver finds none."""
    objective = np.zeros(rows.shape[1])
    objective[-1] = 1.0
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    for method in ("highs-ds", "highs-ipm"):  # now and then one of them gives up on a problem that the other solves
        result = linprog(objective, A_ub=rows, b_ub=right, bounds=limits, method=method, options=tight)
        if result.success:
            return np.asarray(result.x)
    return None


def _unscaled(p: Array, m: int, scale: float, size: float) -> tuple[Array, Array]:
    """The coefficients in x of a fit in u = x / scale to values divided by size."""
    with np.errstate(over="ignore", invalid="ignore"):
        a = p[: m + 1] * size / scale ** np.arange(m + 1.0)
        b = p[m + 1 :] / scale ** np.arange(1.0, len(p) - m)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise GrkanValueError(f"x as small as {scale:g} needs coefficients beyond float64; bring x nearer to 1")
    return a, b


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
    return np.union1d(np.clip(x, low, high), inside)


def _extrema(error: Function, low: float, high: float) -> tuple[float, Array]:
    """The largest |error| on [low, high], and where the local maxima of at least half of it are."""
    x = _grid(low, high, 2001)
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

    def error(x: Array) -> Array:
        return _evaluate(a, b, form, x) - f(x)

    largest, _ = _extrema(error, low, high)
    x = _grid(low, high, 2001)
    rms = math.sqrt(trapezoid(np.square(error(x)), x) / (high - low)) if low < high else largest
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
                made = _measured(f, *_minimax(f, interval, *order, form, guarded=True), form, interval)
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
