"""What a run measures: sums over the steps of an epoch, and the lines of metrics.jsonl."""

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
        """After a step; `correct` is None where the labels are mixed."""
        self.loss += loss
        self.correct = None if correct is None or self.correct is None else self.correct + correct
        self.images += images

    def means(self) -> dict[str, float]:
        """What metrics.jsonl says of them; the accuracy in percent."""
        means = {"train_loss": self.loss / self.images}
        if self.correct is not None:
            means["train_top1"] = 100 * self.correct / self.images
        means["images_per_second"] = round(self.images / max(self.seconds, 1e-9), 1)
        return means


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
    """The lines of metrics.jsonl, up to one that an interruption has cut."""
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
