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


def rejected(number: int, error: Exception) -> GrkanValueError:
    """Return the error for a batch with which the model fails."""
    return GrkanValueError(
        f"calibration must have batches that the model accepts; batch {number} raises "
        f"{type(error).__name__}: {' '.join(str(error).split())}"
    )


def no_batches() -> GrkanValueError:
    return GrkanValueError("calibration must have at least one batch; it is empty, or a generator that is used up")
