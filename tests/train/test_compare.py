import ast
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grkan.train import compare as module
from grkan.train.compare import compare, make_runs
from grkan.train.config import make_config
from grkan.train.loop import TrainingError, train

ARGUMENTS = {"depth": 1, "embed_dim": 16, "num_heads": 2}
RUNS = {
    "KAT": {"model": "kat_micro_patch2_8", "model_args": ARGUMENTS, "epochs": 1, "batch_size": 256},
    "ViT": {"model": "grkan_vit_micro_patch2_8", "model_args": ARGUMENTS, "epochs": 1, "batch_size": 256},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return folder, compare(RUNS, folder)


def test_runs_end_side_by_side(compared):
    folder, summaries = compared
    assert list(summaries) == ["KAT", "ViT"]
    assert summaries == json.loads((folder / "comparison.json").read_text())["runs"]
    assert (folder / "curves.png").stat().st_size > 1000
    assert summaries["KAT"]["parameters"] > summaries["ViT"]["parameters"]


def test_finished_runs_are_not_repeated(compared, monkeypatch):
    folder, summaries = compared
    monkeypatch.setattr(module, "train", lambda config: pytest.fail("trained again"))
    before = (folder / "KAT" / "metrics.jsonl").read_bytes()
    again = compare(RUNS, folder)
    assert {name: s["top1"] for name, s in again.items()} == {name: s["top1"] for name, s in summaries.items()}
    assert (folder / "KAT" / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_other_settings_is_refused(compared):
    with pytest.raises(ValueError, match=r"KAT holds a run with epochs = 1, not 2; choose another --output"):
        compare({"KAT": {**RUNS["KAT"], "epochs": 2}}, compared[0])


def test_a_run_that_saved_nothing_starts_afresh(tmp_path):
    folder = tmp_path / "ViT"
    folder.mkdir()
    (folder / "config.yaml").write_text("lr: 1.0e+20")
    summaries = compare({"ViT": RUNS["ViT"]}, tmp_path)
    assert summaries["ViT"]["epochs"] == 1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"epoch": 1}, "unknown setting 'epoch'"),
        (
            {"model_args": {**ARGUMENTS, "num_heads": 3}},
            "model_args do not fit grkan_vit_micro_patch2_8: .*num_heads=3",
        ),
        ({"model": "grkan_vit_micro_patch2"}, "model .*grkan_vit_micro_patch2_8"),
    ],
)
def test_a_mistake_in_any_run_is_found_before_the_first_starts(mistake, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare({"KAT": RUNS["KAT"], "ViT": {**RUNS["ViT"], **mistake}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_does_not_import_what_stands_above_it():
    for path in Path(module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            names |= set((node.module or "").split(".")) if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"cli", "bench"}, path


SEEDS = {
    "ViT": {**RUNS["ViT"], "seeds": 2},
    "KAT": {**RUNS["KAT"], "seeds": 3, "against": "ViT"},
}


def test_gains_are_taken_seed_by_seed(tmp_path):
    summaries = compare(SEEDS, tmp_path, jobs=2)
    assert list(summaries) == ["ViT/seed-0", "ViT/seed-1", "KAT/seed-0", "KAT/seed-1", "KAT/seed-2"]
    top1 = {name: summary["last_top1"] for name, summary in summaries.items()}
    found = json.loads((tmp_path / "comparison.json").read_text())["variants"]
    kat, vit = found["KAT"], found["ViT"]
    assert (kat["seeds"], vit["seeds"], vit["gain"]) == (3, 2, None)
    assert kat["top1"]["values"] == [top1[f"KAT/seed-{seed}"] for seed in range(3)]
    assert kat["top1"]["mean"] == pytest.approx(np.mean(kat["top1"]["values"]))
    assert kat["top1"]["deviation"] == pytest.approx(np.std(kat["top1"]["values"], ddof=1))
    expected = [top1[f"KAT/seed-{seed}"] - top1[f"ViT/seed-{seed}"] for seed in range(2)]
    assert kat["gain"]["values"] == pytest.approx(expected)
    table = (tmp_path / "comparison.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table] == ["run", "---", "ViT", "KAT"]
    assert f"| {np.mean(expected):+.2f} ± {np.std(expected, ddof=1):.2f} | ViT |" in table[3]
    assert (tmp_path / "scores.png").stat().st_size > 1000
    assert not (tmp_path / "curves.png").exists()
    # A run in a process beside others is the same run.
    alone = train(make_config({**RUNS["KAT"], "seed": 1, "output": str(tmp_path / "alone")}))
    assert alone["last_loss"] == pytest.approx(summaries["KAT/seed-1"]["last_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be a number of seeds, at least 1; got 0 for KAT"),
        ({"seeds": [1, 2]}, r"seeds must be a number of seeds, at least 1; got \[1, 2\] for KAT"),
        ({"against": "DeiT"}, r"against must name another run \(KAT, ViT\); got 'DeiT' for KAT"),
        ({"output": "x"}, "output must not be set for a run, because each run has its own folder in .*; KAT sets it"),
        ({"against": ["ViT"]}, r"against must name another run \(KAT, ViT\); got \['ViT'\] for KAT"),
        ({"against": "KAT"}, r"against must name another run \(KAT, ViT\); got 'KAT' for KAT"),
    ],
)
def test_seeds_and_rivals_that_make_no_sense(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        compare({**RUNS, "KAT": {**RUNS["KAT"], **change}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_a_killed_run_of_several_jobs_ends_the_comparison(tmp_path, which):
    others = set(multiprocessing.active_children())

    def kill():
        while len(children := set(multiprocessing.active_children()) - others) < 2:
            time.sleep(0.1)
        sorted(children, key=lambda child: child.pid)[which].kill()

    runs = {name: {**settings, "epochs": 10**9} for name, settings in RUNS.items()}
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TrainingError, match=r"the process of a run was killed; run the same command again to continue"):
        compare(runs, tmp_path, jobs=2)
    killer.join()
    deadline = time.monotonic() + 30  # the other one saves its state first
    while (left := set(multiprocessing.active_children()) - others) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_several_jobs_leave_states_and_no_process_behind(tmp_path, number):
    runs = {name: {**settings, "epochs": 10**6, "workers": 1} for name, settings in RUNS.items()}
    started = (
        "import json, sys; from grkan.train.compare import compare; compare(json.loads(sys.argv[1]), sys.argv[2], 2)"
    )
    command = [sys.executable, "-c", started, json.dumps(runs), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as main:
        while main.poll() is None and not all((tmp_path / name / "state" / "state.pt").exists() for name in runs):
            time.sleep(0.1)
        family = _descendants(main.pid)
        assert len(family) >= 4
        main.send_signal(number)
        err = main.communicate(timeout=60)[1]
    assert main.returncode == (143 if number == signal.SIGTERM else -number)
    assert err == "" or number == signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


def _descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*children, *(pid for child in children for pid in _descendants(child))]


def test_ctrl_c_is_for_the_process_that_started_the_others():
    with module._handling(signal.SIGINT, signal.default_int_handler):  # a shell ignores it for what runs behind
        with module._handling(signal.SIGINT, signal.SIG_IGN):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "runs must map the name of each run to its settings, unless --models is given; got None"),
        ({"runs": ["KAT"]}, r"runs must map the name of each run to its settings, .*; got \['KAT'\]"),
        ({"runs": {"KAT": None}}, "runs must map the name of each run to its settings; got None for KAT"),
        ({"runs": {1: {}}}, "the name of a run must be a valid folder name; got 1"),
        ({"runs": {"../KAT": {}}}, r"the name of a run must be a valid folder name; got '\.\./KAT'"),
        ({"runs": {"..": {}}}, r"the name of a run must be a valid folder name; got '\.\.'"),
    ],
)
def test_runs_that_are_none(content, message):
    with pytest.raises(ValueError, match=message):
        make_runs(content, None, {})


def test_a_model_that_is_named_twice():
    with pytest.raises(ValueError, match="--models must name each model once; got a twice"):
        make_runs({}, ["a", "b", "a"], {})


def test_settings_of_all_of_one_and_given_ones():
    content = {
        "lr": 1,
        "model_args": {"depth": 1, "num_heads": 2},
        "runs": {"a": {"lr": 2, "model_args": {"depth": 2}}},
    }
    given = {"lr": 3, "model_args": {"embed_dim": 16}}
    assert make_runs(content, None, {}) == {"a": {"lr": 2, "model_args": {"depth": 2, "num_heads": 2}}}
    assert make_runs(content, None, given)["a"]["lr"] == 3
    assert make_runs(content, None, given)["a"]["model_args"] == {"depth": 2, "num_heads": 2, "embed_dim": 16}
    assert make_runs(content, ["b"], {})["b"] == {"model": "b", "lr": 1, "model_args": {"depth": 1, "num_heads": 2}}


def test_an_error_in_one_of_several_jobs_ends_the_comparison(tmp_path):
    """And the others, which would take for ever."""
    runs = {"long": {**RUNS["KAT"], "epochs": 10**9}, "bad": {**RUNS["KAT"], "lr": 1e20, "warmup_epochs": 0}}
    with pytest.raises(TrainingError, match=r"the (loss|weight .*) is (nan|inf|not finite)"):
        compare(runs, tmp_path, jobs=2)


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="runs must have at least one run"):
        compare({}, tmp_path)
