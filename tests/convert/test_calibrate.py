"""Histograms, what the weights let expect, and fits to both."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from grkan import convert_
from grkan.convert.activation import as_activation
from grkan.convert.batches import real_tokens
from grkan.convert.calibrate import Histogram, _filled, expected, fit_group, largest_divisor
from grkan.convert.structure import find_sites


def moments(histogram):
    """Means and standard deviations of the groups."""
    found = []
    for counts in histogram.counts:
        middles, shares, _, _ = _filled(counts)
        mean = (shares * middles).sum()
        found.append((mean, np.sqrt((shares * middles**2).sum() - mean**2)))
    return np.array(found).T


def fitted(act, x, order=(5, 4), form="abs_of_sum"):
    histogram = Histogram(1, x.shape[-1])
    histogram.add(x)
    assert histogram.problem == ""
    return fit_group("layer", 0, as_activation(act), histogram.counts[0], order, form)


def relative_error(found, x):
    y = found.target(np.asarray(x, dtype=np.float64))
    return np.linalg.norm(found.fit(x) - y) / np.linalg.norm(y)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_histogram_counts_every_scalar_of_its_group(dtype):
    x = (torch.randn(7, 3, 12) * torch.logspace(-3, 4, 12)).to(dtype)
    histogram = Histogram(3, 12)
    histogram.add(x[:4])
    histogram.add(x[4:])
    assert histogram.samples == x.numel()
    for group in range(3):
        values = np.sort(x[..., 4 * group : 4 * group + 4].double().numpy().ravel())
        middles, shares, low, high = _filled(histogram.counts[group])
        binned = np.repeat(middles, np.rint(shares * len(values)).astype(int))
        assert np.all(np.abs(binned - values) <= np.abs(values) / 63)
        assert low <= values[0] and values[-1] <= high  # noqa: PT018


def test_channels_first():
    x = torch.stack([torch.full((2, 5), -1.0), torch.full((2, 5), 3.0)])[None]
    histogram = Histogram(2, 2, 1)
    histogram.add(x)
    assert moments(histogram)[0] == pytest.approx([-1, 3], rel=0.02)


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
    mean, deviation = moments(expected(site, 4))
    assert mean == pytest.approx(z.mean(0).numpy(), abs=0.07)
    assert deviation == pytest.approx(2 * z.std(0).numpy(), rel=0.03)  # widened


@pytest.mark.parametrize("form", ["abs_of_sum", "sum_of_abs"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Hardtanh()])
def test_a_fit_is_near_where_the_data_is_and_never_far(act, form):
    histogram = Histogram(1, 1)
    rng = np.random.default_rng(0)
    outliers = np.array([-14.0, 21.0])
    data = np.append(rng.normal(-0.5, 1.0, 100_000), outliers)
    histogram.add(torch.from_numpy(data)[:, None])
    found = fit_group("layer", 0, as_activation(act), histogram.counts[0], (5, 4), form)
    z = rng.normal(-0.5, 1.0, 10_000)
    error = found.fit(z) - act(torch.from_numpy(z)).numpy()
    size = np.sqrt(np.mean(act(torch.from_numpy(z)).numpy() ** 2))
    assert np.sqrt(np.mean(error**2)) < 0.06 * size
    assert np.all(np.abs(found.fit(outliers) - found.target(outliers)) < 0.4 * np.abs(outliers))
    assert found.relative_error == pytest.approx(relative_error(found, data), rel=0.1)
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


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e-3, 1e3, 1e6, 1e9])
@pytest.mark.parametrize(("order", "bound"), [((5, 4), 0.012), ((7, 6), 0.004)])
def test_every_scale_is_the_same_problem(scale, order, bound):
    if not 1e-6 < scale < 1e8:
        bound = 0.05  # the higher coefficients are beyond float32
    found = fitted(nn.ReLU(), scale * normal(256, 64), order)
    x = scale * normal(64, 64, seed=1).numpy().astype(np.float64)
    assert relative_error(found, x) < bound
    assert found.fit.order == order
    for coefficients in (found.fit.numerator, found.fit.denominator):
        single = coefficients.astype(np.float32).astype(np.float64)
        assert np.all(np.isfinite(single))
        np.testing.assert_allclose(single[np.abs(coefficients) > 1e-37], coefficients[np.abs(coefficients) > 1e-37])


def test_a_bend_that_is_narrow_among_large_inputs():
    assert relative_error(fitted(nn.Tanh(), 60 * normal(256, 64)), 60 * normal(64, 64, seed=1).double().numpy()) < 0.02


def test_what_float32_cannot_hold_is_said():
    network = nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8))
    before = {name: parameter.clone() for name, parameter in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"gelu: its output would be off by [0-9.]+, above max_error=0.05"):
        convert_(network, calibration=1e37 * normal(64, 8))
    assert [type(module) for module in network] == [nn.Linear, nn.GELU, nn.Linear]
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.state_dict().items())


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()])
@pytest.mark.parametrize("factor", [100, 300, 1000])
def test_neither_the_mass_nor_outliers_pay(act, factor):
    x = 0.6 * normal(2000, 64)
    x[0] *= factor
    found = fitted(act, x, (7, 6))
    assert relative_error(found, x[1:].double().numpy()) < 4e-3
    assert relative_error(found, x[:1].double().numpy()) < 0.03
    assert relative_error(fitted(act, x, (5, 4)), x[1:].double().numpy()) < 0.03


def test_the_best_is_the_best():
    x = 0.6 * normal(2000, 64)
    found = fitted(nn.GELU(), x)
    # The smallest of 200 searches from random starts, rounded up.
    assert np.sqrt(found.best_square / found.sums[1]) < 2e-4
    assert found.best_square <= found.sums[0]


@pytest.mark.parametrize("shape", [(4, 10, 8), (40, 8)])
def test_padding_is_not_counted(shape):
    mask = torch.arange(10) < torch.tensor([10, 3, 1, 7])[:, None]
    x = torch.where(mask[..., None], normal(4, 10, 8), 1e6)
    histogram = Histogram(2, 8)
    histogram.real = real_tokens({"input_ids": torch.ones(4, 10), "attention_mask": mask.long()})
    histogram.add(x.reshape(shape))
    assert histogram.samples == 21 * 8
    assert len(histogram.row_weights()[0]) == 21


def test_masks_of_padding():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(real_tokens({"attention_mask": mask})[0], mask.bool())
    assert torch.equal(real_tokens({"src_key_padding_mask": mask == 0})[0], mask.bool())
    assert real_tokens({"attention_mask": 0 * mask, "pixel_mask": mask, "labels": mask}) == []
    assert real_tokens(mask) == []


def test_the_rows_that_are_kept_are_bounded_and_stand_for_all():
    histogram = Histogram(1, 1024)
    total = 0.0
    for seed in range(8):
        x = normal(500, 1024, seed=seed)
        x[seed] *= 100
        total += float(x.double().square().sum())
        histogram.add(x)
    rows, weights = histogram.row_weights()
    assert rows.numel() <= 2**18 + 2**16
    assert float(weights.sum()) == pytest.approx(4000)
    assert int((rows.abs().amax(1) > 100).sum()) == 8
    assert float(weights @ rows.square().sum(1)) == pytest.approx(total, rel=0.01)


def test_the_error_without_data_is_that_of_the_worst_size_where_nothing_tells_the_size():
    model = nn.Sequential(nn.Linear(6, 32), nn.Hardswish(), nn.Linear(32, 3))
    converted = copy.deepcopy(model)
    (layer,) = convert_(converted, max_error=0.2).layers
    for size in (0.25, 0.5, 1, 2, 4):
        x = size * torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
        error = float((converted[1](x).detach() - model[1](x)).norm() / model[1](x).norm())
        assert error < 1.1 * layer["output_error"]
    with pytest.raises(ValueError, match="calibration data would give a better estimate"):
        convert_(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)))
