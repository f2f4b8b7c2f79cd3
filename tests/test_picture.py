"""docs/picture.py draws the functions that a model has."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import timm

import grkan

SCRIPT = Path(__file__).parent.parent / "docs" / "picture.py"


def test_the_picture_shows_every_group_and_the_starts(tmp_path):
    model = timm.create_model("kat_micro_patch2_8", depth=1, num_groups=4)
    preprocessing = {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "interpolation": "bicubic", "crop_pct": 1.0}
    grkan.save_model(model, tmp_path / "m.safetensors", classes=list("0123456789"), preprocessing=preprocessing)
    runpy.run_path(str(SCRIPT))["main"](str(tmp_path / "m.safetensors"), "blocks.0.mlp", "digits", tmp_path / "p.svg")
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    paths = [e for e in root.iter() if e.tag.endswith("path")]
    assert [sum(e.get("class") == kind for e in paths) for kind in ("curve", "start")] == [1 + 2 * 4, 2]
    x, y = np.array([point.split() for point in paths[-1].get("d")[1:].split("L")], float).T
    assert len(x) == 121
    assert 0 <= x.min() < x.max() <= float(root.get("width"))
    assert 0 <= y.min() < y.max() <= float(root.get("height"))
