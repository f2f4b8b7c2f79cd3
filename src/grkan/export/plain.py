"""Replace rational functions by plain PyTorch operations, for exporters that support only PyTorch's operators.

`rational/reference.py` also computes them in plain operations, but is correct for every finite x: it checks the largest
x, and uses float64 where float32 would overflow. An exported graph cannot branch like that, and would always use
float64.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import GrkanValueError
from ..nn import GroupRational
from ..rational.arguments import check_module


def plain(model: nn.Module) -> nn.Module:
    """Copy a model into plain float32 operations, so that traces and exports of the copy do not need grkan.

    Every `GroupRational` becomes Horner's method for P and Q (arXiv 2409.10594, Eq. 11 and 12) in multiplications,
    additions, an absolute value and a division, with a coefficient for every channel. It agrees with the model within
    1e-5, relative to the largest output, as long as |x| is at most 1e6 in front of every function of order (5, 4).
    Beyond that, powers of x leave float32's range: the result loses accuracy and finally becomes NaN, as for infinite
    x. No clipping hides that. Half types are widened to float32 and narrowed again.

    Args:
        model: any module with layers of grkan, as `kat_tiny_patch16_224` or a converted model. It is not changed.

    Returns:
        The copy, in eval mode with frozen parameters, for inference. (At a zero of the polynomial in Q its derivative
        differs from that of `grkan.group_rational`.)

    Raises:
        TypeError: model is not a module.
        ValueError: a rational function has hooks or its own forward, which the copy would lose.
    """
    copied = copy.deepcopy(check_module("model", model)).eval().requires_grad_(False)
    return replace_functions(copied, lambda _, act: PlainRational(act)).eval()


def replace_functions(model: nn.Module, make: Callable[[str, GroupRational], nn.Module]) -> nn.Module:
    """Replace every rational function of a model by make(name, function); shared functions stay shared.

    Returns:
        The model, or its replacement if it is a rational function itself.

    Raises:
        ValueError: a function has hooks or its own forward, which would be lost.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    if isinstance(model, GroupRational):
        _check_plain("it", model)
        return make("", model)
    for name, module in list(model.named_modules()):
        for slot, child in module._modules.items():
            if isinstance(child, GroupRational):
                if child not in replaced:
                    full = f"{name}.{slot}".lstrip(".")
                    _check_plain(full, child)
                    replaced[child] = make(full, child)
                module._modules[slot] = replaced[child]
    return model


def _check_plain(name: str, act: GroupRational) -> None:
    hooks = any(
        value for key, value in vars(act).items() if key.startswith(("_forward_", "_backward_")) and "hooks" in key
    )
    if hooks or "forward" in vars(act):
        raise GrkanValueError(
            "the rational functions of model must not have hooks or a forward of their own, because a plain copy loses "
            f"them; {name} has some"
        )


class PlainRational(nn.Module):
    """The current state of a `GroupRational` in plain float32 operations.

    Args:
        act: the function whose coefficients are copied. Leading ones that are zero in all groups are dropped, so that
            the identity is a multiplication and an addition.

    Shape:
        As for `act`.
    """

    def __init__(self, act: GroupRational) -> None:
        super().__init__()
        groups, width = act.num_groups, act.width
        numerator, denominator = (rows.detach().expand(groups, -1) for rows in act.coefficients())
        numerator, denominator = _trimmed(numerator, 1), _trimmed(denominator, 0)
        self.absolute, self.channel_dim = act.form == "sum_of_abs", act.channel_dim
        if self.absolute:
            denominator = denominator.abs()
        # One number per channel or, if the number of channels depends on the input, per group.
        self.groups = groups if width is None and groups > 1 else None
        repeats = 1 if width is None else width // groups
        for name, rows in (("a", numerator), ("b", denominator)):
            for i, column in enumerate(rows.float().repeat_interleave(repeats, dim=0).unbind(1)):
                self.register_buffer(f"{name}{i}", column.clone())
        self.terms = numerator.shape[1], denominator.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Compute F(x)."""
        dim = self.channel_dim
        if dim < 0:
            return self._evaluate(x, -dim - 1)
        if isinstance(x, Tensor):
            return self._evaluate(x, x.dim() - dim - 1)
        return self._evaluate(x.movedim(dim, -1), 0).movedim(-1, dim)  # torch.fx does not know the number of dimensions

    def _evaluate(self, x: Tensor, after: int) -> Tensor:
        """Compute F(x), with `after` dimensions after the channels."""
        z = x.float()
        if self.groups is not None:
            z, after = z.unflatten(-after - 1, (self.groups, -1)), after + 1
        y = self._polynomial("a", self.terms[0], z, after)
        if self.terms[1]:
            t = z.abs() if self.absolute else z
            inner = t * self._polynomial("b", self.terms[1], t, after)
            y = y / (1.0 + (inner if self.absolute else inner.abs()))
        if self.groups is not None:
            y = y.flatten(-after - 1, -after)
        return y.to(x.dtype)

    def _polynomial(self, name: str, terms: int, x: Tensor, after: int) -> Tensor:
        """Evaluate a polynomial by Horner's method; coefficients broadcast over the dimensions after the channels."""
        *others, value = (getattr(self, f"{name}{i}").view(-1, *(1,) * after) for i in range(terms))
        if not others:
            return value + 0.0 * x
        for coefficient in reversed(others):
            value = value * x + coefficient
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> "PlainRational":
        """Keep the coefficients in float32, as `GroupRational` does."""
        return super()._apply(lambda t: t.to(fn(t).device), recurse)


def _trimmed(rows: Tensor, least: int) -> Tensor:
    """Drop the highest powers that are zero in all groups, down to `least` columns."""
    used = (rows != 0).any(dim=0).nonzero()
    return rows[:, : max(int(used.max()) + 1 if len(used) else 0, least)]
