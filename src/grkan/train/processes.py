"""Communication between the processes of a run."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..errors import GrkanRuntimeError, GrkanValueError

_T = TypeVar("_T")

_PATIENCE = 5.0
"""Seconds to wait for a file that another node has written: network file systems cache that a file is missing."""


class TrainingError(GrkanRuntimeError):
    """A run cannot continue."""


class Later:
    """Numbers summed over all processes asynchronously: only `get` waits for them.

    Args:
        values: the values of this process [n], on the device of the process group; they are changed.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._work, self._copied = values, None, None
        if PartialState().num_processes > 1:
            self._work = dist.all_reduce(values, async_op=True)
        if values.device.type != "cpu":
            if self._work is not None:
                self._work.wait()  # the device waits, not this process
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.Event(values.device)
            self._copied.record()

    def get(self) -> list[float]:
        """Return the sums."""
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        return self._values.tolist()


def from_main(make: Callable[[], _T]) -> _T:
    """Return to all processes what `make` returns in the main process.

    Raises:
        TrainingError: `make` failed in the main process, which itself raises the error of `make`.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    message: list[Any] = [None, None]
    try:
        if state.is_main_process:
            message = [True, make()]
    finally:
        broadcast_object_list(message)
    if not message[0]:
        raise TrainingError("another process of this run has failed")
    return message[1]


def check_shared(path: Path, content: bytes) -> None:
    """Raise ValueError, in all processes, if one of them does not see the file that the main process has written.

    Args:
        path: the path of the file, in the subfolder `state` of the run's folder.
        content: the content of the file.
    """
    # The main process has a lock on the file, which it would lose by reading it.
    seen, deadline = PartialState().is_main_process, time.monotonic() + _PATIENCE
    while not seen and time.monotonic() < deadline:
        seen = path.is_file() and path.read_bytes() == content
        if not seen:
            time.sleep(0.2)
    check_all_see(path.parent.parent, seen)


def check_all_see(folder: Path, seen: bool) -> None:
    """Raise ValueError, in all processes, if some of them have `seen` a file in the run's folder and others not."""
    if PartialState().num_processes == 1:
        return
    sight = gather_object([(seen, socket.gethostname())])
    blind = next((rank for rank, (seen, _) in enumerate(sight) if not seen), None)
    sees = next((rank for rank, (seen, _) in enumerate(sight) if seen), None)
    if blind is not None and sees is not None:
        raise GrkanValueError(
            f"the run's folder {folder} must be shared by all nodes, because each process resumes from the state in "
            f"it; process {blind} on {sight[blind][1]} does not see the files that process {sees} on {sight[sees][1]} "
            "sees; choose an --output on a shared file system"
        )
