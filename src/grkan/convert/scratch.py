"""The initial weights of a model to train from scratch: which linear layers are drawn, and with which gain.

Let x, the input of an MLP of width d, have zero mean and unit variance per channel, as behind a norm, and let every
weight be drawn from N(0, gain / fan_in), with no bias. Then each channel of a layer's output is normal with the
variance gain * E[F(x)^2], and to preserve it takes gain = 1 / E[F(z)^2], z standard normal (arXiv 2409.10594, Eq. 20).

- The first linear layer has the identity in front, so its gain is 1 and u = W x is standard normal.
- The second one has F(u) in front, so its gain is alpha = 1 / E[F(z)^2]; 2.81 for Swish.
- In a gated MLP it has F(u) * v in front, where u and v, the outputs of gate and up, are drawn from N(0, 1 / d) and
  independent. E[F(u)^2 v^2] = E[F(u)^2] E[v^2] = E[F(u)^2], so gate and up have the gain 1 and down has the same alpha.
- Behind a norm the variance is 1 whatever was in front, and so is the gain.
"""

from typing import Any

from torch import nn

from ..nn.init import variance_gain
from ..nn.kinds import linear_width
from .recipe import FunctionRecipe, is_drawable
from .structure import Site


def gains(site: Site, act1: FunctionRecipe | None, act2: FunctionRecipe) -> list[tuple[nn.Module, float]]:
    """Return the linear layers around an activation with their gains; empty if it is not clear which they are.

    Args:
        site: an activation that becomes `act2`.
        act1: the function in front of its linear layer; None stands for the identity.
        act2: the function in place of the activation.
    """
    ahead, behind = _linear_layers(site)
    if behind is None or not all(is_drawable(module) for module in (*ahead, behind)):
        return []
    first = 1.0 if act1 is None else _gain(act1)
    second = 1.0 if _is_normed(site, ahead[0]) else _gain(act2)
    return [*((module, first) for module in ahead), (behind, second)]


def _gain(function: FunctionRecipe) -> float:
    return variance_gain(function.numerator, function.denominator, form=function.form)


def _linear_layers(site: Site) -> tuple[list[nn.Module], nn.Module | None]:
    """Return the linear layers that feed the activation or are multiplied by it, and the one behind it."""
    if site.first is not None and site.second is not None:
        return [site.first], site.second
    layers = [(child, sizes) for child in site.parent.children() if (sizes := linear_width(child)) is not None]
    width = site.width
    behind = [child for child, (inputs, outputs) in layers if inputs == width and outputs not in (width, 2 * width)]
    # If all have the same width, the last one is behind.
    second = next(iter(behind or [child for child, (inputs, _) in layers[::-1] if inputs == width]), None)
    ahead = [child for child, (_, outputs) in layers if child is not second and outputs in (width, 2 * width)]
    outputs = [(linear_width(child) or (0, 0))[1] for child in ahead]
    clear = len(behind) <= 1 and outputs in ([width], [2 * width], [width, width])
    return (ahead, second) if clear else ([], None)


def _is_normed(site: Site, first: nn.Module) -> bool:
    """Return whether a norm lies between the activation and the linear layer behind it."""
    inputs = (linear_width(first) or (0, 0))[0]
    norms: list[Any] = [child for child in site.parent.children() if "Norm" in type(child).__name__]
    weights = [getattr(norm, "weight", None) for norm in norms]
    return site.width != inputs and any(weight is not None and weight.shape == (site.width,) for weight in weights)
