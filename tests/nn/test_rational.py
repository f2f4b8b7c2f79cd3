"""GroupRational, RationalLinear and no_weight_decay."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grkan.nn import GroupRational, RationalLinear, no_weight_decay, variance_gain
from grkan.rational import table
from grkan.rational.fit import fit
from grkan.rational.op import group_rational


def test_forward_is_group_rational():
    module = GroupRational(4, "gelu", form="sum_of_abs", channel_dim=1)
    x = torch.randn(2, 8, 3, 3)
    expected = group_rational(x, module.numerator, module.denominator, form="sum_of_abs", channel_dim=1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["abs_of_sum", "sum_of_abs"])
@pytest.mark.parametrize("order", [(5, 4), (7, 6)])
@pytest.mark.parametrize("share", [False, True])
def test_a_name_gives_the_coefficients_of_the_table(form, order, share):
    module = GroupRational(3, "tanh", order, form, share)
    numerator, denominator = table.coefficients("tanh", order, form)
    assert module.numerator.shape == (1 if share else 3, order[0] + 1)
    assert module.denominator.shape == (3, order[1])
    for row in module.numerator:
        torch.testing.assert_close(row, torch.tensor(numerator))
    for row in module.denominator:
        torch.testing.assert_close(row, torch.tensor(denominator))


@pytest.mark.parametrize("order", [(1, 0), (1, 3), (5, 4), (9, 2)])
def test_the_identity_is_exact_for_every_order(order):
    x = torch.randn(5, 8) * 100
    assert torch.equal(GroupRational(2, "identity", order)(x), x)


@pytest.mark.parametrize("init", ["gelu", np.tanh, nn.GELU()], ids=["name", "callable", "module"])
def test_other_orders_and_callables_are_fitted(init):
    module = GroupRational(2, init, (4, 4))
    expected = fit(init, (4, 4))
    torch.testing.assert_close(module.numerator[1].double(), torch.tensor(expected.numerator), rtol=1e-6, atol=1e-7)


def test_coefficients_as_init():
    fitted = fit("gelu", (3, 2), interval=(-3, 3))
    module = GroupRational(4, fitted, (3, 2))
    np.testing.assert_allclose(module.to_function(2)(np.linspace(-3, 3)), fitted(np.linspace(-3, 3)), atol=1e-6)
    rows = GroupRational(2, (torch.tensor([[0.0, 1.0], [0.0, 2.0]]), [0.5]), (1, 1))
    assert rows.numerator.tolist() == [[0, 1], [0, 2]]
    assert rows.denominator.tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_coefficients_stay_float32(change):
    module = change(nn.Sequential(nn.Linear(8, 8), GroupRational(4)))
    assert module[0].weight.itemsize == 2
    assert module[1].numerator.dtype == module[1].denominator.dtype == torch.float32
    assert module(torch.randn(2, 8, dtype=module[0].weight.dtype)).itemsize == 2


def test_dtypes():
    assert GroupRational(4, dtype=torch.bfloat16).numerator.dtype == torch.float32
    assert GroupRational(4, dtype=torch.float64).numerator.dtype == torch.float64
    module = GroupRational(4, dtype=torch.float64)
    assert module.half().numerator.dtype == torch.float64
    assert module.float().numerator.dtype == torch.float32
    assert module.double().numerator.dtype == torch.float64
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert GroupRational(4).numerator.dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        assert GroupRational(4).numerator.dtype == torch.float64
    finally:
        torch.set_default_dtype(previous)


def test_parameters_and_gradients_keep_their_identity_when_cast():
    module = GroupRational(2)
    before = module.numerator
    module(torch.randn(3, 4)).sum().backward()
    module.half()
    assert module.numerator is before
    assert module.numerator.grad.dtype == torch.float32


def test_meta_device():
    with torch.device("meta"):
        module = GroupRational(4, "gelu")
    assert module.numerator.is_meta
    assert module.to(torch.bfloat16).numerator.dtype == torch.float32
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.numerator, GroupRational(4, "gelu").numerator)


def test_reset_parameters_and_initial_coefficients():
    module = GroupRational(2, "gelu", share_numerator=True)
    start = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    numerator, denominator = module.initial_coefficients()
    torch.testing.assert_close(numerator.float(), start["numerator"], rtol=0, atol=0)
    torch.testing.assert_close(denominator.float(), start["denominator"], rtol=0, atol=0)
    module.reset_parameters()
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())


def test_state_dict_copy_and_pickle():
    module = GroupRational(2, lambda x: np.sin(x), (3, 2))
    nn.init.normal_(module.numerator)
    other = GroupRational(2, "identity", (3, 2))
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 4)
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("share", [False, True])
def test_to_function(share):
    module = GroupRational(2, "gelu", share_numerator=share)
    with torch.no_grad():
        module.denominator[1] *= 2
    x = np.linspace(-4, 4, 12).reshape(3, 4)
    for group in range(2):
        function = module.to_function(group)
        numerator = module.numerator[0 if share else group].double()[None]
        y = group_rational(torch.tensor(x), numerator, module.denominator[group].double()[None])
        np.testing.assert_allclose(function(x), y.detach().numpy(), rtol=1e-14)
        assert function(x).dtype == np.float64
        assert isinstance(function(0.5), float)
        assert function(float(x[1, 2])) == pytest.approx(y[1, 2].item(), rel=1e-14)
    before = function(1.0)
    with torch.no_grad():
        module.numerator.zero_()
    assert function(1.0) == before  # the function as it was, not a view of it


def test_repr():
    assert repr(GroupRational(4)) == "GroupRational(num_groups=4, order=(5, 4), init=swish, form=abs_of_sum)"
    text = repr(GroupRational(4, np.tanh, (3, 2), "sum_of_abs", True, 1))
    assert "init=tanh, form=sum_of_abs, share_numerator=True, channel_dim=1" in text


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1; got 0"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an int; got 2.0"),
        ({"order": (5,)}, ValueError, r"order must be a pair \(m, n\).*got \(5,\)"),
        ({"order": (5, -1)}, ValueError, "order must be a pair"),
        ({"order": 5}, TypeError, "order must be a pair"),
        ({"order": (5.0, 4)}, TypeError, "order must be a pair"),
        ({"form": 3}, TypeError, "form must be 'abs_of_sum' or 'sum_of_abs'; got 3"),
        ({"share_numerator": "a"}, TypeError, "share_numerator must be a bool; got 'a'"),
        ({"form": "B"}, ValueError, "form must be 'abs_of_sum' or 'sum_of_abs'; got 'B'"),
        ({"channel_dim": "1"}, TypeError, "channel_dim must be an int; got '1'"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating dtype; got torch.int32"),
        ({"init": "swich"}, ValueError, "^init must be one of .*'swish'"),
        ({"init": nn.GELU}, TypeError, "^init must be a function that can be fitted: .* got GELU"),
        ({"init": lambda x: x[:2]}, ValueError, "^init must be a function that can be fitted: .* shape"),
        ({"init": 3}, TypeError, "init must be a name, a callable, a RationalFit or"),
        ({"init": ([0.0, 1.0], [0.0])}, ValueError, r"numerator of init must have shape \(6,\) or \(8, 6\)"),
        ({"init": (torch.ones(8, 6), torch.ones(3, 4))}, ValueError, r"denominator of init .* got \(3, 4\)"),
        ({"init": ([np.nan] * 6, [0.0] * 4)}, ValueError, "numerator of init must be finite"),
        ({"init": ("ab", "cd")}, TypeError, "numerator of init must be numbers"),
        ({"init": (torch.ones(8, 6), [0.0] * 4), "share_numerator": True}, ValueError, r"\(6,\) or \(1, 6\)"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        GroupRational(**arguments)


def test_a_fit_of_another_form_or_order():
    fitted = fit("gelu", (3, 2), form="sum_of_abs", interval=(-3, 3))
    with pytest.raises(ValueError, match="init must have the form of the module, 'abs_of_sum'"):
        GroupRational(2, fitted, (3, 2))
    with pytest.raises(ValueError, match="numerator of init"):
        GroupRational(2, fitted, (5, 4), "sum_of_abs")


def test_to_function_of_a_missing_group():
    for group in (4, -1):
        with pytest.raises(ValueError, match=rf"group must lie in \[0, 3\]; got {group}"):
            GroupRational(4).to_function(group)
    for wrong in (1.5, "a", True):
        with pytest.raises(TypeError, match=f"group must be an int; got {wrong!r}"):
            GroupRational(4).to_function(wrong)


class TestRationalLinear:
    def test_forward_is_the_function_and_then_the_linear_layer(self):
        layer = RationalLinear(16, 5, num_groups=4, init="gelu", form="sum_of_abs")
        x = torch.randn(2, 3, 16)
        torch.testing.assert_close(layer(x), F.linear(layer.act(x), layer.weight, layer.bias))
        assert set(layer.state_dict()) == {"weight", "bias", "act.numerator", "act.denominator"}
        assert RationalLinear(16, 5, bias=False).bias is None

    def test_start(self):
        layer = RationalLinear(512, 512, init="gelu")
        gain = variance_gain(layer.act)
        assert (layer.weight.var() * 512).item() == pytest.approx(gain, rel=0.02)  # standard error 0.003
        assert not layer.bias.any()
        assert 0.9 < layer(torch.randn(512, 512)).square().mean() < 1.1
        with torch.no_grad():
            layer.weight.zero_()
            layer.act.numerator.zero_()
        layer.reset_parameters()
        assert 0.9 < layer(torch.randn(512, 512)).square().mean() < 1.1

    def test_meta_and_dtype(self):
        layer = RationalLinear(16, 8, device="meta", dtype=torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.act.numerator.dtype == torch.float32
        layer.to_empty(device="cpu").reset_parameters()
        assert layer(torch.randn(2, 16, dtype=torch.bfloat16)).isfinite().all()

    def test_errors(self):
        with pytest.raises(ValueError, match="in_features must be divisible by num_groups; got 12 and 8"):
            RationalLinear(12, 4)
        with pytest.raises(ValueError, match="out_features must be at least 1; got 0"):
            RationalLinear(16, 0)
        with pytest.raises(TypeError, match="bias must be a bool; got 'ab'"):
            RationalLinear(16, 8, bias="ab")


def test_no_weight_decay():
    shared = GroupRational(2)
    model = nn.ModuleDict({"a": RationalLinear(8, 8), "b": nn.Sequential(shared, nn.Linear(8, 8), shared)})
    assert no_weight_decay(model) == {
        "a.act.numerator",
        "a.act.denominator",
        "b.0.numerator",
        "b.0.denominator",
        "b.2.numerator",
        "b.2.denominator",
    }
    assert no_weight_decay(shared) == {"numerator", "denominator"}
    assert no_weight_decay(nn.Linear(2, 2)) == set()
    assert no_weight_decay(model) <= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got 3"):
        no_weight_decay(3)
