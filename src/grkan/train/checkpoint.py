"""Files of a run's folder: the state that it resumes from, and its metrics."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import GrkanValueError
from ..writing import naming, write_bytes

STATE_FORMAT = "grkan training state 3"


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
    except MemoryError:
        raise
    except Exception as error:  # zipfile, pickle and PyTorch have one of their own for each way a file can be broken
        raise GrkanValueError(
            f"{path} is damaged or no training state; a run of another --output starts afresh"
        ) from error
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
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
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
