"""From images to batches: transforms, augmentation, and the order in which a run sees the images.

The order of images in batches is a function of (seed, epoch), and the augmentation of an image is a function of (seed,
epoch, index). So neither the number of processes, nor that of the loading workers, nor an interruption changes
anything.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import GrkanValueError
from ..models.metadata import Preprocessing
from .config import Config
from .data import ImageData, find_source
from .images import UnreadableImageError
from .interruption import shield_loading_process
from .randomness import derive_seed, seeded

_LONGEST = 16
"""The largest ratio of the sides; a test uses only the middle of the image."""


def evaluation_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Return the transform from an image to the model's input, [C, H, W] float32: timm's resize, centre crop and
    normalisation.

    Args:
        preprocessing: input_size (C, H, W), mean, std, interpolation, crop_pct, in timm's terms.
    """
    return T.Compose([_Convert(preprocessing), _shorten, create_transform(**preprocessing)])


def training_transform(preprocessing: Preprocessing, config: Config) -> Callable[[Image.Image], Tensor]:
    """Return the same transform with the augmentation of the configuration."""
    arguments = {key: preprocessing[key] for key in ("input_size", "mean", "std", "interpolation")}
    convert, size = _Convert(preprocessing), preprocessing["input_size"][-2:]
    if config.shift is not None and config.shift > max(size):
        raise GrkanValueError(f"shift must be at most the size of the model's images, {max(size)}; got {config.shift}")
    try:
        first, second, last = create_transform(
            **arguments,
            is_training=True,
            scale=config.crop_scale,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise _not_understood(config, error) from error
    for augment in second.transforms:
        for op in chain(getattr(augment, "ops", ()), *getattr(augment, "policy", ())):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    try:
        with seeded("trial"):
            second(convert(Image.new("L", (size[1], size[0]))))  # fail now if there are too many operations
    except ValueError as error:
        raise _not_understood(config, error) from error
    if config.shift is not None:
        first = [T.Resize(size), T.RandomCrop(size, padding=config.shift), T.RandomHorizontalFlip(config.hflip)]
        first = T.Compose(first)
    return T.Compose([convert, first, second, last])


def _shorten(image: Image.Image) -> Image.Image:
    """Crop a very long image to its middle, because resizing it as a whole could use up all memory."""
    limit = _LONGEST * min(image.size)
    if max(image.size) <= limit:
        return image
    return T.functional.center_crop(image, [min(image.height, limit), min(image.width, limit)])


def _not_understood(config: Config, error: Exception) -> GrkanValueError:
    reason = str(error) or type(error).__name__
    return GrkanValueError(f"timm does not understand auto_augment {config.auto_augment!r} ({reason})")


def _posterize(image: Image.Image, bits: int, **arguments: Any) -> Image.Image:
    """Call timm's posterize with at least 1 bit. With 0 bits the image was black, and newer Pillow raises an error."""
    return auto_augment.posterize(image, max(bits, 1), **arguments)


class _Convert:
    """Convert an image to gray or RGB, as the channels of the model's input require."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.mode = {1: "L", 3: "RGB"}[preprocessing["input_size"][0]]

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert(self.mode)


@dataclass
class Batch:
    """Images [N, C, H, W], their labels [N], and the unreadable images among them, as {name: reason}."""

    images: Tensor
    labels: Tensor
    unreadable: dict[str, str]

    def pin_memory(self) -> "Batch":
        """Pin the memory. The DataLoader calls this for classes that it does not know."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device, asynchronously if its memory is pinned."""
        images, labels = (t.to(device, non_blocking=True) for t in (self.images, self.labels))
        return Batch(images, labels, self.unreadable)


class _Samples(Dataset):
    """A map from (epoch, index) to the transformed image or None, its label, and {name: reason} if it is unreadable.

    In training, an unreadable image is replaced by the next readable one, so that every batch is full. Other unreadable
    images on the way to it are not reported: only the process that is asked for an image reports it.
    """

    def __init__(self, data: ImageData, transform: Callable[..., Tensor], seed: int | None) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, dict[str, str]]:
        epoch, first = key
        unreadable: dict[str, str] = {}
        for step in range(1 if self.seed is None else len(self.data)):
            copy, index = first // len(self.data), (first + step) % len(self.data)
            try:
                image = self.data.open(index)
            except UnreadableImageError as error:
                if step == 0:
                    unreadable[self.data.name(index)] = str(error)
                continue
            label = int(self.data.labels[index])
            if self.seed is None:
                return self.transform(image), label, unreadable
            with seeded("augmentation", self.seed, epoch, index + copy * len(self.data)):
                return self.transform(image), label, unreadable
        return None, 0, unreadable


def _collate(samples: list[tuple[Tensor | None, int, dict[str, str]]]) -> Batch:
    readable = [(image, label) for image, label, _ in samples if image is not None]
    unreadable = {name: reason for _, _, found in samples for name, reason in found.items()}
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    return Batch(images, torch.tensor([label for _, label in readable], dtype=torch.long), unreadable)


class TrainingSampler:
    """Yields the (epoch, index) pairs of one process's micro-batches, from a given epoch and step on.

    Every epoch has its own order. Each global batch is cut into equal parts, one for each process and micro-batch.
    Images that do not fill the last batch are dropped. Mixup pairs the i-th image of a batch with the i-th from its
    end, so a part takes images from both ends of the batch: the pairs are then the same in any number of processes.

    An image that occurs several times in an epoch is augmented differently each time: the k-th time its index is larger
    by k times the number of images.

    Args:
        size: the number of images.
        batch_size: the batch size of all processes together.
        parts: the number of parts of each batch.
        mine: the parts of this process.
        seed: the seed of the order.
        repeats: how often an image is in its batch.
        labels: the labels of the images, to draw all classes equally often; None: draw all images equally often.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        parts: int,
        mine: Sequence[int],
        seed: int,
        repeats: int = 1,
        labels: np.ndarray | None = None,
    ) -> None:
        self.size, self.batch_size, self.parts, self.mine, self.seed = size, batch_size, parts, mine, seed
        self.repeats, self.labels = repeats, labels
        self.epoch = self.first_step = 0

    def start_at(self, epoch: int, step: int) -> None:
        """Set the epoch and step at which the next iteration starts."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        """The number of micro-batches of an epoch. Divided by the number of parts of this process: its steps."""
        return self.size // self.batch_size * len(self.mine)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._order(torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch)))
        width = self.batch_size // self.parts
        for step in range(self.first_step, self.size // self.batch_size):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
            # first, last, second, last but one, ...
            pairs = [batch[i // 2] if i % 2 == 0 else batch[-1 - i // 2] for i in range(self.batch_size)]
            for part in self.mine:
                own = pairs[part * width : (part + 1) * width]
                yield [(self.epoch, index) for index in own[0::2] + own[1::2][::-1]]

    def _order(self, generator: torch.Generator) -> Tensor:
        if self.labels is None:
            order = torch.randperm(self.size, generator=generator)
        else:
            order = self._balanced(torch.from_numpy(self.labels), generator)
        if self.repeats > 1:
            # The copies in the k-th round of a class differ from those in the next round.
            image, times = order % self.size, order // self.size
            copies = times[:, None] * self.repeats + torch.arange(self.repeats)
            order = (image[:, None] + self.size * copies).flatten()[: self.size]
        return order

    def _balanced(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw equally many images of each class, within one: its images in random order, repeated in rounds."""
        classes = labels.unique()
        more = torch.randperm(len(classes), generator=generator) < self.size % len(classes)
        chosen = []
        for label, one_more in zip(classes, more.tolist(), strict=True):
            own = (labels == label).nonzero().flatten()
            wanted = self.size // len(classes) + one_more
            rounds = [
                own[torch.randperm(len(own), generator=generator)] + self.size * time
                for time in range(-(-wanted // len(own)))
            ]
            chosen += [torch.cat(rounds)[:wanted]] if rounds else []
        order = torch.cat(chosen)
        return order[torch.randperm(len(order), generator=generator)]


class _InOrder:
    """Batches of (0, index) pairs."""

    def __init__(self, indices: range, batch_size: int) -> None:
        self.indices, self.batch_size = indices, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[i : i + self.batch_size]]


def training_loader(
    data: ImageData, transform: Callable[..., Tensor], sampler: TrainingSampler, config: Config, pin_memory: bool
) -> DataLoader:
    """Return a loader of micro-batches in the sampler's order; iterating again keeps the worker processes."""
    workers = config.workers or 0
    return DataLoader(
        _Samples(data, transform, config.seed),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_collate,
        worker_init_fn=shield_loading_process,
        pin_memory=pin_memory,
    )


def evaluation_loader(
    data: ImageData,
    transform: Callable[..., Tensor],
    batch_size: int,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> DataLoader:
    """Return a loader of all images in order, without unreadable ones; each of n processes gets every n-th image."""
    return DataLoader(
        _Samples(data, transform, None),
        batch_sampler=_InOrder(range(process, len(data), processes), batch_size),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_collate,
        worker_init_fn=shield_loading_process,
    )


def batches_on(device: torch.device, loader: DataLoader) -> Iterator[Batch]:
    """Yield the batches of a loader on a device; a GPU copies the next batch while it computes with the current one."""
    if device.type != "cuda":
        for batch in loader:
            yield batch.to(device)
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in loader:
        with torch.cuda.stream(copying):
            batch = batch.to(device)
        computing.wait_stream(copying)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(computing)  # otherwise its memory would be reused for the next copy too early
        yield batch


def calibration_images(data: str, preprocessing: Preprocessing, count: int) -> Iterator[Tensor]:
    """Return `calibration_batches` of the training images of `--data`."""
    return calibration_batches(replace(find_source(data).load("train"), where=data), preprocessing, count)


def calibration_batches(images: ImageData, preprocessing: Preprocessing, count: int) -> Iterator[Tensor]:
    """Yield batches with at most `count` images in total, taken at equal distances and preprocessed as for a test.

    Raises:
        ValueError: none of the images can be read.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))
    readable = False
    for batch in evaluation_loader(images.choose(chosen), evaluation_transform(preprocessing), 32):
        if len(batch.labels):
            readable = True
            yield batch.images
    if not readable:
        raise GrkanValueError(f"--data {images.where} has no readable image")


class UnreadableImages:
    """The unreadable images found so far. Each is reported once, on standard error, or the first one stops the run.

    Args:
        on_corrupt: "skip" or "stop".
    """

    def __init__(self, on_corrupt: str = "skip") -> None:
        self.on_corrupt = on_corrupt
        self.names: set[str] = set()

    def add(self, batch: Batch) -> None:
        """Record the unreadable images of a batch.

        Raises:
            ValueError: there is one, and `on_corrupt` is "stop".
        """
        for name, reason in batch.unreadable.items():
            if self.on_corrupt == "stop":
                raise GrkanValueError(f"cannot read the image {name} ({reason}); on_corrupt is 'stop'")
            if name not in self.names:
                self.names.add(name)
                print(f"skipped an unreadable image: {name} ({reason})", file=sys.stderr, flush=True)
