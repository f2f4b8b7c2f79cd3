"""Measuring: rivals take turns in one process, and a ratio of two of them is taken within a round.

The speed of a machine drifts, so that times taken one after the other say little about each other. Here each rival runs
one block of calls in every round, and the order rotates; both terms of a ratio then come from the same moment.

All rivals of a contest do the same job: the same input and the same gradient of the output; gradients for all that can
learn are returned, not added to `.grad`; compilation and warm-up come before the clock.
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
"""Seconds of a block: long against the clock's resolution, short against the drift of the machine's speed."""

HEAVY, TURNS_OF_HEAVY = 6, 3
"""A rival of more than six times the baseline's time takes part in the last three rounds only. Those that are a hundred
times slower would take nearly all of the time for digits that nobody needs; and they leave caches and allocator in a
state in which whoever comes next takes up to twice its time."""


@dataclass(frozen=True)
class Rival:
    """What is called, and what is known about it without a clock, such as its number of parameters.

    `traffic` are the bytes that a call has to read and write at least; 0: that is not what limits it.
    """

    call: Callable[[], object]
    facts: Mapping[str, float] = field(default_factory=dict)
    traffic: int = 0


@dataclass(frozen=True)
class Contest:
    """One job for several rivals. They are made when the contest starts, so that only its own tensors take memory."""

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
        """Median and quartiles of the ratios round by round, and the ratio of the smallest times."""
        common = min(len(times), len(others))  # a heavy rival was in the last rounds only
        ratios = [a / b for a, b in zip(times[-common:], others[-common:], strict=True)]
        low, median, high = statistics.quantiles(ratios * (2 if len(ratios) == 1 else 1), n=4, method="inclusive")
        return cls(median, low, high, min(times) / min(others))


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
class Result:
    """A contest that took place; measurements, facts and traffic are those of each rival."""

    job: Mapping[str, Any]
    baseline: str
    measurements: Mapping[str, Measurement]
    facts: Mapping[str, Mapping[str, float]]
    traffic: Mapping[str, int]

    def ratio(self, rival: str) -> Ratio:
        """Time of `rival` / time of the baseline."""
        return Ratio.of(self.measurements[rival].seconds, self.measurements[self.baseline].seconds)

    def rates(self, rival: str) -> dict[str, float]:
        """What `rival` does a second, if something of it can be counted."""
        counts = {"images per second": self.job.get("batch", 0), "bytes per second": self.traffic[rival]}
        return {name: count / self.measurements[rival].median for name, count in counts.items() if count}


def hold(
    contest: Contest,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> Result:
    """Let the rivals of a contest in, and let them compete; the arguments are those of `compete`."""
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
    """Let rivals take turns.

    Args:
        calls: by name, what each does.
        baseline: one of these names.
        rounds: how often each has its turn, but for heavy ones, see HEAVY.
        block: how long a turn takes, in seconds, if a single call does not take longer.
        clock: gives seconds, when all work is done that was asked for before; for a GPU that of `clock_of`.
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


def clock_of(device: str) -> Callable[[], float]:
    """A call only queues what a GPU has to do: its clock waits for the end of it."""

    def wait() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wait if device == "cuda" else time.perf_counter


def bytes_kept(
    function: Callable[..., object], x: Tensor, others: Sequence[Tensor] = (), learned: Iterable[Tensor] | None = None
) -> int:
    """Bytes that `function(x, *others, *learned)` keeps for its backward.

    Those of all storages that it saves, each counted once, except those of `learned`; None: the parameters of a module,
    which gets none of them as arguments.
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
