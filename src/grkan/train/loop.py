"""The training loop.

Whatever is drawn at random is a function of the seed and of the place in the run (`randomness.py`). So a run that is
interrupted at any point and resumed from its last state ends, on a CPU, with the same bits as one that was left alone.
"""

import atexit
import contextlib
import dataclasses
import math
import os
import reprlib
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..convert.recipe import apply_conversion_
from ..errors import GrkanRuntimeError, GrkanValueError
from ..models.files import save_model
from ..nn import no_weight_decay
from ..writing import remove_leftovers, replacing, write_bytes
from .checkpoint import State, load_state, save_state
from .config import RESUMABLE, Config, make_config, read_yaml, to_dict, to_yaml
from .data import (
    ImageData,
    Source,
    TrainingSampler,
    UnreadableImages,
    absolute,
    describe,
    evaluation_loader,
    evaluation_transform,
    find_source,
    match_classes,
    training_loader,
    training_transform,
)
from .evaluate import Score, first_images, score
from .metrics import MetricsLog, Running, read_metrics
from .model import make_model, resolve_model
from .optimisation import choose_trainable, clipped_together, make_loss, make_optimizer, make_schedule
from .progress import Reporter, summary_table
from .randomness import derive_seed, seeded


class TrainingError(GrkanRuntimeError):
    """A run cannot go on."""


class Summary(TypedDict):
    """What a run came to."""

    output: str
    model: str
    epochs: int
    top1: float
    """Of the best epoch, in percent; `best_epoch` counts from 1."""
    best_epoch: int
    last_top1: float
    last_loss: float
    parameters: int
    unreadable: int
    """Images that could not be read."""
    seconds: float
    """Of training and testing."""
    cpu_seconds: float
    """In which the threads of the main process were at work."""


def train(config: Config) -> Summary:
    """Train a model and leave everything about it in the folder `config.output`.

    Raises:
        ValueError, TypeError: a setting, the data or the model does not fit; nothing has been written.
        TrainingError: the loss or a weight is not finite, or another process of the run has failed.
        OSError: a file cannot be written.
    """
    return _run(resolve(config), resumed=False)


def resume(folder: str | Path, changes: Mapping[str, Any] | None = None) -> Summary:
    """Go on with an interrupted run from its last state, or from the start if it had not come to one.

    Args:
        folder: the run's.
        changes: settings to change, of those that do not change the outcome (`RESUMABLE`).

    Returns, raises:
        As `train`; ValueError, too, if the folder holds no run, or its state is damaged or of other data.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise GrkanValueError(f"{folder} holds no run to resume (no config.yaml)")
    changes = dict(changes or {})
    for key in changes:
        if key not in (*RESUMABLE, "data"):
            raise GrkanValueError(
                f"{key} cannot change when a run is resumed; only {', '.join(RESUMABLE)} and data can"
            )
    config = make_config(read_yaml(folder / "config.yaml"), changes, {"output": str(folder)})
    return _run(dataclasses.replace(config, data=absolute(config.data)), resumed=True)


def holds_run(folder: Path) -> bool:
    """Whether a run has saved anything there that a new one would overwrite."""
    return any((folder / name).exists() for name in ("state/state.pt", "last.safetensors", "best.safetensors"))


def resolve(config: Config) -> Config:
    """The configuration with everything filled in that depends on the data set, on the model to start from or on the
    working directory. A run is resumed from it alone.

    Raises:
        ValueError: there is no such data set or model to start from, or `model` is another than that one.
    """
    source = find_source(config.data, config.val_split, config.seed)
    chosen = {"data": absolute(config.data), **resolve_model(config, source.model)}
    for name in ("shift", "hflip", "color_jitter", "workers"):
        if getattr(config, name) is None:
            chosen[name] = getattr(source, name)
    if config.output is None:
        chosen["output"] = str(Path("runs") / f"{chosen['model']}-{Path(chosen['data'].replace(':', '-')).name}")
    return dataclasses.replace(config, **chosen)


def _run(config: Config, resumed: bool) -> Summary:
    try:
        return _Run(config, resumed).train()
    except RuntimeError as error:
        # What NCCL and gloo raise in a process that waits for one that is gone. That one has said why.
        if isinstance(error, torch.distributed.DistError) or "gloo/" in str(error):
            raise TrainingError("another process of this run has failed") from error
        raise


def _make_accelerator(config: Config) -> Accelerator:
    """The device, the precision and the processes, which `torchrun` or `accelerate launch` has started."""
    if AcceleratorState._shared_state.get("_mixed_precision", config.precision) != config.precision:
        AcceleratorState._reset_state()  # or the precision of a process's first run would be that of all
    try:
        accelerator = Accelerator(
            # Unasked, Accelerate does not connect the processes of a machine without a GPU: each would train alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # about the precision, or the variables of torchrun and accelerate launch
        raise GrkanRuntimeError(f"Accelerate cannot start with precision {config.precision!r}: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:
        raise GrkanRuntimeError(
            f"{started} processes were started (WORLD_SIZE), but Accelerate connects {accelerator.num_processes} on "
            f"{accelerator.device.type}; start one, or let them use the CPU: ACCELERATE_USE_CPU=true"
        )
    if started > 1:
        # The group outlives the run, for another run of this process, but not the interpreter, which may abort then.
        atexit.register(accelerator.end_training)
    return accelerator


class _Run:
    """One training run, in one of its processes."""

    def __init__(self, config: Config, resumed: bool) -> None:
        self.config = config
        self.folder = Path(config.output or "")
        self.accelerator = _make_accelerator(config)
        self.main = self.accelerator.is_main_process
        if self.main and not resumed and holds_run(self.folder):
            raise GrkanValueError(
                f"{self.folder} already holds a run; continue it with --resume {self.folder} or choose another --output"
            )
        state_path = self.folder / "state" / "state.pt"
        state = load_state(state_path) if resumed and state_path.exists() else None
        source = find_source(config.data, config.val_split, config.seed)
        self.training, self.test = self._load_data(source)
        self.notes = [] if source.kind is None else [describe(self.training), describe(self.test), self._kind(source)]
        if state is not None:
            self._check_same(state["fingerprint"], state_path)
        known = None if state is None else state["preprocessing"]
        start = make_model(config, self.training, source.normalisation, known)
        self.model, self.preprocessing = start.model, start.preprocessing
        self.new_head = start.new_head if state is None else state["new_head"]
        self.notes += start.notes
        if state is not None and state["conversion"]:
            apply_conversion_(self.model, state["conversion"])
        choose_trainable(self.model, config, self.new_head)
        self._make_loaders()
        self._make_optimisation()
        self.unreadable = UnreadableImages(config.on_corrupt)
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": 0}
        self.last: dict[str, Any] = {}
        self.epoch = self.step = 0
        self.running = Running()
        self.seconds = self.cpu_seconds = 0.0
        if state is not None:
            self._restore(state)
        if self.main:
            (self.folder / "state").mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            write_bytes(self.folder / "config.yaml", to_yaml(config).encode())
            self.log = MetricsLog(self.folder / "metrics.jsonl", state["metrics_size"] if state else 0)
        self.accelerator.wait_for_everyone()

    # What a run is made of

    def _load_data(self, source: Source) -> tuple[ImageData, ImageData]:
        with self.accelerator.main_process_first():  # it may download
            training = source.load("train")
        test = match_classes(source.load("test"), training.classes)
        if len(training) < self.config.batch_size:
            raise GrkanValueError(
                f"batch_size {self.config.batch_size} is more than the {len(training)} training images of "
                f"{self.config.data}; lower --batch-size"
            )
        return training, test

    def _kind(self, source: Source) -> str:
        """What the settings of the augmentation go by."""
        names = ("shift", "hflip", "color_jitter")
        used = ", ".join(f"{name} {getattr(self.config, name)}" for name in names)
        return f"{source.kind}: {used}; the options of these names change it"

    def _make_loaders(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        parts = processes * config.accumulate
        if config.batch_size % parts:
            raise GrkanValueError(
                f"batch_size {config.batch_size} must be a multiple of processes x accumulate, "
                f"{processes} x {config.accumulate}"
            )
        if (config.mixup or config.cutmix) and config.batch_size // parts % 2:
            raise GrkanValueError(
                f"mixup and cutmix pair images: batch_size must be a multiple of 2 x processes x accumulate, "
                f"{2 * parts}; got {config.batch_size}"
            )
        rank = self.accelerator.process_index
        mine = range(rank * config.accumulate, (rank + 1) * config.accumulate)
        self.sampler = TrainingSampler(len(self.training), config.batch_size, parts, mine, config.seed)
        self.steps = len(self.training) // config.batch_size
        transform = training_transform(self.preprocessing, config)
        on_gpu = self.accelerator.device.type == "cuda"
        self.training_loader = training_loader(self.training, transform, self.sampler, config, pin_memory=on_gpu)
        self.test_loader = evaluation_loader(
            self.test,
            evaluation_transform(self.preprocessing),
            max(config.batch_size // parts, 1),
            config.workers or 0,
            rank,
            processes,
        )

    def _make_optimisation(self) -> None:
        config = self.config
        self.model.to(self.accelerator.device)
        self.ema = None if config.ema_decay is None else ModelEmaV3(self.model, decay=config.ema_decay)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config, self.steps)
        self.criterion, self.mixup = make_loss(config, len(self.training.classes))
        self.prepared, self.stepper = self.accelerator.prepare(self.model, self.optimizer)

    # The run

    def train(self) -> Summary:
        """From where it stands to its end."""
        config = self.config
        total = config.epochs * self.steps
        done = self.epoch * self.steps + self.step
        with contextlib.ExitStack() as stack:
            self.board = self._tensorboard(stack, done)
            self.reporter = stack.enter_context(Reporter(self.main, total, done))
            for line in self.notes:
                self.reporter.line(line)
            if done == total:
                self.reporter.line(f"{self.folder} is finished: {config.epochs} epochs")
            elif done:
                self.reporter.line(f"resuming at epoch {self.epoch + 1}, step {self.step + 1} of {self.steps}")
            while self.epoch < config.epochs:
                self._train_epoch()
        return self._finish()

    def _train_epoch(self) -> None:
        config = self.config
        self.model.train()
        self.sampler.start_at(self.epoch, self.step)
        batches = iter(self.training_loader)
        while self.step < self.steps:
            with self._clock() as clock:
                loss = self._optimise(batches)
            self.step += 1
            self.running.seconds += clock.seconds
            means = self.running.means()
            self.reporter.step(
                f"epoch {self.epoch + 1}/{config.epochs}",
                means["train_loss"],
                means.get("train_top1"),
                means["images_per_second"],
            )
            count = self.epoch * self.steps + self.step
            if config.log_every and count % config.log_every == 0:
                self._write_metrics({"epoch": self.epoch + 1, "step": count, "lr": self._lr(), "train_loss": loss})
            if config.save_every and count % config.save_every == 0 and self.step < self.steps:
                self._check_weights()
                self._save_state()
        self._check_weights()
        with self._clock():
            result = self._evaluate()
        self._end_epoch(result)

    def _optimise(self, batches: Any) -> float:
        """One optimiser step; returns the loss of its global batch."""
        config, accelerator = self.config, self.accelerator
        count = self.epoch * self.steps + self.step
        self.schedule.step_update(count)
        sums = [0.0, 0.0]  # loss, correct
        width = config.batch_size // self.sampler.parts
        for part in self.sampler.mine:
            batch = next(batches)
            self.unreadable.add(batch)
            if len(batch.labels) < width:
                raise GrkanValueError(f"none of the {len(self.training)} training images of {config.data} can be read")
            images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
            targets: Tensor = labels
            if self.mixup is not None:
                with seeded("mixup", config.seed, count):
                    images, targets = self.mixup(images, labels)
            torch.manual_seed(derive_seed("dropout", config.seed, count, part))
            with accelerator.accumulate(self.prepared):
                logits = self.prepared(images)
                loss = self.criterion(logits.float(), targets)
                accelerator.backward(loss)
            sums[0] += loss.item() / self.sampler.parts
            sums[1] += float((logits.argmax(dim=-1) == labels).sum())
        loss_sum, correct = self._over_processes(sums)
        if not math.isfinite(loss_sum):
            raise self._diverged(f"the loss is {loss_sum}", count + 1)
        for parameters in clipped_together(self.model) if config.clip_grad is not None else ():
            accelerator.clip_grad_norm_(parameters, config.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=count + 1)
        self.running.add(loss_sum * config.batch_size, None if self.mixup else correct, config.batch_size)
        return loss_sum

    def _evaluate(self) -> dict[str, Any]:
        with self.accelerator.autocast():
            own = score(self._evaluated(), self.test_loader, self.accelerator.device, self.unreadable)
        loss, correct, images = self._over_processes([own.loss, own.correct, own.images])
        if not images:
            raise GrkanValueError(f"none of the {len(self.test)} test images of {self.config.data} can be read")
        if not math.isfinite(loss):
            raise self._diverged(f"the test loss is {loss}", (self.epoch + 1) * self.steps)
        return Score(loss, int(correct), int(images)).to_dict()

    def _check_weights(self) -> None:
        """Raise before a weight that is not finite takes the place of one that was saved."""
        modules = {"weight": self.model} | ({} if self.ema is None else {"averaged weight": self.ema.module})
        for kind, module in modules.items():
            for name, parameter in module.named_parameters():
                if not parameter.isfinite().all():
                    raise self._diverged(f"the {kind} {name} is not finite", self.epoch * self.steps + self.step)

    def _diverged(self, what: str, step: int) -> TrainingError:
        kept = self.folder / "last.safetensors"
        left = f"{kept} is of the last good epoch" if kept.exists() else "no epoch had been finished"
        return TrainingError(
            f"{what} at step {step} (epoch {self.epoch + 1}); {left}; "
            "a lower --lr, a longer warmup_epochs or clip_grad may help"
        )

    def _end_epoch(self, result: dict[str, Any]) -> None:
        is_best = result["top1"] > self.best["top1"]
        if is_best:
            self.best = {"top1": result["top1"], "epoch": self.epoch + 1}
        self.last = {"top1": result["top1"], "loss": result["loss"]}
        count = (self.epoch + 1) * self.steps
        self._share_unreadable()
        metrics = {
            "epoch": self.epoch + 1,
            "step": count,
            "lr": self._lr(),
            **self.running.means(),
            "top1": result["top1"],
            "loss": result["loss"],
            "unreadable": len(self.unreadable.names),
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
        }
        if self.main:
            for name in ["last.safetensors"] + ["best.safetensors"] * is_best:
                self._save_model(self.folder / name)
        self._write_metrics(metrics)
        train_top1 = f" {metrics['train_top1']:.2f} %" if "train_top1" in metrics else ""
        self.reporter.line(
            f"epoch {self.epoch + 1}/{self.config.epochs}  train loss {metrics['train_loss']:.4f}{train_top1}  "
            f"test loss {result['loss']:.4f}  accuracy {result['top1']:.2f} %  "
            f"{metrics['images_per_second']:.0f} images/s  {self.seconds:.0f} s"
        )
        self.epoch, self.step, self.running = self.epoch + 1, 0, Running()
        self._save_state()

    def _finish(self) -> Summary:
        """The pictures and the summary."""
        summary: Summary = {
            "output": str(self.folder),
            "model": self.config.model or "",
            "epochs": self.config.epochs,
            "top1": self.best["top1"],
            "best_epoch": self.best["epoch"],
            "last_top1": self.last["top1"],
            "last_loss": self.last["loss"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "unreadable": len(self.unreadable.names),
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
        }
        if self.main:
            pictures = self._draw()
            self.reporter.table(summary_table(f"{self.config.model} on {self.config.data}", summary))
            for path in [self.folder / "best.safetensors", *pictures]:
                self.reporter.line(str(path))
        self.accelerator.wait_for_everyone()
        return summary

    def _draw(self) -> list[Path]:
        from .. import plot

        figures = {}
        lines = read_metrics(self.folder / "metrics.jsonl")
        if any("top1" in line for line in lines):
            figures["curves.png"] = plot.plot_curves({self.config.model or "": lines})
        if no_weight_decay(self.model):
            images, inputs = first_images(self.test_loader, self.unreadable), None
            if images is not None:
                inputs = plot.record_inputs(self._evaluated(), [images.to(self.accelerator.device)])
            figures["functions.png"] = plot.plot_functions(self._evaluated(), inputs)
        for name, figure in figures.items():
            with replacing(self.folder / name) as path:
                plot.save_figure(figure, path)
        return [self.folder / name for name in figures]

    # Small parts

    @contextlib.contextmanager
    def _clock(self) -> Iterator[types.SimpleNamespace]:
        """Add what the block takes to the run's time; `seconds` of the result is it, afterwards."""
        taken = types.SimpleNamespace(seconds=0.0)
        began, worked = time.perf_counter(), time.process_time()
        yield taken
        taken.seconds = time.perf_counter() - began
        self.seconds += taken.seconds
        self.cpu_seconds += time.process_time() - worked

    def _evaluated(self) -> nn.Module:
        """The weights that are tested and saved."""
        return self.model if self.ema is None else self.ema.module

    def _over_processes(self, values: list[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        total = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.accelerator.device), "sum"
        )
        return total.tolist()

    def _share_unreadable(self) -> None:
        """So that no process names an image again that another one has named."""
        self.unreadable.names.update(gather_object(sorted(self.unreadable.names)))

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _tensorboard(self, stack: contextlib.ExitStack, done: int) -> Any:
        if not (self.config.tensorboard and self.main):
            return None
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done)
        stack.callback(board.close)
        return board

    # What it leaves

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        if not self.main:
            return
        self.log.append(metrics)
        if self.board is not None:
            for key in metrics.keys() - {"epoch", "step"}:
                self.board.add_scalar(key, metrics[key], metrics["step"])

    def _save_model(self, path: Path) -> None:
        save_model(
            self._evaluated(),
            path,
            classes=self.training.classes,
            preprocessing=self.preprocessing,
            arguments={**self.config.model_args, "num_classes": len(self.training.classes)},
        )

    def _save_state(self) -> None:
        self._share_unreadable()
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state: State = {
            "fingerprint": self._fingerprint(),
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "preprocessing": self.preprocessing,
            "conversion": getattr(self.model, "grkan_conversion", None),
            "new_head": self.new_head,
            "best": self.best,
            "last": self.last,
            "running": vars(self.running),
            "unreadable": sorted(self.unreadable.names),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "metrics_size": self.log.size(),
        }
        save_state(self.folder / "state" / "state.pt", state)

    def _restore(self, state: State) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        self.best, self.last = state["best"], state["last"]
        self.running = Running(**state["running"])
        self.unreadable.names.update(state["unreadable"])

    def _fingerprint(self) -> dict[str, Any]:
        """What decides the outcome of the rest of the run."""
        elsewhere = (*RESUMABLE, "output", "data", "init")
        settings = {key: value for key, value in to_dict(self.config).items() if key not in elsewhere}
        counts = {"training images": len(self.training), "test images": len(self.test)}
        return {**settings, **counts, "classes": list(self.training.classes)}

    def _check_same(self, recorded: dict[str, Any], path: Path) -> None:
        for key, value in self._fingerprint().items():
            if recorded.get(key) != value:
                was, now = reprlib.repr(recorded.get(key)), reprlib.repr(value)
                raise GrkanValueError(f"{path} is of another run: {key} was {was} there, and is {now}")
