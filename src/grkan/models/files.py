"""Model files: weights, and the metadata needed to use them, in one safetensors file.

The metadata is one JSON document under the key "grkan", see `metadata.py`. Nothing is unpickled.
"""

import json
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..convert.recipe import apply_recipe, check_recipe, recipe_of
from ..errors import GrkanImportError, GrkanTypeError, GrkanValueError, first_of
from ..nn.init import has_no_values, is_sharded
from ..nn.wrappers import plain_name, unwrap
from ..rational.arguments import check_module
from ..writing import replacing
from .build import WrongArgumentsError, build_model
from .metadata import NOT_ARCHITECTURE, ModelMetadata, describe_model, forms, parse_metadata

_KEY = "grkan"


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to one safetensors file, from which `load_model` builds it again.

    The file is written whole or not at all, even if it replaces another.

    Args:
        model: any module. A model of timm's registry, including grkan's, is built again from its file alone if its
            arguments are known; the weights of any other can be loaded into an existing module. Tied weights stay tied,
            and dtypes are kept. The file also records what `grkan.convert_` did to the model. For a wrapper (DDP,
            DataParallel, FSDP, torch.compile, an average of the weights) the model inside is saved.
        path: the file; replaced if it exists. Its folder must exist.
        state_dict: the weights, if the model does not hold them whole, as when it is sharded: the result of
            `torch.distributed.checkpoint.state_dict.get_model_state_dict` or of Accelerate's `get_state_dict`.
        classes: the names of the outputs; None: those of the file that the model was loaded from, if any.
        preprocessing: how images become inputs, as JSON; None: that of the file that the model was loaded from, else
            timm's for the model (input_size, interpolation, mean, std, crop_pct, crop_mode).
        arguments: the keyword arguments of `timm.create_model` that made the model; None: those that grkan's models,
            and timm in recent versions, remember, updated by what `reset_classifier` and `set_input_size` changed.

    Raises:
        ImportError: safetensors is missing.
        FileNotFoundError, IsADirectoryError, OSError: the path cannot be written.
        TypeError: an argument has a wrong type; or an element of arguments, or preprocessing, is not JSON.
        ValueError: the number of classes differs from that of the model's outputs; the model has no values (meta or
            fake tensors), or only a part of it; or state_dict does not have the names of the model.
    """
    safetensors = _safetensors()
    path = _check_path(path)
    weights = _weights(check_module("model", model), state_dict)
    model = unwrap(model)
    for name, value in (("preprocessing", preprocessing), ("arguments", arguments)):
        if value is not None and not isinstance(value, Mapping):
            raise GrkanTypeError(f"{name} must be a mapping; got {value!r}")
    if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
        raise GrkanTypeError(f"classes must be a sequence of names; got {classes!r}")
    metadata = describe_model(model, classes, preprocessing, arguments)
    try:
        with replacing(path) as temporary:
            # save_model uses nothing of a model but its state dict.
            safetensors.torch.save_model(weights, str(temporary), metadata={_KEY: json.dumps(metadata)})
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def load_model(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read a model that `save_model` wrote.

    Args:
        path: the file.
        model: a module to load the weights into, unchanged if loading fails; None: build one on the CPU, with the
            dtypes of the file. Required if the file does not name a model of timm's registry. If the file holds a
            converted model, the module is converted the same way, unless it already is converted.

    Returns:
        The model in eval mode. Its attribute `grkan_metadata` holds what `read_metadata` returns.

    Raises:
        ImportError: safetensors, or timm for a model of its registry, is missing.
        FileNotFoundError: there is no such file.
        TypeError: path is not a path, or model is not a module.
        ValueError: the file is not one of grkan's, is damaged or of a newer version; the model cannot be built, or is
            on the meta device; or file and model differ in names, shapes, or the form of a rational function. The
            message says which.
    """
    path = _check_path(path)
    if model is not None:
        _check_data(check_module("model", model).state_dict())
    metadata, state = _read(path, tensors=True)
    inner = _build(metadata, path) if model is None else unwrap(model)
    undo = _repeat_conversion(inner, metadata, path)
    try:
        _check_weights_fit(inner, metadata, state, path)
    except ValueError:
        undo()
        raise
    if model is None:
        for name, tensor in inner.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(state[name].dtype)
    inner.load_state_dict(state)
    inner.grkan_metadata = metadata  # type: ignore[assignment]
    return (inner if model is None else model).eval()


def read_metadata(path: str | os.PathLike[str]) -> ModelMetadata:
    """Read the metadata of a file that `save_model` wrote, without the weights.

    Raises:
        ImportError, FileNotFoundError, ValueError: as for `load_model`.
    """
    return _read(_check_path(path), tensors=False)[0]


def _check_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise GrkanTypeError(f"path must be a str or a pathlib.Path; got {path!r}")
    return Path(path)


def _check_data(state: Mapping[str, Tensor]) -> None:
    if empty := [name for name, t in state.items() if has_no_values(t)]:
        raise GrkanValueError(
            f"model must have its weights in memory; {empty[0]} and {len(empty) - 1} others are meta or fake tensors"
        )


class _Weights:
    """A stand-in for a model, with the one method that safetensors calls."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def _weights(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> _Weights:
    """Return the weights of a model under its own names, without those of wrappers around it or its parts."""
    if state_dict is None:
        state = _plain_names(unwrap(model).state_dict())
        if sharded := [name for name, t in state.items() if is_sharded(t) or "_flat_param" in name]:
            raise GrkanValueError(
                f"model must not be sharded, but {sharded[0]} is sharded; gather a state dict in all processes, and "
                "call save_model(model, path, state_dict) in one of them"
            )
    else:
        if not isinstance(state_dict, Mapping) or not all(isinstance(t, Tensor) for t in state_dict.values()):
            raise GrkanTypeError(f"state_dict must be a mapping of names to tensors; got {reprlib.repr(state_dict)}")
        outer = "module." if model is not unwrap(model) else ""
        state = {name.removeprefix(outer): tensor for name, tensor in _plain_names(state_dict).items()}
        # Calling state_dict() makes FSDP1 gather its shards, and wait for the other processes.
        if not any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            expected = _plain_names(unwrap(model).state_dict()).keys()
            if wrong := expected ^ state.keys():
                raise GrkanValueError(
                    f"state_dict must have the same names as the model; {min(wrong)} "
                    f"and {len(wrong) - 1} others are in "
                    "only one of the two"
                )
    _check_data(state)
    return _Weights(_without_padding(state))


def _without_padding(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that use only a part of their memory, as gathered ones may; safetensors refuses these."""
    copies: dict[Any, Tensor] = {}  # tied weights stay tied
    for name, t in state.items():
        if t.untyped_storage().nbytes() != t.numel() * t.itemsize:
            state[name] = copies.setdefault((t.data_ptr(), t.shape, t.stride()), t.clone())
    return state


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in state.items()}


def _safetensors() -> Any:
    try:
        import_module("safetensors.torch")
        return import_module("safetensors")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "safetensors":
            raise
        raise GrkanImportError('model files need safetensors; install it with: pip install "grkan[models]"') from error


def _read(path: Path, tensors: bool) -> tuple[ModelMetadata, dict[str, Tensor]]:
    safetensors = _safetensors()
    if path.is_dir():
        raise GrkanValueError(f"{path} is a folder, not a model file")
    if not path.exists():
        raise FileNotFoundError(f"there is no model file {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            entries = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise GrkanValueError(f"{path} is damaged, or not a safetensors file: {error}") from error
    if _KEY not in entries:
        raise GrkanValueError(f"{path} was not written by grkan.save_model: it has no metadata of grkan")
    try:
        metadata = parse_metadata(entries[_KEY])
    except GrkanValueError as error:
        raise GrkanValueError(f"{path} {error}") from error
    # Of tied weights safetensors stores one; the file's metadata maps the other names to it.
    state |= {name: state[kept] for name, kept in entries.items() if kept in state and name != _KEY}
    return metadata, state


def _build(metadata: ModelMetadata, path: Path) -> nn.Module:
    """Build the module that the metadata describe, on the CPU; its weights do not matter yet."""
    name = metadata["model"]
    if name is None:
        raise GrkanValueError(
            f"{path} does not say how to build its model; pass the model: load_model(path, model=...)"
        )
    from . import kat  # noqa: F401  registers the models

    timm = import_module("timm")
    if not timm.is_model(name):
        raise GrkanValueError(
            f"{path} holds a {name!r}, which timm does not know; pass the model: load_model(path, model=...)"
        )
    arguments = {key: value for key, value in metadata["arguments"].items() if key not in NOT_ARCHITECTURE}
    # The initial weights are not used, and the mimetic start takes a minute.
    wanted = {key: value for key, value in arguments.items() if key != "attn_init"}
    try:
        model = build_model(name, wanted)
    except WrongArgumentsError as error:
        raise GrkanValueError(f"{path} holds a {name!r} that cannot be built: {error}") from error
    model.grkan_arguments = arguments  # type: ignore[assignment]
    return model


def _repeat_conversion(model: nn.Module, metadata: ModelMetadata, path: Path) -> Callable[[], None]:
    """Convert a model as the one in the file was, if it is not converted yet. Return a function that undoes it."""
    recipe = metadata["conversion"]
    if recipe is None or recipe_of(model) is not None:
        return lambda: None
    try:
        return apply_recipe(model, check_recipe(recipe))
    except (GrkanTypeError, GrkanValueError) as error:
        raise GrkanValueError(f"{path} holds a converted model, of which the {error}") from error


def _check_weights_fit(model: nn.Module, metadata: ModelMetadata, state: dict[str, Tensor], path: Path) -> None:
    """Raise if the weights do not belong to the model."""
    expected = model.state_dict()
    problems = [
        *(f"{name} is missing" for name in expected if name not in state),
        *(f"{name} is unknown" for name in state if name not in expected),
        *(
            f"{name} has shape {tuple(t.shape)} instead of {tuple(expected[name].shape)}"
            for name, t in state.items()
            if name in expected and t.shape != expected[name].shape
        ),
        *(
            f"{name} has the form {metadata['forms'][name]!r} instead of {form!r}"
            for name, form in forms(model).items()
            if metadata["forms"].get(name, form) != form
        ),
    ]
    if problems:
        raise GrkanValueError(f"{path} does not fit the model: {first_of(problems)}")
