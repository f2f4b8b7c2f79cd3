"""Parameter groups for optimisers, which treat rational coefficients separately."""

from typing import Any

from torch import nn

from ..rational.arguments import check_module, check_not_negative
from .rational import GroupRational


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the full names of all rational coefficients in a model, for the parameter group without weight decay.

    Decay would pull every learned function towards zero. Parametrised coefficients are included. A parameter with
    several names is listed under all of them.

    Raises:
        TypeError: model is not a module.
    """
    coefficients = _coefficients(check_module("model", model))
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in coefficients}


def param_groups(
    model: nn.Module, weight_decay: float, *, lr: float | None = None, coefficient_lr: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into groups for any PyTorch-style optimiser.

        torch.optim.AdamW(grkan.param_groups(model, 0.05), lr=1e-3)

    Args:
        model: any module.
        weight_decay: the decay of matrices and everything else of two dimensions or more.
        lr: the learning rate; None leaves it to the optimiser.
        coefficient_lr: the learning rate of the rational coefficients; None: lr.

    Returns:
        Up to three groups: parameters with decay; those of fewer than two dimensions, such as biases and norms, without
        decay; and rational coefficients, also without decay. Each parameter is in one group. Frozen parameters and
        empty groups are left out.

    Raises:
        TypeError: model is not a module, or a rate is not a number.
        ValueError: a rate is negative.
    """
    coefficients = _coefficients(check_module("model", model))
    check_not_negative("weight_decay", weight_decay)
    for name, rate in (("lr", lr), ("coefficient_lr", coefficient_lr)):
        if rate is not None:
            check_not_negative(name, rate)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0, 0.0)]
    decayed, others, rational = groups
    for group, rate in zip(groups, (lr, lr, lr if coefficient_lr is None else coefficient_lr), strict=True):
        if rate is not None:
            group["lr"] = rate
    for p in model.parameters():
        if p.requires_grad:
            group = rational if id(p) in coefficients else decayed if p.dim() >= 2 else others
            group["params"].append(p)
    return [group for group in groups if group["params"]]


def _coefficients(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of all rational functions, parametrisations included."""
    return {id(p) for module in model.modules() if isinstance(module, GroupRational) for p in module.parameters()}
