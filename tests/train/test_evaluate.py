import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from grkan import save_model
from grkan.train import evaluate
from grkan.train.evaluate import Details, find_images, first_images, predict, score
from grkan.train.loading import UnreadableImages, evaluation_loader
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


def test_details_count_by_class():
    logits = torch.tensor([[9.0, 5, 4, 3, 2, 1, 0], [1, 9, 5, 4, 3, 2, 0], [0, 9, 5, 4, 3, 2, 1]])
    details = Details(7, confusion=True)
    details.add(logits[:2], torch.tensor([0, 6]))
    details.add(logits[2:], torch.tensor([6]))
    classes = list("abcdefg")
    per_class = {**dict.fromkeys(classes), "a": 100.0, "g": 0.0}
    assert details.to_dict(classes) == {"top5": pytest.approx(100 / 3), "per_class": per_class}
    assert details.confusion.sum() == 3
    assert (details.confusion[0, 0], details.confusion[6, 1]) == (1, 2)


def test_confusions_are_counted_over_batches():
    logits, details = torch.eye(3), Details(3, confusion=True)
    for rows, labels in (([0, 1], [0, 2]), ([1, 2, 0], [2, 2, 0])):
        details.add(logits[rows], torch.tensor(labels))
    assert details.confusion.tolist() == [[2, 0, 0], [0, 0, 0], [0, 2, 1]]


def test_of_few_classes_all_are_among_the_best():
    details = Details(2)
    details.add(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert details.to_dict(["a", "b"]) == {"top5": 100.0, "per_class": {"a": 100.0, "b": 0.0}}


def test_predict_gives_probabilities_in_order(trained, tmp_path):
    Image.fromarray(np.full((16, 12), 255, np.uint8)).convert("RGB").save(tmp_path / "white.png")
    (result,) = predict(trained, [str(tmp_path / "white.png")])
    assert json.loads(json.dumps(result)) == result
    p = 1 / (1 + np.exp(-5))
    assert result["label"] == "dog"
    assert result["probability"] == pytest.approx(p, abs=1e-5)
    assert result["top5"] == [["dog", pytest.approx(p, abs=1e-5)], ["cat", pytest.approx(1 - p, abs=1e-5)]]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (32, 0), (3, 1)])
def test_every_image_gets_its_line(trained, tmp_path, batch_size, workers):
    files = []
    for i in range(8):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(files[-1])
    (tmp_path / "3.png").write_text("no image")
    files += [files[3], str(tmp_path / "none.png"), files[0]]
    results = list(predict(trained, files, batch_size, workers, top=1))
    assert [result["path"] for result in results] == files
    assert [result.get("error") for result in results] == [
        *[None] * 3,
        "it is not an image of a known format",
        *[None] * 4,
        "it is not an image of a known format",
        "No such file or directory",
        None,
    ]
    for i, result in enumerate(results[:8]):
        if i != 3:
            bright = 1 / (1 + np.exp(-10 * (30 * i / 255 - 0.5)))
            assert result["top1"] == [[result["label"], pytest.approx(max(bright, 1 - bright), abs=1e-5)]]


def test_outputs_that_are_not_finite_are_no_prediction(trained, tmp_path):
    trained.model.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    assert list(predict(trained, [path])) == [{"path": path, "error": "the model's outputs are not finite"}]


def test_the_images_of_folders_are_found(image_folder):
    (image_folder / "val" / "cat" / "notes.txt").touch()
    given = [str(image_folder / "val" / "dog" / "0.png"), str(image_folder / "val"), "none.png"]
    files, passed_over = find_images(given)
    below = [str(image_folder / "val" / name / f"{i}.png") for name in ("cat", "dog") for i in range(3)]
    assert files == [given[0], *below, "none.png"]
    assert passed_over == {"*.txt": 1}
    (image_folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        find_images([str(image_folder / "empty")])


def test_the_first_images_are_those_that_can_be_read(trained, image_folder):
    paths = sorted((image_folder / "val").rglob("*.png"))
    loader = make_loader(trained, str(image_folder), batch_size=2, workers=0)
    for path in paths[:3]:
        path.write_bytes(b"")
    assert len(first_images(loader, UnreadableImages())) == 1
    for path in paths:
        path.write_bytes(b"")
    assert first_images(loader, UnreadableImages()) is None


def test_a_model_of_other_classes_is_refused(trained):
    with pytest.raises(ValueError, match="the model has no class '0'"):
        make_loader(trained, "digits", batch_size=4, workers=0)
