"""Several processes compute what one does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from grkan.train import loop
from grkan.train.config import make_config
from grkan.train.loop import train
from grkan.train.metrics import read_metrics


def _losses(folder):
    return [line["train_loss"] for line in read_metrics(folder / "metrics.jsonl") if "top1" not in line]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _train_in_two(settings):
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    command = [*TORCHRUN, "-m", "grkan", "train", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


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
def test_sigterm_to_one_process_stops_all_at_one_step_and_torchrun_goes_on(tiny, tmp_path):
    settings = {**tiny, "epochs": 30, "batch_size": 48, "log_every": 1, "workers": 0, "output": tmp_path / "two"}
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    command = [*TORCHRUN, "--max-restarts=2", "-m", "grkan", "train", "--auto-resume", *arguments]
    metrics, told = tmp_path / "two" / "metrics.jsonl", []
    agent = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for life in range(2):
            while len(read_metrics(metrics) if metrics.exists() else ()) < 50 * (1 + 4 * life):
                assert agent.poll() is None, agent.communicate()
                time.sleep(0.02)
            workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            told += workers
            os.kill(int(workers[-1]), signal.SIGTERM)
            while any(os.path.exists(f"/proc/{worker}") for worker in workers):
                time.sleep(0.02)
        out, err = agent.communicate(timeout=100)
    finally:
        agent.kill()
    assert agent.returncode == 0, err
    assert out.count("resuming at epoch") == 2
    assert err.count("grkan: stopped by SIGTERM in epoch") == 2
    assert err.count("; go on with: the same command") == 2
    assert "another process of this run has failed" not in err
    train(make_config({**settings, "output": str(tmp_path / "one")}))
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_nodes_without_a_shared_folder_are_refused_with_the_reason(tiny, tmp_path, resumed):
    settings = {**tiny, "workers": 0, "output": "run"}
    arguments = ["--resume", "run"] if resumed else [f"--set={key}={value}" for key, value in settings.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if resumed and rank == 0:
            train(make_config({**settings, "output": str(tmp_path / "node0" / "run")}))
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "grkan", "train", *arguments],
                cwd=tmp_path / f"node{rank}",
                env={**ENVIRONMENT, **{key: str(value) for key, value in place.items()}},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for rank, node in enumerate(nodes):
        _, err = node.communicate(timeout=100)
        assert node.returncode == 1
        assert re.search(
            r"^grkan(: | \(process 1\): )the run's folder run must be one that all nodes share, .*; "
            r"process 1 on \S+ does not see that of process 0 on \S+; give a folder of a shared file system: --output$",
            err,
            re.MULTILINE,
        ), (rank, err)
    assert not list((tmp_path / "node1").iterdir())


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_process_and_goes_on_in_one(tiny, tmp_path):
    settings = {**tiny, "log_every": 1, "workers": 0, "shard": True, "clip_grad": 1.0, "ema_decay": 0.9, "seed": 1}
    # Of odd sizes, for the parts are not equal, and with a test whose last batch one process lacks.
    settings |= {"model_args": {**tiny["model_args"], "embed_dim": 20}, "batch_size": 354}
    train(make_config({**settings, "shard": False, "output": str(tmp_path / "one")}))
    folder = tmp_path / "two"
    script = [str(Path(__file__).with_name("sharded_run.py")), json.dumps({**settings, "output": str(folder)})]
    done = subprocess.run([*TORCHRUN, *script], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGTERM in epoch 2, after step" in done.stdout
    assert len(list((folder / "state").glob("parts-*"))) == 1
    command = [sys.executable, "-m", "grkan", "train", "--resume", str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "resuming at epoch 2, step" in done.stdout
    assert _losses(folder) == pytest.approx(_losses(tmp_path / "one"), rel=1e-4)
    ends = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-3, rtol=0)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


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
    monkeypatch.setattr(loop, "PartialState", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"2 processes were started \(WORLD_SIZE\), but Accelerate connects 1 on cpu"
    ):
        train(make_config(tiny))
    assert not (tmp_path / "run").exists()
