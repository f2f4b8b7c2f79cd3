"""Which linear layers belong to an activation."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from grkan import convert_
from grkan.convert.structure import find_sites


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("data", [None, torch.randn(9, 8)])
def test_a_module_compiled_by_torchscript_is_left_and_named(data):
    model = nn.Sequential(timm.layers.Mlp(8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.GELU())))
    report = convert_(model, calibration=data)
    assert [layer["name"] for layer in report.layers] == ["0"]
    assert ("1", "it is compiled by TorchScript; to convert it, compile the converted model") in report.skipped
    with pytest.raises(ValueError, match="compiled by TorchScript"):
        convert_(model[1], calibration=data)
