"""The state that a run resumes from, and the lock on its folder."""

import errno
import io
import os
import secrets
import socket
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from ..errors import GrkanRuntimeError, GrkanValueError
from ..models.metadata import Preprocessing
from ..writing import write_bytes

STATE_FORMAT = "grkan training state 4"


class State(TypedDict):
    """The state of a run between two steps."""

    fingerprint: dict[str, Any]
    """Everything that decides the outcome: settings and sizes of the data."""
    epoch: int
    step: int
    parts: str | None
    """For a sharded model: the folder beside this file with each process's part. It replaces the next three."""
    model: Any
    """A state dict, like the next two."""
    ema: Any
    optimizer: Any
    scaler: dict[str, Any] | None
    preprocessing: Preprocessing
    conversion: dict[str, Any] | None
    """The recipe of `grkan.convert_`, if the run began with a converted model."""
    new_head: bool
    """Whether the run began with untrained outputs."""
    best: dict[str, Any]
    last: dict[str, Any]
    running: dict[str, Any]
    unreadable: list[str]
    seconds: float
    cpu_seconds: float
    metrics_size: int
    """The size of metrics.jsonl, in bytes."""


def save_state(path: str | Path, state: State) -> None:
    """Write a state, which holds tensors and plain values.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()  # torch.save turns a full disk into a RuntimeError without the reason
    torch.save({"format": STATE_FORMAT, **state}, buffer)
    write_bytes(path, buffer.getvalue())


def load_state(path: str | Path) -> State:
    """Read a state that `save_state` wrote; only tensors and plain values are unpickled.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or not a state of this format.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # zipfile, pickle and PyTorch raise different errors for different kinds of damage
        raise GrkanValueError(
            f"{path} is damaged, or not a training state; choose another --output to start again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise GrkanValueError(f"{path} is not a training state of this version of grkan")
    if missing := State.__annotations__.keys() - state.keys():
        raise GrkanValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return cast(State, state)


class RunLock:
    """A lock that reserves a run's folder for one process, until `release` or the end of the process.

    It is a POSIX lock: a forked child does not hold it, and network file systems support it. But a process that opens
    and closes its lock file a second time loses the lock. On a file system without locks it has no effect.

    Args:
        folder: the folder of the run; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "state" / "lock"
        self._descriptor: int | None = None
        self._owner = b""

    def acquire(self) -> bytes:
        """Lock the folder; acquiring twice has no further effect.

        Returns:
            The content of the lock file, which names the holder.

        Raises:
            RuntimeError: another process has the lock.
            OSError: the folder or the file cannot be written.
        """
        import fcntl  # POSIX's

        if self._descriptor is not None:
            return self._owner
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace").rpartition(" ")[0]
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise GrkanRuntimeError(
                    f"another run is using {self.folder}{f': {owner}' if owner else ''}; wait until it ends, or "
                    "choose another --output"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        self._owner = f"process {os.getpid()} on {socket.gethostname()} {secrets.token_hex(8)}".encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self._owner, 0)
        os.fsync(descriptor)  # for the other nodes
        return self._owner

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
