"""Find the MLPs of a model: a linear layer, an activation, a linear layer.

They are found by structure. An activation is whatever maps every scalar alone, which is tried out; the linear layers
are those around it whose widths match. What that suggests is tried out, too, where a module can be run by itself, and
with calibration data once more.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import GRKAN, GroupRational, RationalLinear
from ..nn.kinds import linear_kind, linear_width
from ..nn.modes import evaluating
from ..rational import table
from .recipe import TIMM_ORDER


@dataclass
class Activation:
    """An elementwise function."""

    name: str
    """One of `grkan.fit`'s if it is that function, else that of its class."""
    function: Callable[[Tensor], Tensor]
    """On float64 tensors on the CPU; pure."""


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
    norms: list[nn.Module] = field(default_factory=list)
    """The norms that may stand in front of the first linear layer."""

    @property
    def modules(self) -> list[str]:
        """The names of the parts that are there."""
        return [name for name in self.parts.values() if name is not None]

    def keep_linear(self) -> None:
        """Leave the first linear layer alone, for the activation is no part of an MLP that is known well enough."""
        self.layout, self.parts = "activation", {"act": self.parts["act"]}


class _NotFoundError(Exception):
    """Why an activation is left as it is."""


def find_sites(model: nn.Module) -> tuple[list[Site], list[tuple[str, str]]]:
    """The MLPs of a model in the order of its modules, and the (name, reason) of every activation that is in none."""
    sites: list[Site] = []
    skipped: list[tuple[str, str]] = []
    finder = _Finder(model)
    activations: set[nn.Module | None] = set()
    for name, parent in model.named_modules():
        # What an activation is made of is none of its own.
        if isinstance(parent, (GRKAN, GroupRational, RationalLinear)) or parent in activations:
            continue
        for slot, activation in _activations(parent):
            activations.add(parent._modules.get(slot))
            full = f"{name}.{slot}" if name else slot
            try:
                sites.append(finder.site(name, parent, slot, activation))
            except _NotFoundError as reason:
                skipped.append((full, f"{activation.name}: {reason}"))
    used = Counter(id(site.first) for site in sites if site.layout == "linear")
    for site in sites:
        # A linear layer with several places in the model cannot have one function in front of it.
        if site.layout == "linear" and (used[id(site.first)] > 1 or finder.places[id(site.first)] > 1):
            site.keep_linear()
    return sites, skipped


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


def _activations(parent: nn.Module) -> Iterator[tuple[str, Activation]]:
    """The attributes of a module that are elementwise functions: children, and functions with "act" in their name."""
    for slot, child in parent._modules.items():
        if child is not None and not isinstance(child, GroupRational) and (found := as_activation(child)) is not None:
            yield slot, found
    for slot, value in list(vars(parent).items()):  # whoever asks replaces some meanwhile
        if "act" in slot.lower() and callable(value) and not isinstance(value, (type, nn.Module)):
            found = as_activation(value)
            if found is not None:
                yield slot, found


def as_activation(candidate: Any) -> Activation | None:
    """What a module without parameters, or a function, is as an activation; None if it is none.

    It is tried on a few numbers: it has to map each of them alone, to something else than itself.
    """
    if isinstance(candidate, nn.Module):
        if any(True for _ in candidate.children()) or candidate._parameters or candidate._buffers:
            return None
        run, label = candidate.forward, type(candidate).__name__
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
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point() or torch.equal(x, y):
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
    return Activation(name, function)


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        children = (child for module in model.modules() for child in module._modules.values())
        self.places = Counter(map(id, children))

    def site(self, name: str, parent: nn.Module, slot: str, activation: Activation) -> Site:
        for find in (self.as_grkan, self.around, self.in_next_module):
            found = find(name, parent, slot, activation)
            if found is not None:
                found.norms = self.norms_before(found)
                return found
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
            raise _NotFoundError(f"several pairs of linear layers could belong to it: {', '.join(keys)}")
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
        site = Site(name, "activation", parts, parent, slot, activation, first, second, second.in_channels, 1)
        _follows(site)
        return site

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
        if act is None and not _follows(site):
            site.keep_linear()
        return site

    def gate(
        self, name: str, parent: nn.Module, slot: str, activation: Activation, first: str | None, width: int
    ) -> Site:
        parts: dict[str, str | None] = {"act": _join(name, slot)}
        module = None if first is None else parent._modules[first]
        return Site(name, "activation", parts, parent, slot, activation, module, None, width)

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


def _follows(site: Site) -> bool:
    """Whether the input of the second linear layer is the output of the activation; true where it cannot be tried.

    Raises:
        _NotFoundError: the activation gets inputs of another width, too.
    """
    inputs = (linear_width(site.first) or (0, 0))[0]
    x = _probe(site.first, (1, 2, inputs) if site.channel_dim == -1 else (1, inputs, 3, 2))
    if x is None:
        return True
    seen: list[Tensor] = []
    watched = Watched(site, seen.append)
    with contextlib.suppress(Exception), evaluating(site.parent), watched:  # it may need more arguments
        site.parent(x)
    if any(x.dim() < -site.channel_dim or x.shape[site.channel_dim] != site.width for x in seen):
        raise _NotFoundError(f"it is used for inputs of other shapes, too: {tuple(seen[-1].shape)}")
    return watched.agrees is not False


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
            self.record(x)
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
