"""Side by side with peers, in one run: the rational function, the layer and the model, each against what it replaces.

`grkan bench ops|layers|models` runs one of the suites at the end of this file, on the CPU or with `--device cuda` on a
GPU; `grkan bench kernels` compiles the GPU kernels and shows what came of it. The speed of a machine drifts, so the
rivals of a contest take turns: in every round each of them runs one block of calls, the order rotates, and a ratio is
taken within a round. The tables show the median and the quartiles of these ratios, and the ratio of the best times.

All rivals of a contest do the same job: the same input and the same gradient of the output; gradients for all that can
learn are returned, not added to `.grad`; compilation and warm-up come before the clock.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from ._version import __version__
from .errors import GrkanImportError, GrkanRuntimeError, GrkanValueError
from .models import spline as spline_layers
from .models.spline import GRID
from .models.spline import ORDER as SPLINE_ORDER
from .nn import GRKAN, GroupRational
from .rational import op
from .rational.op import group_rational
from .train.progress import make_console
from .writing import check_writable, write_bytes

BLOCK = 0.01
"""Seconds of a block: long against the clock's resolution, short against the drift of the machine's speed."""

HEAVY, TURNS_OF_HEAVY = 6, 3
"""A rival of more than six times the baseline's time takes part in the last three rounds only. Those that are a hundred
times slower would take nearly all of the time for digits that nobody needs; and they leave caches and allocator in a
state in which whoever comes next takes up to twice its time."""

GROUPS = 8


# Measuring.


@dataclass(frozen=True)
class Ratio:
    """The time of a rival in units of another's."""

    median: float
    low: float
    high: float
    minima: float

    @classmethod
    def of(cls, times: Sequence[float], others: Sequence[float]) -> "Ratio":
        """Median and quartiles of the ratios round by round, and the ratio of the smallest times."""
        common = min(len(times), len(others))  # a heavy rival was in the last rounds only
        ratios = [a / b for a, b in zip(times[-common:], others[-common:], strict=True)]
        low, median, high = statistics.quantiles(ratios * (2 if len(ratios) == 1 else 1), n=4, method="inclusive")
        return cls(median, low, high, min(times) / min(others))

    @classmethod
    def mean(cls, ratios: Sequence["Ratio"]) -> "Ratio":
        """The geometric mean of each figure."""
        return cls(*(statistics.geometric_mean(getattr(r, name) for r in ratios) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Rival:
    """What is called, and what is known about it without a clock, such as its number of parameters.

    `traffic` are the bytes that a call has to read and write at least; 0: that is not what limits it.
    """

    call: Callable[[], object]
    facts: Mapping[str, int] = field(default_factory=dict)
    traffic: int = 0


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call, in each round or in the last few, see HEAVY; `calls` of them made a block."""

    seconds: list[float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Contest:
    """One job for several rivals. They are made when the contest starts, so that only its own tensors take memory."""

    job: Mapping[str, Any]
    baseline: str
    enter: Callable[[], Mapping[str, Rival]]


@dataclass(frozen=True)
class Result:
    """A contest that took place."""

    job: Mapping[str, Any]
    baseline: str
    measurements: Mapping[str, Measurement]
    facts: Mapping[str, Mapping[str, int]]
    traffic: Mapping[str, int]

    def ratio(self, rival: str, other: str | None = None) -> Ratio:
        """Time of `rival` / time of `other`, by default the baseline."""
        measured = self.measurements
        return Ratio.of(measured[rival].seconds, measured[other or self.baseline].seconds)

    def rates(self, rival: str) -> dict[str, float]:
        """What `rival` does a second, if something of it can be counted."""
        counts = {"images per second": self.job.get("batch", 0), "bytes per second": self.traffic[rival]}
        return {name: count / self.measurements[rival].median for name, count in counts.items() if count}


@dataclass(frozen=True)
class Bar:
    """What a ratio has to reach."""

    name: str
    limit: float
    ratio: Ratio
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.ratio.median >= self.limit if self.at_least else self.ratio.median <= self.limit


@dataclass(frozen=True)
class Suite:
    """Contests, the bars that their results are held against, and what a reader of the tables has to know."""

    contests: Sequence[Contest]
    bars: Callable[[Sequence[Result]], list[Bar]]
    notes: Sequence[str] = ()


def compete(
    calls: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    *,
    block: float,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Measurement]:
    """Let rivals take turns.

    Args:
        calls: by name, what each does.
        baseline: one of these names.
        rounds: how often each has its turn, but for heavy ones, see HEAVY.
        block: how long a turn takes, in seconds, if a single call does not take longer.
        clock: gives seconds, when all work is done that was asked for before.
        advance: called after every round.
    """

    def turn(call: Callable[[], object], repetitions: int) -> float:
        if repetitions > 1:  # brings back to the caches what the rival before threw out
            call()
        start = clock()
        for _ in range(repetitions):
            call()
        return (clock() - start) / repetitions

    names = list(calls)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # The first of the two calls warms up, and compiles what is compiled.
        expected = {name: max(1e-9, min(turn(calls[name], 1) for _ in range(2))) for name in names}
        repetitions = {name: max(1, round(block / expected[name])) for name in names}
        heavy = {name for name in names if expected[name] > HEAVY * expected[baseline]}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name not in heavy or number >= rounds - TURNS_OF_HEAVY:
                    seconds[name].append(turn(calls[name], repetitions[name]))
            advance()
    finally:
        if collects:
            gc.enable()
    return {name: Measurement(seconds[name], repetitions[name]) for name in names}


def _clock(device: str) -> Callable[[], float]:
    """A call only queues what a GPU has to do: the clock waits for the end of it."""

    def wait() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wait if device == "cuda" else time.perf_counter


def bytes_kept(module: nn.Module, x: Tensor) -> int:
    """Bytes that `module(x)` keeps for its backward: those of all storages that it saves, except its parameters'."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.detach()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


FORWARD, TRAINING = "forward", "forward + backward"


def _task(
    pass_: str, function: Callable[..., Tensor], x: Tensor, learned: Sequence[Tensor], grad: Tensor
) -> Callable[[], object]:
    """One pass of function(x, *learned)."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x, *learned)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x, *learned), (x, *learned), grad)

    return forward if pass_ == FORWARD else forward_and_backward


# Rivals of the rational function. x is (..., C), C a multiple of the groups G; a is (G, m + 1), b is (G, n). As in
# grkan, the arithmetic is float32 for half types. All are F with the denominator 1 + |A(x)|, as one would write it.


def rational_by_loop(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A loop that takes one power of x after the other."""
    z = _grouped(x, a)
    numerator = sum(a[:, i, None] * z**i for i in range(a.shape[1]))
    inner = sum(b[:, j, None] * z ** (j + 1) for j in range(b.shape[1]))
    return (numerator / (1 + inner.abs())).flatten(-2).to(x.dtype)  # type: ignore[union-attr]


def rational_by_powers(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """All powers at once, in a dimension of their own, and a matrix product with the coefficients."""
    z = _grouped(x, a)
    powers = z.unsqueeze(-1) ** torch.arange(max(a.shape[1], b.shape[1] + 1), device=x.device)
    numerator = powers[..., : a.shape[1]] @ a.unsqueeze(-1)
    inner = powers[..., 1 : b.shape[1] + 1] @ b.unsqueeze(-1)
    return (numerator / (1 + inner.abs())).flatten(-3).to(x.dtype)


def rational_by_horner(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Horner's method: what `rational/reference.py` does, without its care for extreme x."""
    z = _grouped(x, a)
    numerator, inner = a[:, -1, None], b[:, -1, None]
    for i in range(a.shape[1] - 2, -1, -1):
        numerator = torch.addcmul(a[:, i, None], numerator, z)
    for j in range(b.shape[1] - 2, -1, -1):
        inner = torch.addcmul(b[:, j, None], inner, z)
    return (numerator / (1 + (inner * z).abs())).flatten(-2).to(x.dtype)


def spline(x: Tensor, coefficients: Tensor) -> Tensor:
    """For every group of channels a B-spline of order 3 on [-1, 1]; coefficients is (G, 11), for 8 intervals.

    As the rational function, one spline serves a group of channels. (In the first KANs, each weight had its own.)
    """
    return (spline_bases(_grouped(x, coefficients)) @ coefficients.unsqueeze(-1)).flatten(-3).to(x.dtype)


def spline_bases(x: Tensor, grid: int = GRID, order: int = SPLINE_ORDER) -> Tensor:
    """The grid + order B-splines that do not vanish on [-1, 1], in a new last dimension.

    By Cox and de Boor's recursion, vectorised as usual in KANs, over the scalars and the knots. The knots are uniform,
    and `order` of them lie beyond each end.
    """
    knots = torch.arange(-order, grid + order + 1, dtype=x.dtype, device=x.device) * (2 / grid) - 1
    x = x.unsqueeze(-1)
    bases = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
    for k in range(1, order + 1):
        rising = (x - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
        falling = (knots[k + 1 :] - x) / (knots[k + 1 :] - knots[1:-k])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def _grouped(x: Tensor, coefficients: Tensor) -> Tensor:
    """(..., C) to (..., G, C / G), float32 or wider."""
    return x.unflatten(-1, (coefficients.shape[0], -1)).to(torch.promote_types(x.dtype, torch.float32))


class SplineKAN(spline_layers.SplineKAN):
    """The layer of the first KANs, with a spline for every weight, and the bases as usual."""

    def bases(self, x: Tensor) -> Tensor:
        return spline_bases(x)


# The suites.

OPS_SHAPES = ((8, 197, 192), (8, 197, 768), (8, 197, 3072))
"""8 images of 197 tokens: the width of tiny; its hidden width, which is the width of base; the hidden width of base."""

GPU_SHAPES = tuple((128, *shape[1:]) for shape in OPS_SHAPES)
"""A GPU needs more images to be busy: with eight, launching a kernel takes longer than running it."""

LAYER_WIDTHS = (192, 384, 768)
"""Tiny, small and base."""


def ops(
    device: str = "cpu",
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Suite:
    """Activations: grkan's rational function, others' ways to compute it, and other functions."""
    shapes = shapes or (OPS_SHAPES if device == "cpu" else GPU_SHAPES)
    notes = _notes(device)
    reason = _why_no_compiler(device)
    if reason:
        notes.append(f"torch.compile does not work here, so the compiled rivals are left out: {reason}")
    contests = [
        Contest(
            {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch."), "pass": pass_},
            "GELU" if device == "cpu" else "clone",
            partial(_activations, device, shape, dtype, pass_, reason is None),
        )
        for dtype in dtypes
        for pass_ in (FORWARD, TRAINING)
        for shape in shapes
    ]
    # What a call costs when there is nothing to compute; its name keeps it out of the means below.
    contests += [
        Contest(
            {"shape": "1x192", "dtype": "float32", "pass": f"one call, {pass_}"}, "GELU", partial(_door, device, pass_)
        )
        for pass_ in (FORWARD, TRAINING)
    ]

    def bars(results: Sequence[Result]) -> list[Bar]:
        ours, longer, float32 = "grkan (5,4)", "grkan (7,6)", {"dtype": "float32"}
        found = [
            ("forward / GELU", 0.60, float32, FORWARD, ours, "GELU"),
            ("forward + backward / GELU", 0.75, float32, TRAINING, ours, "GELU"),
            ("forward + backward / compiled Horner", 0.40, float32, TRAINING, ours, "Horner, compiled"),
            ("bfloat16, forward + backward / GELU", 0.80, {"dtype": "bfloat16"}, TRAINING, ours, "GELU"),
            ("(7,6) / (5,4), forward + backward", 1.35, float32, TRAINING, longer, ours),
            ("B-spline / grkan, forward", 9.3, float32, FORWARD, "B-spline", ours),
        ]
        made = []
        for name, limit, job, pass_, rival, other in found:
            wanted = {**job, "pass": pass_}.items()
            ratios = [
                r.ratio(rival, other)
                for r in results
                if wanted <= r.job.items() and {rival, other} <= r.measurements.keys()
            ]
            if ratios:
                made.append(Bar(name, limit, Ratio.mean(ratios), at_least=rival == "B-spline"))
        return made

    return Suite(contests, bars, notes)


def _activations(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, pass_: str, compiles: bool
) -> dict[str, Rival]:
    torch.manual_seed(0)
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    rational, longer = (
        tuple(GroupRational(GROUPS, "swish", order, device=device).parameters()) for order in ((5, 4), (7, 6))
    )
    curve = (torch.randn(GROUPS, GRID + SPLINE_ORDER, device=device).requires_grad_(),)
    entries: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "clone": (torch.clone, ()),
        "GELU": (F.gelu, ()),
        "SiLU": (F.silu, ()),
        "powers in a loop": (rational_by_loop, rational),
        "powers at once": (rational_by_powers, rational),
        "Horner": (rational_by_horner, rational),
        "B-spline": (spline, curve),
        "grkan (5,4)": (group_rational, rational),
        "grkan (7,6)": (group_rational, longer),
    }
    if compiles:
        entries["Horner, compiled"] = (_compiled(rational_by_horner), rational)
        entries["B-spline, compiled"] = (_compiled(spline), curve)
    if device != "cpu":  # those that keep all powers or bases take tens of gigabytes for tensors of this size
        entries = {name: entry for name, entry in entries.items() if "powers" not in name and "spline" not in name}

    def tensors(name: str) -> int:
        """A forward reads x and writes y; a backward reads x and grad and writes dx, but for clone there is none."""
        return 2 if pass_ == FORWARD or name == "clone" else 5

    return {
        name: Rival(_task(pass_, function, x, learned, grad), traffic=tensors(name) * x.nbytes)
        for name, (function, learned) in entries.items()
    }


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for one shape, which gives faster code than for any."""
    torch.compiler.reset()  # a function may be compiled for a few shapes only
    return torch.compile(function, fullgraph=True, dynamic=False)


def _why_no_compiler(device: str) -> str | None:
    try:
        _compiled(torch.sin)(torch.zeros(16, device=device))
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return None


class _Nothing(torch.autograd.Function):
    """An operation of three arguments that computes nothing: what autograd in Python costs in itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def _door(device: str, pass_: str) -> dict[str, Rival]:
    """A call with a gradient on 192 scalars, and the parts of ours."""
    x, grad = torch.randn(2, 1, 192, device=device)
    x.requires_grad_()
    a, b = learned = tuple(GroupRational(GROUPS, "swish", device=device).parameters())
    kernel = op.find_kernel(device) or op.REFERENCE

    def alone() -> None:
        with torch.no_grad():
            kernel.forward(x, a, b, "abs_of_sum", 192 // GROUPS)
            if pass_ == TRAINING:
                kernel.backward(grad, x, a, b, "abs_of_sum", 192 // GROUPS, False)

    def task(function: Callable[..., Tensor], *learned: Tensor) -> Rival:
        # Unlike elsewhere the forward is recorded: that is a part of the call.
        return Rival(partial(function, x, *learned) if pass_ == FORWARD else _task(pass_, function, x, learned, grad))

    return {
        "GELU": task(F.gelu),
        "SiLU": task(F.silu),
        "grkan": task(group_rational, *learned),
        "its kernel, without autograd": Rival(alone),
        "an empty autograd.Function": task(_Nothing.apply, *learned),
    }


def layers(device: str = "cpu", widths: Sequence[int] = LAYER_WIDTHS, batch: int = 8, tokens: int = 197) -> Suite:
    """The MLP of a transformer, pairs of B-spline KAN layers, and GRKAN, of widths d, 4d, d; input (8, 197, d)."""
    from .models import kat  # noqa: F401  (its ImportError names the extra that brings timm)

    contests = [
        Contest({"width": width, "pass": pass_}, "Mlp", partial(_layers, device, width, (batch, tokens, width), pass_))
        for width in widths
        for pass_ in (FORWARD, TRAINING)
    ]

    def bars(results: Sequence[Result]) -> list[Bar]:
        trained = [r for r in results if r.job["pass"] == TRAINING]
        return [_bytes_bar(f"bytes kept, GRKAN / Mlp, width {r.job['width']}", 0.60, r, "GRKAN") for r in trained]

    return Suite(contests, bars, _notes(device))


def _layers(device: str, width: int, shape: tuple[int, ...], pass_: str) -> dict[str, Rival]:
    from timm.layers import Mlp

    from .models.operations import count_operations

    torch.manual_seed(0)
    x, grad = torch.randn(shape, device=device).requires_grad_(), torch.randn(shape, device=device)
    hidden = 4 * width
    products = 2 * 2 * width * hidden
    # Operations a token as the paper counts them: a B-spline KAN evaluates the bases for every weight anew.
    edge = round(9 * SPLINE_ORDER * (GRID + 1.5 * SPLINE_ORDER) + 2 * GRID - 2.5 * SPLINE_ORDER + 3)
    entries = {
        "Mlp": (Mlp(width, hidden), products),
        "B-spline KAN": (_spline_pair(width, hidden), 2 * width * hidden * edge),
        "B-spline KAN, hidden d": (_spline_pair(width, width), 2 * width * width * edge),
        "GRKAN": (GRKAN(width, hidden, num_groups=GROUPS), products + (2 * 5 + 2 * 4 + 3) * (width + hidden)),
    }
    rivals = {}
    for name, (module, operations) in entries.items():
        module.to(device)
        call = _task(pass_, _functional(module), x, tuple(module.parameters()), grad)
        facts = {}
        if pass_ == TRAINING:
            facts = {
                "parameters": sum(p.numel() for p in module.parameters()),
                "operations a token": operations,
                "multiply-adds a token": count_operations(module, shape[1:])["multiply_adds"] // shape[1],
                "bytes kept": bytes_kept(module, x),
            }
        rivals[name] = Rival(call, facts)
    return rivals


def _spline_pair(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(SplineKAN(width, hidden), SplineKAN(hidden, width))


def _functional(module: nn.Module) -> Callable[..., Tensor]:
    """The module with its own parameters, which are passed only for their gradients to be asked for."""
    return lambda x, *parameters: module(x)


def models(
    device: str = "cpu",
    names: tuple[str, str] = ("vit_tiny_patch16_224", "kat_tiny_patch16_224"),
    batches: Sequence[int] = (8, 32),
) -> Suite:
    """A Vision Transformer against the KAT of its size: a whole training step with AdamW, and inference."""
    from .models import kat  # noqa: F401  (registers the models; its ImportError names the extra that brings timm)

    contests = [
        Contest({"batch": batch, "pass": pass_}, names[0], partial(_models, device, names, batch, pass_))
        for batch in batches
        for pass_ in ("training step", "inference")
    ]

    def bars(results: Sequence[Result]) -> list[Bar]:
        made = [
            Bar(f"{r.job['pass']}, batch {r.job['batch']}, KAT / ViT", 1.03, r.ratio(names[1], names[0]))
            for r in results
        ]
        return [
            *made,
            *(
                _bytes_bar(f"bytes kept, batch {r.job['batch']}, KAT / ViT", 0.80, r, names[1])
                for r in results
                if r.job["pass"] == "training step"
            ),
        ]

    return Suite(contests, bars, _notes(device))


def _models(device: str, names: Sequence[str], batch: int, pass_: str) -> dict[str, Rival]:
    import timm

    torch.manual_seed(0)
    rivals = {}
    for name in names:
        model = timm.create_model(name).to(device)
        images = torch.randn(batch, *model.default_cfg["input_size"], device=device)
        if pass_ == "inference":
            rivals[name] = Rival(partial(_infer, model.eval(), images))
            continue
        labels = torch.randint(model.num_classes, (batch,), device=device)
        # A rate so low that the model stays what it is while the clock runs.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8)
        parameters = sum(p.numel() for p in model.parameters())
        facts = {"parameters": parameters, "bytes kept": bytes_kept(model, images)}
        rivals[name] = Rival(partial(_train_step, model, optimizer, images, labels), facts)
    return rivals


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


@torch.inference_mode()
def _infer(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _bytes_bar(name: str, limit: float, result: Result, rival: str) -> Bar:
    ratio = result.facts[rival]["bytes kept"] / result.facts[result.baseline]["bytes kept"]
    return Bar(name, limit, Ratio(ratio, ratio, ratio, ratio))


def _notes(device: str) -> list[str]:
    if op.find_kernel(device):
        return []
    command = op.BUILD_COMMAND if device == "cpu" else op.TRITON_COMMAND
    return [f"this installation has no native kernel: grkan is plain PyTorch here; to get it: {command}"]


SUITES: dict[str, Callable[..., Suite]] = {"ops": ops, "layers": layers, "models": models}
DEVICES = ("cpu", "cuda")


# The command.


def bench(
    suite: str,
    rounds: int = 15,
    threads: int | None = None,
    path: str | Path | None = None,
    device: str = "cpu",
) -> tuple[list[Result], list[Bar]]:
    """Run a suite, with a progress bar on a terminal; print its tables, and write everything that was measured as JSON.

    Args:
        suite: "ops", "layers" or "models".
        rounds: how often the rivals take turns.
        threads: of PyTorch; None: as many as it takes by itself.
        path: the JSON file; None: none.
        device: "cpu", or "cuda", which is PyTorch's name for AMD's GPUs, too. The bars are those of the CPU; on a GPU
            there are none.

    Raises:
        ValueError: there is no such suite or device, or rounds or threads are less than 1.
        RuntimeError: there is no GPU.
        ImportError: timm is missing; "ops" does without.
        OSError: the file cannot be written.
    """
    if suite not in SUITES:
        raise GrkanValueError(f"suite must be one of {', '.join(map(repr, SUITES))}; got {suite!r}")
    for name, value in (("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise GrkanValueError(f"{name} must be at least 1; got {value}")
    if device not in DEVICES:
        raise GrkanValueError(f"device must be one of {', '.join(map(repr, DEVICES))}; got {device!r}")
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
        about = {"command": command, **describe_machine(device)}
        results = _run(made, suite, rounds, device)
    finally:
        torch.set_num_threads(threads_before)
    bars = made.bars(results) if device == "cpu" else []
    console = make_console()
    for result in results:
        console.print(_table(result))
        if result.facts[result.baseline]:
            console.print(_facts_table(result))
    if bars:
        console.print(_bars_table(bars))
    for line in (*made.notes, ", ".join(f"{key} {value}" for key, value in about.items())):
        console.print(line, soft_wrap=True)
    if path is not None:
        report = {
            "suite": suite,
            **about,
            "notes": list(made.notes),
            "contests": [_as_json(result) for result in results],
            "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        }
        write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())
    return results, bars


def bench_kernels(path: str | Path | None = None) -> None:
    """Compile the GPU kernels for GPUs that need not be there; print what came of it, and others' figures.

    Args:
        path: a file for the same as JSON; None: none.

    Raises:
        ImportError: Triton is missing, or too old to have what this needs.
        RuntimeError: Triton's interpreter is on.
        OSError: the file cannot be written.
    """
    check_writable(path)
    try:
        import triton

        if problem := op.why_too_old(triton.__version__):
            raise GrkanImportError(problem)
        from .rational import gpu_stats
    except ImportError as error:
        raise GrkanImportError(
            f"grkan bench kernels needs Triton; install it by: {op.TRITON_COMMAND} ({error})"
        ) from error
    cases, found = list(gpu_stats.all_cases()), []
    console = make_console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for case in bar.track(cases, description="kernels"):
            found.append(gpu_stats.stats(*case))
    versions = {"grkan": __version__, "triton": triton.__version__, "torch": torch.__version__}
    about = {"command": "grkan bench kernels", **versions, "python": platform.python_version()}
    console = make_console()
    for target in dict.fromkeys(s.target for s in found):
        console.print(_kernels_table(target, [s for s in found if s.target == target], gpu_stats.RATES.get(target)))
    table = Table(title="others' kernels", title_justify="left")
    for column in ("kernel", "pass", "a scalar", "source"):
        table.add_column(column)
    for other in gpu_stats.PUBLISHED:
        table.add_row(other.name, other.kernel, other.figures, other.source)
    console.print(table)
    console.print(
        "registers, and bytes of stack, a lane; bits of the widest load and store; instructions a scalar: in the loop, "
        "and with what is around it (at most); bytes a scalar. An estimate is 10^9 scalars a second, and their limit; "
        "nothing ran on a GPU.",
        soft_wrap=True,
    )
    limits = "; ".join(f"{kernel} {order}: {n}" for (kernel, order), n in gpu_stats.INSTRUCTIONS.items())
    console.print(
        f"bars, met by {sum(s.met for s in found)} of {len(found)}: no stack, atomics or barriers, 128 bits, sums of "
        f"the chunks below 2 % of the bytes; for sm_90, bfloat16 and float32, instructions in the loop ({limits}) and "
        f"for order (5, 4) {gpu_stats.REGISTERS} registers at most",
        soft_wrap=True,
    )
    for rates in gpu_stats.RATES.values():
        console.print(f"{rates.gpu}: {rates.source}", soft_wrap=True)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    if path is not None:
        kernels = [{**asdict(s), "met": s.met, "estimate": _estimate_as_json(s.estimate())} for s in found]
        report = {
            "suite": "kernels",
            **about,
            "rates": {target: asdict(rates) for target, rates in gpu_stats.RATES.items()},
            "kernels": kernels,
            "others": [asdict(other) for other in gpu_stats.PUBLISHED],
        }
        write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())


def _estimate_as_json(estimate: tuple[float, str] | None) -> dict[str, Any] | None:
    return None if estimate is None else {"scalars per second": estimate[0], "limit": estimate[1]}


def _kernels_table(target: str, found: Sequence[Any], rates: Any) -> Table:
    title = target
    if rates:
        title += (
            f"; estimate for {rates.gpu}: {rates.memory / 1e12:.3g} TB/s, {rates.issue / 1e12:.3g} T instructions/s"
        )
        title += f", {rates.arithmetic / 1e12:.3g} T of float32 arithmetic"
    table = Table(title=title, title_justify="left")
    for column in ("kernel", "dtype", "order", "form"):
        table.add_column(column)
    for column in ("registers", "stack", "bits", "atomics", "barriers", "instructions", "bytes", "bars", "estimate"):
        table.add_column(column, justify="right")
    for s in found:
        estimate = s.estimate()
        table.add_row(
            *(s.kernel, s.dtype, f"({s.order[0]},{s.order[1]})", s.form, str(s.registers), str(s.stack)),
            *(f"{s.load}/{s.store}", str(s.atomics), str(s.barriers), f"{s.instructions:.1f} ({s.with_ends:.1f})"),
            *(
                f"{s.bytes:.2f}",
                "yes" if s.met else "no",
                f"{estimate[0] / 1e9:.0f}, {estimate[1]}" if estimate else "",
            ),
        )
    return table


def _run(suite: Suite, name: str, rounds: int, device: str) -> list[Result]:
    results = []
    clock = _clock(device)
    console = make_console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=len(suite.contests) * rounds)
        for contest in suite.contests:
            bar.update(task, description=f"{name}: {_title(contest.job)}")
            rivals = contest.enter()
            calls = {name: rival.call for name, rival in rivals.items()}
            advance = partial(bar.advance, task)
            measurements = compete(calls, contest.baseline, rounds, block=BLOCK, clock=clock, advance=advance)
            facts = {name: rival.facts for name, rival in rivals.items()}
            traffic = {name: rival.traffic for name, rival in rivals.items()}
            results.append(Result(contest.job, contest.baseline, measurements, facts, traffic))
    return results


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What figures depend on."""
    return {
        **({"gpu": torch.cuda.get_device_name(), "triton": _triton_version()} if device == "cuda" else {}),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "native kernel": op.find_kernel(device) is not None,
        "grkan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        # What others were doing just before: two busy cores make figures of two threads worthless.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _as_json(result: Result) -> dict[str, Any]:
    rivals = {}
    for name, measured in result.measurements.items():
        figures: dict[str, Any] = {"median": measured.median, "minimum": measured.minimum, **result.rates(name)}
        ratio = {"ratio": asdict(result.ratio(name))}
        rivals[name] = {**figures, **ratio, **result.facts[name], **asdict(measured)}
    return {"job": dict(result.job), "baseline": result.baseline, "rivals": rivals}


def _table(result: Result) -> Table:
    units = {"images per second": ("images/s", 1.0), "bytes per second": ("GB/s", 1e9)}
    table = Table(title=f"{_title(result.job)}; ratios to {result.baseline}", title_justify="left")
    table.add_column("")
    columns = [units[name][0] for name in result.rates(result.baseline)]
    for column in ("median", "minimum", "ratio", "quartiles", "of minima", *columns):
        table.add_column(column, justify="right")
    for name, measured in result.measurements.items():
        rates = [f"{rate / units[key][1]:.1f}" for key, rate in result.rates(name).items()]
        table.add_row(name, _time(measured.median), _time(measured.minimum), *_cells(result.ratio(name)), *rates)
    return table


def _facts_table(result: Result) -> Table:
    table = Table()
    table.add_column("")
    for column in result.facts[result.baseline]:
        table.add_column(column, justify="right")
    for name, facts in result.facts.items():
        table.add_row(name, *(f"{value:,}" for value in facts.values()))
    return table


def _bars_table(bars: Sequence[Bar]) -> Table:
    table = Table(title="bars; a ratio over several shapes is the geometric mean", title_justify="left")
    table.add_column("")
    for column in ("bar", "median", "quartiles", "of minima", "met"):
        table.add_column(column, justify="right")
    for bar in bars:
        limit = f"{'≥' if bar.at_least else '≤'} {bar.limit:.3g}"
        table.add_row(bar.name, limit, *_cells(bar.ratio), "yes" if bar.met else "no")
    return table


def _title(job: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" if isinstance(value, int) else str(value) for key, value in job.items())


def _cells(ratio: Ratio) -> tuple[str, str, str]:
    return _short(ratio.median), f"{_short(ratio.low)}-{_short(ratio.high)}", _short(ratio.minima)


def _short(ratio: float) -> str:
    """Three digits at least."""
    return f"{ratio:#.3g}".rstrip(".") if ratio < 1000 else f"{ratio:.0f}"


def _time(seconds: float) -> str:
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{_short(seconds * factor)} {unit}"
