"""The CPU kernel as a library of operators for ONNX Runtime."""

from pathlib import Path

from ..errors import GrkanRuntimeError
from ..rational import cpu, op


def onnx_library() -> Path:
    """The file with which ONNX Runtime computes the nodes `grkan::GroupRational` of a model by grkan's kernel.

    It needs ONNX Runtime 1.18 or newer, and nothing of Python or PyTorch: it may be copied to where the model runs, on
    a machine of the same kind. A session that is to use it is told so before the model is loaded:

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(grkan.onnx_library()))
        session = onnxruntime.InferenceSession("model.onnx", options)

    The nodes take x of float32 or float16, and coefficients of float32; they run on the session's threads, and are
    right for every finite x.

    Raises:
        RuntimeError: this installation has no compiled kernel.
    """
    if not cpu.LIBRARY.exists():
        raise GrkanRuntimeError(
            "this installation of grkan has no compiled kernel, and so no library for ONNX Runtime, which runs the "
            f"model without it, too; to build it, in the folder of grkan's source: {op.BUILD_COMMAND}"
        )
    return cpu.LIBRARY
