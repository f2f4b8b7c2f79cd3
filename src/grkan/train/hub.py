"""Data sets of Hugging Face's library `datasets`: names on the hub, and folders of Parquet or Arrow files.

The library stores the data as Arrow files in its cache (HF_HOME). They are mapped into memory, so the processes of a
machine share them and nothing is copied.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GrkanValueError
from .files import ImageFile


class HubImages(Sequence[ImageFile]):
    """The images of one split.

    Args:
        name: the name of the data set, or its folder.
        split: the name of the split.
        column: the name of the images' column.
    """

    def __init__(self, name: str, split: str, column: str) -> None:
        import datasets

        self.name, self.split, self.column = name, split, column
        rows = _load(name)[split].select_columns([column])
        self._rows = rows.cast_column(column, datasets.Image(decode=False))

    def __reduce__(self) -> Any:
        """Pickle only the names: another process opens the same files, or its own copy on another machine."""
        return HubImages, (self.name, self.split, self.column)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        stored = self._rows[int(index)][self.column]
        if stored["bytes"] is None:
            return Path(stored["path"])
        name = Path(stored["path"]).name if stored["path"] else f"image {index}"
        return ImageFile(stored["bytes"], f"{self.name}, {self.split}: {name}")


def hub_splits(name: str) -> list[str]:
    """Return the names of the splits that a data set has; `name` as for `load_hub`."""
    return list(_load(name))


def load_hub(name: str, splits: Sequence[str]) -> tuple[HubImages, np.ndarray, tuple[str, ...]]:
    """Return images, labels and class names of a split.

    The images are the first column of images. The labels are the first column of classes, or else the column `label`
    with numbers or strings.

    Args:
        name: the name of the data set on the hub, or a folder of Parquet files or one saved by `save_to_disk`.
        splits: the names that the split may have.

    Raises:
        ValueError: there is no such data set or split, or it has no images or no labels.
    """
    import datasets

    loaded = _load(name)
    split = next((split for split in splits if split in loaded), None)
    if split is None:
        advice = " (use grkan train --val-split 0.1 to test on a part of train)" if "train" in loaded else ""
        raise GrkanValueError(
            f"--data hfds:{name} has no split {' or '.join(splits)}; it has {', '.join(loaded)}{advice}"
        )
    rows = loaded[split]
    columns = {kind: [key for key, feature in rows.features.items() if isinstance(feature, kind)]
               for kind in (datasets.Image, datasets.ClassLabel)}  # fmt: skip
    image, label = (
        columns[datasets.Image],
        columns[datasets.ClassLabel] or [k for k in ("label",) if k in rows.features],
    )
    if not image or not label:
        raise GrkanValueError(
            f"--data hfds:{name} must have a column of images, and one of classes or one named `label`; it has "
            f"{', '.join(rows.features)}"
        )
    values = rows.with_format("numpy")[label[0]]
    values = np.asarray(values)
    if columns[datasets.ClassLabel]:
        classes = tuple(rows.features[label[0]].names)
        labels = values.astype(np.int64)
    else:
        known, labels = np.unique(values, return_inverse=True)
        classes = tuple(str(value) for value in known)
    if len(labels) and labels.min() < 0:
        raise GrkanValueError(f"--data hfds:{name}: the split {split} has images without a class")
    return HubImages(name, split, image[0]), labels, classes


def _load(name: str) -> Any:
    """Load all splits, by name."""
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name)
    except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow all have their own errors
        if isinstance(error, (ImportError, MemoryError)):
            raise
        reason = " ".join(str(error).split())
        raise GrkanValueError(f"--data hfds:{name} cannot be read: {reason or type(error).__name__}") from error
