"""Find the MLPs of a model: a linear layer, an activation, a linear layer.

They are found by structure and, if the model was run, by what the run showed. An activation is any function that maps
each scalar independently, which is tested numerically. Its linear layers are those around it whose widths match. That
guess is tested too if a module can be run on its own, and again with calibration data. Any other activation of a
feed-forward part is replaced in place, without its linear layers.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import GRKAN, GroupRational, RationalLinear
from ..nn.kinds import linear_kind, linear_width
from ..rational import table
from . import observe
from .activation import Activation, Called, as_activation, reaches_tensor
from .calls import CallRecipe, lift
from .observe import Observation, Seen
from .recipe import TIMM_ORDER
from .site import NotFoundError, Site
from .watch import runs_its_parts, try_alone

# Gates: their output is a weight for the output of other layers.
_GATES = ("sigmoid", "hardsigmoid", "softplus", "Hardsigmoid", "LogSigmoid", "logsigmoid", "hard_sigmoid")


def find_sites(
    model: nn.Module, seen: Observation | None = None, include: Sequence[str] = (), undo: ExitStack | None = None
) -> tuple[list[Site], list[tuple[str, str]]]:
    """Find the activations that can become rational, in module order, and a (name, reason) for each of the others.

    Args:
        seen: what a run of the model showed.
        include: patterns for names; whatever they match is converted.
        undo: collects the callbacks that turn the new children back into functions that `forward` calls.
    """
    finder = _Finder(model, seen, include)
    if seen is not None and undo is not None:
        finder.lift_calls(seen, undo)
    activations: set[nn.Module | None] = set()
    for name, parent in model.named_modules():
        # The parts of an activation are not activations themselves.
        if isinstance(parent, (GRKAN, GroupRational, RationalLinear)) or parent in activations:
            continue
        if isinstance(parent, torch.jit.ScriptModule):
            finder.add_compiled(name, parent)
            continue
        for slot, activation in _activations(parent, finder.attributes):
            child = parent._modules.get(slot)
            if child is not None:
                activations.update(child.modules())
            finder.add(name, parent, slot, activation)
    finder.name_the_rest(activations)
    sites = finder.sites
    used = Counter(id(site.first) for site in sites if site.layout == "linear")
    for site in sites:
        # A linear layer that is used in several places cannot get a function of its own in front.
        if site.layout == "linear" and (used[id(site.first)] > 1 or finder.places[id(site.first)] > 1):
            site.keep_linear()
    return sites, finder.skipped


def choose(
    sites: list[Site], include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[Site], list[tuple[str, str]]]:
    """Split the sites into those whose name, or a part's name, matches `include` but not `exclude`, and the rest."""

    def matches(site: Site, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in (site.name, *site.modules) for pattern in patterns)

    chosen, skipped = [], []
    for site in sites:
        if include is not None and not matches(site, include):
            skipped.append((site.name, "not included"))
        elif matches(site, exclude):
            skipped.append((site.name, "excluded"))
        else:
            chosen.append(site)
    return chosen, skipped


def _activations(parent: nn.Module, attributes: Any = ()) -> Iterator[tuple[str, Activation]]:
    """Yield the attributes of a module that are elementwise functions: child modules and plain functions.

    A plain function counts if its attribute's name contains "act", if it is PyTorch's, or if a run showed that it is
    called: `attributes` holds (id of the module, attribute) of these.
    """
    for slot, child in parent._modules.items():
        if child is not None and not isinstance(child, GroupRational) and (found := as_activation(child)) is not None:
            yield slot, found
    for slot, value in list(vars(parent).items()):  # a copy, because the caller may replace attributes meanwhile
        if not callable(value) or isinstance(value, (type, nn.Module)):
            continue
        of_torch = str(getattr(value, "__module__", None)).startswith("torch")
        if "act" in slot.lower() or of_torch or (id(parent), slot) in attributes:
            found = None if reaches_tensor(value) else as_activation(value, parent)
            if found is not None:
                yield slot, found


class _Finder:
    def __init__(self, model: nn.Module, seen: Observation | None = None, include: Sequence[str] = ()) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = {id(module): name for name, module in model.named_modules()}
        children = (child for module in model.modules() for child in module._modules.values())
        self.places = Counter(map(id, children))
        self.seen, self.include = seen, include
        self.sites: list[Site] = []
        self.skipped: list[tuple[str, str]] = []
        self.attributes = set() if seen is None else {(id(s.owner), s.slot) for s in seen.places.values() if s.slot}
        self.lifted: dict[tuple[int, str], tuple[CallRecipe, str, list[Seen]]] = {}

    def named(self, *names: str) -> bool:
        """Return whether `include` matches one of the names."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.include)

    def lift_calls(self, seen: Observation, undo: ExitStack) -> None:
        """Turn functions that methods call into children if they belong to a feed-forward part."""
        inside: set[nn.Module] = set()
        for module in self.modules.values():
            if module not in inside and not isinstance(module, nn.Sequential) and as_activation(module) is not None:
                inside.update(module.modules())
        groups: dict[Any, list[Seen]] = {}
        for place in seen.places.values():
            usable = place.slot is None and place.owner not in inside
            if usable and place.call is not None and place.function is not None:
                groups.setdefault((id(place.owner), place.call), []).append(place)
        for places in groups.values():
            place = places[0]
            assert place.function is not None and place.call is not None  # noqa: PT018
            activation = as_activation(place.function)
            if activation is None:
                continue
            if activation.name not in table.NAMES:
                activation.name = place.label
            if not self.wanted(activation.name, places, self.names[id(place.owner)]):
                continue
            slot = next(s for s in ("act", *(f"act_{i}" for i in range(2, 99))) if not hasattr(place.owner, s))
            try:
                lift(place.owner, place.call, slot, Called(place.function), undo)
            except ValueError as error:
                place.problem = str(error)
                continue
            self.lifted[id(place.owner), slot] = (place.call, place.label, places)

    def wanted(self, name: str, places: list[Seen], *names: str) -> bool:
        """Return whether an activation belongs to a feed-forward part, or `include` names it."""
        return self.named(*names) or not (name in _GATES or observe.why_not(places))

    def add(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> None:
        """Add an activation to `sites` or to `skipped`."""
        full = _join(name, slot)
        call, label, places = self.lifted.get((id(parent), slot), (None, activation.name, []))
        if activation.name == Called.__name__:
            activation.name = label
        if self.seen is not None and call is None:
            child = parent._modules.get(slot)
            places = self.seen.of_attribute(parent, slot) if child is None else self.seen.of_module(child, parent)
        site: Site | None = None
        reason = ""
        try:
            site = self.site(name, parent, slot, activation)
        except NotFoundError as error:
            reason = str(error)
        if places:
            site = site or self.alone(name, parent, slot, activation)
            site.place(observe.channel_dim(places), [shape for seen in places for shape in seen.shapes])
            if site.layout == "linear" and self.seen is not None and site.first not in self.seen.called:
                site.keep_linear()  # its weight is used without calling it
            reason = observe.why_not(places)
        elif self.seen is not None and parent in self.seen.called and parent._modules.get(slot) not in self.seen.called:
            site, reason = None, "its module runs, but never calls it"
        elif self.named(full, name):
            site = site or self.alone(name, parent, slot, activation)
        doubt = "" if self.named(full, name) else "a gate" if activation.name in _GATES else reason
        if site is not None and doubt and site.layout == "activation":
            site, reason = None, doubt
        if site is None:
            hint = "; to convert it in place, name it in include" if places else ""
            self.skipped.append((full, f"{activation.name}: {reason}{hint}"))
            return
        site.call, site.doubt = call, doubt
        self.sites.append(site)

    def add_compiled(self, name: str, module: nn.Module) -> None:
        """Add a module that TorchScript has compiled to `skipped`, but not its parts."""
        around = self.modules.get(name.rpartition(".")[0]) if name else None
        if not isinstance(around, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            self.skipped.append((name, "it is compiled by TorchScript; to convert it, compile the converted model"))

    def name_the_rest(self, activations: set[nn.Module | None]) -> None:
        """Add every other place where an elementwise operation was seen to `skipped`."""
        done = {id(place) for _, _, places in self.lifted.values() for place in places}
        named = set()
        for place in () if self.seen is None else self.seen.places.values():
            owner, slot = place.owner, place.slot
            if owner in activations or id(place) in done or isinstance(owner, (GRKAN, GroupRational, RationalLinear)):
                continue
            name = self.names[id(owner)]
            if slot is not None and any(site.parent is owner and site.slot == slot for site in self.sites):
                continue
            if slot is not None and any(skipped == _join(name, slot) for skipped, _ in self.skipped):
                continue
            reason = self.why_left(place)
            source = "" if place.call is None else f" ({place.call.source})"
            if (name, place.operation, source, reason) not in named:
                named.add((name, place.operation, source, reason))
                self.skipped.append((name, f"{place.operation} in {place.code.co_name}{source}: {reason}"))

    def why_left(self, place: Seen) -> str:
        held = None if place.slot is None else vars(place.owner).get(place.slot)
        if held is not None and reaches_tensor(held):
            return "it uses a tensor, which may change; to convert it, make it a module with parameters"
        if held is not None and as_activation(held, place.owner) is None:
            return "it is not an elementwise function of one tensor, or something else in training"
        if not place.problem and place.function is not None:
            activation = as_activation(place.function)
            if activation is None:
                return "it is part of an expression that is not an elementwise function of one tensor"
            gate = activation.name in _GATES or place.label in _GATES
            reason = "a gate" if gate else observe.why_not([place])
            if reason:
                return f"{reason}; to convert it in place, name its module in include"
        reason = observe.why_not([place])
        return reason or f"{place.problem}; to convert it, make it a child, such as self.act = nn.GELU()"

    def site(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site:
        for find in (self.as_grkan, self.around, self.in_next_module):
            found = find(name, parent, slot, activation)
            if found is not None:
                found.norms = self.norms_before(found)
                return found
        around = [child for child in parent.children() if linear_width(child) is not None]
        odd = sorted({type(child).__name__ for child in around if linear_kind(child) is None})
        if odd and not any(isinstance(child, nn.Conv2d) for child in around):
            raise NotFoundError(f"the layers next to it are not plain linear layers but {', '.join(odd)}")
        raise NotFoundError("no two linear layers around it have matching widths")

    def as_grkan(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """Match a module that consists only of fc1, act, drop1, norm, fc2, drop2: timm's Mlp."""
        if slot not in parent._modules or parent._parameters or parent._buffers or "forward" in vars(parent):
            return None
        parts = _in_timm_order(parent, slot)
        if parts is None:
            return None
        first, second = parent.get_submodule("fc1"), parent.get_submodule("fc2")
        inner, outer = linear_width(first), linear_width(second)
        if inner is None or outer is None or inner[1] != outer[0]:
            return None
        # A GRKAN takes no other arguments, and has no other methods of its class.
        if list(inspect.signature(parent.forward).parameters) != ["x"] or _has_more_than_forward(type(parent)):
            return None
        conv = isinstance(first, nn.Conv2d)
        if conv is not isinstance(second, nn.Conv2d) or not runs_its_parts(parent, parts, inner[0], conv):
            return None
        full = {part: None if child is None else _join(name, child) for part, child in parts.items()}
        return Site(name, "grkan", full, parent, slot, activation, first, second, outer[0], 1 if conv else -1)

    def around(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """Match an activation whose linear layers are children of the same module."""
        linears = [(key, child) for key, child in parent._modules.items() if linear_kind(child) is not None]
        if not linears and any(isinstance(child, nn.Conv2d) for child in parent.children()):
            return self.in_convolutions(name, parent, slot, activation)
        if type(parent).forward is nn.Sequential.forward:
            return self.in_sequential(name, parent, slot, activation)
        if not linears:
            return None
        widths = {key: linear_width(child) or (0, 0) for key, child in linears}
        keys = list(widths)
        pairs = [(a, b) for i, a in enumerate(keys) for b in keys[i + 1 :] if widths[a][1] == widths[b][0]]
        for a, b in pairs:
            twins = [key for key in keys if key not in (a, b) and widths[key] == widths[a]]
            if twins and widths[a][0] != widths[a][1]:  # a gate: one output times the activation of the other
                return self.gate(name, parent, slot, activation, a, widths[b][0])
        if len(keys) == 2 and widths[keys[0]][1] == 2 * widths[keys[1]][0]:
            return self.gate(name, parent, slot, activation, None, widths[keys[1]][0])
        if len(pairs) > 1:
            return self.alone(name, parent, slot, activation)
        if not pairs:
            return None
        return self.linear(name, parent, slot, activation, _join(name, pairs[0][0]), _join(name, pairs[0][1]))

    def in_sequential(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """Match a part of a Sequential with at most dropout and norms before the second linear layer."""
        children = {k: c for k, c in parent._modules.items() if not isinstance(c, (nn.Dropout, nn.Identity))}
        keys = list(children)
        before = keys[: keys.index(slot)][-1:]
        behind = [key for key in keys[keys.index(slot) + 1 :] if not _is_norm(children[key])][:1]
        if any(linear_kind(children[key]) is None for key in before + behind) or not (before and behind):
            raise NotFoundError("the layers next to it are not plain linear layers")
        inner, outer = linear_width(children[before[0]]), linear_width(children[behind[0]])
        if inner is None or outer is None or inner[1] != outer[0]:
            raise NotFoundError("the widths of the linear layers around it do not match")
        return self.linear(name, parent, slot, activation, _join(name, before[0]), _join(name, behind[0]))

    def in_convolutions(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """Match two 1x1 convolutions and one activation, with norms and dropout: only the activation is converted."""
        convs = [child for child in parent.children() if isinstance(child, nn.Conv2d)]
        widths = [linear_width(conv) for conv in convs]
        if len(convs) != 2 or None in widths or len(list(_activations(parent))) != 1:
            return None
        if widths[0][1] != widths[1][0]:  # type: ignore[index]
            return None
        first, second = convs
        parts: dict[str, str | None] = {"act": _join(name, slot)}
        return self.tried(
            Site(name, "activation", parts, parent, slot, activation, first, second, second.in_channels, 1)
        )

    def in_next_module(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """Match an activation whose second linear layer is in the next module, as in BERT's intermediate and output."""
        linears = [key for key, child in parent._modules.items() if linear_kind(child) is not None]
        if len(linears) != 1 or not name:
            return None
        if any(_is_norm(child) for child in parent.children()):
            raise NotFoundError("a norm lies between it and the next linear layer")
        width = linear_width(parent._modules[linears[0]])
        above, _, own = name.rpartition(".")
        siblings = list(self.modules[above]._modules.items()) if above in self.modules else []
        for key, sibling in siblings[[k for k, _ in siblings].index(own) + 1 :]:
            if sibling is None or isinstance(sibling, (nn.Dropout, nn.Identity)):
                continue
            if linear_kind(sibling) is not None:
                behind = [key]
            else:
                inner = list(sibling._modules)
                behind = [f"{key}.{k}" for k in inner if linear_kind(sibling._modules[k]) is not None]
                if behind and any(_is_norm(sibling._modules[k]) for k in inner[: inner.index(behind[0].split(".")[1])]):
                    raise NotFoundError("a norm lies between it and the next linear layer")
            if len(behind) == 1 and width is not None:
                second = _join(above, behind[0])
                outer = linear_width(self.modules.get(second))
                if outer is not None and outer[0] == width[1]:
                    return self.linear(
                        above, parent, slot, activation, _join(name, linears[0]), second, _join(name, slot)
                    )
            break
        return None

    def linear(
        self,
        name: str,
        parent: nn.Module,
        slot: str,
        activation: Activation,
        fc1: str,
        fc2: str,
        act: str | None = None,
    ) -> Site:
        first, second = self.modules[fc1], self.modules[fc2]
        width = (linear_width(second) or (0, 0))[0]
        parts: dict[str, str | None] = {"fc1": fc1, "act": act or _join(name, slot), "fc2": fc2}
        site = Site(name, "linear", parts, parent, slot, activation, first, second, width)
        return self.tried(site)

    def tried(self, site: Site) -> Site:
        """Check a site by running the modules around it, if no run of the model was observed."""
        if self.seen is not None:
            return site
        names = [self.names[id(site.parent)]]
        while names[-1] and len(names) < 4:
            names.append(names[-1].rpartition(".")[0])
        follows = try_alone(site, [self.modules[n] for n in names if n in self.modules])
        if follows is None:
            site.share()
        elif not follows and site.layout == "linear":
            site.keep_linear()
        return site

    def alone(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site:
        """Return a site for an activation whose linear layers are not known."""
        site = Site(name, "activation", {"act": _join(name, slot)}, parent, slot, activation, None, None, 1)
        site.share()
        return site

    def gate(
        self, name: str, parent: nn.Module, slot: str, activation: Activation, first: str | None, width: int
    ) -> Site:
        parts: dict[str, str | None] = {"act": _join(name, slot)}
        module = parent._modules[first] if first is not None else self.first_linear(parent)
        return self.tried(Site(name, "activation", parts, parent, slot, activation, module, None, width))

    def first_linear(self, parent: nn.Module) -> nn.Module | None:
        return next((child for child in parent.children() if linear_kind(child) is not None), None)

    def norms_before(self, site: Site) -> list[nn.Module]:
        """Return the norms of the input's width in the nearest enclosing module that has any.

        That is the last norm created before the linear layer, or all of them if there is none before it. BERT, timm and
        ViT create norms in the order in which they run; PyTorch's encoder layer creates them after everything else.
        """
        width = linear_width(site.first)
        name = site.name
        while width is not None:
            around = self.modules[name]
            modules = list(around.modules())
            norms = [m for m in modules if _is_norm(m) and m.weight.shape == (width[0],)]
            if norms or not name:
                before = [m for m in modules[: modules.index(site.first)] if m in norms]
                return before[-1:] or norms
            name = name.rpartition(".")[0]
            if name not in self.modules:
                break
        return []


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _is_norm(module: Any) -> bool:
    """Return whether `module` is a norm over the channels with a weight: LayerNorm, RMSNorm or a similar class."""
    named = "Norm" in type(module).__name__ and "Batch" not in type(module).__name__
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def _in_timm_order(parent: nn.Module, slot: str) -> dict[str, str | None] | None:
    keys = list(parent._modules)
    if slot != "act" or any(key not in TIMM_ORDER for key in keys) or not {"fc1", "fc2"} <= set(keys):
        return None
    if keys != [key for key in TIMM_ORDER if key in keys] or any(child is None for child in parent._modules.values()):
        return None
    return {key: key if key in keys else None for key in TIMM_ORDER}


def _has_more_than_forward(kind: type) -> bool:
    """Return whether a class defines or inherits methods or attributes other than nn.Module's and forward."""
    bases = (
        base for base in kind.__mro__ if base not in nn.Module.__mro__ and base.__module__ not in ("abc", "typing")
    )
    others = (name for base in bases for name in vars(base))
    return any(name not in ("forward", "extra_repr", "_abc_impl") and not _is_special(name) for name in others)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
