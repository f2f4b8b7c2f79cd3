"""What is an activation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grkan import convert_
from grkan.convert.activation import as_activation
from grkan.convert.structure import find_sites


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
