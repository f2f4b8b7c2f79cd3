"""ExecuTorch, for phones and smaller devices: the plain copy, lowered to XNNPACK where it supports an operation.

The sizes are those of the example, because memory is planned ahead.
"""

from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

from ..writing import replacing
from .job import Call, Job, quietly
from .packages import trace


def write_executorch(job: Job, path: Path) -> None:
    """Write a program for `executorch.runtime`, or for ExecuTorch's C++ and mobile runtimes."""
    traced = trace(job)
    with quietly("lowered by ExecuTorch"):
        program = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()]).to_executorch()
    with replacing(path) as file:
        file.write_bytes(program.buffer)
        method = Runtime.get().load_program(file).load_method("forward")

        def run(call: Call) -> list[torch.Tensor]:
            return [output.clone() for output in method.execute(call.tensors())]

        job.check("the program of ExecuTorch", run)
