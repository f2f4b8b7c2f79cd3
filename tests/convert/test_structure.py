"""What is an activation, and which linear layers belong to it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

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
