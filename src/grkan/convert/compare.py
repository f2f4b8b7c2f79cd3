"""Measure how far a converted model, and each of its MLPs, is from the original: on the data, in bounded memory."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.kinds import is_conv1d, linear_width
from ..nn.modes import evaluating
from .batches import real_tokens
from .calibrate import GroupFit, Histogram
from .recipe import LayerRecipe, Recipe, apply_recipe
from .site import Site

# A few batches are kept, spread over all of them: at least _FEW, else a quarter, but at most _MANY and _BYTES.
_FEW, _MANY, _BYTES = 4, 64, 2**25
# How many scalars of an output are kept.
_OUTPUT = 2**20

Run = Callable[[nn.Module, Any], Any]


class KeptBatches:
    """Some of the batches, each with the model's output.

    Args:
        model: the model whose outputs are compared.
        run: calls the model with a batch.
    """

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self.run = model, run
        self.step = 1
        self.inside = False
        self.kept: list[tuple[int, Any, Tensor]] = []

    def feed(self, number: int, batch: Any) -> None:
        """Run the model with a batch, and keep the batch if it is one of those wanted."""
        wanted = number % self.step == 0
        own = copy.deepcopy(batch) if wanted else None  # the model may change it
        output = self.output(batch)
        if not wanted or output is None:
            return
        self.kept.append((number, own, output))
        while len(self.kept) > 1 and self.too_much(number + 1):
            self.step *= 2
            self.kept = [entry for entry in self.kept if entry[0] % self.step == 0]

    def too_much(self, seen: int) -> bool:
        """Return whether too many batches are kept."""
        size = sum(_bytes(batch) + _bytes(output) for _, batch, output in self.kept)
        return size > _BYTES or len(self.kept) > min(_MANY, max(_FEW, seen / 4))

    def output(self, batch: Any) -> Tensor | None:
        """Return some rows of the model's first output that is not a loss, for a batch."""
        masks = real_tokens(batch)
        found = None if self.inside else main_output(self.run(self.model, batch))
        if found is None or _is_zero(found):  # only tokens, a loss, or zeros of a new head: look inside the model
            inside = self.output_inside(batch)
            self.inside = inside is not None
            found = found if inside is None else inside
        return None if found is None else _some_rows(found, masks)

    def output_inside(self, batch: Any) -> Tensor | None:
        """Return the output of the model's first call (it may generate), or else of its last part; none of zeros."""
        own: list[Tensor] = []
        parts: list[Tensor] = []

        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if (found := main_output(output)) is not None and not _is_zero(found):
                if module is self.model:
                    own.append(found.detach().clone()) if not own else None
                else:
                    parts[:] = [found.detach()]

        with ExitStack() as stack:
            for module in self.model.modules():
                stack.enter_context(_removing(module.register_forward_hook(hook)))
            self.run(self.model, batch)
        return next(iter(own + parts), None)

    def compare(self) -> tuple[float | None, float | None]:
        """Return the cosine and relative error of the current outputs against the kept ones; None if all are zero."""
        before, after = [], []
        with evaluating(self.model):
            for _, batch, output in self.kept:
                now = self.output(batch)
                if now is not None and now.shape == output.shape:
                    before.append(output)
                    after.append(now)
        if all(map(_is_zero, before + after)):
            return None, None
        return _cosine_and_error(before, after)


def _is_zero(output: Tensor) -> bool:
    parts = output.unbind() if output.is_nested else [output]  # nested tensors lack `any`
    return not any(part.any() for part in parts)


def main_output(output: Any, name: str = "") -> Tensor | None:
    """Return a model's first floating-point output that is neither a loss nor a single number, or None."""
    if "loss" in name.lower():
        return None
    if isinstance(output, Tensor):
        one = output.dim() < 2 and output.numel() == 1
        return output if output.is_floating_point() and not one else None
    items: Iterator[tuple[str, Any]] = iter(())
    if isinstance(output, Mapping):
        items = ((str(key), value) for key, value in output.items())
    elif hasattr(output, "__dataclass_fields__"):
        items = iter(vars(output).items())
    elif isinstance(output, (tuple, list)):
        items = zip(getattr(output, "_fields", [""] * len(output)), output, strict=True)
    return next((found for key, value in items if (found := main_output(value, key)) is not None), None)


def _some_rows(output: Tensor, masks: Sequence[Tensor], scalars: int = _OUTPUT) -> Tensor:
    """Copy some rows of an output (..., C), without those of padding: (rows, C) on the CPU."""
    output = output.detach()
    if output.is_nested:
        output = torch.cat([part.reshape(-1, part.shape[-1]) for part in output.unbind()])
    rows = output.reshape(-1, output.shape[-1]) if output.dim() > 1 else output.reshape(-1, 1)
    for mask in masks:
        if output.dim() > 2 and output.shape[:-1] == mask.shape:
            rows = rows[mask.flatten().to(rows.device)]
            break
    step = max(1, -(-rows.numel() // scalars))
    return rows[::step].to("cpu", copy=True)


def _bytes(value: Any) -> int:
    """Estimate how much memory a batch takes."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return int(getattr(value, "nbytes", 0) or sys.getsizeof(value))


def _cosine_and_error(before: list[Tensor], after: list[Tensor]) -> tuple[float | None, float | None]:
    if not before:
        return None, None
    product = power = size = error = 0.0
    for old, new in zip(before, after, strict=True):
        x, y = old.double().flatten(), new.double().flatten()
        finite = x.isfinite()  # masked logits are not
        x, y = x[finite], y[finite]
        product += float(x @ y)
        size += float(x @ x)
        power += float(y @ y)
        error += float((y - x).square().sum())
    norms = math.sqrt(size) * math.sqrt(power)
    relative = math.sqrt(error / size) if size else math.sqrt(error)
    return (product / norms if norms else 1.0), (relative if math.isfinite(relative) else math.inf)


def some_rows(output: Any) -> Tensor | None:
    """Return some rows of a model's main output, on the CPU; None if it has none."""
    found = main_output(output)
    return None if found is None else _some_rows(found, ())


def is_same(before: Tensor | None, after: Tensor | None) -> bool:
    """Return whether rows of two outputs are the same but for rounding; also True if there is nothing to compare."""
    if before is None or after is None:
        return True
    error = _error_between(before, after)
    return error is not None and error < 1e-2


def output_error(site: Site, histogram: Histogram, fits: list[GroupFit]) -> float:
    """Return the relative error, in norm, of an MLP's output on the kept rows of its activation's inputs.

    The output is that of the second linear layer, if the activation's output goes straight into it, else that of the
    activation. The result is the larger of the errors on all rows and on rows of usual size, so that a few large rows
    do not hide the error of the others.
    """
    x, weights = histogram.row_weights()
    parts = list(zip(fits, x.split(site.width // len(fits), 1), strict=True))
    y = torch.cat([torch.from_numpy(f.target(part.numpy())) for f, part in parts], 1)
    error = torch.cat([torch.from_numpy(f.fit(part.numpy())) for f, part in parts], 1) - y
    largest = float(y.abs().max()) or 1.0
    second: Any = histogram.second
    weight = getattr(second, "weight", None)
    if linear_width(second) is not None and isinstance(weight, Tensor) and weight.is_floating_point():
        weight = weight.detach().to("cpu", torch.float32)
        weight = weight.T if is_conv1d(second) else weight.flatten(1)
        bias = None if second.bias is None else second.bias.detach().to("cpu", torch.float32) / largest
        y, error = F.linear((y / largest).float(), weight, bias), F.linear((error / largest).float(), weight)
    else:
        y, error = y / largest, error / largest
    of_rows = torch.stack([error.double().square().sum(1), y.double().square().sum(1)])
    usual = weights.clone()
    usual[: len(histogram.largest.rows)] = 0.0
    found = 0.0
    for by in (weights, usual):
        off, size = (of_rows @ by).tolist()
        found = max(found, math.sqrt(off / size) if size else math.sqrt(off))
    return found if math.isfinite(found) else math.inf


def errors_alone(
    model: nn.Module, sites: Sequence[Site], entries: Sequence[LayerRecipe], batch: Any, run: Run
) -> Iterator[float]:
    """Yield the error of each MLP's output on one batch when nothing else in the model is converted.

    It is the error of the second linear layer's output or of the enclosing module's, whichever is larger, or of the
    model's if neither is seen. Only the first call of a module counts, because later calls see its effects.
    """

    def outputs(modules: Sequence[nn.Module | None]) -> list[Tensor | None]:
        seen: dict[int, Tensor] = {}
        masks = real_tokens(batch)

        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if id(module) not in seen and (found := main_output(output)) is not None:
                seen[id(module)] = _some_rows(found, masks, _OUTPUT // 16)

        with evaluating(model), ExitStack() as stack:
            for module in {id(module): module for module in modules if module is not None}.values():
                stack.enter_context(_removing(module.register_forward_hook(hook)))
            run(model, copy.deepcopy(batch))
        return [seen.get(id(module)) for module in modules]

    own = [[site.second, site.parent if site.parent is not model else None] for site in sites]
    before = iter(outputs([module for pair in own for module in [*pair, model]]))
    for pair, entry in zip(own, entries, strict=True):
        undo = apply_recipe(model, Recipe((entry,)), record=False)
        try:
            after = outputs([*pair, model])
        finally:
            undo()
        errors = [_error_between(next(before), now) for now in after]
        of_model = math.inf if errors[2] is None else errors[2]
        yield max((error for error in errors[:2] if error is not None), default=of_model)


def _error_between(before: Tensor | None, after: Tensor | None) -> float | None:
    """Return the relative error: None without an output before, infinite if the one after is missing or differs."""
    if before is None:
        return None
    if after is None or after.shape != before.shape:
        return math.inf
    return _cosine_and_error([before], [after])[1]


class _removing:
    """A context manager that removes a hook at the end of the block."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
