"""Progress of a run, shown by the main process: a bar on a terminal, or else a short line per epoch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# A pipe has no width; 80 columns would break the paths at the end.
_WIDTH_WITHOUT_TERMINAL = 200
_WIDTH_OF_A_BAR = 100
"""The columns that a terminal needs for a bar beside the figures."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error to the caller; rich would end the process."""
        raise


def make_console(stderr: bool = False) -> Console:
    """Make a console that never breaks lines in a file or a pipe, and prints file names unchanged."""
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    console = _Console(**plain)
    if not console.is_terminal:
        console = _Console(**plain, width=_WIDTH_WITHOUT_TERMINAL)
    return console


class Reporter:
    """The progress of a training run.

    Args:
        speaks: False in all processes but the main one.
        steps: the optimiser steps of the whole run.
        done: the steps that were done before it was resumed.
    """

    def __init__(self, speaks: bool, steps: int, done: int = 0) -> None:
        self.speaks = speaks
        self.console = make_console()
        is_wide = self.console.width >= _WIDTH_OF_A_BAR  # if there is no room, only the figures are shown
        columns = [
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=None)] if is_wide else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            *([TimeElapsedColumn()] if is_wide else []),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(
            *columns,
            console=self.console,
            disable=not (speaks and self.console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, figures="")

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, epoch: str, loss: float, top1: float | None, images_per_second: float) -> None:
        """Show the figures of the epoch so far, after an optimiser step."""
        accuracy = "" if top1 is None else f"  {top1:.2f} %"
        figures = f"loss {loss:.4f}{accuracy}  {images_per_second:.0f} images/s"
        self._bar.update(self._task, advance=1, description=epoch, figures=figures)

    def line(self, text: str) -> None:
        """Print a permanent line, above the bar."""
        if self.speaks:
            self._bar.console.print(text, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a permanent table."""
        if self.speaks:
            self._bar.console.print(table)


def summary_table(title: str, summary: Mapping[str, Any]) -> Table:
    """Return the results of a run (`loop.Summary`) as a table."""
    columns = {
        "best accuracy": f"{summary['top1']:.2f} % (epoch {summary['best_epoch']})",
        "last accuracy": f"{summary['last_top1']:.2f} %",
        "last loss": f"{summary['last_loss']:.4f}",
        "parameters": f"{summary['parameters']:,}",
        "unreadable images": f"{summary['unreadable']:,}",
        "seconds": f"{summary['seconds']:.0f}",
    }
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_row(*columns.values())
    return table


@contextmanager
def evaluation_bar(batches: int) -> Iterator[Callable[[object], None]]:
    """Show a bar on standard error, apart from the result, and give a function to call after each batch."""
    console = make_console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("evaluating", total=batches)
        yield lambda _: bar.advance(task)
