"""`grkan.scale_coefficient_steps`: let an optimiser's step change a function equally by each of its coefficients."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import GrkanTypeError, GrkanValueError, first_of
from ..nn import GroupRational
from ..nn.init import is_sharded
from ..nn.modes import evaluating
from ..nn.wrappers import unwrap
from ..rational.arguments import check_module
from ..rational.reference import sums_of_squares
from .batches import Forward, as_batches, check_forward, no_batches, real_tokens, rejected, run_on, selected_rows

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
    most about the learning rate times rms(F) for each coefficient. A function that is close to 0 therefore changes
    slowly; s is 1 if it is exactly 0 on all of the data. No other parameter is affected.

    Convert the model before you make the optimiser, and call this again for functions that are added later, and when
    training resumes: the scales are not in the optimiser's state dict, nor in a copy of the optimiser. Another call
    measures the functions of its model anew. In several processes, call it in each of them: with a
    DistributedDataParallel model, which uses the data of all processes, or with the same data.

    Args:
        optimizer: any `torch.optim.Optimizer` that adds a step to the parameters, such as SGD, Adam, Lion and LAMB, or
            a wrapper of one (Accelerate's, Lookahead, SAM). Not for optimisers that compute the next parameters in
            another way: LBFGS and schedule-free ones are refused, but others, such as MADGRAD, cannot be told apart.
        model: the model with the functions, wrapped or not; it is run in eval mode, without gradients.
        calibration: batches, as for `convert_`. As there, padding does not count.
        forward: as for `convert_`.

    Raises:
        TypeError: an argument has a wrong type, or the optimiser does not call the hooks of `torch.optim.Optimizer`,
            needs a closure for its steps, or has parameters that differ between training and evaluation.
        ValueError: the optimiser trains no coefficients of the model; some are sharded or parametrised; the
            calibration data are empty, fail in the model, do not reach all functions that are trained, or reach them
            with values that are not finite. Later, in a step: the optimiser has other parameters than before.
    """
    optimizer = _with_hooks(optimizer)
    rationals = _trained(optimizer, check_module("model", model))
    check_forward(forward)
    sums = _observe(model, rationals, as_batches(calibration), forward)
    ids = _ids(optimizer)
    scales = {id(one.parameter): (one.parameter, one.scale()) for one in sums if id(one.parameter) in ids}
    if (previous := _scaled.pop(optimizer, None)) is not None:
        previous.remove()
        scales = {id(parameter): (parameter, scale) for parameter, scale in previous.scales} | scales
    _scaled[optimizer] = _Scaling(optimizer, list(scales.values()))


def _with_hooks(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser inside wrappers, which calls hooks around its steps."""
    inner: Any = optimizer
    while inner is not None:
        optimizer = inner
        _check_steps(optimizer)
        # Accelerate's wrapper, timm's Lookahead, SAM
        names = ("optimizer", "_base_optimizer", "base_optimizer")
        inner = next((found for name in names if (found := getattr(inner, name, None)) is not None), None)
    if not isinstance(optimizer, Optimizer):
        raise GrkanTypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    # The constructor of Optimizer wraps `step`. An optimiser that does not call it keeps hooks, but never calls them.
    if not getattr(type(optimizer).step, "hooked", False):
        kind = type(optimizer).__name__
        raise GrkanTypeError(f"optimizer must call the step hooks of torch.optim.Optimizer; {kind} does not")
    return optimizer


def _check_steps(optimizer: Any) -> None:
    """Check that a step is a change of the parameters, as far as the methods show."""
    kind = type(optimizer)
    step = getattr(kind, "step", None)
    others = list(inspect.signature(step).parameters.values())[1:] if inspect.isfunction(step) else []
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others):
        raise GrkanTypeError(
            "optimizer must take steps that are added to the parameters, such as Adam's; "
            f"{kind.__name__} needs a closure, so that one step moves the parameters several times"
        )
    # Accelerate's wrapper has the methods for the optimiser inside.
    modes = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if modes and not isinstance(optimizer, nn.Module) and not kind.__module__.startswith("accelerate."):
        raise GrkanTypeError(
            "optimizer must take steps that are added to the parameters, such as Adam's; "
            f"{kind.__name__} has train() and eval(), so it keeps other parameters than those that it trains, as "
            "schedule-free optimisers do"
        )


class _Scaling:
    """Hooks for any optimiser: they use only the coefficients before and after a step."""

    def __init__(self, optimizer: Optimizer, scales: list[tuple[nn.Parameter, Tensor]]) -> None:
        self.scales = scales
        self.before: list[Tensor] = []
        self.handles = [
            optimizer.register_step_pre_hook(self.remember),
            optimizer.register_step_post_hook(self.scale),
        ]

    def remember(self, optimizer: Optimizer, *_: Any) -> None:
        ids = _ids(optimizer)
        if not all(id(parameter) in ids for parameter, _ in self.scales):
            raise GrkanValueError(
                "optimizer must keep the coefficients that scale_coefficient_steps has measured; it has others now, "
                "for example because the model was sharded since"
            )
        self.before = [parameter.detach().clone() for parameter, _ in self.scales]

    @torch.no_grad()
    def scale(self, *_: Any) -> None:
        self.scales = [(p, scale.to(p.device)) for p, scale in self.scales]  # the model may have moved
        for (parameter, scale), before in zip(self.scales, self.before, strict=True):
            parameter.copy_(torch.addcmul(before, scale, parameter - before))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _trained(optimizer: Optimizer, model: nn.Module) -> dict[str, GroupRational]:
    """Return the functions of the model that the optimiser trains, by name."""
    ids = _ids(optimizer)
    is_fsdp = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupRational) and any(id(p) in ids and p.requires_grad for p in module.parameters()):
            if is_fsdp or any(is_sharded(p) for p in module.parameters()):
                raise GrkanValueError(f"model must have whole coefficients; those of {name} are sharded")
            if not all(isinstance(p, nn.Parameter) for p in (module.numerator, module.denominator)):
                raise GrkanValueError(f"model must have plain coefficients; those of {name} are parametrised")
            found[name] = module
    if not found:
        raise GrkanValueError(
            "optimizer must have coefficients of the model's rational functions; it has none that are trained. Make it "
            "with grkan.param_groups, after the model is converted"
        )
    return found


@dataclass
class _Sums:
    """Sums over the scalars that reached a parameter: their number, F^2, and (dF/dc)^2 for each of its coefficients."""

    parameter: nn.Parameter
    values: Tensor
    """[G, 2 + number of coefficients of a group], float64, on the CPU; one row for a numerator of all groups."""

    def scale(self) -> Tensor:
        """Return min(1, rms(F) / rms(dF/dc)) for every coefficient; 1 where F is 0 on all of the data."""
        square, slopes = self.values[:, 1:2], self.values[:, 2:]
        ratio = torch.where((square > 0) & (slopes > square), square / slopes, 1.0)
        return ratio.sqrt().flatten().to(self.parameter)


def _observe(
    model: nn.Module, rationals: dict[str, GroupRational], batches: Iterator[Any], forward: Forward
) -> list[_Sums]:
    """Run the model, and return the sums for all parameters of the functions."""
    sums: dict[int, _Sums] = {}
    for module in rationals.values():
        for parameter, rows in zip((module.numerator, module.denominator), module.coefficients(), strict=True):
            values = torch.zeros(len(rows), 2 + rows.shape[1], dtype=torch.float64, device="cpu")
            sums.setdefault(id(parameter), _Sums(parameter, values))

    failure: Exception | None = None
    try:
        _run(model, rationals, sums, batches, forward)
    except Exception as error:
        failure = error
    groups = [part.process_group for part in model.modules() if isinstance(part, DistributedDataParallel)]
    device = next(iter(sums.values())).parameter.device
    for group in groups:
        # A process that left before its peers reach a collective would keep them waiting.
        failed = torch.tensor(float(failure is not None), device=device)
        torch.distributed.all_reduce(failed, group=group)
        if failed.item() and failure is None:
            failure = GrkanValueError("calibration must succeed in every process; it failed in another one")
    if failure is not None:
        raise failure
    for group in groups:
        for one in sums.values():
            whole = one.values.to(device)
            torch.distributed.all_reduce(whole, group=group)
            one.values = whole.cpu()
    missing = [name for name, module in rationals.items() if not sums[id(module.numerator)].values[0, 0] > 0]
    if missing:
        raise GrkanValueError(f"calibration must reach every function; none reaches {first_of(missing)}")
    return list(sums.values())


def _run(
    model: nn.Module,
    rationals: dict[str, GroupRational],
    sums: dict[int, _Sums],
    batches: Iterator[Any],
    forward: Forward,
) -> None:
    """Run the model, and add to the sums."""
    masks: list[Tensor] = []
    generator = torch.Generator("cpu").manual_seed(0)  # the global one is the user's

    def add(name: str, module: GroupRational, args: Any, kwargs: Any) -> None:
        x = _scalars(args[0] if args else kwargs["x"], module, masks, generator)
        numerator, denominator = (rows.cpu() for rows in module.coefficients())
        square, *slopes = sums_of_squares(x, numerator, denominator, module.form)
        count = torch.full_like(square, x.shape[1])
        for parameter, slope in zip((module.numerator, module.denominator), slopes, strict=True):
            new = torch.cat([count, square, slope], -1)
            if not new.isfinite().all():
                raise GrkanValueError(f"calibration must lead to finite values; F of {name} or a derivative is not")
            values = sums[id(parameter)].values
            values += new.sum(0, keepdim=True) if len(values) < len(new) else new

    number = -1
    with evaluating(model), ExitStack() as stack:
        for name, module in rationals.items():
            hook = module.register_forward_pre_hook(partial(add, name), with_kwargs=True)
            stack.callback(hook.remove)
        for number, batch in enumerate(batches):
            masks[:] = real_tokens(batch)
            try:
                run_on(unwrap(model), batch, forward)
            except (GrkanTypeError, GrkanValueError):
                raise
            except Exception as error:
                raise rejected(number, error) from error
    if number < 0:
        raise no_batches()


def _scalars(x: Tensor, module: GroupRational, masks: list[Tensor], generator: torch.Generator) -> Tensor:
    """Return the scalars of each group, [G, W], without padding; of a long input, those of random tokens."""
    dim = module.channel_dim
    if x.is_nested and dim >= 0:
        dim -= x.dim()
    parts = x.detach().unbind() if x.is_nested else [x.detach()]
    rows = [part.movedim(dim, -1) for part in parts]
    tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in rows])
    if dim == -1 and not x.is_nested and (real := selected_rows(x, masks)) is not None:
        tokens = tokens[real]
    enough = 1 + _ENOUGH * module.num_groups // tokens.shape[1]
    if len(tokens) > enough:
        chosen = torch.randint(len(tokens), (enough,), generator=generator, device="cpu")
        tokens = tokens[chosen.to(tokens.device)]
    return tokens.cpu().unflatten(1, (module.num_groups, -1)).transpose(0, 1).flatten(1)
