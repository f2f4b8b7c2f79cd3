"""The report of a conversion: what it did, and how close the result is."""

import json
from dataclasses import dataclass, field
from typing import Any

from .calibrate import GroupFit

_ERRORS = ("max_error", "rms_error", "relative_error", "best_relative_error", "output_error")


@dataclass
class ConversionReport:
    """The result of `grkan.convert_`. `str(report)` is a table."""

    layers: list[dict[str, Any]]
    """For each converted MLP:
    name; modules: the names of its parts; layout: "grkan", "linear" or "activation", see `grkan.convert.recipe`;
    activation: the original function; order, form; groups: those of the second function, or of the only one;
    interval: (low, high), the range of its inputs, or the predicted range; samples: the number of calibration scalars,
    0 without calibration; and the distance of the function F from the activation f, None where the two are meant to
    differ: max_error: the largest |F - f| on the interval, over all groups; rms_error: the root mean square of F - f
    over the inputs; cosine, relative_error: of F and f over the inputs, None without calibration; best_rms_error,
    best_relative_error: the smallest errors that a search from several starts finds for this order, without regard to
    values where there are no inputs: a limit set by the order; output_error: the relative error, in norm, of the MLP's
    output for a sample of the inputs and for the largest ones. It is measured at the second linear layer if the
    activation's output goes straight into it, and otherwise at the activation; without calibration, at the activation
    for the predicted inputs."""
    skipped: list[tuple[str, str]]
    """The activations that were not converted, and why."""
    cosine: float | None
    """The cosine between the model's outputs after and before, over some of the calibration batches. The output is the
    first float one that is not a loss, without padding, or the logits or hidden states if the model returns only
    tokens, a loss or zeros (of a new head). None without calibration, or if all that could be compared is zero."""
    relative_error: float | None
    """|after - before| / |before| of the same outputs, in Euclidean norms."""
    recipe: dict[str, Any]
    """Plain JSON for `grkan.apply_conversion_`, including earlier conversions of the same model."""
    fits: list[GroupFit] = field(default_factory=list, repr=False)
    """Every fitted function; see `grkan.plot.plot_conversion`."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the fits, as JSON."""
        names = ("layers", "skipped", "cosine", "relative_error", "recipe")
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))

    def __str__(self) -> str:
        columns = ["layer", "layout", "activation", "groups", "interval", "max error", "rms error"]
        columns += ["error", "best", "output"]
        rows = [
            (
                layer["name"] or "(model)",
                layer["layout"],
                layer["activation"],
                str(layer["groups"]),
                "" if layer["interval"] is None else "[{:.3g}, {:.3g}]".format(*layer["interval"]),
                *("" if layer[key] is None else f"{layer[key]:.2g}" for key in _ERRORS),
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)
        ]
        lines += [f"skipped {name or '(model)'}: {reason}" for name, reason in self.skipped]
        if self.layers:
            lines.append("order {}, form {}".format(tuple(self.layers[0]["order"]), self.layers[0]["form"]))
            lines.append(
                "error, best, output: relative errors of the function, the best of its order, the MLP's output"
            )
        if self.cosine is not None:
            lines.append(f"output: cosine {self.cosine:.6f}, relative error {self.relative_error:.2g}")
        return "\n".join(line.rstrip() for line in lines)
