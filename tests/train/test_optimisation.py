import pytest
import timm
import torch

import grkan
from grkan.train.optimisation import clipped_together, limit_gradients_


def test_coefficients_do_not_count_in_the_norm_of_the_weights():
    model = timm.create_model("kat_micro_patch2_8", depth=1)
    weights, coefficients = clipped_together(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in coefficients} == grkan.no_weight_decay(model)
    assert len(weights) + len(coefficients) == len(names)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-6)
    for p in coefficients:
        p.grad.fill_(100.0)
    assert not limit_gradients_([weights, coefficients], 1.0)
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-6)) for p in weights)
    assert torch.nn.utils.get_total_norm([p.grad for p in coefficients]) == pytest.approx(1.0)


def test_a_model_without_coefficients_is_one_part():
    model = torch.nn.Linear(2, 2)
    (parameters,) = clipped_together(model)
    assert parameters == list(model.parameters())


@pytest.mark.parametrize("largest", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_gradient_that_is_not_finite_takes_all(value, largest):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    groups = [list(layer.parameters()) for layer in model]
    groups[1].append(torch.nn.Parameter(torch.ones(2)))  # frozen, or not used
    groups.append([torch.nn.Parameter(torch.ones(2))])
    assert not limit_gradients_(groups, largest)
    assert all((p.grad == 0.1).all() for p in model.parameters())
    model[1].bias.grad[0] = value
    assert limit_gradients_(groups, largest)
    assert all((p.grad == 0).all() for p in model.parameters())
