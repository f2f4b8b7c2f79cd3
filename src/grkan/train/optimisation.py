"""What learns in a run, and how: the trainable parameters, the optimiser, its schedule, and the loss."""

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from ..errors import GrkanValueError
from ..nn import no_weight_decay
from .config import Config
from .start import head_parameters


def choose_trainable(model: nn.Module, config: Config, new_head: bool) -> None:
    """Freeze what `trainable` leaves out, but never outputs that have learned nothing yet.

    Raises:
        ValueError: the model has no rational functions to choose.
    """
    if config.trainable == "all":
        return
    coefficients = no_weight_decay(model)
    if not coefficients:
        raise GrkanValueError(f"trainable: {config.trainable}; {config.model} has no rational functions")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((name in coefficients) == (config.trainable == "coefficients"))
    if new_head:
        for parameter in head_parameters(model).values():
            parameter.requires_grad_()


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, with each kind of parameter's weight decay."""
    coefficients = no_weight_decay(model)
    undecayed = coefficients | set(getattr(model, "no_weight_decay", set)())
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed)
    if config.coefficient_weight_decay:
        decayed = [p for name, p in model.named_parameters() if name in coefficients and p.requires_grad]
        apart = {id(p) for p in decayed}
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in apart]} for group in groups]
        groups.append({"params": decayed, "weight_decay": config.coefficient_weight_decay})
    return torch.optim.AdamW(groups, lr=config.lr)


def clipped_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters whose gradients share a norm to clip: the rational coefficients do not count among the others.

    A few hundred coefficients have a third of the squared norm of a KAT at its start, so clipped together they would
    shrink the steps of all weights: 0.30 +- 0.21 points on Fashion-MNIST, docs/log.md.
    """
    coefficients = no_weight_decay(model)
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in model.named_parameters():
        parts[name in coefficients].append(parameter)
    return [part for part in parts if part]


def make_schedule(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> CosineLRScheduler:
    """Linear warm-up, then a half-cosine: a pure function of the step, so that nothing of it has to be saved.

    Args:
        optimizer: whose learning rate it sets.
        config: of the run.
        steps: of an epoch.
    """
    total, warmup = config.epochs * steps, round((config.warmup_epochs or 0) * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total - warmup, 2),  # of a cosine of one step timm says that it has no effect
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def make_loss(config: Config, classes: int) -> tuple[nn.Module, Mixup | None]:
    """The loss, and what mixes the images of a batch and their labels for it."""
    if config.mixup or config.cutmix:
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)
        return SoftTargetCrossEntropy(), mixup
    if config.smoothing:
        return LabelSmoothingCrossEntropy(config.smoothing), None
    return nn.CrossEntropyLoss(), None
