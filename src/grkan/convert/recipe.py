"""What a conversion does to a model's modules, from its recipe alone. `grkan.convert_` makes recipes.

Modules change their class and stay the objects that they are. So parameters, hooks, modes, attributes and every other
name under which a module is known survive without being copied.
"""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import GrkanTypeError, GrkanValueError
from ..nn import GRKAN, GroupRational, RationalConv1D, RationalLinear
from ..nn.wrappers import plain_name
from ..rational.arguments import check_groups, check_module

RECIPE_VERSION = 1

LAYOUTS = ("grkan", "linears", "activation")
"""How a layer is converted:
"grkan": the module that holds all parts becomes a `GRKAN`;
"linears": both linear layers become a `RationalLinear`, the activation an Identity, all where they are;
"activation": the activation becomes a `GroupRational`, and nothing else changes."""

_PARTS = {
    "grkan": ("fc1", "act", "drop1", "norm", "fc2", "drop2"),
    "linears": ("fc1", "act", "fc2"),
    "activation": ("act",),
}
_OPTIONAL = ("drop1", "norm", "drop2")

RECORDERS: list[Callable[[nn.Module, Mapping[str, Any], ExitStack], None]] = []
"""Called with a converted model, its whole recipe and what undoes the conversion: to keep it in a library's own
description of the model."""


def apply_conversion_(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Convert a model in place as a recipe says, without data: the same structure, with the same fitted functions.

    A model that was converted and trained further gets its weights by `load_state_dict` afterwards:

        model = AutoModel.from_pretrained(name)
        grkan.apply_conversion_(model, recipe)
        model.load_state_dict(state)

    Args:
        model: one of the architecture that the recipe was made for, not converted yet; any device, meta included.
        recipe: `ConversionReport.recipe`, or what JSON makes of it.

    Raises:
        TypeError: model is no module, or recipe no mapping.
        ValueError: recipe is none of grkan's, or of a newer version; or the model lacks a part that it names, or has a
            part of another kind or width there. The model is left as it was.
    """
    check_module("model", model)
    apply_recipe(model, check_recipe(recipe))


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], record: bool = True) -> Callable[[], None]:
    """`apply_conversion_`, with a function that undoes it as the result; record: whether `RECORDERS` are told."""
    modules = dict(model.named_modules(remove_duplicate=False))
    plans = [_Plan(layer, modules, model) for layer in recipe["layers"]]  # all checks come before the first change
    before = getattr(model, "grkan_conversion", None)
    undo = ExitStack()
    try:
        for plan in plans:
            plan.apply(undo)
    except BaseException:
        undo.close()
        raise
    layers = [*(before or {"layers": []})["layers"], *recipe["layers"]]
    model.grkan_conversion = {"version": RECIPE_VERSION, "layers": layers}  # type: ignore[assignment]
    if before is None:
        undo.callback(delattr, model, "grkan_conversion")
    else:
        undo.callback(setattr, model, "grkan_conversion", before)
    for recorder in RECORDERS if record else ():
        recorder(model, model.grkan_conversion, undo)  # type: ignore[arg-type]
    return undo.close


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """All that was converted in a model or in parts of it, as one recipe for the model; None: nothing."""
    layers = []
    for prefix, module in model.named_modules():
        recipe: Any = getattr(module, "grkan_conversion", {"layers": []})
        layers += [moved(layer, plain_name(prefix)) for layer in recipe["layers"]]
    return {"version": RECIPE_VERSION, "layers": layers} if layers else None


def moved(layer: Mapping[str, Any], into: str = "", out_of: str = "") -> dict[str, Any]:
    """A layer of a recipe under the names that its modules have one level up, in `into`, or down, from `out_of`."""

    def new(name: str) -> str:
        name = name.removeprefix(f"{out_of}.") if out_of else name
        return f"{into}.{name}".strip(".")

    parts = {part: None if name is None else new(name) for part, name in layer["parts"].items()}
    return {**layer, "name": new(layer["name"]), "parts": parts}


def is_there(layer: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a model has the modules that a layer of a recipe names, and they are not converted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parent, _, slot = layer["parts"]["act"].rpartition(".")
    parts = [modules.get(name) for part, name in layer["parts"].items() if part != "act" and name is not None]
    parts.append(getattr(modules.get(parent), slot, None))
    return not any(part is None or isinstance(part, (GroupRational, RationalLinear)) for part in parts)


def check_recipe(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe, if it looks like one."""
    if not isinstance(recipe, Mapping):
        raise GrkanTypeError(f"recipe must be a mapping, ConversionReport.recipe; got {type(recipe).__name__}")
    version, layers = recipe.get("version"), recipe.get("layers")
    if type(version) is not int or version < 1 or not isinstance(layers, Sequence) or isinstance(layers, str):
        raise GrkanValueError(
            f"recipe must have a version and layers, as ConversionReport.recipe; got {reprlib.repr(dict(recipe))}"
        )
    if version > RECIPE_VERSION:
        raise GrkanValueError(f"recipe has version {version}, this grkan knows up to {RECIPE_VERSION}: upgrade grkan")
    seen: set[str] = set()
    for layer in layers:
        _check_layer(layer)
        own = {name for name in layer["parts"].values() if name is not None}
        if own & seen:
            raise GrkanValueError(f"recipe must have each part in one layer; {min(own & seen)} is in two")
        seen |= own
    return recipe


def _check_layer(layer: Any) -> None:
    try:
        known = isinstance(layer["name"], str) and set(layer["parts"]) == set(_PARTS[layer["layout"]])
        known = known and all(isinstance(layer[act], Mapping) for act in ("act1", "act2"))
        for part, name in layer["parts"].items():
            known = known and (isinstance(name, str) or (name is None and part in _OPTIONAL))
    except (AttributeError, KeyError, TypeError):
        known = False
    if not known:
        raise GrkanValueError(f"recipe must have layers as grkan.convert_ writes them; got {json.dumps(layer)[:200]}")


def linear_kind(module: Any) -> str | None:
    """What stands for a linear layer here: "linear", "conv1d" (GPT-2's), or None.

    A subclass with a forward of its own (quantised, with adapters), an instance with one (Accelerate's offloading) and
    a parametrised one compute something else, and are none.
    """
    if not isinstance(module, nn.Module) or "forward" in vars(module) or hasattr(module, "parametrizations"):
        return None
    if type(module).forward is nn.Linear.forward:
        return "linear"
    weight = getattr(module, "weight", None)
    named = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
    return "conv1d" if named and isinstance(weight, nn.Parameter) and weight.dim() == 2 else None


def linear_width(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer or of a 1x1 convolution, of whatever class; None for anything else."""
    if linear_kind(module) == "conv1d":
        return tuple(module.weight.shape)
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == (1, 1) == module.stride and module.padding == (0, 0) and module.groups == 1
        return (module.in_channels, module.out_channels) if plain else None
    width = getattr(module, "in_features", None), getattr(module, "out_features", None)
    is_layer = isinstance(module, nn.Module) and all(isinstance(number, int) for number in width)
    return width if is_layer else None  # type: ignore[return-value]


class _Plan:
    """One layer of a recipe, bound to the modules of a model and checked against them."""

    def __init__(self, layer: Mapping[str, Any], modules: Mapping[str, nn.Module], model: nn.Module) -> None:
        self.layer, self.name, self.layout, self.parts = layer, layer["name"], layer["layout"], layer["parts"]
        try:
            self.bind(modules)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise GrkanValueError(
                f"recipe does not fit the model, a {type(model).__name__}, at {self.name or 'its root'}: {reason}"
            ) from error

    def bind(self, modules: Mapping[str, nn.Module]) -> None:
        if isinstance(modules.get(self.name), GRKAN):
            raise GrkanValueError("it is a GRKAN already")
        parent, _, self.slot = self.parts["act"].rpartition(".")
        self.parent = modules[parent]
        if not callable(getattr(self.parent, self.slot, None)):
            raise KeyError(self.parts["act"])
        if isinstance(getattr(self.parent, self.slot), GroupRational):
            raise GrkanValueError(f"{self.parts['act']} is a rational function already")
        self.old = getattr(self.parent, self.slot)
        self.fc1, self.fc2 = (modules[self.parts[fc]] if fc in self.parts else None for fc in ("fc1", "fc2"))
        self.between = {part: modules[self.parts[part]] for part in _OPTIONAL if self.parts.get(part) is not None}
        for fc, act in (("fc1", "act1"), ("fc2", "act2")):
            if fc in self.parts:
                self.check_linear(getattr(self, fc), self.parts[fc], self.layer[act])
        self.acts = []
        for act, module in (("act1", self.fc1), ("act2", self.fc2 or self.parent)):
            coefficients = self.layer[act]
            self.acts.append(_rational(coefficients, module) if coefficients else None)
        if self.acts[1] is None or (self.layout != "activation" and self.acts[0] is None):
            raise GrkanValueError("it has no coefficients")
        if self.layout == "grkan":
            self.container = modules[self.name]
            children = {id(child) for child in self.container.children()}
            ours = {id(self.fc1), id(self.fc2), id(self.old), *map(id, self.between.values())}
            if children != ours:
                raise GrkanValueError(f"it is a {type(self.container).__name__} with other parts")

    def check_linear(self, fc: Any, name: str, act: Mapping[str, Any]) -> None:
        if isinstance(fc, RationalLinear):
            raise GrkanValueError(f"{name} is converted already")
        width = linear_width(fc)
        if width is None or (self.layout == "linears" and linear_kind(fc) is None):
            raise GrkanValueError(f"{name} is no plain linear layer but a {type(fc).__name__}")
        if width[0] != act["width"]:
            raise GrkanValueError(f"{name} takes {width[0]} channels instead of {act['width']}")

    def apply(self, undo: ExitStack) -> None:
        first, second = self.acts
        assert second is not None
        if self.layout == "grkan":
            self.become_grkan(undo)
        elif self.layout == "activation":
            second.train(self.parent.training)
            _adopt_hooks(self.old, second)
            self.replace_activation(second, undo)
        else:
            assert first is not None
            _become_rational_linear(self.fc1, first, undo)
            _become_rational_linear(self.fc2, second, undo)
            self.replace_activation(nn.Identity(), undo)

    def replace_activation(self, new: nn.Module, undo: ExitStack) -> None:
        parent, slot, old = self.parent, self.slot, self.old
        new.train(parent.training)
        children, attributes = parent._modules, vars(parent)
        if slot in children:
            children[slot] = new
            undo.callback(children.__setitem__, slot, old)
        else:  # a function; the module that takes its place is a child
            del attributes[slot]
            children[slot] = new
            undo.callback(attributes.__setitem__, slot, old)
            undo.callback(children.pop, slot)
        if getattr(parent, "activation_relu_or_gelu", 0):
            # PyTorch's encoder layer would leave a new activation out on its fast path.
            undo.callback(setattr, parent, "activation_relu_or_gelu", parent.activation_relu_or_gelu)
            parent.activation_relu_or_gelu = 0  # type: ignore[assignment]

    def become_grkan(self, undo: ExitStack) -> None:
        container, (first, second) = self.container, self.acts
        assert second is not None
        _adopt_hooks(self.old, second)
        drops = {part: self.between.get(part) or nn.Dropout(0.0) for part in ("drop1", "drop2")}
        norm = self.between.get("norm") or nn.Identity()
        children: dict[str, Any] = {
            "act1": first, "fc1": self.fc1, "act2": second, "drop1": drops["drop1"], "norm": norm, "fc2": self.fc2,
            "drop2": drops["drop2"],
        }  # fmt: skip
        for child in children.values():
            if child not in container.children():
                child.train(container.training)
        _change_class(container, GRKAN, children, undo)
        container.weight_init = "variance_preserving"  # type: ignore[assignment]


def _become_rational_linear(fc: Any, act: GroupRational, undo: ExitStack) -> None:
    kind, width = linear_kind(fc), linear_width(fc)
    assert width is not None
    act.train(fc.training)
    _change_class(fc, RationalConv1D if kind == "conv1d" else RationalLinear, {"act": act}, undo)
    fc.in_features, fc.out_features = width


def _change_class(module: nn.Module, kind: type[nn.Module], children: dict[str, Any], undo: ExitStack) -> None:
    attributes, old_children, old_kind = dict(vars(module)), dict(module._modules), type(module)

    def restore() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        module._modules.clear()
        module._modules.update(old_children)
        module.__class__ = old_kind

    undo.callback(restore)
    module._modules.clear()
    module._modules.update(children)
    module.__class__ = kind


def _adopt_hooks(old: Any, new: nn.Module) -> None:
    """Let the new module call the hooks of the old one: the dictionaries themselves, so that handles still remove."""
    for name, value in vars(old).items() if isinstance(old, nn.Module) else ():
        if "_hooks" in name and ("forward" in name or "backward" in name):
            new.__dict__[name] = value


def _rational(act: Mapping[str, Any], like: Any) -> GroupRational:
    """The function that a recipe describes, where the parameters of `like` are."""
    check_groups("width", act["width"], act["num_groups"])
    if act["channel_dim"] not in (-1, 1) or not isinstance(act["init"], str):
        raise GrkanValueError(
            f"channel_dim must be -1 or 1, and init a name; got {act['channel_dim']!r}, {act['init']!r}"
        )
    parameter = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    rational = GroupRational(
        act["num_groups"],
        (act["numerator"], act["denominator"]),
        tuple(act["order"]),
        act["form"],
        channel_dim=act["channel_dim"],
        device=parameter.device,
        dtype=parameter.dtype,
    )
    rational.init_name = act["init"]
    return rational
