"""A linear layer with a rational function in front of it."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from ..errors import GrkanTypeError, GrkanValueError
from ..rational.arguments import check_flag, check_groups, check_positive
from ..rational.op import rational_linear_of_vectors
from .init import initial_gain, remember_start
from .kinds import is_conv1d, is_plain, linear_kind, linear_width
from .rational import GroupRational

_PLAIN = (Tensor, nn.Parameter)
# The attributes that other code reads and sets on a linear layer.
_OF_THE_LINEAR_LAYER = ("weight", "bias", "in_features", "out_features")


class _NoticedHooks(OrderedDict[int, Any]):
    """The hooks of a module, with a length that is one too large.

    It keeps PyTorch's encoder layer off its fast path, which takes the weights of its children without calling them.
    The encoder layer avoids that path if `len` finds a hook. A hook that does nothing would work, but costs 1.6 us a
    call.
    """

    def __len__(self) -> int:
        return super().__len__() + 1

    def __bool__(self) -> bool:
        return super().__len__() > 0


class RationalLinear(nn.Module):
    """A rational function in front of a linear layer: y = F(x) W^T + b, by `grkan.rational_linear`.

    The children are `act`, a `GroupRational`, and `linear`, a plain `nn.Linear`; changes to either take effect. The
    class is not an `nn.Linear`, because other code would then take it for x -> W x + b. But its dtype, device and sizes
    can be read and set as on a linear layer: weight, bias, in_features and out_features are those of `linear`. Do not
    put it in place of a layer whose weight its model passes to `F.linear`: F would be left out. `nn.MultiheadAttention`
    does so, and refuses it.

    The initial weights preserve the variance: b = 0 and W ~ N(0, alpha / in_features), where alpha is the function's
    `grkan.variance_gain`. A state dict may have weight and bias instead of linear.weight and linear.bias, like one of a
    model before its conversion.

    Args:
        in_features: channels of the input, a multiple of num_groups.
        out_features: channels of the output.
        bias: whether the linear layer has a bias b.
        num_groups, init, order, form, share_numerator: as for `GroupRational`.
        device, dtype: of the parameters; the coefficients are float32 or wider.

    Raises:
        TypeError, ValueError, ImportError: as for `GroupRational`.

    Shape:
        (..., in_features) to (..., out_features).
    """

    if TYPE_CHECKING:  # TorchScript would take these annotations for interface types
        act: GroupRational
        linear: nn.Module

    __jit_unused_properties__ = _OF_THE_LINEAR_LAYER

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
        super().__init__()
        check_groups("in_features", in_features, num_groups)
        check_positive("out_features", out_features)
        act = GroupRational(num_groups, init, order, form, share_numerator, device=device, dtype=dtype)
        self._hold(act, nn.Linear(in_features, out_features, check_flag("bias", bias), device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def around(cls, act: GroupRational, linear: nn.Module) -> "RationalLinear":
        """Put a function in front of an existing linear layer, which keeps its weights.

        Args:
            act: a function whose groups divide the inputs of the layer, which are the last dimension.
            linear: an `nn.Linear`, or transformers' Conv1D.

        Raises:
            ValueError: the function is also that of a layer with another number of inputs.
        """
        inputs = (linear_width(linear) or (0, 0))[0]
        if act.width not in (None, inputs):
            raise GrkanValueError(
                f"act must be a function for the {inputs} inputs of the linear layer; got one that belongs to a layer "
                f"with {act.width} channels"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._hold(act, linear)
        return self.train(linear.training)

    def _hold(self, act: GroupRational, linear: nn.Module) -> None:
        self.act, self.linear = act, linear
        act.width = self.in_features
        self._remember_start()
        self._forward_pre_hooks = _NoticedHooks()

    def _remember_start(self) -> None:
        if linear_kind(self.linear) is not None:
            remember_start(self.linear, initial_gain(self.act))

    def reset_parameters(self) -> None:
        """Set the coefficients to their initial values, and draw a weight that preserves the variance."""
        self._remember_start()
        for child in (self.act, self.linear):
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()

    def init_weights(self) -> None:
        """Alias of `reset_parameters`, the name that timm calls."""
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Compute F(x) W^T + b."""
        if torch.jit.is_scripting():
            return self.linear(self.act(x))
        else:  # without the else TorchScript would compile this, too
            return rational_then_linear(self.act, self.linear, x)

    @property
    def weight(self) -> Any:
        """The weight of `linear`. It does not contain F."""
        return self.linear.weight

    @property
    def bias(self) -> Any:
        """The bias of `linear`, or None."""
        return self.linear.bias

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return (linear_width(self.linear) or (0, 0))[0]

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return (linear_width(self.linear) or (0, 0))[1]

    def __setattr__(self, name: str, value: Any) -> None:
        # A property's setter would not work: nn.Module registers a Parameter without calling the setter.
        if name in _OF_THE_LINEAR_LAYER:
            setattr(self.linear, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept the names of a linear layer without a function in front: weight and bias."""
        for name in ("weight", "bias"):
            inner = f"{prefix}linear.{name}"
            if prefix + name in state_dict and inner not in state_dict:
                state_dict[inner] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _refuse_attention(module: nn.Module, name: str, child: Any) -> None:
    """Raise if PyTorch's attention gets a RationalLinear: it computes with the weights of its parts, without F."""
    if isinstance(child, RationalLinear) and type(module).forward is nn.MultiheadAttention.forward:
        raise GrkanTypeError(
            f"{name} of nn.MultiheadAttention must stay a linear layer; got a RationalLinear, whose function the "
            "attention would leave out, because it takes the weight and does not call the layer"
        )


nn.modules.module.register_module_module_registration_hook(_refuse_attention)


def rational_then_linear(act: Any, linear: Any, x: Tensor) -> Tensor:
    """Compute linear(act(x)), in one operation if both modules are plain, so that no hook or replacement is skipped."""
    kind = type(linear)
    conv1d = kind.__name__ == "Conv1D" and is_conv1d(linear)
    # Check the type of the weight, because quantised and sharded weights have a multiplication of their own.
    plain = (kind is nn.Linear or conv1d) and is_plain(linear, kind) and is_plain(act, GroupRational)
    if plain and not is_recorded(x) and type(weight := linear.weight) in _PLAIN and not _is_watched():
        numerator, denominator = act.vectors_for(x)
        weight = weight.T if conv1d else weight
        return rational_linear_of_vectors(
            x, numerator, denominator, weight, linear.bias, act.order, act.form, act.num_groups, act.group_width()
        )
    return linear(act(x))


def is_recorded(x: Any) -> bool:
    """Whether a tracer records the call of a module with x, so that each child must be called.

    The modules of its graph can get other modes and hooks later. Compilers watch these, and what torch.jit.trace
    records does not follow a mode, so neither counts.
    """
    return not isinstance(x, Tensor) or is_exporting()


def _is_watched() -> bool:
    """Whether a TorchFunctionMode is active, which may intercept F.linear, as some quantisers do.

    The mode of `torch.set_default_device` does not count.
    """
    count = torch._C._len_torch_function_stack()  # private, like the next two, since 2.1
    if count == 0:
        return False
    from torch.utils._device import DeviceContext

    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count))
