"""The metrics of a run: sums over the steps of an epoch, and the lines of metrics.jsonl."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..writing import naming


@dataclasses.dataclass
class Running:
    """Sums over the steps of an epoch."""

    loss: float = 0.0
    correct: float | None = 0.0
    images: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: float | None, images: int) -> None:
        """Add the results of a step; `correct` is None if the labels are mixed."""
        self.loss += loss
        self.correct = None if correct is None or self.correct is None else self.correct + correct
        self.images += images

    def means(self) -> dict[str, float]:
        """Return the means for metrics.jsonl; the accuracy is in percent."""
        means = {"train_loss": self.loss / self.images}
        if self.correct is not None:
            means["train_top1"] = 100 * self.correct / self.images
        means["images_per_second"] = round(self.images / max(self.seconds, 1e-9), 1)
        return means


class MetricsLog:
    """metrics.jsonl: one JSON object per line.

    Args:
        path: the file.
        size: the number of bytes to truncate it to first: its size at the time of the state that a run resumes
            from. If the file is shorter, its complete lines stay.
    """

    def __init__(self, path: str | Path, size: int = 0) -> None:
        self.path = Path(path)
        with open(self.path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read(size).rfind(b"\n") + 1)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            ValueError: a number is not finite, which JSON cannot represent.
            OSError: the file cannot be written.
        """
        text = json.dumps(line, allow_nan=False) + "\n"
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(text)

    def size(self) -> int:
        """Return the number of bytes written so far."""
        return self.path.stat().st_size


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, up to the first one that an interruption cut off."""
    lines = []
    for text in Path(path).read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines
