"""convert_: what survives, what is refused, and that a refusal leaves the model as it was."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import grkan
from grkan.convert import ConversionReport, apply_conversion_, convert_
from grkan.convert.recipe import recipe_of
from grkan.nn import GRKAN, GroupRational, RationalLinear


class Block(nn.Module):
    """Parts that lie apart, as in BERT."""

    def __init__(self, act=None, width=16, dropout=0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 32), "act": act or nn.GELU()})
        self.output = nn.ModuleDict({"dense": nn.Linear(32, width), "dropout": nn.Dropout(dropout)})

    def forward(self, x):
        y = self.intermediate["act"](self.intermediate["dense"](self.norm(x)))
        return x + self.output["dropout"](self.output["dense"](y))


def sequential():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))


def data(n=64, width=16, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_gradients_unless_asked():
    with torch.no_grad():
        yield


def snapshot(model):
    modules = {name: (type(m), m.training, sorted(m._modules)) for name, m in model.named_modules()}
    return modules, {name: t.clone() for name, t in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, state = snapshot(model)
    assert modules == before[0]
    assert all(torch.equal(t, before[1][name]) for name, t in state.items())
    assert recipe_of(model) is None
    assert not any("reset_parameters" in vars(m) for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def mlp(width=16, **arguments):
    import timm

    return timm.layers.Mlp(width, 32, drop=(0.1, 0.2), **arguments)


def test_timms_mlp_becomes_a_grkan():
    model = mlp(norm_layer=nn.LayerNorm)
    parts, parameters, x = dict(model.named_children()), set(model.parameters()), data()
    state = copy.deepcopy(model.state_dict())
    before = model.eval()(x).detach()
    report = convert_(model, calibration=x)
    assert type(model) is GRKAN
    for name, part in parts.items():
        if name != "act":
            assert getattr(model, name) is part
    assert {p for name, p in model.named_parameters() if "act" not in name} == parameters
    assert torch.equal(model.act1(x), x)
    assert (model.act1.width, model.act2.width) == (16, 32)
    assert float((model(x).detach() - before).norm() / before.norm()) == pytest.approx(report.relative_error, rel=1e-3)
    assert report.relative_error < 0.01
    assert_loads(model, state)


def test_a_converted_mlp_can_start_anew():
    model = mlp(192)
    convert_(model, num_groups=4)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert 0.8 < model.eval()(data(1024, 192)).square().mean() < 1.25


def assert_loads(model, state):
    """The state dict of a model from before its conversion loads into it: what is missing are the coefficients."""
    state = {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == grkan.no_weight_decay(model)
    assert unexpected == []
    loaded = [t for t in model.state_dict().values() if any(torch.equal(t, s) for s in state.values())]
    assert len(loaded) >= len(state)


def test_a_sequential_keeps_its_children():
    model = sequential()
    children, x = list(model), data()
    state = copy.deepcopy(model.state_dict())
    before = model.eval()(x).detach()
    report = convert_(model, calibration=x)
    assert type(model) is nn.Sequential
    assert [type(child) for child in model] == [RationalLinear, GroupRational, nn.Dropout, nn.Linear]
    assert [model[0].linear, model[2], model[3]] == [children[0], children[2], children[3]]
    assert torch.equal(model[0].act(x), x)
    assert (model[0].act.width, model[1].width) == (16, 32)
    error = float((model(x).detach() - before).norm() / before.norm())
    assert error == pytest.approx(report.relative_error, rel=1e-3)
    assert error < 0.01
    model.train()
    with torch.enable_grad():
        model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert_loads(model, state)


def test_dropout_and_norm_keep_their_places():
    drops, norm = (nn.Dropout(0.1), nn.Dropout(0.2)), nn.LayerNorm(32)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), drops[0], norm, nn.Linear(32, 16), drops[1]), data()
    before = model.eval()(x)
    convert_(model, calibration=x)
    assert isinstance(model[1], GroupRational)
    assert (model[2], model[3], model[5]) == (drops[0], norm, drops[1])
    assert float((model(x) - before).norm() / before.norm()) < 0.01


def test_the_report_tells_the_truth():
    model, x = nn.Sequential(Block(), Block(nn.ReLU())), data()
    seen = []
    original = copy.deepcopy(model).double()
    for block in original:
        block.intermediate["act"].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    before = original.eval()(x.double())
    report = convert_(model, calibration=[x[:40], x[40:]], num_groups=4)
    assert [(layer["name"], layer["activation"], layer["groups"]) for layer in report.layers] == [
        ("0", "gelu", 4),
        ("1", "relu", 4),
    ]
    for block, layer, (z, y) in zip(model, report.layers, seen, strict=True):
        z, y = z.detach(), y.detach()
        error = block.intermediate["act"].double()(z) - y
        assert layer["samples"] == z.numel()
        # A bin is 1/64 wide.
        assert layer["rms_error"] == pytest.approx(error.square().mean().sqrt().item(), rel=0.1)
        assert layer["relative_error"] == pytest.approx(float(error.norm() / y.norm()), rel=0.1)
        assert layer["max_error"] >= 0.9 * error.abs().max()
        low, high = layer["interval"]
        assert low - 0.1 < z.min() and z.max() < high + 0.1  # noqa: PT018
    after = model.double().eval()(x.double())
    assert report.relative_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert report.cosine == pytest.approx(
        torch.cosine_similarity(after.flatten(), before.flatten(), 0).item(), abs=1e-6
    )
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    text = str(report)
    assert "gelu" in text and "relu" in text and "cosine" in text  # noqa: PT018


def test_dtypes_hooks_modes_and_requires_grad_survive():
    model = nn.Sequential(Block(), Block()).to(torch.bfloat16)
    model[0].requires_grad_(False)
    model[1].eval()
    calls = []
    handle = model[0].intermediate["dense"].register_forward_hook(lambda *_: calls.append(1))
    model[0].output["dense"].register_forward_hook(lambda *_: calls.append(2))
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    convert_(model, calibration=data().bfloat16())
    now = {name.replace(".linear", ""): (id(p), p.requires_grad) for name, p in model.named_parameters()}
    assert parameters.items() <= now.items()
    assert {name: m.training for name, m in model.named_modules() if name in modes} == modes
    assert model[0].intermediate["dense"].linear.training
    assert not any(m.training for m in model[1].modules())
    assert model[0].intermediate["act"].numerator.dtype == torch.float32
    calls.clear()
    assert model(data().bfloat16()).dtype == torch.bfloat16
    assert calls == [1, 2]
    handle.remove()
    model(data().bfloat16())
    assert calls == [1, 2, 2]


def test_a_model_in_float64_gets_coefficients_in_float64():
    model, x = nn.Sequential(Block(), sequential()).double(), data().double()
    convert_(model, calibration=x, num_groups=1)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_hook_of_the_activation_still_sees_its_output():
    model, outputs = nn.Sequential(Block(), Block()), []
    handle = model[0].intermediate["act"].register_forward_hook(lambda _m, _x, y: outputs.append(y))
    x = data()
    model.eval()(x)
    convert_(model, calibration=x)
    outputs[1:] = []
    model(x)
    assert isinstance(model[0].intermediate["act"], GroupRational)
    assert isinstance(model[0].intermediate["dense"], RationalLinear)
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.01
    handle.remove()
    model(x)
    assert len(outputs) == 2


@pytest.mark.parametrize("register", [name for name in dir(nn.Module) if re.fullmatch("_?register_.*_hook", name)])
def test_every_kind_of_hook_of_the_activation_is_kept(register):
    model, calls = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), []

    def hook(*_args, **_kwargs):
        calls.append([type(module) for module in _args if module is model[1]])

    def use():
        calls.clear()
        with torch.enable_grad():
            model(data().requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        return [len(modules) for modules in calls]

    handle = getattr(model[1], register)(hook)
    before = use()
    assert before
    convert_(model, calibration=data())
    assert isinstance(model[1], GroupRational)
    assert use() == before
    handle.remove()
    assert use() == []


def test_a_failure_leaves_the_hooks_with_the_activation(monkeypatch):
    model, calls = nn.Sequential(nn.Linear(16, 32), nn.PReLU(), nn.Linear(32, 16)), []
    model[1].register_load_state_dict_pre_hook(lambda module, *_: calls.append(module))
    state = model.state_dict()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("grkan.convert.recipe._remember", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_(model, calibration=data())
    model.load_state_dict(state)
    assert calls == [model[1]]
    assert isinstance(model[1], nn.PReLU)
    assert len(model[1]._load_state_dict_pre_hooks) == 1


def test_one_activation_for_several_layers_and_one_layer_twice():
    act = nn.GELU()
    first, second = Block(act), Block(act)
    model, x = nn.Sequential(first, second, first), data()
    before = model.eval()(x)
    report = convert_(model, calibration=x)
    assert len(report.layers) == 2
    assert model[0] is model[2]
    assert first.intermediate["act"] is not second.intermediate["act"]
    assert float((model(x) - before).norm() / before.norm()) < 0.01


def test_a_linear_layer_that_two_mlps_share():
    first, second = Block(nn.GELU()), Block(nn.Tanh())
    second.output["dense"] = first.output["dense"]
    model, x = nn.Sequential(first, second), data()
    before = model.eval()(x)
    report = convert_(model, num_groups=1)
    assert [layer["layout"] for layer in report.layers] == ["activation", "activation"]
    assert second.output["dense"] is first.output["dense"]
    assert type(second.output["dense"]) is nn.Linear
    assert float((model(x) - before).norm() / before.norm()) < 0.01


def test_a_first_layer_that_two_mlps_share():
    first, second = Block(nn.GELU()), Block(nn.Tanh())
    second.intermediate["dense"] = first.intermediate["dense"]
    model, x = nn.Sequential(first, second), data()
    before = model.eval()(x)
    report = convert_(model, num_groups=1)
    assert [layer["layout"] for layer in report.layers] == ["activation", "activation"]
    assert type(first.intermediate["dense"]) is nn.Linear
    assert float((model(x) - before).norm() / before.norm()) < 0.01


class Twice(nn.Module):
    """The activation is used once more, behind the second layer."""

    def __init__(self, between=None, again=False):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.GELU()
        self.between, self.again = between, again

    def forward(self, x):
        x = self.act(self.fc1(x))
        x = self.fc2(x if self.between is None else self.between(x))
        return self.act(x) if self.again else x


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("arguments", [{"again": True}, {"between": torch.exp}], ids=["used again", "more in between"])
def test_what_only_looks_like_an_mlp(arguments, calibrated):
    model, x = Twice(**arguments), data()
    before = model(x)
    report = convert_(model, calibration=x if calibrated else None)
    assert [layer["layout"] for layer in report.layers] == ["activation"]
    assert float((model(x) - before).norm() / before.norm()) < 0.03


class Scaled(Block):
    """What lies between the two modules shows when the model runs, and not before."""

    def forward(self, x):
        y = self.intermediate["act"](self.intermediate["dense"](self.norm(x)))
        return x + self.output["dense"](2 * y)


def test_calibration_sees_what_lies_between():
    model, x = nn.Sequential(Scaled(), Block()), data()
    before = model.eval()(x)
    report = convert_(model, calibration=x)
    assert [layer["layout"] for layer in report.layers] == ["activation", "linear"]
    assert float((model(x) - before).norm() / before.norm()) < 0.01


def test_names_choose():
    model = nn.Sequential(Block(), Block(), Block())
    report = convert_(model, include=["0", "1.*"], exclude="1.intermediate.*", num_groups=1)
    assert [layer["name"] for layer in report.layers] == ["0"]
    assert report.skipped == [("1", "excluded"), ("2", "not included")]
    again = convert_(model, include="2", num_groups=1)
    assert [layer["name"] for layer in again.recipe["layers"]] == ["0", "2"]


def test_groups_divide_the_width():
    model = nn.Sequential(nn.Linear(10, 15), nn.SiLU(), nn.Linear(15, 4))
    convert_(model, num_groups=8)
    assert (model[0].act.num_groups, model[1].num_groups) == (5, 5)


def test_inputs_never_seen_do_no_harm():
    model = nn.Sequential(*(Block() for _ in range(2)))
    report = convert_(model, calibration=data(400), order=(7, 6))
    for fitted in report.fits:
        low, high = fitted.fit.interval
        x = np.concatenate([np.linspace(low - 3 * (high - low), high + 3 * (high - low), 20_001), [-1e4, 1e4]])
        distance = np.maximum(0, np.maximum(low - x, x - high))
        assert np.all(np.abs(fitted.fit(x) - fitted.target(x)) <= fitted.fit.max_error + 1.2 * distance)


@pytest.mark.parametrize("form", ["abs_of_sum", "sum_of_abs"])
def test_a_recipe_makes_the_same_model_without_data(form):
    model = nn.Sequential(Block(), sequential(), mlp(), Twice(between=nn.LayerNorm(16)))
    twin, x = copy.deepcopy(model), data()
    report = convert_(model, calibration=x, num_groups=2, form=form)
    assert report.relative_error < 0.03
    assert {m.form for m in model.modules() if isinstance(m, GroupRational)} == {form}
    recipe = json.loads(json.dumps(report.recipe))
    meta = copy.deepcopy(twin).to("meta")
    apply_conversion_(twin, recipe)
    apply_conversion_(meta, recipe)
    assert list(twin.state_dict()) == list(model.state_dict()) == list(meta.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="already"):
        apply_conversion_(twin, recipe)


def test_a_model_of_ones_own_in_a_file(tmp_path):
    model = nn.Sequential(Block(), sequential())
    fresh, x = copy.deepcopy(model), data()
    convert_(model, calibration=x, num_groups=2)
    grkan.save_model(model, tmp_path / "m.safetensors")
    for other in (nn.Sequential(Block(), Block()), nn.Sequential(Block(), sequential(), nn.Linear(3, 3))):
        before = snapshot(other)
        with pytest.raises(ValueError, match="does not fit"):
            grkan.load_model(tmp_path / "m.safetensors", other)
        assert_unchanged(other, before)
    loaded = grkan.load_model(tmp_path / "m.safetensors", fresh)
    assert torch.equal(loaded(x), model.eval()(x))
    assert loaded.grkan_metadata["conversion"]["layers"]


def test_a_vit_in_a_file_and_as_a_kat(tmp_path):
    import timm

    model = timm.create_model("grkan_vit_micro_patch2_8", depth=2)
    x = torch.randn(4, 1, 8, 8)
    convert_(model, calibration=x)
    grkan.save_model(model, tmp_path / "m.safetensors")
    expected = model.eval()(x)
    loaded = grkan.load_model(tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), expected)
    kat = timm.create_model("kat_micro_patch2_8", depth=2)
    kat.load_state_dict(model.state_dict())
    assert torch.equal(kat.eval()(x), expected)


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        ([], TypeError),
        ({}, ValueError),
        ({"version": 2, "layers": []}, ValueError),
        ({"version": 1, "layers": [{"name": "0"}]}, ValueError),
        ({"version": 0, "layers": []}, ValueError),
        ({"version": "1", "layers": []}, ValueError),
        ({"version": 1, "layers": {}}, ValueError),
        ({"version": 1, "layers": [3]}, ValueError),
    ],
)
def test_recipes_that_are_none(recipe, error):
    with pytest.raises(error, match="recipe must"):
        apply_conversion_(sequential(), recipe)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda layer: layer.update(activation=None), "activation in layer 1 of recipe must be a string; got None"),
        (lambda layer: layer.update(linear="9"), "there is no '9'"),
        (lambda layer: layer.update(activation="1.9"), "there is no '1.9'"),
        (lambda layer: layer.update(layout="gated"), "layout in layer 1 of recipe must be one of .*; got 'gated'"),
        (
            lambda layer: layer.update(layout="activation"),
            "linear in layer 1 of recipe must be null if, and only if, the layout",
        ),
        (
            lambda layer: layer.update(act1=None),
            "act1 in layer 1 of recipe must be null if, and only if, .* got None for 'linear'",
        ),
        (lambda layer: layer.update(layout="grkan"), "linear and activation in .* must be 1.fc1 and 1.act for"),
        (lambda layer: layer["act2"].update(form="sum"), "at 1: form must be"),
        (lambda layer: layer["act2"].update(order=[7, 6]), "at 1: the numerator of init must have shape"),
        (lambda layer: layer["act1"].update(num_groups=5), "at 1: width must be divisible by num_groups, 5; got 16"),
        (lambda layer: layer["act1"].update(width=24), "1.0 takes 16 channels instead of 24"),
        (lambda layer: layer["act2"].update(channel_dim=7), "channel_dim must be -1 or 1"),
        (lambda layer: layer["act2"].update(init=3), "init in act2 in layer 1 of recipe must be a string; got 3"),
        (lambda layer: layer["act2"].update(num_groups=True), "num_groups in act2 in .* must be an integer; got True"),
        (lambda layer: layer["act2"]["numerator"][0].__setitem__(0, float("nan")), "must be finite"),
        (lambda layer: layer["act2"].pop("denominator"), "act2 in layer 1 of recipe must have .*denominator"),
        (lambda layer: layer.update(parts={}), "layer 1 of recipe must have name, layout, .*; got"),
    ],
)
def test_recipes_that_are_damaged_change_nothing(change, match):
    model = nn.Sequential(Block(), sequential())
    before, recipe = snapshot(model), convert_(copy.deepcopy(model), num_groups=1).recipe
    twice = {**recipe, "layers": [*recipe["layers"], recipe["layers"][0]]}
    with pytest.raises(ValueError, match="is in two"):
        apply_conversion_(model, twice)
    change(recipe["layers"][1])
    with pytest.raises(ValueError, match=match):
        apply_conversion_(model, recipe)
    assert_unchanged(model, before)


def endless_nan():
    yield torch.full((4, 16), float("nan"))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"calibration": []}, ValueError, "calibration must have at least one batch"),
        (
            {"calibration": iter(())},
            ValueError,
            "calibration must have at least one batch; it is empty, or a generator",
        ),
        ({"calibration": endless_nan()}, ValueError, "calibration must lead to finite values; in batch 0"),
        ({"calibration": [data(), data(width=3)]}, ValueError, "batch 1 raises RuntimeError"),
        ({"calibration": [{"y": data()}]}, ValueError, "batch 0 raises TypeError"),
        ({"calibration": ["text"]}, ValueError, "must be a Mapping, a Tensor, or a tuple or list"),
        ({"calibration": "text"}, TypeError, "calibration must be an iterable of batches"),
        ({"calibration": 3}, TypeError, "calibration must be an iterable of batches"),
        (
            {"calibration": data(), "forward": lambda model, batch: None},
            ValueError,
            "no batch reaches any of the activations",
        ),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1"),
        ({"order": (5,)}, ValueError, "order must be a pair"),
        ({"order": (0, 4)}, ValueError, r"order must be \(m, n\) with m >= 1"),
        ({"form": "sum"}, ValueError, "form must be"),
        ({"act_init": ("identty", None)}, ValueError, "act_init must be one of"),
        ({"include": 3}, TypeError, "include must be a pattern"),
        ({"include": ["nothing", "1.mlp"]}, ValueError, r"include must match .*; \['nothing', '1.mlp'\] matches none"),
        ({"exclude": "nothing"}, ValueError, r"exclude must match .* such as '0.inner'; \['nothing'\] matches none"),
        ({"exclude": "*"}, ValueError, "model must have an MLP to convert; .*excluded"),
        ({"forward": 3}, TypeError, "forward must be callable"),
    ],
)
def test_bad_input_changes_nothing(arguments, error, match):
    model = nn.Sequential(Broken(), sequential())
    before = snapshot(model)
    with pytest.raises(error, match=match):
        convert_(model, **arguments)
    assert_unchanged(model, before)


def test_a_failure_after_the_change_undoes_it(monkeypatch):
    model = nn.Sequential(Block(), mlp(), Twice(between=nn.LayerNorm(16)), nn.TransformerEncoderLayer(16, 2, 32))
    before, x = snapshot(model), data()
    output = model.eval()(x)
    model.train()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("grkan.convert.compare.KeptBatches.compare", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_(model, num_groups=1)
    assert_unchanged(model, before)
    assert torch.equal(model.eval()(x), output)
    assert model[3].activation is torch.nn.functional.relu
    assert model[3].activation_relu_or_gelu == 1


def test_a_failure_amid_the_change_undoes_it(monkeypatch):
    model = nn.Sequential(Block(), mlp(), Block())
    recipe, before = convert_(copy.deepcopy(model), num_groups=1).recipe, snapshot(model)

    def fail(*_):
        if isinstance(model[0].intermediate["dense"], RationalLinear):
            raise KeyboardInterrupt

    monkeypatch.setattr("grkan.convert.recipe._adopt_hooks", fail)  # for the second layer
    with pytest.raises(KeyboardInterrupt):
        apply_conversion_(model, recipe)
    assert_unchanged(model, before)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.GELU()), nn.Identity()])
def test_a_model_without_an_mlp(model):
    with pytest.raises(ValueError, match="must have an MLP to convert"):
        convert_(model)


@pytest.mark.parametrize(
    ("make", "match"),
    [(mlp, "at 0: it is already a GRKAN"), (sequential, r"at 0: 0\.1 is already a rational function")],
)
def test_a_model_that_is_converted_already(make, match):
    model = nn.Sequential(make())
    recipe = convert_(model, num_groups=1).recipe
    with pytest.raises(ValueError, match="its other functions are already rational"):
        convert_(model)
    with pytest.raises(ValueError, match=match):
        apply_conversion_(model, recipe)


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match="model must be"):
        convert_("bert")


def test_the_users_random_numbers_stay():
    torch.manual_seed(3)
    expected = torch.randn(4)
    model, x = sequential(), data()
    torch.manual_seed(3)
    convert_(model, calibration=x)
    assert torch.equal(torch.randn(4), expected)


def test_report_is_a_plain_object():
    report = ConversionReport([], [("a", "why")], None, None, {"version": 1, "layers": []})
    assert str(report).endswith("skipped a: why")
