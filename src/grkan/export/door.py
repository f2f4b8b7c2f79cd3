"""`grkan.export`: the one way to every format."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import GrkanImportError, GrkanTypeError, GrkanValueError
from ..rational.arguments import check_choice, check_flag
from ..writing import check_new_folder, check_writable
from .job import make_job

# format -> the module of this package that writes it, the extra that brings what it needs, and the endings of its files
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
    """Write a model for programs that have no grkan, once it is known to compute what PyTorch computes.

    Every format but "timm" is in plain float32 operations, with the range of `grkan.plain`. What was written is run and
    held against the model first; it appears whole, in the place of what was there, or not at all.

    Args:
        model: any module with layers of grkan, or without; wrappers such as DDP are taken off. It stays as it is.
        path: the file; for "timm" a folder, which must be new or empty. "openvino" wants the ending .xml, and writes a
            .bin beside it; "pt2" and "aoti" want .pt2.
        format: "onnx", for ONNX Runtime and others: a node `grkan::GroupRational` for every function, which is in the
            same file as a function of standard operators, and which `grkan.onnx_library()` runs faster;
            "openvino"; "pt2", a program of `torch.export`; "aoti", compiled by AOTInductor for this processor;
            "executorch", with XNNPACK, for the sizes of the example alone;
            "timm", a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub.
        example: what the model is called with: a Tensor, a tuple of arguments, or a mapping of keyword arguments. None:
            images of the size that a model of timm's registry is made for, or a transformers model's `dummy_inputs`.
        dynamic: whether the batch may have any size, and so a text's length, and an image's height and width where the
            model has `dynamic_img_size` and the format is not "openvino"; False: the sizes of the example.
        inline: for "onnx", standard operators alone, for runtimes that do not know functions.
        int8: for "onnx", weights in 8 bits, by ONNX Runtime's dynamic quantisation.

    Returns:
        The path.

    Raises:
        ImportError: a package that the format needs is missing.
        TypeError, ValueError: an argument is wrong, or the model cannot be traced.
        RuntimeError: the result differs from PyTorch's. int8 loses accuracy: there it is a fifth of the largest output.
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
        # ExecuTorch plans its memory ahead, and a phone has one image at a time.
        fixed = format == "executorch"
        # OpenVINO interpolates position embeddings in another way than PyTorch: logits are off by 2e-4 of the largest.
        job = make_job(model, example, dynamic and not fixed, batch=1 if fixed else 2, resizes=format != "openvino")
        write(job, path, **(options if format == "onnx" else {}))
    return path


def _writer(format: str, module: str, extra: str | None) -> Callable[..., None]:
    """What writes a format; its module imports what it needs."""
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
