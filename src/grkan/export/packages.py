"""PyTorch's own formats: programs of `torch.export`, unchanged or compiled by AOTInductor.

Both contain the plain copy of the model, so the process that loads them does not need grkan.
"""

from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from ..writing import replacing
from .job import BATCH, FIXED, Job, outputs, quietly
from .plain import plain


def write_pt2(job: Job, path: Path) -> None:
    """Write a program for `torch.export.load`."""
    program = trace(job)
    with replacing(path) as file:
        torch.export.save(program, file)
        _check("the program of torch.export", job, torch.export.load(file).module())


def write_aoti(job: Job, path: Path) -> None:
    """Write a package for `torch._inductor.aoti_load_package` or C++'s AOTIModelPackageLoader, for this processor.

    Raises:
        ValueError: `torch.export` cannot trace it, AOTInductor cannot compile it, or there is no C++ compiler.
    """
    import torch._inductor

    program = trace(job)
    with replacing(path) as file:
        with quietly("compiled by AOTInductor"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        _check("the package of AOTInductor", job, torch._inductor.aoti_load_package(str(file)))


def trace(job: Job) -> ExportedProgram:
    """Trace the plain copy into a program.

    Raises:
        ValueError: `torch.export` cannot trace it.
    """
    # A batch may be as small as 1; PyTorch finds the bounds of the other sizes.
    shapes = job.dynamic_shapes(lambda name: Dim(BATCH, min=1) if name == BATCH else Dim.DYNAMIC)
    with quietly("traced by torch.export", FIXED):
        return torch.export.export(plain(job.model), job.example.args, dict(job.example.kwargs), dynamic_shapes=shapes)


def _check(what: str, job: Job, model: Any) -> None:
    with torch.no_grad():
        job.check(what, lambda call: list(outputs(call.of(model)).values()))
