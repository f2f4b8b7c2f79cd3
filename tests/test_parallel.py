"""Two processes compute what one does: the checks are those of `two_processes.py`, which torchrun runs once for all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

WORKER = Path(__file__).with_name("two_processes.py")
NAMES = re.findall(r"^@check\ndef (\w+)", WORKER.read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the checks say, and the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("two_processes")
    results = folder / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, str(WORKER), str(results), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    said = json.loads(results.read_text()) if results.exists() else {}
    return said, folder, process.stderr[-3000:]


def test_there_are_checks():
    assert len(NAMES) > 10


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(run, name):
    said, _, stderr = run
    assert name in said, f"torchrun ended before it: {stderr}"
    assert said[name] is None, said[name]


def test_one_process_reads_what_two_have_written(run):
    """Both ways of saving: a checkpoint in parts, and a model file of the gathered weights."""
    import timm
    import torch.distributed.checkpoint as dcp

    import grkan

    _, folder, stderr = run
    assert (folder / "gathered.pt").exists(), stderr
    expected = torch.load(folder / "gathered.pt")
    model = timm.create_model("kat_micro_patch2_8", depth=2)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    for loaded in (state["model"], grkan.load_model(folder / "gathered.safetensors").state_dict()):
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
