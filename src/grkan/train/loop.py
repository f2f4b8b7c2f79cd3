"""The training loop.

All random numbers are a function of the seed and of the position in the run (`randomness.py`). So a run that is
interrupted at any point and resumed from its last state ends with the same bits as an uninterrupted one: on a CPU, in
one process, with the same number of threads.

Nothing in a step waits for the device or for another process before the optimiser has stepped. The results of a step
(its loss, whether it was finite, whether SIGTERM was received) are checked while the next one is computed.
"""

import atexit
import collections
import contextlib
import dataclasses
import math
import os
import reprlib
import time
import types
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration, gather_object, parse_flag_from_env
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..convert.recipe import apply_conversion_, recipe_of
from ..errors import GrkanRuntimeError, GrkanValueError
from ..models.files import load_model, save_model
from ..nn import no_weight_decay
from ..writing import remove_leftovers, replacing, write_bytes
from .checkpoint import RunLock, State, load_state, save_state
from .config import RESUMABLE, Config, make_config, read_yaml, to_dict, to_yaml
from .data import ImageData, Source, absolute, describe, find_source, match_classes
from .evaluate import Score, first_images, score
from .interruption import Notice, TrainingStopped
from .loading import (
    Batch,
    TrainingSampler,
    UnreadableImages,
    batches_on,
    evaluation_loader,
    evaluation_transform,
    training_loader,
    training_transform,
)
from .metrics import MetricsLog, Running, read_metrics
from .model import make_model, resolve_model
from .optimisation import (
    choose_trainable,
    clipped_together,
    limit_gradients_,
    make_loss,
    make_optimizer,
    make_schedule,
    prepare_model_,
)
from .processes import Later, TrainingError, check_all_see, check_shared, from_main
from .progress import Reporter, summary_table
from .randomness import derive_seed, seeded
from .sharding import gather_weights, load_parts, local, remove_other_parts, save_parts, shard_model_
from .trackers import Trackers, check_trackers


class Summary(TypedDict):
    """The results of a run."""

    output: str
    model: str
    epochs: int
    top1: float
    """The accuracy of the best epoch, in percent; `best_epoch` counts from 1."""
    best_epoch: int
    last_top1: float
    last_loss: float
    parameters: int
    unreadable: int
    """The number of images that could not be read."""
    seconds: float
    """The time of training and testing."""
    cpu_seconds: float
    """The CPU time of all threads of the main process."""


def train(config: Config, auto_resume: bool = False) -> Summary:
    """Train a model, and write all results to the folder `config.output`.

    Args:
        config: the configuration of the run.
        auto_resume: if the folder holds a run of this configuration, resume it. So the same call starts a run, and
            continues it after any interruption.

    Raises:
        ValueError, TypeError: a setting, the data or the model does not fit; nothing has been written.
        TrainingError: the loss or a weight is not finite, or another process of the run has failed.
        RuntimeError: another run is active in the folder.
        OSError: a file cannot be written.
        TrainingStopped: SIGTERM was received; the state is saved.
    """
    config = resolve(config)
    folder = Path(config.output or "")
    with _naming_others():
        _connect()
        resumed = auto_resume and from_main((folder / "config.yaml").is_file)
        if resumed:
            check_all_see(folder, (folder / "config.yaml").is_file())
            check_same(config)
        return _run(config, resumed)


def resume(folder: str | Path, changes: Mapping[str, Any] | None = None) -> Summary:
    """Resume an interrupted run from its last state, or from the start if it has not saved one.

    Args:
        folder: the folder of the run.
        changes: settings to change, among those that do not affect the outcome (`RESUMABLE`).

    Returns, raises:
        As `train`; also ValueError if the folder holds no run, or its state is damaged or belongs to other data.
    """
    folder = Path(folder)
    changes = dict(changes or {})
    for key in changes:
        if key not in (*RESUMABLE, "data"):
            raise GrkanValueError(
                f"{key} cannot change when a run is resumed; only {', '.join(RESUMABLE)} and data can"
                f"{_more_epochs(folder) if key == 'epochs' else ''}"
            )
    with _naming_others():
        _connect()
        found = (folder / "config.yaml").is_file()
        check_all_see(folder, found)
        if not found:
            raise GrkanValueError(f"{folder} has no run to resume (there is no config.yaml)")
        config = make_config(read_yaml(folder / "config.yaml"), changes, {"output": str(folder)})
        return _run(dataclasses.replace(config, data=absolute(config.data)), resumed=True)


def holds_run(folder: Path) -> bool:
    """Return whether the folder holds files of a run that a new run would overwrite."""
    return any((folder / name).exists() for name in ("state/state.pt", "last.safetensors", "best.safetensors"))


def check_same(config: Config) -> None:
    """Raise ValueError if the folder `config.output` holds a run whose settings lead to other weights."""
    folder = Path(config.output or "")
    recorded = read_yaml(folder / "config.yaml")
    for key, value in to_dict(config).items():
        if key not in (*RESUMABLE, "output") and recorded.get(key) != value:
            raise GrkanValueError(
                f"{folder} holds a run with {key} = {recorded.get(key)!r}, not {value!r}; choose another --output"
                f"{_more_epochs(folder) if key == 'epochs' else ''}"
            )


def _is_finished(folder: Path) -> bool:
    try:
        epochs, lines = read_yaml(folder / "config.yaml").get("epochs"), read_metrics(folder / "metrics.jsonl")
    except (OSError, GrkanValueError):
        return False
    return any(line.get("epoch") == epochs and "top1" in line for line in lines)


def _more_epochs(folder: Path) -> str:
    """Return the end of a message to a user who wants more epochs."""
    return (
        f"; to train its model further: grkan train --init {folder / 'last.safetensors'} --epochs N --output "
        "OTHER_FOLDER"
    )


def resolve(config: Config) -> Config:
    """Fill in all settings that depend on the data set, on the model to start from or on the working directory. A run
    is resumed from the result alone.

    Raises:
        ValueError: there is no such data set or model to start from, or `model` names a different one.
    """
    source = find_source(config.data, config.val_split, config.seed)
    chosen = {"data": absolute(config.data), **resolve_model(config, source.model)}
    for name in ("shift", "hflip", "color_jitter", "workers"):
        if getattr(config, name) is None:
            chosen[name] = getattr(source, name)
    if config.precision is None:
        chosen["precision"] = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.output is None:
        chosen["output"] = str(Path("runs") / f"{chosen['model']}-{Path(chosen['data'].replace(':', '-')).name}")
    return dataclasses.replace(config, **chosen)


def _run(config: Config, resumed: bool) -> Summary:
    lock = RunLock(Path(config.output or ""))
    try:
        return _Run(config, resumed, lock).train()
    finally:
        lock.release()


@contextlib.contextmanager
def _naming_others() -> Iterator[None]:
    """In a process that waits for a failed one, turn the errors of NCCL and gloo into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            raise TrainingError("another process of this run has failed") from error
        raise


def _connect() -> None:
    """Connect the processes that `torchrun` or `accelerate launch` has started."""
    connected = dist.is_initialized()
    try:
        # By default Accelerate does not connect processes on a machine without a GPU: each would train alone.
        state = PartialState(cpu=_on_cpu(), **_meeting_place())
    except ValueError as error:  # about the variables of torchrun and accelerate launch
        raise GrkanRuntimeError(f"Accelerate cannot start: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", state.num_processes))
    if started != state.num_processes:
        raise GrkanRuntimeError(
            f"{started} processes were started (WORLD_SIZE), but Accelerate connects only {state.num_processes} on "
            f"{state.device.type}; start one process, or use the CPU: ACCELERATE_USE_CPU=true"
        )
    if started > 1 and not connected:
        # Keep the group for later runs of this process, but destroy it before the interpreter exits, or it may abort.
        atexit.register(state.destroy_process_group)


def _meeting_place() -> dict[str, Any]:
    """Return the arguments of `init_process_group` for processes that torchrun has restarted.

    torchrun keeps one store for all attempts, in which they would find the addresses of dead processes.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not attempt or dist.is_initialized():
        return {}
    store, rank, world_size = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": world_size}


def _on_cpu() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _make_accelerator(config: Config) -> Accelerator:
    """Set up the device, the precision and the processes."""
    trackers = check_trackers(config.tracker)
    if AcceleratorState._shared_state.get("_mixed_precision", config.precision) != config.precision:
        AcceleratorState._reset_state()  # otherwise all runs of a process would use the precision of the first
    try:
        return Accelerator(
            cpu=_on_cpu(),
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            step_scheduler_with_optimizer=False,
            log_with=trackers or None,
            project_config=ProjectConfiguration(config.output, str(Path(config.output or "") / "trackers")),
        )
    except ValueError as error:
        raise GrkanRuntimeError(f"Accelerate cannot start with precision {config.precision!r}: {error}") from error


@dataclasses.dataclass
class _Step:
    """An optimiser step whose results are not yet known."""

    number: int
    """The number of the step in the whole run, from 1."""
    lr: float
    sums: Later
    """The loss, the number of correct images, and 1 or 0 for a gradient that is not finite and for SIGTERM."""


class _Run:
    """One training run, in one of its processes."""

    def __init__(self, config: Config, resumed: bool, lock: RunLock) -> None:
        self.config = config
        self.folder = Path(config.output or "")
        self.lock = lock
        self.accelerator = _make_accelerator(config)
        self.main = self.accelerator.is_main_process
        if resumed:
            self._claim_folder()
        elif self.main:
            self._check_free()
        state_path = self.folder / "state" / "state.pt"
        state = load_state(state_path) if resumed and state_path.exists() else None
        source = find_source(config.data, config.val_split, config.seed, self.folder / "state")
        self.training, self.test = self._load_data(source)
        self.notes = [] if source.kind is None else [describe(self.training), describe(self.test), self._kind(source)]
        if state is not None:
            self._check_same(state["fingerprint"], state_path)
        known = None if state is None else state["preprocessing"]
        measure = source.normalisation
        normalisation = None if measure is None else partial(from_main, partial(measure, self.training))
        start = make_model(config, self.training, normalisation, known)
        self.model, self.preprocessing = start.model, start.preprocessing
        self.new_head = start.new_head if state is None else state["new_head"]
        self.notes += start.notes
        if state is not None and state["conversion"]:
            apply_conversion_(self.model, state["conversion"])
        choose_trainable(self.model, config, self.new_head)
        prepare_model_(self.model, config)
        self._make_loaders()
        self._make_optimisation()
        self.unreadable = UnreadableImages(config.on_corrupt)
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": 0}
        self.last: dict[str, Any] = {}
        self.epoch = self.step = 0
        self.running = Running()
        self.pending: collections.deque[_Step] = collections.deque()
        """Steps whose results have not been checked."""
        self.seconds = self.cpu_seconds = 0.0
        if state is not None:
            self._restore(state)
        self._claim_folder()
        if self.main:
            if not resumed:
                self._check_free()
            remove_leftovers(self.folder)
            write_bytes(self.folder / "config.yaml", to_yaml(config).encode())
            self.log = MetricsLog(self.folder / "metrics.jsonl", state["metrics_size"] if state else 0)
        self.accelerator.wait_for_everyone()

    # Setup

    def _claim_folder(self) -> None:
        """Lock the folder until the end of the run, and check that all processes see the same folder."""
        check_shared(self.lock.path, from_main(self.lock.acquire))

    def _check_free(self) -> None:
        if holds_run(self.folder):
            raise GrkanValueError(
                f"{self.folder} already holds a run; continue it with --resume {self.folder} or choose another --output"
                f"{_more_epochs(self.folder) if _is_finished(self.folder) else ''}"
            )

    def _load_data(self, source: Source) -> tuple[ImageData, ImageData]:
        training = from_main(lambda: source.load("train"))
        test = from_main(lambda: match_classes(source.load("test"), training.classes))
        if len(training) < self.config.batch_size:
            raise GrkanValueError(
                f"batch_size {self.config.batch_size} is more than the {len(training)} training images of "
                f"{self.config.data}; lower --batch-size"
            )
        return training, test

    def _kind(self, source: Source) -> str:
        """Describe the kind of images, and the augmentation settings that follow from it."""
        names = ("shift", "hflip", "color_jitter")
        used = ", ".join(f"{name} {getattr(self.config, name)}" for name in names)
        return f"{source.kind}: {used}; to change them, use the options of the same names"

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
        labels = self.training.labels if config.balance == "sampling" else None
        self.sampler = TrainingSampler(
            len(self.training), config.batch_size, parts, mine, config.seed, config.repeats, labels
        )
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
        self.test_batches = max(self._gather(len(self.test_loader)))

    def _make_optimisation(self) -> None:
        config = self.config
        self.model.to(self.accelerator.device)
        self.ema = None if config.ema_decay is None else ModelEmaV3(self.model, decay=config.ema_decay)
        if config.shard:
            for module in (self.model, *(() if self.ema is None else (self.ema.module,))):
                shard_model_(module, self.accelerator.device, self.accelerator.mixed_precision)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config, self.steps)
        self.criterion, self.mixup = make_loss(config, len(self.training.classes), self.training.labels)
        self.criterion.to(self.accelerator.device)
        self.clipped_together = clipped_together(self.model)
        # Without a GPU, Accelerate's own sharding silently becomes DDP.
        self.prepared = self.model if config.shard else self.accelerator.prepare(self.model)
        self.stepper = self.accelerator.prepare(self.optimizer)
        if config.compile:
            self.prepared = torch.compile(self.prepared)

    # The run

    def train(self) -> Summary:
        """Train from the current state to the end."""
        config = self.config
        total = config.epochs * self.steps
        done = self._count()
        with contextlib.ExitStack() as stack:
            self.trackers = Trackers(self.accelerator, config, self.folder, done)
            stack.callback(self.trackers.close)
            self.reporter = stack.enter_context(Reporter(self.main, total, done))
            self.notice = stack.enter_context(Notice())
            for line in self.notes:
                self.reporter.line(line)
            if done == total:
                self.reporter.line(f"{self.folder} is finished: {config.epochs} epochs")
            elif done:
                at = "before its test" if self.step == self.steps else f"step {self.step + 1} of {self.steps}"
                self.reporter.line(f"resuming at epoch {self.epoch + 1}, {at}")
            while self.epoch < config.epochs:
                if self._is_out_of_patience():
                    self.reporter.line(f"stopped: no epoch after {self.best['epoch']} was better (patience)")
                    break
                self._train_epoch()
        return self._finish()

    def _is_out_of_patience(self) -> bool:
        """Return whether there has been no better result for `patience` epochs."""
        config, best = self.config, self.best["epoch"]
        if config.patience is None or not best or self.epoch % config.evaluate_every:
            return False
        return self.epoch - best >= config.patience

    def _train_epoch(self) -> None:
        config = self.config
        self.model.train()
        self.sampler.start_at(self.epoch, self.step)
        batches = batches_on(self.accelerator.device, self.training_loader) if self.step < self.steps else None
        while self.step < self.steps:
            with self._clock() as clock:
                sums = self._optimise(batches)
                self.step += 1
                told = sums.new_tensor([float(self.notice.given)])
                self.pending.append(_Step(self._count(), self._lr(), Later(torch.cat([sums, told]))))
                self._look_back(to=0 if self.step == self.steps else 1)
            self.running.seconds += clock.seconds
            if config.save_every and self._count() % config.save_every == 0 and self.step < self.steps:
                self._save_state()
        self._check_weights()
        result = None
        if (self.epoch + 1) % config.evaluate_every == 0 or self.epoch + 1 == config.epochs:
            with self._clock():
                result = self._evaluate()
        self._end_epoch(result)

    def _optimise(self, batches: Any) -> Tensor:
        """Run one optimiser step.

        Returns:
            For this process, on the device: its part of the loss, the number of correct images, and whether a gradient
            was not finite, 1 or 0.
        """
        config, accelerator = self.config, self.accelerator
        count = self._count()
        self.schedule.step_update(count)
        losses, correct = [], []
        width = config.batch_size // self.sampler.parts
        for part in self.sampler.mine:
            batch = next(batches)
            self.unreadable.add(batch)
            if len(batch.labels) < width:
                raise GrkanValueError(f"none of the {len(self.training)} training images of {config.data} can be read")
            images, labels = batch.images, batch.labels
            targets: Tensor = labels
            if self.mixup is not None:
                with seeded("mixup", config.seed, count):
                    images, targets = self.mixup(images, labels)
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            torch.manual_seed(derive_seed("dropout", config.seed, count, part))
            with accelerator.accumulate(self.prepared):
                logits = self.prepared(images)
                loss = self.criterion(logits.float(), targets)
                # Times 1 or NaN: if one loss is not finite, the gradients of all processes become NaN.
                accelerator.backward(loss * (loss.detach() * 0 + 1))
            losses.append(loss.detach())
            correct.append((logits.detach().argmax(dim=-1) == labels).sum())
        accelerator.unscale_gradients()
        spoiled = limit_gradients_(self.clipped_together, config.clip_grad)
        if accelerator.scaler is not None:
            spoiled = torch.zeros_like(spoiled)  # it skips such a step itself, and lowers its scale
        self.stepper.step()
        self.stepper.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=count + 1)
        loss = torch.stack(losses).sum() / self.sampler.parts
        return torch.stack([loss, torch.stack(correct).sum().to(loss.dtype), spoiled.to(loss.dtype)])

    def _look_back(self, to: int = 0) -> None:
        """Process the results of past steps, except for the last few, which may not be ready yet.

        Args:
            to: how many steps to leave pending.

        Raises:
            TrainingError: a loss or a gradient was not finite.
            TrainingStopped: one of the processes received SIGTERM.
        """
        config, size, stopped = self.config, self.config.batch_size, False
        while len(self.pending) > to:
            step = self.pending.popleft()
            loss, correct, spoiled, told = step.sums.get()
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", step.number)
            if spoiled:
                raise self._diverged("a gradient is not finite", step.number)
            self.running.add(loss * size, None if self.mixup else correct, size)
            means = self.running.means()
            self.reporter.step(
                f"epoch {self.epoch + 1}/{config.epochs}",
                means["train_loss"],
                means.get("train_top1"),
                means["images_per_second"],
            )
            if config.log_every and step.number % config.log_every == 0:
                self._write_metrics({"epoch": self.epoch + 1, "step": step.number, "lr": step.lr, "train_loss": loss})
            if told:
                stopped, to = True, 0
        if stopped:
            self._stop()

    def _stop(self) -> NoReturn:
        """Save the state and end the run."""
        self._save_state()
        self.accelerator.wait_for_everyone()  # a launcher may end all processes when the first one exits
        raise TrainingStopped(f"stopped by SIGTERM in epoch {self.epoch + 1}, after step {self.step} of {self.steps}")

    def _evaluate(self) -> dict[str, Any]:
        if self.config.shard:
            self._evaluated().eval()
            with torch.no_grad():
                self._see_nothing()  # tensors that a first forward makes in inference mode could not be trained
        with self.accelerator.autocast():
            own = score(self._evaluated(), self.test_loader, self.accelerator.device, self.unreadable, self._after_test)
        for _ in range(self.test_batches - len(self.test_loader)):  # some processes have one batch more
            self._after_test()
        loss, correct, images = self._over_processes([own.loss, own.correct, own.images])
        if not images:
            raise GrkanValueError(f"none of the {len(self.test)} test images of {self.config.data} can be read")
        if not math.isfinite(loss):
            raise self._diverged(f"the test loss is {loss}", (self.epoch + 1) * self.steps)
        return Score(loss, int(correct), int(images)).to_dict()

    def _after_test(self, batch: Batch | None = None) -> None:
        """Stop between two batches of the test if one of the processes received SIGTERM.

        Args:
            batch: the batch; None in a process that has no more.
        """
        if self.config.shard and (batch is None or not len(batch.labels)):
            with torch.inference_mode():
                self._see_nothing()
        if self._over_processes([float(self.notice.given)])[0]:
            self._stop()

    def _see_nothing(self) -> None:
        """Take part in a forward pass of the other processes, which need this process's part of the weights."""
        self._evaluated()(torch.zeros(1, *self.preprocessing["input_size"], device=self.accelerator.device))

    def _check_weights(self) -> None:
        """Raise TrainingError before a weight that is not finite replaces a saved one."""
        modules = {"weight": self.model} | ({} if self.ema is None else {"averaged weight": self.ema.module})
        wrong: list[str] = []
        for kind, module in modules.items():
            for name, parameter in module.named_parameters():
                if not local(parameter).isfinite().all():
                    wrong.append(f"the {kind} {name} is not finite")
        for found in self._gather(wrong[:1]):
            if found:
                raise self._diverged(found[0], self._count())

    def _diverged(self, what: str, step: int) -> TrainingError:
        kept = self.folder / "last.safetensors"
        left = f"{kept} is from the last good epoch" if kept.exists() else "no epoch was finished"
        return TrainingError(
            f"{what} at step {step} (epoch {self.epoch + 1}); {left}; "
            "a lower --lr, a longer warmup_epochs or clip_grad may help"
        )

    def _end_epoch(self, result: dict[str, Any] | None) -> None:
        """Save and report the results of an epoch; `result` is None if it was not tested."""
        config, number = self.config, self.epoch + 1
        is_best = result is not None and result["top1"] > self.best["top1"]
        if result is not None:
            if is_best:
                self.best = {"top1": result["top1"], "epoch": number}
            self.last = {"top1": result["top1"], "loss": result["loss"]}
        self._share_unreadable()
        metrics = {
            "epoch": number,
            "step": number * self.steps,
            "lr": self._lr(),
            **self.running.means(),
            **({} if result is None else {"top1": result["top1"], "loss": result["loss"]}),
            "unreadable": len(self.unreadable.names),
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
        }
        weights = gather_weights(self._evaluated()) if self.config.shard else None
        if self.main:
            kept = [f"epoch-{number}.safetensors"] * (config.keep_every > 0 and number % config.keep_every == 0)
            for name in ["last.safetensors"] + ["best.safetensors"] * is_best + kept:
                self._save_model(self.folder / name, weights)
        self._write_metrics(metrics)
        train_top1 = f" {metrics['train_top1']:.2f} %" if "train_top1" in metrics else ""
        test = "" if result is None else f"test loss {result['loss']:.4f}  accuracy {result['top1']:.2f} %  "
        self.reporter.line(
            f"epoch {number}/{config.epochs}  train loss {metrics['train_loss']:.4f}{train_top1}  {test}"
            f"{metrics['images_per_second']:.0f} images/s  {self.seconds:.0f} s"
        )
        self.epoch, self.step, self.running = number, 0, Running()
        self._save_state()

    def _finish(self) -> Summary:
        """Write the pictures and the summary."""
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
            model = load_model(self.folder / "last.safetensors").to(self.accelerator.device)  # whole, even if sharded
            images, inputs = first_images(self.test_loader, self.unreadable), None
            if images is not None:
                inputs = plot.record_inputs(model, [images.to(self.accelerator.device)])
            figures["functions.png"] = plot.plot_functions(model, inputs)
        for name, figure in figures.items():
            with replacing(self.folder / name) as path:
                plot.save_figure(figure, path)
        return [self.folder / name for name in figures]

    # Small parts

    def _count(self) -> int:
        """Return the number of optimiser steps so far."""
        return self.epoch * self.steps + self.step

    @contextlib.contextmanager
    def _clock(self) -> Iterator[types.SimpleNamespace]:
        """Add the time of the block to the run's; afterwards `seconds` of the result holds it."""
        taken = types.SimpleNamespace(seconds=0.0)
        began, worked = time.perf_counter(), time.process_time()
        yield taken
        taken.seconds = time.perf_counter() - began
        self.seconds += taken.seconds
        self.cpu_seconds += time.process_time() - worked

    def _evaluated(self) -> nn.Module:
        """Return the model whose weights are tested and saved."""
        return self.model if self.ema is None else self.ema.module

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all processes."""
        return gather_object([value])

    def _over_processes(self, values: list[float]) -> list[float]:
        """Sum each value over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        total = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.accelerator.device), "sum"
        )
        return total.tolist()

    def _share_unreadable(self) -> None:
        """Share the unreadable images, so that no two processes report the same one."""
        self.unreadable.names.update(gather_object(sorted(self.unreadable.names)))

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    # Output

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        if not self.main:
            return
        self.log.append(metrics)
        values = {key: value for key, value in metrics.items() if key not in ("epoch", "step")}
        self.trackers.log(values, metrics["step"])

    def _save_model(self, path: Path, weights: dict[str, Tensor] | None) -> None:
        save_model(
            self._evaluated(),
            path,
            state_dict=weights,
            classes=self.training.classes,
            preprocessing=self.preprocessing,
            arguments={**self.config.model_args, "num_classes": len(self.training.classes)},
        )

    def _save_state(self) -> None:
        self._look_back()
        self._check_weights()
        self._share_unreadable()
        averaged = None if self.ema is None else self.ema.module
        parts = None
        if self.config.shard:
            parts = save_parts(self.folder / "state", self.model, self.optimizer, averaged)
        if not self.main:
            return
        scaler, recipe = self.accelerator.scaler, recipe_of(self.model)
        state: State = {
            "fingerprint": self._fingerprint(),
            "epoch": self.epoch,
            "step": self.step,
            "parts": parts,
            "model": None if parts else self.model.state_dict(),
            "ema": None if parts or averaged is None else averaged.state_dict(),
            "optimizer": None if parts else self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "preprocessing": self.preprocessing,
            "conversion": None if recipe is None else recipe.to_dict(),
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
        if parts:
            remove_other_parts(self.folder / "state", parts)

    def _restore(self, state: State) -> None:
        averaged = None if self.ema is None else self.ema.module
        if state["parts"] is not None:
            load_parts(self.folder / "state" / state["parts"], self.model, self.optimizer, averaged)
        else:
            self.model.load_state_dict(state["model"])
            if averaged is not None:
                averaged.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        self.best, self.last = state["best"], state["last"]
        self.running = Running(**state["running"])
        self.unreadable.names.update(state["unreadable"])

    def _fingerprint(self) -> dict[str, Any]:
        """Return everything that decides the outcome of the rest of the run."""
        elsewhere = (*RESUMABLE, "output", "data", "init")
        settings = {key: value for key, value in to_dict(self.config).items() if key not in elsewhere}
        counts = {"training images": len(self.training), "test images": len(self.test)}
        return {**settings, **counts, "classes": list(self.training.classes)}

    def _check_same(self, recorded: dict[str, Any], path: Path) -> None:
        for key, value in self._fingerprint().items():
            if recorded.get(key) != value:
                was, now = reprlib.repr(recorded.get(key)), reprlib.repr(value)
                raise GrkanValueError(f"{path} belongs to another run: {key} was {was} there, and is {now} here")
