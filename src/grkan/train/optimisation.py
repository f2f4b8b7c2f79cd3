"""The optimisation of a run: the trainable parameters, the optimiser, its schedule, and the loss."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import GrkanValueError
from ..nn import no_weight_decay
from .config import Config, nearest
from .start import head_parameters


def choose_trainable(model: nn.Module, config: Config, new_head: bool) -> None:
    """Freeze the parameters that `trainable` excludes, but never untrained outputs.

    Raises:
        ValueError: the model has no rational functions to choose.
    """
    if config.trainable == "all":
        return
    coefficients = no_weight_decay(model)
    if not coefficients:
        raise GrkanValueError(
            f"trainable must be all, because {config.model} has no rational functions; got {config.trainable}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((name in coefficients) == (config.trainable == "coefficients"))
    if new_head:
        for parameter in head_parameters(model).values():
            parameter.requires_grad_()


def prepare_model_(model: nn.Module, config: Config) -> None:
    """Set up a model as `checkpointing` and `channels_last` say.

    Raises:
        ValueError: the model does not support checkpointing.
    """
    if config.checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:  # timm asserts that a model supports it
            raise GrkanValueError(f"checkpointing must be off, because {config.model} does not support it") from error
    if config.channels_last:
        model.to(memory_format=torch.channels_last)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make an optimiser of timm's, with the weight decay of each kind of parameter.

    Raises:
        ValueError: there is no such optimiser, it cannot be made here, or it has no betas.
    """
    coefficients = no_weight_decay(model)
    undecayed = coefficients | set(getattr(model, "no_weight_decay", set)())
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=undecayed, layer_decay=config.layer_decay
        )
    if config.coefficient_weight_decay:
        apart = {id(p) for name, p in model.named_parameters() if name in coefficients}
        own = [{**group, "params": [p for p in group["params"] if id(p) in apart]} for group in groups]
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in apart]} for group in groups]
        decayed = [{**group, "weight_decay": config.coefficient_weight_decay} for group in own if group["params"]]
        groups = [*rest, *decayed]
    if config.optimizer not in list_optimizers():
        raise GrkanValueError(f"unknown optimizer {config.optimizer!r}; {nearest(config.optimizer, list_optimizers())}")
    betas = {} if config.betas is None else {"betas": config.betas}
    try:
        optimizer = create_optimizer_v2(groups, config.optimizer, lr=config.lr, **betas)
    except Exception as error:  # a package or a GPU is missing, or an argument is not supported
        reason = " ".join(str(error).split()) or type(error).__name__
        given = f" with betas {config.betas}" if betas else ""
        raise GrkanValueError(f"the optimizer {config.optimizer} cannot be created{given}: {reason}") from error
    if betas and "betas" not in optimizer.defaults:
        raise GrkanValueError(f"the optimizer {config.optimizer} has no betas; got {config.betas}")
    if getattr(optimizer, "is_second_order", False):
        raise GrkanValueError(
            f"the optimizer {config.optimizer} needs second derivatives, which the training loop does not compute"
        )
    return optimizer


def clipped_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """Group the parameters whose gradients are clipped by a common norm: rational coefficients, and all others.

    At the start of training, a few hundred coefficients have a third of a KAT's squared gradient norm. Clipped
    together, they would shrink the steps of all weights: 0.30 +- 0.21 points on Fashion-MNIST, docs/log.md.
    """
    coefficients = no_weight_decay(model)
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in model.named_parameters():
        parts[name in coefficients].append(parameter)
    return [part for part in parts if part]


def limit_gradients_(groups: list[list[nn.Parameter]], largest: float | None) -> Tensor:
    """Clip the gradients of each group to a norm, and set all of them to 0 if one is not finite.

    This does not wait for the device. Such gradients do not reach the weights, and the result reports them when it is
    read later. (A step with gradients of 0 still decays the weights and applies momenta.)

    Args:
        groups: groups of parameters, from `clipped_together`.
        largest: the largest norm; None: no limit.

    Returns:
        Whether a gradient was not finite: a boolean tensor without dimensions, on the device.
    """
    norms, gradients = [], []
    for parameters in groups:
        own = [p.grad for p in parameters if p.grad is not None]
        if not own:
            continue
        norm = torch.nn.utils.get_total_norm(own)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if largest is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        norms.append(norm)
        gradients += own
    spoiled = ~torch.stack(norms).isfinite().all()
    for gradient in gradients:
        gradient.masked_fill_(spoiled, 0)
    return spoiled


def make_schedule(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> Scheduler:
    """Make a schedule of linear warm-up, then `schedule`: a pure function of the step, without state to save.

    Args:
        optimizer: the optimiser whose learning rate it sets.
        config: the configuration of the run.
        steps: the steps per epoch.
    """
    total, warmup = config.epochs * steps, round((config.warmup_epochs or 0) * steps)
    common: dict[str, Any] = {"warmup_t": warmup, "warmup_prefix": True, "t_in_epochs": False}
    rest = max(total - warmup, 2)  # timm warns that a cosine of one step has no effect
    if config.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=rest, lr_min=config.min_lr, **common)
    if config.schedule == "linear":
        return PolyLRScheduler(optimizer, t_initial=rest, power=1.0, lr_min=config.min_lr, **common)
    length = max(round(config.decay_epochs * steps), 1) if config.schedule == "step" else total + 1
    return StepLRScheduler(optimizer, decay_t=length, decay_rate=config.decay_rate, **common)


class _WeightedCrossEntropy(nn.Module):
    """Cross entropy times the weight of the image's class, averaged over the images.

    PyTorch's own divides by the weights of the batch instead, so its gradients depend on the size of micro-batches.
    """

    def __init__(self, weight: Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        weight: Any = self.weight
        total = F.cross_entropy(logits, targets, weight, label_smoothing=self.smoothing, reduction="sum")
        return total / len(logits)


def class_weights(labels: np.ndarray, classes: int) -> Tensor:
    """Return for each class the inverse of its number of images, scaled so that the mean weight of images is 1."""
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return torch.tensor(len(labels) / (present * np.maximum(counts, 1)), dtype=torch.float32)


def make_loss(config: Config, classes: int, labels: np.ndarray) -> tuple[nn.Module, Mixup | None]:
    """Return the loss, and the Mixup of images and labels in a batch, or None.

    Args:
        config: the configuration of the run.
        classes: the number of classes.
        labels: the labels of the training images.
    """
    mixes, smoothing = bool(config.mixup or config.cutmix), config.smoothing
    mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes) if mixes else None
    weight = class_weights(labels, classes) if config.balance == "weights" else None
    if config.loss == "bce":
        return BinaryCrossEntropy(smoothing=0.0 if mixes else smoothing, weight=weight), mixup
    if weight is not None:
        return _WeightedCrossEntropy(weight, 0.0 if mixes else smoothing), mixup
    if mixes:
        return SoftTargetCrossEntropy(), mixup
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss(), mixup
