"""The state that a run resumes from, and the lock on the folder that holds it."""

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
    """A run between two steps."""

    fingerprint: dict[str, Any]
    """What decides the outcome: settings and sizes of the data."""
    epoch: int
    step: int
    parts: str | None
    """The folder, beside this file, of what each process wrote of a sharded model in place of the next three."""
    model: Any
    """A state dict, as the next two are."""
    ema: Any
    optimizer: Any
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


class RunLock:
    """Keeps a run's folder for one process, until `release` or the end of the process, however it ends.

    It is a lock of POSIX: a forked child does not hold it, and network file systems know it. But a process that opens
    the file of its lock a second time, and closes it, has lost the lock. Where a file system has no locks, nothing is
    kept.

    Args:
        folder: the run's; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "state" / "lock"
        self._descriptor: int | None = None
        self._owner = b""

    def acquire(self) -> bytes:
        """Lock the folder; acquiring twice changes nothing.

        Returns:
            What the file of the lock holds: who has it.

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
                    f"another run is at work in {self.folder}{f': {owner}' if owner else ''}; wait for its end, or "
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
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
