"""F and its gradients on random inputs of all magnitudes, compared with a formula of this file's own in long double.

`python tests/rational/test_fuzz.py --hours 1` goes on for longer, with other seeds, and prints the seed of whatever is
wrong; `--seed` runs one. In a test GRKAN_FUZZ_CASES says how many cases there are.

The promise, for arithmetic with unit roundoff u (2^-24; for float64 x 2^-53) and smallest normal number t:

    |F - exact|     <= k u (S + t),              S = the sum of the absolute terms of P over Q
    |dx - exact|    <= k u (|g| + t) (S' + t),   S' the same for F', with t added to P and A', too
    |da_i - exact|  <= k u sum (|g| + t) S_i + t u N,   S_i the same for the derivative by a_i, and likewise for db_j

where k = m + n + 8, N is the number of scalars, and every S takes the error of Q into account: it is multiplied by
1 + (the sum of the absolute terms of A) / Q. Where A is 0 within its rounding error, either sign of A will do. What is
computed is then rounded to the dtype of the result. Sums of float64, than which nothing wider is at hand, may be off by
N u more.
"""

import argparse
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grkan
from grkan.rational import dispatch
from grkan.rational.reference import FORMS

Long = np.longdouble
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = int(os.environ.get("GRKAN_FUZZ_CASES", 1000))
FEW = 50  # cases of one test

pytestmark = pytest.mark.skipif(
    np.finfo(Long).nmant < 63, reason="long double of this machine is no wider than double, or computed by software"
)

# |x| and |g|: the powers of two between which a size is drawn, uniformly in its logarithm.
SIZES = {
    "subnormal": (-149, -126),
    "tiny": (-126, -60),
    "small": (-60, -10),
    "normal": (-3, 2),
    "large": (2, 14),
    "larger": (14, 40),
    "huge": (40, 127),
}
SPECIAL = ("zero", "inf", "nan")


@dataclass
class Case:
    x: Tensor  # [rows, groups, width]
    grad: Tensor
    numerator: Tensor  # [groups or 1, m + 1]
    denominator: Tensor  # [groups or 1, n]
    form: str

    @property
    def groups(self) -> int:
        return self.x.shape[1]

    def __str__(self) -> str:
        rows, groups, width = self.x.shape
        return (
            f"{rows} rows, {groups} groups of {width}, {self.x.dtype}, {self.form}, "
            f"a {tuple(self.numerator.shape)} {self.numerator.dtype}, b {tuple(self.denominator.shape)}"
        )


def draw(seed: int, backend: str = "native", device: str = "cpu") -> Case:
    rng = np.random.default_rng(seed)
    dtype = DTYPES[rng.integers(len(DTYPES))]
    m, n = [(5, 4), (7, 6), (int(rng.integers(10)), int(rng.integers(9)))][rng.choice(3, p=[0.25, 0.15, 0.6])]
    if device != "cpu":  # the kernels are compiled for each order
        m, n = ((5, 4), (2, 3))[rng.integers(2)]
    groups = int(rng.choice([1, 2, 3, 8]))
    width = int(rng.choice([1, 2, 7, 16, 24, 33, 96]))
    if device != "cpu":  # and for each vector
        width = int(rng.choice([7, 24, 96]))
    rows = int(rng.choice([1, 2, 5, 40]))
    if rng.random() < 0.02:
        rows, width = 1 + int(rng.integers(3)), 20_000 + int(rng.integers(30_000))
    wide = torch.float64 if dtype == torch.float64 or rng.random() < 0.1 else torch.float32
    shape = (rows, groups, width)
    # The reference promises less: it multiplies by the gradient first, and is for gradients and coefficients of usual
    # size. So does the kernel for GPUs, whose powers of x underflow.
    usual = backend == "reference" or device != "cpu"
    x = _numbers(rng, shape, [*list(SIZES)[usual:], *SPECIAL]).to(dtype)
    if n == 0:  # whether NaN gets into the derivatives of a_0 and a_1 x is not promised
        x = x.nan_to_num(0.0, torch.inf, -torch.inf)
    sizes = ["normal", "large"] if usual else list(SIZES)
    grad = _numbers(rng, shape, [*sizes, "zero"] + ["nan"] * (rng.random() < 0.1)).to(dtype)
    a = _coefficients(rng, (1 if rng.random() < 0.2 else groups, m + 1), usual).to(wide)
    b = _coefficients(rng, (1 if rng.random() < 0.2 else groups, n), usual).to(wide)
    if max(len(a), len(b)) < groups:
        a = a.repeat(groups, 1)
    grad = grad.nan_to_num(torch.nan)  # of an infinite gradient nothing is promised
    case = Case(x, grad, a, b, FORMS[rng.integers(2)])
    # Where powers of x overflow float64 with these coefficients nothing is promised.
    case.x = torch.where(torch.from_numpy(_beyond(case)), 1.0, case.x).to(dtype)
    return case


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], names: list[str]) -> Tensor:
    """A few kinds of numbers, with random frequencies."""
    kinds = ["normal", *rng.choice(names, int(rng.integers(1 + min(len(names), 4))), replace=False)]
    weights = rng.random(len(kinds)) ** 3 + 1e-3
    which = rng.choice(len(kinds), shape, p=weights / weights.sum())
    values = np.zeros(shape)
    for index, kind in enumerate(kinds):
        if kind in SIZES:
            drawn = np.exp2(rng.uniform(*SIZES[kind], shape))
        else:
            drawn = np.full(shape, {"zero": 0.0, "inf": np.inf, "nan": np.nan}[kind])
        values = np.where(which == index, drawn, values)
    if rng.random() < 0.1:  # all alike, so that rounding errors add up
        values[...] = values.flat[0]
    return torch.from_numpy(np.where(rng.random(shape) < rng.choice([0, 0.5, 1]), -values, values))


def _coefficients(rng: np.random.Generator, shape: tuple[int, int], usual: bool) -> Tensor:
    values = rng.standard_normal(shape) * np.exp2(rng.integers(-8, 5, shape) * (rng.random() < 0.5))
    kind = rng.integers(6)
    if kind == 0:
        values[rng.random(shape) < rng.random()] *= 1e-14
    if kind == 1 and not usual:
        values *= np.exp2(rng.integers(-90, 40, shape))
    if kind == 2:
        values[...] = 0
    if kind >= 3:
        values[:, rng.random(shape[1]) < rng.random()] = 0
    return torch.from_numpy(values)


def long(t: Tensor) -> np.ndarray:
    return t.double().numpy().astype(Long)


@dataclass
class Terms:
    """What both the values and what they are compared by are made of, [rows, groups, width] each."""

    p: np.ndarray
    p_sum: np.ndarray
    dp: np.ndarray
    dp_sum: np.ndarray
    a: np.ndarray
    a_sum: np.ndarray
    slope: np.ndarray
    slope_sum: np.ndarray


def _terms(case: Case) -> Terms:
    x = long(case.x)
    x = np.where(np.isfinite(x), x, 0)
    magnitudes = long(case.denominator)
    t = x
    if case.form == "sum_of_abs":
        magnitudes, t = np.abs(magnitudes), np.abs(x)

    def polynomial(c: np.ndarray, powers: list[np.ndarray], first: int) -> tuple[np.ndarray, ...]:
        """Its value and derivative, each followed by the sum of absolute terms."""
        found = tuple(np.zeros_like(x) for _ in range(4))
        for k in range(c.shape[1]):
            power, column = k + first, c[:, k][:, None]
            for at, term in ((0, column * powers[power]), (2, power * column * powers[max(power - 1, 0)])):
                found[at][...] += term
                found[at + 1][...] += np.abs(term)
        return found

    numerator = long(case.numerator)
    powers, powers_t = (_powers(base, max(numerator.shape[1], magnitudes.shape[1] + 1)) for base in (x, t))
    a, a_sum, slope, slope_sum = polynomial(magnitudes, powers_t, 1)
    sign = np.where(x < 0, -1, 1) if case.form == "sum_of_abs" else 1
    return Terms(*polynomial(numerator, powers, 0), a, a_sum, slope * sign, slope_sum)


def _powers(x: np.ndarray, count: int) -> list[np.ndarray]:
    powers = [np.ones_like(x)]
    while len(powers) < count:
        powers.append(powers[-1] * x)
    return powers


def _beyond(case: Case) -> np.ndarray:
    terms, bound = _terms(case), Long(2) ** 1000
    x, grad = (np.maximum(np.nan_to_num(np.abs(long(t)), posinf=1), 1) for t in (case.x, case.grad))
    power = _powers(x, max(case.numerator.shape[1], case.denominator.shape[1] + 1))[-1]
    largest = np.maximum(terms.p_sum, 1) * np.maximum(np.maximum(terms.a_sum, terms.slope_sum), power) * grad
    return ~(largest < bound)


def wrong(case: Case, backend: str, device: str = "cpu") -> list[str]:
    """What is wrong, in words."""
    with np.errstate(all="ignore"):
        return _wrong(case, _compute(case, backend, device))


def _wrong(case: Case, found: dict[str, Tensor]) -> list[str]:
    x, grad = long(case.x), long(case.grad)
    info = torch.finfo(torch.float64 if case.x.dtype == torch.float64 else torch.float32)
    unit, tiny = Long(info.eps) / 2, Long(info.tiny)
    m, n = case.numerator.shape[1] - 1, case.denominator.shape[1]
    k = (m + n + 8) * unit
    c = _terms(case)
    q = 1 + np.abs(c.a)
    low = np.maximum(1, q - k * c.a_sum)
    of_q = 1 + c.a_sum / low
    sign = np.where(c.a < 0, -1, 1)
    uncertain = (np.abs(c.a) <= k * c.a_sum) & (c.a_sum > 0) & (case.form == "abs_of_sum")
    finite, infinite = np.isfinite(x), np.isinf(x)
    z = np.where(finite, x, 0)
    t = np.abs(z) if case.form == "sum_of_abs" else z

    f, f_scale = c.p / q, c.p_sum / low * of_q
    f_error = k * (f_scale + tiny)
    kink = (c.p_sum / low + tiny) * (c.slope_sum + tiny) / low
    df = c.dp / q - c.p / q * sign * c.slope / q
    df_error = k * ((c.dp_sum / low + kink) * of_q + tiny) + np.where(uncertain, 2 * kink, 0)
    limit, slope = _at_infinity(case, x)
    f, f_error = np.where(infinite, limit, f), np.where(infinite, k * np.abs(limit), f_error)
    df, df_error = np.where(infinite, slope, df), np.where(infinite, k * np.abs(slope), df_error)
    f, df = np.where(np.isnan(x), np.nan, f), np.where(np.isnan(x), np.nan, df)
    size = np.where(grad == 0, 0, np.abs(grad) + tiny)
    dx, dx_error = grad * df, size * df_error
    flat = infinite & (slope == 0)  # whatever the gradient is
    dx, dx_error = np.where(flat, 0, dx), np.where(flat, 0, dx_error)
    problems: list[str] = []

    def compare(name: str, actual: Tensor, exact: np.ndarray, error: np.ndarray) -> None:
        error = np.where(np.isinf(exact), 0, error)
        low, high = (_round(exact + side * error, actual.dtype) for side in (-1, 1))
        got = actual.double().numpy()
        bad = ~((low <= got) & (got <= high)) & ~(np.isnan(got) & np.isnan(exact.astype(float)))
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            here = f"x = {case.x[at]!s}, grad = {case.grad[at]!s}: " if got.ndim == 3 else ""
            problems.append(f"{name}{list(at)}: {here}{got[at]!r}, not {float(exact[at])!r} +- {float(error[at]):.3g}")

    compare("y", found["y"], f, f_error)
    if "y2" in found:
        compare("y of the backward", found["y2"], f, f_error)
    compare("dx", found["dx"], dx, dx_error)

    inverse, inverse_scale = 1 / q, of_q / low
    v, v_scale = -sign * c.p / q, c.p_sum / low + tiny
    of_a, of_b = ([], []), ([], [])
    k += x.size * unit * (case.x.dtype == torch.float64)
    for power in _powers(z, m + 1):
        of_a[0].append(grad * inverse * power)
        of_a[1].append(k * size * inverse_scale * np.abs(power))
    for power in _powers(t, n + 1)[1:]:
        of_b[0].append(grad * inverse * power * v)
        scale = inverse_scale * np.abs(power) * v_scale
        of_b[1].append(k * size * scale + np.where(uncertain, 2 * size * scale, 0))
    for name, actual, like, (terms, errors) in (
        ("da", found["da"], case.numerator, of_a),
        ("db", found["db"], case.denominator, of_b),
    ):
        if not terms:
            continue
        keep = (0, 2) if len(like) == case.groups else (0, 1, 2)
        # There is no gradient from infinity, and NaN stays NaN.
        masked = [np.where(infinite, 0, np.where(np.isnan(x), np.nan, term)) for term in terms]
        exact = np.stack([np.atleast_1d(term.sum(keep)) for term in masked], -1)
        floor = unit * tiny * x.size
        error = np.stack([np.atleast_1d(np.where(infinite, 0, e).sum(keep)) for e in errors], -1) + floor
        if name == "db" and case.form == "sum_of_abs":
            exact = exact * np.where(long(like) < 0, -1, 1)
        compare(name, actual, exact, error)
    return problems


def _round(value: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(value.astype(float)).to(dtype).double().numpy()


def _at_infinity(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The limits of F and F'."""
    limit, slope = np.zeros_like(x), np.zeros_like(x)
    for group in range(case.groups):
        a = long(case.numerator)[min(group, len(case.numerator) - 1)]
        b = long(case.denominator)[min(group, len(case.denominator) - 1)]
        i = max((k for k in range(len(a)) if a[k] != 0), default=0)
        j = max((k for k in range(1, len(b) + 1) if b[k - 1] != 0), default=0)
        for sign in (1, -1):
            ratio = a[i] / (abs(b[j - 1]) if j else 1) * (sign**i)
            of_f = math.copysign(math.inf, ratio) if i > j else ratio if i == j else 0.0
            of_df = sign * (math.copysign(math.inf, ratio) if i > j + 1 else ratio if i == j + 1 else 0.0)
            here = x[:, group] == sign * np.inf
            limit[:, group] = np.where(here, of_f, limit[:, group])
            slope[:, group] = np.where(here, of_df, slope[:, group])
    return limit, slope


def _compute(case: Case, backend: str, device: str) -> dict[str, Tensor]:
    rows, _groups, width = case.x.shape
    x, grad, *coefficients = (t.to(device) for t in (case.x, case.grad, case.numerator, case.denominator))
    leaf, a, b = (t.clone().requires_grad_() for t in (x.reshape(rows, -1), *coefficients))
    with grkan.set_backend(backend):
        y = grkan.group_rational(leaf, a, b, form=case.form)
        dx, da, db = torch.autograd.grad(
            y, (leaf, a, b), grad.reshape(rows, -1), allow_unused=True, materialize_grads=True
        )
    found = {"y": y.detach().reshape(x.shape), "dx": dx.reshape(x.shape), "da": da, "db": db}
    if backend == "native":
        of_backward = dispatch.KERNELS[device].backward(grad, x, *coefficients, case.form, width, True)
        found["y2"] = of_backward[3]
        for name, tensor in zip(("dx", "da", "db"), of_backward, strict=False):
            assert torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7)), f"{name}: other bits with y"
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("first", range(0, CASES, FEW))
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_random_inputs(backend, first):
    if backend == "native" and "cpu" not in dispatch.KERNELS:
        pytest.skip("the CPU kernel is not built")
    for seed in range(first, first + FEW):
        case = draw(seed, backend)
        problems = wrong(case, backend)
        assert not problems, f"seed {seed}: {case}:\n" + "\n".join(problems)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("first", range(0, CASES, CASES // 4))
def test_random_inputs_on_a_gpu(first):
    for seed in range(first, first + CASES // 4):
        case = draw(seed, device="cuda")
        problems = wrong(case, "native", "cuda")
        assert not problems, f"seed {seed}: {case}:\n" + "\n".join(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--first", type=int, default=1_000_000)
    parser.add_argument("--backend", choices=["native", "reference"], default="native")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments: Any = parser.parse_args()
    torch.set_num_threads(1)
    seed = arguments.first if arguments.seed is None else arguments.seed
    end, failures, started = time.monotonic() + 3600 * arguments.hours, 0, seed
    while True:
        case = draw(seed, arguments.backend, arguments.device)
        if problems := wrong(case, arguments.backend, arguments.device):
            failures += 1
            print(f"seed {seed}: {case}", *problems, sep="\n    ", flush=True)
        seed += 1
        if time.monotonic() > end:
            break
    print(f"{seed - started} cases, {failures} wrong")


if __name__ == "__main__":
    main()
