"""What a trained model gets right."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import GrkanValueError
from .data import (
    TEST_SPLITS,
    TRAIN_SPLITS,
    Batch,
    ImageData,
    UnreadableImages,
    absolute,
    evaluation_loader,
    evaluation_transform,
    find_source,
    match_classes,
)
from .images import UnreadableImageError, open_image
from .model import TrainedModel


@dataclass
class Score:
    """Sums over the images of a test set."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def to_dict(self) -> dict[str, float | int]:
        """top1 in percent, the mean cross entropy, and how many images they are from."""
        n = max(self.images, 1)
        return {"top1": 100 * self.correct / n, "loss": self.loss / n, "images": self.images}


@torch.inference_mode()
def score(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    unreadable: UnreadableImages,
    after_batch: Callable[[Batch], object] = lambda _: None,
) -> Score:
    """Run a model, which is put in eval mode, over a loader's images."""
    model.eval()
    total = Score()
    for batch in loader:
        unreadable.add(batch)
        if len(batch.labels):
            labels = batch.labels.to(device)
            logits = model(batch.images.to(device)).float()
            total.loss += F.cross_entropy(logits, labels, reduction="sum").item()
            total.correct += int((logits.argmax(dim=-1) == labels).sum())
            total.images += len(labels)
        after_batch(batch)
    return total


def first_images(loader: DataLoader, unreadable: UnreadableImages) -> Tensor | None:
    """The images of the first batch that has any."""
    for batch in loader:
        unreadable.add(batch)
        if len(batch.labels):
            return batch.images
    return None


def data_for(
    trained: TrainedModel, data: str, split: str | None = None, val_split: float | None = None, seed: int = 0
) -> ImageData:
    """The images of `--data` to test a model on, with labels that are indices of its classes.

    Args:
        trained: the model. Of a run on this very data, what it kept for the test is found again: `val_split` and `seed`
            are the run's unless they are given.
        data, val_split, seed: as in `Config`.
        split: train, val or another that the data set has; None: what runs are tested on.

    Raises:
        ValueError: there is no such data set or split, or it has a class that the model does not know.
    """
    if val_split is None and trained.run.get("data") == absolute(data):
        val_split, seed = trained.run.get("val_split"), trained.run.get("seed", 0)
    source = find_source(data, val_split, seed)
    if split is None:
        images = source.load("test")
    elif source.load_split is not None:
        images = source.load_split(split)
    elif split in TRAIN_SPLITS or split in TEST_SPLITS:
        images = source.load("train" if split in TRAIN_SPLITS else "test")
    else:
        raise GrkanValueError(f"--split must be train or test for {data}; got {split!r}")
    return match_classes(images, trained.classes)


def loader_for(trained: TrainedModel, images: ImageData, batch_size: int, workers: int) -> DataLoader:
    """Batches of what `data_for` gives, preprocessed for the model."""
    return evaluation_loader(images, evaluation_transform(trained.preprocessing), batch_size, workers)


@torch.inference_mode()
def predict(trained: TrainedModel, path: str | Path) -> dict[str, Any]:
    """The five most probable classes of an image file.

    Returns:
        path; label, the most probable class; probability, in [0, 1]; top5, a list of [label, probability].

    Raises:
        ValueError: the image cannot be read, or the model's outputs are not finite.
    """
    try:
        image = open_image(path)
    except UnreadableImageError as error:
        raise GrkanValueError(f"cannot read the image {path}: {error}") from None
    x = evaluation_transform(trained.preprocessing)(image).unsqueeze(0).to(trained.device)
    probabilities = trained.model(x).float().softmax(dim=-1)[0].cpu()
    if not probabilities.isfinite().all():
        raise GrkanValueError(f"the model's outputs for {path} are not finite")
    values, indices = probabilities.topk(min(5, len(probabilities)))
    top5 = [[trained.classes[i], round(p, 6)] for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
    return {"path": str(path), "label": top5[0][0], "probability": top5[0][1], "top5": top5}
