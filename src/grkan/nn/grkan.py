"""GR-KAN: the layer that replaces a transformer's MLP."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrkanTypeError, GrkanValueError
from ..rational import table
from ..rational.arguments import (
    check_choice,
    check_flag,
    check_groups,
    check_module,
    check_pair,
    check_positive,
    check_probability,
)
from .init import WEIGHT_INITS, initial_gain, remember_start
from .kinds import is_plain
from .linear import is_recorded, rational_then_linear
from .rational import GroupRational


class GRKAN(nn.Module):
    """Two rational functions, each in front of a linear layer (arXiv 2409.10594, section 4).

    The children are act1 -> fc1 -> act2 -> drop1 -> norm -> fc2 -> drop2. The arguments up to `use_conv` are those of
    timm's `Mlp`, so the class works wherever timm takes an `mlp_layer`. It initialises itself, and does so again in
    `init_weights`, which timm's recursive initialisation calls after overwriting fc1 and fc2.

    Args:
        in_features: channels of the input, a multiple of num_groups.
        hidden_features: channels between the linear layers, a multiple of num_groups; None: in_features.
        out_features: channels of the output; None: in_features.
        act_layer: accepted and ignored, because the functions are rational.
        norm_layer: called as norm_layer(hidden_features, device=..., dtype=...), or as norm_layer(hidden_features) if
            it takes no more; None: no norm.
        bias: whether fc1 and fc2 have a bias; one for both, or a pair.
        drop: dropout rates of drop1 and drop2; one for both, or a pair.
        use_conv: use 1x1 convolutions on (N, C, H, W) instead of linear layers on (..., C).
        num_groups, order, form, share_numerator: of both rational functions, as for `GroupRational`.
        act_init: the `init` of act1 and of act2.
        device, dtype: of the parameters; the coefficients are float32 or wider.
        weight_init: "variance_preserving" draws the weights of fc1 and fc2 from N(0, alpha / fan_in), where alpha is
            the gain of the function in front (1 after a norm); "trunc_normal" uses the standard deviation 0.02.

    Raises:
        TypeError, ValueError, ImportError: as for `GroupRational`.

    Shape:
        (..., in_features) to (..., out_features); with use_conv (N, in_features, H, W) to (N, out_features, H, W).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Any = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | Sequence[bool] = True,
        drop: float | Sequence[float] = 0.0,
        use_conv: bool = False,
        num_groups: int = 8,
        order: tuple[int, int] = (5, 4),
        act_init: Sequence[Any] = ("identity", "swish"),
        form: str = "abs_of_sum",
        share_numerator: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_init: str = "variance_preserving",
    ) -> None:
        super().__init__()
        in_features = check_groups("in_features", in_features, num_groups)
        hidden_features = in_features if hidden_features is None else hidden_features
        hidden_features = check_groups("hidden_features", hidden_features, num_groups)
        out_features = check_positive("out_features", in_features if out_features is None else out_features)
        bias1, bias2 = check_pair("bias", bias, check_flag)
        drop1, drop2 = check_pair("drop", drop, check_probability)
        if isinstance(act_init, str) or not isinstance(act_init, Sequence) or len(act_init) != 2:
            raise GrkanValueError(f"act_init must be a pair: the init of act1 and the init of act2; got {act_init!r}")
        for init in act_init:
            if isinstance(init, str):
                table.canonical_name(init, "act_init")
        self.weight_init = check_choice("weight_init", weight_init, WEIGHT_INITS)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        channel_dim = 1 if check_flag("use_conv", use_conv) else -1

        def act(init: Any) -> GroupRational:
            return GroupRational(num_groups, init, order, form, share_numerator, channel_dim, **placed)

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear | nn.Conv2d:
            return (
                nn.Conv2d(inputs, outputs, 1, bias=bias, **placed)
                if use_conv
                else nn.Linear(inputs, outputs, bias, **placed)
            )

        self.act1 = act(act_init[0])
        self.fc1 = linear(in_features, hidden_features, bias1)
        self.act2 = act(act_init[1])
        self.drop1 = nn.Dropout(drop1)
        self.norm = nn.Identity() if norm_layer is None else _norm(norm_layer, hidden_features, placed)
        self.fc2 = linear(hidden_features, out_features, bias2)
        self.drop2 = nn.Dropout(drop2)
        self.act1.width, self.act2.width = in_features, hidden_features
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise everything under the layer: coefficients, linear layers and norm."""
        self.remember_start()
        for module in (self.act1, self.fc1, self.act2, *self.norm.modules(), self.fc2):
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def remember_start(self) -> None:
        """Store in fc1 and fc2 the gains of the functions in front of them, for their `reset_parameters`."""
        normed = not isinstance(self.norm, nn.Identity)
        for act, fc, preserved in ((self.act1, self.fc1, False), (self.act2, self.fc2, normed)):
            gain = 1.0 if preserved or self.weight_init != "variance_preserving" else initial_gain(act)
            remember_start(fc, gain, self.weight_init)

    def reset_parameters(self) -> None:
        """Alias of `init_weights`."""
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; the shapes are those in the description of the class."""
        if torch.jit.is_scripting():
            x = self.fc2(self.norm(self.drop1(self.act2(self.fc1(self.act1(x))))))
        else:
            x = rational_then_linear(self.act1, self.fc1, x)
            if not is_recorded(x) and _does_nothing(self.drop1) and _does_nothing(self.norm):
                x = rational_then_linear(self.act2, self.fc2, x)
            else:
                x = self.fc2(self.norm(self.drop1(self.act2(x))))
        return self.drop2(x)


def _does_nothing(module: Any) -> bool:
    if is_plain(module, nn.Dropout):
        return module.p == 0 or not module.training
    return is_plain(module, nn.Identity)


def _norm(norm_layer: Any, features: int, placed: dict[str, Any]) -> nn.Module:
    """Make the norm on its device, whether or not norm_layer takes a device."""
    try:
        try:
            norm = norm_layer(features, **placed)
        except TypeError:  # it may take only the width
            norm = norm_layer(features).to(**placed)
        return check_module("what norm_layer returns", norm)
    except (AttributeError, TypeError) as error:
        raise GrkanTypeError(
            f"norm_layer must return a module for norm_layer({features}); got {norm_layer!r}: {error}"
        ) from error
