"""The rational function as a module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrkanTypeError, GrkanValueError
from ..rational import reference, table
from ..rational.arguments import (
    check_flag,
    check_form,
    check_integer,
    check_order,
    check_positive,
    to_float64,
)
from ..rational.op import group_rational_of_vectors
from .init import assign_, fitted, is_sharded

_COEFFICIENTS = ("numerator", "denominator")

# Bytes of the text that says what the coefficients in a state dict mean: of one length, so that shapes tell nothing.
_EXTRA_STATE_BYTES = 64


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
        numerator: the parameter, 1-D: a_0 to a_m of the first group, then of the next; of one group if shared. A
            vector, as biases are, so every rule by the number of dimensions (weight decay, Muon) is right for it.
        denominator: the parameter, 1-D: b_1 to b_n of the first group, then of the next.
        width: the channels of every input, where a layer around the function knows them; else None.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, or has a value that does not fit the others.
        ImportError: `init` needs a fit, and SciPy is missing: the orders (5, 4) and (7, 6) of a name need none.

    Shape:
        Any shape with the channels in `channel_dim`; the output has the shape and dtype of the input. A nested tensor
        gives a nested tensor; its channels are counted from the last dimension.
    """

    width: int | None

    groups_are_local = False
    """Whether the coefficients are DTensors of which a plain tensor meets its rank's own, see `grkan.GroupParallel`."""

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
        self.width = None
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise GrkanTypeError(f"dtype must be a floating dtype; got {dtype}")
        dtype = torch.promote_types(dtype, torch.float32)
        self.init_name = init if isinstance(init, str) else getattr(init, "__name__", type(init).__name__)
        rows = 1 if self.share_numerator else self.num_groups
        # Plain numbers: tensors would follow a default device, and so be lost under `torch.device("meta")`.
        self._initial = _initial_coefficients(init, self.order, form, rows, self.num_groups)
        m, n = self.order
        self.numerator = nn.Parameter(torch.empty(rows * (m + 1), device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.empty(self.num_groups * n, device=device, dtype=dtype))
        self.reset_parameters()

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """The parameters as `grkan.group_rational` takes them: (G or 1, m + 1) and (G, n), views."""
        m, n = self.order
        numerator, denominator = self.numerator, self.denominator
        return numerator.view(-1, m + 1), denominator.view(-1, n) if n else denominator.view(self.num_groups, 0)

    def initial_coefficients(self) -> tuple[Tensor, Tensor]:
        """The coefficients of `init`, whatever was learned or loaded since: as `coefficients`, float64, on the CPU."""
        numerator, denominator = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in self._initial)
        return numerator, denominator

    def reset_parameters(self) -> None:
        """Set the coefficients to their initial values."""
        for parameter, rows in zip((self.numerator, self.denominator), self.initial_coefficients(), strict=True):
            assign_(parameter, rows.flatten())

    def init_weights(self) -> None:
        """The same as `reset_parameters`, under the name that timm calls."""
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """F(x)."""
        numerator, denominator = self.vectors_for(x)
        return group_rational_of_vectors(
            x, numerator, denominator, self.order, self.form, self.channel_dim, self.group_width
        )

    @property
    def group_width(self) -> int | None:
        """The channels of a group, where `width` is known."""
        return None if self.width is None else self.width // self.num_groups

    def vectors_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numerator and the denominator that go with x: vectors, of this rank's groups if x is its local part."""
        numerator, denominator = self.numerator, self.denominator
        if self.groups_are_local and isinstance(x, Tensor) and not is_sharded(x):
            return _local(numerator), _local(denominator)
        return numerator, denominator

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
            rows[group if len(rows) > 1 else 0][None]
            for rows in (c.detach().to("cpu", torch.float64, copy=True) for c in self.coefficients())
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

    def get_extra_state(self) -> Tensor:
        """What the coefficients of a state dict mean: form, groups and order, as text in a uint8 tensor.

        A tensor, because that is what savers, averages and sharders can handle; made anew, and no buffer, because
        `to_empty` leaves garbage in those. It is where the coefficients are.
        """
        text = self._meaning().ljust(_EXTRA_STATE_BYTES).encode()
        return torch.tensor(list(text), dtype=torch.uint8, device=self.numerator.device)

    def set_extra_state(self, state: Any) -> None:
        """Raise if a state dict is of another form, of other groups or of another order.

        Raises:
            ValueError: it is.
        """
        if problem := self._contradiction(state):
            raise GrkanValueError(problem)

    def _meaning(self) -> str:
        return f"form {self.form}, groups {self.num_groups}, order {self.order}"

    def _contradiction(self, state: Any) -> str | None:
        if isinstance(state, Tensor) and state.is_meta:
            return None
        try:
            # Whoever casts a state dict casts this, too; half types hold every byte exactly.
            said = bytes(map(int, state.tolist())).decode().rstrip()
        except (AttributeError, TypeError, ValueError):
            return f"the extra state of a rational function must be a uint8 tensor of grkan's; got {state!r}"
        if said == self._meaning():
            return None
        return f"the coefficients are for {said}; the model has {self._meaning()}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse what means another function; take the released names, too: weight_numerator and weight_denominator."""
        extra = f"{prefix}_extra_state"
        released = {name: state_dict.pop(f"{prefix}weight_{name}", None) for name in _COEFFICIENTS}
        given = {prefix + name for name in _COEFFICIENTS} & state_dict.keys()
        problems = []
        if extra in state_dict and (problem := self._contradiction(state_dict[extra])):
            problems.append(f"{prefix}numerator: {problem}")
        for (name, value), own in zip(released.items(), self.coefficients(), strict=True):
            if value is None:
                continue
            if self.form != "sum_of_abs":
                problems.append(f"{prefix}weight_{name} is for the form 'sum_of_abs'; the model has {self.form!r}")
            elif value.dim() != 2 or value.shape[1] != own.shape[1] or len(value) not in (1, len(own)):
                problems.append(f"{prefix}weight_{name} has shape {tuple(value.shape)} instead of {tuple(own.shape)}")
            else:
                state_dict[prefix + name] = value.expand_as(own).flatten()
        if problems:
            error_msgs += problems
            return
        for name in _COEFFICIENTS:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4:
                state_dict[prefix + name] = value.float()  # with assign=True it would stay narrow
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if extra in missing_keys and not given:  # released weights, and a model from before its conversion, have none
            missing_keys.remove(extra)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GroupRational":
        def wide(t: Tensor) -> Tensor:
            result = fn(t)
            narrow = t.is_floating_point() and result.is_floating_point() and result.itemsize < 4
            return t.to(result.device) if narrow else result

        return super()._apply(wide, recurse)


def _local(parameter: Any) -> Tensor:
    """The part of a DTensor that this rank has; what all have, a shared numerator, gets its gradient from all ranks."""
    from torch.distributed.tensor import Partial

    whole = all(placement.is_replicate() for placement in parameter.placements)
    return parameter.to_local(grad_placements=[Partial()] if whole else None)


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
    elif (found := fitted(init)) is not None:
        if found[2] != form:
            raise GrkanValueError(f"init must have the form of the module, {form!r}; got a fit of form {found[2]!r}")
        init = found[:2]
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
