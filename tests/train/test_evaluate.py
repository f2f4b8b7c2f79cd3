import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from grkan import save_model
from grkan.train import evaluate
from grkan.train.data import UnreadableImages, evaluation_loader
from grkan.train.evaluate import first_images, predict, score
from grkan.train.model import load_trained

PREPROCESSING = {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0], "interpolation": "bicubic", "crop_pct": 1.0}


def make_loader(trained, data, batch_size, workers):
    return evaluate.loader_for(trained, evaluate.data_for(trained, data), batch_size, workers)


class _Brightness(nn.Module):
    """Logits (0, 10 (mean - 0.5)): class 1 is bright."""

    def forward(self, x):
        bright = 10 * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([torch.zeros_like(bright), bright], dim=1)


@pytest.fixture
def trained(tmp_path):
    import timm

    model = timm.create_model("kat_micro_patch2_8", depth=1, embed_dim=16, num_heads=2, num_classes=2)
    save_model(model, tmp_path / "model.safetensors", classes=["cat", "dog"], preprocessing=PREPROCESSING)
    result = load_trained(tmp_path / "model.safetensors")
    result.model = _Brightness().to(result.device)
    return result


def test_score_counts_and_averages(trained, image_folder):
    loader = make_loader(trained, str(image_folder), batch_size=4, workers=0)
    result = score(trained.model, loader, trained.device, UnreadableImages()).to_dict()
    images = torch.cat([batch.images for batch in loader])
    labels = torch.cat([batch.labels for batch in loader])
    logits = trained.model(images.to(trained.device)).cpu()
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert result == {"top1": 100.0, "loss": pytest.approx(expected, rel=1e-6), "images": 6}


def test_score_leaves_unreadable_images_out(trained, image_folder):
    (image_folder / "val" / "cat" / "0.png").write_bytes(b"")
    unreadable = UnreadableImages()
    loader = make_loader(trained, str(image_folder), batch_size=1, workers=0)
    assert score(trained.model, loader, trained.device, unreadable).images == 5
    assert len(unreadable.names) == 1


def test_an_empty_loader_scores_nothing(trained, image_folder):
    from grkan.train.data import find_source

    data = find_source(str(image_folder)).load("test")
    data.images, data.labels = [], np.zeros(0, np.int64)
    loader = evaluation_loader(data, lambda image: image, 4)
    assert score(trained.model, loader, trained.device, UnreadableImages()).images == 0


def test_predict_gives_probabilities_in_order(trained, tmp_path):
    Image.fromarray(np.full((16, 12), 255, np.uint8)).convert("RGB").save(tmp_path / "white.png")
    result = predict(trained, tmp_path / "white.png")
    assert json.loads(json.dumps(result)) == result
    p = 1 / (1 + np.exp(-5))
    assert result["label"] == "dog"
    assert result["probability"] == pytest.approx(p, abs=1e-5)
    assert result["top5"] == [["dog", pytest.approx(p, abs=1e-5)], ["cat", pytest.approx(1 - p, abs=1e-5)]]


def test_outputs_that_are_not_finite_are_no_prediction(trained, tmp_path):
    trained.model = lambda x: torch.full((1, 2), float("nan"))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"the model's outputs for .*a\.png are not finite"):
        predict(trained, tmp_path / "a.png")


def test_the_first_images_are_those_that_can_be_read(trained, image_folder):
    paths = sorted((image_folder / "val").rglob("*.png"))
    loader = make_loader(trained, str(image_folder), batch_size=2, workers=0)
    for path in paths[:3]:
        path.write_bytes(b"")
    assert len(first_images(loader, UnreadableImages())) == 1
    for path in paths:
        path.write_bytes(b"")
    assert first_images(loader, UnreadableImages()) is None


def test_an_unreadable_image_is_named(trained, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.png"):
        predict(trained, tmp_path / "x.png")


def test_a_model_of_other_classes_is_refused(trained):
    with pytest.raises(ValueError, match="the model has no class '0'"):
        make_loader(trained, "digits", batch_size=4, workers=0)
