"""What a conversion did, and how close it came."""

import json
from dataclasses import dataclass, field
from typing import Any

from .calibrate import GroupFit


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
    inputs; cosine, relative_error: of F and f over the inputs, None without calibration."""
    skipped: list[tuple[str, str]]
    """The activations that stay as they are, and why."""
    cosine: float | None
    """Of the model's first float output after and before, over the first calibration batches; None without."""
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
        columns = ("layer", "layout", "activation", "groups", "interval", "max error", "rms error", "relative error")
        rows = [
            (
                layer["name"] or "(model)",
                layer["layout"],
                layer["activation"],
                str(layer["groups"]),
                "" if layer["interval"] is None else "[{:.3g}, {:.3g}]".format(*layer["interval"]),
                *(
                    "" if layer[error] is None else f"{layer[error]:.2g}"
                    for error in ("max_error", "rms_error", "relative_error")
                ),
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
        if self.cosine is not None:
            lines.append(f"output: cosine {self.cosine:.6f}, relative error {self.relative_error:.2g}")
        return "\n".join(line.rstrip() for line in lines)
