"""How a run ends before its end: SIGTERM, by which clusters, containers and `kill` tell a process to go."""

import os
import signal
import threading
from types import FrameType, TracebackType

SIGTERM_STATUS = 128 + signal.SIGTERM
"""The exit status that shells give a process that SIGTERM has ended."""


class TrainingStopped(SystemExit):
    """SIGTERM came, and the state is saved. A program that does not catch it ends with status 143, without a traceback.

    Attributes:
        message: where the run stands.
    """

    def __init__(self, message: str) -> None:
        super().__init__(SIGTERM_STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Notice:
    """Takes SIGTERM while its block runs; `given` says whether it came.

    Python lets the main thread alone take signals: in any other one, SIGTERM does what it did before.
    """

    def __init__(self) -> None:
        self.given = False
        self._takes = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Notice":
        if self._takes:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._takes:
            # None: the handler was not Python's, and cannot be put back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.given = True


def shield_loading_process(_: int = 0) -> None:
    """Let SIGTERM end a process that loads images only if the training process has sent it.

    A cluster sends it to every process of a job, but the images of the last steps are still needed. For the
    `worker_init_fn` of a DataLoader. Where a signal does not tell its sender (macOS), nothing changes.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
