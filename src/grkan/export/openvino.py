"""OpenVINO: its converter reads an ONNX file with standard operators only, because it does not need functions."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino

from ..writing import replacing_files
from .job import Call, Job, quietly
from .onnx import feeds, save, to_onnx


@functools.cache
def core() -> openvino.Core:
    """Return the process's Core, which is never freed.

    To compile for the CPU, OpenVINO gives the calling thread a signal stack (sigaltstack), and frees it with the Core.
    If another thread does that, for example in a garbage collection, the next signal that Python handles ends the
    process (seen with OpenVINO 2026.4).
    """
    return openvino.Core()


def write_openvino(job: Job, path: Path) -> None:
    """Write an .xml file, and a .bin file beside it with the weights in their own dtype."""
    onnx_model = to_onnx(job, inline=True)
    with replacing_files(path) as file:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            save(onnx_model, Path(folder, "model.onnx"))
            with quietly("converted by OpenVINO"):
                model = openvino.convert_model(Path(folder, "model.onnx"))
            for name, value in onnx_model.metadata_props.items():
                model.set_rt_info(value, ["grkan", name])
            openvino.save_model(model, file, compress_to_fp16=False)
        job.check(f"the OpenVINO file, in OpenVINO {openvino.__version__},", runner(file))


def runner(file: Path, threads: int = 0, fixed: Call | None = None) -> Any:
    """Return a function that runs a file for a Call, in float32, because some processors would choose bfloat16.

    Args:
        file: the .xml file.
        threads: 0: as many as OpenVINO chooses.
        fixed: a call whose sizes all calls have. OpenVINO joins more operations if it knows the sizes.
    """
    model = core().read_model(file)
    names = [value.any_name for value in model.inputs]
    if fixed is not None:
        model.reshape({name: list(array.shape) for name, array in feeds(names, fixed).items()})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core().compile_model(model, "CPU", settings)

    def run(call: Call) -> Sequence[Any]:
        result = compiled(feeds(names, call))
        return [result[output] for output in compiled.outputs]

    return run
