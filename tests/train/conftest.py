"""A model and data sets that train in a second, and processes that start at once."""

import multiprocessing
import runpy
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

TINY = {
    "model": "kat_micro_patch2_8",
    "model_args": {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_groups": 4},
    "epochs": 2,
    "batch_size": 256,
}


@pytest.fixture
def pictures():
    """Asks for a run's pictures."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Leaves out what takes as long as all else of a tiny run, where the test does not ask for it."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("grkan.train.loop._Run._draw", lambda run: [])


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of ten steps on the digits."""
    return {**TINY, "output": str(tmp_path / "run")}


@pytest.fixture
def image_folder(tmp_path):
    """FOLDER/{train,val}/{cat,dog}/0.png...: 8x8 gray noise, dark or bright by its class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for base, name in ((0, "cat"), (128, "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(base, base + 128, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


class Ended(NamedTuple):
    """A process at its end: its exit status, and what it wrote to standard output and to standard error."""

    status: int
    out: str
    err: str


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def port():
    """A port of this machine that nobody uses."""
    return _free_port()


@pytest.fixture(scope="session")
def forkserver():
    """A way to start processes that have imported everything already, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grkan.cli", "grkan.plot", "grkan.train.compare"])
    return context


@pytest.fixture(scope="session")
def launch(forkserver, tmp_path_factory):
    """Runs `grkan ARGUMENTS`, or a script, in connected processes, as torchrun does; returns how each has ended.

    `folders` are the working directories of the processes, one for each.
    """
    script = str(Path(__file__).with_name("launched.py"))

    def run(*arguments, folders, script_to_run=None, seconds=300):
        written, started = tmp_path_factory.mktemp("launched"), []
        port = _free_port()
        for rank, folder in enumerate(folders):
            place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(folders)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
            given = {
                "arguments": [str(argument) for argument in arguments],
                "environment": {key: str(value) for key, value in place.items()} if len(folders) > 1 else {},
                "folder": str(folder),
                "out": str(written / f"out{rank}"),
                "err": str(written / f"err{rank}"),
                "script": script_to_run,
            }
            started.append(forkserver.Process(target=runpy.run_path, args=(script, given)))
            started[-1].start()
        try:
            for process in started:
                process.join(seconds)
        finally:
            for process in started:
                process.kill()
        return [
            Ended(process.exitcode, *((written / f"{name}{rank}").read_text() for name in ("out", "err")))
            for rank, process in enumerate(started)
        ]

    return run
