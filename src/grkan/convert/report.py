"""What a conversion did, and how close it came."""

import json
from dataclasses import dataclass, field
from typing import Any

from .calibrate import GroupFit

_ERRORS = ("max_error", "rms_error", "relative_error", "best_relative_error", "output_error")


@dataclass
class ConversionReport:
    """What `grkan.convert_` did.

    `str()` of it is a table.
    """

    layers: list[dict[str, Any]]
    """For each converted MLP:
    name; modules: the names of its parts; layout: "grkan", "linear" or "activation", see `grkan.convert.recipe`;
    activation: what its function was; order, form; groups: those of the second function, or of the only one;
    interval: (low, high), what its inputs cover, or are expected to; samples: scalars of the calibration, 0 without;
    and how far the function is from the activation, None where it is not to be the same:
    max_error: the largest |F - f| on the interval, of all groups; rms_error: the root mean square of F - f over the
    inputs; cosine, relative_error: of F and f over the inputs, None without calibration; best_rms_error,
    best_relative_error: the smallest that a search from several starts finds for functions of this order, whatever they
    do where there are no inputs; what is left is limited by the order; output_error: how far the MLP's output is off,
    by its norm, for a sample of the inputs and for the largest: that of the second linear layer, where the activation's
    goes straight into it; without calibration the activation's, for the inputs that are expected."""
    skipped: list[tuple[str, str]]
    """The activations that stay as they are, and why."""
    cosine: float | None
    """Of what the model computes after and before, over some of the calibration batches: its first float output that is
    no loss, without padding; where it returns tokens or a loss alone, its logits or hidden states. None without."""
    relative_error: float | None
    """|after - before| / |before| of the same, in Euclidean norms."""
    recipe: dict[str, Any]
    """Plain JSON, for `grkan.apply_conversion_`; with those of earlier conversions of the same model."""
    fits: list[GroupFit] = field(default_factory=list, repr=False)
    """Every fitted function, see `grkan.plot.plot_conversion`."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fits, as JSON."""
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
            lines.append("error, best, output: relative errors of the function, of the best of its order, of the MLP")
        if self.cosine is not None:
            lines.append(f"output: cosine {self.cosine:.6f}, relative error {self.relative_error:.2g}")
        return "\n".join(line.rstrip() for line in lines)
