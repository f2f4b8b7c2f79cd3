"""timm saves, loads and optimises KATs and converted models as any other."""

import copy
import functools
import json
import subprocess
import sys

import pytest
import torch

import grkan

timm = pytest.importorskip("timm", reason="the models are timm's")

from timm.models import save_for_hf  # noqa: E402
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # noqa: E402


def learned(model):
    """Change the coefficients as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in grkan.no_weight_decay(model):
                parameter.mul_(1.05)
    return model.eval()


def converted(name="vit_tiny_patch16_224", **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    grkan.convert_(model)
    return learned(model)


@functools.cache
def _vit():
    return converted(depth=2, num_classes=7, img_size=32)  # some seconds, for the fits


def vit():
    return copy.deepcopy(_vit())


@pytest.mark.skipif(not hasattr(timm.models, "get_model_args"), reason="this timm does not save a model's arguments")
class TestSaveForHf:
    """`save_for_hf`, as `push_to_hf_hub` calls it, and "local-dir:", which reads what "hf-hub:" does."""

    @pytest.mark.parametrize(
        ("make", "size", "safe"),
        [
            (vit, (3, 32, 32), True),
            (vit, (3, 32, 32), False),
            (lambda: converted("convnext_atto", num_classes=5), (3, 64, 64), True),
            (lambda: learned(timm.create_model("kat_micro_patch2_8", depth=2, order=(7, 6))), (1, 8, 8), True),
        ],
        ids=["ViT", "ViT, pickled", "ConvNeXt", "KAT"],
    )
    def test_round_trip(self, tmp_path, make, size, safe):
        model, x = make(), torch.randn(2, *size)
        for folder in (tmp_path / "first", tmp_path / "again"):
            save_for_hf(model, folder, safe_serialization=safe)
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            assert torch.equal(loaded(x), model(x))
            assert type(loaded) is type(model)
            assert loaded.pretrained_cfg["architecture"] == model.pretrained_cfg["architecture"]
            model = loaded
        grkan.save_model(model, tmp_path / "m.safetensors")
        assert torch.equal(grkan.load_model(tmp_path / "m.safetensors")(x), model(x))

    def test_another_head_and_another_size(self, tmp_path):
        model = vit()
        save_for_hf(model, tmp_path, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1).eval()
        assert loaded(torch.randn(2, 1, 32, 32)).shape == (2, 3)
        names = grkan.no_weight_decay(model)
        assert len(names) == 8
        assert all(torch.equal(loaded.get_parameter(name), model.get_parameter(name)) for name in names)
        large = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)
        assert large(torch.randn(1, 3, 64, 64)).shape == (1, 7)

    def test_without_weights(self, tmp_path):
        model = vit()
        save_for_hf(model, tmp_path)
        fresh = timm.create_model(f"local-dir:{tmp_path}")
        assert list(fresh.state_dict()) == list(model.state_dict())
        assert not torch.equal(fresh.head.weight, model.head.weight)

    def test_an_unconverted_model_is_saved_as_ever(self, tmp_path):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
        save_for_hf(model, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architecture"] == "vit_tiny_patch16_224"
        assert "grkan" not in config["model_args"]

    def test_without_grkan_it_fails(self, tmp_path):
        save_for_hf(vit(), tmp_path, safe_serialization=True)
        code = f"import timm; timm.create_model('local-dir:{tmp_path}', pretrained=True)"
        result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        assert "RuntimeError: Unknown model (grkan_converted)" in result.stderr

    def test_it_is_no_model_of_its_own(self):
        assert "grkan_converted" not in timm.list_models()
        with pytest.raises(ValueError, match=r"timm\.create_model\('local-dir:FOLDER'\)"):
            timm.create_model("grkan_converted")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_checkpoint_of_another_form_is_refused(tmp_path, ending):
    import safetensors.torch

    arguments = {"depth": 1, "img_size": 32}
    saved, other = (timm.create_model("vit_tiny_patch16_224", **arguments) for _ in range(2))
    grkan.convert_(saved)
    grkan.convert_(other, form="sum_of_abs")
    path = tmp_path / f"m.{ending}"
    (torch.save if ending == "pth" else safetensors.torch.save_file)(saved.state_dict(), path)
    with pytest.raises(RuntimeError, match="are for form abs_of_sum"):
        timm.models.load_checkpoint(other, path)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, **arguments)


MODELS = {
    "KAT": lambda: timm.create_model("kat_micro_patch2_8", depth=2),
    "converted ViT": vit,
    "mlp_layer=GRKAN": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, mlp_layer=grkan.GRKAN),
}


def groups_of(optimiser, model):
    """The group of each parameter, by its name; and whether an orthogonalising optimiser would orthogonalise it."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimiser.param_groups for p in group["params"]}


class TestOptimisers:
    """What has no idea of grkan neither decays nor orthogonalises a coefficient."""

    @pytest.fixture(params=MODELS)
    def model(self, request):
        torch.manual_seed(0)
        return MODELS[request.param]()

    @pytest.mark.parametrize("layer_decay", [None, 0.7])
    @pytest.mark.parametrize("optimiser", ["adamw", "muon", "nadamuon", "lamb"])
    def test_create_optimizer_v2(self, model, optimiser, layer_decay):
        made = create_optimizer_v2(model, optimiser, lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
        groups, coefficients = groups_of(made, model), grkan.no_weight_decay(model)
        assert len(groups) == len([*model.parameters()])
        assert len(coefficients) == 8
        assert {groups[name]["weight_decay"] for name in coefficients} == {0.0}
        assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.05}
        if "muon" in optimiser:
            # A group without the flag is left to Muon's own rule: what has two dimensions.
            orthogonal = {
                n for n, g in groups.items() if not g.get("use_fallback") and model.get_parameter(n).dim() >= 2
            }
            assert "blocks.0.mlp.fc1.weight" in orthogonal
            assert not orthogonal & coefficients

    def test_layer_decay_gives_a_function_the_rate_of_its_layer(self, model):
        groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
        names = {id(p): name for name, p in model.named_parameters()}
        scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
        for block in range(2):
            of_block = {s for name, s in scales.items() if name.startswith(f"blocks.{block}.")}
            assert of_block == {scales[f"blocks.{block}.mlp.act1.numerator"]}

    @pytest.mark.parametrize("optimiser", ["adamw", "muon"])
    def test_a_step_of_decay_leaves_the_functions(self, model, optimiser):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made = create_optimizer_v2(model, optimiser, lr=0.1, weight_decay=1.0)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        made.step()
        assert all(torch.equal(model.get_parameter(name), before[name]) for name in grkan.no_weight_decay(model))
        assert not torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])

    def test_rules_by_the_number_of_dimensions(self, model):
        coefficients = grkan.no_weight_decay(model)
        assert not {name for name, p in model.named_parameters() if p.dim() >= 2} & coefficients

    def test_torchs_muon(self, model):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        held = {id(p) for group in torch.optim.Muon(matrices, lr=1e-3).param_groups for p in group["params"]}
        assert held
        assert not any(id(model.get_parameter(name)) in held for name in grkan.no_weight_decay(model))
