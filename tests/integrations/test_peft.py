"""Adapters of PEFT on our layers and on converted models: they see F(x), and merge."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import grkan

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
pytest.importorskip("transformers", reason="most of the models are transformers'")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from .models import bert, convert, gpt2, inputs, llama, vit  # noqa: E402
from .models import output as output_of  # noqa: E402

# A Conv1D that PEFT wraps has its weight the other way round, of which PEFT warns.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore::FutureWarning")


def converted(family, **config):
    model = family(**config)
    convert(model)
    return model


def layers():
    torch.manual_seed(0)
    return nn.Sequential(grkan.RationalLinear(32, 64), grkan.RationalLinear(64, 32))


def kat():
    torch.manual_seed(0)
    return timm.create_model("kat_micro_patch2_8", depth=2).eval()


def timm_vit():
    torch.manual_seed(0)
    model = timm.create_model("grkan_vit_micro_patch2_8", depth=2).eval()
    grkan.convert_(model)
    return model


# name -> the model, the layers that get an adapter, and how many these are
CASES = {
    "RationalLinear": (layers, ["0.linear", "1.linear"], 2),
    "GRKAN": (lambda: grkan.GRKAN(32, 64), ["fc1", "fc2"], 2),
    "KAT": (kat, ["fc1", "fc2", "qkv"], 6),
    "converted timm ViT": (timm_vit, ["fc1", "fc2"], 4),
    "BERT, first layer": (lambda: converted(bert), ["intermediate.dense.linear"], 2),
    "BERT, second layer": (lambda: converted(bert), r".*layer\.\d+\.output\.dense", 2),
    "BERT, attention": (lambda: converted(bert), ["query", "value"], 4),
    "GPT-2": (lambda: converted(gpt2), ["c_fc.linear", "c_proj"], 6),
    "LLaMA": (lambda: converted(llama), ["gate_proj", "up_proj", "down_proj"], 6),
    "ViT": (lambda: converted(vit), ["fc1.linear", "fc2"], 4),
    # q, k, v, o and the MLP of two layers, BERT's pooler, and the heads of classifiers; not those of language models.
    "BERT, all-linear": (lambda: converted(bert, kind="BertForSequenceClassification"), "all-linear", 14),
    "GPT-2, all-linear": (lambda: converted(gpt2), "all-linear", 8),
    "LLaMA, all-linear": (lambda: converted(llama), "all-linear", 14),
    "ViT, all-linear": (lambda: converted(vit), "all-linear", 13),
}


def output(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if hasattr(base, "main_input_name"):
        return output_of(model, inputs(base))
    torch.manual_seed(1)
    x = torch.randn(4, 1, 8, 8) if hasattr(base, "patch_embed") else torch.randn(4, 7, 32)
    with torch.no_grad():
        return model(x)


def randomise(model):
    """Adapters start with an effect of zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("case", CASES)
def test_adapters(tmp_path, case, dora):
    make, targets, number = CASES[case]
    base = make().eval()
    plain = output(base)
    config = LoraConfig(target_modules=targets, r=4, lora_alpha=8, use_dora=dora)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == number
    assert distance(output(model), plain) < 1e-6
    randomise(model)
    wanted = output(model)
    assert distance(wanted, plain) > 1e-3
    assert distance(output(copy.deepcopy(model).merge_and_unload()), wanted) < 1e-6
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), wanted)


@pytest.mark.parametrize(
    ("make", "function", "layer"),
    [
        (layers, "0.act", "0.linear"),
        (lambda: grkan.GRKAN(32, 64), "act1", "fc1"),
        (lambda: grkan.GRKAN(32, 64), "act2", "fc2"),
        (
            lambda: converted(bert),
            "encoder.layer.0.intermediate.dense.act",
            "encoder.layer.0.intermediate.dense.linear",
        ),
        (lambda: converted(bert), "encoder.layer.0.intermediate.intermediate_act_fn", "encoder.layer.0.output.dense"),
        (lambda: converted(gpt2), "transformer.h.0.mlp.c_fc.act", "transformer.h.0.mlp.c_fc.linear"),
        (lambda: converted(vit), "vit.layers.0.mlp.activation_fn", "vit.layers.0.mlp.fc2"),
    ],
)
def test_an_adapter_sees_what_comes_out_of_the_function(make, function, layer):
    model = get_peft_model(make().eval(), LoraConfig(target_modules=[layer], r=4)).eval()
    base, seen = model.get_base_model(), {}
    base.get_submodule(function).register_forward_hook(lambda module, x, y: seen.update(function=y))
    adapter = base.get_submodule(layer).lora_A["default"]
    adapter.register_forward_pre_hook(lambda module, x: seen.update(adapter=x[0]))
    output(model)
    assert torch.equal(seen["function"], seen["adapter"])


@pytest.mark.parametrize(
    ("family", "name"),
    [(bert, "dense"), (gpt2, "c_fc"), (vit, "fc1"), (layers, "0")],
    ids=["BERT", "GPT-2", "ViT", "layer"],
)
def test_the_usual_name_of_a_wrapped_layer_is_refused(family, name):
    model = layers() if family is layers else converted(family)
    with pytest.raises(
        ValueError, match=r"(?s)Target module RationalLinear\(.*\(linear\): .* is not supported.*nn\.Linear"
    ):
        get_peft_model(model, LoraConfig(target_modules=[name]))


@pytest.mark.parametrize(
    ("case", "functions"),
    [
        ("GRKAN", ["act2"]),
        ("KAT", ["act1", "act2"]),
        ("BERT, attention", ["intermediate_act_fn", "act"]),
        ("LLaMA", ["act_fn"]),
    ],
)
def test_functions_are_trained_and_saved_with_it(tmp_path, case, functions):
    make, targets, _ = CASES[case]
    base = make()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=targets, r=4, modules_to_save=functions))
    names = grkan.no_weight_decay(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    learned = {name for name in names if "modules_to_save" in name}
    assert learned
    assert trainable & names == learned
    assert all("lora_" in name for name in trainable - learned)

    optimiser = torch.optim.AdamW(grkan.param_groups(model, 0.1), lr=1e-2)
    randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(model).eval()
    torch.manual_seed(1)
    x = torch.randn(4, 1, 8, 8) if case == "KAT" else torch.randn(4, 32)
    loss = model(**inputs(base))[0] if hasattr(base, "main_input_name") else model(x)
    loss.square().mean().backward()
    optimiser.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed >= {name for name in learned if "numerator" in name}
    assert changed <= trainable
    model.eval()
    assert distance(output(model), output(state)) > 1e-4

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(output(loaded), output(model))
    merged = loaded.merge_and_unload()
    assert not any("modules_to_save" in name for name, _ in merged.named_modules())
    assert distance(output(merged), output(model)) < 1e-6


def test_the_whole_way_with_transformers(tmp_path):
    from transformers import AutoModel

    base = converted(bert)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules="all-linear", modules_to_save=["act"])
    )
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(output(loaded), output(model))
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path / "merged").eval()), output(merged))


def test_functions_are_not_lost_in_a_model_without_them(tmp_path):
    """The configuration of the adapter names the model that was read before the conversion."""
    from transformers import AutoModel

    bert().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    recipe = convert(base).recipe
    model = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=["intermediate_act_fn"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"functions for .*intermediate_act_fn.*, where this model has none"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="the adapter must be loaded into"):
        PeftModel.from_pretrained(bert(), tmp_path / "adapter")
    again = AutoModel.from_pretrained(tmp_path / "base")
    grkan.apply_conversion_(again, recipe)
    again.load_state_dict(model.unload().state_dict(), strict=False)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert distance(output(loaded), output(model)) < 1e-6


def test_whatever_is_imported_first():
    """`peft` holds the function that grkan replaces in several modules."""
    code = """
import peft, peft.peft_model, peft.utils.save_and_load
import grkan
names = [peft.peft_model, peft.utils, peft.utils.save_and_load, peft]
assert all(hasattr(module.set_peft_model_state_dict, "_put_around_by_grkan") for module in names)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_conversion_inside_a_model_with_adapters_is_saved_with_what_they_merge_into(tmp_path):
    from transformers import AutoModel

    model = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    convert(model.base_model.model)
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path).eval()), output(merged))


def test_a_quantised_model_learns_by_adapters(tmp_path):
    pytest.importorskip("torchao", reason="the quantiser is torchao's")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = converted(bert)
    quantize_(model, Int8WeightOnlyConfig())
    plain = output(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["intermediate.dense.linear"], r=4)).eval()
    assert distance(output(adapted), plain) < 1e-6
    randomise(adapted)
    assert distance(output(adapted), plain) > 1e-3
    adapted.train()(**inputs(model))[0].square().mean().backward()
    assert all(p.grad.norm() > 0 for name, p in adapted.named_parameters() if "lora_" in name)
