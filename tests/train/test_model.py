import json

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from grkan import save_model
from grkan.errors import GrkanError
from grkan.train import model as module
from grkan.train.config import make_config
from grkan.train.data import ImageData
from grkan.train.model import check_model, describe, load_original, load_trained, make_model, model_file

PREPROCESSING = {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0], "interpolation": "bicubic", "crop_pct": 1.0}
TWO = ImageData(np.zeros((2, 8, 8), np.uint8), np.array([0, 1]), ("cat", "dog"))
ARGUMENTS = {"depth": 1, "embed_dim": 16, "num_heads": 2}


@pytest.fixture
def damaged(tmp_path):
    """Writes a model file whose metadata say something else."""

    def write(**changes):
        path = tmp_path / "model.safetensors"
        model = timm.create_model("kat_micro_patch2_8", **ARGUMENTS, num_classes=2)
        save_model(model, path, classes=["cat", "dog"], preprocessing=PREPROCESSING)
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["grkan"])
        for key, value in changes.items():
            if key in metadata:
                metadata[key] = value
            else:
                metadata["preprocessing"][key] = value
        save_file(load_file(path), path, {"grkan": json.dumps(metadata)})
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": [2, 8, 8]}, "cannot be used: KeyError 2"),
        ({"std": [0]}, "cannot be used: std evaluated to zero"),
        ({"mean": [0, 1]}, "cannot be used: .*doesn't match the broadcast shape"),
        ({"interpolation": "x"}, "cannot be used: KeyError 'x'"),
        ({"crop_pct": 1e-9}, "cannot be used: .*greater than maximum"),
        ({"size": 8}, "cannot be used: .*unexpected keyword argument 'size'"),
        ({"input_size": [1, 16, 16]}, "does not fit its model: Input height"),
    ],
)
def test_preprocessing_that_cannot_be_used_is_named(damaged, changes, message):
    path = damaged(**changes)
    for load in (lambda: load_trained(path), lambda: load_original(None, path, None)):
        with pytest.raises(ValueError, match=rf"the preprocessing in \S+model\.safetensors {message}"):
            load()


def test_a_file_whole_and_with_other_classes(damaged):
    assert load_trained(damaged()).classes == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"has 3 classes, but outputs of shape \(1, 2\) for an image"):
        load_trained(damaged(classes=["a", "b", "c"]))


@pytest.mark.parametrize("changes", [{"std": [0]}, {"interpolation": "x"}, {"crop_pct": 1e-9}])
def test_a_start_with_preprocessing_that_cannot_be_used_is_named(damaged, changes):
    config = make_config({"init": str(damaged(**changes)), "model": "kat_micro_patch2_8", "model_args": ARGUMENTS})
    with pytest.raises(ValueError, match=r"the preprocessing in .*model\.safetensors cannot be used"):
        make_model(config, TWO, None, None)


def test_what_a_file_leaves_out_is_the_models(damaged):
    path = damaged(preprocessing={"crop_pct": 0.5})
    assert next(iter(describe(str(path)).values()))["parameters"] > 0


@pytest.mark.parametrize(
    ("error", "arguments", "blamed"),
    [
        (TypeError("'NoneType' object is not subscriptable"), ARGUMENTS, True),
        (TypeError("'NoneType' object is not subscriptable"), {}, False),
        (torch.AcceleratorError("an illegal memory access"), ARGUMENTS, False),
        (ModuleNotFoundError("No module named 'x'"), ARGUMENTS, False),
    ],
)
def test_arguments_are_blamed_where_there_are_any(error, arguments, blamed, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module.timm, "create_model", fail)
    with pytest.raises(Exception, match=str(error)) as caught:
        check_model(make_config({"model": "kat_micro_patch2_8", "model_args": arguments}))
    assert isinstance(caught.value, GrkanError) == blamed
    assert blamed or caught.value is error


def test_a_model_that_does_not_classify_is_refused(monkeypatch):
    model = nn.Module()
    model.forward = lambda x: (x, x)
    monkeypatch.setattr(module.timm, "create_model", lambda *_, **__: model)
    config = make_config({"model": "kat_micro_patch2_8"})
    with pytest.raises(ValueError, match=r"its output for two images must be logits of shape \(2, 2\); got a tuple"):
        make_model(config, TWO, None, None)


def test_the_best_weights_of_a_folder_come_first(tmp_path):
    with pytest.raises(ValueError, match=r"has no best\.safetensors"):
        model_file(tmp_path)
    (tmp_path / "last.safetensors").touch()
    assert model_file(tmp_path).name == "last.safetensors"
    (tmp_path / "best.safetensors").touch()
    assert model_file(tmp_path).name == "best.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        model_file(tmp_path / "none")


def test_a_name_that_is_like_no_other_gets_ours():
    with pytest.raises(
        ValueError, match=r"unknown model 'nope'; known names: kat_base_patch16_224, .* and \d+ more"
    ) as caught:
        describe("nope")
    assert len(str(caught.value)) < 300


def test_a_model_next_to_its_twin():
    counts = describe("kat_tiny_patch16_224")
    assert list(counts) == ["kat_tiny_patch16_224", "vit_tiny_patch16_224"]
    assert [round(c["paper_operations"] / 1e9, 2) for c in counts.values()] == [1.13, 1.08]
    assert counts["kat_tiny_patch16_224"]["parameters"] == 5_719_336
