"""Lists of images that stay small with a million entries, whatever they are read from.

A list of a million paths takes 440 MB, and 380 more in each process that loads images: Python writes a reference count
into every object that it accesses, so a forked process copies them all. Arrays have no such counts per item.
"""

import io
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np


class Paths(Sequence[Path]):
    """Paths below a folder, stored in two arrays: their characters, and where each path ends.

    Args:
        root: the folder.
        names: the names of the files, relative to the folder; read once.
    """

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        text, ends = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self.root = root
        self._text, self._ends = np.array(text, np.uint8), np.array(ends, np.min_scalar_type(len(text)))

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "Paths":
        """Return the same paths, relative to their common folder."""
        common = os.path.commonpath([path.parent for path in (min(paths), max(paths))]) if paths else ""
        return cls(Path(common), (os.path.relpath(path, common or ".") for path in paths))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Paths(self.root, (self._name(i) for i in range(len(self))[index]))
        return self.root / self._name(range(len(self))[index])

    def _name(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._text[start : int(self._ends[index])].tobytes())


class Chosen(Sequence[Any]):
    """Some items of a sequence, without a copy.

    Args:
        items: the sequence.
        indices: [n] integers.
    """

    def __init__(self, items: Sequence[Any], indices: np.ndarray) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Chosen(self.items, self.indices[index])
        return self.items[int(self.indices[index])]


class ImageFile(io.BytesIO):
    """An image file in memory.

    Args:
        content: the content of the file.
        name: its name in messages.
    """

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name
