"""Inspect learned functions in numbers: their inputs, their values, and how far they have moved.

`plot` draws them as pictures, and `report` as a page.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .errors import GrkanValueError
from .nn import GroupRational
from .nn.modes import evaluating
from .rational import reference

POINTS = 401
"""The number of points of a curve."""

_DEFAULT_INTERVAL = (-4.0, 4.0)
# A few extreme inputs would squeeze the rest of the plot.
_INTERVAL_QUANTILES = (0.001, 0.999)
# Enough for a histogram; a layer of a large model sees a million scalars per image.
_MAX_SCALARS = 200_000
_BINS = 60


def rationals(model: nn.Module) -> dict[str, GroupRational]:
    """Return the rational functions of a model by name, in module order.

    Raises:
        ValueError: the model has none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, GroupRational)}
    if not found:
        raise GrkanValueError(f"model must have rational functions to plot; {type(model).__name__} has none")
    return found


def record_inputs(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """Record the inputs of every rational function while a model runs.

    Args:
        model: the model; it is run in eval mode without gradients, and its modes are restored.
        batches: the inputs of the model, on its device.

    Returns:
        The inputs of each rational function by its name: (groups, scalars), float32, at most 200,000 of each batch.
    """
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in rationals(model).items():

        def record(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            assert isinstance(module, GroupRational)
            x = inputs[0].detach().movedim(module.channel_dim, -1)
            x = x.unflatten(-1, (module.num_groups, -1)).movedim(-2, 0).flatten(1)
            step = -(-x.numel() // _MAX_SCALARS) | 1  # odd, so that it reaches all channels of the usual widths
            found.setdefault(name, []).append(x[:, ::step].float().cpu())

        hooks.append(module.register_forward_pre_hook(record))
    try:
        with evaluating(model):
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts, dim=1).numpy() for name, parts in found.items()}


def interval_of(inputs: np.ndarray | None) -> tuple[float, float]:
    """Return the interval to draw a function on: its finite inputs without extremes; (-4, 4) if there are none."""
    finite = np.empty(0) if inputs is None else inputs[np.isfinite(inputs)]
    if not finite.size:
        return _DEFAULT_INTERVAL
    low, high = (float(q) for q in np.quantile(finite, _INTERVAL_QUANTILES))
    return (low, high) if high - low >= 1e-6 else (low - 1, high + 1)  # a constant input


@dataclass(frozen=True)
class LearnedFunction:
    """The function of one group: the current F, and F before training."""

    layer: str
    group: int
    form: str
    numerator: list[float]
    denominator: list[float]
    initial_numerator: list[float]
    initial_denominator: list[float]
    interval: tuple[float, float]
    """The interval of the layer, so that its groups can be compared."""
    counts: list[int] | None
    """The number of inputs in equal bins of the interval; None if the inputs are not known."""
    moved: float
    """The root mean square of F - F_initial divided by that of F_initial, over the inputs or else over the interval."""
    slope: float
    """The mean of F' over the inputs, or else over the interval."""


def learned_functions(model: nn.Module, inputs: Mapping[str, np.ndarray] | None = None) -> list[LearnedFunction]:
    """Return all functions of a model, layer by layer and group by group.

    Args:
        model: a model with `GroupRational` modules.
        inputs: the result of `record_inputs`.

    Raises:
        ValueError: the model has no rational functions.
    """
    functions = []
    for layer, module in rationals(model).items():
        given = (inputs or {}).get(layer)
        interval = interval_of(given)
        groups = module.num_groups
        now = [_expanded(c, groups) for c in module.coefficients()]
        start = [_expanded(c, groups) for c in module.initial_coefficients()]
        for group in range(groups):
            counts = None
            x = np.linspace(*interval, POINTS)
            if given is not None and np.isfinite(given[group]).any():
                x = given[group][np.isfinite(given[group])]
                counts = np.histogram(x, bins=_BINS, range=interval)[0].tolist()
            a, b, a_start, b_start = (c[group : group + 1] for c in (*now, *start))
            z = torch.from_numpy(x.astype(np.float64))[None].requires_grad_()
            y, y_start = reference.rational(z, a, b, module.form), reference.rational(z, a_start, b_start, module.form)
            (slope,) = torch.autograd.grad(y.sum(), z)
            change = (y - y_start).detach().norm() / y_start.detach().norm()
            functions.append(
                LearnedFunction(
                    layer,
                    group,
                    module.form,
                    a[0].tolist(),
                    b[0].tolist(),
                    a_start[0].tolist(),
                    b_start[0].tolist(),
                    interval=interval,
                    counts=counts,
                    moved=float(change),
                    slope=float(slope.mean()),
                )
            )
    return functions


def _expanded(rows: Tensor, groups: int) -> Tensor:
    """Return one row per group, in float64 on the CPU."""
    return rows.detach().to("cpu", torch.float64).expand(groups, -1)
