"""The rational function as a module."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.compiler import is_compiling

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
from .init import assign_, fitted, has_no_values, is_sharded
from .kinds import ORIGINAL_FORWARDS

_COEFFICIENTS = ("numerator", "denominator")

# Bytes of the text that says what the coefficients in a state dict mean. The length is fixed, so shapes always match.
_EXTRA_STATE_BYTES = 64
_NARROW = (torch.bfloat16, torch.float16)


class GroupRational(nn.Module):
    """A learnable rational function F = P / Q for each group of channels: `grkan.group_rational` as a module.

    The coefficients are float32 or wider and stay so: `.half()`, `.bfloat16()` and `.to(torch.bfloat16)` do not change
    their dtype, because updates of a coefficient are too small for 8 or 11 bits.

    Args:
        num_groups: G, the number of groups; it divides the channels of every input.
        init: the initial F: a name of `grkan.fit` ("identity", "gelu", "silu" = "swish", ...); a callable on numpy
            arrays or tensors; a `RationalFit` of this order and form; or (numerator, denominator), each 1-D for all
            groups alike or 2-D with a row for each group.
        order: (m, n), the degrees of P and Q.
        form: "abs_of_sum" or "sum_of_abs", see `grkan.group_rational`.
        share_numerator: one numerator for all groups, as in the released weights.
        channel_dim: the dimension of the input that holds the channels.
        device, dtype: of the coefficients; a dtype narrower than float32 gives float32.

    Attributes:
        numerator: the parameter, 1-D: a_0 to a_m of the first group, then of the next; of one group if shared. It is
            a vector, like a bias, so rules that go by the number of dimensions (weight decay, Muon) treat it correctly.
        denominator: the parameter, 1-D: b_1 to b_n of the first group, then of the next.
        width: the number of channels of every input, if a layer around the function knows it; else None.

    Raises:
        TypeError, ValueError: an argument has a wrong type, or a value that does not fit the others.
        ImportError: `init` needs a fit, and SciPy is missing. Names at the orders (5, 4) and (7, 6) need no fit.

    Shape:
        Any shape with the channels in `channel_dim`; the output has the shape and dtype of the input. A nested tensor
        gives a nested tensor; its channels are counted from the last dimension.
    """

    width: int | None

    groups_are_local = False
    """Whether the coefficients are DTensors, and a plain input uses this rank's own; see `grkan.GroupParallel`."""

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
        # Keep plain numbers: tensors would follow a default device, and lose their values under `torch.device("meta")`.
        self._initial = _initial_coefficients(init, self.order, form, rows, self.num_groups)
        m, n = self.order
        self.numerator = nn.Parameter(torch.empty(rows * (m + 1), device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.empty(self.num_groups * n, device=device, dtype=dtype))
        self.reset_parameters()

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return views of the parameters as `grkan.group_rational` takes them: (G or 1, m + 1) and (G, n)."""
        m, n = self.order
        numerator, denominator = self.numerator, self.denominator
        # Do not assert the number of rows: a shard of the groups has fewer.
        return numerator.view(-1, m + 1), denominator.view(-1, n) if n > 0 else denominator.view(self.num_groups, 0)

    def initial_coefficients(self) -> tuple[Tensor, Tensor]:
        """Return the coefficients of `init`, not the learned or loaded ones: shaped as `coefficients`, float64, CPU."""
        numerator, denominator = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in self._initial)
        return numerator, denominator

    def reset_parameters(self) -> None:
        """Set the coefficients to their initial values."""
        for parameter, rows in zip((self.numerator, self.denominator), self.initial_coefficients(), strict=True):
            assign_(parameter, rows.flatten())

    def init_weights(self) -> None:
        """Alias of `reset_parameters`, the name that timm calls."""
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Compute F(x)."""
        if torch.jit.is_scripting():
            numerator, denominator = self.coefficients()
            return torch.ops.grkan.group_rational(x, numerator, denominator, self.form, self.channel_dim)
        else:  # without the else TorchScript would compile this, too
            numerator, denominator = self.vectors_for(x)
            return group_rational_of_vectors(
                x,
                numerator,
                denominator,
                self.order,
                self.form,
                self.channel_dim,
                self.num_groups,
                self.group_width(),
            )

    def vectors_for(self, x: Any) -> tuple[Tensor, Tensor]:
        """Return the parameters; if they are DTensors and x is a plain tensor, return this rank's own groups."""
        numerator, denominator = self.numerator, self.denominator
        if isinstance(numerator, Tensor) and numerator.dtype in _NARROW and not is_compiling():  # not a tracer's proxy
            _warn_of_narrow(numerator.dtype)
        if not self.groups_are_local or not isinstance(x, Tensor) or is_sharded(x):
            return numerator, denominator
        from torch.distributed.tensor import Partial

        local = []
        for parameter in (numerator, denominator):
            sharded: Any = parameter
            # The gradient of a numerator that all ranks share is the sum over the ranks.
            whole = all(placement.is_replicate() for placement in sharded.placements)
            local.append(sharded.to_local(grad_placements=[Partial()] if whole else None))
        numerator, denominator = local
        return numerator, denominator

    def group_width(self) -> int | None:
        """Return the number of channels of a group, or None if it is unknown."""
        if self.width is None:
            return None
        if self.share_numerator and self.order[1] == 0:  # there is one group for all channels
            return None if self.groups_are_local else self.width
        return self.width // self.num_groups

    def to_function(self, group: int) -> Callable[[Any], Any]:
        """Return one group's current F as a plain function in float64: a float gives a float, a numpy array an array.

        Raises:
            TypeError: group is not an int.
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
        """Return the arguments that define what the module computes."""
        text = f"num_groups={self.num_groups}, order={self.order}, init={self.init_name}, form={self.form}"
        if self.share_numerator:
            text += ", share_numerator=True"
        if self.channel_dim != -1:
            text += f", channel_dim={self.channel_dim}"
        return text

    def get_extra_state(self) -> Tensor:
        """Return what the coefficients of a state dict mean: form, groups and order, as text in an int32 tensor.

        It is a tensor because savers, averages and sharders can handle tensors, and of a dtype that holds the sum of
        many state dicts. It is made anew, not a buffer, because `to_empty` leaves buffers uninitialised. It is on the
        device of the coefficients.
        """
        text = self._meaning().ljust(_EXTRA_STATE_BYTES).encode()
        return torch.tensor(list(text), dtype=torch.int32, device=self.numerator.device)

    def set_extra_state(self, state: Any) -> None:
        """Check that a state dict has the form, groups and order of this module.

        Raises:
            ValueError: the state dict has others.
        """
        if problem := self._contradiction(state):
            raise GrkanValueError(problem)

    def _meaning(self) -> str:
        return f"form {self.form}, groups {self.num_groups}, order {self.order}"

    def _contradiction(self, state: Any) -> str | None:
        if isinstance(state, Tensor) and has_no_values(state):
            return None
        try:
            # Casting a state dict also casts this; half types hold every byte exactly. A weighted mean rounds.
            said = bytes(map(round, state.tolist())).decode().rstrip()
        except (AttributeError, TypeError, ValueError, OverflowError):
            return f"the extra state of a rational function must be an integer tensor of grkan's; got {state!r}"
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
        """Refuse coefficients of another function; also accept the released weight_numerator and weight_denominator."""
        extra = f"{prefix}_extra_state"
        released = {name: state_dict.pop(f"{prefix}weight_{name}", None) for name in _COEFFICIENTS}
        given = {prefix + name for name in _COEFFICIENTS} & state_dict.keys()
        problems = []
        if extra in state_dict and (problem := self._contradiction(state_dict[extra])):
            problems.append(f"{prefix}numerator: {problem}")
        shapes = [rows.shape for rows in self.coefficients()]  # views would stop torch.utils.swap_tensors
        for (name, value), shape in zip(released.items(), shapes, strict=True):
            if value is None:
                continue
            if self.form != "sum_of_abs":
                problems.append(f"{prefix}weight_{name} is for the form 'sum_of_abs'; the model has {self.form!r}")
            elif value.dim() != 2 or value.shape[1] != shape[1] or len(value) not in (1, shape[0]):
                problems.append(f"{prefix}weight_{name} has shape {tuple(value.shape)} instead of {tuple(shape)}")
            else:
                state_dict[prefix + name] = value.expand(shape).flatten()
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
        if extra in missing_keys and not given:  # released weights, and models before their conversion, have none
            missing_keys.remove(extra)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GroupRational":
        def wide(t: Tensor) -> Tensor:
            result = fn(t)
            narrow = t.is_floating_point() and result.is_floating_point() and result.itemsize < 4
            return t.to(result.device) if narrow else result

        return super()._apply(wide, recurse)


@functools.cache  # once
def _warn_of_narrow(dtype: torch.dtype) -> None:
    warnings.warn(
        f"the coefficients of a rational function are {str(dtype).removeprefix('torch.')} here, as the mixed precision "
        "of FSDP casts parameters, so F is less accurate. With FSDP2 use grkan.parallel.shard_; with FSDP1 add "
        "grkan.GroupRational to MixedPrecision's _module_classes_to_ignore",
        RuntimeWarning,
        stacklevel=2,
    )


ORIGINAL_FORWARDS[GroupRational] = GroupRational.forward


@unset_fake_temporarily()
def _initial_coefficients(
    init: Any, order: tuple[int, int], form: str, numerator_rows: int, denominator_rows: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Return the rows of numerator and denominator that `init` specifies."""
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
    except (TypeError, ValueError) as error:  # whose message says "target", not "init"
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
