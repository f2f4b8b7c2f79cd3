"""What is an activation, and which linear layers belong to it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from grkan import convert_
from grkan.convert.structure import as_activation, find_sites


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("candidate", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(inplace=True), "relu"),
        (F.relu, "relu"),
        (torch.tanh, "tanh"),
        (nn.LeakyReLU(0.01), "leaky_relu"),
        (nn.LeakyReLU(0.2), "LeakyReLU"),
        (QuickGELU(), "QuickGELU"),
        (nn.PReLU(dtype=torch.float64), "PReLU"),
    ],
)
def test_activations(candidate, name):
    found = as_activation(candidate)
    assert found is not None
    assert found.name == name
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    before = x.clone()
    assert torch.equal(found.function(x), candidate(x.clone()))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "candidate",
    [
        nn.Identity(),
        nn.Dropout(0.5),
        nn.Softmax(-1),
        nn.LayerNorm(97, elementwise_affine=False),
        nn.Linear(97, 97),
        nn.Flatten(0),
        torch.cumsum,
        print,
    ],
)
def test_no_activations(candidate):
    training = getattr(candidate, "training", None)
    assert as_activation(candidate) is None
    assert getattr(candidate, "training", None) == training


def site(model):
    sites, skipped = find_sites(model)
    assert len(sites) == 1, skipped
    return sites[0]


def test_a_sequence_in_a_sequence():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 8))
    found = site(model)
    assert (found.layout, found.parts) == ("linear", {"fc1": "1", "act": "2", "fc2": "4"})


@pytest.mark.parametrize(
    ("between", "behind", "layout"),
    [
        ([], [], "linear"),
        ([nn.Dropout(0.1)], [nn.LayerNorm(8)], "linear"),
        ([nn.Dropout(0.1), nn.LayerNorm(12)], [nn.Dropout(0.1)], "activation"),
    ],
)
def test_a_plain_sequence(between, behind, layout):
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), *between, nn.Linear(12, 8), *behind)
    assert site(model).layout == layout


def test_convolutions_in_a_sequence():
    found = site(nn.Sequential(nn.Conv2d(8, 12, 1), nn.GELU(), nn.Conv2d(12, 8, 1)))
    assert (found.layout, found.parts, found.channel_dim) == ("activation", {"act": "1"}, 1)


class LowRank(nn.Linear):
    """A linear layer with a forward of its own, as adapters and quantisation have."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked_linear():
    """A linear layer as Accelerate's offloading leaves it."""
    fc = nn.Linear(8, 12)
    fc.forward = fc.forward
    return fc


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.LayerNorm(8), hooked_linear(), nn.GELU(), nn.Linear(12, 8)),
        nn.Sequential(nn.LayerNorm(8), weight_norm(nn.Linear(8, 12)), nn.GELU(), nn.Linear(12, 8)),
        nn.Sequential(nn.Linear(8, 12), nn.GELU()),
        nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)),
        nn.Sequential(nn.LayerNorm(8), LowRank(8, 12), nn.GELU(), nn.Linear(12, 8)),
        nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(13, 8)),
    ],
    ids=["offloaded", "parametrised", "one layer", "norm", "3x3", "adapter", "widths"],
)
def test_everything_else_is_skipped_with_a_reason(model):
    sites, skipped = find_sites(model)
    assert sites == []
    assert len(skipped) == 1
    assert "linear layers" in skipped[0][1]


class Limited(nn.Module):
    """An MLP with the parts of timm's, whose forward does more than call them."""

    def __init__(self, end):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        vars(self)["end"] = end

    def forward(self, x):
        return self.end(self.fc2(self.act(self.fc1(x))), x)


@pytest.mark.parametrize(
    ("end", "layout"),
    [
        (lambda y, x: y, "grkan"),
        (lambda y, x: y.clamp(-4, 4), "linear"),
        (lambda y, x: torch.nan_to_num(y), "linear"),
        (lambda y, x: y * min(1.0, 4 / x.shape[1]), "linear"),
        (lambda y, x: F.dropout(y, 0.1, False), "grkan"),
        (lambda y, x: 30 * torch.tanh(y / 30), "linear"),
    ],
)
def test_a_module_becomes_a_grkan_only_if_it_runs_the_same_operations(end, layout):
    ((site,), _) = find_sites(nn.Sequential(Limited(end)))
    assert site.layout == layout


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.5 * torch.randn_like(x) if self.training else x


class OneThenOther(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, x):
        return self.other(F.selu(x))


@pytest.mark.parametrize("other", [Noise(), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)])
def test_a_part_that_is_random_in_training_is_no_part_of_an_activation(other):
    module = OneThenOther(other).eval()
    assert as_activation(module) is None
    assert not any(part.training for part in module.modules())


def test_a_function_may_ask_for_the_mode_of_its_module():
    owner = nn.Module().eval()
    assert as_activation(lambda x: F.dropout(F.gelu(x), 0.3, owner.training), owner) is None
    assert as_activation(lambda x: F.gelu(x) if owner.training else F.gelu(x.clone()), owner) is not None
    assert not owner.training


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return grad


class TrueRelu(StraightThrough):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def forward(x):
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0)


def test_the_gradient_of_an_activation_is_its_slope():
    assert as_activation(StraightThrough.apply) is None
    assert as_activation(TrueRelu.apply) is not None
    assert as_activation(lambda x: F.hardswish(x.detach())) is not None


def swish(x, beta):
    return x * torch.sigmoid(beta * x)


class Callable:
    def __init__(self, beta):
        self.beta = beta

    def __call__(self, x):
        return swish(x, self.beta)


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda value: nn.Parameter(torch.tensor(value))])
@pytest.mark.parametrize("way", ["partial", "closure", "attribute", "default", "object", "module"])
def test_a_function_that_holds_a_tensor_is_no_activation(kind, way):
    parent = nn.Module()
    parent.fc1, parent.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
    beta = parent.beta = kind(1.3)
    parent.act = {
        "partial": partial(swish, beta=beta),
        "closure": lambda x: swish(x, beta),
        "attribute": lambda x: swish(x, parent.beta),
        "default": lambda x, beta=beta: swish(x, beta),
        "object": Callable(beta),
        "module": OneThenOther(lambda x: swish(x, beta)),
    }[way]
    sites, _ = find_sites(parent)
    assert len(sites) == (kind is float)


def test_a_function_that_holds_a_tensor_is_named():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.beta = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.tensor(1.3))
            self.act = partial(swish, beta=self.beta)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    with pytest.raises(ValueError, match="it uses a tensor, which may change"):
        convert_(Gate().requires_grad_(False), calibration=torch.randn(9, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("data", [None, torch.randn(9, 8)])
def test_a_module_compiled_by_torchscript_is_left_and_named(data):
    model = nn.Sequential(Limited(lambda y, x: y), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.GELU())))
    report = convert_(model, calibration=data)
    assert [layer["name"] for layer in report.layers] == ["0"]
    assert ("1", "it is compiled by TorchScript; to convert it, compile the converted model") in report.skipped
    with pytest.raises(ValueError, match="compiled by TorchScript"):
        convert_(model[1], calibration=data)
