"""What a run shows: activations of any kind in their place, and what stays is named with the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grkan
from grkan.convert import convert_
from grkan.convert.observe import observe
from grkan.nn import GroupRational


def gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


class MLP(nn.Module):
    """Two linear layers, and what each test puts between them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Functional(MLP):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Helper(MLP):
    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class Method(MLP):
    def forward(self, x):
        y = self.fc1(x)
        return self.fc2(y.relu())


class Leaky(MLP):
    slope = 0.1

    def forward(self, x):
        return self.fc2(F.leaky_relu(self.fc1(x), self.slope))


class Written(MLP):
    """QuickGELU, with no function of its own."""

    def forward(self, x):
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class WrittenGate(MLP):
    def forward(self, x):
        u = self.fc1(x)
        return self.fc2(u * (u * F.softplus(u).tanh()))


class OddName(MLP):
    def __init__(self):
        super().__init__()
        self.nonlinearity = gelu

    def forward(self, x):
        return self.fc2(self.nonlinearity(self.fc1(x)))


def _default_gate(self, x):
    return self.nonlinearity(x)


class Given(nn.Module):
    """Calls a function in an attribute from a method that was given to the class under another name."""

    _gate = _default_gate

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.nonlinearity = nn.Linear(16, 32), nn.Linear(32, 16), F.gelu

    def forward(self, x):
        return self.fc2(self._gate(self.fc1(x)))


class StarReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.bias, self.relu = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1)), nn.ReLU()

    def forward(self, x):
        return self.scale * self.relu(x) ** 2 + self.bias


def with_activation(act):
    model = MLP()
    model.act = act
    return model


def with_layers(first, second, act=None):
    model = with_activation(nn.GELU() if act is None else act)
    model.fc1, model.fc2 = first, second
    return model


class Weights(nn.Module):
    """Linear layers that are no modules, as those of fused experts."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(2, 16, 64) / 4), nn.Parameter(torch.randn(2, 32, 16) / 6)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up = torch.einsum("bnd,edf->ebnf", x, self.w1).chunk(2, -1)
        return torch.einsum("ebnf,efd->ebnd", self.act_fn(gate) * up, self.w2).sum(0)


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Transposed(nn.Module):
    """1x1 convolutions over sequences, and a depthwise one in between, as in Mix-FFN."""

    def __init__(self):
        super().__init__()
        self.up, self.mix = nn.Conv1d(16, 32, 1), nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.act, self.down = nn.GELU(), nn.Conv1d(32, 16, 1)

    def forward(self, x):
        return self.down(self.act(self.mix(self.up(x.mT)))).mT


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SpatialGate(nn.Module):
    """gMLP: half of the channels are weighted by a product over the tokens of the other half."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.norm = nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(32)
        self.spatial, self.fc2 = nn.Linear(24, 24), nn.Linear(32, 16)

    def forward(self, x):
        u, v = self.act(self.fc1(x)).chunk(2, -1)
        return self.fc2(u * self.spatial(self.norm(v).mT).mT)


class Parallel(MLP):
    """Attention and an MLP that share the last linear layer, as in Flux."""

    def __init__(self):
        super().__init__()
        self.act, self.out = nn.GELU(), nn.Linear(48, 16)

    def forward(self, x):
        attended = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return self.out(torch.cat([attended, self.act(self.fc1(x))], -1))


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 16), nn.GELU()

    def forward(self, x):
        return self.c(self.act(self.b(self.act(self.a(x)))))


class PixelNorm(nn.Sequential):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


MODELS = {
    "function": (Functional, "linear", "gelu_tanh", 8),
    "function of one's own": (Helper, "linear", "gelu", 8),
    "method of a tensor": (Method, "linear", "relu", 8),
    "function with an argument": (Leaky, "linear", "leaky_relu", 8),
    "written out": (Written, "linear", "y * torch.sigmoid(1.702 * y)", 8),
    "written out, and squared": (WrittenGate, "linear", "u * (u * F.softplus(u).tanh())", 8),
    "attribute of any name": (OddName, "linear", "gelu", 8),
    "attribute that a given function calls": (Given, "linear", "gelu", 8),
    "PReLU": (lambda: with_activation(nn.PReLU()), "linear", "PReLU", 8),
    "PReLU of channels": (lambda: PixelNorm(nn.Linear(16, 32), nn.PReLU(32), nn.Linear(32, 16)), "linear", "PReLU", 8),
    "StarReLU": (lambda: with_activation(StarReLU()), "linear", "squared_relu", 8),
    "within a sequence": (lambda: with_activation(nn.Sequential(nn.GELU(), nn.Dropout(0.1))), "activation", "gelu", 8),
    "experts": (Weights, "activation", "silu", 8),
    "subclasses": (lambda: with_layers(Scaled(16, 32), Scaled(32, 16)), "activation", "gelu", 8),
    "linear layers in sequences": (
        lambda: with_layers(nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32)), nn.Sequential(nn.Linear(32, 16))),
        "activation", "gelu", 8,
    ),
    "Conv1d": (Transposed, "activation", "gelu", 8),
    "gate as wide as its input": (Gate, "activation", "silu", 8),
    "gMLP": (SpatialGate, "activation", "gelu", 8),
    "parallel with attention": (Parallel, "activation", "gelu", 8),
    "two widths": (Three, "activation", "gelu", 1),
}  # fmt: skip


def data(seed=0):
    return torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_is_converted(kind, calibrated):
    make, layout, activation, groups = MODELS[kind]
    if kind == "gMLP" and not calibrated:
        pytest.skip("the model takes 24 tokens, which only calibration data show")
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), make()).eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        before = model(data(1))
        report = convert_(model, calibration=data() if calibrated else None)
        after = model(data(1))
    assert [(one["layout"], one["activation"]) for one in report.layers] == [(layout, activation)]
    assert report.layers[0]["groups"] == groups
    assert report.skipped == []
    assert 0 < float((after - before).norm() / before.norm()) < (0.02 if calibrated else 0.05)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == grkan.no_weight_decay(model)
    assert unexpected == []


def test_channels_with_different_functions():
    act = nn.PReLU(32)
    with torch.no_grad():
        act.weight.copy_(torch.linspace(0.0, 1.0, 8).repeat_interleave(4))
    model = nn.Sequential(nn.LayerNorm(16), PixelNorm(nn.Linear(16, 32), act, nn.Linear(32, 16)))
    with torch.no_grad():
        before = model(data(1))
        with pytest.raises(ValueError, match="channels have different functions; a larger num_groups"):
            convert_(model, calibration=data(), num_groups=4)
        convert_(model, calibration=data(), num_groups=8)
        assert float((model(data(1)) - before).norm() / before.norm()) < 0.02


class Mixer(nn.Module):
    """A state space in short: what steers it, and its gate, are no activations of an MLP."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.x_proj, self.out_proj = nn.Linear(16, 64), nn.Linear(32, 64), nn.Linear(32, 16)
        self.act = nn.SiLU()

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, -1)
        x = self.act(x)
        b, c = F.softplus(self.x_proj(x)).chunk(2, -1)
        state = (b * x).cumsum(1) * c
        return self.out_proj(state * self.act(z))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv1d(24, 24, 3, padding=1), nn.Conv1d(24, 24, 3, padding=1), nn.GELU()

    def forward(self, x):
        return self.conv2(self.act(self.conv1(x)))


class Excitation(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(x * self.fc(x).sigmoid())


class Attention(nn.Module):
    """Linear attention with ReLU as its kernel."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.relu(q) @ (torch.relu(k).mT @ v))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.route, self.proj = nn.Linear(16, 4), nn.Linear(16, 16)

    def forward(self, x):
        weights, _ = F.relu(self.route(x)).topk(1, -1)
        return self.proj(x) * weights


STAYS = {
    "state space": (Mixer, {"act": "silu: its output", "": "softplus in forward"}),
    "stem": (Stem, {"act": "gelu: its input comes from a convolution"}),
    "excitation": (Excitation, {"": "sigmoid in forward (self.fc(x).sigmoid()): a gate"}),
    "linear attention": (Attention, {"": "relu in forward"}),
    "router": (Router, {"": "relu in forward (F.relu(self.route(x))): its output goes into topk"}),
}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", STAYS)
def test_what_stays_is_named(kind, calibrated):
    make, expected = STAYS[kind]
    if kind == "stem" and not calibrated:
        pytest.skip("the model takes 24 channels, which only calibration data show")
    model = nn.Sequential(nn.LayerNorm(16), make(), with_activation(nn.GELU()))
    report = convert_(model, calibration=data() if calibrated else None)
    assert [layer["name"] for layer in report.layers] == ["2"]
    for name, reason in report.skipped:
        assert reason.startswith(expected["act" if name.endswith(".act") else ""])
    assert {name.removeprefix("1").strip(".") for name, _ in report.skipped} == set(expected)


@pytest.mark.parametrize("kind", STAYS)
def test_what_include_names_is_converted_whatever_it_is(kind):
    make, expected = STAYS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), make()).eval()
    with torch.no_grad():
        before = model(data(1))
        report = convert_(model, calibration=data(), include="1", order=(7, 6))
        after = model(data(1))
    assert len(report.layers) >= len(expected)
    assert report.skipped == []
    assert {layer["layout"] for layer in report.layers} == {"activation"}
    assert float((after - before).norm() / before.norm()) < 0.05


class Unused(MLP):
    """A fast path that calls no activation, as those of state spaces on a GPU."""

    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x):
        return self.fc2(self.fc1(x))


def _direct_gate(self, x):
    return self.nonlinearity(F.silu(x))


class GivenBoth(Given):
    """The same method calls an activation that it does not take from an attribute."""

    _gate = _direct_gate


def test_every_activation_of_a_given_method_is_converted_or_named():
    for calibration in (data(), None):
        model = GivenBoth()
        model.nonlinearity = torch.sin  # not what the other place calls
        report = convert_(nn.Sequential(model, with_activation(nn.GELU())), calibration=calibration)
        assert any("silu" in reason for _, reason in report.skipped), report


class Snake(MLP):
    """arXiv 2006.08195."""

    def forward(self, x):
        y = self.fc1(x)
        return self.fc2(y + torch.sin(y) ** 2)


class SineOfAttribute(MLP):
    def __init__(self):
        super().__init__()
        self.f = torch.sin

    def forward(self, x):
        return self.fc2(self.f(self.fc1(x)))


class WithPositions(MLP):
    """An MLP, and a sine that is none of its activations."""

    def forward(self, x):
        places = torch.arange(x.shape[-2]).float()[:, None]
        return self.fc2(F.gelu(self.fc1(x + torch.sin(places))))


@pytest.mark.parametrize(
    ("kind", "label"),
    [(Snake, "y + torch.sin(y) ** 2"), (SineOfAttribute, "sin"), (WithPositions, "gelu")],
)
def test_sines_are_activations_behind_a_linear_layer(kind, label):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), kind()).eval()
    with torch.no_grad():
        before = model(data(1)[0])
        report = convert_(model, calibration=data())
        assert float((model(data(1)[0]) - before).norm() / before.norm()) < 0.02
    assert [layer["activation"] for layer in report.layers] == [label]
    assert report.skipped == []


def test_a_sine_that_stays_is_named():
    class Kernel(MLP):
        def forward(self, x):
            y = torch.sin(self.fc1(x))
            return self.fc2(y @ y.mT @ y)

    report = convert_(nn.Sequential(Kernel(), with_activation(nn.GELU())), calibration=data())
    assert [layer["name"] for layer in report.layers] == ["1"]
    [(name, reason)] = report.skipped
    assert name == "0"
    assert reason.startswith("sin in forward (torch.sin(self.fc1(x))): bmm combines its output with that of a product")


def test_what_is_never_called_is_not_converted():
    for calibration in (data(), None):
        model = nn.Sequential(Unused(), with_activation(nn.GELU()))
        report = convert_(model, calibration=calibration)
        assert [layer["name"] for layer in report.layers] == ["1"]
        assert report.skipped == [("0.act", "silu: its module runs, but never calls it")]


class Second(MLP):
    """Used in the second batch alone."""

    def __init__(self):
        super().__init__()
        self.act, self.other = nn.GELU(), with_activation(nn.SiLU())

    def forward(self, x):
        return super().forward(x) if len(x) == 4 else self.other(x)


def test_later_batches_count():
    model = Second()
    report = convert_(model, calibration=[data(), data()[:3]])
    assert len(report.layers) == 2
    report = convert_(Second(), calibration=[data()])
    assert report.skipped == [("other.act", "silu: no calibration batch reaches it")]


def test_nothing_is_kept_of_a_run():
    model = nn.Sequential(nn.LayerNorm(16), Functional())
    seen = observe(model, lambda: model(data()))
    assert len(seen.places) == 1
    assert not any(isinstance(m, GroupRational) for m in model.modules())
    assert type(model[1]) is Functional


class NoTokens(nn.Module):
    """Experts, one of which gets no token."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Functional(), Functional()])

    def forward(self, x):
        return torch.cat([self.experts[0](x), self.experts[1](self.experts[0].fc1(x)[:0].reshape(0, 2, 16))[:, 0]])


def test_an_expert_without_tokens_hides_nothing():
    torch.manual_seed(0)
    model = NoTokens()
    report = convert_(model, calibration=[data()[0]])
    assert [layer["name"] for layer in report.layers] == ["experts.0"]


class Unobservable(Functional):
    def forward(self, x):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("no mode, please")
        return super().forward(x)


def test_a_run_that_cannot_be_observed_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(Unobservable(), with_activation(nn.GELU()))
    report = convert_(model, calibration=data())
    assert [layer["name"] for layer in report.layers] == ["1"]
    ((name, reason),) = report.skipped
    assert name == ""
    assert reason.endswith("functions that `forward` calls were not found: RuntimeError: no mode, please")


def test_a_clamp_between_tensors_does_not_end_the_observation():
    class Routed(MLP):
        def forward(self, x):
            y = self.fc2(F.gelu(self.fc1(x)))
            return y / y.abs().clamp(min=y.abs().amax(-1, keepdim=True))

    report = convert_(Routed(), calibration=torch.randn(64, 16))
    assert [layer["activation"] for layer in report.layers] == ["gelu"]
    assert not [reason for _, reason in report.skipped if "could not be observed" in reason]
