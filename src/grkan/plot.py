"""Plot learned functions, training curves and fits. Every plot function returns a matplotlib Figure."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import GrkanImportError, GrkanValueError

try:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    raise GrkanImportError('grkan.plot needs matplotlib; install it with: pip install "grkan[plot]"') from error

import torch
from torch import nn

from .inspection import POINTS, interval_of, rationals, record_inputs
from .nn import GroupRational
from .rational import reference

__all__ = [
    "check_picture",
    "plot_conversion",
    "plot_curves",
    "plot_fit",
    "plot_functions",
    "plot_scores",
    "record_inputs",
    "save_figure",
]

_BINS = 80
_NAMED, _NUMBERED = 60, 20
"""The most classes for which a confusion matrix shows their names, and the counts."""
# The most characters of a layer's name above a panel; of a longer name the end is shown.
_LONGEST_NAME = 44
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can distinguish."""


def plot_functions(model: nn.Module, inputs: Mapping[str, np.ndarray] | None = None) -> Figure:
    """Plot every learned function of a model, group by group, with its initial function.

    Args:
        model: a model with `GroupRational` modules; each gets a panel.
        inputs: the result of `record_inputs`. Each panel then covers the range of its inputs and shows their histogram.

    Raises:
        ValueError: the model has no rational functions.
    """
    modules = rationals(model)
    columns = min(4, len(modules))
    rows = -(-len(modules) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.6 * rows + 1.1), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(modules) :]:
        axis.set_visible(False)
    for axis, (name, module) in zip(axes, modules.items(), strict=False):
        _plot_module(axis, module, None if inputs is None else inputs.get(name))
        axis.set_title(name, fontsize=9)
    for axis in axes[max(len(modules) - columns, 0) : len(modules)]:
        axis.set_xlabel("x", fontsize=9)
    for axis in axes[::columns]:
        axis.set_ylabel("F(x)", fontsize=9)
    _legend(figure, max(m.num_groups for m in modules.values()), inputs is not None)
    return figure


def _plot_module(axis: Axes, module: GroupRational, inputs: np.ndarray | None) -> None:
    low, high = interval_of(inputs)
    finite = np.empty(0) if inputs is None else inputs[np.isfinite(inputs)]
    if finite.size:
        density = axis.twinx()
        density.hist(finite, bins=_BINS, range=(low, high), color="0.87")
        density.set_yticks([])
        for spine in density.spines.values():
            spine.set_visible(False)
        axis.set_zorder(density.get_zorder() + 1)
        axis.patch.set_visible(False)
    x = np.linspace(low, high, POINTS)
    colors = _group_colors(module.num_groups)
    for group in range(module.num_groups):
        axis.plot(x, module.to_function(group)(x), color=colors[group], linewidth=1.0, alpha=0.9)
    numerator, denominator = module.initial_coefficients()
    grid = torch.from_numpy(x)[None].expand(module.num_groups, -1)
    initial = reference.rational(grid, numerator, denominator, module.form).numpy()
    for values in np.unique(initial, axis=0):
        axis.plot(x, values, color="black", linewidth=1.2, linestyle="--")
    axis.set_xlim(low, high)
    axis.tick_params(labelsize=7)
    axis.grid(color="0.93", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _group_colors(groups: int) -> list[Any]:
    return [colormaps["viridis"](0.95 * g / max(groups - 1, 1)) for g in range(groups)]


def _legend(figure: Figure, groups: int, histogram: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colors = _group_colors(groups)
    shown = range(groups) if groups <= 8 else (0, groups // 2, groups - 1)
    handles: list[Any] = [Line2D([], [], color="black", linestyle="--", label="initial")]
    handles += [Line2D([], [], color=colors[g], label=f"group {g}") for g in shown]
    if histogram:
        handles.append(Patch(color="0.87", label="its inputs"))
    columns = max(2, int(figure.get_figwidth() / 1.3))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def plot_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Plot loss and accuracy over the epochs, of one run or of several.

    Args:
        runs: the lines of each run's metrics.jsonl, by the name of the run.

    Raises:
        ValueError: no run has finished an epoch.
    """
    if not any("top1" in line for lines in runs.values() for line in lines):
        raise GrkanValueError("runs must hold at least one finished epoch")
    figure = Figure(figsize=(9.5, 4.0), layout="constrained", dpi=150)
    losses, accuracies = figure.subplots(1, 2)
    for i, (name, lines) in enumerate(runs.items()):
        color = _COLORS[i % len(_COLORS)]
        epochs = [line for line in lines if "top1" in line]
        x = [line["epoch"] for line in epochs]
        marker = "o" if len(epochs) < 3 else None
        for axis, trained, tested in ((losses, "train_loss", "loss"), (accuracies, "train_top1", "top1")):
            known = [line for line in epochs if trained in line]
            axis.plot(
                [line["epoch"] for line in known],
                [line[trained] for line in known],
                color=color,
                linewidth=1.1,
                linestyle=":",
                marker=marker,
                markerfacecolor="white",
                label=f"{name}, training",
            )
            axis.plot(
                x, [line[tested] for line in epochs], color=color, linewidth=1.5, marker=marker, label=f"{name}, test"
            )
    losses.set_ylabel("cross entropy")
    values = [
        line[key] for lines in runs.values() for line in lines if "top1" in line for key in ("train_loss", "loss")
    ]
    if 0 < 10 * min(values) < max(values):
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter("{x:g}")
        losses.yaxis.set_minor_locator(NullLocator())
    accuracies.set_ylabel("accuracy (%)")
    for axis in (losses, accuracies):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    return figure


def plot_scores(scores: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the accuracies of runs: a dot per seed and a line at the mean; names with "vit" have another colour.

    Args:
        scores: the accuracies in percent, by the name of the run.

    Raises:
        ValueError: there are no scores.
    """
    if not scores or not all(scores.values()):
        raise GrkanValueError("scores must hold at least one accuracy for each run")
    figure = Figure(figsize=(7.0, 1.2 + 0.26 * len(scores)), layout="constrained", dpi=150)
    axis = figure.subplots()
    for row, (name, values) in enumerate(scores.items()):
        color = _COLORS["vit" in name.lower()]
        axis.plot(values, [row] * len(values), "o", color=color, markersize=4, markerfacecolor="white")
        mean = float(np.mean(values))
        axis.plot([mean, mean], [row - 0.32, row + 0.32], color=color, linewidth=2)
    axis.set_yticks(range(len(scores)), list(scores), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy (%), a dot for each seed and their mean")
    axis.grid(axis="x", color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_fit(
    fit: Callable[[np.ndarray], np.ndarray],
    target: Callable[[np.ndarray], np.ndarray],
    interval: tuple[float, float],
    name: str,
) -> Figure:
    """Plot a fit and its target, also a little beyond the interval of the fit, and the error.

    Args:
        fit: the rational function on numpy arrays, such as a `RationalFit`.
        target: the function that it approximates, on numpy arrays.
        interval: the interval of the fit; it is shaded.
        name: the name of the target in the legend.
    """
    low, high = interval
    margin = 0.15 * (high - low)
    x = np.linspace(low - margin, high + margin, 4 * POINTS)
    inside = (x >= low) & (x <= high)
    fitted, exact = fit(x), target(x)
    error = fitted - exact
    figure = Figure(figsize=(6.5, 5.5), layout="constrained", dpi=150)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot(x, exact, color="0.55", linewidth=3.5, label=name)
    top.plot(x, fitted, color=_COLORS[1], linewidth=1.3, label="rational fit")
    top.legend(fontsize=9, frameon=False)
    top.set_ylabel("F(x)")
    bottom.plot(x, error, color=_COLORS[0], linewidth=1.2)
    bottom.axhline(0, color="0.5", linewidth=0.6)
    bottom.set_ylim(*(1.4 * np.abs(error[inside]).max() * np.array([-1, 1]) + (-1e-12, 1e-12)))
    bottom.set_ylabel("fit - target")
    bottom.set_xlabel("x")
    for axis in (top, bottom):
        axis.axvspan(low, high, color="0.95", zorder=0)
        axis.grid(color="0.9", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_conversion(report: Any, count: int = 6) -> Figure:
    """Plot the worst fits of a conversion: each function, its activation, its inputs, and the error.

    If the inputs reach far beyond their usual size, their axis is logarithmic there.

    Args:
        report: the result of `grkan.convert_`.
        count: the number of functions, those with the largest relative errors.

    Raises:
        ValueError: the report has no fits.
    """
    worst = sorted(report.fits, key=lambda fitted: -fitted.relative_error)[:count]
    if not worst:
        raise GrkanValueError("report must have fits to plot; it has none")
    columns = min(3, len(worst))
    rows = -(-len(worst) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.4, 4.6 * rows), layout="constrained", dpi=150)
    panels = figure.subfigures(rows, columns, squeeze=False, wspace=0.03, hspace=0.03).flatten()
    for number, (panel, fitted) in enumerate(zip(panels, worst, strict=False)):
        _plot_group(panel.subplots(2, 1, sharex=True, height_ratios=(3, 2)), fitted, number % columns == 0)
    return figure


def plot_confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Plot a confusion matrix: each row, a true class, in percent of its images.

    Args:
        matrix: the number of images for [true class, predicted class].
        classes: the names of the classes.
    """
    count = len(classes)
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(3 + 0.35 * count, 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=150)
    axis = figure.subplots()
    picture = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, ax=axis, shrink=0.8, label="% of the true class")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if count <= _NAMED:
        axis.set_xticks(range(count), classes, rotation=90, fontsize=7, parse_math=False)
        axis.set_yticks(range(count), classes, fontsize=7, parse_math=False)
    if count <= _NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            color = "white" if percent[row, column] > 50 else "black"
            axis.text(column, row, f"{value}", ha="center", va="center", fontsize=6, color=color)
    return figure


def _plot_group(axes: Sequence[Axes], fitted: Any, labelled: bool) -> None:
    top, bottom = axes
    low, high = fitted.fit.interval
    usual, margin = 3 * fitted.usual or 1.0, 0.1
    if max(-low, high) > 20 * usual:
        ends = np.arcsinh(np.array([low, high]) / usual)
        x = np.sinh(np.linspace(ends[0] - margin, ends[1] + margin, 4 * POINTS)) * usual
        edges = np.sinh(np.linspace(ends[0], ends[1], _BINS + 1)) * usual
        linear = 10.0 ** np.ceil(np.log10(usual))  # a power of ten, so that there is no tick inside, near zero
        for axis in axes:
            axis.set_xscale("symlog", linthresh=linear)
        top.set_yscale("symlog", linthresh=linear)
    else:
        x = np.linspace(low - margin * (high - low), high + margin * (high - low), 4 * POINTS)
        edges = np.linspace(low, high, _BINS + 1)
    exact, values = fitted.target(x), fitted.fit(x)
    top.plot(x, exact, color="0.55", linewidth=3.5, label=fitted.activation)
    top.plot(x, values, color=_COLORS[1], linewidth=1.3, label="rational fit")
    top.legend(fontsize=8, frameon=False)
    name = fitted.layer or "(model)"
    name = name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
    top.set_title(f"{name}\ngroup {fitted.group}: relative error {fitted.relative_error:.2g}", fontsize=9)
    density = bottom.twinx()
    density.hist(fitted.x, bins=edges.tolist(), weights=fitted.weights, log=True, color="0.87")
    density.yaxis.set_visible(False)
    bottom.set_zorder(density.get_zorder() + 1)
    bottom.patch.set_visible(False)
    bottom.plot(x, values - exact, color=_COLORS[0], linewidth=1.2)
    inside = (x >= low) & (x <= high)
    bottom.set_ylim(*(1.4 * np.abs(values - exact)[inside].max() * np.array([-1, 1]) + (-1e-12, 1e-12)))
    bottom.set_xlabel("x", fontsize=9)
    for axis in axes:
        axis.axvline(low, color="0.8", linewidth=0.8)
        axis.axvline(high, color="0.8", linewidth=0.8)
        axis.grid(color="0.93", linewidth=0.6)
        axis.tick_params(labelsize=7)
    if labelled:
        top.set_ylabel("F(x)", fontsize=9)
        bottom.set_ylabel("error; inputs (log)", fontsize=9)


def check_picture(path: str | Path) -> None:
    """Raise ValueError if matplotlib does not support the format of a file's ending."""
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in known:
        raise GrkanValueError(
            f"the name of a picture must end in .png, .svg, .pdf, or one of {', '.join(known)}; got {path}"
        )


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the file's ending.

    Raises:
        ValueError: matplotlib does not support the format.
        OSError: the file cannot be written.
    """
    figure.savefig(path)
