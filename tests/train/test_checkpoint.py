import os
import pickle
import resource
import signal
import subprocess
import sys

import pytest
import torch

from grkan.train.checkpoint import STATE_FORMAT, RunLock, State, load_state, save_state


@pytest.fixture
def state():
    """Of a run at its first step; empty where it does not matter."""
    return {**dict.fromkeys(State.__annotations__), "model": {"weight": torch.arange(1000.0)}, "step": 1}


def test_state_round_trip(state, tmp_path):
    save_state(tmp_path / "s.pt", state)
    found = load_state(tmp_path / "s.pt")
    assert torch.equal(found["model"]["weight"], state["model"]["weight"])
    assert found["step"] == 1


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_a_truncated_state_is_named(state, tmp_path, keep):
    path = tmp_path / "state.pt"
    save_state(path, state)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        load_state(path)


def test_a_foreign_state_is_named(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not a training state of this version"):
        load_state(tmp_path / "other.pt")


def test_a_state_that_lacks_something_is_named(state, tmp_path):
    del state["optimizer"], state["best"]
    torch.save({"format": STATE_FORMAT, **state}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part\.pt is damaged: it lacks best, optimizer"):
        load_state(tmp_path / "part.pt")


def test_a_state_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"format": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match="damaged, or not a training state"):
            load_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_names_the_file(state, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/state\.pt'"):
            save_state(tmp_path / "state.pt", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


HOLDER = """
import os, sys, time
from pathlib import Path
from grkan.train.checkpoint import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if (child := os.fork()) == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_a_folder_is_one_runs_as_long_as_it_lives(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        lock = RunLock(folder)
        with pytest.raises(RuntimeError, match=rf"another run is using .*/run: process {holder.pid} on \S+; wait"):
            lock.acquire()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # a forked child, such as one that loads images, may live on
        assert lock.acquire() == lock.acquire() == lock.path.read_bytes()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.stdout.close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuses)
    RunLock(tmp_path / "run").acquire()
