import dataclasses
import json
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grkan
from grkan import bench, cli
from grkan.bench import FORWARD, TRAINING, Ratio, bytes_kept, compete
from grkan.rational import op, reference

VALUES = [bench.rational_by_loop, bench.rational_by_powers, bench.rational_by_horner]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Suites of the same rivals on next to no work; what is compiled elsewhere is called as it is."""
    ops, layers, models = bench.ops, bench.layers, bench.models
    monkeypatch.setitem(bench.SUITES, "ops", partial(ops, shapes=((2, 16), (1, 3, 8))))
    monkeypatch.setitem(bench.SUITES, "layers", partial(layers, widths=(8, 16), batch=2, tokens=3))
    names = ("grkan_vit_micro_patch2_8", "kat_micro_patch2_8")
    monkeypatch.setitem(bench.SUITES, "models", partial(models, names=names, batches=(1, 2)))
    monkeypatch.setattr(bench, "BLOCK", 0.0)
    monkeypatch.setattr(bench, "_compiled", lambda function: function)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is so small only waits for other threads
    yield
    torch.set_num_threads(threads)


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


# Measuring.


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
    mean = Ratio.mean([Ratio(1, 2, 3, 4), Ratio(4, 8, 3, 1)])
    assert [mean.median, mean.low, mean.high, mean.minima] == pytest.approx([2, 4, 3, 2])


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
    import gc

    states = []
    compete({"a": lambda: states.append(gc.isenabled())}, "a", rounds=2, block=0.0)
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        compete({"a": lambda: 1 / 0}, "a", rounds=1, block=0.0)
    assert gc.isenabled()


def test_the_clock_waits_for_what_a_gpu_was_given_to_do(monkeypatch):
    clock, queue = Clock(), []
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: [work() for work in queue] and queue.clear())
    rivals = {"a": clock.rival(0.001), "b": clock.rival(0.003)}
    calls = {name: lambda work=work: queue.append(work) for name, work in rivals.items()}
    found = compete(calls, "a", rounds=3, block=0.009, clock=bench._clock("cuda"))
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


# Rivals.


def _problem(order=(5, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 5, 8), (2, order[0] + 1))]
    tensors += [torch.randn(2, order[1], generator=generator, dtype=torch.float64), torch.randn(3, 5, 8)]
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("order", [(5, 4), (7, 6), (1, 1)])
@pytest.mark.parametrize("function", VALUES)
def test_rationals_agree_with_the_reference(function, order):
    x, a, b, grad = _problem(order)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    expected = reference.rational(x.unflatten(-1, (2, 4)), a, b, "abs_of_sum").flatten(-2)
    found = function(x, a, b)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), gradients)


@pytest.mark.parametrize("function", VALUES)
def test_half_types_get_float32_arithmetic(function):
    x, a, b, _ = _problem(dtype=torch.float32)
    half = x.bfloat16()
    assert torch.equal(function(half, a, b), function(half.float(), a, b).bfloat16())


def test_the_spline_is_that_of_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)  # past the last knots, where it is 0
    coefficients = torch.randn(1, 11, dtype=torch.float64)
    knots = np.linspace(-1 - 3 / 4, 1 + 3 / 4, 15)
    bases = [interpolate.BSpline.basis_element(knots[i : i + 5], extrapolate=False)(x.numpy()) for i in range(11)]
    expected = sum(c * np.nan_to_num(basis) for c, basis in zip(coefficients[0].tolist(), bases, strict=True))
    np.testing.assert_allclose(bench.spline(x, coefficients).numpy(), expected, atol=1e-12)
    inside = x[x.abs() < 1]
    whole = interpolate.BSpline(knots, coefficients[0].numpy(), 3)
    np.testing.assert_allclose(bench.spline(inside, coefficients).numpy(), whole(inside.numpy()), atol=1e-12)


def test_each_group_has_its_spline():
    x, coefficients = torch.randn(4, 6), torch.randn(2, 11)
    halves = [bench.spline(half, row[None]) for half, row in zip(x.chunk(2, -1), coefficients, strict=True)]
    torch.testing.assert_close(bench.spline(x, coefficients), torch.cat(halves, -1))


def test_the_spline_layer_is_a_sum_over_inputs_and_bases():
    layer, x = bench.SplineKAN(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    curves = torch.einsum("nik,jik->nj", bench.spline_bases(x), layer.spline)
    torch.testing.assert_close(layer(x), torch.nn.functional.silu(x) @ layer.base.T + curves)


# Suites.

OPS = [
    "clone", "GELU", "SiLU", "powers in a loop", "powers at once", "Horner", "B-spline", "grkan (5,4)", "grkan (7,6)",
    "Horner, compiled", "B-spline, compiled",
]  # fmt: skip


def test_ops():
    results, bars = bench.bench("ops", rounds=2)
    jobs = [(r.job["shape"], r.job["dtype"], r.job["pass"]) for r in results]
    shapes, dtypes = ("2x16", "1x3x8"), ("float32", "bfloat16")
    expected = [(shape, dtype, pass_) for dtype in dtypes for pass_ in (FORWARD, TRAINING) for shape in shapes]
    assert jobs[:8] == expected
    assert [job[0] for job in jobs[8:]] == ["1x192", "1x192"]
    for result in results[:8]:
        assert list(result.measurements) == OPS
        assert all(len(m.seconds) == 2 and m.minimum > 0 for m in result.measurements.values())
    assert {"GELU", "grkan", "an empty autograd.Function"} <= results[-1].measurements.keys()
    assert [bar.limit for bar in bars] == [0.60, 0.75, 0.40, 0.80, 1.35, 9.3]
    by_hand = [r.ratio("grkan (5,4)", "Horner, compiled").median for r in results[2:4]]
    assert bars[2].ratio.median == pytest.approx((by_hand[0] * by_hand[1]) ** 0.5)
    by_hand = [r.ratio("B-spline", "grkan (5,4)").minima for r in results[0:2]]
    assert bars[5].ratio.minima == pytest.approx((by_hand[0] * by_hand[1]) ** 0.5)


def test_every_rival_gives_its_gradients():
    rivals = bench._activations("cpu", (2, 16), torch.bfloat16, TRAINING, compiles=True)
    for name, rival in rivals.items():
        gradients = rival.call()
        assert [g.dtype for g in gradients] == [torch.bfloat16] + [torch.float32] * (len(gradients) - 1), name
        assert len(gradients) == (1 if name in OPS[:3] else 2 if "spline" in name else 3), name


@pytest.mark.parametrize("suite", ["ops", "layers", "models"])
def test_all_is_on_the_device(suite):
    """On the meta device, as there may be no other: what meets a tensor of the CPU raises, or is seen."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            seen.update(t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    for contest in bench.SUITES[suite]("meta").contests:
        for name, rival in contest.enter().items():
            seen = set()
            with Devices():
                rival.call()
            # AdamW counts its steps on the CPU.
            assert seen - ({"cpu"} if "step" in str(contest.job) else set()) == {"meta"}, name


def test_on_a_gpu(monkeypatch, tmp_path, capsys):
    """No bars, which are those of a CPU; what a GPU's memory could do instead."""
    ops, waits = bench.SUITES["ops"], []
    monkeypatch.setitem(bench.SUITES, "ops", lambda device: ops("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(op, "find_kernel", lambda device: op.REFERENCE)
    path = tmp_path / "ops.json"
    assert cli.main(["bench", "ops", "--device=cuda", "--rounds=1", "--json", str(path)]) == 0
    assert waits
    out = capsys.readouterr().out
    assert all(text in out for text in ("--device cuda", "gpu A GPU", "ratios to clone", "GB/s"))
    assert "bar" not in out
    report = json.loads(path.read_text())
    assert (report["gpu"], report["bars"]) == ("A GPU", [])
    forward, training = report["contests"][0]["rivals"], report["contests"][2]["rivals"]
    assert list(forward) == ["clone", "GELU", "SiLU", "Horner", "grkan (5,4)", "grkan (7,6)", "Horner, compiled"]
    size = 2 * 16 * 4
    for figures, name, tensors in [(forward, "clone", 2), (forward, "GELU", 2), (training, "grkan (5,4)", 5)]:
        assert figures[name]["bytes per second"] == pytest.approx(tensors * size / figures[name]["median"])


def test_layers():
    results, bars = bench.bench("layers", rounds=1)
    assert [(r.job["width"], r.job["pass"]) for r in results] == [(w, p) for w in (8, 16) for p in (FORWARD, TRAINING)]
    facts = results[1].facts
    assert list(facts) == ["Mlp", "B-spline KAN", "B-spline KAN, hidden d", "GRKAN"]
    products = 2 * 8 * 32
    assert facts["Mlp"]["parameters"] == products + 32 + 8
    assert facts["GRKAN"]["parameters"] == products + 32 + 8 + 2 * 8 * (6 + 4)
    assert facts["B-spline KAN"]["parameters"] == 12 * products
    assert facts["B-spline KAN, hidden d"]["parameters"] == 12 * 2 * 8 * 8
    assert facts["Mlp"]["operations a token"] == 2 * products
    assert facts["GRKAN"]["operations a token"] == 2 * products + 21 * (8 + 32)
    assert facts["Mlp"]["multiply-adds a token"] == facts["GRKAN"]["multiply-adds a token"] == products
    assert facts["B-spline KAN"]["multiply-adds a token"] == 12 * products
    assert facts["Mlp"]["bytes kept"] == 4 * 2 * 3 * (8 + 32 + 32)
    assert [bar.limit for bar in bars] == [0.60, 0.60]
    assert bars[0].ratio.median == facts["GRKAN"]["bytes kept"] / facts["Mlp"]["bytes kept"]


def test_models():
    results, bars = bench.bench("models", rounds=1)
    assert [(r.job["batch"], r.job["pass"]) for r in results] == [
        (batch, pass_) for batch in (1, 2) for pass_ in ("training step", "inference")
    ]
    assert all(list(r.measurements) == ["grkan_vit_micro_patch2_8", "kat_micro_patch2_8"] for r in results)
    assert [bar.limit for bar in bars] == [1.03] * 4 + [0.80] * 2
    assert bars[1].ratio == results[1].ratio("kat_micro_patch2_8")


def test_a_training_step_trains():
    model, images, labels = nn.Linear(4, 2), torch.randn(3, 4), torch.tensor([0, 1, 1])
    before = model.weight.clone()
    bench._train_step(model, torch.optim.AdamW(model.parameters(), lr=0.1), images, labels)
    assert not torch.equal(model.weight, before)


def test_without_the_kernel(monkeypatch):
    monkeypatch.setattr(op, "KERNELS", {})
    monkeypatch.setattr(op, "_noticed", {"cpu"})
    suite = bench.ops(shapes=((2, 16),), dtypes=(torch.float32,))
    assert "no native kernel: grkan is plain PyTorch here" in suite.notes[0]
    for contest in suite.contests:
        for rival in contest.enter().values():
            rival.call()


def test_without_a_compiler(monkeypatch, capsys):
    def fail(function):
        raise RuntimeError("g++ is not there\nand more")

    monkeypatch.setattr(bench, "_compiled", fail)
    suite = bench.ops(shapes=((2, 16),), dtypes=(torch.float32,))
    monkeypatch.setitem(bench.SUITES, "ops", lambda device: suite)
    results, bars = bench.bench("ops", rounds=1)
    assert list(results[0].measurements) == OPS[:9]
    assert [bar.limit for bar in bars] == [0.60, 0.75, 1.35, 9.3]  # not those of what did not run
    assert "the compiled rivals are left out: g++ is not there\n" in capsys.readouterr().out


def test_a_missing_timm_is_named_with_its_extra():
    code = """
    import sys, warnings
    sys.modules["timm"] = None
    warnings.simplefilter("ignore")
    from grkan.cli import main
    sys.exit(main(["bench", "layers"]) + main(["bench", "models"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert done.stderr.count('pip install "grkan[models]"') == 2


# The command.


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    path, threads = tmp_path / "layers.json", torch.get_num_threads()
    assert cli.main(["bench", "layers", "--rounds=3", "--threads=1", "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "grkan bench layers --rounds 3 --threads 1" in out
    assert {"width 8, forward; ratios to Mlp", "B-spline KAN, hidden d"} <= {
        part.strip() for line in out.splitlines() for part in (line, line.strip("│ ").partition("│")[0])
    }
    report = json.loads(path.read_text())
    assert report["suite"] == "layers"
    assert report["threads"] == 1
    assert {"processor", "cores", "vectors", "native kernel", "torch", "grkan", "python", "date"} <= report.keys()
    contest = report["contests"][1]
    assert contest["job"] == {"width": 8, "pass": TRAINING}
    figures = contest["rivals"]["GRKAN"]
    assert sorted(figures["seconds"])[1] == figures["median"]
    assert min(figures["seconds"]) == figures["minimum"]
    assert figures["ratio"].keys() == {"median", "low", "high", "minima"}
    assert figures["bytes kept"] > 0
    assert report["bars"][0].keys() == {"name", "limit", "ratio", "at_least", "met"}


def test_json_of_models_has_images_per_second(tmp_path):
    path = tmp_path / "models.json"
    bench.bench("models", rounds=1, path=path)
    figures = json.loads(path.read_text())["contests"][2]["rivals"]["kat_micro_patch2_8"]
    assert figures["images per second"] == pytest.approx(2 / figures["median"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["oops"], 2, "invalid choice: 'oops'"),
        (["ops", "--rounds=0"], 2, "--rounds: must be a whole number, at least 1; got 0"),
        (["ops", "--threads=-1"], 2, "--threads: must be a whole number, at least 1; got -1"),
        (["ops", "--device=tpu"], 2, "--device: invalid choice: 'tpu'"),
        (["ops", "--device=cuda"], 1, "device is 'cuda', but PyTorch finds no GPU"),
        (["ops", "--json", "nowhere/ops.json"], 1, "nowhere: there is no such folder"),
        (["kernels", "--json", "nowhere/kernels.json"], 1, "nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_told_in_one_line_and_at_once(arguments, status, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_run", None)  # nothing is measured
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        assert cli.main(["bench", *arguments]) == status
    except SystemExit as end:
        assert end.code == status  # noqa: PT017
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_errors_of_the_function():
    with pytest.raises(ValueError, match="suite must be one of 'ops', 'layers', 'models'; got 'kernels'"):
        bench.bench("kernels")
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        bench.bench("ops", rounds=0)
    with pytest.raises(ValueError, match="device must be one of 'cpu', 'cuda'; got 'mps'"):
        bench.bench("ops", device="mps")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234, "1.23 s"), (0.0124, "12.4 ms"), (5e-6, "5.00 µs"), (0.1, "100 ms")]
)
def test_times_have_a_unit(seconds, text):
    assert bench._time(seconds) == text


@pytest.mark.parametrize(("ratio", "text"), [(0.7512, "0.751"), (1.0, "1.00"), (124.4, "124"), (1251.2, "1251")])
def test_ratios_have_three_digits(ratio, text):
    assert bench._short(ratio) == text


# The compiled kernels.


@pytest.fixture
def gpu_stats():
    pytest.importorskip("triton")
    from grkan.rational import gpu_stats

    return gpu_stats


def test_kernels_are_compiled_and_shown(gpu_stats, monkeypatch, tmp_path, capsys):
    cases = [(target, "forward", "bfloat16", "abs_of_sum", (5, 4)) for target in ("sm_90", "sm_100")]
    monkeypatch.setattr(gpu_stats, "all_cases", lambda: iter(cases))
    path = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(path.read_text())
    assert {"grkan", "triton", "torch", "python", "rates", "others"} <= report.keys()
    first, second = report["kernels"]
    assert (first["load"], first["stack"], first["bytes"]) == (128, 0, 4)
    assert first["estimate"] == {"scalars per second": 3.35e12 / 4, "limit": "memory"}
    assert second["estimate"] is None  # whose rates are not there
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if " (5,4) " in line]
    for row, kernel in zip(rows, report["kernels"], strict=True):
        assert row[:6] == ["forward", "bfloat16", "(5,4)", "abs_of_sum", str(kernel["registers"]), "0"]
        assert row[9].startswith(f"{kernel['instructions']:.1f} (")
    assert [row[-1] for row in rows] == ["838, memory", ""]
    assert "sm_90; estimate for H100 SXM" in out
    assert "nothing ran on a GPU" in out
    assert all(rates["source"] in out for rates in report["rates"].values())
    assert "FlashKAT" in out


def test_a_number_that_breaks_a_bar_is_shown(gpu_stats, monkeypatch, tmp_path, capsys):
    good = gpu_stats.Stats(
        "sm_90", "backward", "float32", "abs_of_sum", (5, 4), vector=4, registers=80, stack=0, load=128, store=128,
        atomics=0, barriers=0, instructions=52.0, with_ends=55.0, arithmetic=30.0, bytes=12.2, sums=0.2,
    )  # fmt: skip
    bad = [
        {"registers": 81}, {"stack": 8}, {"load": 64}, {"store": 32}, {"atomics": 1}, {"barriers": 1},
        {"instructions": 52.25}, {"sums": 0.25},
        {"order": (7, 6), "instructions": 70.25}, {"kernel": "forward", "instructions": 20.25},
        {"kernel": "forward", "order": (7, 6), "instructions": 26.25},
    ]  # fmt: skip
    others = [
        {"order": (7, 6), "registers": 90, "instructions": 70.0},  # no bar for registers,
        {"kernel": "backward with F", "instructions": 60.0},  # for instructions,
        {"target": "sm_90", "dtype": "float64", "registers": 200, "instructions": 200.0},  # or for either
    ]
    found = [good, *(dataclasses.replace(good, **change) for change in (*bad, *others))]
    monkeypatch.setattr(gpu_stats, "all_cases", lambda: [()] * len(found))
    monkeypatch.setattr(gpu_stats, "stats", iter(found).__next__)
    path = tmp_path / "kernels.json"
    bench.bench_kernels(path)
    out = capsys.readouterr().out
    words = [line.split("│")[-3].strip() for line in out.splitlines() if "abs_of_sum" in line]
    assert words == ["yes"] + ["no"] * len(bad) + ["yes"] * len(others)
    assert [kernel["met"] for kernel in json.loads(path.read_text())["kernels"]] == [word == "yes" for word in words]
    assert f"met by 4 of {len(found)}" in out


def test_estimates_are_those_of_the_roofline(gpu_stats):
    at = gpu_stats.Stats(
        "sm_80", "forward", "bfloat16", "abs_of_sum", (5, 4), vector=8, registers=50, stack=0, load=128, store=128,
        atomics=0, barriers=0, instructions=9.0, with_ends=10.0, arithmetic=5.0, bytes=4.0, sums=0.0,
    )  # fmt: skip
    assert at.estimate() == (pytest.approx(2.039e12 / 4), "memory")
    assert dataclasses.replace(at, with_ends=100.0).estimate() == (pytest.approx(108 * 128 * 1.41e9 / 100), "issue")
    assert dataclasses.replace(at, arithmetic=30.0).estimate() == (pytest.approx(108 * 64 * 1.41e9 / 30), "arithmetic")


@pytest.mark.parametrize("width", [192, 384])
def test_a_block_keeps_at_most_three_fifths_of_what_the_mlp_keeps(width):
    """x and the output of fc1, 5 d floats a token, where the MLP keeps 9 d."""
    x = torch.randn(2, 197, width, requires_grad=True)
    kept = bytes_kept(grkan.GRKAN(width, 4 * width), x)
    assert kept == 5 * x.numel() * 4
    assert kept <= 0.60 * bytes_kept(Mlp(width, 4 * width), x)


def test_kat_tiny_keeps_at_most_four_fifths_of_what_vit_tiny_keeps():
    x = torch.randn(2, 3, 224, 224)
    kat, vit = (timm.create_model(f"{name}_tiny_patch16_224").train() for name in ("kat", "vit"))
    assert bytes_kept(kat, x) <= 0.80 * bytes_kept(vit, x)
