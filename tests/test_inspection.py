import numpy as np
import pytest
import torch
from torch import nn

from grkan import GroupRational, RationalLinear
from grkan.inspection import learned_functions, record_inputs


def test_inputs_are_those_that_the_functions_get():
    model = nn.Sequential(GroupRational(2, "identity"), RationalLinear(4, 4, num_groups=2))
    model.train()
    x = torch.arange(40.0).reshape(10, 4)
    inputs = record_inputs(model, [x, x + 100])
    assert list(inputs) == ["0", "1.act"]
    halves = [np.concatenate([half.flatten(), half.flatten() + 100]) for half in x.split(2, dim=1)]
    np.testing.assert_allclose(inputs["0"], np.stack(halves))
    np.testing.assert_allclose(inputs["1.act"], inputs["0"], rtol=1e-6)  # behind the identity
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_groups_of_channels_first():
    x = torch.arange(2.0 * 4 * 3 * 5).reshape(2, 4, 3, 5)
    inputs = record_inputs(GroupRational(2, channel_dim=1), [x])[""]
    np.testing.assert_array_equal(np.sort(inputs), [sorted(half.flatten().tolist()) for half in x.split(2, dim=1)])


def test_inputs_of_a_large_layer_are_thinned_over_all_channels():
    inputs = record_inputs(GroupRational(8, "identity"), [torch.arange(8.0).repeat(100_000)])[""]
    assert 100_000 <= inputs.size <= 200_000
    assert all(len(np.unique(group)) == 8 for group in inputs)


def test_how_far_a_function_has_moved_and_its_slope():
    model = GroupRational(2, "identity")
    with torch.no_grad():
        model.coefficients()[0][1, 1] = 1.5
    x = torch.tensor([[1.0, -2.0, 1.0, torch.inf], [3.0, 0.5, torch.nan, 1.0]])
    first, second = learned_functions(model, record_inputs(model, [x]))
    assert (first.layer, first.group, second.group) == ("", 0, 1)
    assert (first.moved, first.slope) == (0, 1)
    assert (second.moved, second.slope) == pytest.approx((0.5, 1.5))
    assert second.numerator == [0, 1.5, 0, 0, 0, 0]
    assert second.initial_numerator == [0, 1, 0, 0, 0, 0]
    assert sum(first.counts) == 2  # the outermost are beyond the interval
    assert sum(second.counts) == 2


def test_without_inputs_the_interval_is_a_fixed_one():
    (function,) = learned_functions(GroupRational(1, "swish", share_numerator=True))
    assert function.counts is None
    assert function.interval == (-4, 4)
    assert function.slope == pytest.approx(0.5, abs=1e-3)  # x sigmoid(x) - x / 2 is even


def test_a_model_without_rational_functions_is_named():
    with pytest.raises(ValueError, match="must have rational functions to plot; Linear has none"):
        learned_functions(nn.Linear(2, 2))
