"""The CPU kernel as an operator library for ONNX Runtime."""

from pathlib import Path

from ..errors import GrkanRuntimeError
from ..rational import cpu, dispatch


def onnx_library() -> Path:
    """Return the path of the library with which ONNX Runtime runs `grkan::GroupRational` nodes by grkan's kernel.

    It needs ONNX Runtime 1.18 or newer, but neither Python nor PyTorch, so you can copy it to another machine of the
    same kind. Register it with a session before the model is loaded:

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(grkan.onnx_library()))
        session = onnxruntime.InferenceSession("model.onnx", options)

    The nodes take x in float32 or float16, and coefficients in float32. They run on the session's threads, and are
    correct for every finite x.

    Raises:
        RuntimeError: this installation has no compiled kernel.
    """
    if not cpu.LIBRARY.exists():
        raise GrkanRuntimeError(
            "this installation of grkan has no compiled kernel, and therefore no library for ONNX Runtime, which can "
            "also run the model without it; to build it, run this in the folder of grkan's source: "
            f"{dispatch.BUILD_COMMAND}"
        )
    return cpu.LIBRARY
