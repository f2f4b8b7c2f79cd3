"""The suites: the function, the layer and the model, each against what it replaces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import GrkanValueError
from ..rational import dispatch
from . import rivals
from .contest import Contest
from .rivals import FORWARD, INFERENCE, TRAIN_STEP, TRAINING

OPS_SHAPES = ((8, 197, 192), (8, 197, 768), (8, 197, 3072))
"""8 images of 197 tokens, with the width of tiny, its hidden width (the width of base), and base's hidden width."""

GPU_BATCH = 128

GPU_SHAPES = tuple((GPU_BATCH, *shape[1:]) for shape in OPS_SHAPES)
"""More images for a GPU: with eight, launching a kernel takes longer than running it."""

LAYER_WIDTHS = (192, 384, 768)
"""The widths of tiny, small and base."""


@dataclass(frozen=True)
class Suite:
    """Contests, and notes for the readers of their tables."""

    contests: Sequence[Contest]
    notes: Sequence[str]


def ops(
    device: str = "cpu",
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Suite:
    """Return the suite of activations: grkan's rational function, other ways to compute it, and other functions."""
    shapes = shapes or (OPS_SHAPES if device == "cpu" else GPU_SHAPES)
    notes = _notes(device)
    reason = rivals.why_no_compiler(device)
    if reason:
        notes.append(f"torch.compile does not work here, so the compiled rivals are left out: {reason}")
    contests = [
        Contest(
            {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch."), "pass": pass_},
            "GELU" if device == "cpu" else "clone",
            partial(rivals.activations, device, shape, dtype, pass_, reason is None),
        )
        for dtype in dtypes
        for pass_ in (FORWARD, TRAINING)
        for shape in shapes
    ]
    # The cost of a call with almost nothing to compute.
    contests += [
        Contest(
            {"shape": "1x192", "dtype": "float32", "pass": f"one call, {pass_}"},
            "GELU",
            partial(rivals.single_calls, device, pass_),
        )
        for pass_ in (FORWARD, TRAINING)
    ]
    return Suite(contests, notes)


def layers(
    device: str = "cpu", widths: Sequence[int] = LAYER_WIDTHS, batch: int | None = None, tokens: int = 197
) -> Suite:
    """Return the suite of layers in a transformer's block: MLP, B-spline KAN and GRKAN; input (8, 197, d).

    On a GPU there are 128 images, and no B-splines.
    """
    from ..models import kat  # noqa: F401  (its ImportError names the extra that brings timm)

    batch = batch or (8 if device == "cpu" else GPU_BATCH)
    contests = [
        Contest(
            {"width": width, **rivals.precision_of(device), "pass": pass_},
            "Mlp",
            partial(rivals.mlps, device, (batch, tokens, width), pass_),
        )
        for width in widths
        for pass_ in (FORWARD, TRAINING)
    ]
    return Suite(contests, _notes(device))


def models(
    device: str = "cpu",
    pairs: Sequence[tuple[str, str]] | None = None,
    batches: Sequence[int] | None = None,
) -> Suite:
    """Compare a Vision Transformer with the KAT of its size: a whole training step with AdamW, and inference.

    Of size tiny, with 8 and 32 images; on a GPU also of size base, with 128 images.
    """
    from ..models import kat  # noqa: F401  (registers the models; its ImportError names the extra that brings timm)

    if pairs is None:
        sizes = ("tiny",) if device == "cpu" else ("tiny", "base")
        pairs = [(f"vit_{size}_patch16_224", f"kat_{size}_patch16_224") for size in sizes]
    batches = batches or ((8, 32) if device == "cpu" else (GPU_BATCH,))
    contests = [
        Contest(
            {"model": names[1], "batch": batch, **rivals.precision_of(device), "pass": pass_},
            names[0],
            partial(rivals.vision_models, device, names, batch, pass_),
        )
        for names in pairs
        for batch in batches
        for pass_ in (TRAIN_STEP, INFERENCE)
    ]
    return Suite(contests, _notes(device))


def deploy(
    device: str = "cpu",
    names: tuple[str, str] = ("vit_tiny_patch16_224", "kat_tiny_patch16_224"),
    batches: Sequence[int] = (1, 8),
    runtimes: Sequence[tuple[str, str]] | None = None,
) -> Suite:
    """Compare a Vision Transformer with the KAT of its size outside of Python, in every installed runtime."""
    if device != "cpu":
        raise GrkanValueError(f"device must be 'cpu' for deploy; got {device!r}")
    from ..models import kat  # noqa: F401  (registers the models; its ImportError names the extra that brings timm)
    from . import deploy as rivals

    files, contests, notes = rivals.Files(names), [], _notes(device)
    for runtime in runtimes or rivals.RUNTIMES:
        if package := rivals.missing(runtime):
            notes.append(f"{' '.join(runtime)} is left out: it needs {package}")
            continue
        for batch in batches if runtime[0] != rivals.EXECUTORCH else (1,):  # its sizes are fixed
            job = {"runtime": runtime[0], "precision": runtime[1], "batch": batch}
            contests.append(Contest(job, names[0], partial(rivals.rivals, files, runtime, batch)))
        if runtime[0] == rivals.OPENVINO:
            notes.append("OpenVINO compiles for the batch of the contest; files that take any batch are slower there")
    if rivals.onnx_library() is None:
        notes.append("this installation has no library for ONNX Runtime")
    return Suite(contests, notes)


def _notes(device: str) -> list[str]:
    if dispatch.find_kernel(device):
        return []
    command = dispatch.BUILD_COMMAND if device == "cpu" else dispatch.TRITON_COMMAND
    return [f"this installation has no native kernel: grkan is plain PyTorch here; to get it: {command}"]


SUITES: dict[str, Callable[[str], Suite]] = {"ops": ops, "layers": layers, "models": models, "deploy": deploy}
"""The suites by their names in `grkan bench`; each takes a device."""
