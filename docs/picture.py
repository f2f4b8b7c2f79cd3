"""Draw the README's picture: an MLP, and the GR-KAN that takes its place, with functions that a model has learned.

    make demo
    python docs/picture.py runs/demo/KAT blocks.1.mlp digits docs/picture.svg

The colours are readable on white and on black, because an image in a README does not know the theme around it.
"""

import math
import sys
from pathlib import Path

import numpy as np

from grkan.inspection import interval_of, rationals, record_inputs
from grkan.nn import GroupRational
from grkan.train.evaluate import data_for, first_images, loader_for
from grkan.train.loading import UnreadableImages
from grkan.train.model import load_trained

WIDTH, HEIGHT = 830, 378
PLOT, BOX = (190, 120), (84, 60)
COLUMNS = (165, 345, 525, 705)
"""Centres: the first functions, the first linear layer, the second functions, the second linear layer."""
ROWS = {"MLP": 98, "GR-KAN": 288}
INPUT, OUTPUT = 35, 795

GRAY = "#7a8189"
COLORS = ("#0a84d6", "#d9681d", "#1c9e6f", "#c0559b", "#a98100", "#5d7fe0", "#c94f4f", "#7d8a1a")
STYLE = f"""
text {{ font: 15px system-ui, sans-serif; fill: {GRAY}; text-anchor: middle; }}
.title {{ font-size: 19px; font-weight: 600; text-anchor: start; }}
path, rect {{ fill: none; stroke: {GRAY}; stroke-width: 1.5; }}
.curve {{ stroke-width: 2; }}
.axis {{ stroke-width: 0.5; }}
.start {{ stroke-dasharray: 5 4; }}
.head {{ fill: {GRAY}; stroke: none; }}
"""

Curve = tuple[np.ndarray, np.ndarray, str]
"""x, F(x) and the attributes of its path."""


def picture(first: list[Curve], second: list[Curve]) -> str:
    """The SVG for the curves of a GR-KAN's two layers of functions."""
    x = np.linspace(-4, 4, 121)
    gelu = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    parts = []
    for name, y in ROWS.items():
        parts.append(f'<text class="title" x="{INPUT - 5}" y="{y - 74}">{name}</text>')
        parts += [_text(INPUT, y, "x"), _text(OUTPUT, y, "y"), _box(COLUMNS[1], y), _box(COLUMNS[3], y)]
        widths = (PLOT[0], BOX[0], PLOT[0], BOX[0])
        edges = [
            INPUT + 8,
            *(x + side * w / 2 for x, w in zip(COLUMNS, widths, strict=True) for side in (-1, 1)),
            OUTPUT - 8,
        ]
        if name == "MLP":
            del edges[1:3]  # nothing stands in front of its first linear layer
        parts += [_arrow(a + 3, b - 3, y) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    parts.append(_plot(COLUMNS[2], ROWS["MLP"], [(x, gelu, 'class="curve"')], "GELU, fixed"))
    parts.append(_plot(COLUMNS[0], ROWS["GR-KAN"], first, "learned, from the identity"))
    parts.append(_plot(COLUMNS[2], ROWS["GR-KAN"], second, "learned, from Swish"))
    description = "An MLP: linear, GELU, linear. A GR-KAN: learned functions, linear, learned functions, linear."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img">\n<title>{description}</title>\n<style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def curves(module: GroupRational, inputs: np.ndarray) -> list[Curve]:
    """The start of a module, dashed, and the learned function of each of its groups, where its inputs lie."""
    x = np.linspace(*interval_of(inputs), 121)
    before = GroupRational(1, tuple(c[:1] for c in module.initial_coefficients()), module.order, module.form)
    start = (x, before.to_function(0)(x), 'class="start"')
    colors = (COLORS[group % len(COLORS)] for group in range(module.num_groups))
    return [start] + [
        (x, module.to_function(group)(x), f'class="curve" style="stroke: {color}"')
        for group, color in enumerate(colors)
    ]


def _plot(x: float, y: float, drawn: list[Curve], caption: str) -> str:
    width, height = PLOT
    left, bottom = x - width / 2, y + height / 2
    low, high = drawn[0][0][0], drawn[0][0][-1]
    values = np.concatenate([curve[1] for curve in drawn])
    least, most = values.min(), values.max()

    def place(a: float, b: float) -> str:
        across = 8 + (width - 16) * (a - low) / (high - low)
        return f"{left + across:.1f} {bottom - 8 - (height - 16) * (b - least) / (most - least):.1f}"

    parts = [f'<rect x="{left}" y="{bottom - height}" width="{width}" height="{height}" rx="8" style="fill: none"/>']
    parts.append(f'<path class="axis" d="M{place(low, 0)}L{place(high, 0)}M{place(0, least)}L{place(0, most)}"/>')
    for xs, ys, attributes in drawn:
        points = "L".join(place(a, b) for a, b in zip(xs, ys, strict=True))
        parts.append(f'<path {attributes} d="M{points}"/>')
    parts.append(_text(x, bottom + 16, caption))
    return "\n".join(parts)


def _box(x: float, y: float) -> str:
    width, height = BOX
    box = f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" rx="8"/>'
    return box + _text(x, y, "Linear")


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y + 5}">{text}</text>'


def _arrow(start: float, end: float, y: float) -> str:
    return f'<path d="M{start} {y}H{end - 6}"/><path class="head" d="M{end} {y}l-9 -5v10z"/>'


def main(run: str, block: str, data: str, output: str) -> None:
    """Draw the functions of the GR-KAN `block` of a trained model, where test images of `data` have their inputs."""
    trained = load_trained(run)
    images = first_images(loader_for(trained, data_for(trained, data), batch_size=256, workers=0), UnreadableImages())
    assert images is not None
    inputs = record_inputs(trained.model, [images.to(trained.device)])
    found = rationals(trained.model)
    drawn = [curves(found[name], inputs[name]) for name in (f"{block}.act1", f"{block}.act2")]
    Path(output).write_text(picture(*drawn), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
