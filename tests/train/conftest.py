"""A model and data sets that train in a second."""

import numpy as np
import pytest
from PIL import Image

TINY = {
    "model": "kat_micro_patch2_8",
    "model_args": {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_groups": 4},
    "epochs": 2,
    "batch_size": 256,
}


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of ten steps on the digits."""
    return {**TINY, "output": str(tmp_path / "run")}


@pytest.fixture
def image_folder(tmp_path):
    """FOLDER/{train,val}/{cat,dog}/0.png...: 8x8 gray noise, dark or bright by its class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for base, name in ((0, "cat"), (128, "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(base, base + 128, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"
