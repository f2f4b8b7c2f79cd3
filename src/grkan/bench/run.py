"""Run a suite by its name and write its tables and JSON file, for `grkan bench`."""

from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress

from ..errors import GrkanRuntimeError
from ..rational.arguments import check_choice, check_positive
from ..train.progress import make_console
from ..writing import check_writable
from . import kernels, report
from .contest import Result, clock_of, hold
from .suites import SUITES, Suite

DEVICES = ("cpu", "cuda")


def run_suite(
    suite: str,
    *,
    rounds: int = 15,
    threads: int | None = None,
    device: str = "cpu",
    path: str | Path | None = None,
) -> list[Result]:
    """Run a suite, with a progress bar on a terminal; print its tables, and write all measurements as JSON.

    Args:
        suite: "ops", "layers", "models" or "deploy".
        rounds: how often the rivals take turns.
        threads: the number of PyTorch's threads; None: PyTorch's default.
        device: "cpu", or "cuda", which is PyTorch's name for AMD's GPUs as well.
        path: the JSON file; None: no file.

    Raises:
        ValueError: there is no such suite or device, or rounds or threads are less than 1.
        RuntimeError: there is no GPU.
        ImportError: timm is missing; "ops" does not need it.
        OSError: the file cannot be written.
    """
    check_choice("suite", suite, tuple(SUITES))
    check_positive("rounds", rounds)
    if threads is not None:
        check_positive("threads", threads)
    check_choice("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise GrkanRuntimeError(
            "device is 'cuda', but PyTorch finds no GPU; `python -m torch.utils.collect_env` shows why"
        )
    check_writable(path)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        made = SUITES[suite](device)
        command = f"grkan bench {suite} --rounds {rounds} --threads {torch.get_num_threads()} --device {device}"
        about = {"command": command, **report.describe_machine(device)}
        results = _hold_all(made, suite, rounds, device)
    finally:
        torch.set_num_threads(threads_before)
    console = make_console()
    for result in results:
        for table in report.contest_tables(result):
            console.print(table)
    for line in (*made.notes, report.as_line(about)):
        console.print(line, soft_wrap=True)
    if path is not None:
        contests = [report.contest_as_json(result) for result in results]
        report.write_json(path, suite, about, {"notes": list(made.notes), "contests": contests})
    return results


def _hold_all(suite: Suite, name: str, rounds: int, device: str) -> list[Result]:
    results = []
    clock = clock_of(device)
    console = make_console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=len(suite.contests) * rounds)
        for contest in suite.contests:
            bar.update(task, description=f"{name}: {report.job_title(contest.job)}")
            results.append(hold(contest, rounds, clock=clock, advance=partial(bar.advance, task)))
    return results


def run_kernels(*, path: str | Path | None = None) -> list[kernels.Stats]:
    """Compile the GPU kernels for GPUs that need not be present; print their counts, and others' figures.

    Args:
        path: a JSON file for the same figures; None: no file.

    Raises:
        ImportError: Triton is missing or too old.
        RuntimeError: Triton's interpreter is on.
        OSError: the file cannot be written.
    """
    check_writable(path)
    console = make_console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        cases = list(kernels.all_cases())
        found = [kernels.stats(*case) for case in bar.track(cases, description="kernels")]
    about = {"command": "grkan bench kernels", **report.describe_compiler()}
    console = make_console()
    for table in report.kernel_tables(found):
        console.print(table)
    sources = [f"{rates.gpu}: {rates.source}" for rates in kernels.RATES.values()]
    for line in (report.KERNELS_LEGEND, *sources, report.as_line(about)):
        console.print(line, soft_wrap=True)
    if path is not None:
        report.write_json(path, "kernels", about, report.kernels_as_json(found))
    return found
