"""What all tests share."""

import faulthandler
import tempfile
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    """Tests that take half an hour run when -m names them, and never else: not by default, nor with -m "not slow"."""
    if "full_size" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("full_size")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


# What a worker of pytest-xdist prints is captured. So its traceback goes into a file, which is printed if it crashes.


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    if not hasattr(node.config, "tracebacks"):
        node.config.tracebacks = tempfile.TemporaryDirectory()
    node.workerinput["traceback"] = str(Path(node.config.tracebacks.name, node.workerinput["workerid"]))


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.traceback = open(config.workerinput["traceback"], "w")  # noqa: SIM115  as long as the process lives
        faulthandler.enable(config.traceback)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if error:
        status = node.gateway._io.popen.wait(10)  # -15, say, for SIGTERM
        print(f"\nexit status of {node.gateway.id}: {status}", flush=True)
        print(Path(node.workerinput["traceback"]).read_text(), flush=True)


def pytest_unconfigure(config):
    if hasattr(config, "tracebacks"):
        config.tracebacks.cleanup()
