"""Histograms, what the weights let expect, and fits to both."""

import numpy as np
import pytest
import torch
from torch import nn

from grkan.convert.calibrate import _CENTRES, Histogram, expected, fit_group, largest_divisor
from grkan.convert.structure import as_activation, find_sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_histogram_counts_every_scalar_of_its_group(dtype):
    x = (torch.randn(7, 3, 12) * torch.logspace(-3, 4, 12)).to(dtype)
    histogram = Histogram(3, 12)
    histogram.add(x[:4])
    histogram.add(x[4:])
    assert histogram.samples == x.numel()
    for group in range(3):
        values = np.sort(x[..., 4 * group : 4 * group + 4].double().numpy().ravel())
        binned = np.repeat(_CENTRES, histogram.counts[group].astype(int))
        assert np.all(np.abs(binned - values) <= (1 + np.abs(values)) / 127)


def test_channels_first():
    x = torch.stack([torch.full((2, 5), -1.0), torch.full((2, 5), 3.0)])[None]
    histogram = Histogram(2, 2, 1)
    histogram.add(x)
    means = (histogram.counts * _CENTRES).sum(1) / histogram.counts.sum(1)
    assert means == pytest.approx([-1, 3], abs=0.05)


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (torch.ones(3, 5), "has shape"),
        (torch.ones(3, 4, dtype=torch.long), "torch.int64"),
        (torch.tensor([[1.0, 2.0, float("inf"), 0.0]]), "not finite"),
    ],
)
def test_inputs_that_do_not_fit(x, problem):
    histogram = Histogram(2, 4)
    histogram.add(x)
    assert problem in histogram.problem
    assert histogram.samples == 0


def test_the_expected_histogram_has_the_moments_of_the_channels():
    model = nn.Sequential(nn.LayerNorm(64), nn.Sequential(nn.Linear(64, 4), nn.GELU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 2)
        model[0].bias.uniform_(-1, 1)
        model[1][0].bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        z = model[1][0](model[0].bias + model[0].weight * torch.randn(20_000, 64))
    (site,), _ = find_sites(model)
    counts = expected(site, 4).counts
    shares = counts / counts.sum(1, keepdims=True)
    mean = (shares * _CENTRES).sum(1)
    deviation = np.sqrt((shares * _CENTRES**2).sum(1) - mean**2)
    assert mean == pytest.approx(z.mean(0).numpy(), abs=0.05)
    assert deviation == pytest.approx(1.3 * z.std(0).numpy(), rel=0.03)  # widened


@pytest.mark.parametrize("form", ["abs_of_sum", "sum_of_abs"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Hardtanh()])
def test_a_fit_is_near_where_the_data_is_and_never_far(act, form):
    histogram = Histogram(1, 1)
    rng = np.random.default_rng(0)
    histogram.add(torch.from_numpy(np.append(rng.normal(-0.5, 1.0, 100_000), [-14.0, 21.0]))[:, None])
    found = fit_group("layer", 0, as_activation(act), histogram.counts[0], (5, 4), form)
    z = rng.normal(-0.5, 1.0, 10_000)
    error = found.fit(z) - act(torch.from_numpy(z)).numpy()
    size = np.sqrt(np.mean(act(torch.from_numpy(z)).numpy() ** 2))
    assert np.sqrt(np.mean(error**2)) < 0.06 * size
    assert found.relative_error == pytest.approx(np.sqrt(np.mean(error**2)) / size, rel=0.1)
    low, high = found.fit.interval
    x = np.concatenate([np.linspace(low - 100, high + 100, 20_001), [-1e4, 1e4]])
    beyond = np.maximum(0, np.maximum(low - x, x - high))
    assert np.all(np.abs(found.fit(x) - found.target(x)) <= found.fit.max_error + 1.2 * beyond)


def test_one_value_alone():
    histogram = Histogram(1, 1)
    histogram.add(torch.full((10, 1), 0.7))
    found = fit_group("layer", 0, as_activation(nn.SiLU()), histogram.counts[0], (5, 4), "abs_of_sum")
    assert found.fit(0.7) == pytest.approx(0.7 / (1 + np.exp(-0.7)), abs=1e-3)


@pytest.mark.parametrize(("width", "bound", "divisor"), [(768, 8, 8), (12, 8, 6), (7, 8, 7), (13, 8, 1), (3, 8, 3)])
def test_the_largest_divisor(width, bound, divisor):
    assert largest_divisor(width, bound) == divisor


@pytest.mark.parametrize("order", [(5, 4), (7, 6)])
def test_a_fit_that_would_break_out_is_held(order):
    histogram = Histogram(1, 1)
    z = np.random.default_rng(0).normal(-0.7, 0.6, 20_000)
    histogram.add(torch.from_numpy(np.append(z, 8.0))[:, None])
    found = fit_group("layer", 0, as_activation(nn.GELU()), histogram.counts[0], order, "abs_of_sum")
    low, high = found.fit.interval
    x = np.linspace(low - 3 * (high - low), high + 3 * (high - low), 20_001)
    beyond = np.maximum(0, np.maximum(low - x, x - high))
    assert np.all(np.abs(found.fit(x) - found.target(x)) <= found.fit.max_error + 1.2 * beyond)
    assert found.relative_error < 0.01
