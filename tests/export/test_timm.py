"""The folder for timm makes the same model, says what its outputs are called, and what it came to."""

import json
import subprocess
import sys

import pytest
import torch

import grkan

timm = pytest.importorskip("timm")
pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def made(name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **SIZES, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.grkan_metadata = {"classes": ["ant", "bee", "cat"], "preprocessing": None}
    return model


@torch.no_grad()
@pytest.mark.parametrize("converted", [False, True])
def test_timm_makes_the_same_model(tmp_path, converted):
    if converted:
        pytest.importorskip("scipy")
        model = made("grkan_vit_micro_patch2_8")
        grkan.convert_(model, calibration=[torch.randn(8, 1, 8, 8)])
    else:
        model = made("kat_micro_patch2_8", form="sum_of_abs", order=(3, 2), global_pool="avg")
    path = grkan.export(model, tmp_path / "kat", format="timm")
    assert {file.name for file in path.iterdir()} == {"README.md", "config.json", "model.safetensors"} | (
        {"conversion.json"} if converted else set()
    )
    config = json.loads((path / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "cat"]
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(timm.create_model(f"local-dir:{path}", pretrained=True).eval()(x), model(x))
    card = (path / "README.md").read_text()
    assert "library_name: timm" in card
    assert "hf-hub:USER/kat" in card
    assert str(tmp_path) not in card
    if converted:
        recipe = json.loads((path / "conversion.json").read_text())
        again = made("grkan_vit_micro_patch2_8")
        grkan.apply_conversion_(again, recipe)
        again.load_state_dict(model.state_dict())
        assert "converted" in card


def test_without_grkan_timm_refuses(tmp_path):
    path = grkan.export(made("kat_micro_patch2_8"), tmp_path / "kat", format="timm")
    code = f"import timm; timm.create_model('local-dir:{path}', pretrained=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "Unknown model" in done.stderr


def test_results_are_on_the_card(tmp_path):
    model = made("kat_micro_patch2_8")
    settings = "data: digits\nepochs: 5\n"
    results = {"data": "digits", "epochs": 5, "epoch": 4, "top1": 97.5, "loss": 0.125, "settings": settings}
    model.grkan_results = results
    path = grkan.export(model, tmp_path / "kat", format="timm")
    card = (path / "README.md").read_text()
    assert "On the test images of digits, after 4 of 5 epochs" in card
    assert "| 97.50 % | 0.1250 |" in card
    assert "grkan train --config train.yaml" in card
    assert (path / "train.yaml").read_text() == settings


def test_a_folder_of_which_timm_makes_another_model_does_not_appear(tmp_path, monkeypatch):
    create = timm.create_model

    def wrong(*args, **kwargs):
        model = create(*args, **kwargs)
        with torch.no_grad():
            model.head.bias.add_(1)
        return model

    model = made("kat_micro_patch2_8")
    monkeypatch.setattr(timm, "create_model", wrong)
    with pytest.raises(RuntimeError, match=r"builds a different model from the folder: head\.bias differs"):
        grkan.export(model, tmp_path / "kat", format="timm")
    assert list(tmp_path.iterdir()) == []


def test_other_models(tmp_path):
    with pytest.raises(ValueError, match="in timm's registry for format 'timm'; got a GRKAN"):
        grkan.export(grkan.GRKAN(8), tmp_path / "kat", format="timm")
