"""no_weight_decay and param_groups."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from grkan.nn import GRKAN, GroupRational, RationalLinear, no_weight_decay, param_groups


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
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got 3"):
        no_weight_decay(3)


class Halved(nn.Module):
    def forward(self, t):
        return t / 2


def test_parametrised_coefficients():
    model = nn.Sequential(RationalLinear(8, 8))
    parametrize.register_parametrization(model[0].act, "numerator", Halved())
    parametrizations.weight_norm(model[0].linear)
    assert no_weight_decay(model) == {"0.act.parametrizations.numerator.original", "0.act.denominator"}
    assert no_weight_decay(model) <= {name for name, _ in model.named_parameters()}


def test_wrappers_have_names_of_their_own():
    model = nn.DataParallel(torch.compile(GRKAN(8), backend="eager"))
    names = no_weight_decay(model)
    assert len(names) == 4
    assert names <= {name for name, _ in model.named_parameters()}


def grouped(model, *args, **kwargs):
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        ({names[id(p)] for p in group["params"]}, {k: v for k, v in group.items() if k != "params"})
        for group in param_groups(model, *args, **kwargs)
    ]


def test_three_groups():
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.LayerNorm(8), RationalLinear(8, 8))
    decayed, others, coefficients = grouped(model, 0.05)
    assert decayed == ({"0.weight", "2.linear.weight"}, {"weight_decay": 0.05})
    assert others == ({"0.bias", "1.weight", "1.bias", "2.linear.bias"}, {"weight_decay": 0.0})
    assert coefficients == ({"2.act.numerator", "2.act.denominator"}, {"weight_decay": 0.0})


def test_learning_rates():
    model = RationalLinear(8, 8)
    assert [options.get("lr") for _, options in grouped(model, 0.1)] == [None, None, None]
    assert [options["lr"] for _, options in grouped(model, 0.1, lr=1e-3)] == [1e-3, 1e-3, 1e-3]
    assert [options["lr"] for _, options in grouped(model, 0.1, lr=1e-3, coefficient_lr=0.0)] == [1e-3, 1e-3, 0.0]
    assert [options.get("lr") for _, options in grouped(model, 0.1, coefficient_lr=1e-2)] == [None, None, 1e-2]


def test_each_trainable_parameter_once():
    shared = GroupRational(2)
    model = nn.Sequential(shared, nn.Linear(8, 8, bias=False), shared)
    model[1].requires_grad_(False)
    (coefficients,) = grouped(model, 0.1)
    assert coefficients[0] == {"0.numerator", "0.denominator"}
    model.append(nn.Linear(8, 8)).requires_grad_(True)
    model[3].weight = model[1].weight
    groups = param_groups(model, 0.1)
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_takes_them(optimiser):
    model = GRKAN(8, 16)
    optimiser = optimiser(param_groups(model, 0.5, coefficient_lr=0.0), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(4, 8)).sum().backward()
    optimiser.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("act" in name), name


def test_rules_by_the_number_of_dimensions_are_right():
    model = GRKAN(8, 16)
    assert all(p.dim() == 1 for name, p in model.named_parameters() if name in no_weight_decay(model))
    torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3, 0.1), TypeError, r"model must be a torch\.nn\.Module; got 3"),
        ((GroupRational(2), "a"), TypeError, "weight_decay must be a number; got 'a'"),
        ((GroupRational(2), -1.0), ValueError, "weight_decay must not be negative; got -1.0"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        param_groups(*arguments)
    with pytest.raises(ValueError, match="coefficient_lr must not be negative; got nan"):
        param_groups(GroupRational(2), 0.1, coefficient_lr=float("nan"))
