"""Images in tar files with the layout of WebDataset: the files of a sample are adjacent and share their name up to the
first dot; `.cls` is the number of its class.

They are read by random access, through an index that is made once. So images are ordered as in any other data set, and
a resumed run continues exactly.
"""

import contextlib
import io
import os
import sys
import tarfile
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GrkanValueError
from ..writing import write_bytes
from .files import ImageFile

_INDEX = "grkan-index-{split}.npz"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_NO_INDEX = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""The errors that NumPy raises for a missing or damaged file."""
_THREADS = 8
"""The number of threads that read shards for the index; they mostly wait for the disk."""


class Shards(Sequence[ImageFile]):
    """The images of tar files.

    Args:
        folder: the folder of the tar files.
        index: see `_make_index`.
    """

    def __init__(self, folder: Path, index: dict[str, np.ndarray]) -> None:
        self.folder = folder
        self._names, self._shard, self._offset, self._size = (
            index[key] for key in ("names", "shard", "offset", "size")
        )

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: Any) -> Any:
        path = self.folder / str(self._names[self._shard[index]])
        offset, size = int(self._offset[index]), int(self._size[index])
        with open(path, "rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
            name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
            return ImageFile(file.read(size), f"{path}/{name}")


def check_local(folder: str) -> None:
    """Raise ValueError if `folder` is not a folder on a disk."""
    if "://" in folder or folder.startswith("pipe:"):
        raise GrkanValueError(
            f"--data wds:{folder}: remote shards have no random access, which an exact resume needs; copy them to a "
            "disk, and give the folder that holds train/*.tar and val/*.tar"
        )
    if not os.path.isdir(folder):
        raise GrkanValueError(f"--data wds:{folder}: there is no such folder; it must hold train/*.tar and val/*.tar")


def first_files(root: Path, splits: Sequence[str], is_image: Callable[[str], bool], count: int) -> Iterator[ImageFile]:
    """Yield the first images of a split, without an index. Stop at an error, which `load_shards` will report."""
    folder = next((root / name for name in splits if (root / name).is_dir()), root)
    for path in sorted(folder.glob("*.tar"))[:1]:
        with contextlib.suppress(GrkanValueError):
            for member, tar in islice(((m, t) for m, t in _members(path) if is_image(m.name)), count):
                if (file := tar.extractfile(member)) is not None:
                    yield ImageFile(file.read(), member.name)


def load_shards(
    root: Path, splits: Sequence[str], is_image: Callable[[str], bool], cache: Path | None
) -> tuple[Shards, np.ndarray, tuple[str, ...]]:
    """Return images, labels and class names of a split.

    Args:
        root: a folder with a subfolder of tar files for each split, and classes.txt with one class name per line.
            Without classes.txt the names are the numbers.
        splits: the names that the split's folder may have.
        is_image: returns whether a file of a given name is an image.
        cache: the folder for the index if it cannot be written beside the tar files; None: the index is not kept.

    Raises:
        ValueError: there are no such files, or they are compressed, damaged, or without labels.
    """
    folder = next((root / name for name in splits if (root / name).is_dir()), None)
    if folder is None:
        advice = " (use grkan train --val-split 0.1 to test on a part of train)" if (root / "train").is_dir() else ""
        raise GrkanValueError(f"{root} must hold a folder {' or '.join(splits)} of tar files; it has none{advice}")
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".tar", *_COMPRESSED)))
    if compressed := [path for path in files if path.suffix != ".tar"]:
        raise GrkanValueError(
            f"{compressed[0]} is compressed, so it has no random access, which an exact resume needs; unpack it "
            "to a .tar (the images in it are already compressed)"
        )
    if not files:
        raise GrkanValueError(f"{folder} holds no tar files (*.tar)")
    index = _find_index(folder, files, is_image, cache)
    classes, labels = _read_classes(root), index["label"].astype(np.int64)
    if classes is None:
        classes = tuple(str(number) for number in range(labels.max() + 1))
    if labels.max() >= len(classes):
        raise GrkanValueError(
            f"{root / 'classes.txt'} names {len(classes)} classes, but {folder} has class {labels.max()} (from 0)"
        )
    return Shards(folder, index), labels, classes


def _read_classes(root: Path) -> tuple[str, ...] | None:
    path = root / "classes.txt"
    if not path.exists():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").rstrip().split("\n"))
    except UnicodeDecodeError:
        raise GrkanValueError(f"{path} is not UTF-8") from None
    if wrong := [name for i, name in enumerate(names) if not name or name in names[:i]]:
        raise GrkanValueError(
            f"{path} must have one class name per line, without repeats or empty lines; got {wrong[0]!r}"
        )
    return names


def _find_index(
    folder: Path, files: Sequence[Path], is_image: Callable[[str], bool], cache: Path | None
) -> dict[str, np.ndarray]:
    """Read the index of exactly these files, or make it."""
    stats = [path.stat() for path in files]
    identity = {
        "names": np.array([path.name for path in files]),
        "bytes": np.array([stat.st_size for stat in stats]),
        "changed": np.array([stat.st_mtime_ns for stat in stats]),
    }
    name = _INDEX.format(split=folder.name)
    places = [folder / name] + ([] if cache is None else [cache / name])
    for place in places:
        with contextlib.suppress(*_NO_INDEX), np.load(place) as stored:
            index = {key: stored[key] for key in ("shard", "offset", "size", "label")}
            if all(np.array_equal(stored[key], value) for key, value in identity.items()):
                return {**identity, **index}
    print(f"indexing {len(files)} tar files in {folder}; this is done only once", file=sys.stderr, flush=True)
    index = {**identity, **_make_index(files, is_image)}
    content = io.BytesIO()
    np.savez(content, **index)
    for place in places:
        with contextlib.suppress(OSError):  # a folder that cannot be written
            if place.parent != folder:
                place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(place, content.getvalue())
            break
    return index


def _make_index(files: Sequence[Path], is_image: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Make the index: per image `shard`, the number of its tar file; `offset` and `size` in it, in bytes; `label`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda path: _read_shard(path, is_image), files))
    counts = [len(part[0]) for part in found]
    if not sum(counts):
        raise GrkanValueError(f"{files[0].parent}: its tar files hold no images")
    offset, size, label = (np.concatenate([np.asarray(part[k], np.int64) for part in found]) for k in range(3))
    shard = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    return {"shard": shard, "offset": offset, "size": size.astype(np.uint32), "label": label.astype(np.int32)}


def _read_shard(path: Path, is_image: Callable[[str], bool]) -> tuple[array, array, array]:
    """Return offsets, sizes and labels of the images in a tar file."""
    columns = array("q"), array("q"), array("q")
    key: str | None = None
    image: tuple[int, int] | None = None
    label: int | None = None

    def finish() -> None:
        if image is None and label is None:
            return
        if image is None or label is None:
            lacks = "image" if image is None else "class (a .cls file with its number)"
            raise GrkanValueError(f"{path}: the sample {key} has no {lacks}")
        for column, value in zip(columns, (*image, label), strict=True):
            column.append(value)

    for member, tar in _members(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if folder + slash + stem != key:
            finish()
            key, image, label = folder + slash + stem, None, None
        if ending == "cls":
            file = tar.extractfile(member)
            text = b"" if file is None else file.read(100)
            try:
                label = int(text)
            except ValueError:
                label = -1
            if label < 0:
                raise GrkanValueError(f"{path}: {member.name} must hold the number of a class, from 0; got {text!r}")
        elif is_image(base):
            image = member.offset_data, member.size
    finish()
    return columns


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the files in a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it would keep all of them
                if member.isfile():
                    yield member, tar
    except tarfile.TarError as error:
        raise GrkanValueError(f"{path} cannot be read as an uncompressed tar file: {error}") from None
