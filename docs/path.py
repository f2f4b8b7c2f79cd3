"""Draw docs/path.svg, the path of x from GRKAN.forward to a kernel: python docs/path.py docs/path.svg

The colours are readable on white and on black.
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

GRAY, BLUE, ORANGE, GREEN = "#7a8189", "#0a84d6", "#d9681d", "#1c9e6f"
WIDTH, HEIGHT = 760, 602
STYLE = f"""
text {{ font: 14px system-ui, sans-serif; fill: {GRAY}; text-anchor: middle; }}
.title {{ font-weight: 600; }}
.label {{ font-size: 12.5px; }}
.beside {{ text-anchor: start; }}
rect {{ fill: none; stroke-width: 1.5; }}
path {{ fill: none; stroke: {GRAY}; stroke-width: 1.5; }}
.head {{ fill: {GRAY}; stroke: none; }}
"""
# Centre, top, width, colour and lines of each box.
BOXES = {
    "forward": (380, 10, 320, GRAY, "GRKAN.forward(x)", "nn/grkan.py"),
    "pair": (380, 100, 320, GRAY, "rational_then_linear(act, fc, x)", "nn/linear.py, once for each pair"),
    "door": (380, 190, 320, GRAY, "rational_linear, group_rational", "rational/op.py: checks, then one of three ways"),
    "plain": (125, 310, 220, BLUE, "plain operations", "differentiable in every way"),
    "operator": (380, 310, 220, ORANGE, "PyTorch operator", "grkan::rational_linear"),
    "function": (635, 310, 220, ORANGE, "autograd.Function", "around the kernel"),
    "layout": (507, 420, 475, ORANGE, "one layout: [rows, groups, width]", "rational/op.py"),
    "reference": (125, 540, 220, BLUE, "the definition", "rational/reference.py"),
    "cpu": (380, 540, 220, GREEN, "CPU kernel", "csrc/: AVX-512, AVX2, portable"),
    "gpu": (635, 540, 220, GREEN, "GPU kernel", "rational/gpu.py: Triton"),
}
BOX_HEIGHT = 52
# From, to, and what is written beside the arrow.
ARROWS = [
    ("forward", "pair", "act1, fc1, then act2, fc2"),
    ("pair", "door", "neither is hooked, wrapped or replaced"),
    ("door", "plain", "torch.func, forward-mode AD"),
    ("door", "operator", "compile, export, tracers"),
    ("door", "function", "eager calls"),
    ("operator", "layout", ""),
    ("function", "layout", ""),
    ("plain", "reference", ""),
    ("layout", "cpu", ""),
    ("layout", "gpu", ""),
    ("layout", "reference", "no kernel for the device"),
]


def picture() -> str:
    """The SVG."""
    parts = []
    for start, end, label in ARROWS:
        (x1, top1, width1, *_), (x2, top2, width2, *_) = BOXES[start], BOXES[end]
        x2 = min(max(x1, x2 - width2 / 2 + 20), x2 + width2 / 2 - 20) if end == "layout" else x2
        x1 = min(max(x2, x1 - width1 / 2 + 20), x1 + width1 / 2 - 20)  # leaves the box where the other one is nearest
        y1, y2 = top1 + BOX_HEIGHT, top2
        turn = y1 + 34
        path = f"M{x1} {y1}V{y2 - 7}" if x1 == x2 else f"M{x1} {y1}V{turn}H{x2}V{y2 - 7}"
        parts.append(f'<path d="{path}"/><path class="head" d="M{x2} {y2 - 1}l-5 -9h10z"/>')
        parts.append(f'<text class="label beside" x="{x2 + 10}" y="{y2 - 14}">{escape(label)}</text>')
    for x, top, width, color, title, where in BOXES.values():
        box = f'x="{x - width / 2}" y="{top}" width="{width}" height="{BOX_HEIGHT}" rx="8"'
        parts.append(
            f'<rect {box} style="stroke: {color}"/>'
            f'<text class="title" x="{x}" y="{top + 22}">{escape(title)}</text>'
            f'<text class="label" x="{x}" y="{top + 41}">{escape(where)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img">\n<title>The path of x from GRKAN.forward to a kernel</title>\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
