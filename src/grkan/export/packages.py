"""PyTorch's own formats: programs of `torch.export`, as they are or compiled by AOTInductor.

Both are of the plain copy of the model, so that the process that loads them needs nothing of grkan.
"""

from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from ..errors import GrkanValueError
from ..writing import replacing
from .job import BATCH, Job, cause, outputs, quietly
from .plain import plain


def write_pt2(job: Job, path: Path) -> None:
    """A program for `torch.export.load`."""
    program = trace(job)
    with replacing(path) as file:
        torch.export.save(program, file)
        _check("the program of torch.export", job, torch.export.load(file).module())


def write_aoti(job: Job, path: Path) -> None:
    """A package for `torch._inductor.aoti_load_package`, or AOTIModelPackageLoader in C++: compiled for this processor.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed.
    """
    import torch._inductor

    program = trace(job)
    with replacing(path) as file:
        with quietly():
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        _check("the package of AOTInductor", job, torch._inductor.aoti_load_package(str(file)))


def trace(job: Job) -> ExportedProgram:
    """The plain copy as a program.

    Raises:
        ValueError: `torch.export` cannot trace it.
    """
    # A batch of one is as good as any; of the other sizes PyTorch finds out the bounds.
    shapes = job.dynamic_shapes(lambda name: Dim(BATCH, min=1) if name == BATCH else Dim.DYNAMIC)
    try:
        with quietly(), torch.no_grad():
            return torch.export.export(
                plain(job.model), job.example.args, dict(job.example.kwargs), dynamic_shapes=shapes
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of torch.export, or of the model
        raise GrkanValueError(
            f"model cannot be traced by torch.export: {cause(error)}; dynamic=False asks for less"
        ) from error


def _check(what: str, job: Job, model: Any) -> None:
    with torch.no_grad():
        job.check(what, lambda call: list(outputs(call.of(model)).values()))
