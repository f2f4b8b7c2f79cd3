"""Collect the inputs of an activation in a histogram per group of channels, and fit a rational function to them.

**Histograms** use bins of float32 itself: sign, exponent and the first five bits of the mantissa. Each bin is 1.6 to
3.1 % of |x| wide. They need no range beforehand, take 128 KiB per group whatever the data, and are as fine for inputs
of 1e-30 as for inputs of 1e30. A sample of whole rows is kept as well, a few hundred kilobytes per activation, to
compare the output of a layer.

**Without data** the histogram is predicted from the weights. Behind a norm with scale s and shift t, whose output
before scale and shift is assumed to be standard normal, a channel with weights w and bias b has the mean w t + b and
the standard deviation |w s|. The deviations are doubled, because real activations have heavier tails: on MiniLM the
cosine at order (5, 4) is 0.9985 as predicted, 0.9994 widened by 1.3, and 0.9998 doubled. Where nothing predicts the
size of the inputs, F is fitted to a mixture of sizes, and its error is that for the size at which it is largest. A
ReLU of order (5, 4), for example, is off by 0.01 for inputs of the size that it was fitted to, and by 0.26 for inputs
a sixteenth as large.

**Fits** minimise a weighted sum of two squared errors, so that neither the bulk of the inputs nor a few large ones
dominate. The first is the squared error divided by the mean square of the activation. It measures the norm of the
whole output, in which one token that is 300 times as large outweighs a thousand others. The second has three times the
weight, and divides both squares by x^2 + (3 s)^2, where s is the size of a usual input. It measures each token after
its own normalisation. For inputs without outliers the two are nearly the same. A uniform floor of 1e-5 of the mass over
the range, divided in the same way, controls F where data is rare. (A floor of 1e-4 costs a third of the accuracy
of order (5, 4) on MiniLM.) All of this is in units of s and of the range, so inputs of any size give the same problem:
F(x) becomes r F(x / r).

Beyond the range F has to stay near the activation. The allowed distance is the error inside, plus the distance to the
range times the largest slope of the activation. This is checked up to three lengths of the range on both sides, and at
every zero of the denominator's polynomial, however far, because F may have a spike there. The slopes of F at plus and
minus infinity are equal up to the sign, so nothing much better is possible for GELU. If a fit leaves these bounds, the
points beyond the range get a weight, which is raised step by step.

**Coefficients are float32.** For inputs of 1e-12 or 1e12 the higher coefficients exceed its range. Then the order is
lowered until the remaining coefficients can be represented in float32, and the higher ones are zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..nn.kinds import is_conv1d
from ..rational import table
from ..rational.fit import Rational, RationalFit, local_fits, measured, np
from .activation import Activation
from .batches import selected_rows
from .site import Site

# The low bits of float32 that a bin's number ignores, and the number of bins per sign.
_SHIFT = 18
_ONE_SIGN = 2 ** (31 - _SHIFT)
_BINS = 2 * _ONE_SIGN
_INFINITE = (255 << 23) >> _SHIFT
# Scalars that are counted at a time: float32 counts exactly up to 2^24.
_CHUNK = 2**22

_numbers = np.arange(_INFINITE, dtype=np.int32) << _SHIFT
_LOWER, _MIDDLE = ((_numbers + part).view(np.float32).astype(np.float64) for part in (0, 1 << (_SHIFT - 1)))
_UPPER = np.append(_LOWER[1:], float(torch.finfo(torch.float32).max))
_MIDDLE[0] = 0.0  # nearly always exact zeros

# Scalars in the rows that are kept of an activation's inputs: random rows, and the largest ones.
_SAMPLE = 2**18
_LARGEST = 2**16

_WIDENING = 2.0
_DEVIATIONS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Those of inputs whose size is unknown."""

_WHOLE = 0.3
_USUAL = 3.0
_FLOOR = 1e-5
_REACH = 3.0
_TAIL_WEIGHTS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
# Smaller inputs count as zeros.
_NOTHING = 1e-30


class Histogram:
    """Counts of the scalars of each group, and a sample of the rows.

    Args:
        groups: the number of groups; it divides the number of channels.
        channel_dim: the dimension of the channels.
    """

    def __init__(self, groups: int, width: int, channel_dim: int = -1) -> None:
        self.groups, self.width, self.channel_dim = groups, width, channel_dim
        self.counts = np.zeros((groups, _BINS))
        self.problem = ""
        self.guessed = False
        """Whether nothing tells the size of the inputs."""
        self.real: list[Tensor] = []
        """Masks (batch, length) of the real tokens. In an input of this shape, only these tokens are counted."""
        self.second: Any = None
        """The second linear layer, if calibration showed that the activation's output goes straight into it."""
        self.rows = 0
        self.sample = _Sample(max(1, _SAMPLE // width), by_size=False)
        self.largest = _Sample(max(1, _LARGEST // width), by_size=True)

    @property
    def samples(self) -> int:
        """The number of scalars counted so far."""
        return int(self.counts.sum())

    def add(self, x: Tensor) -> None:
        """Count the scalars of x. If x cannot be used, `problem` says why."""
        if x.is_nested:
            for part in x.unbind():
                self.add(part)
            return
        if not x.is_floating_point() or x.dim() < -self.channel_dim or x.shape[self.channel_dim] != self.width:
            self.problem = (
                f"its input has shape {tuple(x.shape)} and dtype {x.dtype}, not {self.width} floating-point channels"
            )
            return
        rows = x.detach().movedim(self.channel_dim, -1).reshape(-1, self.width)
        if self.channel_dim == -1:
            rows = rows[selected] if (selected := selected_rows(x, self.real)) is not None else rows
        offsets = torch.arange(self.groups, dtype=torch.int32, device=x.device) * _BINS
        offsets = offsets.repeat_interleave(self.width // self.groups)
        for part in rows.split(max(1, _CHUNK // self.width)):
            bins = _bin_of(part.float()).add_(offsets).flatten()
            counts = torch.zeros(self.groups * _BINS, device=x.device)
            counts = counts.index_add_(0, bins, counts.new_ones(1).expand(len(bins))).reshape(self.groups, 2, -1)
            if counts[:, :, _INFINITE:].any():
                self.problem = "its input is not finite"
                return
            self.counts += counts.reshape(self.groups, _BINS).cpu().numpy()
        self.rows += len(rows)
        self.sample.add(rows)
        self.largest.add(rows)

    def row_weights(self) -> tuple[Tensor, Tensor]:
        """Return the kept rows, and how many rows each represents: 1 for the largest, and equal shares of the rest.

        Returns:
            rows (k, width), weights (k,): float64 on the CPU.
        """
        others = self.sample.rows[~torch.isin(self.sample.numbers, self.largest.numbers)]
        rest = self.rows - len(self.largest.rows)
        weights = torch.ones(len(self.largest.rows) + len(others), dtype=torch.float64, device="cpu")
        weights[len(self.largest.rows) :] = rest / max(len(others), 1)
        return torch.cat([self.largest.rows, others]).double(), weights


class _Sample:
    """Up to `size` of the rows that were added: random ones, or those of the largest norm."""

    def __init__(self, size: int, by_size: bool) -> None:
        self.size, self.by_size, self.seen = size, by_size, 0
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self.numbers = torch.empty(0, dtype=torch.long, device="cpu")
        self.rows = torch.empty(0, 0, device="cpu")

    def add(self, rows: Tensor) -> None:
        """Consider rows (n, width) for the sample."""
        if self.by_size:
            keys = torch.linalg.vector_norm(rows.float(), ord=math.inf, dim=1).double().cpu()
        else:
            keys = torch.rand(len(rows), dtype=torch.float64, generator=self.generator, device="cpu")
        least = float(self.keys.min()) if len(self.keys) == self.size else -1.0
        new = torch.nonzero(keys > least).flatten()
        keys, numbers = torch.cat([self.keys, keys[new]]), torch.cat([self.numbers, self.seen + new])
        kept = keys.topk(min(self.size, len(keys)), sorted=False).indices
        from_old, from_new = kept[kept < len(self.keys)], kept[kept >= len(self.keys)] - len(self.keys)
        taken = rows[new[from_new].to(rows.device)].to("cpu", copy=True)
        self.rows = torch.cat([self.rows[from_old], taken]) if len(from_old) else taken
        order = torch.cat([from_old, from_new + len(self.keys)])
        self.keys, self.numbers, self.seen = keys[order], numbers[order], self.seen + len(rows)


def _bin_of(x: Tensor) -> Tensor:
    """Return the int32 bin number of each element of a float32 tensor."""
    return (x.contiguous().view(torch.int32) >> _SHIFT).bitwise_and_(_BINS - 1)


def _filled(counts: Any) -> tuple[Any, Any, float, float]:
    """Return the middles and shares of the non-empty bins, in ascending order, and the range that they cover."""
    filled = np.flatnonzero(counts)
    negative, number = filled >= _ONE_SIGN, filled % _ONE_SIGN
    x = np.where(negative, -_MIDDLE[number], _MIDDLE[number])
    low = np.where(negative, -_UPPER[number], _LOWER[number]).min()
    high = np.where(negative, -_LOWER[number], _UPPER[number]).max()
    order = np.argsort(x, kind="stable")
    return x[order], counts[filled[order]] / counts.sum(), float(low), float(high)


def expected(site: Site, groups: int) -> Histogram:
    """Predict the histogram from the weights; see the description of the module."""
    histogram = Histogram(groups, site.width)
    moments = _moments(site)
    if moments is None:
        histogram.guessed = True
        deviation = torch.tensor(_DEVIATIONS, dtype=torch.float64, device="cpu")
        mean = torch.zeros_like(deviation)
    else:
        mean, deviation = moments[0], _WIDENING * moments[1]
    own = moments is not None and len(mean) == site.width
    z, density = _normal()
    for group in range(groups):
        rows = slice(group * site.width // groups, (group + 1) * site.width // groups) if own else slice(None)
        x = mean[rows, None] + deviation[rows, None] * z
        counts = torch.bincount(_bin_of(x.float()).flatten(), density.expand(x.shape).flatten(), _BINS)
        histogram.counts[group] = counts.numpy()
    return histogram


def _normal() -> tuple[Tensor, Tensor]:
    """Return points, and the density of standard normal numbers there, up to a factor: float64."""
    z = torch.linspace(-6.0, 6.0, 121, dtype=torch.float64, device="cpu")
    return z, (-z.square() / 2).exp()


def _moments(site: Site) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation of each channel over the possible norms, float64; None if they are unknown."""
    first: Any = site.first
    weight = getattr(first, "weight", None)
    if not site.norms or not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    with torch.no_grad():
        weight = weight.detach().to("cpu", torch.float64)
        weight = weight.T if is_conv1d(first) else weight.flatten(1)
        bias = 0.0 if first.bias is None else first.bias.detach().to("cpu", torch.float64)
        means, squares = [], []
        for norm in site.norms:
            scale = norm.weight.detach().to("cpu", torch.float64)  # type: ignore[operator]
            shift = getattr(norm, "bias", None)
            shift = torch.zeros_like(scale) if shift is None else shift.detach().to("cpu", torch.float64)
            means.append(weight @ shift + bias)
            squares.append((weight * scale).square().sum(1))
    # One normal distribution with the moments of the mixture.
    mean = torch.stack(means).mean(0)
    square = torch.stack([s + (m - mean).square() for s, m in zip(squares, means, strict=True)]).mean(0)
    if not (mean.isfinite().all() and square.isfinite().all()):
        return None
    return mean, square.sqrt()


@dataclass(frozen=True)
class GroupFit:
    """The function of one group, and the data it was fitted to."""

    layer: str
    group: int
    activation: str
    target: Callable[[Any], Any]
    """The activation, on float64 numpy arrays."""
    fit: RationalFit
    x: Any
    """float64, (n,): the middles of the non-empty bins, in ascending order."""
    weights: Any
    """float64, (n,): the counts of the bins, as fractions of 1."""
    best: Rational
    """The function of this order with the smallest mean squared error over the histogram that a search from several
    starts finds. Its values elsewhere do not matter."""

    @property
    def sums(self) -> tuple[float, float, float]:
        """Means over the histogram of the squared error, the squared activation, and the activation times F."""
        y, f = self.target(self.x), self.fit(self.x)
        return tuple(float((self.weights * v).sum()) for v in ((f - y) ** 2, y * y, y * f))  # type: ignore[return-value]

    @property
    def best_square(self) -> float:
        """The mean squared error of `best` over the histogram."""
        return float((self.weights * (self.best(self.x) - self.target(self.x)) ** 2).sum())

    @property
    def usual(self) -> float:
        """The size of a usual input: its standard deviation, if the inputs are normal."""
        return _usual(self.x, self.weights)

    @property
    def relative_error(self) -> float:
        """The root mean square of the error, divided by that of the activation."""
        error, size, _ = self.sums
        return math.sqrt(error / size) if size else math.sqrt(error)

    @property
    def worst_error(self) -> float:
        """The largest relative error for inputs of one of the sizes that an unknown input may have."""
        z, density = (t.numpy() for t in _normal())
        found = []
        for deviation in _DEVIATIONS:
            y = self.target(deviation * z)
            error = self.fit(deviation * z) - y
            found.append(math.sqrt(float((density * error**2).sum() / (density * y**2).sum())))
        return max(found)


def fit_group(
    layer: str, group: int, activation: Activation, counts: Any, order: tuple[int, int], form: str
) -> GroupFit:
    """Fit the function of one group to a row of a histogram.

    Raises:
        ValueError: the activation cannot be fitted on these inputs.
    """
    x, weights, low, high = _filled(counts)
    # A single value would not determine a function.
    largest = max(-low, high)
    middle, half = (low + high) / 2, max((high - low) / 2, largest / 4 if largest > _NOTHING else 0.5)
    low, high = middle - half, middle + half

    def target(values: Any) -> Any:
        return activation.function(torch.from_numpy(np.array(values, dtype=np.float64))).numpy()

    named = activation.name if _is_named(activation, target, low, high) else target
    usual = _usual(x, weights) or half
    points, mass = _merged(x, weights, usual)
    data = _Data(named, target, points, mass, low, high, usual)
    found = _representable(data, order, form)
    rivals = [found, *local_fits(named, order, form, points, mass, [found])]
    best = min(rivals, key=lambda rival: _square(rival, target, x, weights))
    return GroupFit(layer, group, activation.name, target, found, x, weights, best)


@dataclass(frozen=True)
class _Data:
    """The data that a group's function is fitted to."""

    named: str | Callable[[Any], Any]
    target: Callable[[Any], Any]
    x: Any
    mass: Any
    low: float
    high: float
    usual: float
    """The size of a usual input."""


def _usual(x: Any, weights: Any) -> float:
    """Return the size of a usual input: 1.48 times the median of |x|, without zeros. For normal x, the deviation."""
    size = np.abs(x)
    order = np.argsort(size, kind="stable")
    order = order[size[order] > _NOTHING]
    if not len(order):
        return 0.0
    share = np.cumsum(weights[order])
    return float(1.48 * size[order][np.searchsorted(share, share[-1] / 2)])


def _merged(x: Any, weights: Any, usual: float) -> tuple[Any, Any]:
    """Merge inputs into cells 1/16 of |x| wide, or of a usual input where x is smaller; return their means and masses.

    Where usual inputs are large, cells near zero are 1/16 wide, because many activations bend at the scale of 1.
    """
    _, cell = np.unique(np.floor(16 * np.arcsinh(x / min(usual, 1.0))), return_inverse=True)
    mass = np.bincount(cell, weights)
    return np.bincount(cell, weights * (x / usual)) / mass * usual, mass


def _square(f: Rational, target: Callable[[Any], Any], x: Any, weights: Any) -> float:
    with np.errstate(all="ignore"):
        square = float((weights * (f(x) - target(x)) ** 2).sum())
    return square if math.isfinite(square) else math.inf


def _representable(data: _Data, order: tuple[int, int], form: str) -> RationalFit:
    """Return the fit of an order. If its coefficients leave float32's range, fit a lower order, padded with zeros."""
    m, n = order
    best, least = None, math.inf
    for less in range(max(m, n) + 1):
        lower = max(m - less, 0), max(n - less, 0)
        try:
            found = _near(data, lower, form)
        except ValueError:
            if lower == (0, 0):
                raise
            continue
        numerator = np.pad(found.numerator, (0, m - lower[0]))
        denominator = np.pad(found.denominator, (0, n - lower[1]))
        with np.errstate(all="ignore"):
            single = [c.astype(np.float32).astype(np.float64) for c in (numerator, denominator)]
        rounded = replace(found, numerator=single[0], denominator=single[1])
        exact = _square(found, data.target, data.x, data.mass)
        reached = _square(rounded, data.target, data.x, data.mass)
        fine = reached <= 1.01 * exact + 1e-12 * float((data.mass * data.target(data.x) ** 2).sum())
        if fine or reached < least:
            best, least = replace(found, numerator=numerator, denominator=denominator) if fine else rounded, reached
        if fine:
            break
    assert best is not None
    return best


def _near(data: _Data, order: tuple[int, int], form: str) -> RationalFit:
    """Return the fit of an order that, if possible, also stays near the activation beyond the range."""
    target, low, high = data.target, data.low, data.high
    reach = np.arcsinh([low / data.usual, high / data.usual])
    inside = np.clip(np.sinh(np.linspace(reach[0], reach[1], 257)) * data.usual, low, high)
    points, y = np.concatenate([data.x, inside[::-1]]), target(data.x)
    spacing = np.gradient(inside) / (high - low)
    near = 1 / (_USUAL**2 + (points / data.usual) ** 2)
    sizes = [float((data.mass * part * (y / data.usual) ** 2).sum()) for part in (1.0, near[: len(y)])]
    mass = near / (sizes[1] or 1.0)
    mass[: len(y)] += _WHOLE / (sizes[0] or 1.0)
    mass *= np.concatenate([data.mass, _FLOOR * spacing[::-1]])
    distance = (high - low) * np.linspace(0.0, 1.0, 200)[1:] ** 2 * _REACH
    far = _finite(target, np.concatenate([low - distance, high + distance]))
    slopes = np.abs(np.gradient(target(np.sort(far)), np.sort(far))) if len(far) > 1 else np.ones(1)
    slope = max(float(slopes.max()), float(np.abs(np.gradient(target(inside), inside)).max()), 1e-3)
    outer = far[::6]
    outside = np.maximum(low - outer, outer - high) / (high - low)
    samples = np.concatenate([points, outer])
    rare = mass.sum() / len(outer) / (1 + (4 * outside) ** 2)
    rounding = 1e-6 * slope * (high - low)
    for tail in _TAIL_WEIGHTS:
        weights = np.concatenate([mass, tail * rare]) if tail else mass
        by = samples if tail else points
        # With a numerator of one degree less, F is flat far out, and often stays near f where the best fit does not.
        for m in range(order[0], max(order[0] - 2, 0), -1):
            for found in local_fits(data.named, (m, order[1]), form, by, weights):
                found = replace(found, numerator=np.pad(found.numerator, (0, order[0] - m)))
                # A spike between the points shows only in the largest error on the range, which takes long to measure.
                limit = 2 * float(np.abs(found(points) - target(points)).max()) + rounding
                if _stays_near(found, limit, target, low, high, far, slope):
                    fit = measured(found, data.named, (low, high))
                    if fit.max_error <= limit and _stays_near(fit, fit.max_error, target, low, high, far, slope):
                        return fit
    return measured(found, data.named, (low, high))


def _is_named(activation: Activation, target: Callable[[Any], Any], low: float, high: float) -> bool:
    """Return whether the table's function of that name also equals the activation on this interval."""
    if activation.name not in table.NAMES:
        return False
    x = np.linspace(low, high, 97)
    return bool(np.allclose(table.exact(activation.name)(torch.from_numpy(x)).numpy(), target(x), 1e-7, 1e-9))


def _finite(target: Callable[[Any], Any], x: Any) -> Any:
    with np.errstate(all="ignore"):
        return x[np.isfinite(target(x))]


def _stays_near(
    f: Rational, error: float, target: Callable[[Any], Any], low: float, high: float, far: Any, slope: float
) -> bool:
    """Return whether F stays near the activation beyond the range, given its error in it and the largest slope."""
    points = np.concatenate([far, _finite(target, _zeros(f, low, high))])
    distance = np.maximum(low - points, points - high)
    return bool(np.all(np.abs(f(points) - target(points)) <= error + slope * distance))


def _zeros(f: Rational, low: float, high: float) -> Any:
    """Return the denominator polynomial's zeros outside the range: |A| has a notch where A changes its sign."""
    if f.form == "sum_of_abs" or not np.any(f.denominator):
        return np.empty(0)
    roots = np.roots(np.trim_zeros(f.denominator[::-1], "f"))  # without zeros at 0
    roots = roots[np.abs(roots.imag) <= 1e-6 * np.abs(roots)].real
    return roots[((roots < low) | (roots > high)) & (np.abs(roots) < 1e30)]


def largest_divisor(width: int, bound: int) -> int:
    """Return the largest divisor of width that is at most bound."""
    return max(d for d in range(1, min(bound, width) + 1) if width % d == 0)
