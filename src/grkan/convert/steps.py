"""`grkan.scale_coefficient_steps`: let an optimiser's step change a function equally by each of its coefficients."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import GrkanTypeError, GrkanValueError
from ..nn import GroupRational
from ..nn.init import is_sharded
from ..nn.modes import evaluating
from ..rational.arguments import check_module
from ..rational.reference import sums_of_squares
from .batches import Forward, as_batches, check_forward, no_batches, rejected, run_on

# The scalars of a group that are used of each input. A mean over that many is off by far less than a factor of 2.
_ENOUGH = 2**16

_scaled: "WeakKeyDictionary[Optimizer, _Scaling]" = WeakKeyDictionary()


def scale_coefficient_steps(
    optimizer: Optimizer, model: nn.Module, calibration: Any, *, forward: Forward = None
) -> None:
    """Scale an optimiser's steps on rational coefficients by how much each coefficient changes the function.

        grkan.convert_(model, calibration=batches)
        optimizer = torch.optim.AdamW(grkan.param_groups(model, 0.05, lr=1e-4, coefficient_lr=3e-3))
        grkan.scale_coefficient_steps(optimizer, model, batches)

    A change of the coefficient of x^5 changes F(x) 10^5 times as much at x = 10 as at x = 1, but Adam moves every
    coefficient by about the learning rate. So in a pretrained model, whose activations can be large, one learning rate
    is too high for some coefficients or too low for others. From now on, each step on a coefficient c is multiplied by

        s = min(1, rms(F) / rms(dF/dc)),

    with the root mean square over the inputs of the group in the calibration data. A step of Adam then changes F by at
    most about the learning rate times rms(F) for each coefficient. No other parameter is affected.

    The functions have to be the ones that the optimiser was made for. A second call measures the scales anew. They are
    not in the optimiser's state dict: call this again when training resumes.

    Args:
        optimizer: any optimiser of PyTorch, or Accelerate's wrapper of one.
        model: the model with the functions; it is run in eval mode, without gradients.
        calibration: batches, as for `convert_`.
        forward: as for `convert_`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the optimiser has no coefficients of the model; some are sharded or parametrised; the calibration
            data are empty, fail in the model, do not reach all functions that are trained, or reach them with values
            that are not finite.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # Accelerate's wrapper
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise GrkanTypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    rationals = _trained(optimizer, check_module("model", model))
    check_forward(forward)
    totals = _observe(model, rationals, as_batches(calibration), forward)
    if (previous := _scaled.pop(optimizer, None)) is not None:
        previous.remove()
    _scaled[optimizer] = _Scaling(optimizer, [(p, _scale(total).to(p)) for p, total in totals.values()])


class _Scaling:
    """Hooks for any optimiser: they use only the coefficients before and after a step."""

    def __init__(self, optimizer: Optimizer, scales: list[tuple[nn.Parameter, Tensor]]) -> None:
        self.scales = scales
        self.before: list[Tensor] = []
        self.handles = [
            optimizer.register_step_pre_hook(self.remember),
            optimizer.register_step_post_hook(self.scale),
        ]

    def remember(self, *_: Any) -> None:
        self.before = [parameter.detach().clone() for parameter, _ in self.scales]

    @torch.no_grad()
    def scale(self, *_: Any) -> None:
        self.scales = [(p, scale.to(p.device)) for p, scale in self.scales]  # the model may have moved
        for (parameter, scale), before in zip(self.scales, self.before, strict=True):
            parameter.copy_(torch.addcmul(before, scale, parameter - before))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _trained(optimizer: Optimizer, model: nn.Module) -> dict[str, GroupRational]:
    """Return the functions of the model that the optimiser trains, by name."""
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupRational) and any(id(p) in ids for p in module.parameters()):
            if any(is_sharded(p) for p in module.parameters()):
                raise GrkanValueError(f"model must have whole coefficients; those of {name} are sharded")
            if len(list(module.parameters(recurse=False))) < 2:
                raise GrkanValueError(f"model must have plain coefficients; those of {name} are parametrised")
            found[name] = module
    if not found:
        raise GrkanValueError(
            "optimizer must have coefficients of the model's rational functions; it has none. Make it with "
            "grkan.param_groups, after the model is converted"
        )
    return found


def _observe(
    model: nn.Module, rationals: dict[str, GroupRational], batches: Iterator[Any], forward: Forward
) -> dict[int, tuple[nn.Parameter, Tensor]]:
    """Run the model, and return for each parameter, by its id, the sums of F^2 and of the squared derivatives."""
    totals: dict[int, tuple[nn.Parameter, Tensor]] = {}
    reached = set()

    def add(name: str, module: GroupRational, args: Any, kwargs: Any) -> None:
        reached.add(name)
        x = _grouped(args[0] if args else kwargs["x"], module)
        numerator, denominator = (rows.cpu() for rows in module.coefficients())
        value, *slopes = sums_of_squares(x, numerator, denominator, module.form)
        for parameter, slope in zip((module.numerator, module.denominator), slopes, strict=True):
            sums = torch.cat([value, slope], -1)
            if not sums.isfinite().all():
                raise GrkanValueError(f"calibration must lead to finite values; F of {name} or a derivative is not")
            if parameter.numel() < slope.numel():  # one numerator for all groups
                sums = sums.sum(0, keepdim=True)
            _, before = totals.get(id(parameter), (parameter, torch.zeros_like(sums)))
            totals[id(parameter)] = parameter, before + sums

    number = -1
    with evaluating(model), ExitStack() as stack:
        for name, module in rationals.items():
            hook = module.register_forward_pre_hook(partial(add, name), with_kwargs=True)
            stack.callback(hook.remove)
        for number, batch in enumerate(batches):
            try:
                run_on(model, batch, forward)
            except (GrkanTypeError, GrkanValueError):
                raise
            except Exception as error:
                raise rejected(number, error) from error
    if number < 0:
        raise no_batches()
    if missing := [name for name in rationals if name not in reached]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise GrkanValueError(f"calibration must reach every function; none reaches {', '.join(missing[:3])}{more}")
    return totals


def _grouped(x: Tensor, module: GroupRational) -> Tensor:
    """Return the scalars of each group, [G, W]; of a long input, those of tokens at equal distances."""
    dim = module.channel_dim
    if x.is_nested and dim >= 0:
        dim -= x.dim()
    parts = x.detach().unbind() if x.is_nested else [x.detach()]
    rows = [part.movedim(dim, -1) for part in parts]
    tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in rows])
    tokens = tokens[:: max(1, tokens.numel() // (_ENOUGH * module.num_groups))]
    return tokens.cpu().unflatten(1, (module.num_groups, -1)).transpose(0, 1).flatten(1)


def _scale(total: Tensor) -> Tensor:
    """Return min(1, rms(F) / rms(dF/dc)) for every coefficient of a parameter; 1 where F is 0 on all of the data."""
    value, slopes = total[:, :1], total[:, 1:]
    ratio = torch.where((value > 0) & (slopes > value), value / slopes, 1.0)
    return ratio.sqrt().flatten()
