"""Measure the cost of the training loop, in images per second: the loader alone; the step alone and the loop around it,
both on batches in memory; then the step and the loop with batches from the loader. The step is forward, loss, backward
and optimiser in plain PyTorch.

    python benchmarks/train_loop.py --data FOLDER --model NAME --batch-size N --workers N --steps N
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from grkan.train import loop
from grkan.train.checkpoint import RunLock
from grkan.train.config import make_config
from grkan.train.interruption import Notice
from grkan.train.loading import batches_on
from grkan.train.progress import Reporter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--model", default="kat_micro_patch4_28")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="steps per measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: getattr(options, name) for name in ("data", "model", "batch_size", "workers")}
        config = loop.resolve(make_config(settings, {"output": str(Path(folder) / "run")}))
        loop._connect()
        run = loop._Run(config, False, RunLock(Path(config.output or "")))
        # Each round runs all of them, so that other programs on the machine affect all alike.
        measures = {
            "loader": _loader(run, options.steps),
            "step": _step(run, options.steps, _at_hand(run, options.steps)),
            "loop": _loop(run, options.steps, _at_hand(run, options.steps)),
            "loader and step": _step(run, options.steps, run.training_loader),
            "loader and loop": _loop(run, options.steps, run.training_loader),
        }
        seconds: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(options.rounds + 1):
            for name, measure in measures.items():
                began = time.perf_counter()
                measure()
                seconds[name].append(time.perf_counter() - began)
        images = options.steps * options.batch_size
        for name, times in seconds.items():
            print(f"{name:16} {images / statistics.median(times[1:]):8.1f} images/s")
        for plain, ours in (("step", "loop"), ("loader and step", "loader and loop")):
            ratios = [b / a for a, b in zip(seconds[plain][1:], seconds[ours][1:], strict=True)]
            print(f"{ours} over {plain}: {100 * (statistics.median(ratios) - 1):+.1f} % (median of the rounds)")


def _loader(run: Any, steps: int) -> Callable[[], None]:
    def measure() -> None:
        run.sampler.start_at(0, 0)
        batches = iter(run.training_loader)
        for _ in range(steps):
            next(batches)

    return measure


def _at_hand(run: Any, steps: int) -> list[Any]:
    run.sampler.start_at(0, 0)
    batches = batches_on(run.accelerator.device, run.training_loader)
    return [next(batches) for _ in range(steps)]


def _step(run: Any, steps: int, loader: Any) -> Callable[[], None]:
    def measure() -> None:
        run.model.train()
        run.sampler.start_at(0, 0)
        for batch in islice(loader, steps):
            loss = run.criterion(run.model(batch.images), batch.labels)
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

    return measure


def _loop(run: Any, steps: int, loader: Any) -> Callable[[], None]:
    """An epoch of a run that ends after some steps and omits the test."""
    run.reporter, run.notice, run.board = Reporter(False, steps), Notice(), None
    run._evaluate, run._end_epoch = lambda: None, lambda result: None

    def measure() -> None:
        run.training_loader, run.epoch, run.step, run.steps = loader, 0, 0, steps
        run._train_epoch()

    return measure


if __name__ == "__main__":
    main()
