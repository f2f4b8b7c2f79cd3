import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import grkan
from grkan.train.config import Config
from grkan.train.optimisation import (
    class_weights,
    clipped_together,
    limit_gradients_,
    make_loss,
    make_optimizer,
    make_schedule,
    prepare_model_,
)

LABELS = np.array([0, 0, 0, 1])


@pytest.fixture
def model():
    return timm.create_model("kat_micro_patch2_8", depth=2, embed_dim=16, num_heads=2, num_classes=3)


def test_coefficients_do_not_count_in_the_norm_of_the_weights():
    model = timm.create_model("kat_micro_patch2_8", depth=1)
    weights, coefficients = clipped_together(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in coefficients} == grkan.no_weight_decay(model)
    assert len(weights) + len(coefficients) == len(names)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-6)
    for p in coefficients:
        p.grad.fill_(100.0)
    assert not limit_gradients_([weights, coefficients], 1.0)
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-6)) for p in weights)
    assert torch.nn.utils.get_total_norm([p.grad for p in coefficients]) == pytest.approx(1.0)


def test_a_model_without_coefficients_is_one_part():
    model = torch.nn.Linear(2, 2)
    (parameters,) = clipped_together(model)
    assert parameters == list(model.parameters())


@pytest.mark.parametrize("largest", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_gradient_that_is_not_finite_takes_all(value, largest):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    groups = [list(layer.parameters()) for layer in model]
    groups[1].append(torch.nn.Parameter(torch.ones(2)))  # frozen, or not used
    groups.append([torch.nn.Parameter(torch.ones(2))])
    assert not limit_gradients_(groups, largest)
    assert all((p.grad == 0.1).all() for p in model.parameters())
    model[1].bias.grad[0] = value
    assert limit_gradients_(groups, largest)
    assert all((p.grad == 0).all() for p in model.parameters())


# The optimiser


def test_adamw_is_pytorchs(model):
    optimizer = make_optimizer(model, Config())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize("name", ["lamb", "sgd", "lion", "adan", "muon"])
def test_optimisers_of_timm_learn(model, name):
    optimizer = make_optimizer(model, Config(optimizer=name, lr=1e-2))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before["head.weight"], model.head.weight)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & {id(p) for key, p in model.named_parameters() if key in grkan.no_weight_decay(model)}


def test_betas(model):
    assert make_optimizer(model, Config(betas=(0.8, 0.95))).defaults["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv'; did you mean"),
        (
            {"optimizer": "sgd", "betas": (0.9, 0.99)},
            r"the optimizer sgd has no betas; got \(0.9, 0.99\)",
        ),
        ({"optimizer": "fusedadam"}, "the optimizer fusedadam cannot be created: .*"),
        ({"optimizer": "adahessian"}, "adahessian needs second derivatives"),
    ],
)
def test_optimisers_that_cannot_be_made_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(model, Config(**settings))


def test_lower_layers_learn_slower(model):
    config = Config(layer_decay=0.5, coefficient_weight_decay=0.01, lr=1.0, warmup_epochs=0)
    optimizer = make_optimizer(model, config)
    make_schedule(optimizer, config, 10).step_update(0)
    rate, decay = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rate[id(p)], decay[id(p)] = group["lr"], group["weight_decay"]
    own = dict(model.named_parameters())
    assert len(rate) == len(own)
    rates = [rate[id(own[name])] for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")]
    assert rates == pytest.approx([1 / 8, 1 / 4, 1])
    assert rate[id(own["blocks.1.mlp.act1.numerator"])] == pytest.approx(1 / 2)
    assert {decay[id(own[name])] for name in grkan.no_weight_decay(model)} == {0.01}
    assert decay[id(own["head.weight"])] == 0.05


# The schedule


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "cosine"}, [0, 0.5, 1, 0.5, 0]),
        ({"schedule": "linear", "min_lr": 0.2}, [0, 0.5, 1, 0.6, 0.2]),
        ({"schedule": "constant"}, [0, 0.5, 1, 1, 1]),
        ({"schedule": "step", "decay_epochs": 1.0, "decay_rate": 0.5}, [0, 0.5, 1, 0.5, 0.25]),
    ],
)
def test_schedules(model, settings, expected):
    config = Config(epochs=4, warmup_epochs=2, lr=1.0, **settings)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, 10)
    rates = []
    for step in (0, 10, 20, 30, 40):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, abs=1e-6)


# The loss


def test_class_weights_balance_the_classes():
    weights = class_weights(LABELS, 3)
    assert weights[LABELS].mean() == 1
    assert weights[0] * 3 == pytest.approx(weights[1] * 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_weighted_loss_does_not_depend_on_micro_batches(smoothing):
    logits, labels = torch.randn(4, 2), torch.from_numpy(LABELS)
    criterion, _ = make_loss(Config(balance="weights", smoothing=smoothing), 2, LABELS)
    halves = (criterion(logits[:2], labels[:2]) + criterion(logits[2:], labels[2:])) / 2
    torch.testing.assert_close(criterion(logits, labels), halves)
    each = F.cross_entropy(logits, labels, label_smoothing=0.0, reduction="none")
    if not smoothing:
        torch.testing.assert_close(halves, (each * torch.tensor([2 / 3, 2 / 3, 2 / 3, 2])).mean())


@pytest.mark.parametrize("balance", ["no", "weights"])
def test_a_weighted_loss_of_mixed_labels(balance):
    criterion, mixup = make_loss(Config(balance=balance, mixup=1.0), 2, LABELS)
    logits, targets = torch.randn(4, 2), torch.rand(4, 2)
    weights = torch.ones(2) if balance == "no" else class_weights(LABELS, 2)
    expected = -(targets * weights * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(criterion(logits, targets), expected)
    assert mixup is not None


def test_binary_cross_entropy():
    logits, labels = torch.randn(4, 3), torch.from_numpy(LABELS)
    criterion, _ = make_loss(Config(loss="bce"), 3, LABELS)
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float())
    torch.testing.assert_close(criterion(logits, labels), expected)


# The layout


def test_checkpointing_changes_memory_not_gradients(model):
    x, gradients = torch.rand(2, 1, 8, 8), []
    for checkpointing in (False, True):
        prepare_model_(model, Config(checkpointing=checkpointing, channels_last=checkpointing))
        model.zero_grad()
        model.train()(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert model.grad_checkpointing
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_cannot_compute_again_is_named():
    with pytest.raises(ValueError, match="checkpointing must be off, because None does not support it"):
        prepare_model_(torch.nn.Linear(2, 2), Config(checkpointing=True))
