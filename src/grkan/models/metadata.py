"""The metadata of a model file: one JSON document, with the fields of `ModelMetadata`."""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, cast

from torch import nn

from .._version import __version__
from ..convert.recipe import recipe_of
from ..errors import GrkanTypeError, GrkanValueError
from ..nn import GroupRational

FORMAT_VERSION = 1

# Arguments of timm.create_model that say where weights come from or go to, not what the model is. If a file could set
# them, it could make a loader fetch or unpickle something.
NOT_ARCHITECTURE = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
    "device",
    "dtype",
    "grkan",  # a conversion, which has a field of its own
)


class Preprocessing(TypedDict, total=False):
    """How images become inputs: arguments of `timm.data.create_transform`. There may be further ones."""

    input_size: Sequence[int]
    """Channels, height, width."""
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float | None
    crop_mode: str | None


class ModelMetadata(TypedDict):
    """The metadata that `save_model` writes about a model."""

    format_version: int
    grkan_version: str
    model: str | None
    """The name in timm's registry."""
    arguments: dict[str, Any]
    """The keyword arguments for `timm.create_model`."""
    classes: list[str] | None
    """The names of the outputs."""
    preprocessing: Preprocessing | None
    forms: dict[str, str]
    """The form of every rational function, by the name of its module."""
    conversion: dict[str, Any] | None
    """The recipe of `grkan.convert_`."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(n) is int and n > 0 for n in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_number, value))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# What each field must hold in JSON: in words, and as a check.
_METADATA_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format_version": ("a whole number, at least 1", lambda value: type(value) is int and value >= 1),
    "grkan_version": ("a string", lambda value: isinstance(value, str)),
    "model": ("a string or null", lambda value: value is None or isinstance(value, str)),
    "arguments": ("an object", lambda value: isinstance(value, dict)),
    "classes": ("a list of strings, or null", lambda value: value is None or _are_names(value)),
    "preprocessing": ("an object or null", lambda value: value is None or isinstance(value, dict)),
    "forms": ("an object of strings", lambda value: isinstance(value, dict) and _are_names([*value.values()])),
    "conversion": ("an object or null", lambda value: value is None or isinstance(value, dict)),
}
_PREPROCESSING_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "input_size": ("three positive whole numbers", _is_size),
    "mean": ("a list of numbers", _are_numbers),
    "std": ("a list of numbers", _are_numbers),
    "interpolation": ("a string", lambda value: isinstance(value, str)),
    "crop_pct": ("a positive number or null", lambda value: value is None or (_is_number(value) and value > 0)),
    "crop_mode": ("a string or null", lambda value: value is None or isinstance(value, str)),
}


def parse_metadata(text: str) -> ModelMetadata:
    """Parse the metadata from a JSON document.

    Raises:
        ValueError: it is damaged, or from a newer version of grkan. The message is the end of a sentence about the
            file.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for a number with too many digits, or too many brackets
        raise GrkanValueError(f"is damaged: its metadata is not JSON ({error})") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise GrkanValueError(
            f"has format {version}, but this version of grkan reads only formats up to {FORMAT_VERSION}: upgrade grkan"
        )
    if problem := _metadata_problem(fields):
        raise GrkanValueError(f"is damaged: {problem}")
    return cast(ModelMetadata, fields)


def describe_model(
    model: nn.Module,
    classes: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    arguments: Mapping[str, Any] | None,
) -> ModelMetadata:
    """Make the metadata of a model, as they read back from a file; the arguments are those of `save_model`.

    Raises:
        TypeError: an argument, or preprocessing, is not JSON.
        ValueError: a field of preprocessing is wrong; or the number of classes differs from that of the outputs.
    """
    previous: ModelMetadata | None = getattr(model, "grkan_metadata", None)
    name = None
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if cfg is not None:  # built by timm
        name = cfg.get("architecture")
        arguments = _arguments(model) if arguments is None else arguments
        preprocessing = preprocessing or _preprocessing(model, arguments, previous and previous["preprocessing"])
    if classes is None and previous is not None:
        classes = previous["classes"]
    if classes is not None:
        classes = [str(c) for c in classes]
        outputs = getattr(model, "num_classes", len(classes))
        if outputs != len(classes):
            raise GrkanValueError(
                f"classes must have a name for each of the model's {outputs} outputs; got {len(classes)}"
            )
    arguments = {key: value for key, value in (arguments or {}).items() if key not in NOT_ARCHITECTURE}
    recipe = recipe_of(model)
    fields: ModelMetadata = {
        "format_version": FORMAT_VERSION,
        "grkan_version": __version__,
        "model": name,
        "arguments": {key: _as_json(key, value) for key, value in arguments.items()},
        "classes": classes,
        "preprocessing": _as_json("preprocessing", preprocessing),
        "forms": forms(model),
        "conversion": None if recipe is None else recipe.to_dict(),
    }
    if problem := _problem(fields["preprocessing"] or {}, _PREPROCESSING_FIELDS):
        raise GrkanValueError(f"preprocessing: {problem}")
    return fields


def forms(model: nn.Module) -> dict[str, str]:
    """Return the form of every rational function, by the name of its module."""
    return {name: module.form for name, module in model.named_modules() if isinstance(module, GroupRational)}


def _metadata_problem(fields: Any) -> str | None:
    if not isinstance(fields, dict):
        return f"its metadata must be an object; got {reprlib.repr(fields)}"
    if missing := [name for name in _METADATA_FIELDS if name not in fields]:
        return f"its metadata lack {', '.join(missing)}"
    return _problem(fields, _METADATA_FIELDS) or _problem(fields["preprocessing"] or {}, _PREPROCESSING_FIELDS)


def _problem(fields: Mapping[str, Any], known: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> str | None:
    """Describe the first wrong field, or return None if all are right."""
    for name, (kind, is_right) in known.items():
        if name in fields and not is_right(fields[name]):
            return f"{name} must be {kind}; got {reprlib.repr(fields[name])}"
    return None


def _as_json(name: str, value: Any) -> Any:
    """Return the value as it reads back from JSON."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):  # ValueError: it contains itself
        raise GrkanTypeError(
            f"{name} must be valid JSON (numbers, strings, lists), to be written to a file; got {value!r}; "
            "save_model(..., arguments=...) overrides the arguments that the model was made with"
        ) from None


def _arguments(model: Any) -> dict[str, Any]:
    """Return the arguments that a model of timm's registry was made with, updated by later changes."""
    from timm import models

    if hasattr(model, "grkan_arguments"):
        arguments = dict(model.grkan_arguments)
    elif hasattr(models, "get_model_args"):
        arguments = models.get_model_args(model)
    else:
        arguments = {}
    if isinstance(getattr(model, "num_classes", None), int):
        arguments["num_classes"] = model.num_classes
    if isinstance(model, models.VisionTransformer):
        # The initial pooling determines where the last norm is; it stays there if the pooling changes.
        arguments |= {"global_pool": model.global_pool, "fc_norm": not isinstance(model.fc_norm, nn.Identity)}
        if model.patch_embed.img_size is not None:
            arguments["img_size"] = model.patch_embed.img_size
    return arguments


def _preprocessing(model: nn.Module, arguments: Mapping[str, Any], previous: Preprocessing | None) -> Mapping[str, Any]:
    """Return the preprocessing of the model's file, or else timm's, for the size and channels of this model."""
    from timm.data import resolve_model_data_config
    from timm.layers import to_2tuple

    known: dict[str, Any] = {**(previous or resolve_model_data_config(model))}
    if "input_size" not in known:
        return known
    channels = arguments.get("in_chans", known["input_size"][0])
    known["input_size"] = (channels, *to_2tuple(arguments.get("img_size", known["input_size"][1:])))
    for key in ("mean", "std"):
        if key in known and len(known[key]) != channels:
            known[key] = (sum(known[key]) / len(known[key]),) * channels
    return known
