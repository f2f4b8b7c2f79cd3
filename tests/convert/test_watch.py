"""What runs of parts of a model show."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grkan.convert.structure import find_sites


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
