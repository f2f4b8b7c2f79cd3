"""Several processes compute what one does."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grkan.train import loop
from grkan.train.config import make_config
from grkan.train.loop import train
from grkan.train.metrics import read_metrics


def _losses(folder):
    return [line["train_loss"] for line in read_metrics(folder / "metrics.jsonl") if "top1" not in line]


def _train_in_two(settings):
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "grkan"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, "train", *arguments], env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tiny, tmp_path):
    settings = {"epochs": 4, "log_every": 1, "mixup": 0.8, "workers": 0}
    train(make_config(tiny, settings, {"output": str(tmp_path / "one")}))
    done = _train_in_two({**tiny, **settings, "output": tmp_path / "two"})
    assert done.returncode == 0, done.stderr
    one, two = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-4)
    assert done.stdout.count("epoch 4/4") == 1  # the main process alone speaks
    ends = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=1e-4)


@pytest.mark.slow
def test_one_process_names_an_unreadable_image_and_one_says_what_failed(tiny, tmp_path, image_folder):
    (image_folder / "train" / "cat" / "1.png").write_bytes(b"")
    settings = {**tiny, "data": image_folder, "epochs": 6, "batch_size": 12, "workers": 0}
    done = _train_in_two(settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unreadable image left out") == 1
    assert {line["unreadable"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")} == {1}
    again = _train_in_two(settings)
    assert again.returncode != 0
    told = [line for line in again.stderr.splitlines() if line.startswith(("grkan: ", "grkan ("))]
    assert sum("already holds a run" in line for line in told) == 1
    assert all("already holds a run" in line or "another process of this run has failed" in line for line in told)
    assert "closed by peer" not in again.stderr


def test_processes_that_are_not_connected_are_refused(tiny, tmp_path, monkeypatch):
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(loop, "Accelerator", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"2 processes were started \(WORLD_SIZE\), but Accelerate connects 1 on cpu"
    ):
        train(make_config(tiny))
    assert not (tmp_path / "run").exists()
