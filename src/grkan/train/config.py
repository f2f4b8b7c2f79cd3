"""Every setting of a training run: one dataclass, filled from a YAML file and then from the command line.

Where None means "what suits the data set", the value is filled in before training, and the run's config.yaml has it.
PyYAML is imported where it is used: `grkan --help` shows the options without it.
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import GrkanTypeError, GrkanValueError


@dataclass
class Config:
    """The settings of one run.

    Raises:
        TypeError: a value of another type than its setting's.
        ValueError: a value out of range.
    """

    data: str = "digits"
    """digits, fashion-mnist, fashion-mnist:FOLDER, or a folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE."""
    model: str | None = None
    """A name of timm's registry; None is that of `init`, else kat_micro_patch2_8."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's constructor: num_groups, drop_path_rate, img_size, ...; None is the model's default."""
    output: str | None = None
    """The run's folder; None is runs/MODEL-DATA."""
    init: str | None = None
    """A model file or a run's folder whose weights are the start. The model's arguments are the file's, overridden by
    `model_args`; another number of classes gets a new head."""
    trainable: Literal["all", "coefficients", "weights"] = "all"
    """What learns: everything, the coefficients of the rational functions alone, or everything but them."""
    seed: int = 0

    epochs: int = 30
    batch_size: int = 128
    """Images per optimiser step, over all processes and accumulated micro-batches together."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Accelerate's mixed precision."""

    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_epochs: float | None = None
    """Linear warm-up from 0, part of `epochs`; a half-cosine follows. None is a tenth of `epochs`."""
    weight_decay: float = 0.05
    """Not applied to biases, norms, position embeddings and rational coefficients."""
    coefficient_weight_decay: float = 0.0
    """Applied to the rational coefficients, which it pulls towards F = 0."""
    clip_grad: float | None = None
    """The largest norm of the gradient of all parameters."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay, evaluate and save it."""

    smoothing: float = 0.0
    mixup: float = 0.0
    """The alpha of mixup."""
    cutmix: float = 0.0
    """The alpha of CutMix; with both, each step draws one of them."""
    shift: int | None = None
    """Pad by so many pixels and crop, in place of the random resized crop; 0 leaves the image where it is."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """The area of a random resized crop, as parts of the image's."""
    hflip: float | None = None
    """The probability of a horizontal flip."""
    color_jitter: float | None = None
    """Brightness, contrast and saturation change by up to this factor; `auto_augment` takes its place."""
    auto_augment: str | None = None
    """timm's string, as rand-m9-mstd0.5-inc1."""
    random_erasing: float = 0.0
    """The probability of random erasing."""

    workers: int | None = None
    """Processes that load images; 0 loads them in the training process."""
    on_corrupt: Literal["skip", "stop"] = "skip"
    """An unreadable image is named, counted and left out, or it stops the run."""
    save_every: int = 0
    """Save the state for `--resume` every so many steps too, not at the end of an epoch alone; 0 does not."""
    log_every: int = 0
    """Write a line to metrics.jsonl every so many steps too; 0 does not."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            setattr(self, name, _convert(name, getattr(self, name), kind))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limits = f"at least {low:g}" if high == _INFINITY else f"in [{low:g}, {high:g}]"
                raise GrkanValueError(f"{name} must be {limits}; got {value!r}")
        if self.clip_grad == 0:
            raise GrkanValueError("clip_grad must be more than 0, or null for no limit; got 0")
        if self.lr < self.min_lr:
            raise GrkanValueError(f"min_lr must not exceed lr, {self.lr:g}; got {self.min_lr:g}")
        if self.warmup_epochs is None:
            self.warmup_epochs = self.epochs / 10
        if self.warmup_epochs >= self.epochs:
            raise GrkanValueError(f"warmup_epochs must be less than epochs, {self.epochs}; got {self.warmup_epochs:g}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise GrkanValueError(f"crop_scale must be (low, high) with 0 < low <= high <= 1; got {self.crop_scale}")


_INFINITY = float("inf")
_RANGES = [
    ("epochs", 1, _INFINITY),
    ("batch_size", 1, _INFINITY),
    ("accumulate", 1, _INFINITY),
    ("lr", 0, _INFINITY),
    ("min_lr", 0, _INFINITY),
    ("warmup_epochs", 0, _INFINITY),
    ("weight_decay", 0, _INFINITY),
    ("coefficient_weight_decay", 0, _INFINITY),
    ("clip_grad", 0, _INFINITY),
    ("ema_decay", 0, 1),
    ("smoothing", 0, 1),
    ("mixup", 0, _INFINITY),
    ("cutmix", 0, _INFINITY),
    ("shift", 0, _INFINITY),
    ("hflip", 0, 1),
    ("color_jitter", 0, _INFINITY),
    ("random_erasing", 0, 1),
    ("workers", 0, _INFINITY),
    ("save_every", 0, _INFINITY),
    ("log_every", 0, _INFINITY),
    ("seed", 0, 2**63 - 1),
]

RESUMABLE = ("workers", "on_corrupt", "save_every", "log_every", "tensorboard")
"""The settings that a resumed run may change, for they do not change the weights that it ends with; and `data`, for the
same images may have moved."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, has a key twice, or is no mapping.
    """
    try:
        content = _parse_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise GrkanValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise GrkanValueError(f"{path} must hold a mapping of settings; got {type(content).__name__}")
    return content


def _parse_yaml(text: str) -> Any:
    """Plain values; ValueError where PyYAML finds a mistake, and for a key that a mapping has twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [value for i, (tag, value) in enumerate(keys) if (tag, value) in keys[:i]]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is set twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise GrkanValueError(str(error)) from None


def make_config(*layers: Mapping[str, Any]) -> Config:
    """A configuration from mappings of settings, where a later one overrides; `model_args` are merged key by key.

    Raises:
        ValueError: an unknown setting, with the nearest names, or a value out of range.
        TypeError: a value of another type than its setting's.
    """
    settings: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            check_name(key)
            merges = key == "model_args" and isinstance(value, Mapping)
            settings[key] = {**settings.get(key, {}), **value} if merges else value
    return Config(**settings)


def check_name(key: Any) -> None:
    """Raise ValueError if there is no setting of that name."""
    names = [f.name for f in dataclasses.fields(Config)]
    if key not in names:
        raise GrkanValueError(f"unknown setting {key!r}; {nearest(str(key), names)}")


def nearest(name: str, known: Sequence[str], shown: int = 12) -> str:
    """The end of a sentence about an unknown name: those that were perhaps meant, or the first few."""
    longer = sorted(k for k in known if name and k.startswith(name))
    close = longer[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f" and {len(known) - shown} more" if len(known) > shown else ""
    return f"known are {', '.join(known[:shown])}{more}"


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings from `key=value` strings, whose values are read as YAML; `model_args.num_groups=4` sets an argument.

    Raises:
        ValueError: no `=`, a value that is no YAML, or an unknown key.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not text.strip():
            raise GrkanValueError(f"--set takes key=value, where null is no value; got {assignment!r}")
        try:
            value = _parse_yaml(text)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise GrkanValueError(f"--set {key}: {text!r} is not a YAML value ({reason})") from None
        key, dot, argument = key.partition(".")
        if dot and key != "model_args":
            raise GrkanValueError(f"--set {assignment}: only model_args has parts")
        check_name(key)
        if dot:
            settings.setdefault(key, {})[argument] = value
        else:
            settings[key] = value
    return settings


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The settings that have an option of their own; `--set` reaches every other."""
    parser.add_argument("--data", help="digits, fashion-mnist, fashion-mnist:FOLDER, or a folder with train/ and val/")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per optimiser step, over all processes")
    parser.add_argument("--lr", type=float, metavar="X", help="the highest learning rate")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--init", metavar="FILE", help="a model file or a run's folder to start from")
    parser.add_argument("--trainable", help="all, coefficients (the rational functions' alone), or weights (all else)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting, such as mixup=0.8 or model_args.num_groups=4; config.yaml of a run lists them all",
    )


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line.

    Raises:
        ValueError: as `parse_assignments`.
    """
    names = ("data", "model", "epochs", "batch_size", "lr", "seed", "init", "trainable", "workers")
    given = {name: getattr(options, name, None) for name in names}
    settings = parse_assignments(options.assignments)
    return {**settings, **{name: value for name, value in given.items() if value is not None}}


def to_dict(config: Config) -> dict[str, Any]:
    """All settings as the plain values that JSON and YAML give back: a tuple is a list.

    Raises:
        TypeError: one of `model_args` has no such value.
    """
    return json.loads(json.dumps(vars(config)))


def to_yaml(config: Config) -> str:
    """All settings in YAML, in the order in which `Config` declares them."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """The value in the type of its setting. YAML reads 1e-3 as a string, and 1 where 1.0 is meant."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in options if option is not types.NoneType)
        options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value is False and "no" in options:  # YAML 1.1 reads a bare `no` so
            value = "no"
        if value not in options:
            raise GrkanValueError(f"{name} must be {' or '.join(options)}; got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(options):
            raise GrkanTypeError(f"{name} must be {len(options)} numbers; got {value!r}")
        return tuple(_convert(name, v, option) for v, option in zip(value, options, strict=True))
    if typing.get_origin(kind) is dict:
        kind = dict
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            raise GrkanTypeError(f"{name} must be a number; got {value!r}") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
        raise GrkanTypeError(f"{name} must be {wanted[kind]}; got {value!r}")
    if kind is float and not math.isfinite(value):
        raise GrkanValueError(f"{name} must be a finite number; got {value!r}")
    return value
