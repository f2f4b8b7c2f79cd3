"""Every registered KAT, in the manner of timm's own tests; and what is KAT's own: its start and its arguments."""

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import grkan.models.kat
from grkan.models.kat import MimeticAttention, twin_of
from grkan.nn import GRKAN, no_weight_decay, variance_gain
from grkan.rational.dispatch import set_backend

KATS = timm.list_models("kat_*")
TWINS = timm.list_models("grkan_vit_micro_*")
SPLINES = timm.list_models("grkan_vit_kan_*")
WEIGHT_INITS = ["", "jax", "jax_nlhb", "moco", "reset", "skip"]


def sized(name, **kwargs):
    """The model; the large ones for images of 32 pixels, which is quick and covers the same code."""
    if name.endswith("_224"):
        kwargs.setdefault("img_size", 32)
    return timm.create_model(name, **kwargs)


def images(model, batch=2):
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def test_registry():
    assert KATS == [
        "kat_base_patch16_224",
        "kat_micro_patch2_8",
        "kat_micro_patch4_28",
        "kat_micro_patch4_32",
        "kat_small_patch16_224",
        "kat_tiny_patch16_224",
    ]
    assert [twin_of(name) for name in KATS if "micro" in name] == TWINS
    assert all(timm.is_model(twin_of(name)) for name in KATS)
    assert SPLINES == ["grkan_vit_kan_micro_patch4_28"]
    assert {*KATS, *TWINS, *SPLINES} <= set(grkan.models.kat.__all__)
    assert {*timm.list_models(module="kat")} == {*KATS, *TWINS, *SPLINES}  # nothing without a prefix of ours


@pytest.mark.parametrize("name", KATS + TWINS + SPLINES)
def test_forward_and_backward(name):
    torch.manual_seed(0)
    model = sized(name, num_classes=7).train()
    output = model(images(model))
    assert output.shape == (2, 7)
    output.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", KATS + TWINS + SPLINES)
def test_configuration(name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    channels, height, width = cfg["input_size"]
    assert (height, width) == model.patch_embed.img_size
    assert model.get_submodule(cfg["first_conv"]).in_channels == channels
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert model.num_classes == cfg["num_classes"] == (10 if "micro" in name else 1000)
    assert len(cfg["mean"]) == len(cfg["std"]) == channels
    assert cfg["mean"] == cfg["std"] == (0.5,) * channels
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bicubic", 1.0 if "micro" in name else 0.9)
    if name in KATS:
        assert all(type(block.mlp) is GRKAN for block in model.blocks)


@pytest.mark.parametrize(("share", "count"), [(False, 5_719_336), (True, 5_718_328)])
def test_parameters_of_tiny(share, count):
    model = timm.create_model("kat_tiny_patch16_224", share_numerator=share, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.blocks[0].mlp.act2.coefficients()[0].shape == ((1, 6) if share else (8, 6))


@pytest.mark.parametrize("name", [name for name in KATS if "micro" in name])
def test_twins_differ_in_the_mlp_alone(name):
    kat, vit = timm.create_model(name), timm.create_model(twin_of(name))
    kept = {key: tuple(p.shape) for key, p in kat.state_dict().items() if ".act" not in key}
    assert kept == {key: tuple(p.shape) for key, p in vit.state_dict().items()}
    assert {**kat.default_cfg, "architecture": ""} == {**vit.default_cfg, "architecture": ""}


@pytest.mark.parametrize("name", KATS)
def test_features(name):
    model = sized(name).eval()
    x = images(model)
    features = model.forward_features(x)
    assert features.shape == (2, model.patch_embed.num_patches + 1, model.embed_dim)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    final, intermediates = model.forward_intermediates(x, indices=2, norm=True)
    torch.testing.assert_close(final, features)
    assert [t.shape[:2] for t in intermediates] == [(2, model.embed_dim)] * 2
    torch.testing.assert_close(intermediates[-1].flatten(2).mT, features[:, 1:])

    extractor = sized(name, features_only=True, out_indices=(0, 2)).eval()
    assert [t.shape[1] for t in extractor(x)] == extractor.feature_info.channels() == [model.embed_dim] * 2


def test_features_by_torch_fx():
    extractor = timm.create_model("kat_micro_patch2_8", features_only=True, feature_cls="fx").eval()
    model = timm.create_model("kat_micro_patch2_8").eval()
    state = {name.removeprefix("graph_module."): tensor for name, tensor in extractor.state_dict().items()}
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    x = images(model)
    expected = model.forward_intermediates(x, indices=[3], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(extractor(x)[-1][:, 1:], expected[0])


def test_prune_intermediate_layers():
    model = timm.create_model("kat_micro_patch2_8").eval()
    x = images(model)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.blocks) == 2
    torch.testing.assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)


def test_gradient_checkpointing():
    model = timm.create_model("kat_micro_patch2_8")
    x = images(model)
    runs, gradients = [], []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert runs == [False, True, True]  # the backward runs it again
    torch.testing.assert_close(*gradients)


def test_reset_classifier():
    model = timm.create_model("kat_micro_patch2_8")
    model.reset_classifier(3, "avg")
    assert model(images(model)).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(images(model)).shape == (2, 17, 96)


@pytest.mark.parametrize("name", ["kat_micro_patch2_8", "kat_tiny_patch16_224"])
def test_no_weight_decay(name):
    model = sized(name)
    coefficients = no_weight_decay(model)
    assert len(coefficients) == 4 * len(model.blocks)
    assert model.no_weight_decay() == timm.models.VisionTransformer.no_weight_decay(model) | coefficients
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    optimiser = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        is_weight = parameter.dim() > 1 and parameter_name not in model.no_weight_decay()
        assert (id(parameter) in decayed) == is_weight, parameter_name


def test_layer_decay():
    model = timm.create_model("kat_micro_patch2_8")
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for i, block in enumerate(model.blocks):
        assert of[id(block.mlp.act1.numerator)]["weight_decay"] == 0
        for parameter in block.parameters():
            assert of[id(parameter)]["lr_scale"] == pytest.approx(0.5 ** (len(model.blocks) - i))


def mean_squares(model, x):
    """output / input mean square of every block's MLP, with the model otherwise as it is."""
    ratios = []

    def hook(_, inputs, output):
        ratios.append((output.square().mean() / inputs[0].square().mean()).item())

    handles = [block.mlp.register_forward_hook(hook) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return ratios


@pytest.mark.parametrize("arguments", [{}, {"share_numerator": True, "form": "sum_of_abs"}, {"attn_init": "mimetic"}])
def test_the_start_keeps_the_mean_square_in_tiny(arguments):
    torch.manual_seed(0)
    model = timm.create_model("kat_tiny_patch16_224", **arguments).eval()
    ratios = mean_squares(model, torch.randn(2, 3, 224, 224))
    assert len(ratios) == 12
    assert all(0.8 < ratio < 1.25 for ratio in ratios), ratios


def test_the_start_keeps_the_mean_square_in_base():
    torch.manual_seed(0)
    model = timm.create_model("kat_base_patch16_224").eval()
    ratios = mean_squares(model, torch.randn(1, 3, 224, 224))
    assert all(0.8 < ratio < 1.25 for ratio in ratios), ratios


def test_without_its_own_init_weights_the_start_is_lost(monkeypatch):
    """The fault of the released code, and proof that the tests above see it."""
    model = timm.create_model("kat_tiny_patch16_224").eval()
    monkeypatch.delattr(GRKAN, "init_weights")
    model.init_weights(needs_reset=False)
    assert max(mean_squares(model, torch.randn(1, 3, 224, 224))) < 0.1


@pytest.mark.parametrize("fix_init", [False, True])
@pytest.mark.parametrize("weight_init", WEIGHT_INITS)
@pytest.mark.parametrize("meta", [False, True])
def test_the_start_survives_every_initialisation(weight_init, fix_init, meta):
    torch.manual_seed(0)
    arguments = {"weight_init": weight_init, "fix_init": fix_init, "embed_dim": 192}
    if meta:
        with torch.device("meta"):
            model = timm.create_model("kat_micro_patch2_8", **arguments)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        model.init_weights()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    else:
        model = timm.create_model("kat_micro_patch2_8", **arguments)
    swish = variance_gain(model.blocks[0].mlp.act2)
    for i, block in enumerate(model.blocks):
        # timm's fix_init divides fc2 by this, and is not done where nothing is initialised
        scale = math.sqrt(2 * (i + 1)) if fix_init and (meta or weight_init != "skip") else 1.0
        mlp = block.mlp
        assert mlp.fc1.weight.std().item() == pytest.approx(192**-0.5, rel=0.02)
        assert mlp.fc2.weight.std().item() * scale == pytest.approx((swish / 768) ** 0.5, rel=0.02)
        assert not mlp.fc1.bias.any()
        assert torch.equal(mlp.act1.numerator[:6], torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    if not fix_init:
        if weight_init == "skip" and not meta:
            for parameter in (model.pos_embed, model.cls_token):  # which hold anything
                nn.init.zeros_(parameter)
        ratios = mean_squares(model, torch.randn(16, 1, 8, 8))
        assert all(0.8 < ratio < 1.25 for ratio in ratios), ratios


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_checkpoint_of_another_form_is_refused(tmp_path, ending):
    saved = timm.create_model("kat_micro_patch2_8", depth=1, form="sum_of_abs")
    path = str(tmp_path / f"kat.{ending}")
    if ending == "pth":
        torch.save({"state_dict": saved.state_dict()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_model(saved, path)
    match = "the coefficients are for form sum_of_abs, .*; the model has form abs_of_sum"
    with pytest.raises(RuntimeError, match=match):
        timm.create_model("kat_micro_patch2_8", depth=1, checkpoint_path=path)
    with pytest.raises(RuntimeError, match=match):
        timm.models.load_checkpoint(timm.create_model("kat_micro_patch2_8", depth=1), path, strict=False)
    model = timm.create_model("kat_micro_patch2_8", depth=1, form="sum_of_abs", checkpoint_path=path)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, saved.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("name", ["kat_micro_patch2_8", "grkan_vit_micro_patch2_8"])
@pytest.mark.parametrize("weight_init", ["", "jax", "skip"])
def test_mlp_init(name, weight_init):
    def deviations(mlp_init):
        model = timm.create_model(name, mlp_init=mlp_init, weight_init=weight_init)
        model.init_weights()
        mlp = model.blocks[1].mlp
        return mlp.fc1.weight.std().item(), mlp.fc2.weight.std().item()

    assert deviations("trunc_normal") == pytest.approx((0.02, 0.02), rel=0.03)
    gain = 2.8108 if name.startswith("kat") else 2.3517
    assert deviations("variance_preserving") == pytest.approx((96**-0.5, (gain / 384) ** 0.5), rel=0.03)


def test_the_twin_keeps_the_mean_square_where_asked():
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8)
    fair = timm.create_model("grkan_vit_micro_patch2_8", mlp_init="variance_preserving")
    assert all(0.8 < ratio < 1.25 for ratio in mean_squares(fair, x))
    assert max(mean_squares(timm.create_model("grkan_vit_micro_patch2_8"), x)) < 0.1


def mimetic_parts(attention):
    """For every head W_Q W_K^T, and W_V W_proj, as the paper writes them."""
    query, key, value = attention.qkv.weight.detach().double().chunk(3)
    heads = [q.T @ k for q, k in zip(query.split(attention.head_dim), key.split(attention.head_dim), strict=True)]
    return heads, value.T @ attention.proj.weight.detach().double().T


@pytest.mark.parametrize("weight_init", ["", "jax", "moco", "skip"])
@pytest.mark.parametrize("again", [False, True])
def test_mimetic_attention(weight_init, again):
    torch.manual_seed(0)
    model = timm.create_model("kat_micro_patch2_8", attn_init="mimetic", weight_init=weight_init)
    if again:
        before = model.blocks[0].attn.proj.weight.clone()
        model.init_weights()
        assert not torch.equal(model.blocks[0].attn.proj.weight, before)
    width = model.embed_dim
    for block in model.blocks:
        heads, values = mimetic_parts(block.attn)
        noise = (values + 0.4 * torch.eye(width)) / 0.4
        assert noise.mean().item() == pytest.approx(0, abs=0.005)
        assert noise.var().item() * width == pytest.approx(1, rel=0.06)  # 9216 entries: standard error 0.015
        for head in heads:
            # of 0.7 Z + 0.7 I the largest third of the singular values remains, and they lean to the diagonal
            singular = torch.linalg.svdvals(head)
            assert singular[31] > 0.5
            assert singular[32:].max() < 1e-5
            assert 0.25 < head.diagonal().mean() < 0.6
            assert abs((head.sum() - head.trace()) / width**1.5) < 0.05
        assert not block.attn.qkv.bias.any()


def test_a_single_head_is_the_whole_of_what_was_drawn():
    torch.manual_seed(0)
    heads, _ = mimetic_parts(MimeticAttention(96, num_heads=1))
    noise = (heads[0] - 0.7 * torch.eye(96)) / 0.7
    assert noise.mean().item() == pytest.approx(0, abs=0.005)
    assert noise.var().item() * 96 == pytest.approx(1, rel=0.06)
    assert noise.diagonal().mean().item() == pytest.approx(0, abs=0.05)  # standard error 0.01
    assert (noise * noise.T).mean().item() * 96 == pytest.approx(0, abs=0.06)  # independent on both sides of it


def test_mimetic_attention_under_fix_init_and_on_meta():
    with torch.device("meta"):
        model = timm.create_model("kat_micro_patch2_8", attn_init="mimetic", fix_init=True)
    model.to_empty(device="cpu")
    model.init_weights()
    _, values = mimetic_parts(model.blocks[1].attn)
    assert values.diagonal().mean().item() == pytest.approx(-0.4 / 2, abs=0.02)  # divided by sqrt(2 (1 + 1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"weight_init": "x"}, "weight_init must be '' or 'jax' or 'jax_nlhb' or 'moco' or 'reset' or 'skip'; got 'x'"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "block_fn must use mlp_layer"),
        ({"num_groups": 7}, "in_features must be divisible by num_groups, 7; got 96"),
        ({"mlp_ratio": 3.1}, "hidden_features must be divisible by num_groups, 8; got 297"),
        ({"mlp_init": "xavier"}, "mlp_init must be 'variance_preserving' or 'trunc_normal'; got 'xavier'"),
        ({"attn_init": "svd"}, "attn_init must be None or 'mimetic'; got 'svd'"),
        ({"attn_init": "mimetic", "attn_layer": nn.Identity}, "attn_layer must be left out with attn_init='mimetic'"),
        ({"act_init": "swish"}, "act_init must be a pair"),
        ({"form": "A"}, "form must be"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        timm.create_model("kat_micro_patch2_8", **arguments)


@pytest.mark.parametrize("mlp_layer", [timm.layers.Mlp, timm.layers.SwiGLU])
def test_an_mlp_layer_that_is_no_grkan(mlp_layer):
    with pytest.raises(TypeError, match="mlp_layer must be GRKAN, or take its arguments num_groups, order, "):
        timm.create_model("kat_micro_patch2_8", mlp_layer=mlp_layer)


class Doubled(GRKAN):
    def forward(self, x):
        return 2 * super().forward(x)


def test_an_mlp_layer_and_a_block_that_use_grkan():
    blocks = timm.models.vision_transformer.ParallelThingsBlock
    model = timm.create_model("kat_micro_patch2_8", mlp_layer=Doubled, block_fn=blocks, num_groups=4)
    assert len(no_weight_decay(model)) == 2 * 4 * len(model.blocks)
    assert {type(m) for m in model.modules() if isinstance(m, GRKAN)} == {Doubled}
    assert model(images(model)).isfinite().all()


def test_an_unknown_start_of_the_twin():
    with pytest.raises(ValueError, match=r"weight_init must be '' or .* got 'x'"):
        timm.create_model("grkan_vit_micro_patch2_8", weight_init="x")
    with pytest.raises(ValueError, match="mlp_init must be None or 'variance_preserving' or 'trunc_normal'; got 'x'"):
        timm.create_model("grkan_vit_micro_patch2_8", mlp_init="x")


def test_arguments_reach_the_layers():
    model = timm.create_model(
        "kat_micro_patch2_8",
        num_groups=4,
        order=(7, 6),
        act_init=("gelu", "tanh"),
        form="sum_of_abs",
        share_numerator=True,
        proj_drop_rate=0.1,
        scale_mlp_norm=True,
        init_values=1e-5,
    )
    for block in model.blocks:
        assert repr(block.mlp.act1) == (
            "GroupRational(num_groups=4, order=(7, 6), init=gelu, form=sum_of_abs, share_numerator=True)"
        )
        assert block.mlp.act2.init_name == "tanh"
        assert block.mlp.drop1.p == block.mlp.drop2.p == 0.1
        assert isinstance(block.mlp.norm, nn.LayerNorm)
    assert model(images(model)).isfinite().all()


def test_pretrained_weights_do_not_exist_and_checkpoints_load(tmp_path):
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("kat_micro_patch2_8", pretrained=True)
    model = timm.create_model("kat_micro_patch2_8")
    torch.save(model.state_dict(), tmp_path / "m.pth")
    other = timm.create_model("kat_micro_patch2_8", checkpoint_path=str(tmp_path / "m.pth"))
    x = images(model)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", [name for name in KATS if "micro" in name])
def test_compile(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    x = images(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for (parameter_name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=parameter_name)


@pytest.mark.parametrize("name", KATS)
def test_autocast(name):
    torch.manual_seed(0)
    model = sized(name)
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), model(x), rtol=0.1, atol=0.1)
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    torch.manual_seed(0)
    model = timm.create_model("kat_micro_patch2_8")
    x = images(model)
    expected = model(x)
    model.to(dtype)
    coefficients = no_weight_decay(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in coefficients else dtype), name
    output = model(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


def test_deepcopy_and_state_dict():
    model = timm.create_model("kat_micro_patch2_8").eval()
    x = images(model)
    other = timm.create_model("kat_micro_patch2_8").eval()
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("node", ["blocks.1.mlp", "blocks.1.mlp.act1", "blocks.1.mlp.fc2"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_feature_extraction(library, node):
    """A tracer sees the parts of a GRKAN, which are one operation otherwise."""
    torch.manual_seed(0)
    model = timm.create_model("kat_micro_patch2_8").eval()
    if library == "timm":
        extractor = timm.models.create_feature_extractor(model, [node])
    else:
        extractor = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor(model, [node])
    x, seen = images(model, 3), []
    found = extractor(x)
    found = found[node] if isinstance(found, dict) else found[0]
    model.get_submodule(node).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    torch.testing.assert_close(found, seen[0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("name", [name for name in KATS if "micro" in name])
def test_torchscript(name, how):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x, y = images(model, 2), images(model, 3)
    program = torch.jit.script(model) if how == "script" else torch.jit.trace(model, (x,))
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(y), model(y))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_onnx(tmp_path, backend):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = timm.create_model("kat_micro_patch2_8").eval()
    x = images(model, 3)
    path = tmp_path / "kat.onnx"
    with set_backend(backend), torch.no_grad():
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-4, atol=1e-4)
