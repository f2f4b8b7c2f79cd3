"""Measure times: rivals take turns in one process, and the ratio of two of them is taken within a round.

The speed of a machine drifts, so times that are measured one after the other cannot be compared. Here each rival runs
one block of calls in every round, and the order rotates. Both terms of a ratio then come from the same moment.

All rivals of a contest do the same job: they get the same input and the same gradient of the output. Gradients of all
trainable tensors are returned, not added to `.grad`. Compilation and warm-up are not timed.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 0.01
"""Seconds per block: long compared with the clock's resolution, short compared with the drift of the machine."""

HEAVY, TURNS_OF_HEAVY = 6, 3
"""A rival that takes more than six times the baseline's time takes part in the last three rounds only. Rivals that are
a hundred times slower would use nearly all of the time for needless precision, and they leave caches and allocator in a
state in which the next rival takes up to twice its time."""


@dataclass(frozen=True)
class Rival:
    """A call to time, and facts that need no clock, such as its number of parameters.

    `traffic` is the number of bytes that a call must at least read and write; 0: memory does not limit it.
    """

    call: Callable[[], object]
    facts: Mapping[str, float] = field(default_factory=dict)
    traffic: int = 0


@dataclass(frozen=True)
class Contest:
    """One job for several rivals. They are made when the contest starts, so that no other tensors take memory."""

    job: Mapping[str, Any]
    baseline: str
    enter: Callable[[], Mapping[str, Rival]]


@dataclass(frozen=True)
class Ratio:
    """The time of a rival in units of another's."""

    median: float
    low: float
    high: float
    minima: float

    @classmethod
    def of(cls, times: Sequence[float], others: Sequence[float]) -> "Ratio":
        """Return median and quartiles of the ratios per round, and the ratio of the smallest times."""
        common = min(len(times), len(others))  # a heavy rival was in the last rounds only
        ratios = [a / b for a, b in zip(times[-common:], others[-common:], strict=True)]
        low, median, high = statistics.quantiles(ratios * (2 if len(ratios) == 1 else 1), n=4, method="inclusive")
        return cls(median, low, high, min(times) / min(others))


@dataclass(frozen=True)
class Measurement:
    """Seconds per call, in each round or in the last few (see HEAVY); a block had `calls` calls."""

    seconds: list[float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Result:
    """The result of a contest; measurements, facts and traffic are by rival."""

    job: Mapping[str, Any]
    baseline: str
    measurements: Mapping[str, Measurement]
    facts: Mapping[str, Mapping[str, float]]
    traffic: Mapping[str, int]

    def ratio(self, rival: str) -> Ratio:
        """Return the time of `rival` / the time of the baseline."""
        return Ratio.of(self.measurements[rival].seconds, self.measurements[self.baseline].seconds)

    def rates(self, rival: str) -> dict[str, float]:
        """Return what `rival` processes per second: images and bytes, if they are known."""
        counts = {"images per second": self.job.get("batch", 0), "bytes per second": self.traffic[rival]}
        return {name: count / self.measurements[rival].median for name, count in counts.items() if count}


def hold(
    contest: Contest,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> Result:
    """Make the rivals of a contest and let them compete; the arguments are those of `compete`."""
    rivals = contest.enter()
    calls = {name: rival.call for name, rival in rivals.items()}
    return Result(
        contest.job,
        contest.baseline,
        compete(calls, contest.baseline, rounds, block=BLOCK, clock=clock, advance=advance),
        facts={name: rival.facts for name, rival in rivals.items()},
        traffic={name: rival.traffic for name, rival in rivals.items()},
    )


def compete(
    calls: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    *,
    block: float = BLOCK,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Measurement]:
    """Let rivals take turns, and measure them.

    Args:
        calls: the call of each rival, by name.
        baseline: one of these names.
        rounds: the number of turns of each rival, except for heavy ones (see HEAVY).
        block: the length of a turn in seconds, unless a single call takes longer.
        clock: waits for all pending work and returns seconds; for a GPU use `clock_of`.
        advance: called after every round.
    """

    def turn(call: Callable[[], object], repetitions: int) -> float:
        if repetitions > 1:  # brings its data back to the caches after the previous rival
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


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock for a device. On a GPU it waits for queued work to finish."""

    def wait() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wait if device == "cuda" else time.perf_counter


def bytes_kept(
    function: Callable[..., object], x: Tensor, others: Sequence[Tensor] = (), learned: Iterable[Tensor] | None = None
) -> int:
    """Return the bytes that `function(x, *others, *learned)` keeps for its backward.

    These are the bytes of all storages that it saves, each counted once, except those of `learned`. None: the
    parameters of a module, which are not passed as arguments.
    """
    arguments = [x, *others]
    if learned is None:
        learned = function.parameters() if isinstance(function, nn.Module) else ()
    else:
        arguments += learned
    parameters = {p.untyped_storage().data_ptr() for p in learned}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.detach()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(*arguments)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
