"""Report the learned functions of a model on a page: one HTML file that needs no other files and no network.

The page holds coefficients instead of curves: the script in `report.html` evaluates F and F' itself, as
`rational/reference.py` defines them. It also shows training curves and a confusion matrix if they are given.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
from torch import nn

from ._version import __version__
from .errors import GrkanValueError
from .inspection import learned_functions

_DATA = "{{ data }}"


def make_report(
    model: nn.Module,
    *,
    title: str,
    inputs: Mapping[str, np.ndarray] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    classes: Sequence[str] = (),
    confusion: Sequence[Sequence[int]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Make the page and return it as HTML.

    Args:
        model: a model with `GroupRational` modules; each of their groups gets a card.
        title: the heading.
        inputs: the result of `record_inputs`. Without it, functions are drawn on [-4, 4] and have no histograms.
        metrics: the lines of a run's metrics.jsonl, for its curves.
        classes: the names of the classes.
        confusion: counts[i][j] is the number of images of class i that the model classifies as j.
        notes: sentences below the heading, for example why something is missing.

    Raises:
        ValueError: the model has no rational functions, or confusion is not square with one row per class.
    """
    if confusion is not None and {len(classes)} != {len(confusion), *(len(row) for row in confusion)}:
        raise GrkanValueError(
            f"confusion must be {len(classes)} x {len(classes)}, with a row for each class; got {len(confusion)} rows"
        )
    functions = learned_functions(model, inputs)
    data = {
        "title": title,
        "version": __version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "notes": list(notes),
        "functions": [asdict(function) for function in functions],
        "epochs": [line for line in metrics if "top1" in line],
        "classes": list(classes),
        "confusion": confusion,
    }
    # A "<" could close the element that holds the data.
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files("grkan").joinpath("report.html").read_text(encoding="utf-8")
    return template.replace(_DATA, text)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON cannot represent them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
