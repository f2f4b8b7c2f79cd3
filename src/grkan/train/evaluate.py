"""Test a trained model, and predict with it."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import GrkanValueError
from .data import TEST_SPLITS, TRAIN_SPLITS, ImageData, absolute, find_source, images_below, match_classes
from .loading import Batch, UnreadableImages, evaluation_loader, evaluation_transform
from .model import TrainedModel

_TOP = 5


@dataclass
class Score:
    """Sums over the images of a test set."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def to_dict(self) -> dict[str, float | int]:
        """Return top1 in percent, the mean cross entropy as loss, and the number of images."""
        n = max(self.images, 1)
        return {"top1": 100 * self.correct / n, "loss": self.loss / n, "images": self.images}


class Details:
    """The results of a test beyond `Score`.

    Args:
        classes: the number of classes.
        confusion: count how often each class was taken for each other. The memory is quadratic in `classes`.
    """

    def __init__(self, classes: int, confusion: bool = False) -> None:
        self.top5 = 0
        """The number of images whose class is among the five most probable ones."""
        self.images = torch.zeros(classes, dtype=torch.long)
        """The number of images of each class."""
        self.correct = torch.zeros(classes, dtype=torch.long)
        """The number of correct images of each class."""
        self.confusion = torch.zeros(classes, classes, dtype=torch.long) if confusion else None
        """[true class, most probable class]"""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [N, C] and labels [N]."""
        logits, labels = logits.cpu(), labels.cpu()
        best = logits.topk(min(_TOP, logits.shape[1])).indices
        self.top5 += int((best == labels[:, None]).sum())
        self.images += torch.bincount(labels, minlength=len(self.images))
        self.correct += torch.bincount(labels[best[:, 0] == labels], minlength=len(self.images))
        if self.confusion is not None:
            self.confusion.index_put_((labels, best[:, 0]), torch.ones_like(labels), accumulate=True)

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return top5 in percent, and per_class: the percentage of correct images by class name."""
        right, all_ = self.correct.tolist(), self.images.tolist()
        per_class = {name: 100 * r / n if n else None for name, r, n in zip(classes, right, all_, strict=True)}
        return {"top5": 100 * self.top5 / max(sum(all_), 1), "per_class": per_class}


@torch.inference_mode()
def score(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    unreadable: UnreadableImages,
    after_batch: Callable[[Batch], object] = lambda _: None,
    details: Details | None = None,
) -> Score:
    """Score a model, which is put in eval mode, on a loader's images, and add them to `details` if it is given."""
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
            if details is not None:
                details.add(logits, labels)
        after_batch(batch)
    return total


def first_images(loader: DataLoader, unreadable: UnreadableImages) -> Tensor | None:
    """Return the images of the first batch that has any, or None."""
    for batch in loader:
        unreadable.add(batch)
        if len(batch.labels):
            return batch.images
    return None


def data_for(
    trained: TrainedModel, data: str, split: str | None = None, val_split: float | None = None, seed: int = 0
) -> ImageData:
    """Return the images of `--data` to test a model on, with indices of the model's classes as labels.

    Args:
        trained: the model. If its run used this data, `val_split` and `seed` default to those of the run, so that the
            same test images are found again.
        data, val_split, seed: as in `Config`.
        split: train, val or another split of the data set; None: the split that runs are tested on.

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
    """Return batches of the images from `data_for`, preprocessed for the model."""
    return evaluation_loader(images, evaluation_transform(trained.preprocessing), batch_size, workers)


def find_images(paths: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Return the files to predict: the given files, and all images in the given folders, in the order of their names.

    Returns:
        The files, and how many entries of folders were skipped, by reason.

    Raises:
        ValueError: a folder has no images.
    """
    files: list[str] = []
    passed_over: Counter[str] = Counter()
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
        elif below := list(images_below(path, passed_over)):
            files += below
        else:
            raise GrkanValueError(f"{path} has no images")
    return files, passed_over


@torch.inference_mode()
def predict(
    trained: TrainedModel, files: Sequence[str], batch_size: int = 32, workers: int = 0, top: int = _TOP
) -> Iterator[dict[str, Any]]:
    """Predict the most probable classes of image files, in the order of the files.

    Args:
        trained: the model.
        files: paths.
        batch_size: the number of images at a time.
        workers: the number of processes that load images; 0: this process loads them.
        top: the number of classes.

    Yields:
        For each file its path; label, the most probable class; probability, in [0, 1]; and, for a `top` of 5, top5, a
        list of [label, probability]. If an image cannot be read or its outputs are not finite, only path and error,
        the reason.
    """
    labels = np.zeros(len(files), dtype=np.int64)
    images = ImageData([Path(file) for file in files], labels, tuple(trained.classes))
    transform = evaluation_transform(trained.preprocessing)
    waiting = iter(files)
    trained.model.eval()
    for batch in evaluation_loader(images, transform, batch_size, workers):
        probabilities = iter(())
        if len(batch.labels):
            logits = trained.model(batch.images.to(trained.device)).float()
            probabilities = iter(logits.softmax(dim=-1).cpu())
        for file in islice(waiting, batch_size):
            reason = batch.unreadable.get(str(Path(file)))
            yield {"path": file, **({"error": reason} if reason else _best(next(probabilities), trained.classes, top))}


def _best(probabilities: Tensor, classes: Sequence[str], top: int) -> dict[str, Any]:
    if not probabilities.isfinite().all():
        return {"error": "the model's outputs are not finite"}
    values, indices = probabilities.topk(min(top, len(probabilities)))
    best = [[classes[i], round(p, 6)] for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
    return {"label": best[0][0], "probability": best[0][1], f"top{top}": best}
