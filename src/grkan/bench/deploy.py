"""The rivals of `grkan bench deploy`: a KAT and the Vision Transformer of its size, in all installed runtimes."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import grkan

from ..export.job import Call
from .contest import Rival

ONNX_RUNTIME, OPENVINO, AOT_INDUCTOR, EXECUTORCH = "ONNX Runtime", "OpenVINO", "AOTInductor", "ExecuTorch"
FLOAT32, INT8 = "float32", "int8"

WITH_LIBRARY = ", with grkan's library"


@dataclass(frozen=True)
class Runtime:
    """How to make and run a file.

    open(path, threads, library, call) returns a runner of Calls with the sizes of `call`; `packages` are required.
    """

    packages: Sequence[str]
    ending: str
    arguments: dict[str, Any]
    open: Callable[[Path, int, Path | None, Call], Callable[[Call], Any]]


def _onnx(path: Path, threads: int, library: Path | None, call: Call) -> Callable[[Call], Any]:
    from ..export.onnx import runner

    return runner(path, library, threads)


def _openvino(path: Path, threads: int, library: Path | None, call: Call) -> Callable[[Call], Any]:
    from ..export.openvino import runner

    return runner(path, threads, fixed=call)


def _aoti(path: Path, threads: int, library: Path | None, call: Call) -> Callable[[Call], Any]:
    import torch._inductor

    model = torch._inductor.aoti_load_package(str(path))
    return lambda call: [call.of(model)]


def _executorch(path: Path, threads: int, library: Path | None, call: Call) -> Callable[[Call], Any]:
    from executorch.runtime import Runtime as Program

    method = Program.get().load_program(path).load_method("forward")
    return lambda call: method.execute(call.tensors())


RUNTIMES = {
    (ONNX_RUNTIME, FLOAT32): Runtime(("onnx", "onnxscript", "onnxruntime"), ".onnx", {}, _onnx),
    (ONNX_RUNTIME, INT8): Runtime(("onnx", "onnxscript", "onnxruntime"), ".int8.onnx", {"int8": True}, _onnx),
    (OPENVINO, FLOAT32): Runtime(
        ("openvino", "onnx", "onnxscript", "onnxruntime"), ".xml", {"format": "openvino"}, _openvino
    ),
    (AOT_INDUCTOR, FLOAT32): Runtime((), ".pt2", {"format": "aoti"}, _aoti),
    (EXECUTORCH, FLOAT32): Runtime(("executorch",), ".pte", {"format": "executorch"}, _executorch),
}
"""The runtimes, by name and precision."""


def missing(runtime: tuple[str, str]) -> str | None:
    """Return the first package that a runtime needs and that is not installed, or None."""
    if runtime[0] == AOT_INDUCTOR and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "a C++ compiler"
    return next((package for package in RUNTIMES[runtime].packages if find_spec(package) is None), None)


class Files:
    """The files that the rivals of a suite run. Each is made on first use, and deleted with the suite."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.folder = Path(tempfile.mkdtemp(prefix="grkan-deploy-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.models: dict[str, nn.Module] = {}

    def model(self, name: str) -> nn.Module:
        """Make a model with a random head and no zero coefficients, as after training, because zeros make F cheaper."""
        import timm

        if name not in self.models:
            torch.manual_seed(0)
            model = timm.create_model(name).eval().requires_grad_(False)
            for key, parameter in model.named_parameters():
                if key.endswith(("numerator", "denominator")):
                    parameter.add_(0.01 * torch.randn_like(parameter))
            nn.init.normal_(model.head.weight, std=0.05)
            self.models[name] = model
        return self.models[name]

    def path(self, name: str, runtime: tuple[str, str]) -> Path:
        """Return the file of a model for a runtime."""
        made = RUNTIMES[runtime]
        path = self.folder / f"{name}{made.ending}"
        if not path.exists():
            grkan.export(self.model(name), path, **made.arguments)
        return path


def rivals(files: Files, runtime: tuple[str, str], batch: int) -> dict[str, Rival]:
    """Return both models as rivals, and in ONNX Runtime also the KAT with grkan's kernel."""
    threads = torch.get_num_threads()
    library = onnx_library() if runtime[0] == ONNX_RUNTIME else None
    entries: list[tuple[str, str, Path | None]] = [(name, name, None) for name in files.names]
    if library is not None:
        entries.append((files.names[1] + WITH_LIBRARY, files.names[1], library))
    images = torch.randn(batch, *files.model(files.names[0]).default_cfg["input_size"])  # type: ignore[index]
    call = Call((images,))
    found = {}
    for title, name, loaded in entries:
        path = files.path(name, runtime)
        run = RUNTIMES[runtime].open(path, threads, loaded, call)
        facts: dict[str, float] = {"difference": _difference(run(call)[0], files.model(name)(images))}
        if path.suffix == ".onnx":
            facts["nodes"] = _nodes(path)
        found[title] = Rival(partial(run, call), facts)
    return found


def onnx_library() -> Path | None:
    """Return grkan's kernel for ONNX Runtime, or None if it was not built."""
    try:
        return grkan.onnx_library()
    except RuntimeError:
        return None


def _difference(found: Any, expected: Tensor) -> float:
    """Return the largest difference of an output from PyTorch's."""
    return float((torch.as_tensor(found) - expected).abs().max())


def _nodes(path: Path) -> int:
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)
