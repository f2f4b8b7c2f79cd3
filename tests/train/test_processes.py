"""Several processes compute what one does."""

import json
import os
import re
import signal
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


def _options(settings):
    return [f"--set={key}={value}" for key, value in settings.items()]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_torchrun_goes_on_with_the_losses_of_one(tiny, tmp_path, port):
    settings = {**tiny, "epochs": 3, "batch_size": 48, "log_every": 1, "workers": 0, "mixup": 0.8}
    folder = tmp_path / "two"
    # Not --standalone, with which torchrun has a new store for each attempt.
    command = [sys.executable, "-m", "torch.distributed.run", f"--master-port={port}", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "-m", "grkan", "train", "--auto-resume", *_options({**settings, "output": folder})]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = folder / "metrics.jsonl"
        while len(read_metrics(metrics) if metrics.exists() else ()) < 10:
            assert agent.poll() is None, agent.communicate()
            time.sleep(0.02)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGTERM)
        while any(os.path.exists(f"/proc/{worker}") for worker in workers):
            time.sleep(0.02)
        out, err = agent.communicate(timeout=300)
    finally:
        agent.kill()
    assert agent.returncode == 0, err
    assert out.count("resuming at epoch") == out.count("epoch 3/3") == 1  # the main process alone speaks
    assert err.count("grkan: stopped by SIGTERM in epoch") == 1
    assert err.count("; go on with: the same command") == 1
    assert "another process of this run has failed" not in err
    train(make_config({**settings, "output": str(tmp_path / "one")}))
    one, two = _losses(tmp_path / "one"), _losses(folder)
    assert len(one) == len(two) == 90
    assert two[:20] == pytest.approx(one[:20], rel=1e-4)
    assert two == pytest.approx(one, rel=2e-3)
    ends = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=2e-3)


@pytest.mark.parametrize("resumed", [False, True])
def test_nodes_without_a_shared_folder_are_refused_with_the_reason(launch, tiny, tmp_path, resumed):
    settings = {**tiny, "workers": 0, "output": "run"}
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    if resumed:
        (nodes[0] / "run").mkdir()
        (nodes[0] / "run" / "config.yaml").write_text("epochs: 2")
    ended = launch("train", *(["--resume", "run"] if resumed else _options(settings)), folders=nodes)
    for node in ended:
        assert node.status == 1
        assert re.search(
            r"^grkan(: | \(process 1\): )the run's folder run must be shared by all nodes, .*; "
            r"process 1 on \S+ does not see the files that process 0 on \S+ sees; choose an --output on a shared file "
            r"system$",
            node.err,
            re.MULTILINE,
        ), node
    assert not list(nodes[1].iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_a_sharded_run_is_that_of_one_process_and_goes_on_in_one(launch, tiny, tmp_path):
    settings = {**tiny, "log_every": 1, "workers": 0, "shard": True, "clip_grad": 1.0, "ema_decay": 0.9, "seed": 1}
    # Of odd sizes, for the parts are not equal, and with a test whose last batch one process lacks.
    settings |= {"model_args": {**tiny["model_args"], "embed_dim": 20}, "batch_size": 354}
    train(make_config({**settings, "shard": False, "output": str(tmp_path / "one")}))
    folder = tmp_path / "two"
    script = str(Path(__file__).with_name("sharded_run.py"))
    first, second = launch(
        json.dumps({**settings, "output": str(folder)}), folders=[tmp_path] * 2, script_to_run=script
    )
    assert (first.status, second.status) == (0, 0), (first, second)
    assert "stopped by SIGTERM in epoch 2, after step" in first.out
    assert len(list((folder / "state").glob("parts-*"))) == 1
    (alone,) = launch("train", "--resume", folder, folders=[tmp_path])
    assert alone.status == 0, alone
    assert "resuming at epoch 2, step" in alone.out
    assert _losses(folder) == pytest.approx(_losses(tmp_path / "one"), rel=1e-4)
    ends = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-3, rtol=0)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_one_process_names_an_unreadable_image_and_one_says_what_failed(launch, tiny, tmp_path, image_folder):
    (image_folder / "train" / "cat" / "1.png").write_bytes(b"")
    settings = {**tiny, "data": image_folder, "epochs": 2, "batch_size": 12, "workers": 0}
    ended = launch("train", *_options(settings), folders=[tmp_path] * 2)
    assert [process.status for process in ended] == [0, 0], ended
    assert sum(process.err.count("skipped an unreadable image") for process in ended) == 1
    assert {line["unreadable"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")} == {1}
    first, second = launch("train", *_options(settings), folders=[tmp_path] * 2)
    assert (first.status, second.status) == (1, 1)
    assert first.err.startswith("grkan: ")
    assert "already holds a run" in first.err
    assert "grkan (process 1): another process of this run has failed" in second.err


def test_processes_that_are_not_connected_are_refused(tiny, tmp_path, monkeypatch):
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(loop, "PartialState", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"2 processes were started \(WORLD_SIZE\), but Accelerate connects only 1 on cpu"
    ):
        train(make_config(tiny))
    assert not (tmp_path / "run").exists()
