"""The bars of benchmarks/, and what holds figures against them."""

import dataclasses
import json

import pytest

import bars
import tables
from grkan.bench import deploy, kernels, suites
from grkan.bench.report import kernels_as_json
from grkan.bench.rivals import INFERENCE

GOOD = kernels.Stats(
    "sm_90", "backward", "float32", "abs_of_sum", (5, 4), vector=4, registers=80, stack=0, load=128, store=128,
    atomics=0, barriers=0, instructions=52.0, with_ends=55.0, arithmetic=30.0, bytes=12.2, sums=0.2,
)  # fmt: skip


NAMES = {
    "ops": ["GELU", "grkan", "grkan (5,4)", "grkan (7,6)", "Horner, compiled", "B-spline"],
    "layers": ["Mlp", "GRKAN"],
    "models": ["vit_tiny_patch16_224", "kat_tiny_patch16_224"],
    "deploy": ["vit_tiny_patch16_224", "kat_tiny_patch16_224", f"kat_tiny_patch16_224{deploy.WITH_LIBRARY}"],
}
"""The rivals that the bars name."""


def report_of(suite, change=lambda job, name: 1.0):
    """What `grkan bench` would write, with the rivals' time and bytes kept in units of the baseline's."""
    contests = []
    for contest in suites.SUITES[suite]("cpu").contests:
        figures = {}
        for name in NAMES[suite]:
            figure = change(contest.job, name)
            figures[name] = {"seconds": [figure, 3 * figure, 2 * figure], "bytes kept": figure}
            if suite == "deploy":
                figures[name] |= {"nodes": figure, "difference": figure}
        contests.append({"job": contest.job, "rivals": figures})
    return {"suite": suite, "command": f"grkan bench {suite}", "contests": contests}


def report_of_kernels(*found):
    return {"suite": "kernels", "command": "grkan bench kernels", **json.loads(json.dumps(kernels_as_json(found)))}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(suites.rivals, "why_no_compiler", lambda device: None)  # nothing is run here
    monkeypatch.setattr(deploy, "missing", lambda runtime: None)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_the_contests_of_the_bars_are_held(suite):
    assert all(verdict.figure == pytest.approx(1) for verdict in bars.judge(report_of(suite)))


def test_the_rivals_of_the_bars_compete():
    small = {
        "ops": suites.ops(shapes=((1, 8),)).contests,
        "layers": suites.layers(widths=(8,), batch=1, tokens=1).contests,
        "models": [contest for contest in suites.models(batches=(1,)).contests if contest.job["pass"] == INFERENCE],
    }
    for suite, contests in small.items():
        assert set(NAMES[suite]) <= {name for contest in contests for name in contest.enter()}


def test_the_bars_of_kernels_name_what_is_compiled():
    found = [dataclasses.replace(GOOD, **dict(zip(("target", "kernel", "dtype", "form", "order"), case, strict=True)))
             for case in kernels.all_cases()]  # fmt: skip
    assert all(verdict.figure is not None for verdict in bars.judge(report_of_kernels(*found)))


def test_a_figure_is_a_geometric_mean_over_the_contests_that_are_named():
    times = {"8x197x192": 0.25, "8x197x768": 1.0, "8x197x3072": 0.5}

    def change(job, name):
        wanted = name == "grkan (5,4)" and (job["dtype"], job["pass"]) == ("float32", "forward")
        return times[job["shape"]] if wanted else 1.0

    first, *others = bars.judge(report_of("ops", change))
    assert (first.figure, first.met) == (pytest.approx(0.5), True)
    last = next(verdict for verdict in others if verdict.bar["of"] == "B-spline")
    assert (last.figure, last.met) == (pytest.approx(2.0), False)  # "at least"
    assert all(verdict.figure == pytest.approx(1) for verdict in others if verdict is not last)


def test_a_figure_alone_and_a_ratio_of_least_times():
    name = NAMES["deploy"][1]
    report = report_of("deploy", lambda job, rival: 2.0 if rival == name else 1.0)
    report["contests"][0]["rivals"][name]["seconds"] = [9.0, 1.25]
    verdicts = {(v.bar["figure"], v.bar["of"], v.bar.get("to"), v.bar["in"]["batch"]): v for v in bars.judge(report)
                if v.bar["in"]["runtime"] == deploy.ONNX_RUNTIME}  # fmt: skip
    assert verdicts["least time", name, NAMES["deploy"][0], 1].figure == pytest.approx(1.25)
    assert verdicts["nodes", name, None, 8].figure == pytest.approx(2.0)
    assert str(verdicts["nodes", name, None, 8]).endswith(f"nodes, {name}; ONNX Runtime; float32; 8")


def test_a_ratio_of_times_is_taken_within_a_round():
    report = report_of("models")
    training = report["contests"][0]["rivals"]
    training["vit_tiny_patch16_224"]["seconds"] = [1.0, 2.0, 8.0]
    training["kat_tiny_patch16_224"]["seconds"] = [1.5, 2.0, 12.0]
    assert bars.judge(report)[0].figure == pytest.approx(1.5)


def test_what_was_not_measured_is_not_met():
    report = report_of("ops")
    del report["contests"][3]["rivals"]["Horner, compiled"]  # no compiler
    del report["contests"][-1]
    missing = [verdict for verdict in bars.judge(report) if verdict.figure is None]
    assert [(verdict.bar["to"], verdict.met) for verdict in missing] == [("Horner, compiled", False), ("GELU", False)]
    assert "not measured" in str(missing[0])


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"registers": 81}, ["registers"]),
        ({"stack": 8}, ["stack"]),
        ({"load": 64}, ["load"]),
        ({"store": 32}, ["store"]),
        ({"atomics": 1}, ["atomics"]),
        ({"barriers": 1}, ["barriers"]),
        ({"sums": 0.25}, ["sums"]),
        ({"instructions": 55.25}, ["instructions"]),
        ({"order": (7, 6), "instructions": 70.25}, ["instructions"]),
        ({"kernel": "forward", "instructions": 20.25}, ["instructions"]),
        ({"kernel": "forward", "order": (7, 6), "instructions": 26.25}, ["instructions"]),
        ({"order": (7, 6), "registers": 90, "instructions": 70.0}, []),  # no bar for registers,
        ({"kernel": "backward with F", "instructions": 60.0}, []),  # for instructions,
        ({"dtype": "float64", "registers": 200, "instructions": 200.0}, []),  # or for either
    ],
)
def test_a_kernel_that_breaks_a_bar_is_found(change, broken):
    report = report_of_kernels(GOOD, dataclasses.replace(GOOD, **change), GOOD)
    assert [
        verdict.bar["figure"] for verdict in bars.judge(report) if verdict.figure is not None and not verdict.met
    ] == broken


def test_the_command_prints_each_bar_and_fails_if_one_is_missed(tmp_path, capsys):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(report_of("layers", lambda job, name: 0.6 if name == "GRKAN" else 1.0)))
    assert bars.main([str(path)]) == 0
    head, first, *_, last = capsys.readouterr().out.splitlines()
    assert head == "suite layers, command grkan bench layers"
    assert first.split(maxsplit=4) == ["met", "0.6", "≤", "0.6", "bytes kept, GRKAN / Mlp; 192; forward + backward"]
    assert last == "all 3 bars are met"
    path.write_text(
        json.dumps(report_of("layers", lambda job, name: 0.61 if (name, job["width"]) == ("GRKAN", 384) else 0.9))
    )
    assert bars.main([str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:4]] == ["missed"] * 3
    assert out[-1] == "3 of 3 bars are missed"


def test_without_files_everything_is_measured(monkeypatch, capsys):
    measured = []

    def write(suite, path, threads=None):
        assert (threads == 1) == (suite == "deploy")
        measured.append(suite)
        path.write_text(json.dumps(report_of_kernels(GOOD) if suite == "kernels" else report_of(suite)))

    monkeypatch.setattr(bars, "run_suite", write)
    monkeypatch.setattr(bars, "run_kernels", lambda path: write("kernels", path))
    assert bars.main([]) == 1
    assert measured == ["kernels", "ops", "layers", "models", "deploy"]
    assert capsys.readouterr().out.count("kat_tiny_patch16_224 / vit_tiny_patch16_224") == 6 + 4


def test_figures_of_a_gpu_are_refused(tmp_path, capsys):
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({**report_of("ops"), "gpu": "A GPU"}))
    with pytest.raises(SystemExit, match="2"):
        bars.main([str(path)])
    assert "the bars are those of a CPU" in capsys.readouterr().err


def test_the_tables_of_a_page_are_replaced(tmp_path):
    report = report_of("layers", lambda job, name: 0.6 if name == "GRKAN" else 1.0)
    report |= {"cores": 2, "processor": "P", "vectors": "AVX2", "torch": "2.14.1+cpu", "date": "2026-01-02T03:04:05"}
    for contest in report["contests"]:
        contest["baseline"] = "Mlp"
        for measured in contest["rivals"].values():
            measured["median"] = 2 * measured["seconds"][0]
            measured["ratio"] = {"median": measured["seconds"][0], "low": 0.5, "high": 11.0, "minima": 1.0}
    (tmp_path / "layers.json").write_text(json.dumps(report))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- layers -->\nold\n<!-- end -->\nbetween\n<!-- bars -->\n<!-- end -->\nafter\n")
    for _ in range(2):  # the marks stay
        tables.main([str(page), str(tmp_path / "layers.json")])
    text = page.read_text()
    assert text.startswith(
        "before\n<!-- layers -->\nMeasured by `grkan bench layers` on 2 cores of an P (AVX2), torch 2.14.1, "
    )
    assert "| GRKAN | 1.20 s, 0.600 (0.500-11.0) | 1.20 s, 0.600 (0.500-11.0) |" in text
    assert "| bytes kept, GRKAN / Mlp; 192; forward + backward | ≤ 0.6 | 0.6 | met |\n" in text
    assert "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")
    (tmp_path / "gpu.json").write_text(json.dumps({**report, "gpu": "A GPU"}))
    page.write_text("<!-- layers on a GPU -->\n<!-- end -->\n")  # and no bars
    tables.main([str(page), str(tmp_path / "gpu.json")])
    assert page.read_text().startswith(
        "<!-- layers on a GPU -->\nMeasured by `grkan bench layers` on A GPU, torch 2.14.1, "
    )
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="the page has no place for layers"):
        tables.main([str(page), str(tmp_path / "layers.json")])
    assert page.read_text() == "no marks"
