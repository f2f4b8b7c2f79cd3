"""Liger's kernels leave the MLPs of a converted model alone."""

import pytest
import torch

import grkan

pytest.importorskip("transformers", reason="the model is transformers'")
liger = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel, which needs Triton")

from .models import convert, inputs, llama  # noqa: E402


def test_the_functions_stay():
    model = llama()
    convert(model)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 32)
    before = mlp(x)
    liger._apply_liger_kernel_to_instance(model=model)
    assert type(model.model.norm).forward is not model.model.norm.forward.__func__  # other kernels are in
    assert torch.equal(mlp(x), before)
    with pytest.raises(ValueError, match=r"a LlamaMLP must keep its forward.*Pass swiglu=False"):
        liger._apply_liger_kernel_to_instance(model=model, swiglu=True)
    assert torch.equal(mlp(x), before)


def test_a_model_without_functions_gets_all_kernels():
    model = llama()
    assert not any(isinstance(module, grkan.GroupRational) for module in model.modules())
    liger._apply_liger_kernel_to_instance(model=model)
    assert "forward" in vars(model.model.layers[0].mlp)
    assert inputs(model)
