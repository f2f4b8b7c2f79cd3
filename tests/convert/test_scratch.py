"""convert_(start="scratch"): every MLP keeps the variance, whatever initialises the model afterwards, and learns."""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import grkan
from grkan.convert import apply_conversion_, convert_
from grkan.convert.recipe import recipe_of
from grkan.nn import GRKAN, GroupRational

timm = pytest.importorskip("timm", reason="some of the models are timm's")
t = pytest.importorskip("transformers", reason="most of the models are transformers'")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
T5 = {"vocab_size": 99, "d_model": 64, "d_ff": 256, "d_kv": 16, "num_layers": 2, "num_heads": 4}
SWIN = {"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
CONVNEXT = {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}

FAMILIES = {
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=99, **SIZES)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=99, **GPT2)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=99, **SIZES)),
    "t5": lambda: t.T5EncoderModel(t.T5Config(**T5)),
    "t5_gated": lambda: t.T5EncoderModel(t.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, num_labels=4, **SIZES)),
    "swin": lambda: t.SwinModel(t.SwinConfig(image_size=32, patch_size=2, **SWIN)),
    "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(image_size=32, **CONVNEXT)),
    "timm_vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=4),
    "timm_swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=4, **SWIN),
    "timm_convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 0, 0), dims=(64, 64, 64, 64)),
    "timm_eva": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=4),
}


@pytest.fixture(autouse=True)
def _quiet():
    t.logging.set_verbosity_error()


def build(family):
    torch.manual_seed(0)
    return FAMILIES[family]()


def inputs(model, images=4):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, t.PreTrainedModel) and model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(5, 99, (8, 32), generator=generator)}
    size = 28 if isinstance(model, timm.models.Eva) else 32
    images = torch.randn(images, 3, size, size, generator=generator)
    return {"pixel_values": images} if isinstance(model, t.PreTrainedModel) else {"x": images}


def ratios(model):
    """The mean square of what each MLP gives, by that of what it takes."""
    modules, found, handles = {name.removesuffix(".linear"): m for name, m in model.named_modules()}, [], []
    for layer in (layer for layer in recipe_of(model).layers if layer.gains):  # BERT's head has one without
        names, kept = [name for name in modules if name in layer.gains], {}

        def enter(_, inputs, kept=kept):
            kept["x"] = inputs[0]

        def leave(_, inputs, output, kept=kept):
            found.append(float(output.square().mean() / kept["x"].square().mean()))

        handles.append(modules[names[0]].register_forward_pre_hook(enter))
        handles.append(modules[names[-1]].register_forward_hook(leave))
    with torch.no_grad():
        copy.copy(model).eval()(**inputs(model))
    for handle in handles:
        handle.remove()
    return found


def assert_preserves_the_variance(model):
    found = ratios(model)
    assert len(found) == 2
    assert all(0.8 < ratio < 1.25 for ratio in found), found


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """A converted model, which no test changes."""
    model = build(request.param)
    report = convert_(model, start="scratch")
    assert sum(bool(layer["gains"]) for layer in report.recipe["layers"]) == 2
    assert report.cosine is report.relative_error is None
    assert all(layer["relative_error"] is None for layer in report.layers)
    assert str(report).count("\n") >= 3
    return model.eval()


def test_every_mlp_preserves_the_variance(model):
    assert_preserves_the_variance(model)
    starts = {rational.init_name for rational in model.modules() if isinstance(rational, GroupRational)}
    assert starts <= {"identity", "swish"}
    assert "swish" in starts


def test_initialisers_that_run_afterwards_change_nothing(model):
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    if isinstance(model, t.PreTrainedModel):
        for module in model.modules():
            vars(module).pop("_is_hf_initialized", None)
        model.init_weights()
        assert_preserves_the_variance(model)
        model.apply(model._init_weights)
    else:
        if hasattr(model, "init_weights"):
            model.init_weights()
            assert_preserves_the_variance(model)
        convnext = isinstance(model, timm.models.ConvNeXt)
        vit, next_ = timm.models.vision_transformer.init_weights_vit_timm, timm.models.convnext._init_weights
        timm.models.named_apply(partial(next_, head_init_scale=1.0) if convnext else vit, model)
    assert_preserves_the_variance(model)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert_preserves_the_variance(model)


def test_a_config_with_the_recipe_makes_such_a_model(model, tmp_path):
    if not isinstance(model, t.PreTrainedModel):
        pytest.skip("timm's models have no config")
    other = type(model)._from_config(model.config)
    # A model inside of another one is converted, and so named, before what is around it.
    assert {layer.name: layer for layer in recipe_of(other).layers} == {
        layer.name: layer for layer in recipe_of(model).layers
    }
    assert_preserves_the_variance(other)
    other.post_init()
    assert_preserves_the_variance(other)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    loaded.init_weights()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5_gated"])
def test_weights_that_a_checkpoint_lacks_are_drawn_like_this(family, tmp_path):
    model = build(family)
    convert_(model, start="scratch")
    lost = tuple(recipe_of(model).layers[1].gains)
    state = {name: p for name, p in model.state_dict().items() if not name.startswith(lost)}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert_preserves_the_variance(loaded.eval())


def test_timm_makes_it_again(tmp_path):
    model = build("timm_vit").eval()
    convert_(model, start="scratch")
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert recipe_of(loaded) == recipe_of(model)
    assert torch.equal(loaded(**inputs(model)), model(**inputs(model)))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5_gated", "vit", "timm_swin", "timm_convnext"])
def test_it_learns(family):
    model = build(family)
    convert_(model, start="scratch")
    model.train()
    torch.manual_seed(0)
    batch = inputs(model, images=8)
    head = nn.LazyLinear(4) if family == "t5_gated" else nn.Identity()
    tokens = batch.get("input_ids")
    labels = torch.arange(8) % 4 if tokens is None or family == "t5_gated" else tokens

    def loss():
        output = model(**batch)
        if family == "t5_gated":
            logits = head(output.last_hidden_state.mean(1))
        else:
            logits = output if isinstance(output, torch.Tensor) else output.logits
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    first = float(loss().detach())
    optimiser = torch.optim.AdamW([*grkan.param_groups(model, 0.01), {"params": head.parameters()}], lr=3e-3)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name in grkan.no_weight_decay(model)}
    for _ in range(25):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert float(loss().detach()) < 0.6 * first
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start)


class Gated(nn.Module):
    def __init__(self, width=256, hidden=1024, norm=False, fused=False):
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(width, 2 * hidden)
        else:
            self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        u, v = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(self.norm(self.act(u) * v))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_gate_is_drawn_with_gain_one_and_what_is_behind_with_that_of_its_function(norm, fused):
    torch.manual_seed(0)
    model = Gated(norm=norm, fused=fused)
    convert_(model, start="scratch")
    for linear in [model.gate_up] if fused else [model.gate, model.up]:
        assert float(linear.weight.detach().var() * 256) == pytest.approx(1.0, rel=0.02)
        assert not linear.bias.any()
    alpha = 1.0 if norm else grkan.variance_gain("swish")
    assert float(model.down.weight.detach().var() * 1024) == pytest.approx(alpha, rel=0.02)
    x = torch.randn(512, 256)
    assert float(model(x).detach().square().mean()) == pytest.approx(1.0, rel=0.05)


class OfTwo(Gated):
    """It cannot be run without knowing what it takes, so the channels of its activation are not known."""

    def forward(self, x, y):
        return super().forward(x + y)


def test_layers_are_drawn_where_the_channels_are_not_known():
    torch.manual_seed(0)
    model = OfTwo()
    report = convert_(model, start="scratch")
    assert report.layers[0]["groups"] == 1
    gains = recipe_of(model).layers[0].gains
    assert gains == {"gate": 1.0, "up": 1.0, "down": pytest.approx(grkan.variance_gain("swish"), rel=1e-3)}


class Experts(nn.Module):
    """Two gated MLPs whose weights are stacked, as (experts, outputs, inputs) or transposed."""

    def __init__(self, transposed=False):
        super().__init__()
        self.transposed = transposed
        shapes = [(2, 512, 128), (2, 128, 256)]
        shapes = [(a, c, b) for a, b, c in shapes] if transposed else shapes
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.down_proj_bias, self.act = nn.Parameter(torch.randn(2, 128)), nn.SiLU()

    def forward(self, x):
        up, down = (w if self.transposed else w.mT for w in (self.gate_up_proj, self.down_proj))
        gate, up = (x @ up).chunk(2, -1)
        return (self.act(gate) * up) @ down + self.down_proj_bias[:, None]


@pytest.mark.parametrize("transposed", [False, True])
def test_each_of_stacked_experts_preserves_the_variance(transposed):
    torch.manual_seed(0)
    model = Experts(transposed)
    x = torch.randn(2, 512, 128)
    recipe = convert_(model, start="scratch", calibration=x).recipe
    assert list(recipe["layers"][0]["gains"]) == ["gate_up_proj", "down_proj"]
    other = Experts(transposed)
    apply_conversion_(other, json.loads(json.dumps(recipe)))
    for experts in (model, pickle.loads(pickle.dumps(copy.deepcopy(other)))):
        assert not experts.down_proj_bias.any()
        assert experts(x).square().mean((1, 2)).tolist() == pytest.approx([1.0, 1.0], rel=0.1)
    recipe["layers"][0]["gains"]["down_proj_bias"] = [1.0, 2]
    with pytest.raises(ValueError, match="down_proj_bias is not a parameter that stacks the weights of several"):
        apply_conversion_(Experts(transposed), recipe)


def test_initialisers_that_run_afterwards_do_not_change_experts():
    sizes = {**SIZES, "num_local_experts": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = t.MixtralModel(t.MixtralConfig(vocab_size=99, **sizes))
    convert_(model, start="scratch")
    other = t.MixtralModel(model.config)
    for made in (model, other):
        made.apply(made._init_weights)
        experts = made.layers[1].mlp.experts
        assert float(experts.gate_up_proj.detach().var() * 64) == pytest.approx(1.0, rel=0.03)
        alpha = grkan.variance_gain("swish")
        assert float(experts.down_proj.detach().var() * 256) == pytest.approx(alpha, rel=0.03)


class Odd(nn.Module):
    """Two linear layers that could be in front."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.GELU()
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.act(self.a(x)) * self.b(x) + self.c(x))


def test_where_it_is_not_clear_what_to_draw_the_weights_stay_and_are_named():
    model = Odd()
    state = copy.deepcopy(model.state_dict())
    report = convert_(model, start="scratch", include="*")
    assert isinstance(model.act, GroupRational)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert report.skipped == [
        ("", "its weights are not redrawn, because it is unclear which linear layers belong to it")
    ]


def mlp():
    return timm.layers.Mlp(16, 32)


@pytest.mark.parametrize(
    ("start", "act_init", "starts"),
    [
        ("pretrained", None, ["identity", "gelu"]),
        ("pretrained", ("identity", "silu"), ["identity", "silu"]),
        ("scratch", None, ["identity", "swish"]),
        ("scratch", ("gelu", None), ["gelu", "gelu"]),
        ("scratch", ("identity", torch.tanh), ["identity", "tanh"]),
        ("scratch", ("identity", ([0.0, 2.0, 0, 0, 0, 0], [0.0] * 4)), ["identity", "tuple"]),
    ],
)
def test_act_init(start, act_init, starts):
    torch.manual_seed(0)
    model = mlp()
    report = convert_(model, start=start, act_init=act_init)
    assert [model.act1.init_name, model.act2.init_name] == starts
    assert (report.layers[0]["rms_error"] is None) == (start == "scratch" or act_init is not None)
    if start == "scratch":
        values = model.act2.to_function(0)(torch.randn(4096, dtype=torch.float64).numpy())
        expected = 1 / float((values**2).mean())
        assert recipe_of(model).layers[0].gains["fc2"] == pytest.approx(expected, rel=0.1)
    else:
        assert recipe_of(model).layers[0].gains == {}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"start": "random"}, ValueError, "start must be 'pretrained' or 'scratch'; got 'random'"),
        ({"start": 1}, TypeError, "start must be"),
        ({"act_init": "swish"}, ValueError, "act_init must be a pair"),
        ({"act_init": (None, "swish")}, ValueError, "act_init must be a pair"),
        ({"act_init": ("identity", "swihs")}, ValueError, "act_init must be one of"),
        ({"act_init": ("identity", 3)}, TypeError, "init must be"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(arguments, error, match):
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        convert_(model, **arguments)
    assert type(model) is timm.layers.Mlp
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_recipe_draws_anew():
    model = mlp()
    recipe = json.loads(json.dumps(convert_(model, start="scratch").recipe))
    other = mlp()
    with torch.no_grad():
        other.fc1.weight.zero_(), other.fc2.weight.zero_()
    apply_conversion_(other, recipe)
    assert isinstance(other, GRKAN)
    assert other.fc1.weight.all()
    assert other.fc2.weight.all()
    recipe["layers"][0]["gains"]["fc2"] = -1.0
    with pytest.raises(ValueError, match=r"gains in layer 0 of recipe must be positive numbers; got -1\.0 for 'fc2'"):
        apply_conversion_(mlp(), recipe)
    recipe["layers"][0]["gains"] = {"act": 1.0}
    with pytest.raises(ValueError, match="act is not a plain linear layer but a GELU"):
        apply_conversion_(mlp(), recipe)


def test_a_failure_undoes_it(monkeypatch):
    model = build("timm_vit")
    names = {name: set(vars(module)) for name, module in model.named_modules()}

    def fail(*_):
        raise KeyError("stopped")

    monkeypatch.setattr("grkan.convert.recipe.RECORDERS", [fail])
    with pytest.raises(KeyError, match="stopped"):
        convert_(model, start="scratch")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names


def test_on_the_meta_device_it_starts_when_it_is_materialised():
    with torch.device("meta"):
        model = build("gpt2")
    convert_(model, start="scratch")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    model.apply(model._init_weights)
    assert_preserves_the_variance(model)


def test_what_is_not_written_to_stays():
    model = build("timm_vit")
    convert_(model, start="scratch")
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    timm.models.named_apply(timm.models.vision_transformer.init_weights_vit_timm, model.blocks[1])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("blocks.1.") for name in changed)
