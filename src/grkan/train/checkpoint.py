"""Files of a run's folder, written so that an interruption or a full disk leaves the previous ones whole."""

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import GrkanValueError

STATE_FORMAT = "grkan training state 3"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError: the system does so where one is opened, but not where the disk is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_folder(path: str | Path | None) -> None:
    """Raise OSError if a file to be written lies in no folder, or is something else: known before the work."""
    if path is None:
        return
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if path.exists() and not path.is_file():  # a file would take the place of a device or a pipe
        kind = "folder" if path.is_dir() else "device or a pipe"
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, f"is a {kind}, not a file", str(path))


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name beside `path`, flush it to the disk, and rename it to `path`.

    Raises:
        OSError: the file, which is named, cannot be written; nothing is left of it, and an older one stays.
    """
    path = Path(path)
    check_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        with _naming(path):
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename, too, is to survive a power cut
    finally:
        os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote."""
    for temporary in folder.rglob(".*.[0-9]*.tmp*"):
        temporary.unlink()


def write_bytes(path: str | Path, content: bytes) -> None:
    """`write_file` for content that is at hand."""
    write_file(path, lambda temporary: temporary.write_bytes(content))


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()  # torch.save turns a full disk into a RuntimeError without the reason
    torch.save({"format": STATE_FORMAT, **state}, buffer)
    write_bytes(path, buffer.getvalue())


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing but tensors and plain values is unpickled.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or not a state of this format.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # zipfile, pickle and PyTorch have an error of their own for each way a file can be broken
        raise GrkanValueError(
            f"{path} is damaged or no training state; a run of another --output starts afresh"
        ) from None
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise GrkanValueError(f"{path} is no training state of this version of grkan")
    return state


class MetricsLog:
    """metrics.jsonl: one JSON object a line.

    Args:
        path: the file.
        size: cut it to so many bytes first: to what it held when the state was saved that a run resumes from. Of a file
            that has lost some since, the whole lines stay.
    """

    def __init__(self, path: str | Path, size: int = 0) -> None:
        self.path = Path(path)
        with open(self.path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read(size).rfind(b"\n") + 1)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            ValueError: a number is not finite, which JSON cannot say.
            OSError: the file cannot be written.
        """
        text = json.dumps(line, allow_nan=False) + "\n"
        with _naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(text)

    def size(self) -> int:
        """The bytes written so far."""
        return self.path.stat().st_size


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut by an interruption is left out."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
