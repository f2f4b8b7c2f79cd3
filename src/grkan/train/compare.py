"""Train several models, or variants of one, with the same budget, and compare them.

    grkan compare --data digits --models kat_micro_patch2_8 grkan_vit_micro_patch2_8 --output runs
    grkan compare --config configs/study.yaml --output runs/study --jobs 2

The configuration is that of `grkan train`. It may also have a mapping `runs`: the names of the runs, each with the
settings in which it differs from the others. With `seeds: N`, for all runs or for one, a run is repeated with the seeds
0 to N - 1. `against: NAME` compares it with another run, seed by seed. Finished runs are not repeated, and an
interrupted one is resumed.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.table import Table

from ..errors import GrkanValueError
from ..plot import plot_curves, plot_scores, save_figure
from ..writing import replacing, write_bytes
from .config import Config, make_config, merge
from .interruption import SIGTERM_STATUS, TrainingStopped, starter, when_starter_ends
from .loop import Summary, TrainingError, check_same, holds_run, resolve, resume, train
from .metrics import read_metrics
from .model import check_model
from .progress import make_console

_POLL = 2.0
"""Seconds between two checks that every worker is alive."""

_COLUMNS = ["run", "seeds", "test accuracy, %", "test loss", "gain, points", "against", "parameters", "CPU time, s"]


def make_runs(
    content: Mapping[str, Any], models: Sequence[str] | None, given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the settings of each run for `compare`: the common ones, then the run's own, then the given ones.

    Args:
        content: the content of a configuration file, with the mapping `runs`.
        models: names of timm's registry, one run each, in place of `runs`.
        given: settings of the command line.

    Raises:
        ValueError: `runs` does not map valid folder names to settings, or a model is named twice.
    """
    if twice := [name for i, name in enumerate(models or ()) if name in (models or ())[:i]]:
        raise GrkanValueError(f"--models must name each model once; got {twice[0]} twice")
    common = {key: value for key, value in content.items() if key != "runs"}
    runs = content.get("runs") if models is None else {name: {"model": name} for name in models}
    if not isinstance(runs, Mapping) or not runs:
        raise GrkanValueError(
            f"runs must map the name of each run to its settings, unless --models is given; got {runs!r}"
        )
    for name, settings in runs.items():
        if not isinstance(name, str) or not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
            raise GrkanValueError(f"the name of a run must be a valid folder name; got {name!r}")
        if not isinstance(settings, Mapping):
            raise GrkanValueError(f"runs must map the name of each run to its settings; got {settings!r} for {name}")
    return {name: merge(common, settings, given) for name, settings in runs.items()}


def compare(runs: Mapping[str, Mapping[str, Any]], output: str | Path, jobs: int = 1) -> dict[str, Summary]:
    """Train each run, in the folder `output/NAME`, or `output/NAME/seed-K` if it has seeds; then write comparison.json,
    comparison.md and a picture beside these folders.

    Args:
        runs: the settings of each run by its name, as in `Config` but without `output`. `seeds` is a number of seeds,
            in place of `seed`; `against` is the name of the run to compare with.
        output: the folder of all runs.
        jobs: how many runs are trained at a time, each in its own process with its share of the processors.

    Returns:
        The summary of each run, by the name of its folder.

    Raises:
        ValueError: there is no run, seeds or against are invalid, or a folder holds a run with other settings.
        As `train`; the results of finished runs are kept.
    """
    if not runs:
        raise GrkanValueError("runs must have at least one run; give --models or a configuration with runs")
    output = Path(output)
    members = {name: list(_members(name, settings)) for name, settings in runs.items()}
    against = {name: settings["against"] for name, settings in runs.items() if settings.get("against") is not None}
    for name, other in against.items():
        if not isinstance(other, str) or other not in runs or other == name:
            raise GrkanValueError(f"against must name another run ({', '.join(runs)}); got {other!r} for {name}")
    if output_of := [name for name, settings in runs.items() if "output" in settings]:
        raise GrkanValueError(
            f"output must not be set for a run, because each run has its own folder in {output}; {output_of[0]} sets it"
        )
    # All configurations are checked before the first run starts.
    configs = {}
    for name, settings in runs.items():
        own = {key: value for key, value in settings.items() if key not in ("seeds", "against")}
        for folder, seed in members[name]:
            configs[folder] = resolve(make_config(own, seed, {"output": str(output / folder)}))
    for config in {json.dumps([c.model, c.model_args], sort_keys=True): c for c in configs.values()}.values():
        check_model(config)
    for config in configs.values():
        if holds_run(Path(config.output or "")):
            check_same(config)

    summaries: dict[str, Summary] = {}
    for folder, summary in _train_all(configs, jobs):
        summaries[folder] = summary
        done = {folder: summaries[folder] for folder in configs if folder in summaries}  # in the order of the runs
        scores = {
            name: {seed.get("seed"): done[folder] for folder, seed in members[name] if folder in done} for name in runs
        }
        variants = {
            name: _variant(scores[name], scores.get(against.get(name, ""), {})) for name in runs if scores[name]
        }
        _write(output, done, variants, against)
    return done


def _members(name: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the folders of a run, each with its seed as settings."""
    seeds = settings.get("seeds")
    if seeds is None:
        yield name, {}
    elif isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise GrkanValueError(f"seeds must be a number of seeds, at least 1; got {seeds!r} for {name}")
    else:
        for seed in range(seeds):
            yield f"{name}/seed-{seed}", {"seed": seed}


def _train_all(configs: Mapping[str, Config], jobs: int) -> Iterator[tuple[str, Summary]]:
    if jobs == 1:
        for folder, config in configs.items():
            yield folder, _train_or_resume(config)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    method = multiprocessing.get_start_method(allow_none=True)  # without fixing it for the caller
    # Forking a process with threads, or one that has used a GPU, is not safe. The fork server has only run the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    console = make_console()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, context, _start_worker, (threads, method)) as pool:
        try:
            with _handling(signal.SIGINT, signal.SIG_IGN):  # Ctrl-C reaches the children too; they inherit this
                waiting = {pool.submit(_train_and_end, config): folder for folder, config in configs.items()}
            workers = set(multiprocessing.active_children()) - others
            with _handling(signal.SIGTERM, _stop):
                while waiting:
                    done = wait(waiting, _POLL, FIRST_COMPLETED).done
                    if not done and not all(worker.is_alive() for worker in workers):
                        # The pool notices it late if the worker started after the pool began to wait.
                        raise BrokenProcessPool("a worker was killed")
                    for future in done:
                        folder, summary = waiting.pop(future), future.result()
                        left = f"{len(waiting)} of {len(configs)} runs left"
                        console.print(f"{folder}: {summary['last_top1']:.2f} % in {summary['seconds']:.0f} s; {left}")
                        yield folder, summary
        except BrokenProcessPool as error:
            raise TrainingError("the process of a run was killed; run the same command again to continue") from error
        finally:  # do not wait for other runs, even after an error: each can resume from its last state
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()


@contextlib.contextmanager
def _handling(number: int, handler: Any) -> Iterator[None]:
    """Replace the handler of a signal while the block runs."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may change handlers
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _stop(*_: object) -> NoReturn:
    raise TrainingStopped("stopped by SIGTERM")


def _start_worker(threads: int, method: str | None) -> None:
    multiprocessing.set_start_method(method, force=True)  # of processes that load images, as in a run alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    when_starter_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))  # a run saves its state
    torch.set_num_threads(threads)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the progress of several runs would mix


def _train_or_resume(config: Config) -> Summary:
    folder = Path(config.output or "")
    return resume(folder) if holds_run(folder) else train(config)


def _train_and_end(config: Config) -> Summary:
    """Train in a worker process.

    End the process on SIGTERM, because it would otherwise start the next run, and if the process that started it is
    gone, because it would otherwise wait forever.
    """
    stopped = False
    try:
        return _train_or_resume(config)
    except TrainingStopped:
        stopped = True
        raise
    finally:
        if stopped or not starter().is_alive():
            gc.collect()  # ends the processes that load images
            os._exit(SIGTERM_STATUS)


def _variant(scores: Mapping[int | None, Summary], others: Mapping[int | None, Summary]) -> dict[str, Any]:
    """Return means over the seeds, and the gain over another run (`others`: its scores) with the same seeds."""
    summaries = list(scores.values())
    common = [seed for seed in scores if seed in others]
    return {
        "seeds": len(summaries),
        "top1": _spread([s["last_top1"] for s in summaries]),
        "loss": _spread([s["last_loss"] for s in summaries]),
        "gain": _spread([scores[seed]["last_top1"] - others[seed]["last_top1"] for seed in common]) if common else None,
        "parameters": summaries[0]["parameters"],
        "cpu_seconds": statistics.fmean(s["cpu_seconds"] for s in summaries),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    """Return the values, their mean, and their standard deviation, which is None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def _write(
    output: Path,
    summaries: Mapping[str, Summary],
    variants: Mapping[str, Mapping[str, Any]],
    against: Mapping[str, str],
) -> None:
    content = {"runs": summaries, "variants": variants, "against": against}
    write_bytes(output / "comparison.json", (json.dumps(content, indent=2) + "\n").encode())
    rows = [_COLUMNS, ["---"] + ["---:"] * (len(_COLUMNS) - 1), *_rows(variants, against)]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    write_bytes(output / "comparison.md", text.encode())
    if summaries.keys() != variants.keys():  # several seeds of a run
        figure = plot_scores({name: variant["top1"]["values"] for name, variant in variants.items()})
        with replacing(output / "scores.png") as path:
            save_figure(figure, path)
        return
    lines = {name: read_metrics(output / name / "metrics.jsonl") for name in summaries}
    if any("top1" in line for run in lines.values() for line in run):
        figure = plot_curves(lines)
        with replacing(output / "curves.png") as path:
            save_figure(figure, path)


def _rows(variants: Mapping[str, Mapping[str, Any]], against: Mapping[str, str]) -> list[list[str]]:
    return [
        [
            name,
            str(variant["seeds"]),
            _plus_minus(variant["top1"], 2),
            _plus_minus(variant["loss"], 4),
            _plus_minus(variant["gain"], 2, sign="+") if variant["gain"] else "",
            against.get(name, ""),
            f"{variant['parameters']:,}",
            f"{variant['cpu_seconds']:.0f}",
        ]
        for name, variant in variants.items()
    ]


def _plus_minus(spread: Mapping[str, Any], digits: int, sign: str = "") -> str:
    deviation = "" if spread["deviation"] is None else f" ± {spread['deviation']:.{digits}f}"
    return f"{spread['mean']:{sign}.{digits}f}{deviation}"


def comparison_table(output: Path) -> Table:
    """Return comparison.json as a table."""
    comparison = json.loads((output / "comparison.json").read_text())
    table = Table(caption="Mean ± standard deviation over the seeds; gains are computed seed by seed.")
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for row in _rows(comparison["variants"], comparison["against"]):
        table.add_row(*row)
    return table
