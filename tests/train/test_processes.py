"""Several processes compute what one does."""

import os
import subprocess
import sys

import pytest

from grkan.train.checkpoint import read_metrics
from grkan.train.config import make_config
from grkan.train.loop import train


def _losses(folder):
    return [line["train_loss"] for line in read_metrics(folder / "metrics.jsonl") if "top1" not in line]


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tiny, tmp_path):
    settings = {"epochs": 4, "log_every": 1, "mixup": 0.8, "workers": 0}
    train(make_config(tiny, settings, {"output": str(tmp_path / "one")}))
    arguments = [f"--set={key}={value}" for key, value in {**tiny, **settings, "output": tmp_path / "two"}.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "grkan.cli"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "train", *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-4)
    assert done.stdout.count("epoch 4/4") == 1  # the main process alone speaks
    ends = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=1e-4)
