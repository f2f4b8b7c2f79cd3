"""What stands for a linear layer, and which calls are nothing but a forward."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from grkan.nn import RationalLinear
from grkan.nn.kinds import is_conv1d, is_plain, linear_kind, linear_width


def conv1d(outputs=4, inputs=3):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


class Renamed(nn.Linear):
    """As FSDP makes them: another class with the same forward."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def offloaded():
    layer = nn.Linear(3, 4)
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(
    ("make", "kind", "width"),
    [
        (lambda: nn.Linear(3, 4), "linear", (3, 4)),
        (lambda: Renamed(3, 4), "linear", (3, 4)),
        (conv1d, "conv1d", (3, 4)),
        (lambda: type("FSDPConv1D", (type(conv1d()),), {})(4, 3), "conv1d", (3, 4)),
        (lambda: Doubled(3, 4), None, (3, 4)),
        (offloaded, None, (3, 4)),
        (lambda: weight_norm(nn.Linear(3, 4)), None, (3, 4)),
        (lambda: RationalLinear(8, 4), None, (8, 4)),
        (lambda: nn.Conv2d(3, 4, 1), None, (3, 4)),
        (lambda: nn.Conv2d(3, 4, 3), None, None),
        (lambda: nn.GELU(), None, None),
        (lambda: None, None, None),
    ],
)
def test_kinds_and_widths(make, kind, width):
    module = make()
    assert linear_kind(module) == kind
    assert linear_width(module) == width
    assert is_conv1d(module) == (kind == "conv1d")


def test_a_plain_module():
    assert is_plain(nn.Linear(3, 4), nn.Linear)
    assert not is_plain(Renamed(3, 4), nn.Linear)
    assert not is_plain(offloaded(), nn.Linear)
    assert not is_plain(weight_norm(nn.Linear(3, 4)), nn.Linear)


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_a_hook_makes_a_module_less_than_plain(register):
    module = nn.Linear(3, 4)
    handle = register(module)
    assert not is_plain(module, nn.Linear)
    handle.remove()
    assert is_plain(module, nn.Linear)
    assert module(torch.ones(2, 3)).shape == (2, 4)
