"""Images and labels, and where they come from.

A data set is a list of images with a class each, whatever it was read from; `images.py` opens a file.
"""

import contextlib
import gzip
import math
import os
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST

from ..errors import GrkanValueError
from .config import nearest
from .files import Chosen, ImageFile, Paths
from .hub import hub_splits, load_hub
from .images import UnreadableImageError, image_size, is_image_name, open_image
from .randomness import derive_seed
from .shards import check_local, first_files, load_shards

TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("val", "validation", "test", "testing")
_SPLITS = {"train": TRAIN_SPLITS, "test": TEST_SPLITS}
_PREFIXES = ("fashion-mnist", "wds", "hfds")
"""The names that may be followed by a colon and a folder."""
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files."""

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SMALL = 64
"""For images whose longer side has at most this many pixels, the usual augmentation of photographs is harmful."""
_MODELS = ((8, "kat_micro_patch2_8"), (28, "kat_micro_patch4_28"), (_SMALL, "kat_micro_patch4_32"))
"""The default model for images up to a size."""
_LOOKED_AT = 16
"""How many images of a folder are checked for their size, to guess their kind."""
_MEASURED = 60_000
"""The most images whose gray values are averaged: all of Fashion-MNIST."""
_AGAIN = "folders reached a second time, through a link"


@dataclass
class ImageData:
    """Labelled images.

    `images` are files on a disk or in memory, or an array [N, H, W] of uint8 gray values; `labels` are indices of
    `classes`.
    """

    images: Sequence[Path | ImageFile] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    where: str | None = None
    """The name of the data set in a report; None: there is nothing to report."""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """How many entries of a folder were skipped, by reason."""

    def __post_init__(self) -> None:
        if isinstance(self.images, list) and all(isinstance(image, Path) for image in self.images):
            self.images = Paths.of(self.images)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        image = self.images[index]
        if isinstance(image, ImageFile):
            return image.name
        return str(image) if isinstance(image, Path) else f"image {index}"

    def open(self, index: int) -> Image.Image:
        """Open an image in mode L or RGB."""
        image = self.images[index]
        return Image.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)

    def choose(self, indices: np.ndarray) -> "ImageData":
        """Return some of the images, in the order of the indices."""
        images = self.images[indices] if isinstance(self.images, np.ndarray) else Chosen(self.images, indices)
        return replace(self, images=images, labels=self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set that `--data` names, with its defaults for settings that the configuration leaves open."""

    load: Callable[[str], ImageData]
    """Loads a split by its name, "train" or "test"."""
    shift: int | None
    hflip: float
    color_jitter: float
    workers: int
    normalisation: Callable[[ImageData], tuple[float, float]] | None
    """Computes mean and standard deviation of the training images' gray values, in [0, 1]; None: use the model's."""
    model: str = "kat_micro_patch2_8"
    kind: str | None = None
    """The kind of images that these defaults were chosen for."""
    load_split: Callable[[str], ImageData] | None = None
    """Loads any split of the data set by its name; None: there are only train and test."""


def find_source(data: str, val_split: float | None = None, seed: int = 0, keep: Path | None = None) -> Source:
    """Return the data set that `--data` names. Only a few files are read now; the rest is read by its `load`.

    Args:
        data: as in `Config`.
        val_split, seed: the part of each class to keep for the test, and the seed that selects the images, for
            data without test images.
        keep: a folder for an index if it cannot be written beside the data; None: the index is then not kept.

    Raises:
        ValueError: data is neither a known name nor a folder, or val_split is given although there are test images
            (`load`, too, may raise this).
    """
    name, colon, folder = data.partition(":")
    fashion = name == "fashion-mnist" and bool(colon) == bool(folder)
    if val_split is not None and (data == "digits" or fashion):
        raise _has_test_images(data, "some")
    if data == "digits":
        return Source(_load_digits, shift=1, hflip=0.0, color_jitter=0.0, workers=0, normalisation=_digits_statistics)
    if fashion:
        return Source(
            lambda split: _load_fashion_mnist(Path(folder) if folder else None, split),
            shift=2,
            hflip=0.5,
            color_jitter=0.0,
            workers=0,
            normalisation=gray_statistics,
            model="kat_micro_patch4_28",
        )
    if name in ("wds", "hfds") and folder:
        return _find_shards(folder, val_split, seed, keep) if name == "wds" else _find_on_hub(folder, val_split, seed)
    if not os.path.isdir(data):
        raise GrkanValueError(
            "--data must be digits, fashion-mnist, fashion-mnist:FOLDER, a folder of images, wds:FOLDER or hfds:NAME; "
            f"got {data!r}"
        )
    return _find_folder(Path(data), val_split, seed)


def _find_folder(root: Path, val_split: float | None, seed: int) -> Source:
    read = cache(_read_classes)
    train, test = (_first_folder(root, names) for names in (TRAIN_SPLITS, TEST_SPLITS))

    def load_split(name: str) -> ImageData:
        if not (root / name).is_dir() or name.startswith("."):
            splits = [entry.name for entry in _listed(root) if _kind(entry) == "folder"]
            raise GrkanValueError(f"{root} has no folder {name!r}; {nearest(name, splits)}")
        return read(root / name)

    def load(split: str) -> ImageData:
        return _load_folder(root, train, test, split, read)

    def load_whole() -> ImageData:
        return _with_all_classes(read(train or root))

    first = _first_images(train or root)
    if val_split is None:
        return _suiting(first, load, load_split)
    own = None if test is None else test.name
    return _suiting(first, *_splitting(load_whole, load_split, lambda: own, str(root), val_split, seed))


def _find_shards(folder: str, val_split: float | None, seed: int, keep: Path | None) -> Source:
    check_local(folder)
    root = Path(folder)

    def load_split(*names: str) -> ImageData:
        shards, labels, classes = load_shards(root, names, is_image_name, keep)
        return ImageData(shards, labels, classes, str(shards.folder))

    def load(split: str) -> ImageData:
        return load_split(*_SPLITS[split])

    first = first_files(root, TRAIN_SPLITS, is_image_name, _LOOKED_AT)
    if val_split is None:
        return _suiting(first, load, load_split)
    test = _first_folder(root, TEST_SPLITS)
    own = None if test is None else test.name
    return _suiting(
        first, *_splitting(lambda: load("train"), load_split, lambda: own, f"wds:{folder}", val_split, seed)
    )


def _find_on_hub(name: str, val_split: float | None, seed: int) -> Source:
    read = cache(load_hub)

    def load_split(*names: str) -> ImageData:
        images, labels, classes = read(name, names)
        return ImageData(images, labels, classes, f"{name}, {images.split}")

    def load(split: str) -> ImageData:
        return load_split(*_SPLITS[split])

    def first() -> Iterator[Path | ImageFile]:
        images, _, _ = read(name, TRAIN_SPLITS)
        yield from (images[i] for i in range(0, len(images), max(1, len(images) // _LOOKED_AT)))

    def own() -> str | None:
        return next((split for split in hub_splits(name) if split in TEST_SPLITS), None)

    if val_split is None:
        return _suiting(first(), load, load_split)
    return _suiting(first(), *_splitting(lambda: load("train"), load_split, own, f"hfds:{name}", val_split, seed))


def _splitting(
    whole: Callable[[], ImageData],
    load_split: Callable[[str], ImageData],
    own: Callable[[], str | None],
    name: str,
    val_split: float,
    seed: int,
) -> tuple[Callable[[str], ImageData], Callable[[str], ImageData]]:
    """Return `load` and `load_split` of a `Source` whose test images are a part of the training images of each class.

    Args:
        whole: loads all training images.
        load_split: loads any other split.
        own: returns the name of the data's own test split, which it must not have, or None.
        name: the name of the data in messages.
        val_split, seed: as for `find_source`.
    """

    def load(split: str) -> ImageData:
        if (test := own()) is not None:
            raise _has_test_images(name, test)
        data = whole()
        chosen = _stratified(data, val_split, seed)
        part = data.choose(np.flatnonzero(chosen == (split == "test")))
        if split != "test":
            return part
        return replace(part, where=f"{val_split:.3g} of each class of {data.where}, by seed {seed}", passed_over={})

    def load_named(split: str) -> ImageData:
        if split in (*TRAIN_SPLITS, *TEST_SPLITS):
            return load("train" if split in TRAIN_SPLITS else "test")
        return load_split(split)

    return load, load_named


def _has_test_images(name: str, own: str) -> GrkanValueError:
    return GrkanValueError(f"val_split is only for data without test images; {name} has {own}")


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _suiting(
    first: Iterable[Path | ImageFile], load: Callable[[str], ImageData], load_split: Callable[[str], ImageData]
) -> Source:
    """Return a source of image files, with defaults based on the size of a few of them."""
    size = _typical_size(first)
    side = None if size is None else max(size)
    workers = min(8, os.cpu_count() or 1)
    about = "" if size is None else f", of about {size[0]} x {size[1]} pixels"
    if side is not None and side <= _SMALL:
        return Source(
            load,
            shift=max(1, round(side / 12)),
            hflip=0.0,
            color_jitter=0.0,
            workers=workers,
            normalisation=gray_statistics,
            model=next(name for limit, name in _MODELS if side <= limit),
            kind=f"small images{about}",
            load_split=load_split,
        )
    return Source(
        load,
        shift=None,
        hflip=0.5,
        color_jitter=0.4,
        workers=workers,
        normalisation=None,
        model="kat_tiny_patch16_224",
        kind=f"photographs{about}",
        load_split=load_split,
    )


def absolute(data: str) -> str:
    """Return `--data` in a form that is valid in any working directory."""
    name, _, folder = data.partition(":")
    if data == "digits" or (name == "fashion-mnist" and not folder) or (name == "hfds" and not os.path.isdir(folder)):
        return data
    return f"{name}:{os.path.abspath(folder)}" if name in _PREFIXES else os.path.abspath(data)


def _load_digits(split: str) -> ImageData:
    """Load scikit-learn's 1797 digits of 8x8 pixels; every fifth image of each class, in order, is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    chosen = (rank % 5 == 4) if split == "test" else (rank % 5 != 4)
    return ImageData(pixels[chosen], labels[chosen], tuple("0123456789"))


def _load_fashion_mnist(folder: Path | None, split: str) -> ImageData:
    """Load the 60,000 training or 10,000 test images of 28x28 pixels (Xiao et al., arXiv 1708.07747)."""
    if folder is None:
        folder = DEBIAN_FASHION_MNIST if DEBIAN_FASHION_MNIST.is_dir() else _download_fashion_mnist()
    stem = "train" if split == "train" else "t10k"
    pixels = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(pixels) != len(labels):
        raise GrkanValueError(f"{folder}: {len(pixels)} {split} images, but {len(labels)} labels")
    if len(labels) and labels.max() > 9:
        raise GrkanValueError(f"{folder}: labels must lie in 0..9; got {labels.max()}")
    return ImageData(pixels, labels.astype(np.int64), _FASHION_CLASSES)


def _download_fashion_mnist() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grkan"
    try:
        return Path(FashionMNIST(str(cache), download=True).raw_folder)
    except (OSError, RuntimeError) as error:
        raise GrkanValueError(
            f"Fashion-MNIST is not in {DEBIAN_FASHION_MNIST}, and its download failed ({error}); "
            "install Debian's dataset-fashion-mnist or give the folder of its files: --data fashion-mnist:FOLDER"
        ) from None


def _read_idx(folder: Path, name: str, dims: int) -> np.ndarray:
    """Read a uint8 array from an IDX file, compressed or not: big-endian magic 0x0000080D, D sizes, the values."""
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.gz"
        if not path.is_file():
            raise GrkanValueError(f"{folder} holds neither {name} nor {name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError):
        raise GrkanValueError(f"{path} is damaged") from None
    header = 4 * (dims + 1)
    if len(content) < header:
        raise GrkanValueError(f"{path} is not an IDX file of {dims} dimensions")
    magic, *sizes = struct.unpack(f">{dims + 1}I", content[:header])
    if magic != 0x0800 + dims:
        raise GrkanValueError(f"{path} is not an IDX file of bytes with {dims} dimensions")
    if len(content) != header + math.prod(sizes):
        raise GrkanValueError(
            f"{path} is damaged: it has {len(content)} bytes, but its header says {header + math.prod(sizes)}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes)


def _load_folder(
    root: Path, train: Path | None, test: Path | None, split: str, read: Callable[[Path], ImageData]
) -> ImageData:
    """Load FOLDER/train/CLASS/IMAGE or FOLDER/val/CLASS/IMAGE; for the test, FOLDER may also be a folder of classes."""
    folder = train if split == "train" else test
    if folder is None and split == "train":
        raise GrkanValueError(
            f"{root} must hold a folder {' or '.join(TRAIN_SPLITS)} with a folder for each class; it has none (if "
            "it holds the class folders itself, use grkan train --val-split 0.1)"
        )
    if folder is None and train is not None:
        raise GrkanValueError(
            f"{root} must hold a folder {' or '.join(TEST_SPLITS)} with a folder for each class; it has none (use "
            f"grkan train --val-split 0.1 to test on a part of {train.name})"
        )
    data = read(folder or root)
    return _with_all_classes(data) if split == "train" else data


def _with_all_classes(data: ImageData) -> ImageData:
    """Return the data if every class has an image, else raise ValueError."""
    if empty := sorted({*range(len(data.classes))} - {*np.unique(data.labels).tolist()}):
        raise GrkanValueError(
            f"{data.where} has no image of {', '.join(data.classes[label] for label in empty[:5])}"
            f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}{tell_passed_over(data.passed_over)}"
        )
    return data


def _stratified(data: ImageData, part: float, seed: int) -> np.ndarray:
    """Choose the test images: at least one, and never all, of each class with two or more."""
    chosen = np.zeros(len(data), dtype=bool)
    for label, name in enumerate(data.classes):
        own = np.flatnonzero(data.labels == label)
        count = min(max(round(part * len(own)), 1), len(own) - 1)
        order = np.random.default_rng(derive_seed("val_split", seed, name)).permutation(own)
        chosen[order[:count]] = True
    return chosen


def _read_classes(folder: Path) -> ImageData:
    """Read FOLDER/CLASS/.../IMAGE: the classes in the order of their names, and the images in each."""
    passed_over: Counter[str] = Counter()
    above = {_identity(parent) for parent in (folder, *folder.resolve().parents)}
    classes, labels = [], array("q")
    for entry in _listed(folder):
        kind = _kind(entry)
        if kind != "folder":
            passed_over["beside the class folders" if kind == "file" else kind] += 1
        elif _identity(folder / entry.name) in above:
            passed_over[_AGAIN] += 1
        else:
            classes.append(entry.name)
    if not classes:
        raise GrkanValueError(f"{folder} must hold a folder for each class; it has none")

    def found() -> Iterator[str]:
        for label, name in enumerate(classes):
            for path in _images_below(folder, name, set(above), passed_over):
                labels.append(label)
                yield path

    files = Paths(folder, found())
    data = ImageData(files, np.frombuffer(labels, dtype=np.int64), tuple(classes), str(folder), passed_over)
    if not len(data):
        raise GrkanValueError(
            f"{folder} has no images in its {len(classes)} class folders{tell_passed_over(data.passed_over)}"
        )
    return data


def images_below(folder: str, passed_over: Counter[str]) -> Iterator[str]:
    """Yield the paths of the images in a folder and its subfolders; count all other entries in `passed_over`."""
    for path in _images_below(Path(folder), "", set(), passed_over):
        yield os.path.join(folder, path)


def _images_below(root: Path, folder: str, seen: set[tuple[int, int]], passed_over: Counter[str]) -> Iterator[str]:
    """Yield the paths, relative to `root`, of the images in a folder and its subfolders, each folder once."""
    try:
        identity, entries = _identity(root / folder), _listed(root / folder)
    except OSError as error:
        passed_over[f"folders that cannot be read ({error.strerror})"] += 1
        return
    if identity in seen:
        passed_over[_AGAIN] += 1
        return
    seen.add(identity)
    below = []
    for entry in entries:
        kind = _kind(entry)
        if kind == "folder":
            below.append(entry.name)
        elif kind != "file":
            passed_over[kind] += 1
        elif not is_image_name(entry.name):
            passed_over[
                f"*{os.path.splitext(entry.name)[1].lower()}" if "." in entry.name else "without an extension"
            ] += 1
        else:
            yield os.path.join(folder, entry.name)
    for name in below:
        yield from _images_below(root, os.path.join(folder, name), seen, passed_over)


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "folder" or "file", with links followed, or else the reason why the entry is skipped."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken links" if entry.is_symlink() else "pipes or devices"
    except OSError:  # a link to itself
        return "broken links"


def _identity(folder: Path) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder, in the order of their names."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _first_images(folder: Path) -> Iterator[Path]:
    """Yield a few images of different classes."""
    classes = [entry.name for entry in _listed(folder) if _kind(entry) == "folder"]
    for name in classes[:: max(1, len(classes) // _LOOKED_AT)][:_LOOKED_AT]:
        for path in islice(_images_below(folder, name, set(), Counter()), -(-_LOOKED_AT // len(classes))):
            yield folder / path


def _typical_size(files: Iterable[Path | ImageFile]) -> tuple[int, int] | None:
    """Return width and height of the image with the median longer side."""
    sizes = []
    for file in files:
        with contextlib.suppress(UnreadableImageError):
            sizes.append(image_size(file))
    return sorted(sizes, key=max)[len(sizes) // 2] if sizes else None


def describe(data: ImageData) -> str:
    """Describe the data in a line: the number of images and classes, classes without images, and skipped entries."""
    counts = np.bincount(data.labels, minlength=len(data.classes))
    lacking = [name for name, count in zip(data.classes, counts, strict=True) if not count]
    line = f"{data.where}: {len(data):,} images of {len(data.classes) - len(lacking)} classes"
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        line += f", none of {', '.join(map(repr, lacking[:5]))}{more}"
    return line + tell_passed_over(data.passed_over)


def tell_passed_over(passed_over: Mapping[str, int]) -> str:
    """Return the end of a report: the skipped entries, or nothing if there are none."""
    told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(passed_over.items()))
    return f"; skipped: {told}" if told else ""


def gray_statistics(data: ImageData) -> tuple[float, float]:
    """Return mean and standard deviation of the gray values, in [0, 1], to four digits: of all images or every n-th.

    Raises:
        ValueError: no image can be read.
    """
    counts = np.zeros(256, dtype=np.int64)
    for index in range(0, len(data), -(-len(data) // _MEASURED) or 1):
        with contextlib.suppress(UnreadableImageError):
            counts += _histogram(data, index)
    if not (total := counts.sum()):
        raise GrkanValueError(f"none of the {len(data)} training images of {data.where} can be read")
    values = np.arange(256) / 255
    mean = float(counts @ values / total)
    deviation = math.sqrt(float(counts @ (values - mean) ** 2 / total))
    return round(mean, 4), round(deviation, 4) or 1.0  # 0 if all pixels have the same gray


def _histogram(data: ImageData, index: int) -> np.ndarray:
    if isinstance(data.images, np.ndarray):
        return np.bincount(data.images[index].ravel(), minlength=256)
    return np.array(data.open(index).convert("L").histogram())


def _digits_statistics(_: ImageData) -> tuple[float, float]:
    return 0.3053, 0.3761


def match_classes(data: ImageData, classes: Sequence[str]) -> ImageData:
    """Return the same images with indices of a model's classes as labels.

    Raises:
        ValueError: the data has a class that the model does not know.
    """
    unknown = [name for name in data.classes if name not in classes]
    if unknown:
        raise GrkanValueError(
            f"the model has no class {unknown[0]!r} (unknown classes: {len(unknown)}); {nearest(unknown[0], classes)}"
        )
    position = np.array([list(classes).index(name) for name in data.classes], dtype=np.int64)
    return replace(data, labels=position[data.labels], classes=tuple(classes))
