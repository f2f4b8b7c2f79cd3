"""The initial weights of a model to train from scratch: which linear layers are drawn, and with which gain.

Let x, the input of an MLP of width d, have zero mean and unit variance per channel, as behind a norm, and let every
weight be drawn from N(0, gain / fan_in), with no bias. Then each channel of a layer's output is normal with the
variance gain * E[F(x)^2]. The gain that preserves it is 1 / E[F(z)^2], z standard normal (arXiv 2409.10594, Eq. 20).

- The first linear layer has the identity in front, so its gain is 1 and u = W x is standard normal.
- The second one has F(u) in front, so its gain is alpha = 1 / E[F(z)^2]; 2.81 for Swish.
- In a gated MLP it has F(u) * v in front, where u and v, the outputs of gate and up, are drawn from N(0, 1 / d) and
  independent. E[F(u)^2 v^2] = E[F(u)^2] E[v^2] = E[F(u)^2], so gate and up have the gain 1 and down has the same alpha.
- Behind a norm the variance is 1 whatever was in front, and so is the gain.
- Each expert of a mixture is such an MLP, whether its weights are a module or a slice of a stacked parameter. The
  router's weighted sum over experts is not an MLP and is left as it is.
"""

from typing import Any

from torch import nn

from ..nn.init import variance_gain
from ..nn.kinds import linear_width
from .recipe import FunctionRecipe, is_drawable, is_stack
from .site import Site


def gains(site: Site, act1: FunctionRecipe | None, act2: FunctionRecipe) -> list[tuple[nn.Module, str, Any]]:
    """Return the weights around an activation with their gains; empty if it is not clear which they are.

    Args:
        site: an activation that becomes `act2`.
        act1: the function in front of its linear layer; None stands for the identity.
        act2: the function in place of the activation.

    Returns:
        For each linear layer (module, "", gain); for the stacked weights of experts (module, name of the parameter,
        [gain, dimension of the inputs]).
    """
    first = 1.0 if act1 is None else _gain(act1)
    if (stacks := _stacks(site)) is not None:
        inputs, ahead, behind = stacks
        return [
            *((site.parent, name, [first, inputs]) for name in ahead),
            (site.parent, behind, [_gain(act2), inputs]),
        ]
    layers = _linear_layers(site)
    if layers is None or not all(is_drawable(module) for module in (*layers[0], layers[1])):
        return []
    before, after = layers
    second = 1.0 if _is_normed(site.parent, before[0], after) else _gain(act2)
    return [*((module, "", first) for module in before), (after, "", second)]


def _gain(function: FunctionRecipe) -> float:
    return variance_gain(function.numerator, function.denominator, form=function.form)


def _linear_layers(site: Site) -> tuple[list[nn.Module], nn.Module] | None:
    """Return the linear layers that feed the activation or are multiplied by it, and the one behind it."""
    if site.first is not None and site.second is not None:
        return [site.first], site.second
    layers = [(child, sizes) for child in site.parent.children() if (sizes := linear_width(child)) is not None]
    if not site.shared:
        return _around(layers, site.width)
    # Its channels are unknown. Assume that the layers in front are created first.
    order = [child for child, _ in layers]
    widths = {inputs for _, (inputs, _) in layers}
    found = [pair for width in widths if (pair := _around(layers, width)) is not None]
    found = [(ahead, behind) for ahead, behind in found if order.index(ahead[0]) < order.index(behind)]
    return found[0] if len(found) == 1 else None


def _around(layers: list[tuple[Any, tuple[int, int]]], width: int) -> tuple[list[Any], Any] | None:
    """Return the layers around an activation with this number of channels; None if there are several choices.

    Args:
        layers: each with its (inputs, outputs).
    """
    behind = [layer for layer, (inputs, outputs) in layers if inputs == width and outputs not in (width, 2 * width)]
    # If all have the same width, the last one is behind.
    second = next(iter(behind or [layer for layer, (inputs, _) in layers[::-1] if inputs == width]), None)
    ahead = [
        (layer, outputs) for layer, (_, outputs) in layers if layer is not second and outputs in (width, 2 * width)
    ]
    clear = len(behind) <= 1 and [outputs for _, outputs in ahead] in ([width], [2 * width], [width, width])
    return ([layer for layer, _ in ahead], second) if clear and second is not None else None


def _stacks(site: Site) -> tuple[int, list[str], str] | None:
    """Return the stacked weights around an activation: the dimension of the inputs, those in front, the one behind.

    A weight is (experts, inputs, outputs) or (experts, outputs, inputs): as `is_transposed` of transformers' experts
    says, or else as the number of channels implies.
    """
    stacks = [(name, p) for name, p in site.parent.named_parameters(recurse=False) if is_stack(p)]
    shapes = [(name, (p.shape[1], p.shape[2])) for name, p in stacks]
    if site.shared or not shapes:
        return None
    transposed = getattr(site.parent, "is_transposed", None)
    found = []
    for inputs in (1, 2) if transposed is None else (1 if transposed else 2,):
        layers = [(name, (a, b) if inputs == 1 else (b, a)) for name, (a, b) in shapes]
        pair = _around(layers, site.width)
        sizes = dict(layers)
        if pair is not None and all(sizes[name][0] == sizes[pair[1]][1] for name in pair[0]):
            found.append((inputs, *pair))
    return found[0] if len(found) == 1 else None


def _is_normed(parent: nn.Module, first: nn.Module, second: nn.Module) -> bool:
    """Return whether a norm lies between the activation and the linear layer behind it."""
    inputs, hidden = ((linear_width(layer) or (0, 0))[0] for layer in (first, second))
    norms: list[Any] = [child for child in parent.children() if "Norm" in type(child).__name__]
    weights = [getattr(norm, "weight", None) for norm in norms]
    return hidden != inputs and any(weight is not None and weight.shape == (hidden,) for weight in weights)
