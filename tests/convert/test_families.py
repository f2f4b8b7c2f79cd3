"""Every family of transformers, with random weights: what is converted, and how near the outputs stay.

Small models by default; those of the published sizes, whose figures are in docs/transfer.md, with

    python -m pytest tests/convert/test_families.py -m full_size -s
"""

import contextlib
import time
from functools import partial

import pytest
import timm
import torch
from torch import nn

import grkan
from grkan.convert import convert_
from grkan.nn import GRKAN, GroupRational, RationalLinear

SMOOTH, KINKED = 0.01, 0.02


def stirred(model, seed=0):
    """The model with weights that make every layer matter: norms and biases as training leaves them, not 1 and 0.

    T5 does not divide queries times keys by the root of their width: its queries are that much smaller from the start.
    Without, the softmax of a full size takes one token alone, and any change of 1e-4 in the MLPs is 1e-2 at the output.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise / p[0].numel() ** 0.5 if "embed" not in name else 0.5 * noise)
                if name.endswith("Attention.q.weight"):
                    p.mul_(model.config.d_kv**-0.5)
            else:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
    return model.eval()


def first_float(output):
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "values"):
        output = list(output.values())
    return next(t for t in map(first_float, output) if t.is_floating_point())


def run(model, batch):
    with torch.no_grad():
        return first_float(model(**batch) if isinstance(batch, dict) else model(batch))


def images(n, channels=3, size=32, seed=1):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(n, length=16, seed=1):
    return torch.randint(5, 99, (n, length), generator=torch.Generator().manual_seed(seed))


def check(model, make, layers, bound=SMOOTH, skipped=(), prepare=stirred, groups=2):
    """Convert, calibrated on inputs of make(0); the output for those of make(1) has to stay within the bound.

    A function for more channels fits no better, and fewer functions take less time.
    """
    model = prepare(model)
    parameters = {id(p) for p in model.parameters()}
    modules, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    before = run(model, make(1))
    start = time.perf_counter()
    report = convert_(model, calibration=[make(0)], num_groups=groups)
    seconds = time.perf_counter() - start
    after = run(model, make(1))
    assert len(report.layers) == layers, str(report)
    assert [name.rpartition(".")[2] for name, _ in report.skipped] == list(skipped), report.skipped
    error = float((after - before).norm() / before.norm())
    assert error < bound, f"{error:.4f}\n{report}"
    assert error > 0
    print(f"{len(report.layers)} layers, {len(report.skipped)} skipped, error {error:.1e}, {seconds:.0f} s")
    now = {id(p): name for name, p in model.named_parameters()}
    assert parameters <= set(now)
    assert {now[new].rpartition(".")[2] for new in set(now) - parameters} == {"numerator", "denominator"}
    assert_little_changed(model, report, modules)
    # The state dict of the model as it was loads: what is missing are the coefficients.
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == grkan.no_weight_decay(model)
    assert unexpected == []
    assert torch.equal(run(model, make(1)), after)
    return model, report


def assert_little_changed(model, report, before):
    """Apart from the activations and the first linear layers, every module is under its name what it was."""
    now = dict(model.named_modules())
    replaced, wrapped, grkans = set(), set(), set()
    for layer in report.recipe["layers"]:
        replaced.add(layer["activation"])
        if layer["layout"] == "linear":
            wrapped.add(layer["linear"])
        elif layer["layout"] == "grkan":
            grkans.add(layer["name"])
    for name, module in before.items():
        if name in wrapped:
            assert type(now[name]) is RationalLinear
            assert now[name].linear is module
        elif name in grkans:
            assert now[name] is module
            assert type(module) is GRKAN
        elif name not in replaced:
            assert now[name] is module
    for layer in report.recipe["layers"]:
        act = now[layer["name"]].act2 if layer["layout"] == "grkan" else now[layer["activation"]]
        assert type(act) is GroupRational


CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}
SWIN = {"img_size": 32, "depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2), "window_size": 4}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48}, 2),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48}, 2),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}, 2),
    "eva, gated": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, 2),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 2),
    "cait": ("cait_xxs24_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}, 4),
    "mixer": (timm.models.MlpMixer, {"img_size": 32, "patch_size": 8, "num_blocks": 1, "embed_dim": 48}, 2),
    "convnext": (timm.models.ConvNeXt, CONVNEXT, 4),
    "convnext, 1x1 convolutions": (timm.models.ConvNeXt, {**CONVNEXT, "conv_mlp": True}, 4),
    "convnext, with a norm in between": (timm.models.ConvNeXt, {**CONVNEXT, "use_grn": True}, 4),
    "convnext, both": (timm.models.ConvNeXt, {**CONVNEXT, "conv_mlp": True, "use_grn": True}, 4),
}
IN_PLACE = ("eva, gated", "convnext, with a norm in between", "convnext, both")


@pytest.mark.parametrize("family", TIMM)
def test_timm(family):
    name, arguments, layers = TIMM[family]
    make = name if callable(name) else partial(timm.create_model, name)
    model = make(num_classes=10, **arguments)
    size = arguments.get("img_size", 32)
    model, report = check(model, lambda seed: images(8, size=size, seed=seed), layers)
    layouts = {layer["layout"] for layer in report.layers}
    assert layouts == ({"activation"} if family in IN_PLACE else {"grkan"})
    assert sum(isinstance(m, GRKAN) for m in model.modules()) == (layers if layouts == {"grkan"} else 0)


@pytest.mark.parametrize(
    ("activation", "bound"), [("relu", KINKED), ("silu", SMOOTH), ("hard_swish", KINKED), ("tanh", SMOOTH)]
)
def test_other_activations(activation, bound):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, act_layer=activation)
    _, report = check(model, lambda seed: images(8, seed=seed), 2, bound)
    assert {layer["activation"] for layer in report.layers} == {activation.replace("hard_", "hard")}


def text(transformers, name, **arguments):
    """A small model of transformers; and what makes a batch of tokens for it."""
    sizes = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "pad_token_id": 0, **arguments,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}Model")(config), lambda seed: {"input_ids": tokens(8, seed=seed)}


def gpt2(t):
    config = t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return t.GPT2Model(config), lambda seed: {"input_ids": tokens(8, seed=seed)}


def clip(t):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = t.CLIPConfig(
        text_config={"vocab_size": 99, "eos_token_id": 98, **sizes},
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
        projection_dim=16,
    )
    return t.CLIPModel(config), lambda seed: {"input_ids": tokens(8, seed=seed), "pixel_values": images(8, seed=seed)}


def whisper(t):
    config = t.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return t.WhisperModel(config), lambda seed: {
        "input_features": torch.randn(8, 8, 32, generator=torch.Generator().manual_seed(seed)),
        "decoder_input_ids": tokens(8, seed=seed),
    }


def t5(t, gated):
    config = t.T5Config(
        vocab_size=99, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    return t.T5EncoderModel(config), lambda seed: {"input_ids": tokens(8, seed=seed)}


def vision(t, name, **arguments):
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8, **arguments,
    }  # fmt: skip
    return getattr(t, f"{name}Model")(getattr(t, f"{name}Config")(**sizes)), lambda seed: {
        "pixel_values": images(8, seed=seed)
    }


HUGGING_FACE = {
    "bert": (lambda t: text(t, "Bert"), 2, "linear", ["activation"]),  # the pooler has one linear layer
    "roberta": (lambda t: text(t, "Roberta"), 2, "linear", ["activation"]),
    "gpt2": (gpt2, 2, "linear", []),
    "vit": (lambda t: vision(t, "ViT"), 2, "linear", ["activation"]),
    "deit": (lambda t: vision(t, "DeiT"), 2, "linear", ["activation"]),
    "dinov2": (lambda t: vision(t, "Dinov2", mlp_ratio=2), 2, "linear", []),
    "clip": (clip, 4, "linear", []),
    "whisper": (whisper, 4, "linear", ["encoder", "encoder"]),  # the convolutional stem
    "t5": (lambda t: t5(t, gated=False), 2, "linear", []),
    "t5 1.1, gated": (lambda t: t5(t, gated=True), 2, "activation", []),
    "llama, gated": (lambda t: text(t, "Llama"), 2, "activation", []),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_transformers(family):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    make, layers, layout, skipped = HUGGING_FACE[family]
    model, batch = make(transformers)
    bound = KINKED if family == "t5" else SMOOTH
    model, report = check(model, batch, layers, bound, skipped)
    assert {layer["layout"] for layer in report.layers} == {layout}
    assert sum(isinstance(m, RationalLinear) for m in model.modules()) == (layers if layout == "linear" else 0)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_torchvision(family):
    models = pytest.importorskip("torchvision").models
    if family == "vit":
        model = models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    elif family == "swin":
        model = models.SwinTransformer([4, 4], 32, [1, 1], [1, 2], [4, 4], num_classes=10)
    else:
        block = models.convnext.CNBlockConfig
        model = models.ConvNeXt([block(32, 48, 1), block(48, None, 1)], num_classes=10)
    _, report = check(model, lambda seed: images(8, seed=seed), 2)
    assert {layer["layout"] for layer in report.layers} == {"linear"}


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder(activation, norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=True, norm_first=norm_first)
    with contextlib.nullcontext() if not norm_first else pytest.warns(UserWarning, match="nested"):
        model = nn.TransformerEncoder(layer, 2)

    def make(seed):
        return torch.randn(8, 6, 32, generator=torch.Generator().manual_seed(seed))

    model, report = check(model, make, 2, KINKED if activation == "relu" else SMOOTH)
    assert {layer["layout"] for layer in report.layers} == {"linear"}
    for converted in model.layers:
        assert converted.activation_relu_or_gelu == 0
        assert isinstance(converted.activation, GroupRational)
        assert isinstance(converted.linear1, RationalLinear)
        assert type(converted.linear2) is nn.Linear


@pytest.mark.parametrize("calibrated", ["padded", "plain", None])
@pytest.mark.parametrize("nested", [True, False])
def test_torch_encoder_with_a_padding_mask(nested, calibrated):
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    model = stirred(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 5:] = mask[2, 3:] = True

    def forward(model, x):
        return model(x, src_key_padding_mask=mask)

    with torch.no_grad():
        before = forward(model, x)
        report = convert_(
            model, calibration=None if calibrated is None else x, forward=forward if calibrated == "padded" else None
        )
        after = forward(model, x)
    assert {layer["layout"] for layer in report.layers} == {"linear"}
    error = float((after - before)[~mask].norm() / before[~mask].norm())
    assert 0 < error < (0.05 if calibrated is None else SMOOTH)
    torch.testing.assert_close(forward(model, x)[~mask], after[~mask], rtol=1e-4, atol=1e-4)  # with gradients


def test_torch_decoder():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(model, batch):
        return model(batch, batch)

    model = stirred(model)
    x = torch.randn(8, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x, x)
        report = grkan.convert_(model, calibration=x, forward=forward)
        after = model(x, x)
    assert len(report.layers) == 2
    assert float((after - before).norm() / before.norm()) == pytest.approx(report.relative_error, rel=1e-3)
    assert report.relative_error < KINKED


def test_beside_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, batch = text(transformers, "Bert")
    stirred(model).save_pretrained(tmp_path)
    recipe = convert_(model, calibration=[batch(0)]).recipe
    with torch.no_grad():
        model.encoder.layer[0].intermediate.intermediate_act_fn.numerator += 0.1  # as training would
    again = transformers.BertModel.from_pretrained(tmp_path)
    grkan.apply_conversion_(again, recipe)
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again.eval(), batch(1)), run(model, batch(1)))


def pictures(n=8, size=224):
    return lambda seed: images(n, size=size, seed=seed)


def pixels(n=8):
    return lambda seed: {"pixel_values": images(n, size=224, seed=seed)}


def words(vocabulary, n=16, length=128, also=()):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {key: torch.randint(5, vocabulary, (n, length), generator=generator) for key in ("input_ids", *also)}

    return make


def vectors(*shape):
    return lambda seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def speech(seed):
    text = words(50000, 2, 64)(seed)["input_ids"]
    return {"input_features": vectors(2, 80, 3000)(seed), "decoder_input_ids": text}


class Decoder(nn.Module):
    def __init__(self, activation):
        super().__init__()
        layer = nn.TransformerDecoderLayer(512, 8, 2048, activation=activation, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 6)

    def forward(self, x):
        return self.decoder(x, x.flip(1))


def encoder(activation):
    layer = nn.TransformerEncoderLayer(512, 8, 2048, activation=activation, batch_first=True)
    return nn.TransformerEncoder(layer, 6)


def hugging_face(name, **arguments):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**arguments))


def vision_models(name):
    model = getattr(pytest.importorskip("torchvision").models, name)()
    if name.startswith("vit"):  # its head starts at zero
        model.heads = nn.Identity()
    return model


T5_V1_1 = {"feed_forward_proj": "gated-gelu", "d_ff": 1024, "num_layers": 8, "num_heads": 6}
LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
POOLER = ["activation"]
# What makes the model; its inputs; how many MLPs it has; the bound; what is skipped.
FULL_SIZE = {
    **{
        f"timm {name}": (partial(timm.create_model, name), pictures(), layers, SMOOTH, [])
        for name, layers in {
            "vit_base_patch16_224": 12,
            "deit_small_distilled_patch16_224": 12,
            "beit_base_patch16_224": 12,
            "eva02_small_patch14_224": 12,
            "swin_tiny_patch4_window7_224": 12,
            "cait_xxs24_224": 26,
            "convnext_tiny": 18,
            "convnextv2_tiny": 18,
        }.items()
    },
    # A Mixer's head starts at zero: its features in place of its logits.
    "timm mixer_b16_224": (partial(timm.create_model, "mixer_b16_224", num_classes=0), pictures(), 24, SMOOTH, []),
    "transformers Bert": (partial(hugging_face, "Bert"), words(30000), 12, SMOOTH, POOLER),
    "transformers Roberta": (partial(hugging_face, "Roberta"), words(30000), 12, SMOOTH, POOLER),
    "transformers GPT2": (partial(hugging_face, "GPT2"), words(50000), 12, SMOOTH, []),
    "transformers ViT": (partial(hugging_face, "ViT"), pixels(), 12, SMOOTH, POOLER),
    "transformers DeiT": (partial(hugging_face, "DeiT"), pixels(), 12, SMOOTH, POOLER),
    "transformers Dinov2": (partial(hugging_face, "Dinov2"), pixels(), 12, SMOOTH, []),
    "transformers CLIPText": (partial(hugging_face, "CLIPText"), words(49000, 32, 77), 12, SMOOTH, []),
    "transformers CLIPVision": (partial(hugging_face, "CLIPVision"), pixels(), 12, SMOOTH, []),
    "transformers Whisper": (partial(hugging_face, "Whisper"), speech, 8, SMOOTH, ["encoder", "encoder"]),
    "transformers T5": (partial(hugging_face, "T5"), words(32000, also=["decoder_input_ids"]), 12, KINKED, []),
    "transformers T5 1.1": (
        partial(hugging_face, "T5", **T5_V1_1), words(32000, also=["decoder_input_ids"]), 16, SMOOTH, [],
    ),
    "transformers Llama": (partial(hugging_face, "Llama", **LLAMA), words(32000), 12, SMOOTH, []),
    "torchvision vit_b_16": (partial(vision_models, "vit_b_16"), pictures(), 12, SMOOTH, []),
    "torchvision swin_t": (partial(vision_models, "swin_t"), pictures(), 12, SMOOTH, []),
    "torchvision convnext_tiny": (partial(vision_models, "convnext_tiny"), pictures(), 18, SMOOTH, []),
    "torch encoder, ReLU": (partial(encoder, "relu"), vectors(16, 128, 512), 6, KINKED, []),
    "torch encoder, GELU": (partial(encoder, "gelu"), vectors(16, 128, 512), 6, SMOOTH, []),
    "torch decoder, ReLU": (partial(Decoder, "relu"), vectors(16, 128, 512), 6, KINKED, []),
    "torch decoder, GELU": (partial(Decoder, "gelu"), vectors(16, 128, 512), 6, SMOOTH, []),
}  # fmt: skip


@pytest.mark.full_size
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["own", "stirred"])
@pytest.mark.parametrize("family", FULL_SIZE)
def test_published_sizes(family, weights):
    make, inputs, layers, bound, skipped = FULL_SIZE[family]
    torch.manual_seed(0)
    print(f"\n{family}, {weights} weights: ", end="")
    check(make(), inputs, layers, bound, skipped, stirred if weights == "stirred" else nn.Module.eval, 8)
