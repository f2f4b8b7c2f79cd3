"""What a trained model gets right."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import GrkanValueError
from ..models.files import load_model, read_metadata
from ..models.kat import twin_of
from ..models.metadata import Preprocessing
from ..models.operations import count_operations
from .config import nearest
from .data import (
    UNREADABLE,
    Batch,
    UnreadableImages,
    evaluation_loader,
    evaluation_transform,
    find_source,
    match_classes,
    open_image,
)


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


def model_file(path: str | Path) -> Path:
    """The weights that a path stands for: the file itself, or the best of a run's folder.

    Raises:
        ValueError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise GrkanValueError(f"{path} holds no best.safetensors; a run writes it at the end of its first epoch")
    raise GrkanValueError(f"{path} does not exist; give a run's folder or a .safetensors file")


@dataclass
class TrainedModel:
    """A model file, ready to be used."""

    model: nn.Module
    classes: Sequence[str]
    preprocessing: Preprocessing
    device: torch.device


def load_trained(path: str | Path) -> TrainedModel:
    """Load a run's best weights or a model file, onto the GPU if there is one.

    Raises:
        ValueError: there is no such file, or it has no classes or preprocessing, so images cannot be fed to it.
    """
    path = model_file(path)
    metadata = read_metadata(path)
    classes, preprocessing = metadata["classes"], metadata["preprocessing"]
    if not classes or not preprocessing:
        raise GrkanValueError(f"{path} does not say its classes and preprocessing; files that grkan train writes do")
    device = _device()
    model = load_model(path).to(device)
    return TrainedModel(model, classes, preprocessing, device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_original(name: str | None, checkpoint: str | Path | None, data: str | None) -> TrainedModel:
    """A model to be converted: of a run, of a file of grkan's, or of timm with weights that timm reads.

    Args:
        name: in timm's registry; None: the checkpoint's.
        checkpoint: None for the weights that timm downloads.
        data: whose classes are the model's where nothing else says them and there are as many.

    Raises:
        ValueError: there is no such model or checkpoint, or they do not belong together.
    """
    device = _device()
    if name is not None:
        check_model_name(name)
    if checkpoint is not None and (Path(checkpoint).is_dir() or name is None or _is_model_file(checkpoint)):
        path = model_file(checkpoint)
        metadata = read_metadata(path)
        if name not in (None, metadata["model"]):
            raise GrkanValueError(f"{path} holds a {metadata['model']}, not a {name}; leave out --model")
        model, classes, preprocessing = load_model(path), metadata["classes"], metadata["preprocessing"]
    else:
        assert name is not None
        model, classes, preprocessing = _load_timm(name, checkpoint), None, None
    if classes is None and data is not None:
        found = find_source(data).load("train").classes
        classes = list(found) if len(found) == model.num_classes else None
    return TrainedModel(model.to(device), classes or (), preprocessing or resolve_data_config({}, model=model), device)


def _is_model_file(path: str | Path) -> bool:
    try:
        read_metadata(path)
    except ValueError:
        return False
    return True


def _load_timm(name: str, checkpoint: str | Path | None) -> nn.Module:
    """A model of timm with the weights of a file, whose number of classes is that of the model, or timm's own."""
    if checkpoint is None:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # what the download raises
            raise GrkanValueError(
                f"there are no pretrained weights of {name} at hand: {error}; give --checkpoint"
            ) from None
    try:
        state = timm.models.load_state_dict(str(checkpoint))
        classifier = timm.models.get_pretrained_cfg_value(name, "classifier")
        head = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
        arguments = {} if head is None else {"num_classes": len(head)}
        return timm.create_model(name, checkpoint_path=str(checkpoint), **arguments)
    except Exception as error:  # zipfile, pickle, PyTorch and safetensors each have their own
        reason = " ".join(str(error).split())[:200]
        raise GrkanValueError(f"{checkpoint} holds no weights of a {name}: {type(error).__name__}: {reason}") from None


def calibration_images(original: TrainedModel, data: str, count: int) -> Iterator[Tensor]:
    """Batches of training images, taken at equal distances, preprocessed as for a test.

    Raises:
        ValueError: there is no such data set; or, from the batches, none of the images can be read.
    """
    images = find_source(data).load("train")
    chosen = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))
    picked = images.images[chosen] if isinstance(images.images, np.ndarray) else [images.images[i] for i in chosen]
    images = replace(images, images=picked, labels=images.labels[chosen])
    loader = evaluation_loader(images, evaluation_transform(original.preprocessing), 32, 0)

    def batches() -> Iterator[Tensor]:
        readable = False
        for batch in loader:
            if len(batch.labels):
                readable = True
                yield batch.images.to(original.device)
        if not readable:
            raise GrkanValueError(f"--data {data} has no readable image")

    return batches()


def test_loader(trained: TrainedModel, data: str, batch_size: int, workers: int | None) -> DataLoader:
    """The test images of `--data`, preprocessed for the model, with labels that are indices of its classes."""
    source = find_source(data)
    images = match_classes(source.load("test"), trained.classes)
    transform = evaluation_transform(trained.preprocessing)
    return evaluation_loader(images, transform, batch_size, source.workers if workers is None else workers)


def load_weights(path: str | Path) -> nn.Module:
    """The model of a run's folder or of a model file, whatever it was trained for."""
    return load_model(model_file(path))


def describe(model: str) -> dict[str, dict[str, int]]:
    """What a model costs, and the Vision Transformer of the same size if it is a KAT that has one.

    Args:
        model: a name of timm's registry, a run's folder or a model file.

    Returns:
        By name, what `grkan.count_operations` counts for one image of the size that the model is made for.

    Raises:
        ValueError: there is no such model.
    """
    if Path(model).exists():
        path = model_file(model)
        built, metadata = load_model(path), read_metadata(path)
        size = (metadata["preprocessing"] or resolve_data_config({}, model=built))["input_size"]
        return {str(path): count_operations(built, tuple(size))}
    check_model_name(model)
    names = [model]
    if model in timm.list_models("kat_*", module="kat"):
        names.append(twin_of(model))
    counts = {}
    for name in names:
        built = timm.create_model(name)
        counts[name] = count_operations(built, resolve_data_config({}, model=built)["input_size"])
    return counts


def check_model_name(name: str) -> None:
    """Raise ValueError, with the nearest names, if timm's registry has no such model."""
    if not timm.is_model(name):
        ours = timm.list_models("kat_*")
        others = [other for other in timm.list_models() if other not in ours]
        raise GrkanValueError(f"unknown model {name!r}; {nearest(name, ours + others, shown=len(ours))}")


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
    except UNREADABLE as error:
        raise GrkanValueError(f"cannot read the image {path}: {' '.join(str(error).split())}") from None
    x = evaluation_transform(trained.preprocessing)(image).unsqueeze(0).to(trained.device)
    probabilities = trained.model(x).float().softmax(dim=-1)[0].cpu()
    if not probabilities.isfinite().all():
        raise GrkanValueError(f"the model's outputs for {path} are not finite")
    values, indices = probabilities.topk(min(5, len(probabilities)))
    top5 = [[trained.classes[i], round(p, 6)] for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
    return {"path": str(path), "label": top5[0][0], "probability": top5[0][1], "top5": top5}
