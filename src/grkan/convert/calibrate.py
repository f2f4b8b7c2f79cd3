"""What reaches an activation, as a histogram for each group of channels, and the rational function that suits it.

**Histograms** have fixed bins of equal width in sign(x) log(1 + |x|): 1/64 wide at zero, 1.6 % of |x| far out. So they
need no range beforehand and a few kilobytes a group, whatever the data.

**Without data** the histogram is what the weights let one expect: behind a norm with scale s and shift t, whose output
before them is taken for standard normal, a channel with weights w and bias b has the mean w t + b and the standard
deviation |w s|. The deviations are widened by 1.3, for real activations have heavier tails: on MiniLM that takes the
cosine at order (5, 4) from 0.9996 to 0.9998.

**Fits** minimise the squared error on the histogram and on a uniform floor of 1e-5 of its mass over its range: enough
to hold F where data is rare. (A floor of 1e-4 costs a third of the accuracy of order (5, 4) on MiniLM.) Beyond the
range F has to stay near: no further from the activation than the error inside plus the distance to the range, times the
largest slope of the activation, up to three lengths of the range to both sides, and at every zero of the denominator's
polynomial, where F may have a spike, however far. F's slopes at both ends of the line are alike up to the sign, so
nothing much better is possible for GELU. If a fit breaks out, the points beyond the range get a weight, and more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn.kinds import is_conv1d
from ..rational import table
from ..rational.fit import RationalFit, fit, np
from .structure import Activation, Site

_BINS_PER_UNIT = 64
_LAST_BIN = 768  # e^12, 163 thousand
_BINS = 2 * _LAST_BIN + 1

_WIDENING = 1.3
_UNKNOWN_DEVIATION = 2.0
_FLOOR = 1e-5
_REACH = 3.0
_TAIL_WEIGHTS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
# Scalars that are put into bins at a time.
_CHUNK = 2**22

_index = torch.arange(-_LAST_BIN - 0.5, _LAST_BIN + 1, 0.5, dtype=torch.float64, device="cpu") / _BINS_PER_UNIT
_EDGES, _CENTRES = ((i.sign() * i.abs().expm1()).numpy() for i in (_index[::2], _index[1::2]))


class Histogram:
    """Counts of the scalars of each group.

    Args:
        groups: their number; it divides the channels.
        channel_dim: where the channels are.
    """

    def __init__(self, groups: int, width: int, channel_dim: int = -1) -> None:
        self.groups, self.width, self.channel_dim = groups, width, channel_dim
        self.counts = np.zeros((groups, _BINS))
        self.problem = ""

    @property
    def samples(self) -> int:
        """Scalars so far."""
        return int(self.counts.sum())

    def add(self, x: Tensor) -> None:
        """Count the scalars of x; what is wrong with it goes into `problem`."""
        if x.is_nested:
            for part in x.unbind():
                self.add(part)
            return
        if not x.is_floating_point() or x.dim() < -self.channel_dim or x.shape[self.channel_dim] != self.width:
            self.problem = f"its input has shape {tuple(x.shape)} and dtype {x.dtype}, not {self.width} channels"
            return
        rows = x.detach().movedim(self.channel_dim, -1).reshape(-1, self.width)
        if rows.numel() and not rows.isfinite().all():
            self.problem = "its input is not finite"
            return
        offsets = torch.arange(self.groups, device=x.device) * _BINS + _LAST_BIN
        offsets = offsets.repeat_interleave(self.width // self.groups)
        for part in rows.split(max(1, _CHUNK // self.width)):
            t = part.float()
            bins = (t.sign() * t.abs().log1p() * _BINS_PER_UNIT).round().clamp(-_LAST_BIN, _LAST_BIN).long() + offsets
            counts = torch.bincount(bins.flatten(), minlength=self.groups * _BINS)
            self.counts += counts.reshape(self.groups, _BINS).cpu().numpy()


def expected(site: Site, groups: int) -> Histogram:
    """The histogram that the weights let one expect, see the module's description."""
    histogram = Histogram(groups, site.width)
    mean, deviation = _moments(site)
    z = torch.linspace(-6.0, 6.0, 121, dtype=torch.float64, device="cpu")
    density = (-z.square() / 2).exp()
    per_group = len(mean) // groups if len(mean) == site.width else len(mean)
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group) if len(mean) == site.width else slice(None)
        x = mean[rows, None] + _WIDENING * deviation[rows, None] * z
        bins = (x.sign() * x.abs().log1p() * _BINS_PER_UNIT).round().clamp(-_LAST_BIN, _LAST_BIN).long() + _LAST_BIN
        weights = density.expand(x.shape).flatten()
        histogram.counts[group] = torch.bincount(bins.flatten(), weights, _BINS).numpy()
    return histogram


def _moments(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each output of the first linear layer, one of each norm that may be in front: float64."""
    first: Any = site.first
    unknown = torch.zeros(1, dtype=torch.float64), torch.full((1,), _UNKNOWN_DEVIATION, dtype=torch.float64)
    weight = getattr(first, "weight", None)
    if not site.norms or not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return unknown
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
    # As one normal distribution with the moments of the mixture.
    mean = torch.stack(means).mean(0)
    square = torch.stack([s + (m - mean).square() for s, m in zip(squares, means, strict=True)]).mean(0)
    if not (mean.isfinite().all() and square.isfinite().all()):
        return unknown
    return mean, square.sqrt()


@dataclass(frozen=True)
class GroupFit:
    """The function of one group, and what it was fitted to."""

    layer: str
    group: int
    activation: str
    target: Callable[[Any], Any]
    """The activation, on float64 numpy arrays."""
    fit: RationalFit
    x: Any
    """float64, (n,): centres of the bins that are not empty."""
    weights: Any
    """float64, (n,): their counts as parts of 1."""

    @property
    def sums(self) -> tuple[float, float, float]:
        """Means of the squared error, of the squared activation, and of its product with F, over the histogram."""
        y, f = self.target(self.x), self.fit(self.x)
        return tuple(float((self.weights * v).sum()) for v in ((f - y) ** 2, y * y, y * f))  # type: ignore[return-value]

    @property
    def relative_error(self) -> float:
        """The root mean square of the error, by that of the activation."""
        error, size, _ = self.sums
        return math.sqrt(error / size) if size else math.sqrt(error)


def fit_group(
    layer: str, group: int, activation: Activation, counts: Any, order: tuple[int, int], form: str
) -> GroupFit:
    """Fit the function of one group to a row of a histogram.

    Raises:
        ValueError: the activation cannot be fitted there.
    """
    filled = np.flatnonzero(counts)
    x, weights = _CENTRES[filled], counts[filled] / counts.sum()
    low, high = float(_EDGES[filled[0]]), float(_EDGES[filled[-1] + 1])
    middle, half = (low + high) / 2, max((high - low) / 2, 0.5)  # one value alone would determine nothing
    low, high = middle - half, middle + half

    def target(values: Any) -> Any:
        return activation.function(torch.from_numpy(np.array(values, dtype=np.float64))).numpy()

    named = activation.name if _is_named(activation, target, low, high) else target
    distance = (high - low) * np.linspace(0.0, 1.0, 200)[1:] ** 2 * _REACH
    far = _finite(target, np.concatenate([low - distance, high + distance]))
    slopes = np.abs(np.gradient(target(np.sort(far)), np.sort(far))) if len(far) > 1 else np.ones(1)
    inside = np.linspace(low, high, 257)
    slope = max(float(slopes.max()), float(np.abs(np.gradient(target(inside), inside)).max()), 1e-3)
    points = np.concatenate([x, inside[::-1]])
    mass = np.concatenate([weights, np.full(len(inside), _FLOOR / len(inside))])
    outer = far[::6]
    outside = np.maximum(low - outer, outer - high) / (high - low)
    found = None
    for tail in _TAIL_WEIGHTS:
        samples = np.concatenate([points, outer]) if tail else points
        by = np.concatenate([mass, tail / len(outer) / (1 + (4 * outside) ** 2)]) if tail else mass
        candidate = fit(named, order, form=form, samples=samples, weights=by, interval=(low, high))
        found = candidate
        if _stays_near(candidate, target, low, high, far, slope):
            break
    assert found is not None
    return GroupFit(layer, group, activation.name, target, found, x, weights)


def _is_named(activation: Activation, target: Callable[[Any], Any], low: float, high: float) -> bool:
    """Whether the table's function of that name is the activation, on this interval, too."""
    if activation.name not in table.NAMES:
        return False
    x = np.linspace(low, high, 97)
    return bool(np.allclose(table.exact(activation.name)(torch.from_numpy(x)).numpy(), target(x), 1e-7, 1e-9))


def _finite(target: Callable[[Any], Any], x: Any) -> Any:
    with np.errstate(all="ignore"):
        return x[np.isfinite(target(x))]


def _stays_near(f: RationalFit, target: Callable[[Any], Any], low: float, high: float, far: Any, slope: float) -> bool:
    points = np.concatenate([far, _finite(target, _zeros(f, low, high))])
    distance = np.maximum(low - points, points - high)
    return bool(np.all(np.abs(f(points) - target(points)) <= f.max_error + slope * distance))


def _zeros(f: RationalFit, low: float, high: float) -> Any:
    """The zeros outside of the polynomial in the denominator: where it changes its sign, |A| has a notch."""
    if f.form == "sum_of_abs" or not np.any(f.denominator):
        return np.empty(0)
    roots = np.roots(np.trim_zeros(f.denominator[::-1], "f"))  # without the one at 0
    roots = roots[np.abs(roots.imag) <= 1e-6 * np.abs(roots)].real
    return roots[((roots < low) | (roots > high)) & (np.abs(roots) < 1e30)]


def largest_divisor(width: int, bound: int) -> int:
    """The largest divisor of width that is not above the bound."""
    return max(d for d in range(1, min(bound, width) + 1) if width % d == 0)
