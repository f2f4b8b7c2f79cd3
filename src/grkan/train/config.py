"""Every setting of a training run, each declared in one place: its name, type, default, range and meaning.

The field of `Config`, the command line option, the key in a YAML file and the checks all come from that declaration.
A default of None is replaced by the actual value before training, and the run's config.yaml holds that value. PyYAML is
imported only where it is used, so `grkan --help` works without it.
"""
# ruff: noqa: RUF009  what declares a setting returns a field of the dataclass

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import GrkanTypeError, GrkanValueError


@dataclass(frozen=True)
class Interval:
    """The allowed values of a numeric setting; `open_low` and `open_high` exclude the bounds themselves."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        high_enough = self.low < value if self.open_low else self.low <= value
        return high_enough and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


_NOT_NEGATIVE = Interval(0)
_POSITIVE = Interval(0, open_low=True)
_PROBABILITY = Interval(0, 1)
_BELOW_ONE = Interval(0, 1, open_high=True)
_AT_LEAST_ONE = Interval(1)


def _setting(
    default: Any, meaning: str, within: Interval | None = None, *, metavar: str | None = None, resumable: bool = False
) -> Any:
    """Declare a setting.

    Args:
        default: the default; None if it depends on the data or on other settings, as `meaning` then explains.
        meaning: the text for the command line help and the documentation.
        within: the interval that a number must lie in.
        metavar: the name of a value in the help; None: derived from the type.
        resumable: whether a resumed run may change it, because it does not change the run's final weights, except for
            rounding and the random numbers of dropout.
    """
    about = {"meaning": meaning, "within": within, "metavar": metavar, "resumable": resumable}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass
class Config:
    """The settings of one run.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range.
    """

    data: str = _setting(
        "digits",
        "digits, fashion-mnist, fashion-mnist:FOLDER, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE (with "
        "val_split, CLASS/IMAGE is enough), wds:FOLDER with train/*.tar and val/*.tar in WebDataset's layout, or "
        "hfds:NAME, a data set on the Hugging Face hub or in a folder",
    )
    val_split: float | None = _setting(
        None,
        "the fraction of each class's training images that is held out for the test if the data have no val; the seed "
        "decides which images",
        Interval(0, 1, open_low=True, open_high=True),
    )
    model: str | None = _setting(
        None,
        "a model name in timm's registry; by default that of --init, else a KAT for images of the data's size",
        metavar="NAME",
    )
    model_args: dict[str, Any] = _setting(
        {}, "arguments of the model's constructor: num_groups, drop_path_rate, img_size, ...; null: the model's default"
    )
    output: str | None = _setting(None, "the run's folder; by default runs/MODEL-DATA", metavar="DIR")
    init: str | None = _setting(
        None,
        "the initial weights: a run's folder, a model file, a released checkpoint, a timm file (which needs model), or "
        "a pretrained timm model (a name, hf-hub:NAME or local-dir:FOLDER); the model's arguments come from there, and "
        "model_args may override them, for example with another img_size, patch_size or in_chans; an output keeps its "
        "weights if its class has the same name",
        metavar="FILE|NAME",
    )
    convert: bool = _setting(False, "convert the model that init names to a KAT, as grkan convert does")
    trainable: Literal["all", "coefficients", "weights"] = _setting(
        "all",
        "the parameters to train: all, only the coefficients of the rational functions, or all but the coefficients; "
        "outputs for new classes are always trained",
    )
    seed: int = _setting(0, "the seed of all random numbers", _NOT_NEGATIVE)

    epochs: int = _setting(30, "passes over the training images", _AT_LEAST_ONE)
    batch_size: int = _setting(
        128, "images per optimiser step, over all processes and accumulated micro-batches together", _AT_LEAST_ONE
    )
    accumulate: int = _setting(1, "micro-batches per optimiser step", _AT_LEAST_ONE, resumable=True)
    precision: Literal["no", "fp16", "bf16"] | None = _setting(
        None, "Accelerate's mixed precision; by default the choice of accelerate launch, else no"
    )
    compile: bool = _setting(False, "run the model through torch.compile")
    checkpointing: bool = _setting(
        False, "recompute each block in the backward pass, which saves memory but takes more time"
    )
    channels_last: bool = _setting(False, "use the channels-last memory format for images and convolutions")

    optimizer: str = _setting(
        "adamw", "the name of a timm optimiser: adamw, lamb, sgd, lion, muon, ...", metavar="NAME"
    )
    betas: tuple[float, float] | None = _setting(
        None, "the betas of the optimiser; by default its own", _BELOW_ONE, metavar="PAIR"
    )

    shard: bool = _setting(
        False, "divide weights, gradients and optimiser state among the processes (FSDP); not with fp16"
    )

    lr: float = _setting(1e-3, "the highest learning rate", _NOT_NEGATIVE)
    min_lr: float = _setting(0.0, "the learning rate at the end", _NOT_NEGATIVE)
    warmup_epochs: float | None = _setting(
        None,
        "epochs of linear warm-up from 0 before the schedule begins, included in epochs; by default a tenth of epochs",
        _NOT_NEGATIVE,
    )
    schedule: Literal["cosine", "linear", "step", "constant"] = _setting(
        "cosine",
        "how the learning rate changes after the warm-up: as a half-cosine or a line down to min_lr, in steps, or not",
    )
    decay_epochs: float = _setting(30.0, "epochs between two steps, with schedule step", _POSITIVE)
    decay_rate: float = _setting(
        0.1, "the factor of the learning rate at each step, with schedule step", Interval(0, 1, open_low=True)
    )
    layer_decay: float | None = _setting(
        None,
        "for fine-tuning: the learning rate of each layer relative to the layer above it; by default all are equal",
        Interval(0, 1, open_low=True),
    )
    weight_decay: float = _setting(
        0.05, "not applied to biases, norms, position embeddings and rational coefficients", _NOT_NEGATIVE
    )
    coefficient_weight_decay: float = _setting(
        0.0, "applied to the rational coefficients, which it pulls towards F = 0", _NOT_NEGATIVE
    )
    clip_grad: float | None = _setting(
        None,
        "the largest gradient norm, for coefficients and all other parameters separately; by default no limit",
        _POSITIVE,
    )
    ema_decay: float | None = _setting(
        None,
        "the decay of a moving average of the weights, which is tested and saved instead; by default no average",
        _BELOW_ONE,
    )

    loss: Literal["cross_entropy", "bce"] = _setting(
        "cross_entropy", "the loss; bce: binary cross entropy of each class against all others"
    )
    balance: Literal["no", "weights", "sampling"] = _setting(
        "no",
        "for classes with unequal numbers of images: weights gives each class the same share of the loss, sampling "
        "the same number of images in an epoch",
    )
    repeats: int = _setting(
        1,
        "how often each image occurs in its batch, with a new augmentation each time; an epoch then has that many "
        "times fewer images",
        _AT_LEAST_ONE,
    )
    smoothing: float = _setting(0.0, "label smoothing", _BELOW_ONE)
    mixup: float = _setting(0.0, "the alpha of mixup; 0: none", _NOT_NEGATIVE)
    cutmix: float = _setting(0.0, "the alpha of CutMix; 0: none; with both, each step draws one of them", _NOT_NEGATIVE)
    shift: int | None = _setting(
        None,
        "pad by this many pixels and crop at random, instead of a random resized crop; 0: do not shift; by default a "
        "twelfth of the size for images up to 64 pixels, and a random resized crop for larger ones",
        _NOT_NEGATIVE,
    )
    crop_scale: tuple[float, float] = _setting(
        (0.08, 1.0),
        "the range of the area of a random resized crop, as fractions of the image",
        Interval(0, 1, open_low=True),
    )
    hflip: float | None = _setting(
        None,
        "the probability of a horizontal flip; by default 0 for digits and images up to 64 pixels, else 0.5",
        _PROBABILITY,
    )
    color_jitter: float | None = _setting(
        None,
        "brightness, contrast and saturation change by up to this factor, unless auto_augment is set; by default 0 for "
        "images up to 64 pixels, else 0.4",
        Interval(0, 100),
    )
    auto_augment: str | None = _setting(
        None, "a policy in timm's notation, such as rand-m9-mstd0.5-inc1; by default none", metavar="TEXT"
    )
    random_erasing: float = _setting(0.0, "the probability of random erasing", _PROBABILITY)

    workers: int | None = _setting(
        None,
        "processes that load images; 0 loads them in the training process; by default one for each processor, up to 8, "
        "for files, and 0 for arrays",
        _NOT_NEGATIVE,
        resumable=True,
    )
    on_corrupt: Literal["skip", "stop"] = _setting(
        "skip", "skip: name, count and leave out an unreadable image; stop: end the run with an error", resumable=True
    )
    evaluate_every: int = _setting(
        1, "the number of epochs between tests; the last epoch is always tested", _AT_LEAST_ONE
    )
    patience: int | None = _setting(
        None,
        "stop after this many epochs without a better test accuracy; by default never",
        _AT_LEAST_ONE,
        resumable=True,
    )
    keep_every: int = _setting(
        0,
        "keep the weights at this interval of epochs as well, as epoch-N.safetensors; 0: only the best and the last",
        _NOT_NEGATIVE,
        resumable=True,
    )
    save_every: int = _setting(
        0,
        "save the state for --resume at this interval of steps as well; 0: only at the end of each epoch",
        _NOT_NEGATIVE,
        resumable=True,
    )
    log_every: int = _setting(
        0,
        "write a line to metrics.jsonl at this interval of steps as well; 0: only at the end of each epoch",
        _NOT_NEGATIVE,
        resumable=True,
    )
    tracker: str | None = _setting(
        None,
        "experiment trackers to send the metrics to, separated by commas: tensorboard, wandb, mlflow or another that "
        "Accelerate supports",
        metavar="NAMES",
        resumable=True,
    )

    def __post_init__(self) -> None:
        for f, kind in _settings():
            value = _as_kind(f.name, getattr(self, f.name), kind)
            within = f.metadata["within"]
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and within is not None and number not in within:
                    raise GrkanValueError(f"{f.name} must be {within}; got {number!r}")
            setattr(self, f.name, value)
        if self.lr < self.min_lr:
            raise GrkanValueError(f"min_lr must not exceed lr, {self.lr:g}; got {self.min_lr:g}")
        if self.warmup_epochs is None:
            self.warmup_epochs = self.epochs / 10
        if self.warmup_epochs >= self.epochs:
            raise GrkanValueError(f"warmup_epochs must be less than epochs, {self.epochs}; got {self.warmup_epochs:g}")
        if self.evaluate_every > self.epochs:
            raise GrkanValueError(f"evaluate_every must not exceed epochs, {self.epochs}; got {self.evaluate_every}")
        if self.shard and self.precision == "fp16":
            raise GrkanValueError("precision must be no or bf16 with shard; got fp16")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise GrkanValueError(f"crop_scale must be (low, high) with low <= high; got {self.crop_scale}")


def _settings() -> list[tuple[dataclasses.Field, Any]]:
    """Return the declarations, each with its type."""
    kinds = typing.get_type_hints(Config)
    return [(f, kinds[f.name]) for f in dataclasses.fields(Config)]


RESUMABLE = tuple(f.name for f in dataclasses.fields(Config) if f.metadata["resumable"])
"""The settings that a resumed run may change. `data` may change too, because the same images may have moved."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not valid YAML, has a key twice, or is not a mapping.
    """
    try:
        content = _parse_yaml(Path(path).read_bytes().decode())
    except ValueError as error:  # UnicodeDecodeError is one
        raise GrkanValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise GrkanValueError(f"{path} must hold a mapping of settings; got {type(content).__name__}")
    return content


def _parse_yaml(text: str) -> Any:
    """Parse YAML into plain values; raise ValueError for invalid YAML, and for a key that a mapping has twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [value for i, (tag, value) in enumerate(keys) if (tag, value) in keys[:i]]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is set twice", node.start_mark)
            return super().construct_mapping(node, deep)

    # PyYAML reads YAML 1.1, in which 1e-5 is a string: its numbers with an exponent need a point and a sign.
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise GrkanValueError(str(error)) from None
    except RecursionError:
        raise GrkanValueError("it is nested too deeply") from None
    except Exception as error:  # its constructors raise various errors for `!!int ""`, `!!bool x`, 2020-13-01, ...
        raise GrkanValueError(f"{type(error).__name__}: {error}") from None


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings of settings: later ones override earlier ones; `model_args` are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            earlier = merged.get(key)
            if key == "model_args" and isinstance(value, Mapping) and isinstance(earlier, Mapping):
                value = {**earlier, **value}
            merged[key] = value
    return merged


def make_config(*layers: Mapping[str, Any]) -> Config:
    """Make a configuration from mappings of settings, which are merged by `merge`.

    Raises:
        ValueError: a setting is unknown (the message has the nearest names), or a value is out of range.
        TypeError: a value has the wrong type.
    """
    settings = merge(*layers)
    for key in settings:
        check_name(key)
    return Config(**settings)


def check_name(key: Any) -> None:
    """Raise ValueError if there is no setting of that name."""
    names = [f.name for f in dataclasses.fields(Config)]
    if key not in names:
        raise GrkanValueError(f"unknown setting {key!r}; {nearest(str(key), names)}")


def nearest(name: str, known: Sequence[str], shown: int = 12) -> str:
    """Return the end of a message about an unknown name: the most similar names, or the first few."""
    longer = sorted(k for k in known if name and k.startswith(name))
    close = longer[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f" and {len(known) - shown} more" if len(known) > shown else ""
    return f"known names: {', '.join(known[:shown])}{more}"


def settings_table() -> str:
    """Return all settings as a Markdown table: name, meaning, default, range."""
    rows = ["| setting | meaning | default | range |", "| --- | --- | --- | --- |"]
    defaults = to_dict(Config())
    for f, kind in _settings():
        default = None if f.default is None else defaults[f.name]
        meaning = f.metadata["meaning"] + (" *(may change on resume)*" if f.metadata["resumable"] else "")
        shown = "" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"
        rows.append(f"| `{f.name}` | {meaning} | {shown} | {_range(kind, f.metadata['within'])} |")
    return "\n".join(rows) + "\n"


def _range(kind: Any, within: Interval | None) -> str:
    kind = _plain(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{option}`" for option in typing.get_args(kind))
    pair = typing.get_origin(kind) is tuple
    number = {int: "a whole number", float: "a number", bool: "`true`, `false`", str: "a string", dict: "a mapping"}
    name = "two numbers" if pair else number[kind]
    return name if within is None else f"{name}, {'each ' if pair else ''}{within}"


def add_training_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add an option for every setting, and `--set`, which can also set the parts of `model_args`.

    They fill `options.settings`: a list of mappings for `merge`, in the order of the command line.

    Args:
        parser: the parser to add them to.
        without: settings that get no option, because the command decides them itself.
    """
    add = partial(parser.add_argument, dest="settings", action="append", default=[])
    for f, kind in _settings():
        if f.name in without or _plain(kind) is dict:
            continue
        default = "" if f.default is None else f" ({f.default if kind is str else json.dumps(f.default)})"
        about: dict[str, Any] = {"metavar": f.metadata["metavar"] or _metavar(f.name, kind)}
        if kind is bool:
            about |= {"nargs": "?", "const": {f.name: True}}
        parse = _argument(partial(_parse_option, f.name, kind))
        add(f"--{f.name.replace('_', '-')}", type=parse, help=f.metadata["meaning"] + default, **about)
    add(
        "--set",
        type=_argument(parse_assignment),
        metavar="KEY=VALUE",
        help="any setting by its name, such as lr=0.01, or a single model argument: model_args.num_groups=4",
    )


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap `parse` for argparse, which shows the message of ArgumentTypeError only."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except GrkanValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def _parse_option(name: str, kind: Any, text: str) -> dict[str, Any]:
    kind = _plain(kind)
    is_text = kind is str or typing.get_origin(kind) is Literal
    return {name: text if is_text else _parse_value(text)}


def parse_assignment(assignment: str) -> dict[str, Any]:
    """Parse `key=value`, whose value is YAML, into a setting; `model_args.num_groups=4` sets one argument.

    Raises:
        ValueError: there is no `=`, the value is not YAML, or the key is unknown.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not text.strip():
        raise GrkanValueError(f"must be key=value, with null for no value; got {assignment!r}")
    key, dot, argument = key.partition(".")
    if dot and key != "model_args":
        raise GrkanValueError(f"only model_args may have a dotted key; got {assignment!r}")
    check_name(key)
    value = _parse_value(text)
    return {key: {argument: value}} if dot else {key: value}


def _parse_value(text: str) -> Any:
    try:
        return _parse_yaml(text)
    except GrkanValueError as error:
        raise GrkanValueError(f"{text!r} is not a YAML value ({str(error).partition(chr(10))[0]})") from None


def _metavar(name: str, kind: Any) -> str:
    kind = _plain(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "RANGE"
    return {int: "N", float: "X", bool: "true|false"}.get(kind, name.upper())


def to_dict(config: Config) -> dict[str, Any]:
    """Return all settings as plain values, as JSON and YAML load them: a tuple becomes a list."""
    return json.loads(json.dumps(vars(config)))


def to_yaml(config: Config) -> str:
    """Return all settings as YAML, in the order in which `Config` declares them."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _may_be_none(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _plain(kind: Any) -> Any:
    """Return the type of a setting's values, without None, and for a mapping just dict."""
    if _may_be_none(kind):
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    return dict if typing.get_origin(kind) is dict else kind


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """Convert a value to the type of its setting, for example 1 to 1.0, and check it."""
    if value is None and _may_be_none(kind):
        return None
    kind = _plain(kind)
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value is False and "no" in options:  # YAML 1.1 reads a bare `no` as False
            value = "no"
        if value not in options:
            raise GrkanValueError(f"{name} must be {' or '.join(options)}; got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(options):
            raise GrkanTypeError(f"{name} must be {len(options)} numbers; got {value!r}")
        return tuple(_as_kind(name, v, option) for v, option in zip(value, options, strict=True))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            raise GrkanTypeError(f"{name} must be a number; got {value!r}") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "a mapping"}
        raise GrkanTypeError(f"{name} must be {wanted[kind]}; got {value!r}")
    if kind is int and value >= 2**63:
        raise GrkanValueError(f"{name} must be less than 2^63; got {value!r}")
    if kind is float and not math.isfinite(value):
        raise GrkanValueError(f"{name} must be a finite number; got {value!r}")
    if kind is float and 0 < abs(value) < sys.float_info.min:  # such an alpha of mixup becomes NaN in NumPy
        raise GrkanValueError(f"{name} must be 0 or at least {sys.float_info.min:.2g} in absolute value; got {value!r}")
    if kind is str and (not value or "\0" in value):
        raise GrkanValueError(f"{name} must be a non-empty string without null characters; got {value!r}")
    if kind is dict:
        _check_plain(name, value)
    return value


def _check_plain(name: str, value: Mapping[Any, Any]) -> None:
    """Raise TypeError for a mapping that config.yaml and a model file cannot store."""
    if wrong := [key for key in value if not isinstance(key, str)]:
        raise GrkanTypeError(f"the keys of {name} must be strings; got {wrong[0]!r}")
    for key, part in value.items():
        try:
            json.dumps(part)
        except TypeError:
            raise GrkanTypeError(
                f"{name}.{key} must consist of numbers, strings, lists and mappings; got {part!r}"
            ) from None
