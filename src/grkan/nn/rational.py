"""Modules around the rational function: alone, and in front of a linear layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrkanTypeError, GrkanValueError
from ..rational import reference, table
from ..rational.arguments import (
    check_flag,
    check_form,
    check_groups,
    check_integer,
    check_module,
    check_order,
    check_positive,
    to_float64,
)
from ..rational.op import group_rational, rational_linear
from .init import init_linear_, is_fit, variance_gain


class GroupRational(nn.Module):
    """A learnable rational function F = P / Q for every group of channels, `grkan.group_rational` as a module.

    The coefficients are float32 or wider and stay so: `.half()`, `.bfloat16()` and `.to(torch.bfloat16)` leave their
    dtype alone, because an update of a coefficient is smaller than what 8 or 11 bits can hold.

    Args:
        num_groups: G, the number of groups; it divides the channels of every input.
        init: what F is at the start: a name of `grkan.fit` ("identity", "gelu", "silu" = "swish", ...); a callable on
            numpy arrays or tensors; a `RationalFit` of this order and form; or (numerator, denominator), each 1-D for
            all groups alike or 2-D with a row for each group.
        order: (m, n), the degrees of P and Q.
        form: "abs_of_sum" or "sum_of_abs", see `grkan.group_rational`.
        share_numerator: one numerator for all groups, as in the released weights.
        channel_dim: the dimension of the input that holds the channels.
        device, dtype: of the coefficients; a dtype narrower than float32 gives float32.

    Attributes:
        numerator: (G, m + 1), or (1, m + 1) if shared; a_0 first.
        denominator: (G, n); b_1 first.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, or has a value that does not fit the others.
        ImportError: `init` needs a fit, and SciPy is missing: the orders (5, 4) and (7, 6) of a name need none.

    Shape:
        Any shape with the channels in `channel_dim`; the output has the shape and dtype of the input.
    """

    def __init__(
        self,
        num_groups: int = 8,
        init: Any = "swish",
        order: tuple[int, int] = (5, 4),
        form: str = "abs_of_sum",
        share_numerator: bool = False,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups = check_positive("num_groups", num_groups)
        self.order = check_order(order)
        self.form = check_form(form)
        self.channel_dim = check_integer("channel_dim", channel_dim)
        self.share_numerator = check_flag("share_numerator", share_numerator)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise GrkanTypeError(f"dtype must be a floating dtype; got {dtype}")
        dtype = torch.promote_types(dtype, torch.float32)
        self.init_name = init if isinstance(init, str) else getattr(init, "__name__", type(init).__name__)
        rows = 1 if self.share_numerator else self.num_groups
        # Plain numbers: tensors would follow a default device, and so be lost under `torch.device("meta")`.
        self._initial = _initial_coefficients(init, self.order, form, rows, self.num_groups)
        m, n = self.order
        self.numerator = nn.Parameter(torch.empty(rows, m + 1, device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.empty(self.num_groups, n, device=device, dtype=dtype))
        self.reset_parameters()

    def initial_coefficients(self) -> tuple[Tensor, Tensor]:
        """The numerator and denominator of `init`, whatever was learned or loaded since: float64, on the CPU."""
        numerator, denominator = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in self._initial)
        return numerator, denominator

    def reset_parameters(self) -> None:
        """Set the coefficients to their initial values."""
        numerator, denominator = self.initial_coefficients()
        with torch.no_grad():
            self.numerator.copy_(numerator)
            self.denominator.copy_(denominator)

    def forward(self, x: Tensor) -> Tensor:
        """F(x)."""
        return group_rational(x, self.numerator, self.denominator, form=self.form, channel_dim=self.channel_dim)

    def to_function(self, group: int) -> Callable[[Any], Any]:
        """One group's F as it is now, as a plain function in float64: a float gives a float, a numpy array an array.

        Raises:
            TypeError: group is no int.
            ValueError: there is no such group.
        """
        group = check_integer("group", group)
        if not 0 <= group < self.num_groups:
            raise GrkanValueError(f"group must lie in [0, {self.num_groups - 1}]; got {group}")
        numerator, denominator = (
            rows[group : group + 1] if len(rows) > 1 else rows.clone()
            for rows in (c.detach().to("cpu", torch.float64, copy=True) for c in (self.numerator, self.denominator))
        )
        form = self.form

        def function(x: Any) -> Any:
            values = torch.as_tensor(x, dtype=torch.float64, device="cpu")
            y = reference.rational(values.reshape(1, -1), numerator, denominator, form).reshape(values.shape)
            return y.item() if y.dim() == 0 else y.numpy()

        return function

    def extra_repr(self) -> str:
        """The arguments that say what the module computes."""
        text = f"num_groups={self.num_groups}, order={self.order}, init={self.init_name}, form={self.form}"
        if self.share_numerator:
            text += ", share_numerator=True"
        if self.channel_dim != -1:
            text += f", channel_dim={self.channel_dim}"
        return text

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the released names, too: weight_numerator and weight_denominator."""
        for new in ("numerator", "denominator"):
            old = f"{prefix}weight_{new}"
            if old not in state_dict:
                continue
            if self.form != "sum_of_abs":
                errors = args[-1]
                errors.append(f"{old} is for the form 'sum_of_abs'; the model has {self.form!r}")
            value, own = state_dict.pop(old), getattr(self, new)
            fits = value.dim() == 2 and value.shape[1] == own.shape[1] and len(value) == 1
            state_dict[prefix + new] = value.expand_as(own) if fits else value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GroupRational":
        def wide(t: Tensor) -> Tensor:
            result = fn(t)
            narrow = t.is_floating_point() and result.is_floating_point() and result.itemsize < 4
            return t.to(result.device) if narrow else result

        return super()._apply(wide, recurse)


class RationalLinear(nn.Linear):
    """A rational function in front of a linear layer: y = F(x) W^T + b, by `grkan.rational_linear`.

    The start preserves the variance: b = 0 and W ~ N(0, alpha / in_features), alpha being the function's
    `grkan.variance_gain`. The function is the child `act`, whose coefficients are act.numerator and act.denominator.

    Args:
        in_features: channels of the input, a multiple of num_groups.
        out_features: channels of the output.
        bias: whether there is a b.
        num_groups, init, order, form, share_numerator: as for `GroupRational`.
        device, dtype: of the parameters; the coefficients are float32 or wider.

    Raises:
        TypeError, ValueError, ImportError: as for `GroupRational`.

    Shape:
        (..., in_features) to (..., out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        num_groups: int = 8,
        init: Any = "swish",
        order: tuple[int, int] = (5, 4),
        form: str = "abs_of_sum",
        share_numerator: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_groups("in_features", in_features, num_groups)
        check_positive("out_features", out_features)
        super().__init__(in_features, out_features, check_flag("bias", bias), device=device, dtype=dtype)
        self.act = GroupRational(num_groups, init, order, form, share_numerator, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the coefficients to their initial values, and draw a weight that preserves the variance."""
        if hasattr(self, "act"):  # nn.Linear's constructor calls this before there is one
            self.act.reset_parameters()
            init_linear_(self, initial_gain(self.act))

    def forward(self, x: Tensor) -> Tensor:
        """F(x) W^T + b."""
        act = self.act
        return rational_linear(x, act.numerator, act.denominator, self.weight, self.bias, form=act.form)


class RationalConv1D(RationalLinear):
    """`RationalLinear` for a weight that lies as (in_features, out_features), as in GPT-2's Conv1D."""

    def reset_parameters(self) -> None:
        """The same start as that of a `RationalLinear`."""
        super().reset_parameters()
        if hasattr(self, "act"):  # the variance depends on the number of inputs, which is no longer that of the columns
            with torch.no_grad():
                self.weight.mul_((self.weight.shape[1] / self.weight.shape[0]) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """F(x) W + b."""
        act = self.act
        return rational_linear(x, act.numerator, act.denominator, self.weight.T, self.bias, form=act.form)


def no_weight_decay(model: nn.Module) -> set[str]:
    """The full names of all rational coefficients in a model, for the parameter group without weight decay.

    Decay would pull every learned function towards zero. A module that occurs under several names is listed under all.

    Raises:
        TypeError: model is no module.
    """
    names = set()
    for prefix, module in check_module("model", model).named_modules(remove_duplicate=False):
        if isinstance(module, GroupRational):
            names |= {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)}
    return names


def initial_gain(act: GroupRational) -> float:
    """The gain of the initial function: not from the parameters, which hold no numbers on the meta device."""
    return variance_gain(*act.initial_coefficients(), form=act.form)


def _initial_coefficients(
    init: Any, order: tuple[int, int], form: str, numerator_rows: int, denominator_rows: int
) -> tuple[list[list[float]], list[list[float]]]:
    """The rows of numerator and denominator that `init` stands for."""
    m, n = order
    if isinstance(init, str):
        table.canonical_name(init, "init")
        try:
            init = table.coefficients(init, order, form)
        except table.NotInTableError:
            init = _fit(init, order, form)
    elif is_fit(init):
        if init.form != form:
            raise GrkanValueError(f"init must have the form of the module, {form!r}; got a fit of form {init.form!r}")
        init = init.numerator, init.denominator
    elif callable(init):
        init = _fit(init, order, form)
    if not isinstance(init, Sequence) or len(init) != 2:
        raise GrkanTypeError(
            f"init must be a name, a callable, a RationalFit or (numerator, denominator); got {init!r}"
        )
    return (
        _rows("numerator", init[0], m + 1, numerator_rows),
        _rows("denominator", init[1], n, denominator_rows),
    )


def _fit(init: Any, order: tuple[int, int], form: str) -> tuple[Any, Any]:
    from ..rational.fit import fit

    try:
        found = fit(init, order, form=form)
    except (TypeError, ValueError) as error:  # which calls it the target
        kind = GrkanTypeError if isinstance(error, TypeError) else GrkanValueError
        raise kind(f"init must be a function that can be fitted: {error}") from error
    return found.numerator, found.denominator


def _rows(name: str, values: Any, columns: int, rows: int) -> list[list[float]]:
    values = to_float64(f"the {name} of init", values)
    if (
        values.dim() not in (1, 2)
        or values.shape[-1] != columns
        or (values.dim() == 2 and len(values) not in (1, rows))
    ):
        raise GrkanValueError(
            f"the {name} of init must have shape ({columns},) or ({rows}, {columns}), from order and num_groups; "
            f"got {tuple(values.shape)}"
        )
    if not values.isfinite().all():
        raise GrkanValueError(f"the {name} of init must be finite; got {values.tolist()}")
    return values.expand(rows, columns).tolist()
