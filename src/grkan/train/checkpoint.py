"""The state that a run resumes from."""

import io
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from ..errors import GrkanValueError
from ..models.metadata import Preprocessing
from ..writing import write_bytes

STATE_FORMAT = "grkan training state 4"


class State(TypedDict):
    """A run between two steps."""

    fingerprint: dict[str, Any]
    """What decides the outcome: settings and sizes of the data."""
    epoch: int
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    preprocessing: Preprocessing
    conversion: dict[str, Any] | None
    """The recipe of `grkan.convert_`, if the run began with a converted model."""
    new_head: bool
    """Whether the run began with outputs that had learned nothing."""
    best: dict[str, Any]
    last: dict[str, Any]
    running: dict[str, Any]
    unreadable: list[str]
    seconds: float
    cpu_seconds: float
    metrics_size: int
    """Of metrics.jsonl, in bytes."""


def save_state(path: str | Path, state: State) -> None:
    """Write tensors and plain values.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()  # torch.save turns a full disk into a RuntimeError without the reason
    torch.save({"format": STATE_FORMAT, **state}, buffer)
    write_bytes(path, buffer.getvalue())


def load_state(path: str | Path) -> State:
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
    if missing := State.__annotations__.keys() - state.keys():
        raise GrkanValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return cast(State, state)
