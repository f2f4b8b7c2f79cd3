"""count_operations against the published figures and against hand counts."""

import copy

import pytest
import timm
import torch
from torch import nn

import grkan.models.kat  # noqa: F401  registers the models
from grkan.models import count_operations
from grkan.nn import GRKAN, GroupRational, RationalLinear


@pytest.mark.parametrize(
    ("size", "vit", "kat", "tokens_width"),
    [("tiny", 1.08, 1.13, 192), ("small", 4.25, 4.35, 384), ("base", 16.87, 17.06, 768)],
)
def test_published_figures(size, vit, kat, tokens_width):
    names = f"vit_{size}_patch16_224", f"kat_{size}_patch16_224"
    counts = [count_operations(timm.create_model(name, device="meta")) for name in names]
    assert [round(c["paper_operations"] / 1e9, 2) for c in counts] == [vit, kat]
    # q k^T and the product with v: 2 x 197^2 x width in each of 12 blocks, beside the linear layers and convolutions
    linear = counts[0]["paper_operations"] - 25 * 5 * 197 * tokens_width
    assert counts[0]["multiply_adds"] == linear + 12 * 2 * 197**2 * tokens_width
    assert counts[1]["multiply_adds"] == counts[0]["multiply_adds"]


def test_parameters():
    model = timm.create_model("kat_tiny_patch16_224", device="meta")
    assert count_operations(model)["parameters"] == 5_719_336


@pytest.mark.parametrize(
    ("layer", "input_size", "paper", "multiply_adds"),
    [
        (GroupRational(4, order=(3, 2)), (10, 8), 80 * 13, 0),
        (RationalLinear(8, 5, num_groups=2), (10, 8), 80 * 21 + 400, 400),
        (GRKAN(8, 16), (10, 8), (80 + 160) * 21 + 2 * 1280, 2 * 1280),
        (GRKAN(8, 16, use_conv=True), (8, 2, 5), (80 + 160) * 21 + 2 * 1280, 2 * 1280),
        (nn.LayerNorm(8), (10, 8), 400, 0),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), 9 * 6 * 2 * 9, 9 * 6 * 2 * 9),
    ],
)
def test_layers(layer, input_size, paper, multiply_adds):
    counts = count_operations(layer, input_size)
    assert counts["paper_operations"] == paper
    assert counts["multiply_adds"] == multiply_adds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_is(dtype):
    model = timm.create_model("kat_micro_patch2_8", drop_rate=0.1).to(dtype)
    x = torch.randn(2, 1, 8, 8, dtype=dtype)
    model(x).sum().backward()
    before = copy.deepcopy(model)
    count_operations(model, (1, 8, 8))
    assert model.training
    assert [m for m in model.modules() if m._forward_hooks] == []
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, old), name
    assert model.head.weight.grad is not None


def test_a_size_that_the_model_does_not_take():
    model = timm.create_model("kat_micro_patch2_8")
    with pytest.raises(ValueError, match=r"input_size must fit the model; got \(1, 9, 9\): Input height"):
        count_operations(model, [1, 9, 9])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3,), TypeError, r"model must be a torch\.nn\.Module; got 3"),
        ((nn.Identity(), 5), TypeError, "input_size must be a sequence of ints, .* got 5"),
        ((nn.Identity(), "abc"), TypeError, "input_size must be a sequence of ints, .* got 'abc'"),
        ((nn.Identity(), (3.0,)), TypeError, "each number of input_size must be an int; got 3.0"),
        ((nn.Identity(), (3, -1)), ValueError, "each number of input_size must be at least 1; got -1"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        count_operations(*arguments)
