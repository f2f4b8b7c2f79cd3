"""Load weights to start from (`--init`), and fit them to other classes, image sizes and channels.

They come from a run's folder or a model file, from a checkpoint that the paper's authors released, from a timm file, or
from timm's hub.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ..errors import GrkanError, GrkanTypeError, GrkanValueError, first_of
from ..models.files import load_model, read_metadata
from ..models.metadata import ModelMetadata, Preprocessing, describe_model
from ..models.released import load_released_checkpoint

_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
_SHOWN = 5


@dataclass
class Weights:
    """A model's weights, and what is known about the model."""

    label: str
    """Their name in messages."""
    state: Mapping[str, Tensor]
    classes: Sequence[str] | None
    """The names of the outputs, if they are known."""
    preprocessing: Preprocessing | None
    conversion: Mapping[str, Any] | None
    """The recipe of `grkan.convert_`, if the model was converted."""


def model_file(path: str | Path) -> Path:
    """Return the weights file for a path: the file itself, or the best weights in a run's folder.

    Raises:
        ValueError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise GrkanValueError(f"{path} has no best.safetensors, which a run writes at the end of its first epoch")
    raise GrkanValueError(f"{path} does not exist; give a run's folder or a .safetensors file")


def is_model_file(path: str | Path) -> bool:
    """Return whether `grkan.save_model` wrote the file."""
    try:
        read_metadata(path)
    except (GrkanValueError, FileNotFoundError):
        return False
    return True


def find_start(init: str, model: str | None) -> tuple[str, str, dict[str, Any]]:
    """Find the model that `init` names, without loading its weights.

    Args:
        init: as in `Config`.
        model: the model name in the configuration; needed for a timm file, which does not contain it.

    Returns:
        init, valid in any working directory; the name of its model in timm's registry; the model's arguments.

    Raises:
        ValueError: there is no such start, or it does not name its model.
    """
    if _is_of_timm(init):
        metadata = describe_model(_create_of_timm(init, pretrained=False), None, None, None)
        return init, metadata["model"] or "", _without_classes(metadata)
    path = model_file(init)
    if is_model_file(path):
        metadata = read_metadata(path)
        if metadata["model"] is None:
            raise GrkanValueError(f"init must hold a model of timm's registry, but {path} does not name its model")
        name, arguments = metadata["model"], _without_classes(metadata)
    elif _is_for_timm(model):
        name, arguments = model or "", {}
    else:
        metadata = describe_model(_load_released(path), None, None, None)
        name, arguments = metadata["model"] or "", _without_classes(metadata)
    return os.path.abspath(path), name, arguments


def load_start(init: str, model: str) -> Weights:
    """Load the weights that `find_start` found.

    Raises:
        ValueError: they cannot be read.
    """
    if _is_of_timm(init):
        return _describe(init, _create_of_timm(init, pretrained=True))
    path = Path(init)
    if is_model_file(path):
        metadata = read_metadata(path)
        state = load_model(path).state_dict()
        return Weights(str(path), state, metadata["classes"], metadata["preprocessing"], metadata["conversion"])
    if _is_for_timm(model):
        return Weights(str(path), read_state(model, path), None, None, None)
    return _describe(str(path), _load_released(path))


def fit_weights_(model: nn.Module, weights: Weights, classes: Sequence[str]) -> tuple[bool, list[str]]:
    """Load weights into a model with one output per class and otherwise the same layers.

    Rows of the head are matched by class name. Rows for classes unknown to the weights are 0, as in arXiv 2010.11929,
    appendix B.1.1, so that all classes start equally probable. timm resamples patches, position embeddings and
    everything else that depends on the image size. The weights of the first convolution are summed for one channel, and
    repeated for more.

    Returns:
        Whether any row of the head is new, and lines that say what was done.

    Raises:
        ValueError: the weights do not fit the model.
    """
    own = model.state_dict()
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.state.items()}
    config = getattr(model, "pretrained_cfg", {})
    notes = []
    for name in _names(config.get("first_conv")):
        key = f"{name}.weight"
        if key in state and key in own and state[key].ndim == own[key].ndim == 4:
            before, after = state[key].shape[1], own[key].shape[1]
            if before != after:
                state[key] = _adapt_channels(state[key], after)
                notes.append(f"{name}: made for {before} channels, adapted to {after}")
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if resample is not None:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        try:
            state = dict(resample(state, model))
        except Exception as error:  # timm has no error type for weights that do not fit
            raise GrkanValueError(f"{weights.label} does not fit the model: {' '.join(str(error).split())}") from error
        # Tables that timm omits, because the model makes them itself for its size.
        state |= {name: own[name] for name in shapes.keys() - state.keys() if name in own}
        notes += [
            f"{name}: resampled from {tuple(shapes[name])} to {tuple(tensor.shape)}"
            for name, tensor in state.items()
            if name in shapes and shapes[name] != tensor.shape
        ]
    is_new, about_head = _fit_head(own, state, list(head_parameters(model)), weights, classes)
    _check_fits(own, state, weights.label)
    try:
        model.load_state_dict(state)
    except (RuntimeError, GrkanError) as error:  # a function of another form
        raise GrkanValueError(f"{weights.label} does not fit the model: {' '.join(str(error).split())}") from error
    return is_new, [*notes, *about_head]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the last layers, as named by timm, by their names."""
    heads = _names(getattr(model, "pretrained_cfg", {}).get("classifier"))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(name.startswith(f"{head}.") for head in heads)
    }


def _fit_head(
    own: Mapping[str, Tensor], state: dict[str, Tensor], head: Sequence[str], weights: Weights, classes: Sequence[str]
) -> tuple[bool, list[str]]:
    """Fit the head in `state` to the model: copy the rows of known classes, and set the others to 0."""
    position = {name: row for row, name in enumerate(weights.classes or ())}
    rows = [(i, position[name]) for i, name in enumerate(classes) if name in position]
    if any(key in state and state[key].shape[1:] != own[key].shape[1:] for key in head):
        rows = []  # a head of another width is a different head, which `_check_fits` would reject
    for key in head:
        fitted = torch.zeros_like(own[key])
        if rows and key in state:
            new, old = (torch.tensor(indices) for indices in zip(*rows, strict=True))
            fitted[new] = state[key][old].to(fitted.dtype)
        else:
            rows = []
        state[key] = fitted
    if len(rows) == len(classes):
        return False, []
    if rows:
        known = {i for i, _ in rows}
        new_names = [name for i, name in enumerate(classes) if i not in known]
        return True, [
            f"head: {len(rows)} of {len(classes)} classes are taken from {weights.label}; new: {_list(new_names)}"
        ]
    reason = "it does not name its classes" if weights.classes is None else f"its classes are {_list(weights.classes)}"
    return True, [f"head: new, for {len(classes)} classes; {weights.label} has none of them ({reason})"]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _names(value: Any) -> tuple[str, ...]:
    """Return timm's value, which may be one name, several or none, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt channels as timm does: the sum for one channel, else repeated and scaled so that gray gives the same."""
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    before = weight.shape[1]
    return weight[:, [i % before for i in range(channels)]] * (before / channels)


def _check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], label: str) -> None:
    problems = [
        *(f"{name} is missing" for name in own if name not in state),
        *(f"{name} is unknown" for name in state if name not in own),
        *(
            f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ),
    ]
    if problems:
        raise GrkanValueError(f"{label} does not fit the model: {first_of(problems)}")


# Where weights come from


def _is_of_timm(init: str) -> bool:
    return init.startswith(_HUBS) or (not os.path.exists(init) and timm.is_model(init))


def _is_for_timm(model: str | None) -> bool:
    """Return whether a file that is not grkan's must be one of timm's."""
    return model is not None and not model.startswith("kat_")


def _create_of_timm(name: str, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # the download may raise any error
        reason = " ".join(str(error).split())[:200]
        raise GrkanValueError(f"pretrained weights of {name} are not available: {reason}") from error


def _load_released(path: Path) -> nn.Module:
    try:
        return load_released_checkpoint(path)
    except (GrkanValueError, GrkanTypeError) as error:
        raise GrkanValueError(f"{error}; for a timm checkpoint, name its model with --model NAME") from error


def _describe(label: str, model: nn.Module) -> Weights:
    metadata = describe_model(model, None, None, None)
    classes = _imagenet_classes(model)
    return Weights(label, model.state_dict(), classes, metadata["preprocessing"], metadata["conversion"])


def _imagenet_classes(model: Any) -> list[str] | None:
    """Return the folder names of ImageNet's classes, if the number of outputs matches them."""
    named = getattr(model, "pretrained_cfg", {}).get("label_names")
    subset = infer_imagenet_subset(model)
    if named is None and subset is not None:
        named = ImageNetInfo(subset).label_names()
    return list(named) if named is not None and len(named) == model.num_classes else None


def read_state(name: str, checkpoint: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file with timm.

    Raises:
        ValueError: it holds no weights.
    """
    try:
        return timm.models.load_state_dict(str(checkpoint))
    except Exception as error:  # zipfile, pickle, PyTorch and safetensors all have their own errors
        reason = " ".join(str(error).split())[:200]
        raise GrkanValueError(f"{checkpoint} holds no weights of a {name}: {type(error).__name__}: {reason}") from error


def _without_classes(metadata: ModelMetadata) -> dict[str, Any]:
    return {key: value for key, value in metadata["arguments"].items() if key != "num_classes"}
