"""A job of the exporter: the model, its example input, the sizes that may change, and the expected outputs."""

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GrkanRuntimeError, GrkanTypeError, GrkanValueError
from ..models.metadata import ModelMetadata, describe_model
from ..nn import GroupRational
from ..nn.init import has_no_values
from ..nn.wrappers import unwrap
from ..rational.arguments import check_module

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The allowed difference from PyTorch's output, relative to the largest number in it, by the dtype of the model."""

BATCH, _LENGTH = "batch", "length"

FIXED = "; dynamic=False asks for less"
"""Advice for a model that cannot be traced."""


@dataclass(frozen=True)
class Call:
    """The arguments of a call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the inputs of PyTorch's exporters."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Any]) -> "Call":
        """Return the call with `function` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)

    def of(self, model: Callable[..., Any]) -> Any:
        """Call a model and return its output."""
        return model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Job:
    """A model to be exported.

    `model` is a copy, on the CPU and in eval mode. `example` is the call to trace it with. `sizes` names, for every
    tensor of the example, the dimensions that may change. `calls` are the calls to check.
    """

    model: nn.Module
    example: Call
    sizes: Sequence[Mapping[int, str]]
    calls: Sequence[Call]
    expected: Sequence[Mapping[str, Tensor]]
    metadata: ModelMetadata
    dtype: torch.dtype

    def shapes(self, of: Callable[[str], Any]) -> tuple[Any, dict[str, Any]]:
        """Return the dimensions that may change, in the format of `torch.export`; of(name) represents each."""
        sizes = iter(self.sizes)

        def shape(leaf: Any) -> Any:
            return {dim: of(name) for dim, name in next(sizes).items()} if isinstance(leaf, Tensor) else None

        return pytree.tree_map(shape, (self.example.args, dict(self.example.kwargs)))

    def dynamic_shapes(self, of: Callable[[str], Any]) -> Any:
        """Return the `dynamic_shapes` of `torch.export.export` and `torch.onnx.export`."""
        args, kwargs = self.shapes(of)
        if not any(self.sizes):
            return None
        return args if not kwargs else kwargs if not args else {**self._by_name(args), **kwargs}

    def _by_name(self, args: tuple[Any, ...]) -> dict[str, Any]:
        names = list(inspect.signature(self.model.forward).parameters)
        return dict(zip(names, args, strict=False))

    def check(self, what: str, run: Callable[[Call], Sequence[Any]], tolerance: float | None = None) -> float:
        """Compare the export with PyTorch, and return the largest difference, relative to an output's largest number.

        Raises:
            RuntimeError: they differ by more than the tolerance. None: the tolerance of the model's dtype.
        """
        tolerance = TOLERANCE[self.dtype] if tolerance is None else tolerance
        worst = 0.0
        for call, expected in zip(self.calls, self.expected, strict=True):
            shapes = ", ".join(str(tuple(t.shape)) for t in call.tensors())
            for (name, wanted), found in zip(expected.items(), run(call), strict=True):
                got = torch.as_tensor(found).double()
                if got.shape != wanted.shape:
                    raise GrkanRuntimeError(
                        f"{what} returns {name} of shape {tuple(got.shape)} for inputs "
                        f"of shape {shapes}, but PyTorch returns "
                        f"{tuple(wanted.shape)}; nothing was written"
                    )
                scale = float(wanted.double().abs().max()) if wanted.numel() else 0.0
                difference = float((got - wanted.double()).abs().max()) / (scale or 1.0) if wanted.numel() else 0.0
                if not difference <= tolerance:
                    raise GrkanRuntimeError(
                        f"{what} computes something different from PyTorch: for inputs of shape {shapes}, {name} "
                        f"differs by {difference:.2g} of its largest number, more than the tolerance "
                        f"{tolerance:g}; nothing was written"
                    )
                worst = max(worst, difference)
        return worst


def make_job(model: Any, example: Any, dynamic: bool, batch: int = 2, resizes: bool = True) -> Job:
    """Make the job for a model. Raises TypeError and ValueError as `grkan.export` does.

    Args:
        model, example, dynamic: as for `grkan.export`.
        batch: the number of images if no example is given.
        resizes: whether the height and the width of an image may change.
    """
    original = unwrap(check_module("model", model))
    if any(has_no_values(t) for t in original.state_dict().values()):
        raise GrkanValueError("model must have its weights in memory; they are meta or fake tensors")
    metadata = describe_model(original, None, None, None)
    copied = copy.deepcopy(original).cpu().eval().requires_grad_(False)
    config: Any = getattr(copied, "config", None)
    if getattr(config, "use_cache", False):  # keys and values of earlier tokens must not be outputs
        config.use_cache = False
    dtype = _dtype(copied)
    if dtype not in TOLERANCE:
        raise GrkanTypeError(f"model must have a floating dtype; got {dtype}")
    given = _default_example(copied, metadata, dtype, batch) if example is None else _as_call(example)
    given = given.map(lambda t: t.detach().cpu())
    if not given.tensors():
        raise GrkanValueError(f"example must contain a tensor; got {example!r}")
    resizes = resizes and getattr(copied, "dynamic_img_size", False)
    varying = [_sizes(t, resizes) if dynamic else {} for t in given.tensors()]
    calls = [given]
    if any(varying):
        calls += [_resized(given, varying, {BATCH: 3, _LENGTH: 7}, _patch(copied))]
    job_example = _resized(given, varying, {BATCH: 2, _LENGTH: 5}, _patch(copied)) if any(varying) else given
    expected = [outputs(_run(copied, call)) for call in calls]
    return Job(copied, job_example, varying, calls, expected, metadata, dtype)


def outputs(y: Any) -> dict[str, Tensor]:
    """Return the tensors in a model's output, by name."""
    leaves = [leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor)]
    if isinstance(y, Tensor):
        return {"output": y}
    if isinstance(y, Mapping) and len(leaves) == sum(isinstance(value, Tensor) for value in y.values()):
        return {name: value for name, value in y.items() if isinstance(value, Tensor)}
    return {f"output_{i}": leaf for i, leaf in enumerate(leaves)}


def _as_call(example: Any) -> Call:
    if isinstance(example, Tensor):
        return Call((example,))
    if isinstance(example, Mapping):
        return Call((), dict(example))
    if isinstance(example, (tuple, list)):
        return Call(tuple(example))
    raise GrkanTypeError(
        f"example must be a Tensor, a tuple of arguments or a mapping of keyword arguments; got {example!r}"
    )


def _run(model: nn.Module, call: Call) -> Any:
    try:
        with torch.no_grad():
            return call.of(model)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a model may raise any error
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in call.tensors())
        raise GrkanValueError(
            f"example must be an input that the model accepts; for {shapes} it raises {one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    """Format an error of a library as one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextlib.contextmanager
def quietly(what: str, advice: str = "") -> Iterator[None]:
    """Run an exporter without its warnings and log messages, and report a failure in one line.

    Exporters have no error type for a model that they cannot handle, so any exception counts as one.

    Raises:
        ValueError: the block failed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise GrkanValueError(f"model cannot be {what}: {one_line(_cause(error))}{advice}") from error
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> BaseException:
    """Return the original cause of an error, because the exporters' own errors are pages long."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the weights, without the coefficients, which are float32 in any model."""
    coefficients = {id(p) for m in model.modules() if isinstance(m, GroupRational) for p in m.parameters()}
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    weights = [p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in coefficients]
    return next(iter(weights or floats), torch.float32)


# Examples.


def _default_example(model: Any, metadata: ModelMetadata, dtype: torch.dtype, batch: int) -> Call:
    generator = torch.Generator().manual_seed(0)

    def images(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator).to(dtype)

    preprocessing = metadata["preprocessing"]
    if preprocessing and "input_size" in preprocessing:
        return Call((images(*preprocessing["input_size"]),))
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values" and isinstance(
        size := getattr(config, "image_size", None), int
    ):
        return Call((), {"pixel_values": images(getattr(config, "num_channels", 3), size, size)})
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        kwargs = dict(dummy)
        tokens = kwargs.get("input_ids")
        if isinstance(tokens, Tensor) and "attention_mask" in inspect.signature(model.forward).parameters:
            mask = torch.ones_like(tokens)
            mask[0, -1] = 0  # one sentence is shorter than the other
            kwargs.setdefault("attention_mask", mask)
        return Call((), kwargs)
    raise GrkanValueError(
        "example must be given, an input of the model: the model is not one of timm's, which know the size of their "
        "images, and has no dummy_inputs, as the models of transformers do"
    )


def _sizes(t: Tensor, resizes: bool) -> dict[int, str]:
    """Return the dimensions of an input that may change: batch, text length, and height and width if `resizes`."""
    names = {0: BATCH} if t.dim() else {}
    if t.dim() == 2 and not t.is_floating_point():
        names[1] = _LENGTH
    if t.dim() == 4 and t.is_floating_point() and resizes:
        names |= {2: "height", 3: "width"}
    return names


def _patch(model: Any) -> tuple[int, int]:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def _resized(
    call: Call, varying: Sequence[Mapping[int, str]], sizes: Mapping[str, int], patch: tuple[int, int]
) -> Call:
    """Return a call with other sizes, by repeating values. An image grows by one patch in height and two in width."""
    names = iter(varying)

    def resize(t: Tensor) -> Tensor:
        for dim, name in next(names).items():
            wanted = sizes.get(name) or t.shape[dim] + (patch[0] if name == "height" else 2 * patch[1])
            t = t.index_select(dim, torch.arange(wanted) % t.shape[dim])
        return t

    return call.map(resize)
