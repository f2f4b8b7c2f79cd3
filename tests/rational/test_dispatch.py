"""Which kernel computes, and what says so."""

import contextlib
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import grkan
from grkan.rational import dispatch

X, A, B = torch.randn(3, 8), torch.randn(4, 6), torch.randn(4, 4)


def test_set_backend():
    assert dispatch.backend() == "auto"
    with grkan.set_backend("reference"):
        assert dispatch.backend() == "reference"
        with grkan.set_backend("auto"):
            assert dispatch.backend() == "auto"
        assert dispatch.backend() == "reference"
    assert dispatch.backend() == "auto"
    grkan.set_backend("reference")
    assert dispatch.backend() == "reference"
    grkan.set_backend("auto")
    with pytest.raises(ValueError, match="backend must be 'auto' or 'reference' or 'native'; got 'fast'"):
        grkan.set_backend("fast")
    assert dispatch.backend() == "auto"


def in_another_thread(f):
    results = []
    thread = threading.Thread(target=lambda: results.append(f()))
    thread.start()
    thread.join()
    return results[0]


def test_a_block_is_of_its_thread_and_a_call_of_the_process():
    with grkan.set_backend("reference"):
        assert in_another_thread(dispatch.backend) == "auto"
    try:
        grkan.set_backend("reference")
        assert in_another_thread(dispatch.backend) == "reference"
        with grkan.set_backend("auto"):
            assert (dispatch.backend(), in_another_thread(dispatch.backend)) == ("auto", "reference")
    finally:
        grkan.set_backend("auto")
    held = grkan.set_backend("reference")
    assert dispatch.backend() == "reference"
    with held:
        assert (dispatch.backend(), in_another_thread(dispatch.backend)) == ("reference", "auto")
    assert dispatch.backend() == "auto"


def test_overlapping_blocks_leave_nothing_behind():
    """Entered and left in turn, by two threads, and made before either is entered."""
    steps = [threading.Event() for _ in range(4)]
    seen = []

    def other():
        block = grkan.set_backend("reference")
        steps[0].set()
        steps[1].wait(10)
        with block:
            seen.append(dispatch.backend())
            steps[2].set()
            steps[3].wait(10)
        seen.append(dispatch.backend())

    thread = threading.Thread(target=other)
    thread.start()
    steps[0].wait(10)
    with contextlib.ExitStack() as stack:
        mine = grkan.set_backend("native" if dispatch.KERNELS else "auto")
        stack.enter_context(mine)
        steps[1].set()
        steps[2].wait(10)
        assert dispatch.backend() == mine.name
    steps[3].set()
    thread.join()
    assert seen == ["reference", "auto"]
    assert dispatch.backend() == "auto"


def test_many_calls_of_set_backend_are_not_kept():
    for _ in range(100):
        grkan.set_backend("auto")
    assert len(dispatch._calls) < 20


def test_a_compiled_function_follows_the_backend_of_its_thread():
    torch.compiler.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    @torch.compile(fullgraph=True, backend=record)
    def f(x):
        return grkan.group_rational(x, A, B)

    f(X)
    assert "grkan.group_rational.default" in graphs[0] or "grkan.group_rational" in graphs[0]
    with grkan.set_backend("reference"):
        in_another_thread(lambda: f(X))
        assert len(graphs) == 1
        f(X)
        assert len(graphs) == 2
    f(X)
    assert len(graphs) == 2


def test_the_backward_uses_what_the_forward_used(monkeypatch):
    """Whatever the backend is by then."""
    calls = []
    kernel = dispatch.Kernel(
        dispatch.REFERENCE.forward, lambda *args: calls.append(1) or dispatch.REFERENCE.backward(*args)
    )
    monkeypatch.setitem(dispatch.KERNELS, "cpu", kernel)
    x, a, b = (t.clone().requires_grad_() for t in (X, A, B))
    y, z = grkan.group_rational(x, a, b), grkan.rational_linear(x, a, b, torch.randn(5, 8))
    with grkan.set_backend("reference"):
        (y.sum() + z.sum()).backward()
    assert len(calls) == 2


def test_native_backend_fails_loudly_without_a_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", {})
    with pytest.raises(RuntimeError, match="backend 'native' is not available"):
        grkan.set_backend("native")
    assert dispatch.backend() == "auto"
    # A kernel for one device does not serve another.
    monkeypatch.setattr(dispatch, "KERNELS", {"cuda": dispatch.REFERENCE})
    with grkan.set_backend("native"), pytest.raises(RuntimeError, match=r"no kernel for x on device cpu.*\['cuda'\]"):
        grkan.group_rational(X, A, B)


def test_a_library_that_cannot_be_loaded_is_reported_and_replaced(tmp_path):
    """Built for another machine, say: the reference computes, and a warning says what to do."""
    broken = tmp_path / "libgrkan.so"
    broken.write_bytes(b"no library")
    program = (
        "import warnings; from pathlib import Path; from grkan.rational import cpu\n"
        f"cpu.LIBRARY = Path({str(broken)!r})\n"
        "from grkan.rational import dispatch\n"
        "dispatch.KERNELS.clear()\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    warnings.simplefilter('always'); dispatch._load_cpu_kernel()\n"
        "print(len(dispatch.KERNELS), found[0].message)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("0 grkan's kernel cannot be loaded")
    assert "pip install --force-reinstall" in result.stdout


def test_without_a_kernel_the_reference_computes_and_says_so_once(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", {})
    monkeypatch.setattr(dispatch, "_noticed", set())
    with pytest.warns(RuntimeWarning, match="no kernel for the CPU.*pip install --force-reinstall"):
        grkan.group_rational(X, A, B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grkan.group_rational(X, A, B)
