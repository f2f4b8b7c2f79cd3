"""`grkan.export`: the entry point for every format."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import GrkanImportError, GrkanTypeError, GrkanValueError
from ..rational.arguments import check_choice, check_flag
from ..writing import check_new_folder, check_writable
from .job import make_job

# format -> the module of this package that writes it, the extra with its dependencies, and the endings of its files
_FORMATS = {
    "onnx": ("onnx", "onnx", ()),
    "openvino": ("openvino", "openvino", (".xml",)),
    "pt2": ("packages", None, (".pt2",)),
    "aoti": ("packages", None, (".pt2",)),
    "executorch": ("executorch", "executorch", ()),
    "timm": ("timm", "models", ()),
}

FORMATS = tuple(_FORMATS)


def export(
    model: Any,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    example: Any = None,
    dynamic: bool = True,
    inline: bool = False,
    int8: bool = False,
) -> Path:
    """Write a model for programs without grkan, after checking that it computes the same as PyTorch.

    Every format but "timm" uses plain float32 operations, with the range of `grkan.plain`. The result is first run and
    compared with the model. It then replaces an existing file as a whole, or nothing is written.

    Args:
        model: any module, with or without layers of grkan; wrappers such as DDP are removed. It is not changed.
        path: the file; for "timm" a folder, which must be new or empty. "openvino" needs the ending .xml, and writes a
            .bin beside it; "pt2" and "aoti" need .pt2.
        format: "onnx", for ONNX Runtime and others: a node `grkan::GroupRational` for every function. The same file
            defines it by standard operators, and `grkan.onnx_library()` runs it faster;
            "openvino"; "pt2", a program of `torch.export`; "aoti", compiled by AOTInductor for this processor;
            "executorch", with XNNPACK, only for the sizes of the example;
            "timm", a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub.
        example: the model's input: a Tensor, a tuple of arguments, or a mapping of keyword arguments. None: images of
            the size that a model of timm's registry is made for, or the `dummy_inputs` of a transformers model.
        dynamic: whether the batch may have any size. This includes the length of a text, and an image's height and
            width if the model has `dynamic_img_size` and the format is not "openvino". False: the sizes of the example.
        inline: for "onnx", use only standard operators, for runtimes that do not support functions.
        int8: for "onnx", store weights in 8 bits, by ONNX Runtime's dynamic quantisation.

    Returns:
        The path.

    Raises:
        ImportError: a package that the format needs is missing.
        TypeError, ValueError: an argument is wrong, or the model cannot be traced.
        RuntimeError: the result differs from PyTorch's. The limit for int8 is a fifth of the largest output.
        OSError: the path cannot be written.
    """
    check_choice("format", format, FORMATS)
    module, extra, endings = _FORMATS[format]
    if not isinstance(path, (str, os.PathLike)):
        raise GrkanTypeError(f"path must be a str or a pathlib.Path; got {path!r}")
    path = Path(path)
    options: dict[str, Any] = {"inline": inline, "int8": int8}
    for name, value in {"dynamic": dynamic, **options}.items():
        check_flag(name, value)
        if value and name in options and format != "onnx":
            raise GrkanValueError(f"{name} is for format 'onnx'; got format {format!r}")
    if endings and path.suffix not in endings:
        raise GrkanValueError(f"path must end in {' or '.join(endings)} for format {format!r}; got {str(path)!r}")
    (check_new_folder if format == "timm" else check_writable)(path)
    write = _writer(format, module, extra)
    if format == "timm":
        write(model, path)
    else:
        # ExecuTorch plans its memory ahead, and a phone processes one image at a time.
        fixed = format == "executorch"
        # OpenVINO interpolates position embeddings differently from PyTorch: logits are off by 2e-4 of the largest.
        job = make_job(model, example, dynamic and not fixed, batch=1 if fixed else 2, resizes=format != "openvino")
        write(job, path, **(options if format == "onnx" else {}))
    return path


def _writer(format: str, module: str, extra: str | None) -> Callable[..., None]:
    """Return the function that writes a format. Its module imports the packages that it needs."""
    try:
        writer: Callable[..., None] = getattr(import_module(f"{__package__}.{module}"), f"write_{format}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("grkan", "torch"):
            raise
        package = error.name.partition(".")[0]
        raise GrkanImportError(
            f'format {format!r} needs {package}; install it with: pip install "grkan[{extra}]"'
        ) from error
    return writer
