"""Early termination of a run by SIGTERM, which clusters, containers and `kill` send to stop a process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType

SIGTERM_STATUS = 128 + signal.SIGTERM
"""The exit status that shells report for a process ended by SIGTERM."""


class TrainingStopped(SystemExit):
    """SIGTERM was received, and the state is saved. If uncaught, the program ends with status 143, without a traceback.

    Attributes:
        message: the progress of the run.
    """

    def __init__(self, message: str) -> None:
        super().__init__(SIGTERM_STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Notice:
    """Catches SIGTERM while its block runs; `given` says whether it was received.

    In Python only the main thread can handle signals. In any other thread, SIGTERM works as before.
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
            # None: the handler was not set from Python, and cannot be restored.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.given = True


def starter() -> BaseProcess:
    """Return the process that started this one by multiprocessing.

    With the start method "forkserver", `os.getppid` gives the process of multiprocessing's server instead, which lives
    as long as any of its processes.
    """
    process = multiprocessing.parent_process()
    assert process is not None
    return process


def when_starter_ends(act: Callable[[], None]) -> None:
    """Call `act` in a thread when the process that started this one has ended, even by SIGKILL."""
    process = starter()

    def wait() -> None:
        process.join()
        act()

    threading.Thread(target=wait, daemon=True).start()


def shield_loading_process(_: int = 0) -> None:
    """Let a loading process end on SIGTERM only if the training process sent it, and when the training process ends.

    A cluster sends SIGTERM to every process of a job, but the images of the last steps are still needed. Use this
    function as `worker_init_fn` of a DataLoader. Where the sender of a signal is unknown (macOS), SIGTERM works as
    before.
    """
    training = starter()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training.pid:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()
    when_starter_ends(lambda: os._exit(0))
