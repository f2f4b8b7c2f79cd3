"""Accelerate moves weights in and out around every module that it knows by its parameters."""

import pytest
import timm
import torch
from torch import nn

import grkan

accelerate = pytest.importorskip("accelerate", reason="the hooks are Accelerate's")
pytest.importorskip("transformers", reason="most of the models are transformers'")

from .models import FAMILIES, convert, inputs  # noqa: E402


def kat():
    return timm.create_model("kat_micro_patch2_8", depth=2)


def timm_vit():
    model = timm.create_model("grkan_vit_micro_patch2_8", depth=2)
    grkan.convert_(model)
    return model


def of_family(family):
    def make():
        model = FAMILIES[family]()
        convert(model)
        return model

    return make


MODELS = {
    "RationalLinear": lambda: nn.Sequential(grkan.RationalLinear(32, 32), nn.ReLU()),
    "GRKAN": lambda: grkan.GRKAN(32),
    "KAT": kat,
    "converted timm ViT": timm_vit,
    **{family: of_family(family) for family in FAMILIES},
}


def output(model):
    torch.manual_seed(1)
    with torch.no_grad():
        if hasattr(model, "main_input_name"):
            return model(**inputs(model))[0]
        return model(torch.randn(2, 1, 8, 8) if hasattr(model, "patch_embed") else torch.randn(2, 32))


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize("name", MODELS)
def test_offloading(tmp_path, name, kind):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    wanted = output(model)
    if kind == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif kind == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        # Functions lie elsewhere than the linear layers behind them.
        owners = {name: module for name, module in model.named_modules() if module._parameters}
        places = {name: "disk" if isinstance(module, grkan.GroupRational) else "cpu" for name, module in owners.items()}
        places |= {
            name: "cpu" for name, _ in model.named_buffers() if not any(name.startswith(f"{o}.") for o in owners)
        }
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(
        p.is_meta for module in model.modules() if isinstance(module, grkan.GroupRational) for p in module.parameters()
    )
    assert torch.equal(output(model), wanted)


def test_a_model_is_loaded_in_parts(tmp_path):
    torch.manual_seed(0)
    model = kat().eval()
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "parts", max_shard_size="100KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 1
    with accelerate.init_empty_weights():
        empty = kat()
    places = {name: "cpu" for name, _ in empty.named_children()} | {"blocks.0": "cpu", "blocks.1": "disk"}
    places |= {"cls_token": "cpu", "pos_embed": "cpu"}
    del places["blocks"]
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path / "parts", places, offload_folder=tmp_path / "disk"
    )
    assert loaded.blocks[1].mlp.act1.numerator.is_meta
    assert torch.equal(output(loaded.eval()), output(model))


def test_weights_of_another_form_are_refused(tmp_path):
    accelerate.Accelerator(cpu=True).save_model(kat(), tmp_path)
    other = timm.create_model("kat_micro_patch2_8", depth=2, form="sum_of_abs")
    with pytest.raises(ValueError, match="the coefficients are for form abs_of_sum"):
        accelerate.load_checkpoint_and_dispatch(other, tmp_path, {"": "cpu"})


def test_save_model_takes_what_accelerate_unwraps_and_gathers(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(torch.compile(kat(), backend="eager"))
    grkan.save_model(model, tmp_path / "m.safetensors", accelerator.get_state_dict(model))
    loaded = grkan.load_model(tmp_path / "m.safetensors")
    assert torch.equal(output(loaded), output(accelerator.unwrap_model(model).eval()))
