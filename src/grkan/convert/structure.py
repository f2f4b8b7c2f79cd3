"""Find the MLPs of a model: a linear layer, an activation, a linear layer.

They are found by structure, and by what a run of the model has shown, where there was one. An activation is whatever
maps every scalar alone, which is tried out; the linear layers are those around it whose widths match. What that
suggests is tried out, too, where a module can be run by itself, and with calibration data once more. Any other
activation of a feed-forward part becomes rational by itself, in its place.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import GRKAN, GroupRational, RationalLinear
from ..nn.kinds import linear_kind, linear_width
from ..nn.modes import evaluating
from ..rational import table
from . import observe
from .calls import CallRecipe, lift
from .observe import Observation, Seen
from .recipe import TIMM_ORDER

# They weight what others compute.
_GATES = ("sigmoid", "hardsigmoid", "softplus", "Hardsigmoid", "LogSigmoid", "logsigmoid", "hard_sigmoid")

# Modules of an activation that is made of some, as StarReLU is.
_MOST_PARTS = 8


@dataclass
class Activation:
    """An elementwise function."""

    name: str
    """One of `grkan.fit`'s if it is that function, else that of its class."""
    function: Callable[[Tensor], Tensor]
    """On float64 tensors on the CPU; pure."""
    channels: tuple[Callable[[Tensor], Tensor], ...] = ()
    """Those of all channels, where they have parameters of their own."""

    def of_group(self, group: int, groups: int) -> "Activation":
        """The function of a group of channels, which are alike."""
        return replace(self, function=self.channels[group * len(self.channels) // groups]) if self.channels else self

    def alike(self, groups: int) -> bool:
        """Whether the channels of each group have the same function."""
        if not self.channels:
            return True
        if len(self.channels) % groups:
            return False
        x = torch.linspace(-6.0, 6.0, 25, dtype=torch.float64, device="cpu")
        y = torch.stack([function(x) for function in self.channels]).reshape(groups, -1, len(x))
        return bool(((y - y[:, :1]).abs() <= 1e-3 * y.abs().amax((1, 2), keepdim=True)).all())


@dataclass
class Site:
    """An activation that can become rational, and the linear layers around it."""

    name: str
    layout: str
    """One of `convert.recipe.LAYOUTS`."""
    parts: dict[str, str | None]
    """Their full names in the model, by those of `GRKAN`'s, `act` for the activation."""
    parent: nn.Module
    slot: str
    """The attribute of the parent that is the activation."""
    activation: Activation
    first: nn.Module | None
    second: nn.Module | None
    width: int
    """Channels of the activation."""
    channel_dim: int = -1
    shared: bool = False
    """Whether its channels are not known, so that one function serves all; its width is 1 then."""
    call: CallRecipe | None = None
    """Of an activation that is a function in `forward`."""
    doubt: str = ""
    """Why it is no activation of a feed-forward part, unless the linear layers turn out to be next to it."""
    norms: list[nn.Module] = field(default_factory=list)
    """The norms that may stand in front of the first linear layer."""

    @property
    def modules(self) -> list[str]:
        """The names of the parts that are there."""
        return [name for name in self.parts.values() if name is not None]

    def keep_linear(self) -> None:
        """Leave the first linear layer alone, for the activation is no part of an MLP that is known well enough."""
        self.layout, self.parts = "activation", {"act": self.parts["act"]}

    def share(self) -> None:
        """Have one function for all channels."""
        self.keep_linear()
        self.shared, self.width, self.channel_dim = True, 1, -1

    def place(self, channels: tuple[int, int] | None, shapes: Sequence[tuple[int, ...]]) -> None:
        """Go by what a run has shown: (dimension, number) of the channels, if it is clear, and all shapes."""
        other = [s for s in shapes if s and (len(s) <= self.channel_dim or s[self.channel_dim] != self.width)]
        if self.layout == "activation" or other:
            self.keep_linear()
            if channels is None:
                self.share()
            else:
                self.shared, (self.channel_dim, self.width) = False, channels


class _NotFoundError(Exception):
    """Why an activation is left as it is."""


def find_sites(
    model: nn.Module, seen: Observation | None = None, include: Sequence[str] = (), undo: ExitStack | None = None
) -> tuple[list[Site], list[tuple[str, str]]]:
    """The activations that can become rational, in the order of the modules, and the (name, reason) of all others.

    Args:
        seen: what a run of the model has shown.
        include: patterns for names; what they name is converted whatever it is.
        undo: takes back what makes children of functions that `forward` calls.
    """
    finder = _Finder(model, seen, include)
    if seen is not None and undo is not None:
        finder.lift_calls(seen, undo)
    activations: set[nn.Module | None] = set()
    for name, parent in model.named_modules():
        # What an activation is made of is none of its own.
        if isinstance(parent, (GRKAN, GroupRational, RationalLinear)) or parent in activations:
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
        # A linear layer with several places in the model cannot have one function in front of it.
        if site.layout == "linear" and (used[id(site.first)] > 1 or finder.places[id(site.first)] > 1):
            site.keep_linear()
    return sites, finder.skipped


def choose(
    sites: list[Site], include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[Site], list[tuple[str, str]]]:
    """The sites whose name, or that of a part, matches one of `include` and none of `exclude`; and the others."""

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
    """The attributes of a module that are elementwise functions: children, and functions.

    Functions have "act" in their name, are PyTorch's, or are known to be called: of a module, `attributes` has these.
    """
    for slot, child in parent._modules.items():
        if child is not None and not isinstance(child, GroupRational) and (found := as_activation(child)) is not None:
            yield slot, found
    for slot, value in list(vars(parent).items()):  # whoever asks replaces some meanwhile
        if not callable(value) or isinstance(value, (type, nn.Module)):
            continue
        of_torch = str(getattr(value, "__module__", None)).startswith("torch")
        if "act" in slot.lower() or of_torch or (id(parent), slot) in attributes:
            found = as_activation(value)
            if found is not None:
                yield slot, found


def as_activation(candidate: Any) -> Activation | None:
    """What a module or a function is as an activation; None if it is none.

    It is tried on a few numbers: it has to map each of them alone, and not as a straight line. A module may have
    parameters, one of each for all channels or for every channel.
    """
    channels: tuple[Callable[[Tensor], Tensor], ...] = ()
    if isinstance(candidate, nn.Module):
        label = type(candidate).__name__
        if any(True for _ in candidate.children()) or candidate._parameters or candidate._buffers:
            if (parts := _of_parameters(candidate)) is None:
                return None
            candidate, channels = parts
        run = candidate.forward
    else:
        run, label = candidate, getattr(candidate, "__name__", type(candidate).__name__)

    def function(x: Tensor) -> Tensor:
        return run(x.clone())

    modes = candidate.training if isinstance(candidate, nn.Module) else None
    try:
        if modes:
            candidate.training = False
        with torch.no_grad():
            x = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64, device="cpu")
            y = function(x)
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
                return None
            if torch.allclose(y.diff(n=2), torch.zeros(1, dtype=y.dtype), atol=1e-9):  # a scale, or nothing at all
                return None
            square = function(x[:96].flip(0).reshape(2, 3, 4, 4))
            if square.shape != (2, 3, 4, 4) or not torch.allclose(square.flatten(), y[:96].flip(0), 1e-9, 1e-12):
                return None
            name = next((n for n in table.NAMES if torch.allclose(table.exact(n)(x), y, 1e-7, 1e-9)), label)
    except Exception:  # it wants another input, or anything else than one tensor
        return None
    finally:
        if modes:
            candidate.training = True
    return Activation(name, function, channels)


def _of_parameters(module: nn.Module) -> tuple[nn.Module, tuple[Callable[[Tensor], Tensor], ...]] | None:
    """A module with parameters as one for a single channel, and the functions of all channels if they differ in them.

    None: its parameters are not those of channels, or its parts are more than an activation's.
    """
    parts = list(module.modules())
    if len(parts) > _MOST_PARTS or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    if any(isinstance(part, (nn.Dropout, GroupRational)) or "Norm" in type(part).__name__ for part in parts):
        return None
    states = [*module.parameters(), *module.buffers()]
    if any(t.is_meta or max(t.shape, default=1) != t.numel() for t in states):
        return None
    sizes = {t.numel() for t in states if t.is_floating_point()} - {1}
    if len(sizes) > 1:
        return None
    try:
        whole = copy.deepcopy(module).requires_grad_(False).to("cpu", torch.float64).eval()
        if not sizes:
            return whole, ()
        width = next(iter(sizes))
        x = torch.linspace(-6.0, 6.0, 5, dtype=torch.float64, device="cpu")[:, None].repeat(1, width)
        y = whole(x.clone())
        if torch.allclose(y.diff(n=2, dim=0), torch.zeros(1, dtype=y.dtype), atol=1e-9):  # a scale, a norm
            return None
        ones = [_single(whole, channel) for channel in range(width)]
        x += torch.linspace(0.0, 1.0, width, dtype=torch.float64, device="cpu")
        alone = torch.stack([one(x[:, i].clone()) for i, one in enumerate(ones)], 1)
        if not torch.allclose(whole(x.clone()), alone, 1e-9, 1e-12):
            return None
    except Exception:  # whatever its forward does
        return None
    return ones[0], tuple(lambda x, one=one: one(x.clone()) for one in ones)


def _single(module: nn.Module, channel: int) -> nn.Module:
    """The module for one channel."""
    one = copy.deepcopy(module)
    for tensor in (*one.parameters(), *one.buffers()):
        if tensor.numel() > 1:
            tensor.data = tensor.data.flatten()[channel : channel + 1].clone()
    return one


class _Called(nn.Module):
    """A function that `forward` called, as a child."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function: Any = function

    def forward(self, x: Tensor) -> Any:
        """What the function does."""
        return self.function(x)


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
        """Whether the user asked for it."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.include)

    def lift_calls(self, seen: Observation, undo: ExitStack) -> None:
        """Make children of the functions that methods call, where these belong to a feed-forward part."""
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
                lift(place.owner, place.call, slot, _Called(place.function), undo)
            except ValueError as error:
                place.problem = str(error)
                continue
            self.lifted[id(place.owner), slot] = (place.call, place.label, places)

    def wanted(self, name: str, places: list[Seen], *names: str) -> bool:
        """Whether an activation is one of a feed-forward part, or the user asked for it."""
        return self.named(*names) or not (name in _GATES or observe.why_not(places))

    def add(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> None:
        """Add an activation to the sites, or to what is skipped."""
        full = _join(name, slot)
        call, label, places = self.lifted.get((id(parent), slot), (None, activation.name, []))
        if activation.name == _Called.__name__:
            activation.name = label
        if self.seen is not None and call is None:
            child = parent._modules.get(slot)
            places = self.seen.of_attribute(parent, slot) if child is None else self.seen.of_module(child, parent)
        site: Site | None = None
        reason = ""
        try:
            site = self.site(name, parent, slot, activation)
        except _NotFoundError as error:
            reason = str(error)
        if places:
            site = site or self.alone(name, parent, slot, activation)
            site.place(observe.channel_dim(places), [shape for seen in places for shape in seen.shapes])
            reason = observe.why_not(places)
        elif self.seen is not None and parent in self.seen.called:
            site, reason = None, "it is never called, though its module is"
        elif self.named(full, name):
            site = site or self.alone(name, parent, slot, activation)
        doubt = "" if self.named(full, name) else "a gate" if activation.name in _GATES else reason
        if site is not None and doubt and site.layout == "activation":
            site, reason = None, doubt
        if site is None:
            hint = "; to have it converted in place, name it in include" if places else ""
            self.skipped.append((full, f"{activation.name}: {reason}{hint}"))
            return
        site.call, site.doubt = call, doubt
        self.sites.append(site)

    def name_the_rest(self, activations: set[nn.Module | None]) -> None:
        """Name every other place at which an elementwise operation was seen."""
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
        if not place.problem and place.function is not None:
            activation = as_activation(place.function)
            if activation is None:
                return "it is part of what is no elementwise function of one tensor"
            gate = activation.name in _GATES or place.label in _GATES
            reason = "a gate" if gate else observe.why_not([place])
            if reason:
                return f"{reason}; to have it converted in place, name its module in include"
        reason = observe.why_not([place])
        return reason or f"{place.problem}; make it a child, such as self.act = nn.GELU(), to have it converted"

    def site(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site:
        for find in (self.as_grkan, self.around, self.in_next_module):
            found = find(name, parent, slot, activation)
            if found is not None:
                found.norms = self.norms_before(found)
                return found
        around = [child for child in parent.children() if linear_width(child) is not None]
        odd = sorted({type(child).__name__ for child in around if linear_kind(child) is None})
        if odd and not any(isinstance(child, nn.Conv2d) for child in around):
            raise _NotFoundError(f"the linear layers beside it are no plain ones, but {', '.join(odd)}")
        raise _NotFoundError("no two linear layers around it whose widths match")

    def as_grkan(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """A module that is nothing but fc1, act, drop1, norm, fc2, drop2: timm's Mlp."""
        if slot not in parent._modules or parent._parameters or parent._buffers or "forward" in vars(parent):
            return None
        parts = _in_timm_order(parent, slot)
        if parts is None:
            return None
        first, second = parent.get_submodule("fc1"), parent.get_submodule("fc2")
        inner, outer = linear_width(first), linear_width(second)
        if inner is None or outer is None or inner[1] != outer[0]:
            return None
        conv = isinstance(first, nn.Conv2d)
        if conv is not isinstance(second, nn.Conv2d) or not _computes(parent, parts, inner[0], conv):
            return None
        full = {part: None if child is None else _join(name, child) for part, child in parts.items()}
        return Site(name, "grkan", full, parent, slot, activation, first, second, outer[0], 1 if conv else -1)

    def around(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """The linear layers are children of the module that has the activation, too."""
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
            if twins and widths[a][0] != widths[a][1]:  # a gate: the activation of one is a factor of the other
                return self.gate(name, parent, slot, activation, a, widths[b][0])
        if len(keys) == 2 and widths[keys[0]][1] == 2 * widths[keys[1]][0]:
            return self.gate(name, parent, slot, activation, None, widths[keys[1]][0])
        if len(pairs) > 1:
            return self.alone(name, parent, slot, activation)
        if not pairs:
            return None
        return self.linear(name, parent, slot, activation, _join(name, pairs[0][0]), _join(name, pairs[0][1]))

    def in_sequential(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """A part of a Sequential; between the activation and the second linear layer are at most dropout and norms."""
        children = {k: c for k, c in parent._modules.items() if not isinstance(c, (nn.Dropout, nn.Identity))}
        keys = list(children)
        before = keys[: keys.index(slot)][-1:]
        behind = [key for key in keys[keys.index(slot) + 1 :] if not _is_norm(children[key])][:1]
        if any(linear_kind(children[key]) is None for key in before + behind) or not (before and behind):
            raise _NotFoundError("its neighbours are no plain linear layers")
        inner, outer = linear_width(children[before[0]]), linear_width(children[behind[0]])
        if inner is None or outer is None or inner[1] != outer[0]:
            raise _NotFoundError("the widths of the linear layers around it do not match")
        return self.linear(name, parent, slot, activation, _join(name, before[0]), _join(name, behind[0]))

    def in_convolutions(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site | None:
        """Two 1x1 convolutions and one activation, with norms and dropout: the activation alone becomes rational."""
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
        """The second linear layer is in the module behind: BERT's intermediate and output."""
        linears = [key for key, child in parent._modules.items() if linear_kind(child) is not None]
        if len(linears) != 1 or not name:
            return None
        if any(_is_norm(child) for child in parent.children()):
            raise _NotFoundError("a norm lies between it and the next linear layer")
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
                    raise _NotFoundError("a norm lies between it and the next linear layer")
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
        """What can be said of a site where no run has shown it."""
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
        """An activation between linear layers of which no more is known."""
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
        """Norms of the input's width in the nearest module around that has any.

        In the order in which they were made, the last one before the linear layer, or else all of them: BERT's, timm's
        and ViT's are made in the order in which they run, and those of PyTorch's encoder layer after all the rest.
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
    """A norm over the channels with a weight: LayerNorm, RMSNorm, and what others call so."""
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


def _probe(first: Any, shape: tuple[int, ...]) -> Tensor | None:
    """An input for a module that begins with `first`; None where there is nothing to compute with."""
    weight = getattr(first, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)  # the global one is the user's
    return torch.randn(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)


def _computes(parent: nn.Module, parts: dict[str, str | None], width: int, conv: bool) -> bool:
    """Whether the forward of a module is to run its parts in timm's order; true where it cannot be tried."""
    x = _probe(parent._modules["fc1"], (2, width, 3, 3) if conv else (2, 3, width))
    if x is None:
        return True
    with evaluating(parent):
        try:
            y = parent(x.clone())
            for key in parts.values():
                x = x if key is None else parent._modules[key](x)  # type: ignore[misc]
        except Exception:  # whatever the forward of another class wants
            return False
        return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(x, y, 1e-3, 1e-5)


def try_alone(site: Site, around: Sequence[nn.Module]) -> bool | None:
    """Run the modules around a site by themselves, until one of them calls the activation.

    Returns:
        Whether the input of the second linear layer is the output of the activation; None if nothing was seen.

    Raises:
        _NotFoundError: the activation gets inputs of another width, too.
    """
    inputs = (linear_width(site.first) or (0, 0))[0]
    for module in around:
        for shape in [(1, 2, inputs), (2, inputs)] if site.channel_dim == -1 else [(1, inputs, 3, 2)]:
            x = _probe(site.first, shape)
            if x is None:
                return None
            seen: list[Tensor] = []
            watched = Watched(site, seen.append)
            with contextlib.suppress(Exception), evaluating(module), watched:  # it may need more arguments
                module(x)
            if any(x.dim() < -site.channel_dim or x.shape[site.channel_dim] != site.width for x in seen):
                raise _NotFoundError(f"it is used for inputs of other shapes, too: {tuple(seen[-1].shape)}")
            if watched.calls and (site.second is None or watched.followed or watched.strangers):
                return watched.agrees
    return None


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    if x is y or x.numel() != y.numel():
        return x is y
    if x.is_nested or y.is_nested:
        return x.is_nested and y.is_nested and all(map(torch.equal, x.unbind(), y.unbind()))
    return torch.equal(x.reshape(-1), y.reshape(-1))


class Watched(nn.Module):
    """In place of an activation while it is entered: calls it, hands its input on, and sees where the output goes.

    Args:
        site: whose activation it replaces.
        record: gets every input.
    """

    def __init__(self, site: Site, record: Callable[[Tensor], object] = lambda _: None) -> None:
        super().__init__()
        self.site, self.record = site, record
        self.calls = self.followed = self.strangers = 0
        self.output: Tensor | None = None
        self.watching = True
        vars(self)["activation"] = getattr(site.parent, site.slot)  # no child: it belongs to the model

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What the activation does."""
        if isinstance(x, Tensor):
            self.record(x.reshape(-1, 1) if self.site.shared and not x.is_nested else x)
        y = vars(self)["activation"](x, *args, **kwargs)
        if self.watching:
            self.calls, self.output = self.calls + 1, y
        return y

    @property
    def agrees(self) -> bool | None:
        """Whether each output went to the second linear layer, and nothing else did; None if there was none."""
        return self.calls == self.followed and not self.strangers if self.calls else None

    def stop_watching(self) -> None:
        """Compare no more."""
        self.watching, self.output = False, None

    def compare(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook of the second linear layer."""
        if not self.watching:
            return
        x, y, self.output = inputs[0] if inputs else None, self.output, None
        same = isinstance(x, Tensor) and isinstance(y, Tensor) and _equal(x, y)
        self.followed += same
        self.strangers += not same

    def __enter__(self) -> "Watched":
        parent, slot = self.site.parent, self.site.slot
        self.in_children = slot in parent._modules
        vars(parent).pop(slot, None)
        parent._modules[slot] = self
        self.fast_path = getattr(parent, "activation_relu_or_gelu", None)
        if self.fast_path:  # on which PyTorch's encoder layer calls none of its parts
            parent.activation_relu_or_gelu = 0  # type: ignore[assignment]
        second = self.site.second
        self.hook = None if second is None else second.register_forward_pre_hook(self.compare)
        return self

    def __exit__(self, *_: object) -> None:
        parent, slot = self.site.parent, self.site.slot
        if self.in_children:
            parent._modules[slot] = vars(self)["activation"]
        else:
            del parent._modules[slot]
            vars(parent)[slot] = vars(self)["activation"]
        if self.fast_path:
            parent.activation_relu_or_gelu = self.fast_path
        if self.hook is not None:
            self.hook.remove()
