"""Coefficients for any target function: minimax on an interval, or weighted least squares on samples.

**Minimax.** Where the sign of A is prescribed, Q is linear in its coefficients, and "is an error of t possible?" is a linear
feasibility problem, |f Q - P| <= t Q. The differential correction algorithm (Cheney and Loeb 1961; Barrodale, Powell and
Roberts 1972) solves a sequence of such linear programs and converges to the global optimum, from any start. In the form
sum_of_abs there is one sign pattern, b >= 0. In abs_of_sum a fit is made for each of a few patterns, and the best is polished
by sequential linear programming on the function itself, with its extrema as the points: that takes the grid out of the
result and lets the sign changes of A move.

**Least squares.** The linearised problem is solved a few times, each time divided by the last Q (Sanathanan and Koerner
1963), for each pattern. The result, and the table's entry, are the starts of a Levenberg-Marquardt iteration.

**The table's interval is [-10, 10].** The pre-activations of a transformer lie within a few units of zero, and a few go
beyond 10. A fit on [-3, 3] is ten times as exact there and useless at 10; on [-10, 10] the largest error is 0.007 for GELU and
0.002 for SiLU at order (5, 4). No order holds on the whole line: with m = n + 1 both ends have the slope |a_m / b_n|, up to
sign, so ReLU and its smooth relatives are off by at least half the distance to the interval on one of the sides. An optimum
on the interval alone can be much worse out there, and even turn back. So a fit for the table also has to stay within
(distance to the interval) (largest |f| on it) / (its length) of the target, as far as the interval's length beyond each end.

`python -m grkan.rational.fit` makes `coefficients.json` again.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from . import reference, table
from .reference import FORMS

try:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from scipy.integrate import trapezoid
    from scipy.optimize import least_squares, linprog, nnls
except ImportError as error:
    raise ImportError('grkan.fit needs NumPy and SciPy; install them with: pip install "grkan[fit]"') from error

Array = NDArray[np.float64]
Function = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class RationalFit:
    """A rational function F = P / Q that stands for a target, and how far it is from it.

    Calling it evaluates F in float64: a float gives a float, an array an array of its shape. It is finite for |x| up to 1e40.
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
            f"{self.form} rational of order {self.order}, off by at most {self.max_error:.3g} (rms {self.rms_error:.3g}) "
            f"on [{low:g}, {high:g}]\n"
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

    Without samples the largest error on the interval is minimised. With samples it is sum_i weights_i (F(x_i) - f(x_i))^2.
    The same arguments give the same bits.

    Args:
        target: a name ("gelu", "silu" = "swish", "tanh", ...; `grkan.rational.table.NAMES` has all), or a callable that maps
            a 1-D float64 numpy array to one of the same shape.
        order: (m, n), the degrees of numerator and denominator; either may be 0.
        form: "abs_of_sum" or "sum_of_abs", the denominator's form (see `grkan.group_rational`).
        interval: (low, high). Without samples: where the error is minimised and measured. None takes the table's interval for a
            name, and then makes the fit as for the table, held close to the target outside, too, where the order allows;
            and (-10, 10) for a callable. With samples: where the errors are measured, and nothing else; None takes their range.
        samples: 1-D, the points to fit at, or the centres of a histogram's bins.
        weights: 1-D, one for each sample, not negative and not all zero; None weighs all alike.

    Returns:
        A `RationalFit`.

    Raises:
        TypeError: target, order or form is of a wrong type.
        ValueError: an unknown name or form; an interval, order, samples or weights that make no sense; a target that returns
            another shape or values that are not finite.
    """
    m, n = _checked_order(order)
    table._check_form(form)
    f = _as_function(target)
    if samples is not None:
        x, w = _checked_samples(samples, weights)
        start = _table_entry(target, (m, n), form)
        a, b = _least_squares(x, f(x), w, m, n, form, start)
        bounds = (float(x.min()), float(x.max())) if interval is None else _checked_interval(interval)
        return _measured(f, a, b, form, bounds)
    if weights is not None:
        raise ValueError("weights belong to samples; got weights and no samples")
    if interval is not None:
        bounds, guarded = _checked_interval(interval), False
    elif isinstance(target, str):
        bounds, guarded = table.interval(target, (m, n), form), True
    else:
        bounds, guarded = table.DEFAULT_INTERVAL, False
    a, b = _minimax(f, bounds, m, n, form, guarded)
    return _measured(f, a, b, form, bounds)


# Everything below works on u = x / scale in [-1, 1] and on values divided by their largest, where powers are harmless and
# the tolerances of the solvers mean the same for every target. p holds the coefficients of P, then those of A.

# Sign changes of A that are tried in the form abs_of_sum, in u. A(0) = 0, so it changes sign at zero or touches zero there.
_PATTERNS: tuple[tuple[float, ...], ...] = ((), (0.0,), (-0.05, 0.0), (0.0, 0.05), (-0.15, 0.0), (0.0, 0.15))

# The smallest Q(0), relative to the largest coefficient of Q. It bounds b where the best F has Q(0) = 0.
_SMALLEST_CONSTANT = 1e-6

# The error that is allowed outside, in (largest |f| on the interval) (distance to it) / (its length).
_GUARD = 1.5

_EXACT_ENOUGH = 1e-14


@dataclass(frozen=True)
class _Problem:
    """|F(u) - y(u)| is to be small for u in [low, high]; and at the points `outside` at most `allowed`."""

    y: Function
    low: float
    high: float
    m: int
    n: int
    form: str
    outside: Array
    allowed: Array

    def error(self, p: Array, u: Array) -> Array:
        return _evaluate(p[: self.m + 1], p[self.m + 1 :], self.form, u) - self.y(u)

    def extrema(self, p: Array) -> tuple[float, Array]:
        return _extrema(lambda u: self.error(p, u), self.low, self.high)

    def is_sane(self, p: Array) -> bool:
        return bool(np.all(np.abs(self.error(p, self.outside)) <= self.allowed * (1 + 1e-6)))


def _minimax(
    f: Function, interval: tuple[float, float], m: int, n: int, form: str, guarded: bool
) -> tuple[Array, Array]:
    """The coefficients with the smallest largest error on the interval, held close outside, too, if guarded."""
    low, high = interval
    scale = max(abs(low), abs(high))
    points = _grid(low / scale, high / scale, 81)
    values = f(points * scale)
    size = float(np.abs(values).max()) or 1.0
    distance = np.linspace(0.02, 1.0, 16) ** 1.5  # to the interval, in lengths of it
    outside = np.concatenate([low - distance * (high - low), high + distance * (high - low)]) / scale
    allowed = np.tile(_GUARD * distance, 2)

    def scaled(outside: Array, allowed: Array) -> _Problem:
        return _Problem(lambda u: f(u * scale) / size, low / scale, high / scale, m, n, form, outside, allowed)

    p = _best(scaled(outside, allowed), points) if guarded else None
    if p is None:
        p = _best(scaled(outside[:0], allowed[:0]), points)
    if p is None:
        raise RuntimeError(f"no fit of order {(m, n)} was found on the interval {interval}; try a lower order")
    return _unscaled(p, m, scale, size)


def _best(problem: _Problem, points: Array) -> Array | None:
    """The best polished fit over all sign patterns; None if none is possible."""
    weights = np.full(len(points), 1 / len(points))
    candidates = _linearised(points, problem.y(points), weights, problem.m, problem.n, problem.form)
    for changes in _patterns(points, problem.n, problem.form):
        candidate = _differential_correction(problem, points, changes)
        if candidate is not None:
            candidates.append(candidate)
    ranked = sorted(
        ((float(np.abs(problem.error(p, points)).max()), i) for i, p in enumerate(candidates) if problem.is_sane(p)),
    )
    polished = [_polished(problem, candidates[i], points) for _, i in ranked[:2]]
    return min(polished, key=lambda result: result[0])[1] if polished else None


def _differential_correction(problem: _Problem, points: Array, changes: Sequence[float]) -> Array | None:
    """The best fit on the points for which A changes sign at `changes`, by linear programs; None if there is none.

    Q = q_0 + s A, with q_0 free: dividing by it at the end normalises to q_0 = 1.
    """
    m, n = problem.m, problem.n
    y, beyond = problem.y(points), problem.y(problem.outside)
    va, vq = _powers(points, m), _signed_powers(points, n, problem.form, changes)
    outer_a, outer_q = _powers(problem.outside, m), _signed_powers(problem.outside, n, problem.form, changes)
    fixed = [  # |F - y| <= allowed outside
        np.hstack([-outer_a, (beyond - problem.allowed)[:, None] * outer_q, np.zeros((len(beyond), 1))]),
        np.hstack([outer_a, -(beyond + problem.allowed)[:, None] * outer_q, np.zeros((len(beyond), 1))]),
    ]
    if problem.form == "abs_of_sum":  # s A >= 0
        for powers_a, powers_q in ((va, vq), (outer_a, outer_q)):
            keep = -powers_q
            keep[:, 0] = 0.0
            fixed.append(np.hstack([np.zeros_like(powers_a), keep, np.zeros((len(keep), 1))]))
    lowest = 0.0 if problem.form == "sum_of_abs" else -1.0
    limits = [(None, None)] * (m + 1) + [(_SMALLEST_CONSTANT, 1.0)] + [(lowest, 1.0)] * n + [(None, None)]
    objective = np.zeros(m + n + 3)
    objective[-1] = 1.0

    best, error, q = None, float(np.abs(y).max()), np.ones_like(points)
    for _ in range(40):
        if error < _EXACT_ENOUGH:
            break
        minus_t = np.full((len(points), 1), -1.0)
        rows = [
            np.hstack([-va / q[:, None], ((y - error) / q)[:, None] * vq, minus_t]),
            np.hstack([va / q[:, None], (-(y + error) / q)[:, None] * vq, minus_t]),
        ]
        solution = _solve(objective, np.vstack(rows + fixed), None, limits)
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
    """A local minimum of the largest error on the whole interval, near p, by sequential linear programs; and that error.

    The step solves min_d max_i |e(u_i) + J(u_i) d| over the points and all extrema met so far, and is halved until it helps.
    """
    m = problem.m
    error, extrema = problem.extrema(p)
    for _ in range(30):
        if error < _EXACT_ENOUGH:
            break
        points = np.union1d(points, extrema)
        residual, jacobian = problem.error(p, points), _jacobian(p, m, points, problem.form)
        beyond, outer = problem.error(p, problem.outside), _jacobian(p, m, problem.outside, problem.form)
        # In units of the present error, so that the solver's tolerance is relative to it.
        column, none = np.full((len(points), 1), -1.0), np.zeros((len(beyond), 1))
        rows = [np.hstack([jacobian, column]), np.hstack([-jacobian, column])]
        rows += [np.hstack([outer, none]), np.hstack([-outer, none])]
        right = np.concatenate(
            [-residual / error, residual / error, (problem.allowed - beyond) / error, (problem.allowed + beyond) / error]
        )
        lowest = [(-value / error if problem.form == "sum_of_abs" else None, None) for value in p[m + 1 :]]
        objective = np.zeros(len(p) + 1)
        objective[-1] = 1.0
        step = _solve(objective, np.vstack(rows), right, [(None, None)] * (m + 1) + lowest + [(None, None)])
        if step is None or not step[-1] < 1 - 1e-6:
            break
        for length in 0.5 ** np.arange(12):
            moved = p + length * error * step[:-1]
            if problem.form == "sum_of_abs":
                moved[m + 1 :] = np.maximum(moved[m + 1 :], 0.0)
            reached, peaks = problem.extrema(moved)
            points = np.union1d(points, peaks)
            if reached < error and problem.is_sane(moved):
                break
        else:
            break
        converged = reached > error * (1 - 1e-6)
        p, error, extrema = moved, reached, peaks
        if converged:
            break
    return error, p


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
    """Fits by Sanathanan and Koerner: |P - y Q|^2 / (last Q)^2 is minimised, for each pattern; the best of a few rounds."""
    roots, found = np.sqrt(weights), []
    for changes in _patterns(u, n, form)[:2]:
        va, vb = _powers(u, m), _signed_powers(u, n, form, changes)[:, 1:]
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
    """min |first a + second b - right|^2 with b >= 0: what the free a leave of it is a problem in b alone."""
    basis = np.linalg.qr(first)[0]
    b = np.zeros(second.shape[1])
    if second.shape[1]:
        b = nnls(second - basis @ (basis.T @ second), right - basis @ (basis.T @ right))[0]
    a = np.linalg.lstsq(first, right - second @ b, rcond=None)[0]
    return np.concatenate([a, b])


def _patterns(u: Array, n: int, form: str) -> list[tuple[float, ...]]:
    """The patterns of sign changes of A that differ on the points u."""
    if form == "sum_of_abs" or n == 0:
        return [()]
    different = {}
    for changes in _PATTERNS:
        signs = _signs(u, changes)
        different.setdefault((signs * signs[0]).tobytes(), changes)
    return list(different.values())


def _signs(u: Array, changes: Sequence[float]) -> Array:
    signs = np.ones_like(u)
    for change in changes:
        signs *= np.where(u < change, -1.0, 1.0)
    return signs


def _powers(u: Array, degree: int) -> Array:
    return np.vander(u, degree + 1, increasing=True)


def _signed_powers(u: Array, n: int, form: str, changes: Sequence[float]) -> Array:
    """The columns by which Q = q_0 + ... is linear in its coefficients: 1, and the powers with the sign that A has."""
    if form == "sum_of_abs":
        return _powers(np.abs(u), n)
    powers = _powers(u, n)
    powers[:, 1:] *= _signs(u, changes)[:, None]
    return powers


def _values(p: Array, m: int, u: Array, form: str) -> tuple[Array, Array]:
    """F and Q."""
    t = np.abs(u) if form == "sum_of_abs" else u
    b = np.abs(p[m + 1 :]) if form == "sum_of_abs" else p[m + 1 :]
    q = 1.0 + np.abs(_powers(t, len(b))[:, 1:] @ b)
    return _powers(u, m) @ p[: m + 1] / q, q


def _jacobian(p: Array, m: int, u: Array, form: str) -> Array:
    """dF/dp; in the form sum_of_abs for b >= 0."""
    b = p[m + 1 :]
    powers = _powers(np.abs(u) if form == "sum_of_abs" else u, len(b))[:, 1:]
    inner = powers @ b
    values, q = _values(p, m, u, form)
    slope = np.where(inner < 0, 1.0, -1.0) * values / q
    return np.hstack([_powers(u, m) / q[:, None], slope[:, None] * powers])


def _solve(objective: Array, rows: Array, right: Array | None, limits: list[tuple[float | None, float | None]]) -> Array | None:
    """min objective @ z, rows @ z <= right, within limits; None where the solver fails."""
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    right = np.zeros(len(rows)) if right is None else right
    solution = linprog(objective, A_ub=rows, b_ub=right, bounds=limits, method="highs-ds", options=tight).x
    return None if solution is None else np.asarray(solution)


def _unscaled(p: Array, m: int, scale: float, size: float) -> tuple[Array, Array]:
    """The coefficients in x of a fit in u = x / scale to values divided by size."""
    with np.errstate(over="ignore", invalid="ignore"):
        a = p[: m + 1] * size / scale ** np.arange(m + 1.0)
        b = p[m + 1 :] / scale ** np.arange(1.0, len(p) - m)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"x as small as {scale:g} needs coefficients beyond float64; bring x nearer to 1")
    return a, b


def _evaluate(numerator: Array, denominator: Array, form: str, x: Array) -> Array:
    """F(x) by its definition, `reference.rational`, in float64."""
    a, b = (torch.from_numpy(np.array(c, dtype=np.float64)[None]) for c in (numerator, denominator))
    y = reference.rational(torch.from_numpy(np.array(x).reshape(1, -1)), a, b, form)
    return np.asarray(y.numpy().reshape(np.shape(x)))


def _grid(low: float, high: float, count: int) -> Array:
    """Points of the interval, closer at its ends (Chebyshev's) and, as activations have their bend there, around zero."""
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
    if isinstance(target, str):
        tensor_function = table.exact(target)

        def function(x: Array) -> Array:
            return tensor_function(torch.from_numpy(x)).numpy()

    elif callable(target):
        function = target
    else:
        raise TypeError(f"target must be a name or a callable on numpy arrays; got {type(target).__name__}")

    def checked(x: Array) -> Array:
        y = np.asarray(function(x.copy()))
        if y.shape != x.shape or y.dtype.kind not in "fiu":
            raise ValueError(
                f"target must return a real array of the shape of its argument, {x.shape}; "
                f"got shape {y.shape} and dtype {y.dtype}"
            )
        wrong = np.flatnonzero(~np.isfinite(y))
        if len(wrong):
            raise ValueError(f"target must be finite where it is fitted; got {y[wrong[0]]} at x = {x[wrong[0]]:g}")
        return y.astype(np.float64)

    return checked


def _checked_order(order: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(order, Sequence) or isinstance(order, str):
        raise TypeError(f"order must be a pair (m, n) of ints; got {order!r}")
    if len(order) != 2:
        raise ValueError(f"order must be a pair (m, n) of ints; got {order!r}")
    if not all(isinstance(degree, (int, np.integer)) and not isinstance(degree, bool) for degree in order):
        raise TypeError(f"order must be a pair (m, n) of ints; got {order!r}")
    if min(order) < 0:
        raise ValueError(f"order must be two degrees m >= 0 and n >= 0; got {order!r}")
    return int(order[0]), int(order[1])


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        bounds = tuple(float(bound) for bound in interval)
    except (TypeError, ValueError):
        raise TypeError(f"interval must be two numbers (low, high); got {interval!r}") from None
    if len(bounds) != 2 or not all(map(math.isfinite, bounds)) or not bounds[0] < bounds[1]:
        raise ValueError(f"interval must be two finite numbers, low < high; got {interval!r}")
    return bounds


def _checked_samples(samples: ArrayLike, weights: ArrayLike | None) -> tuple[Array, Array]:
    """The samples, and weights that sum to 1."""
    x = _checked_vector("samples", samples)
    if weights is None:
        return x, np.full(len(x), 1 / len(x))
    w = _checked_vector("weights", weights)
    if len(w) != len(x):
        raise ValueError(f"weights must be as many as samples, {len(x)}; got {len(w)}")
    if w.min() < 0:
        raise ValueError(f"weights must not be negative; got {w.min():g} at index {w.argmin()}")
    if w.max() == 0:
        raise ValueError("weights must not all be zero")
    w = w / w.max()
    return x, w / w.sum()


def _checked_vector(name: str, values: ArrayLike) -> Array:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a 1-D array of numbers; got {type(values).__name__}") from None
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"{name} must be 1-D and not empty; got shape {vector.shape}")
    wrong = np.flatnonzero(~np.isfinite(vector))
    if len(wrong):
        raise ValueError(f"{name} must be finite; got {vector[wrong[0]]} at index {wrong[0]}")
    return vector


def _table_entry(target: str | Function, order: tuple[int, int], form: str) -> tuple[Array, Array] | None:
    if not isinstance(target, str):
        return None
    try:
        a, b = table.coefficients(target, order, form)
    except table.NotInTableError:
        return None
    return np.array(a), np.array(b)


def make_table(orders: Sequence[tuple[int, int]] = ((5, 4), (7, 6))) -> list[dict[str, Any]]:
    """Fit every name in both forms: the content of `coefficients.json`."""
    entries = []
    for name in table.NAMES:
        for order in orders:
            for form in FORMS:
                f = _as_function(name)
                a, b = _minimax(f, table.DEFAULT_INTERVAL, *order, form, guarded=True)
                made = _measured(f, a, b, form, table.DEFAULT_INTERVAL)
                entries.append(
                    {
                        "name": name,
                        "form": form,
                        "order": list(order),
                        "interval": list(made.interval),
                        "numerator": made.numerator.tolist(),
                        "denominator": made.denominator.tolist(),
                        "max_error": made.max_error,
                        "rms_error": made.rms_error,
                    }
                )
    return entries


def _main() -> None:
    path = Path(__file__).with_name("coefficients.json")
    entries = []
    for entry in make_table():
        print(entry["name"], entry["form"], entry["order"], f"{entry['max_error']:.3g}", f"{entry['rms_error']:.3g}")
        entries.append(json.dumps(entry))
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(entries) + "\n]\n", encoding="utf-8")
    os.replace(temporary, path)
    print(f"wrote {len(entries)} fits to {path}", file=sys.stderr)


if __name__ == "__main__":
    _main()
