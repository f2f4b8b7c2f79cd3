import numpy as np
import pytest
import timm
import torch
from torch import nn

from grkan import GroupRational, convert_
from grkan.inspection import record_inputs
from grkan.plot import (
    plot_confusion,
    plot_conversion,
    plot_curves,
    plot_fit,
    plot_functions,
    plot_scores,
    save_figure,
)


@pytest.fixture
def model():
    return timm.create_model("kat_micro_patch2_8", depth=2, embed_dim=16, num_heads=2, num_groups=4)


def _curves(axis, style):
    return [line for line in axis.get_lines() if line.get_linestyle() == style]


def test_every_layer_has_a_panel_with_every_group_and_the_start(model):
    act = model.blocks[1].mlp.act2
    with torch.no_grad():
        act.coefficients()[0][2] *= 2
    figure = plot_functions(model)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == [f"blocks.{i}.mlp.act{j}" for i in (0, 1) for j in (1, 2)]
    learned, initial = _curves(panels["blocks.1.mlp.act2"], "-"), _curves(panels["blocks.1.mlp.act2"], "--")
    assert (len(learned), len(initial)) == (4, 1)
    x, y = initial[0].get_data()
    np.testing.assert_allclose(y, x / (1 + np.exp(-x)), atol=2e-3)  # Swish
    np.testing.assert_allclose(learned[2].get_ydata(), 2 * y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(learned[0].get_ydata(), y, rtol=1e-5, atol=1e-6)


def test_panels_cover_the_range_of_their_inputs(model):
    inputs = record_inputs(model, [torch.randn(32, 1, 8, 8)])
    figure = plot_functions(model, inputs)
    axis = next(axis for axis in figure.axes if axis.get_title() == "blocks.0.mlp.act2")
    low, high = np.quantile(inputs["blocks.0.mlp.act2"], [0.001, 0.999])
    assert axis.get_xlim() == pytest.approx((low, high))


def test_constant_and_infinite_inputs_have_a_picture():
    model = nn.Sequential(GroupRational(2, "identity"))
    plot_functions(model, {"0": np.full((2, 5), 3.0, np.float32)})
    plot_functions(model, {"0": np.array([[1.0, np.inf], [np.nan, 2.0]], np.float32)})
    plot_functions(model, {"0": np.full((2, 3), np.nan, np.float32)})


def test_a_model_without_rational_functions_is_named():
    with pytest.raises(ValueError, match="must have rational functions to plot; Linear has none"):
        plot_functions(nn.Linear(2, 2))


def test_curves_of_several_runs():
    lines = [{"step": 1, "train_loss": 3.0}]
    lines += [
        {"epoch": e, "train_loss": 2.0 / e, "train_top1": 80 + e, "loss": 3.0 / e, "top1": 70 + e} for e in (1, 2, 3)
    ]
    mixed = [{k: v for k, v in line.items() if k != "train_top1"} for line in lines]
    figure = plot_curves({"a": lines, "b": mixed})
    losses, accuracies = figure.axes
    assert [line.get_ydata()[-1] for line in losses.get_lines()] == [2 / 3, 1.0, 2 / 3, 1.0]
    assert [len(line.get_ydata()) for line in accuracies.get_lines()] == [3, 3, 0, 3]
    with pytest.raises(ValueError, match="at least one finished epoch"):
        plot_curves({"a": [{"step": 1, "train_loss": 3.0}]})


@pytest.mark.parametrize(("losses", "scale"), [((2.3, 2.2), "linear"), ((2.3, 0.01), "log"), ((2.3, 0.0), "linear")])
def test_all_of_a_curve_is_seen(losses, scale):
    accuracies = (12.0, 95.0)
    lines = [
        {"epoch": e, "train_loss": x, "train_top1": y, "loss": x, "top1": y}
        for e, (x, y) in enumerate(zip(losses, accuracies, strict=True), 1)
    ]
    figure = plot_curves({"a": lines})
    assert figure.axes[0].get_yscale() == scale
    for axis, values in zip(figure.axes, (losses, accuracies), strict=True):
        low, high = axis.get_ylim()
        assert low < min(values) < max(values) < high
        drawn = axis.transData.transform([(1, v) for v in values])[:, 1]
        assert abs(drawn[0] - drawn[1]) > 0.8 * axis.bbox.height  # and nothing but it


def test_a_single_epoch_has_whole_ticks_and_two_kinds_of_points():
    figure = plot_curves({"a": [{"epoch": 1, "train_loss": 2.3, "train_top1": 11.0, "loss": 2.2, "top1": 15.0}]})
    for axis in figure.axes:
        assert all(tick == round(tick) for tick in axis.get_xticks())
        trained, tested = axis.get_lines()
        assert trained.get_markerfacecolor() != tested.get_markerfacecolor()


def test_a_fit_and_its_error():
    figure = plot_fit(lambda x: x + 0.01, lambda x: x, (-2.0, 2.0), "identity")
    error = figure.axes[1].get_lines()[0]
    np.testing.assert_allclose(error.get_ydata(), 0.01)
    assert error.get_xdata()[0] < -2
    bottom, top = figure.axes[1].get_ylim()
    assert bottom < 0.01 < top


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures_are_written(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    save_figure(plot_fit(np.tanh, np.tanh, (-2.0, 2.0), "tanh"), path)
    assert path.stat().st_size > 1000


def test_scores_are_dots_with_their_mean():
    axis = plot_scores({"kat": [80.0, 82.0, 87.0], "vit": [79.5]}).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["kat", "vit"]
    dots, mean, *_ = axis.get_lines()
    assert list(dots.get_xdata()) == [80.0, 82.0, 87.0]
    assert list(mean.get_xdata()) == [83.0, 83.0]


@pytest.mark.parametrize("scores", [{}, {"kat": []}])
def test_scores_to_plot(scores):
    with pytest.raises(ValueError, match="scores must hold at least one accuracy for each run"):
        plot_scores(scores)


def test_the_worst_fits_of_a_conversion():
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    report = convert_(network, calibration=torch.randn(50, 8), num_groups=4)
    figure = plot_conversion(report, count=2)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    worst = sorted(report.fits, key=lambda fitted: fitted.relative_error)[-1]
    assert len(titles) == 2
    assert titles[0].startswith(f"(model)\ngroup {worst.group}: relative error ")
    x, y = next(axis for axis in figure.axes if axis.get_title()).get_lines()[0].get_data()
    np.testing.assert_allclose(y, np.maximum(x, 0), atol=1e-12)
    report.fits.clear()
    with pytest.raises(ValueError, match="report must have fits"):
        plot_conversion(report)


@pytest.mark.parametrize("count", [3, 40, 100])
def test_a_confusion_matrix(count):
    matrix = np.eye(count, dtype=int) * 7
    matrix[0] = 0
    (axis, bar) = plot_confusion(matrix, [f"class {i}$" for i in range(count)]).axes
    assert np.diagonal(axis.images[0].get_array()).tolist() == [0.0] + [100.0] * (count - 1)
    assert len(axis.get_xticklabels()) == count or count > 60
    assert len(axis.texts) == (count**2 if count <= 20 else 0)
    assert bar.get_ylabel() == "% of the true class"
