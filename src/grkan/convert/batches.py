"""Run a model on the user's batches, in the forms that `convert_` documents."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrkanTypeError, GrkanValueError

Forward = Callable[[nn.Module, Any], Any] | None


def check_forward(forward: Forward) -> None:
    if forward is not None and not callable(forward):
        raise GrkanTypeError(f"forward must be callable as forward(model, batch); got {forward!r}")


def as_batches(calibration: Any) -> Iterator[Any]:
    """Return an iterator over batches; one Tensor or Mapping is one batch."""
    if isinstance(calibration, (Tensor, Mapping)):
        return iter([calibration])
    if isinstance(calibration, (str, bytes)) or not isinstance(calibration, Iterable):
        raise GrkanTypeError(
            f"calibration must be an iterable of batches, a Tensor or a Mapping; got {type(calibration).__name__}"
        )
    return iter(calibration)


def run_on(model: nn.Module, batch: Any, forward: Forward) -> Any:
    """Return the model's output, with the same random numbers each time; the user's generators do not change."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(0)
        if forward is not None:
            return forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (tuple, list)) and batch:
            return model(batch[0])
        if isinstance(batch, Tensor):
            return model(batch)
    raise GrkanTypeError(f"a batch must be a Mapping, a Tensor, or a tuple or list of them; got {type(batch).__name__}")


def real_tokens(batch: Any) -> list[Tensor]:
    """Return the boolean masks of the real tokens in a batch, found by the names that transformers and PyTorch use."""
    if not isinstance(batch, Mapping):
        return []
    found = []
    for name, mask in batch.items():
        if not (isinstance(name, str) and isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_complex()):
            continue
        if name.endswith("attention_mask"):
            found.append(mask > 0)
        elif name.endswith("key_padding_mask") and mask.dtype == torch.bool:
            found.append(~mask)
    return [mask for mask in found if mask.any()]


def selected_rows(x: Tensor, masks: list[Tensor]) -> Tensor | None:
    """Return the flattened mask that fits x (batch, length, C) or (batch length, C), or None if none fits."""
    for mask in masks:
        if x.shape[:-1] in (mask.shape, (mask.numel(),)):
            return mask.flatten().to(x.device)
    return None


def rejected(number: int, error: Exception) -> GrkanValueError:
    """Return the error for a batch with which the model fails."""
    return GrkanValueError(
        f"calibration must have batches that the model accepts; batch {number} raises "
        f"{type(error).__name__}: {' '.join(str(error).split())}"
    )


def no_batches() -> GrkanValueError:
    return GrkanValueError("calibration must have at least one batch; it is empty, or a generator that is used up")
