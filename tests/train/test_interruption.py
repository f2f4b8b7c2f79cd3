"""A run that is killed at any point and resumed ends like one that was left alone."""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grkan.train.checkpoint import load_state
from grkan.train.config import make_config, read_yaml
from grkan.train.interruption import SIGTERM_STATUS
from grkan.train.loop import resume, train
from grkan.train.metrics import read_metrics

# Everything that draws random numbers or keeps a state is on.
SETTINGS = {
    "model": "kat_micro_patch2_8",
    "model_args": {
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "num_groups": 4,
        "proj_drop_rate": 0.1,
        "drop_path_rate": 0.1,
    },
    "epochs": 2,
    "batch_size": 256,
    "accumulate": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "random_erasing": 0.5,
    "clip_grad": 1.0,
    "ema_decay": 0.9,
    "log_every": 1,
}
STEPS = 10


@pytest.fixture(scope="module")
def start(forkserver):
    """Starts a process and waits for its end; returns the exit status."""
    script = str(Path(__file__).with_name("killed_run.py"))

    def run(folder, settings, **ended_by):
        ways = dict.fromkeys(("kill_at_step", "kill_at_rename", "notice_at_step", "notice_at_test"))
        given = {"folder": str(folder), "settings": settings, **ways, **ended_by}
        process = forkserver.Process(target=runpy.run_path, args=(script, given))
        process.start()
        process.join(300)
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(folder, {**SETTINGS, "workers": 0}) == 0
    return folder


def _untimed(folder):
    timings = {"seconds", "cpu_seconds", "images_per_second"}
    return [{k: v for k, v in line.items() if k not in timings} for line in read_metrics(folder / "metrics.jsonl")]


def _assert_same_outcome(folder, expected):
    assert _untimed(folder) == _untimed(expected)
    for name in ("best.safetensors", "last.safetensors"):
        ours, theirs = load_file(folder / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = (load_state(f / "state" / "state.pt") for f in (folder, expected))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert not list(folder.rglob("*.tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "save_every", "seed"), [(0, 0, 1), (2, 2, 4)], ids=lambda value: str(value))
def test_killed_at_random_steps_and_resumed(start, undisturbed, tmp_path, workers, save_every, seed):
    folder = tmp_path / "run"
    settings = {**SETTINGS, "workers": workers, "save_every": save_every}
    # Each life must get beyond the last death's state, or it would die for ever: so the steps increase.
    deaths = sorted(random.Random(seed).sample(range(1, STEPS + 1), 3))
    for step in deaths:
        assert start(folder, settings, kill_at_step=step) == -signal.SIGKILL
    assert start(folder, settings) == 0
    _assert_same_outcome(folder, undisturbed)


@pytest.mark.slow
def test_killed_while_writing_and_resumed(start, undisturbed, tmp_path):
    folder = tmp_path / "run"
    settings = {**SETTINGS, "workers": 0, "save_every": 4}
    lives = 0
    # The k-th life dies in front of its k-th rename, whatever that is: a state, weights, a picture.
    while (status := start(folder, settings, kill_at_rename=lives + 2)) != 0:
        assert status == -signal.SIGKILL
        lives += 1
        assert list(folder.rglob("*.tmp*"))  # which the next life removes
    assert lives >= 3
    _assert_same_outcome(folder, undisturbed)


@pytest.mark.parametrize(
    ("workers", "notices"),
    [
        (2, [("step", 3), ("test", 2)]),
        pytest.param(
            0,
            [*(("step", step) for step in range(1, 6)), ("test", 1), *(("step", step) for step in range(6, STEPS + 1))],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sigterm_saves_the_state_and_the_same_call_goes_on(start, undisturbed, tmp_path, workers, notices):
    folder, settings = tmp_path / "run", {**SETTINGS, "workers": workers}
    for what, when in notices:
        before = load_state(folder / "state" / "state.pt") if (folder / "state").exists() else {"epoch": 0, "step": 0}
        if what == "step" and when <= 5 * before["epoch"] + before["step"]:
            continue  # the last life came so far
        assert start(folder, settings, **{f"notice_at_{what}": when}) == SIGTERM_STATUS == 143
        state = load_state(folder / "state" / "state.pt")
        after = 5 * state["epoch"] + state["step"] - (when if what == "step" else 5 * when)
        assert 0 <= after <= (2 if what == "step" else 0)
        stopped = (folder / "stopped").read_text()
        assert stopped == f"stopped by SIGTERM in epoch {state['epoch'] + 1}, after step {state['step']} of 5"
        children = (folder / "children").read_text().split()
        assert len(children) == (workers if what == "step" else 2 * workers)
        assert not any(os.path.exists(f"/proc/{child}") for child in children)
    assert start(folder, settings) == 0
    _assert_same_outcome(folder, undisturbed)


def test_a_run_may_be_resumed_with_other_micro_batches(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert resume(tmp_path / "run", {"accumulate": 4})["epochs"] == 2
    assert read_yaml(tmp_path / "run" / "config.yaml")["accumulate"] == 4


def test_the_same_call_goes_on_only_with_the_same_settings(undisturbed, tmp_path):
    settings = {**SETTINGS, "output": str(undisturbed), "workers": 0}
    assert train(make_config(settings), auto_resume=True)["epochs"] == 2
    with pytest.raises(ValueError, match=r"holds a run with lr = 0\.001, not 0\.01; choose another --output$"):
        train(make_config(settings, {"lr": 0.01}), auto_resume=True)
    with pytest.raises(
        ValueError, match=r"with epochs = 2, not 3; .*grkan train --init .*last\.safetensors --epochs N"
    ):
        train(make_config(settings, {"epochs": 3}), auto_resume=True)
    (tmp_path / "other").mkdir()
    shutil.copy(undisturbed / "best.safetensors", tmp_path / "other")
    with pytest.raises(ValueError, match="already holds a run"):  # nobody knows of which settings
        train(make_config(settings, {"output": str(tmp_path / "other")}), auto_resume=True)


def test_workers_change_nothing(start, undisturbed, tmp_path):
    assert start(tmp_path / "run", {**SETTINGS, "workers": 2}) == 0
    _assert_same_outcome(tmp_path / "run", undisturbed)


def test_resuming_a_finished_run_says_so(undisturbed, capsys):
    before = {p: p.read_bytes() for p in undisturbed.glob("*.safetensors")}
    summary = resume(undisturbed)
    assert "is finished: 2 epochs" in capsys.readouterr().out
    assert summary["epochs"] == 2
    assert {p: p.read_bytes() for p in undisturbed.glob("*.safetensors")} == before


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.usefixtures("pictures")
def test_a_finished_run_without_its_metrics(undisturbed, tmp_path, kept):
    shutil.copytree(undisturbed, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    expected = resume(undisturbed)
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:kept]))
    for name in ("curves.png", "functions.png"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    assert {**resume(tmp_path / "run"), "output": expected["output"]} == expected
    assert b"\0" not in metrics.read_bytes()
    assert (tmp_path / "run" / "functions.png").exists()


def test_neither_the_start_nor_the_place_of_the_data_is_needed(undisturbed, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(undisturbed / "best.safetensors", "start.safetensors")
    settings = {"data": "images", "init": "start.safetensors", "epochs": 1, "batch_size": 4, "workers": 0}
    train(make_config(settings, {"output": "run"}))
    recorded = read_yaml("run/config.yaml")
    assert recorded["data"] == str(tmp_path / "images")
    Path("start.safetensors").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    assert resume("../run")["epochs"] == 1
    image_folder.rename("moved")
    assert resume("../run", {"data": "moved"})["epochs"] == 1
    assert read_yaml("../run/config.yaml")["data"] == str(tmp_path / "elsewhere" / "moved")
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before
    next(Path("moved/train/cat").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"belongs to another run: training images was 12 there, and is 11"):
        resume("../run", {"data": "moved"})


def test_only_harmless_settings_may_change(undisturbed):
    with pytest.raises(ValueError, match="lr cannot change when a run is resumed; only accumulate, workers"):
        resume(undisturbed, {"lr": 0.1})
    with pytest.raises(ValueError, match=r"epochs cannot .*; to train its model further: grkan train --init .*last\.s"):
        resume(undisturbed, {"epochs": 3})


def test_a_state_of_another_run_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "state.pt").write_bytes((undisturbed / "state" / "state.pt").read_bytes())
    config = (undisturbed / "config.yaml").read_text().replace("embed_dim: 16", "embed_dim: 24")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(ValueError, match=r"state\.pt belongs to another run: model_args was"):
        resume(folder)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no run to resume"):
        resume(tmp_path)


def test_metrics_are_plain_json_lines(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "top1" not in line] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines if "top1" in line] == [1, 2]


LOADING = """
import sys
from torch.utils.data import DataLoader
from grkan.train.interruption import shield_loading_process
loader = DataLoader(
    range(8), num_workers=1, worker_init_fn=shield_loading_process, multiprocessing_context=sys.argv[1]
)
batches = iter(loader)
next(batches)
print(batches._workers[0].pid, flush=True)
if sys.stdin.readline() == "terminate\\n":
    batches._workers[0].terminate()
    batches._workers[0].join()
sys.stdin.read()
"""


def _ends(pid, seconds):
    end = time.monotonic() + seconds
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.05)
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is unknown")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("end", ["killed", "terminates it"])
def test_a_loading_process_ends_with_the_training_process_or_when_that_says_so(method, end):
    command = [sys.executable, "-c", LOADING, method]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        loading = int(training.stdout.readline())
        os.kill(loading, signal.SIGTERM)
        assert not _ends(loading, 0.5)
        if end == "killed":
            training.kill()
        else:
            training.stdin.write("terminate\n")
            training.stdin.flush()
        try:
            assert _ends(loading, 20)
        finally:
            training.kill()
            if os.path.exists(f"/proc/{loading}"):
                os.kill(loading, signal.SIGKILL)
