"""Released checkpoints: what is computed, and what is refused."""

import argparse
import os

import pytest
import safetensors.torch
import timm
import torch

from grkan.models.released import load_released_checkpoint, save_released_checkpoint
from grkan.nn import GroupRational


def checkpoint(name="kat_tiny_patch16_224", seed=0, **arguments):
    """Weights in the released layout, by hand: a ViT's, and the functions' under their released names."""
    torch.manual_seed(seed)
    name = name.replace("kat_", "vit_")
    state = timm.create_model(name, depth=2, num_classes=7, **arguments).state_dict()
    for i in range(2):
        for act in ("act1", "act2"):
            state[f"blocks.{i}.mlp.{act}.weight_numerator"] = torch.randn(1, 6)
            state[f"blocks.{i}.mlp.{act}.weight_denominator"] = torch.randn(8, 4)
    return state


def released_function(x, numerator, denominator):
    """P(x) / (1 + |b_1| |x| + ...) of eight groups with one numerator, as the released GPU kernels compute it."""
    x = x.double()
    groups = x.reshape(*x.shape[:-1], 8, -1)
    p = sum(a * groups**i for i, a in enumerate(numerator[0].double()))
    q = 1 + sum(b.abs()[:, None] * groups.abs() ** (j + 1) for j, b in enumerate(denominator.double().T))
    return (p / q).reshape(x.shape)


def assert_loaded(model, state):
    assert not model.training
    for i in range(2):
        for name in ("act1", "act2"):
            act = getattr(model.blocks[i].mlp, name)
            key = f"blocks.{i}.mlp.{name}.weight_"
            x = 3 * torch.randn(5, act.width)
            expected = released_function(x, state[f"{key}numerator"], state[f"{key}denominator"])
            assert torch.allclose(act(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])


def test_the_model_computes_what_the_released_code_does():
    state = checkpoint()
    model = load_released_checkpoint(state)
    assert_loaded(model, state)
    assert model.pretrained_cfg["architecture"] == "kat_tiny_patch16_224"
    x, block = torch.randn(2, 5, 192), model.blocks[0]
    inner = torch.nn.functional.linear(
        released_function(x, *(state[f"blocks.0.mlp.act1.weight_{p}"] for p in ("numerator", "denominator"))),
        state["blocks.0.mlp.fc1.weight"].double(),
        state["blocks.0.mlp.fc1.bias"].double(),
    )
    outer = torch.nn.functional.linear(
        released_function(inner, *(state[f"blocks.0.mlp.act2.weight_{p}"] for p in ("numerator", "denominator"))),
        state["blocks.0.mlp.fc2.weight"].double(),
        state["blocks.0.mlp.fc2.bias"].double(),
    )
    assert torch.allclose(block.mlp(x).double(), outer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "width"), [("kat_small_patch16_224", 384), ("kat_base_patch16_224", 768)])
def test_sizes(name, width):
    model = load_released_checkpoint(checkpoint(name))
    assert model.pretrained_cfg["architecture"] == name
    assert model.embed_dim == width


@pytest.mark.parametrize(
    ("ending", "wrapped"),
    [("pth", "bare"), ("pth", "state_dict"), ("pth", "model"), ("pth", "timm"), ("safetensors", "bare")],
)
def test_files(tmp_path, ending, wrapped):
    state = checkpoint()
    other = {key: value + 1 for key, value in state.items()}
    contents = {
        "bare": {f"module.{key}": value for key, value in state.items()},
        "state_dict": {"state_dict": state},
        "model": {"model": state, "epoch": 3},
        "timm": {"state_dict": other, "state_dict_ema": state, "args": argparse.Namespace(lr=1e-3)},
    }[wrapped]
    path = tmp_path / f"kat.{ending}"
    if ending == "pth":
        torch.save(contents, path)
    else:
        safetensors.torch.save_file(contents, path)
    assert_loaded(load_released_checkpoint(path), state)
    if wrapped == "timm":
        assert_loaded(load_released_checkpoint(path, use_ema=False), other)
        assert_loaded(load_released_checkpoint(contents), state)


def test_another_head_and_size():
    state = checkpoint()
    model = load_released_checkpoint(state, num_classes=3, img_size=96)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=96)
    resampled = timm.models.vision_transformer.checkpoint_filter_fn({"pos_embed": state["pos_embed"]}, vit)
    assert torch.equal(model.pos_embed, resampled["pos_embed"])
    assert_loaded(model, state)
    assert load_released_checkpoint(state, num_classes=0)(torch.randn(1, 3, 224, 224)).shape == (1, 192)


def test_timms_checkpoint_path(tmp_path):
    state = checkpoint()
    torch.save(state, tmp_path / "kat.pth")
    make = {"depth": 2, "num_classes": 7, "checkpoint_path": str(tmp_path / "kat.pth")}
    model = timm.create_model("kat_tiny_patch16_224", form="sum_of_abs", **make)
    assert_loaded(model.eval(), state)
    with pytest.raises(RuntimeError, match="weight_numerator is for the form 'sum_of_abs'; the model has 'abs_of_sum'"):
        timm.create_model("kat_tiny_patch16_224", **make)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_back_to_the_released_layout(tmp_path, ending):
    state = checkpoint()
    path = tmp_path / f"kat.{ending}"
    save_released_checkpoint(load_released_checkpoint(state), path)
    saved = torch.load(path) if ending == "pth" else safetensors.torch.load_file(path)
    assert set(saved) == set(state)
    assert all(torch.equal(saved[key], value) for key, value in state.items())
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "supports only the form 'sum_of_abs'; blocks.0.mlp.act1 has 'abs_of_sum'"),
        ({"form": "sum_of_abs", "order": (7, 6)}, r"only the order \(5, 4\); blocks.0.mlp.act1 has \(7, 6\)"),
    ],
)
def test_models_that_the_layout_cannot_hold(tmp_path, arguments, match):
    model = timm.create_model("kat_micro_patch2_8", depth=1, **arguments)
    with pytest.raises(ValueError, match=match):
        save_released_checkpoint(model, tmp_path / "kat.pth")
    assert os.listdir(tmp_path) == []


def test_groups_with_different_numerators(tmp_path):
    act = GroupRational(4, form="sum_of_abs")
    with torch.no_grad():
        act.coefficients()[0][2, 1] += 0.1
    with pytest.raises(ValueError, match="one numerator for all groups"):
        save_released_checkpoint(torch.nn.Sequential(act), tmp_path / "kat.pth")
    with pytest.raises(ValueError, match="must have rational functions"):
        save_released_checkpoint(torch.nn.Linear(2, 2), tmp_path / "kat.pth")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "kat.pth"
    torch.save({"state_dict": checkpoint(), "extra": Evil()}, path)
    with pytest.raises(ValueError, match="needs to run code") as caught:
        load_released_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()
    torch.save(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(ValueError, match="damaged"):
        load_released_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.pth"):
        load_released_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: {k: v for k, v in s.items() if "weight_" not in k}, "is not a released KAT.*looks like a Vision"),
        (lambda s: {"a": 1}, "must hold a mapping of names to tensors"),
        (lambda s: {}, "must hold a mapping of names to tensors"),
        (lambda s: {k: v for k, v in s.items() if "blocks.1.attn" not in k}, "does not fit a kat_tiny"),
        (lambda s: {**s, "cls_token": torch.zeros(1, 1, 100)}, "must hold a KAT of width"),
        (lambda s: {**s, "cls_token": torch.tensor(0.0)}, "must hold a KAT of width"),
        (lambda s: {**s, "pos_embed": torch.zeros(197)}, "must hold a KAT of width"),
        (lambda s: {**s, "pos_embed": torch.zeros(1, 197, 100)}, "does not fit a kat_tiny.*pos_embed"),
        (lambda s: {**s, "head.weight": torch.tensor(0.0)}, "does not fit a kat_tiny.*head.weight"),
        (
            lambda s: {**s, "mask_token": torch.zeros(1)},
            "does not fit a kat_tiny_patch16_224, which has no weight mask_token",
        ),
        (
            lambda s: {**s, "blocks.0.mlp.act1.weight_denominator": torch.zeros(7, 4)},
            "holds a kat_tiny_patch16_224 that cannot be built: in_features must be divisible by num_groups",
        ),
        (lambda s: {**s, "blocks.0.mlp.act1.weight_numerator": torch.zeros(6)}, "is not a released KAT"),
    ],
)
def test_weights_that_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        load_released_checkpoint(change(checkpoint()))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"form": "abs_of_sum"}, "form must be 'sum_of_abs'"),
        (
            {"num_grups": 3},
            "model_args do not fit the kat_tiny_patch16_224 in path_or_state_dict: TypeError.*num_grups",
        ),
        ({"num_heads": 0}, "model_args do not fit the kat_tiny_patch16_224 in path_or_state_dict: ZeroDivisionError"),
        ({"checkpoint_path": "kat.pth"}, "model_args must describe the architecture, .*; got checkpoint_path"),
    ],
)
def test_arguments_that_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        load_released_checkpoint(checkpoint(), **arguments)
    with pytest.raises(TypeError, match="must be a path or a mapping"):
        load_released_checkpoint(3)


def test_a_failure_of_the_machine_is_not_the_users(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    state = checkpoint()
    for module, name in ((timm, "create_model"), (torch.nn.Module, "load_state_dict")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(RuntimeError, match=r"^CUDA error"):
                load_released_checkpoint(state, num_classes=3)
