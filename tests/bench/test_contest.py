import gc

import pytest
import torch
from torch import nn

from grkan.bench import contest
from grkan.bench.contest import Contest, Ratio, Rival, bytes_kept, clock_of, compete, hold


class Clock:
    """Time passes when a rival works, and at no other time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def rival(self, *seconds):
        """A call that takes the first of these times, the next time the second, and so on, over and over."""
        times = list(seconds)

        def work():
            times.append(times.pop(0))
            self.now += times[-1]

        return work


def test_ratios_by_a_clock_of_our_own():
    clock = Clock()
    found = compete({"a": clock.rival(0.001), "b": clock.rival(0.003)}, "a", rounds=5, block=0.009, clock=clock)
    assert [found[name].calls for name in "ab"] == [9, 3]
    assert [found[name].median for name in "ab"] == pytest.approx([0.001, 0.003])
    ratio = Ratio.of(found["b"].seconds, found["a"].seconds)
    assert [ratio.median, ratio.low, ratio.high, ratio.minima] == pytest.approx([3, 3, 3, 3])


def test_a_drift_of_the_machine_is_not_in_the_ratios():
    clock = Clock()
    drift = [1.0, 1.0, 1.0, 2.0, 4.0, 8.0]  # the first two are the warm-up
    rivals = {"a": clock.rival(*drift), "b": clock.rival(*(1.5 * t for t in drift))}
    found = compete(rivals, "a", rounds=4, block=0.0, clock=clock)
    assert found["a"].seconds == pytest.approx(drift[2:])
    ratio = Ratio.of(found["b"].seconds, found["a"].seconds)
    assert [ratio.low, ratio.high] == pytest.approx([1.5, 1.5])


def test_quartiles_and_minima():
    ratio = Ratio.of([1.0, 2.0, 3.0, 4.0, 10.0], [1.0, 1.0, 1.0, 1.0, 2.0])
    assert (ratio.low, ratio.median, ratio.high, ratio.minima) == (2.0, 3.0, 4.0, 1.0)
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5, 1.5)


def test_the_order_rotates_and_every_round_has_all():
    turns = []
    found = compete({name: lambda name=name: turns.append(name) for name in "abc"}, "a", rounds=4, block=0.0)
    assert "".join(turns[6:]) == "abc" + "bca" + "cab" + "abc"
    assert all(len(measured.seconds) == 4 for measured in found.values())


def test_a_heavy_rival_comes_last_and_is_compared_within_its_rounds():
    clock = Clock()
    heavy = [0.1, 0.1, 0.3, 0.4, 0.5]  # the first two are the warm-up
    quick = [0.01, 0.01, 0.01, 0.02, 0.03, 0.04, 0.05]
    rivals = {"heavy": clock.rival(*heavy), "quick": clock.rival(*quick)}
    found = compete(rivals, "quick", rounds=5, block=0.0, clock=clock)
    assert found["quick"].seconds == pytest.approx(quick[2:])
    assert found["heavy"].seconds == pytest.approx(heavy[2:])
    ratio = Ratio.of(found["heavy"].seconds, found["quick"].seconds)
    assert [ratio.low, ratio.high] == pytest.approx([10, 10])
    inverse = Ratio.of(found["quick"].seconds, found["heavy"].seconds)
    assert inverse.median == pytest.approx(0.1)


def test_the_collector_of_garbage_waits():
    states = []
    compete({"a": lambda: states.append(gc.isenabled())}, "a", rounds=2, block=0.0)
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        compete({"a": lambda: 1 / 0}, "a", rounds=1, block=0.0)
    assert gc.isenabled()


def test_the_clock_waits_for_what_a_gpu_was_given_to_do(monkeypatch):
    clock, queue = Clock(), []
    monkeypatch.setattr(contest.time, "perf_counter", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: [work() for work in queue] and queue.clear())
    rivals = {"a": clock.rival(0.001), "b": clock.rival(0.003)}
    calls = {name: lambda work=work: queue.append(work) for name, work in rivals.items()}
    found = compete(calls, "a", rounds=3, block=0.009, clock=clock_of("cuda"))
    assert [found[name].calls for name in "ab"] == [9, 3]
    assert found["a"].seconds == pytest.approx([0.001] * 3)
    assert found["b"].seconds == pytest.approx([0.003] * 3)


def test_bytes_kept():
    x = torch.randn(5, 4, requires_grad=True)
    # the linear layer keeps x, GELU the 5 x 3 that it gets; weights are no activations
    assert bytes_kept(nn.Sequential(nn.Linear(4, 3), nn.GELU()), x) == 4 * (5 * 4 + 5 * 3)
    # what two operations share counts once: sigmoid keeps its output, the linear layer its input, which is the same
    assert bytes_kept(nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3)), x) == 4 * (5 * 4)
    assert bytes_kept(nn.Identity(), x) == 0


def test_a_contest_is_held():
    clock = Clock()
    job = {"batch": 3}
    rivals = {"a": Rival(clock.rival(0.5), {"parameters": 7}, traffic=10), "b": Rival(clock.rival(0.25))}
    advanced = []
    result = hold(Contest(job, "a", lambda: rivals), 2, clock=clock, advance=lambda: advanced.append(1))
    assert (result.job, result.baseline, len(advanced)) == (job, "a", 2)
    assert result.measurements["b"].seconds == [0.25, 0.25]
    assert result.facts == {"a": {"parameters": 7}, "b": {}}
    assert result.ratio("b") == Ratio(0.5, 0.5, 0.5, 0.5)
    assert result.rates("a") == {"images per second": 6.0, "bytes per second": 20.0}
    assert result.rates("b") == {"images per second": 12.0}
