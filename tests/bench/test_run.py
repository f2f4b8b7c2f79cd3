import json
import subprocess
import sys
import textwrap

import pytest
import torch

from grkan import cli
from grkan.bench import kernels, run, run_suite, suites
from grkan.bench.rivals import TRAINING
from grkan.rational import dispatch

pytestmark = pytest.mark.usefixtures("tiny")


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    path, threads = tmp_path / "layers.json", torch.get_num_threads()
    assert cli.main(["bench", "layers", "--rounds=3", "--threads=1", "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "grkan bench layers --rounds 3 --threads 1 --device cpu" in out
    assert {"width 8, forward; ratios to Mlp", "B-spline KAN, hidden d"} <= {
        part.strip() for line in out.splitlines() for part in (line, line.strip("│ ").partition("│")[0])
    }
    report = json.loads(path.read_text())
    assert report["suite"] == "layers"
    assert report["threads"] == 1
    assert {"processor", "cores", "vectors", "native kernel", "torch", "grkan", "python", "date"} <= report.keys()
    contest = report["contests"][1]
    assert contest["job"] == {"width": 8, "pass": TRAINING}
    assert len(contest["rivals"]["GRKAN"]["seconds"]) == 3


def test_what_nobody_set_is_fifteen_rounds_on_the_cpu(monkeypatch, capsys):
    held = []
    monkeypatch.setattr(run, "hold", lambda contest, rounds, **_: held.append(rounds))
    monkeypatch.setattr(run.report, "contest_tables", lambda result: [])
    assert cli.main(["bench", "layers"]) == 0
    assert held == [15] * 4
    assert f"--rounds 15 --threads {torch.get_num_threads()} --device cpu" in capsys.readouterr().out


def test_figures_are_not_judged(tmp_path, capsys):
    """What grkan wants of itself is in benchmarks/, and nothing that a user sees."""
    path = tmp_path / "ops.json"
    run_suite("ops", rounds=1, path=path)
    assert not {"bar", "bars", "met"} & set(capsys.readouterr().out.replace(",", " ").split())
    assert "bars" not in json.loads(path.read_text())


def test_on_a_gpu(monkeypatch, tmp_path, capsys):
    waits = []
    ops = suites.SUITES["ops"]
    monkeypatch.setitem(suites.SUITES, "ops", lambda device: ops("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(dispatch, "find_kernel", lambda device: dispatch.REFERENCE)
    path = tmp_path / "ops.json"
    assert cli.main(["bench", "ops", "--device=cuda", "--rounds=1", "--json", str(path)]) == 0
    assert waits
    out = capsys.readouterr().out
    assert all(text in out for text in ("--device cuda", "gpu A GPU", "ratios to clone", "GB/s"))
    report = json.loads(path.read_text())
    assert report["gpu"] == "A GPU"
    assert report["contests"][0]["rivals"]["clone"]["bytes per second"] > 0


def test_notes_are_printed(monkeypatch, capsys):
    monkeypatch.setitem(suites.SUITES, "layers", lambda device: suites.Suite([], ["g++ is not there"]))
    assert run_suite("layers") == []
    assert "g++ is not there\n" in capsys.readouterr().out


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
        (["kernels", "--rounds=15"], 1, "--rounds cannot be used with kernels"),
        (["kernels", "--threads=2"], 1, "--threads cannot be used with kernels"),
        (["kernels", "--device=cpu"], 1, "--device cannot be used with kernels"),
    ],
)
def test_mistakes_are_told_in_one_line_and_at_once(arguments, status, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "hold", None)  # nothing is measured
    monkeypatch.setattr(kernels, "stats", None)  # or compiled
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        assert cli.main(["bench", *arguments]) == status
    except SystemExit as end:
        assert end.code == status  # noqa: PT017
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_errors_of_the_function():
    with pytest.raises(ValueError, match="suite must be 'ops' or 'layers' or 'models' or 'deploy'; got 'kernels'"):
        run_suite("kernels")
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        run_suite("ops", rounds=0)
    with pytest.raises(ValueError, match="threads must be at least 1; got 0"):
        run_suite("ops", threads=0)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'; got 'mps'"):
        run_suite("ops", device="mps")


def test_kernels_are_compiled_and_shown(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    cases = [(target, "forward", "bfloat16", "abs_of_sum", (5, 4)) for target in ("sm_90", "sm_100")]
    monkeypatch.setattr(kernels, "all_cases", lambda: iter(cases))
    path = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(path.read_text())
    assert report["suite"] == "kernels"
    assert {"grkan", "triton", "torch", "python", "rates", "others"} <= report.keys()
    assert [kernel["target"] for kernel in report["kernels"]] == ["sm_90", "sm_100"]
    assert (report["kernels"][0]["load"], report["kernels"][0]["stack"]) == (128, 0)
    assert "sm_90; estimate for H100 SXM" in out
    assert "nothing was run on a GPU" in out
    assert all(rates["source"] in out for rates in report["rates"].values())
    assert "FlashKAT" in out
