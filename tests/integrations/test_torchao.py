"""Quantisers find every linear layer by its class, and leave the functions alone."""

import copy
import io

import pytest
import timm
import torch
from torch import nn

import grkan

pytest.importorskip("transformers", reason="most of the models are transformers'")

from .models import bert, convert, gpt2, inputs, llama, vit


def converted(family):
    model = family()
    convert(model)
    return model


def kat():
    torch.manual_seed(0)
    return timm.create_model("kat_micro_patch2_8", depth=2).eval()


MODELS = {
    "RationalLinear": lambda: nn.Sequential(grkan.RationalLinear(32, 64), grkan.RationalLinear(64, 32)).eval(),
    "GRKAN": lambda: grkan.GRKAN(32, 64).eval(),
    "KAT": kat,
    "BERT": lambda: converted(bert),
    "LLaMA": lambda: converted(llama),
    "ViT": lambda: converted(vit),
}


def output(model, like):
    torch.manual_seed(1)
    with torch.no_grad():
        if hasattr(like, "main_input_name"):
            return model(**inputs(like))[0]
        return model(torch.randn(8, 1, 8, 8) if hasattr(like, "patch_embed") else torch.randn(8, 32))


def check(model, quantised, is_quantised):
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert linears
    assert all(is_quantised(quantised.get_submodule(name)) for name in linears)
    functions = [m for m in quantised.modules() if isinstance(m, grkan.GroupRational)]
    assert functions
    assert all(p.dtype == torch.float32 and type(p) is nn.Parameter for m in functions for p in m.parameters())
    wanted, given = output(model, model), output(quantised, model)
    assert 0 < (given - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("name", MODELS)
def test_quantize_(name, kind):
    quantisation = pytest.importorskip("torchao.quantization", reason="the quantiser is torchao's")
    model = MODELS[name]()
    quantised = copy.deepcopy(model)
    quantisation.quantize_(quantised, getattr(quantisation, kind)())
    check(model, quantised, lambda module: type(module.weight) is not nn.Parameter)


@pytest.mark.skipif("qint8" not in dir(torch), reason="this PyTorch has no quantised tensors")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_quantize_dynamic(name):
    model = MODELS[name]()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    check(model, quantised, lambda module: isinstance(module, torch.ao.nn.quantized.dynamic.Linear))
    # The state of a quantised model is saved and loaded.
    file = io.BytesIO()
    torch.save(quantised.state_dict(), file)
    file.seek(0)
    other = torch.ao.quantization.quantize_dynamic(MODELS[name](), {nn.Linear}, dtype=torch.qint8)
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(output(other, model), output(quantised, model))


def test_a_conv1d_stays():
    quantisation = pytest.importorskip("torchao.quantization", reason="the quantiser is torchao's")
    model = converted(gpt2)
    wanted = output(model, model)
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    assert (output(model, model) - wanted).norm() / wanted.norm() < 0.05  # the head alone is an nn.Linear
