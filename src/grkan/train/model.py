"""The models of the commands: find them by name, make them for a data set, load them from files."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..convert import convert_
from ..convert.recipe import apply_conversion_
from ..errors import GrkanError, GrkanValueError
from ..models.files import load_model, read_metadata
from ..models.kat import twin_of
from ..models.metadata import NOT_ARCHITECTURE, Preprocessing
from ..models.operations import count_operations
from ..nn import no_weight_decay
from .config import Config, make_config, nearest, read_yaml, to_yaml
from .data import ImageData, find_source
from .loading import calibration_batches, evaluation_transform
from .metrics import read_metrics
from .randomness import derive_seed
from .start import find_start, fit_weights_, is_model_file, load_start, model_file, read_state

_CALIBRATION = 256
"""The number of images that a conversion is fitted to."""
_NOT_MODEL_ARGS = (*NOT_ARCHITECTURE, "features_only", "out_indices", "num_classes")
"""Arguments of timm.create_model that `model_args` must not hold: weights come from `init`, the classes from `data`."""

_NOT_THE_ARGUMENTS = (ImportError, torch.AcceleratorError, torch.OutOfMemoryError)
"""Errors that do not come from a model's arguments."""


def check_model_name(name: str) -> None:
    """Raise ValueError, with the nearest names, if timm's registry has no such model, or none with this tag."""
    if not timm.is_model(name):
        ours = timm.list_models("kat_*")
        others = [other for other in timm.list_models() if other not in ours]
        raise GrkanValueError(f"unknown model {name!r}; {nearest(name, ours + others, shown=len(ours))}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        plain = name.partition(".")[0]
        tagged = timm.list_models(f"{plain}.*", include_tags=True)
        raise GrkanValueError(f"unknown model {name!r}; {nearest(name, tagged or [plain])}") from error


# Models to be trained


def resolve_model(config: Config, default: str) -> dict[str, Any]:
    """Return the settings model, model_args and init, completed from the model to start from.

    Args:
        config: the given settings.
        default: the default model for the data.

    Raises:
        ValueError: there is no model to start from, or `model` names a different one.
    """
    if config.init is None:
        if config.convert:
            raise GrkanValueError("convert must be used with init, which names the model to convert; got no init")
        return {"model": config.model or default}
    init, held, arguments = find_start(config.init, config.model)
    if config.model not in (None, held):
        to_kat = config.model.startswith("kat_") and not held.startswith("kat_")
        convert = ", or convert it with --convert" if to_kat else ""
        raise GrkanValueError(f"init holds a {held}, not a {config.model}; leave out --model or --init{convert}")
    return {"init": init, "model": held, "model_args": {**arguments, **config.model_args}}


def check_model(config: Config) -> None:
    """Check that the model can be made, without the head and the weights that the data and `init` give it.

    Raises:
        ValueError: there is no such model, or `model_args` do not fit it.
    """
    check_model_name(config.model or "")
    _create_model(config, None)


@dataclass
class Start:
    """A model at the start of a run."""

    model: nn.Module
    preprocessing: Preprocessing
    new_head: bool
    """Whether any of its outputs is untrained."""
    notes: list[str]
    """Lines that say how the initial weights were fitted."""


def make_model(
    config: Config,
    training: ImageData,
    normalisation: Callable[[], tuple[float, float]] | None,
    preprocessing: Preprocessing | None,
) -> Start:
    """Make the model for the start of a run.

    Args:
        config: the settings of the model.
        training: the training images.
        normalisation: computes mean and standard deviation of their gray values; None: use the model's own.
        preprocessing: the preprocessing in the state of a resumed run, whose weights are loaded later; None: a new run.

    Raises:
        ValueError: there is no such model, or `model_args` or `init` do not fit it.
    """
    check_model_name(config.model or "")
    classes, new_head = training.classes, True
    notes: list[str] = []
    weights = load_start(config.init, config.model or "") if config.init and preprocessing is None else None
    torch.manual_seed(derive_seed("model", config.seed))
    if weights is not None:
        # The initial weights are replaced anyway, and the mimetic initialisation takes a minute.
        arguments = {key: value for key, value in config.model_args.items() if key != "attn_init"}
        model = _create_model(replace(config, model_args=arguments), len(classes))
        if weights.conversion:
            apply_conversion_(model, weights.conversion)
        new_head, notes = fit_weights_(model, weights, classes)
        preprocessing = _fit_preprocessing(config, model, None, weights.preprocessing)
        _example(preprocessing, weights.label)
        if config.convert:
            notes.append(_convert(model, training, preprocessing, weights.label))
    else:
        model = _create_model(config, len(classes))
        if preprocessing is None:
            preprocessing = _fit_preprocessing(config, model, normalisation, None)
    with _blaming_model_args(config), torch.no_grad():
        trial = copy.deepcopy(model).train()  # a copy, because running statistics move
        output = trial(torch.zeros(2, *preprocessing["input_size"]))
        wanted = (2, len(classes))
        if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
            kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise GrkanValueError(f"its output for two images must be logits of shape {wanted}; got {kind}")
    return Start(model, preprocessing, new_head, notes)


def _convert(model: nn.Module, training: ImageData, preprocessing: Preprocessing, label: str) -> str:
    """Convert a model to a KAT, and return a note about it."""
    if no_weight_decay(model):
        raise GrkanValueError(f"convert must start from a model without rational functions; {label} already has some")
    report = convert_(model, calibration=calibration_batches(training, preprocessing, _CALIBRATION))
    error = report.relative_error
    compared = "; the outputs are zero" if error is None else f"; the relative error of the outputs is {error:.2g}"
    return f"converted: {len(report.layers)} MLPs{compared}"


def _create_model(config: Config, classes: int | None) -> nn.Module:
    if refused := [name for name in config.model_args if name in _NOT_MODEL_ARGS]:
        raise GrkanValueError(
            f"model_args must not contain {refused[0]}; weights come from --init, and the number of classes from --data"
        )
    with _blaming_model_args(config):
        return timm.create_model(config.model, num_classes=classes, **config.model_args)


@contextlib.contextmanager
def _blaming_model_args(config: Config) -> Iterator[None]:
    """Report any error as wrong `model_args`, if some are given: timm and PyTorch have no type for such an error."""
    given = ", ".join(f"{key}={value!r}" for key, value in config.model_args.items())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # an error follows
            yield
    except _NOT_THE_ARGUMENTS:
        raise
    except Exception as error:
        if not given and not isinstance(error, GrkanError):
            raise
        raise GrkanValueError(
            f"model_args do not fit {config.model}: {_reason(error)} (given: {given or 'none'})"
        ) from error


def _reason(error: Exception) -> str:
    """Format an error of a library as one line."""
    reason = str(error).partition("\n")[0]
    return reason if " " in reason else f"{type(error).__name__} {reason}".rstrip()  # a message may be only a name


def _fit_preprocessing(
    config: Config,
    model: nn.Module,
    normalisation: Callable[[], tuple[float, float]] | None,
    known: Preprocessing | None,
) -> Preprocessing:
    """Return timm's data configuration for this data set, as plain values for the model file.

    Args:
        known: the preprocessing in the file that the model comes from.
    """
    found = {**resolve_data_config({}, model=model), **(known or {})}
    channels, height, width = found["input_size"]
    given = {key: value for key, value in config.model_args.items() if value is not None}
    channels = given.get("in_chans", channels)
    height, width = to_2tuple(given.get("img_size", (height, width)))
    if channels not in (1, 3):
        raise GrkanValueError(f"in_chans must be 1 or 3, because images are gray or RGB; got {channels}")
    mean, std, crop = found["mean"], found["std"], found["crop_pct"]
    if normalisation is not None and not known:
        mean, std = ([value] for value in normalisation())
        crop = 1.0  # the object fills the image
    if len(mean) != channels:
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    return {
        "input_size": [channels, height, width],
        "mean": list(mean),
        "std": list(std),
        "interpolation": found["interpolation"],
        "crop_pct": crop,
    }


# Trained models


@dataclass
class TrainedModel:
    """A model that is ready for use."""

    model: nn.Module
    classes: Sequence[str]
    """The class names; empty if they are not known."""
    preprocessing: Preprocessing
    device: torch.device
    run: Mapping[str, Any] = field(default_factory=dict)
    """The settings of its run, if its file is in the folder of one."""


def load_trained(path: str | Path) -> TrainedModel:
    """Load a run's best weights or a model file, onto the GPU if there is one.

    Raises:
        ValueError: there is no such file, or it has no classes or preprocessing, so the model cannot be used on images.
    """
    path = model_file(path)
    metadata = read_metadata(path)
    classes, preprocessing = metadata["classes"], metadata["preprocessing"]
    if not classes or not preprocessing:
        raise GrkanValueError(f"{path} must contain class names and preprocessing, as files written by grkan train do")
    device, model = _device(), load_model(path)
    _check_preprocessing(model, preprocessing, len(classes), path)
    return TrainedModel(model.to(device), classes, preprocessing, device, _settings_of_run(path.parent))


def _settings_of_run(folder: Path) -> dict[str, Any]:
    try:
        return read_yaml(folder / "config.yaml")
    except (OSError, GrkanValueError):  # not a run, or a file of that name from something else
        return {}


def load_weights(path: str | Path) -> nn.Module:
    """Load the model of a run's folder or of a model file, for any task, with the results of the run."""
    model = load_model(model_file(path))
    if (results := _results(Path(path))) is not None:
        model.grkan_results = results  # type: ignore[assignment]
    return model


def _results(run: Path) -> dict[str, Any] | None:
    """Return the `grkan.export.timm.Results` of a run's folder, or None if there are none."""
    if not ((run / "metrics.jsonl").is_file() and (run / "config.yaml").is_file()):
        return None
    epochs = [line for line in read_metrics(run / "metrics.jsonl") if "top1" in line]
    if not epochs:
        return None
    best = max(epochs, key=lambda line: line["top1"])  # the first of equal ones, as in training
    config = make_config(read_yaml(run / "config.yaml"))
    settings = to_yaml(replace(config, output=None))  # output is a path on this machine
    return {
        "data": config.data,
        "epochs": config.epochs,
        **{key: best[key] for key in ("epoch", "top1", "loss")},
        "settings": settings,
    }


def load_original(
    name: str | None, checkpoint: str | Path | None, data: str | None, pretrained: bool = True
) -> TrainedModel:
    """Load a model to convert: from a run, from a grkan file, or from timm with weights that timm can read.

    Args:
        name: the name in timm's registry; None: that of the checkpoint.
        checkpoint: a run's folder or a file; None: the weights that timm downloads, or random ones.
        data: a data set that supplies the class names if nothing else does and the number of classes agrees.
        pretrained: whether to download weights if there is no checkpoint.

    Raises:
        ValueError: there is no such model or checkpoint, or they do not match.
    """
    if name is not None:
        check_model_name(name)
    if checkpoint is None:
        if name is None:
            raise GrkanValueError("give --model, --checkpoint or both, to name the model to convert")
        model = _load_pretrained(name) if pretrained else timm.create_model(name)
        classes, preprocessing = None, None
    elif name is None or Path(checkpoint).is_dir() or is_model_file(checkpoint):
        path = model_file(checkpoint)
        metadata = read_metadata(path)
        if name not in (None, metadata["model"]):
            raise GrkanValueError(f"{path} holds a {metadata['model']}, not a {name}; leave out --model")
        model, classes, preprocessing = load_model(path), metadata["classes"], metadata["preprocessing"]
        if preprocessing:
            _check_preprocessing(model, preprocessing, None, path)
    else:
        model, classes, preprocessing = _load_checkpoint_of_timm(name, checkpoint), None, None
    if classes is None and data is not None:
        found = find_source(data).load("train").classes
        classes = list(found) if len(found) == model.num_classes else None
    device = _device()
    return TrainedModel(model.to(device), classes or (), preprocessing or resolve_data_config({}, model=model), device)


def describe(model: str) -> dict[str, dict[str, int]]:
    """Count the operations of a model and, for a KAT, of the Vision Transformer of the same size if there is one.

    Args:
        model: a name of timm's registry, a run's folder or a model file.

    Returns:
        The counts of `grkan.count_operations` by name, for one image of the size that the model is made for.

    Raises:
        ValueError: there is no such model.
    """
    if Path(model).exists():
        path = model_file(model)
        built, metadata = load_model(path), read_metadata(path)
        known = {**resolve_data_config({}, model=built), **(metadata["preprocessing"] or {})}
        return {str(path): count_operations(built, tuple(known["input_size"]))}
    check_model_name(model)
    names = [model]
    if model in timm.list_models("kat_*", module="kat"):
        names.append(twin_of(model))
    counts = {}
    for name in names:
        built = timm.create_model(name)
        counts[name] = count_operations(built, resolve_data_config({}, model=built)["input_size"])
    return counts


def _check_preprocessing(model: nn.Module, preprocessing: Preprocessing, classes: int | None, path: Path) -> None:
    """Run the model on an image, and raise ValueError if the file states other inputs or outputs."""
    x = _example(preprocessing, path)[None]
    try:
        with torch.inference_mode():
            output = model(x)
    except _NOT_THE_ARGUMENTS:
        raise
    except Exception as error:
        raise GrkanValueError(f"the preprocessing in {path} does not fit its model: {_reason(error)}") from error
    if classes is not None and tuple(output.shape) != (1, classes):
        raise GrkanValueError(f"{path} has {classes} classes, but outputs of shape {tuple(output.shape)} for an image")


def _example(preprocessing: Preprocessing, path: Path | str) -> Tensor:
    """Make an input [C, H, W]; raise ValueError if the preprocessing in `path` cannot make one."""
    try:
        return evaluation_transform(preprocessing)(Image.new("L", (8, 8)))
    except Exception as error:  # timm, torchvision and Pillow all have their own errors
        raise GrkanValueError(f"the preprocessing in {path} cannot be used: {_reason(error)}") from error


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load_pretrained(name: str) -> nn.Module:
    """Make a model of timm with the weights that timm downloads."""
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # the download may raise any error
        raise GrkanValueError(f"pretrained weights of {name} are not available: {error}; give --checkpoint") from error


def _load_checkpoint_of_timm(name: str, checkpoint: str | Path) -> nn.Module:
    """Make a model of timm with the weights, and the number of classes, of a file."""
    try:
        state = read_state(name, checkpoint)
        classifier = timm.models.get_pretrained_cfg_value(name, "classifier")
        head = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
        model = timm.create_model(name, **({} if head is None else {"num_classes": len(head)}))
        timm.models.load_checkpoint(model, str(checkpoint))
    except Exception as error:  # zipfile, pickle, PyTorch and safetensors all have their own errors
        reason = " ".join(str(error).split())[:200]
        raise GrkanValueError(f"{checkpoint} holds no weights of a {name}: {type(error).__name__}: {reason}") from error
    return model
