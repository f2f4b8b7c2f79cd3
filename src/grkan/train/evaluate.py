"""What a trained model gets right."""

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
    images_below,
    match_classes,
)
from .model import TrainedModel

_TOP = 5


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


class Details:
    """What a test finds beside `Score`.

    Args:
        classes: how many.
        confusion: count how often each class was taken for each other, which takes memory for their square.
    """

    def __init__(self, classes: int, confusion: bool = False) -> None:
        self.top5 = 0
        """Images whose class is among the five most probable ones."""
        self.images = torch.zeros(classes, dtype=torch.long)
        """Of each class."""
        self.correct = torch.zeros(classes, dtype=torch.long)
        """Of each class."""
        self.confusion = torch.zeros(classes, classes, dtype=torch.long) if confusion else None
        """[true class, most probable class]"""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Those of a batch: [N, C] and [N]."""
        logits, labels = logits.cpu(), labels.cpu()
        best = logits.topk(min(_TOP, logits.shape[1])).indices
        self.top5 += int((best == labels[:, None]).sum())
        self.images += torch.bincount(labels, minlength=len(self.images))
        self.correct += torch.bincount(labels[best[:, 0] == labels], minlength=len(self.images))
        if self.confusion is not None:
            self.confusion.index_put_((labels, best[:, 0]), torch.ones_like(labels), accumulate=True)

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """top5 in percent, and per_class: by its name, the percentage of a class's images that were right."""
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
    """Run a model, which is put in eval mode, over a loader's images; `details` are added to, if there are any."""
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


def find_images(paths: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The files to predict: those given, and of the folders among them all images, in the order of their names.

    Returns:
        The files; and how many entries of folders were passed over, by the reason.

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
    """The most probable classes of image files, in their order.

    Args:
        trained: the model.
        files: paths.
        batch_size: images at a time.
        workers: processes that load them; 0: this one.
        top: how many classes.

    Yields:
        For each file its path; and label, the most probable class; probability, in [0, 1]; and, for a `top` of 5, top5,
        a list of [label, probability]. Of an image that cannot be read, or for which the outputs are not finite, only
        path and error, the reason.
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
