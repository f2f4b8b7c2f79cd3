import timm
import torch

import grkan
from grkan.train.optimisation import clipped_together


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
    for parameters in (weights, coefficients):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-6)) for p in weights)


def test_a_model_without_coefficients_is_one_part():
    model = torch.nn.Linear(2, 2)
    (parameters,) = clipped_together(model)
    assert parameters == list(model.parameters())
