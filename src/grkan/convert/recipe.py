"""Apply a conversion to a model's modules, from its recipe alone. `grkan.convert_` makes recipes.

A conversion changes as little as possible. The second function takes the place of the activation, so the second linear
layer, its dropout and their names stay the same. The first linear layer becomes the child of a `RationalLinear` that
takes its name. A module with the layout of timm's `Mlp` changes its class to `GRKAN` and stays the same object.
Parameters, hooks, modes and all other names of a module are kept without being copied.
"""

import reprlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from ..errors import GrkanTypeError, GrkanValueError
from ..nn import GRKAN, GroupRational, RationalLinear
from ..nn.init import Method, keep_stacks_start, keep_start, starts_kept
from ..nn.kinds import is_conv1d, linear_kind, linear_width
from ..nn.wrappers import plain_name, unwrap_to_change
from ..rational.arguments import check_groups, check_module
from .calls import CallRecipe, check, lift

RECIPE_VERSION = 1

LAYOUTS = ("grkan", "linear", "activation")
"""Which parts of an MLP are converted:
"grkan": the module that holds all parts becomes a `GRKAN`;
"linear": the first linear layer gets a function in front, and the activation becomes one, both in place;
"activation": the activation becomes a `GroupRational`, and nothing else changes."""

TIMM_ORDER = ("fc1", "act", "drop1", "norm", "fc2", "drop2")
"""The children of timm's `Mlp`. `drop1`, `norm` and `drop2` may be missing."""

_LAYERS = "_grkan_layers"
"""The attribute of a module that holds the recipes of the MLPs in it, with names in this module."""

INITIALISERS = ("init_weights", "_init_weights")
"""The methods with which timm's and transformers' models initialise their weights."""


@dataclass(frozen=True)
class FunctionRecipe:
    """A rational function: the arguments of a `GroupRational`."""

    init: str
    """The name of the function it starts as, for display."""
    width: int | None
    """The number of input channels; None if unknown, so that one group serves all."""
    num_groups: int
    numerator: Sequence[Any]
    denominator: Sequence[Any]
    """Both as in `init` of a `GroupRational`: one row for all groups, or one row per group."""
    order: Sequence[int]
    form: str
    channel_dim: int

    def build(self, like: nn.Module) -> GroupRational:
        """Build the function, on the device and in the dtype of another module's parameters.

        Raises:
            ValueError, TypeError: the values of the recipe are invalid.
        """
        if self.width is not None:
            check_groups("width", self.width, self.num_groups)
        elif self.num_groups != 1:
            raise GrkanValueError(f"num_groups must be 1 if width is null; got {self.num_groups}")
        if self.channel_dim not in (-1, 1):
            raise GrkanValueError(f"channel_dim must be -1 or 1; got {self.channel_dim}")
        parameter = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
        rational = GroupRational(
            self.num_groups,
            (self.numerator, self.denominator),
            tuple(self.order),  # type: ignore[arg-type]
            self.form,
            channel_dim=self.channel_dim,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        rational.init_name, rational.width = self.init, self.width
        return rational


@dataclass(frozen=True)
class LayerRecipe:
    """The conversion of one MLP. Names are module names of the model, as in `named_modules`."""

    name: str
    """The module that holds the MLP."""
    layout: str
    """One of `LAYOUTS`."""
    linear: str | None
    """The first linear layer; None for the layout "activation"."""
    activation: str
    """The name of the child, or of the attribute with a function, that becomes the second function."""
    act1: FunctionRecipe | None
    """The function in front of the first linear layer; None for the layout "activation"."""
    act2: FunctionRecipe
    """The function in place of the activation."""
    gains: Mapping[str, Any] = field(default_factory=dict)
    """The linear layers that are drawn anew, from N(0, gain / fan_in); empty if the weights stay. For a parameter that
    holds the weights of several experts: [gain, dimension of the inputs]."""
    call: CallRecipe | None = None
    """The call in a method, if the activation is a function: it becomes a call of the child `activation`."""

    def within(self, module: str) -> "LayerRecipe":
        """Return the recipe for an enclosing model, in which this model is `module`."""
        return self.renamed(lambda name: plain_name(f"{module}.{name}".strip(".")))

    def inside(self, module: str) -> "LayerRecipe":
        """Return the recipe for the part `module` of the model; names outside of it stay the same."""
        return self.renamed(lambda name: "" if name == module else name.removeprefix(f"{module}."))

    @property
    def home(self) -> str:
        """The innermost module that contains all modules that the recipe changes."""
        parts = [self.activation, *self.gains] if self.linear is None else [self.activation, self.linear, *self.gains]
        paths = [name.split(".") for name in (self.name, *(part.rpartition(".")[0] for part in parts))]
        return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, zip(*paths, strict=False)))

    def renamed(self, new: Callable[[str], str]) -> "LayerRecipe":
        """Return the recipe with other names, each from the name here."""
        linear = None if self.linear is None else new(self.linear)
        gains = {new(name): gain for name, gain in self.gains.items()}
        return replace(self, name=new(self.name), linear=linear, activation=new(self.activation), gains=gains)


@dataclass(frozen=True)
class Recipe:
    """A conversion as data."""

    layers: tuple[LayerRecipe, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON, which `check_recipe` reads."""
        return {"version": RECIPE_VERSION, "layers": [asdict(layer) for layer in self.layers]}


RECORDERS: list[Callable[[nn.Module, Mapping[str, Any], ExitStack], None]] = []
"""Functions that store a conversion in a library's own description of the model. They are called with the converted
model, its whole recipe and the stack that undoes the conversion."""


def apply_conversion_(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Convert a model in place from a recipe, without data: the same structure, with the same fitted functions.

    Linear layers that were converted with start="scratch" are drawn anew.

    To restore a model that was trained after its conversion, load its weights with `load_state_dict` afterwards:

        model = AutoModel.from_pretrained(name)
        grkan.apply_conversion_(model, recipe)
        model.load_state_dict(state)

    Args:
        model: an unconverted model of the recipe's architecture, on any device, including meta.
        recipe: `ConversionReport.recipe`, also after a round trip through JSON.

    Raises:
        TypeError: model is not a module, or recipe is not a mapping.
        ValueError: recipe is not a recipe of grkan, or has a newer version; the model lacks a part that the recipe
            names, or the part has another kind or width; or the model is in a wrapper that keeps a list of its
            parameters. The model is left unchanged.
    """
    with torch.inference_mode(False):  # in inference mode the coefficients could never be trained
        apply_recipe(unwrap_to_change(check_module("model", model)), check_recipe(recipe))


def apply_recipe(model: nn.Module, recipe: Recipe, record: bool = True) -> Callable[[], None]:
    """Apply a recipe as `apply_conversion_` does, and return a function that undoes it. `record`: call `RECORDERS`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.update({plain_name(name): module for name, module in modules.items()})  # the inner one of two
    if any(layer.gains for layer in recipe.layers) and any(p.is_inference() for p in model.parameters()):
        raise GrkanValueError(
            "model must have weights that can be drawn anew; they are inference tensors: make the model outside of "
            "torch.inference_mode()"
        )
    plans = [_Plan(layer, modules, model) for layer in recipe.layers]  # all checks come before the first change
    undo = ExitStack()
    try:
        for plan in plans:
            plan.apply(undo)
        for layer in recipe.layers:
            _remember(layer, modules[layer.home], undo)
        if record and (whole := recipe_of(model)) is not None:
            for recorder in RECORDERS:
                recorder(model, whole.to_dict(), undo)
        if any(layer.gains for layer in recipe.layers):
            _keep_starts(model, undo)
    except BaseException:
        undo.close()
        raise
    for plan in plans:  # last, because it cannot be undone
        plan.draw()
    return undo.close


def _remember(layer: LayerRecipe, home: nn.Module, undo: ExitStack) -> None:
    """Keep the recipe of an MLP in the innermost module that contains it, in place of one that was undone by hand."""
    _restore_attribute(home, _LAYERS, undo)
    new = asdict(layer.inside(layer.home))
    parts = {new["linear"], new["activation"]} - {None}
    others = []
    for old in vars(home).get(_LAYERS, ()):
        if not parts & {old["linear"], old["activation"]}:
            others.append(old)
        elif old["activation"] == new["activation"]:  # `forward` still calls the child
            new["call"] = new["call"] or old["call"]
    setattr(home, _LAYERS, [*others, new])


def _keep_starts(model: nn.Module, undo: ExitStack) -> None:
    """Make the initialisers of a model and of its parts skip the modules that keep their initial weights."""
    for module in model.modules():
        if isinstance(module, (GRKAN, GroupRational, RationalLinear)):
            continue
        for name in INITIALISERS:
            if callable(getattr(type(module), name, None)):
                _restore_attribute(module, name, undo)
                setattr(module, name, Method(_initialise, module, name))


def _initialise(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call the initialiser of a model's class, for the model or a given module, and skip weights that are kept."""
    module = args[0] if args and isinstance(args[0], nn.Module) else model
    if isinstance(module, GroupRational) and not is_loaded(module):
        module.reset_parameters()
    with starts_kept(module):
        return getattr(type(model), method)(model, *args, **kwargs)


def recipe_of(model: nn.Module) -> Recipe | None:
    """Return everything converted in a model and its parts as one recipe for the model; None if there is nothing.

    Every converted MLP has its own part of the recipe, so a copy of it or a move to another model takes it along.

    Raises:
        ValueError: only a part of a converted MLP has been replaced since, or it is in another container now.
    """
    found: list[LayerRecipe] = []
    known: set[nn.Module] = set()
    for name, module in model.named_modules():
        records: Any = vars(module).get(_LAYERS, ())
        parts = {plain_name(part): child for part, child in module.named_modules()} if records else {}
        for record in records:
            layer = _layer("the conversion", record)
            wanted = (layer.linear, layer.activation) if layer.layout != "grkan" else (f"{layer.name}.act2".strip("."),)
            # A module that is not found is inside a wrapper of another library.
            names = [part for part in wanted if part in parts]
            inside = {part: [m for m in parts[part].modules() if isinstance(m, GroupRational)] for part in names}
            lost = [part for part in names if not inside[part]]
            if not lost:
                found.append(layer.within(name))
                known.update(*inside.values())
            elif lost != names:
                raise GrkanValueError(
                    f"model must have both functions of a converted MLP, or neither; {f'{name}.{lost[0]}'.lstrip('.')} "
                    "has been replaced by a module without one"
                )
    for name, module in model.named_modules():
        if vars(module).get("of_conversion") and module not in known:
            raise GrkanValueError(
                f"model must have its converted MLPs in the modules in which they were converted; {name or 'it'} is "
                "not: a container around it was built anew, or this is only a part of an MLP. Convert the model as it "
                "is now, or save only its state dict"
            )
    return Recipe(tuple(found)) if found else None


def check_recipe(recipe: Mapping[str, Any]) -> Recipe:
    """Return the recipe in plain JSON.

    Raises:
        TypeError, ValueError: it is not a recipe, or has a newer version; the message says where.
    """
    if not isinstance(recipe, Mapping):
        raise GrkanTypeError(f"recipe must be a mapping such as ConversionReport.recipe; got {type(recipe).__name__}")
    version, layers = recipe.get("version"), recipe.get("layers")
    if type(version) is not int or version < 1 or not isinstance(layers, Sequence) or isinstance(layers, str):
        raise GrkanValueError(
            f"recipe must have a version and layers, as ConversionReport.recipe has; got {reprlib.repr(dict(recipe))}"
        )
    if version > RECIPE_VERSION:
        raise GrkanValueError(
            f"recipe must have a version up to {RECIPE_VERSION}; got {version}; upgrade grkan to read it"
        )
    checked = tuple(_layer(f"layer {i} of recipe", layer) for i, layer in enumerate(layers))
    seen: set[str] = set()
    for layer in checked:
        own = {name for name in (layer.linear, layer.activation) if name is not None}
        if own & seen:
            raise GrkanValueError(f"recipe must have each part in only one layer; {min(own & seen)} is in two")
        seen |= own
    return Recipe(checked)


_TEXT, _WHOLE, _LIST = ((str,), "a string"), ((int,), "an integer"), ((list, tuple), "a list")
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "name": _TEXT,
    "layout": _TEXT,
    "linear": ((str, type(None)), "a string or null"),
    "activation": _TEXT,
    "act1": ((Mapping, type(None)), "an object or null"),
    "act2": ((Mapping,), "an object"),
    "init": _TEXT,
    "width": ((int, type(None)), "an integer or null"),
    "call": ((Mapping, type(None)), "an object or null"),
    "method": _TEXT,
    "source": _TEXT,
    "argument": _TEXT,
    "index": _WHOLE,
    "num_groups": _WHOLE,
    "numerator": _LIST,
    "denominator": _LIST,
    "order": _LIST,
    "form": _TEXT,
    "channel_dim": _WHOLE,
    "gains": ((Mapping,), "an object"),
}
"""The types of the records' fields in JSON."""


def _layer(where: str, value: Any) -> LayerRecipe:
    given = _fields(where, LayerRecipe, value)
    for act in ("act1", "act2"):
        if given[act] is not None:
            given[act] = FunctionRecipe(**_fields(f"{act} in {where}", FunctionRecipe, given[act]))
    if given["call"] is not None:
        given["call"] = CallRecipe(**_fields(f"call in {where}", CallRecipe, given["call"]))
    layer = LayerRecipe(**given)
    if layer.layout not in LAYOUTS:
        raise GrkanValueError(f"layout in {where} must be one of {', '.join(LAYOUTS)}; got {layer.layout!r}")
    for name in ("linear", "act1"):
        if (getattr(layer, name) is None) != (layer.layout == "activation"):
            raise GrkanValueError(
                f"{name} in {where} must be null if, and only if, the layout is 'activation'; "
                f"got {reprlib.repr(given[name])} for {layer.layout!r}"
            )
    for linear, value in layer.gains.items():
        stacked = isinstance(value, (list, tuple)) and len(value) == 2 and value[1] in (1, 2)
        gain = value[0] if stacked else value
        if type(gain) not in (int, float) or not 0 < gain < float("inf"):
            raise GrkanValueError(f"gains in {where} must be positive numbers; got {value!r} for {linear!r}")
    inside = f"{layer.name}." if layer.name else ""
    if layer.layout == "grkan" and (layer.linear, layer.activation) != (f"{inside}fc1", f"{inside}act"):
        raise GrkanValueError(
            f"linear and activation in {where} must be {inside}fc1 and {inside}act for the layout 'grkan'; "
            f"got {layer.linear} and {layer.activation}"
        )
    return layer


def _fields(where: str, kind: Any, value: Any) -> dict[str, Any]:
    """Check that a mapping has exactly the fields of a record, and return it as a dict."""
    if not isinstance(value, Mapping):
        raise GrkanValueError(f"{where} must be an object, as grkan.convert_ writes it; got {reprlib.repr(value)}")
    wanted = [field.name for field in fields(kind)]
    if set(value) != set(wanted):
        raise GrkanValueError(f"{where} must have {', '.join(wanted)}; got {', '.join(map(str, value))}")
    for name in wanted:
        kinds, words = _FIELDS[name]
        if not isinstance(value[name], kinds) or isinstance(value[name], bool):
            raise GrkanValueError(f"{name} in {where} must be {words}; got {reprlib.repr(value[name])}")
    return dict(value)


class _Plan:
    """One layer of a recipe, bound to the modules of a model and checked against them."""

    def __init__(self, layer: LayerRecipe, modules: Mapping[str, nn.Module], model: nn.Module) -> None:
        self.layer = layer
        try:
            self.bind(modules)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise GrkanValueError(
                f"recipe does not fit the model, a {type(model).__name__}, at {layer.name or 'its root'}: {reason}"
            ) from error

    def bind(self, modules: Mapping[str, nn.Module]) -> None:
        layer = self.layer
        if isinstance(modules.get(layer.name), GRKAN):
            raise GrkanValueError("it is already a GRKAN")
        parent, _, self.slot = layer.activation.rpartition(".")
        self.parent = modules[parent]
        self.old = getattr(self.parent, self.slot, None)
        if isinstance(self.old, GroupRational):
            raise GrkanValueError(f"{layer.activation} is already a rational function")
        if layer.call is not None:
            if self.old is not None:
                raise GrkanValueError(f"{layer.activation} already exists")
            check(type(self.parent), layer.call)
        elif not callable(self.old):
            raise KeyError(layer.activation)
        self.first = None if layer.linear is None else modules[layer.linear]
        if self.first is not None and layer.act1 is not None:
            self.check_linear(self.first, layer.linear, layer.act1.width)
            self.act1 = layer.act1.build(self.first)
        self.act2 = layer.act2.build(self.first or self.with_weights(parent, modules))
        if layer.layout == "linear":
            parent, _, self.key = str(layer.linear).rpartition(".")
            self.holder = modules[parent]
        if layer.layout == "grkan":
            keys = list(self.parent._modules)
            if keys != [key for key in TIMM_ORDER if key in keys] or "fc2" not in keys:
                raise GrkanValueError(f"it is a {type(self.parent).__name__} whose parts are not those of timm's Mlp")
            self.check_linear(self.parent.fc2, f"{layer.name}.fc2", layer.act2.width)
        self.drawn: list[tuple[nn.Module, float]] = []
        self.stacks: dict[nn.Module, dict[str, tuple[float, int]]] = {}
        for name, gain in layer.gains.items():
            if isinstance(gain, (list, tuple)):
                owner, _, key = name.rpartition(".")
                if not is_stack(modules[owner]._parameters.get(key)):
                    raise GrkanValueError(f"{name} is not a parameter that stacks the weights of several linear layers")
                self.stacks.setdefault(modules[owner], {})[key] = gain[0], gain[1]
            elif is_drawable(modules[name]):
                self.drawn.append((modules[name], gain))
            else:
                raise GrkanValueError(f"{name} is not a plain linear layer but a {type(modules[name]).__name__}")

    def with_weights(self, name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
        """Return the innermost module around the activation that has weights: a GEGLU has none."""
        while name and not any(p.is_floating_point() for p in modules[name].parameters()):
            name = name.rpartition(".")[0]
        return modules[name]

    def check_linear(self, fc: Any, name: str | None, inputs: int | None) -> None:
        if isinstance(fc, RationalLinear):
            raise GrkanValueError(f"{name} is already converted")
        width = linear_width(fc)
        if width is None or (self.layer.layout == "linear" and linear_kind(fc) is None):
            raise GrkanValueError(f"{name} is not a plain linear layer but a {type(fc).__name__}")
        if width[0] != inputs:
            raise GrkanValueError(f"{name} takes {width[0]} channels instead of {inputs}")

    def apply(self, undo: ExitStack) -> None:
        _adopt_hooks(self.old, self.act2, undo)
        if isinstance(self.old, nn.Module) and (state := list(self.old.state_dict())):
            # Without a reference to the function: another one may share the hooks, and may outlive it.
            handle = self.act2._register_load_state_dict_pre_hook(partial(_forget, state, None))
            undo.callback(handle.remove)
        self.act2.train(self.parent.training)
        self.act2.of_conversion = True  # type: ignore[assignment]
        if self.layer.layout == "grkan":
            self.become_grkan(undo)
        else:
            if self.layer.layout == "linear":
                self.wrap_linear(undo)
            self.replace_activation(undo)
        for module in (*(module for module, _ in self.drawn), *self.stacks):
            for name in ("reset_parameters", "keeps_start"):
                _restore_attribute(module, name, undo)
        for module, gain in self.drawn:
            keep_start(module, gain)
        for module, starts in self.stacks.items():
            keep_stacks_start(module, starts)

    def draw(self) -> None:
        for module in (*(module for module, _ in self.drawn), *self.stacks):
            module.reset_parameters()  # type: ignore[operator]

    def wrap_linear(self, undo: ExitStack) -> None:
        assert self.first is not None
        _restore_attribute(self.first, "reset_parameters", undo)
        undo.callback(self.holder._modules.__setitem__, self.key, self.first)
        self.holder._modules[self.key] = RationalLinear.around(self.act1, self.first)

    def replace_activation(self, undo: ExitStack) -> None:
        parent, slot, old = self.parent, self.slot, self.old
        if self.layer.call is not None:
            lift(parent, self.layer.call, slot, self.act2, undo)
            return
        children, attributes = parent._modules, vars(parent)
        if slot in children:
            undo.callback(children.__setitem__, slot, old)
        else:  # a function; the module that takes its place is a child
            undo.callback(attributes.__setitem__, slot, attributes.pop(slot))
            undo.callback(children.pop, slot)
        children[slot] = self.act2
        if getattr(parent, "activation_relu_or_gelu", 0):
            # PyTorch's encoder layer would skip a new activation on its fast path.
            _restore_attribute(parent, "activation_relu_or_gelu", undo)
            parent.activation_relu_or_gelu = 0  # type: ignore[assignment]

    def become_grkan(self, undo: ExitStack) -> None:
        container = self.parent
        for fc in (container.fc1, container.fc2):
            _restore_attribute(fc, "reset_parameters", undo)
        attributes, children, kind = dict(vars(container)), dict(container._modules), type(container)

        def restore() -> None:
            vars(container).clear()
            vars(container).update(attributes)
            container._modules.clear()
            container._modules.update(children)
            container.__class__ = kind

        undo.callback(restore)
        others = {"drop1": nn.Dropout(0.0), "norm": nn.Identity(), "drop2": nn.Dropout(0.0)}
        for new in (self.act1, *others.values()):
            new.train(container.training)
        parts = {**others, **children}
        container._modules.clear()
        container._modules.update(
            act1=self.act1, fc1=parts["fc1"], act2=self.act2, drop1=parts["drop1"], norm=parts["norm"],
            fc2=parts["fc2"], drop2=parts["drop2"],
        )  # fmt: skip
        container.__class__ = GRKAN
        container.weight_init = "variance_preserving"  # type: ignore[assignment]
        container.remember_start()  # type: ignore[operator]


def _forget(names: list[str], module: nn.Module | None, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drop the parameters of the original activation from a state dict saved before the conversion."""
    if f"{prefix}numerator" not in state:
        for name in names:
            state.pop(prefix + name, None)


def is_loaded(module: nn.Module) -> bool:
    """Return whether transformers has loaded all of a module's own parameters from a checkpoint."""
    return all(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False))


def is_drawable(module: Any) -> bool:
    """Return whether this is a linear layer or a 1x1 convolution with its own weight that is not quantised."""
    width, weight = linear_width(module), getattr(module, "weight", None)
    if width is None or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False
    return tuple(weight.shape[:2]) == (width if is_conv1d(module) else width[::-1])


def is_stack(parameter: Any) -> bool:
    """Return whether this is a parameter (experts, rows, columns) that is not quantised."""
    return isinstance(parameter, nn.Parameter) and parameter.dim() == 3 and parameter.is_floating_point()


def _restore_attribute(module: Any, name: str, undo: ExitStack) -> None:
    """Let `undo` restore the current value of a module's attribute, or remove it if there is none now."""
    attributes = vars(module)
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)


def _adopt_hooks(old: Any, new: nn.Module, undo: ExitStack) -> None:
    """Share the hooks of the old module with the new one. The dictionaries are shared so that handles still work."""
    if not isinstance(old, nn.Module):
        return
    # The names are those of a module of this PyTorch, which also has flags that say how its hooks are called.
    hooks = {name: vars(old)[name] for name in vars(nn.Module()) if "hook" in name and name in vars(old)}
    vars(new).update(hooks)
    for hook in (hook for value in hooks.values() if isinstance(value, dict) for hook in value.values()):
        # PyTorch calls some hooks with a module of which they keep a weak reference.
        if isinstance(reference := getattr(hook, "module", None), weakref.ref) and reference() is old:
            undo.callback(setattr, hook, "module", reference)
            hook.module = weakref.ref(new)
