"""The CPU kernel as on machines that have less than this one."""

import contextlib
import shutil

import pytest
import torch

from grkan.rational import cpu, dispatch

CAPABILITIES = ("avx2", "default")


@pytest.fixture(scope="session")
def instruction_sets(tmp_path_factory):
    """By name, context managers in which `cpu` computes with an instruction set: this machine's, and lesser ones."""
    if "cpu" not in dispatch.KERNELS:
        return {}
    torch.backends.cpu.get_cpu_capability()  # PyTorch reads the variable, too, in its first operation
    found = {"this machine's": contextlib.nullcontext}
    for capability in CAPABILITIES:
        # A copy of the library decides for itself, in its first call.
        library = tmp_path_factory.mktemp("library") / f"{capability}.so"
        shutil.copy(cpu.LIBRARY, library)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ATEN_CPU_CAPABILITY", capability)
            functions = cpu.functions_of(library)
            with computing_by(functions):
                cpu.forward(torch.ones(1), torch.ones(1, 1), torch.ones(1, 0), "abs_of_sum", 1)
        found[capability] = lambda functions=functions: computing_by(functions)
    return found


@contextlib.contextmanager
def computing_by(functions):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_forward", functions[0])
        patch.setattr(cpu, "_backward", functions[1])
        yield


@pytest.fixture(params=["this machine's", *CAPABILITIES])
def instruction_set(request, instruction_sets):
    """A test that uses it is run with every instruction set."""
    with instruction_sets[request.param]():
        yield
