"""Let transformers save a converted model, build it again, and train it, like any other.

`save_pretrained` writes the recipe of the conversion to config.json, and a model made from such a config is converted
before its weights are loaded. So once grkan is imported, `from_pretrained` and `from_config` of every class give the
converted model. Without grkan `from_pretrained` fails, because `_REFUSED` is in config.json.

A quantiser in transformers' registry could convert, too. But a model that counts as quantised refuses `half()` and
another quantiser; `from_config` skips the conversion; and a transformers that does not know the method loads the
weights that it knows, with only a warning.
"""

import copy
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from torch import nn

from ..convert.recipe import RECORDERS, LayerRecipe, Recipe, apply_recipe, check_recipe, is_loaded, recipe_of
from ..errors import GrkanValueError, first_of
from ..nn import GroupRational, RationalLinear, no_weight_decay
from ..nn.init import starts_kept
from .imports import put_around

_FIELD = "grkan"

# A program that reads config.json without knowing grkan would use the activations named there. To stop it, claim a
# quantisation without a known method: transformers, vLLM, SGLang and llama.cpp refuse that. Only files contain this.
_REFUSED = {"grkan": "import grkan, then load: the functions of this model are rational, as the field grkan says"}

_STYLE = "grkan_groups"
_CUT_STYLES = ("colwise", "packed_colwise")
"""transformers' names for linear layers whose output is cut along the channels."""


def know_configs(configuration_utils: Any) -> None:
    """Let transformers write and read the configs of converted models."""
    put_around(configuration_utils.PretrainedConfig, "to_json_file", _writing)
    put_around(configuration_utils.PretrainedConfig, "_dict_from_json_file", _reading)


def know_models(modeling_utils: Any) -> None:
    """Save models with their conversion, and convert models made from a config that contains one."""
    model = modeling_utils.PreTrainedModel
    put_around(model, "save_pretrained", _saving)
    put_around(model, "post_init", _making)
    put_around(model, "_initialize_weights", _initialising)
    put_around(model, "from_pretrained", _loading)
    if _record not in RECORDERS:
        RECORDERS.append(_record)


def know_trainers(trainer: Any) -> None:
    """Keep Trainer from decaying rational coefficients; it only excludes parameters with names of biases and norms."""
    put_around(trainer.Trainer, "get_decay_parameter_names", _decaying)


def _writing(write: Callable[..., Any]) -> Callable[..., Any]:
    def to_json_file(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _refused(self):
            return write(self, *args, **kwargs)

    return to_json_file


def _reading(read: Callable[..., Any]) -> Callable[..., Any]:
    def _dict_from_json_file(cls: type, json_file: Any) -> dict[str, Any]:
        fields: dict[str, Any] = read(cls, json_file)
        _read(fields, None)
        return fields

    return _dict_from_json_file


def _read(fields: dict[str, Any], recipe: Any) -> None:
    """Undo `_refused`, and give each part of a composite model the recipe of the whole: it can be loaded alone."""
    recipe = recipe or fields.get(_FIELD)
    if recipe is not None:
        fields[_FIELD] = recipe
    quantised = fields.get("quantization_config")
    if isinstance(quantised, dict) and quantised.keys() >= _REFUSED.keys():
        del fields["quantization_config"]
        if quantised.get("quantization_config") is not None:
            fields["quantization_config"] = quantised["quantization_config"]
    for part in fields.values():
        if isinstance(part, dict) and "model_type" in part:
            _read(part, recipe)


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _written(self):
            return save(self, *args, **kwargs)

    return save_pretrained


def _making(post_init: Callable[..., Any]) -> Callable[..., Any]:
    def post_init_(self: Any) -> None:
        post_init(self)
        if recipe := getattr(self.config, _FIELD, None):
            _convert(self, check_recipe(recipe))

    return post_init_


def _initialising(initialize: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_weights(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Parameters that the checkpoint lacks are still uninitialised memory here.
        if isinstance(module, GroupRational) and not is_loaded(module):
            module.reset_parameters()
        with starts_kept(module):
            initialize(self, module, *args, **kwargs)

    return _initialize_weights


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = load(cls, *args, output_loading_info=True, **kwargs)
        _check(model, set(info["missing_keys"]), set(info["unexpected_keys"]))
        return (model, info) if output_loading_info else model

    return from_pretrained


def _check(model: Any, missing: set[str], unexpected: set[str]) -> None:
    """Refuse a model that has lost functions or weights to other names; transformers only warns of it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    base = model.base_model_prefix

    def variants(name: str) -> tuple[str, ...]:  # the weights may be for the base of this model, or for it with a head
        return name, f"{base}.{name}", name.removeprefix(f"{base}.")

    def is_place(name: str) -> bool:
        owner, _, slot = name.rpartition(".")
        # Another class may have had a child there if this is directly in the model.
        return hasattr(modules.get(owner), slot) if owner in ("", base) else owner in modules

    functions = sorted(key.removesuffix(".numerator") for key in unexpected if key.endswith(".numerator"))
    if lost := [name for name in functions if any(map(is_place, variants(name)))]:
        if getattr(model.config, _FIELD, None):
            raise GrkanValueError(
                f"{type(model).__name__} must have a place for each function of the saved model, but has none for "
                f"{first_of(lost)}; load the class that was saved, and take the part that you need"
            )
        raise GrkanValueError(
            "config must hold the conversion of the saved model, whose weights have rational functions for "
            f"{first_of(lost)}; got a {type(model.config).__name__} without one. Load without config, or with the one "
            "that AutoConfig.from_pretrained reads there; or make the model, and call grkan.apply_conversion_ and "
            "load_state_dict"
        )
    for key in sorted(missing):
        linear, _, parameter = key.rpartition(".")
        name = linear.removesuffix(".linear")
        if isinstance(modules.get(name), RationalLinear) and unexpected.intersection(
            f"{variant}.{parameter}" for variant in variants(name)
        ):
            raise GrkanValueError(
                "config must hold no conversion to load the weights of the original model: those of "
                f"{name} would be random. Load them without config, then convert the model by "
                "grkan.apply_conversion_(model, config.grkan)"
            )


def _decaying(get_names: Callable[..., Any]) -> Callable[..., Any]:
    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        coefficients = no_weight_decay(model)
        return [name for name in get_names(self, model) if name not in coefficients]

    return get_decay_parameter_names


def _convert(model: Any, recipe: Recipe) -> None:
    """Convert the recipe's layers that exist here; it may be for this model, one around it, or this one with a head."""
    modules = dict(model.named_modules(remove_duplicate=False))
    rename = _renaming(model)
    layers = []
    for layer in recipe.layers:
        candidates = [layer, layer.inside(model.base_model_prefix), layer.renamed(rename)]
        layers += [candidate for candidate in candidates if _waits(candidate, modules)][:1]
    if layers:
        apply_recipe(model, Recipe(tuple(layers)), record=False)
        _extend_plan(model, layers)


def _renaming(model: Any) -> Callable[[str], str]:
    """Return how transformers renames the modules of a saved model to load its weights into this class."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # an older transformers
        return lambda name: name
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]

    def rename(name: str) -> str:
        key = f"{name}.weight".lstrip(".")
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        return key.removesuffix("weight").removesuffix(".")

    return rename


def _extend_plan(model: Any, layers: Iterable[LayerRecipe]) -> None:
    """Add the functions to the model's tensor-parallel plan, and rename linear layers now in a `RationalLinear`."""
    plan: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    for layer in layers:
        names = [re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in (layer.activation, layer.linear or "")]
        activation, linear = names
        parent = activation.rpartition(".")[0]
        # The output of such a layer is this rank's part of the channels, unless the plan gathers it.
        is_cut = any(name.rpartition(".")[0] == parent and style in _CUT_STYLES for name, style in plan.items())
        if is_cut and _has_styles():  # an older transformers refuses an unknown style, even without sharding
            plan[activation] = _STYLE
        if linear in plan:
            plan[f"{linear}.linear"] = plan.pop(linear)


def _has_styles() -> bool:
    try:
        return importlib.util.find_spec("transformers.distributed.tensor_parallel") is not None
    except ModuleNotFoundError:  # there is no transformers.distributed
        return False


def know_styles(tensor_parallel: ModuleType) -> None:
    """Register a style for rational functions in plans for tensor parallelism."""

    class Groups(tensor_parallel.TensorParallelLayer):  # type: ignore[name-defined]
        """Each rank has the groups of its own channels, see `grkan.GroupParallel`."""

        def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
            from ..parallel import shard_groups_

            shard_groups_(module, param, mesh, source=None)

        def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
            return module

    tensor_parallel.ALL_PARALLEL_STYLES.register(_STYLE, Groups())


def _waits(layer: LayerRecipe, modules: Mapping[str, Any]) -> bool:
    """Whether the modules that a layer of a recipe names exist and are not converted yet."""
    parent, _, slot = layer.activation.rpartition(".")
    owner = modules.get(parent)
    if layer.call is not None and (owner is None or hasattr(owner, slot)):
        return False
    parts = [getattr(owner, slot, None) if layer.call is None else owner]
    if layer.linear is not None:
        parts.append(modules.get(layer.linear))
    return not any(part is None or isinstance(part, (GroupRational, RationalLinear)) for part in parts)


def _written(model: Any) -> ExitStack:
    """Put into the config the recipe that config.json must contain, until the returned stack is closed."""
    stack = ExitStack()
    config, recipe = model.config, recipe_of(model)
    for part in _configs(config):
        _set(part, stack, _FIELD, None)
    if recipe is not None:
        _set(config, stack, _FIELD, recipe.to_dict())
    return stack


def _refused(config: Any) -> ExitStack:
    """Put `_REFUSED` into a config with a recipe and into all its parts, until the returned stack is closed."""
    stack = ExitStack()
    configs = {id(part): part for part in _configs(config)}.values()  # two parts may be one object
    if any(getattr(part, _FIELD, None) for part in configs):
        for part in configs:  # a class of a part reads only that one
            quantised = getattr(part, "quantization_config", None)
            if quantised is not None and not isinstance(quantised, dict):
                quantised = quantised.to_dict()
            refused = _REFUSED if quantised is None else {**_REFUSED, "quantization_config": quantised}
            _set(part, stack, "quantization_config", refused)
            if part is not config and getattr(config, _FIELD, None):
                _set(part, stack, _FIELD, None)
    return stack


def _set(config: Any, stack: ExitStack, name: str, value: Any) -> None:
    """Set an attribute, or delete it for None, until the stack is closed."""
    attributes = vars(config)
    if name in attributes:
        stack.callback(attributes.__setitem__, name, attributes[name])
    else:
        stack.callback(attributes.pop, name, None)
    attributes.pop(name, None)
    if value is not None:
        attributes[name] = value


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for part in vars(config).values():
        if _is_config(part):
            yield from _configs(part)


def _record(model: Any, recipe: Mapping[str, Any], undo: ExitStack) -> None:
    """Give a converted model its own config with the recipe; other models may share the original config."""
    config = getattr(model, "config", None)
    if not _is_config(config):
        return
    _extend_plan(model, check_recipe(recipe).layers)
    copies: dict[int, Any] = {}
    new = copy.deepcopy(config, copies)
    setattr(new, _FIELD, recipe)
    for module in model.modules():
        for name, value in vars(module).items():
            if _is_config(value) and id(value) in copies:
                undo.callback(vars(module).__setitem__, name, value)
                vars(module)[name] = copies[id(value)]


def _is_config(value: Any) -> bool:
    return isinstance(value, sys.modules["transformers.configuration_utils"].PretrainedConfig)
