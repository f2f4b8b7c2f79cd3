import json

import numpy as np
import pytest
import timm
import torch

from grkan import load_model, no_weight_decay, save_model
from grkan.models.released import save_released_checkpoint
from grkan.train.config import make_config
from grkan.train.data import ImageData
from grkan.train.loop import resume, train
from grkan.train.model import check_model, make_model, resolve_model
from grkan.train.start import find_start

SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2}
PREPROCESSING = {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "interpolation": "bicubic", "crop_pct": 1.0}
CLASSES = ("ant", "bee", "cat", "dog")
IMAGES = torch.from_numpy(np.random.default_rng(0).random((3, 1, 8, 8), np.float32))


def _data(classes):
    pixels = np.random.default_rng(1).integers(0, 256, (len(classes), 8, 8), dtype=np.uint8)
    return ImageData(pixels, np.arange(len(classes)), tuple(classes))


def _save(path, name="kat_micro_patch2_8", classes=CLASSES, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(classes), **{**SMALL, **arguments}).eval()
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.bias.normal_()
    save_model(model, path, classes=classes, preprocessing=PREPROCESSING)
    return model


def _start(init, classes=CLASSES, **settings):
    config = make_config({"init": str(init), **settings})
    config = make_config(vars(config), resolve_model(config, "x"))
    start = make_model(config, _data(classes), None, None)
    start.model.eval()
    return start


# The head


def test_outputs_follow_the_names_of_the_classes(tmp_path):
    before = _save(tmp_path / "m.safetensors")(IMAGES)
    start = _start(tmp_path / "m.safetensors", ("dog", "cat", "bee", "ant"))
    torch.testing.assert_close(start.model(IMAGES), before.flip(1))
    assert (start.new_head, start.notes) == (False, [])
    assert start.preprocessing == PREPROCESSING


def test_classes_that_are_known_keep_their_outputs(tmp_path):
    before = _save(tmp_path / "m.safetensors")(IMAGES)
    start = _start(tmp_path / "m.safetensors", ("dog", "emu", "bee"))
    after = start.model(IMAGES)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [3, 1]])
    assert not after[:, 1].any()
    assert start.new_head
    assert start.notes == [f"head: 2 of 3 classes are taken from {tmp_path / 'm.safetensors'}; new: emu"]


@pytest.mark.parametrize("classes", [("w", "x", "y", "z"), ("x", "y")])
def test_other_classes_get_a_new_head(tmp_path, classes):
    """Also if there are as many."""
    model = _save(tmp_path / "m.safetensors")
    start = _start(tmp_path / "m.safetensors", classes)
    assert start.new_head
    assert start.notes == [
        f"head: new, for {len(classes)} classes; {tmp_path / 'm.safetensors'} has none of them (its classes are ant, "
        "bee, cat, dog)"
    ]
    torch.testing.assert_close(start.model.forward_features(IMAGES), model.forward_features(IMAGES))
    assert not start.model(IMAGES).any()


def test_a_new_head_learns_with_the_coefficients(tmp_path, image_folder):
    _save(tmp_path / "m.safetensors")
    settings = {"data": str(image_folder), "init": str(tmp_path / "m.safetensors"), "batch_size": 4, "workers": 0}
    settings |= {"trainable": "coefficients", "lr": 0.01, "epochs": 2, "output": str(tmp_path / "run")}
    train(make_config(settings))
    before, after = (load_model(path) for path in (tmp_path / "m.safetensors", tmp_path / "run" / "last.safetensors"))
    changed = {
        name
        for name, p in after.state_dict().items()
        if p.shape != before.state_dict()[name].shape or not torch.equal(p, before.state_dict()[name])
    }
    assert changed == no_weight_decay(after) | {"head.weight", "head.bias"}


def test_a_new_head_learns_after_an_interruption_too(tmp_path, image_folder, monkeypatch):
    """A resumed run does not read what it began with."""
    from grkan.train import loop

    _save(tmp_path / "m.safetensors")
    settings = {"data": str(image_folder), "init": str(tmp_path / "m.safetensors"), "batch_size": 4, "workers": 0}
    settings |= {"trainable": "coefficients", "lr": 0.01, "epochs": 2}
    train(make_config(settings, {"output": str(tmp_path / "whole")}))
    end_epoch = loop._Run._end_epoch

    def interrupted(run, result):
        end_epoch(run, result)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "_end_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(settings, {"output": str(tmp_path / "parts")}))
    (tmp_path / "m.safetensors").unlink()
    resume(tmp_path / "parts")
    whole, parts = (load_model(tmp_path / name / "last.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# Sizes and channels


def test_another_image_size_and_patch_size(tmp_path):
    model = _save(tmp_path / "m.safetensors")
    start = _start(tmp_path / "m.safetensors", model_args={"img_size": 16, "patch_size": 4})
    assert start.preprocessing["input_size"] == [1, 16, 16]
    assert any("patch_embed.proj.weight: resampled from (16, 1, 2, 2) to (16, 1, 4, 4)" in note for note in start.notes)
    # The same picture, twice as large, in patches twice as large.
    large = torch.nn.functional.interpolate(IMAGES, scale_factor=2, mode="nearest")
    ours, theirs = start.model(large), model(IMAGES)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99
    larger = _start(tmp_path / "m.safetensors", model_args={"img_size": 16})
    assert larger.notes == ["pos_embed: resampled from (1, 17, 16) to (1, 65, 16)"]
    assert larger.model(large).isfinite().all()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_other_channels_see_the_same_gray(tmp_path, before, after):
    model = _save(tmp_path / "m.safetensors", in_chans=before)
    start = _start(tmp_path / "m.safetensors", model_args={"in_chans": after})
    gray = [IMAGES.expand(-1, channels, -1, -1) for channels in (before, after)]
    torch.testing.assert_close(start.model(gray[1]), model(gray[0]), rtol=1e-4, atol=1e-5)
    assert start.notes == [f"patch_embed.proj: made for {before} channels, adapted to {after}"]
    assert start.preprocessing["input_size"] == [after, 8, 8]
    assert len(start.preprocessing["mean"]) == after


def test_a_start_at_another_size_and_with_other_classes_has_the_loss_of_a_fresh_head(tmp_path, image_folder):
    _save(tmp_path / "m.safetensors")
    start = _start(tmp_path / "m.safetensors", list("abcdefghij"), model_args={"img_size": 16, "in_chans": 3})
    x = torch.rand(64, 3, 16, 16)
    loss = torch.nn.functional.cross_entropy(start.model(x), torch.arange(64) % 10).item()
    assert loss == pytest.approx(np.log(10))


# Other sources


def test_a_vit_is_converted_on_the_way(tmp_path):
    model = _save(tmp_path / "m.safetensors", "grkan_vit_micro_patch2_8")
    start = _start(tmp_path / "m.safetensors", convert=True)
    assert start.notes == [
        note for note in start.notes if note.startswith("converted: 2 MLPs; the relative error of the outputs is ")
    ]
    assert len(no_weight_decay(start.model)) == 8
    torch.testing.assert_close(start.model(IMAGES), model(IMAGES), rtol=0.05, atol=0.05)
    settings = {"init": str(tmp_path / "m.safetensors"), "convert": True, "epochs": 1, "batch_size": 512}
    train(make_config(settings, {"output": str(tmp_path / "run")}))
    again = _start(tmp_path / "run", list("0123456789"))
    assert (again.new_head, again.notes) == (False, [])
    assert resume(tmp_path / "run")["epochs"] == 1
    with pytest.raises(
        ValueError, match=r"convert must start from a model without rational functions; .* already has some"
    ):
        _start(tmp_path / "run", convert=True)
    with pytest.raises(
        ValueError, match="convert must be used with init, which names the model to convert; got no init"
    ):
        resolve_model(make_config({"convert": True}), "x")


def test_a_model_of_timm_with_its_weights(tmp_path):
    """By the same way as from the hub."""
    torch.manual_seed(0)
    arguments = {"img_size": 8, "patch_size": 4, **SMALL}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments).eval()
    timm.models.save_for_hf(model, tmp_path / "hub", model_args={**arguments, "num_classes": 2})
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "label_names": ["bee", "ant"]}))
    start = _start(f"local-dir:{tmp_path / 'hub'}", ("ant", "bee"))
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(start.model(x), model(x).flip(1))
    assert start.preprocessing["input_size"] == [3, 8, 8]
    assert not start.new_head


def test_a_name_whose_weights_are_not_at_hand():
    assert find_start("vit_tiny_patch16_224", None)[:2] == ("vit_tiny_patch16_224", "vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="pretrained weights of kat_micro_patch2_8 are not available"):
        _start("kat_micro_patch2_8")


def test_a_released_checkpoint(tmp_path):
    torch.manual_seed(0)
    arguments = {"form": "sum_of_abs", "share_numerator": True, "num_classes": 3, "depth": 1, "img_size": 32}
    model = timm.create_model("kat_tiny_patch16_224", **arguments).eval()
    save_released_checkpoint(model, tmp_path / "kat.pth")
    start = _start(tmp_path / "kat.pth", ("a", "b"))
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(start.model.forward_features(x), model.forward_features(x))
    assert start.new_head
    assert start.notes[-1].endswith("has none of them (it does not name its classes)")


def test_a_file_of_timms_with_the_name_of_its_model(tmp_path):
    model = timm.create_model("grkan_vit_micro_patch2_8", num_classes=4).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vit.pth")
    start = _start(tmp_path / "vit.pth", ("a", "b"), model="grkan_vit_micro_patch2_8")
    torch.testing.assert_close(start.model.forward_features(IMAGES), model.forward_features(IMAGES))
    with pytest.raises(ValueError, match=r"vit\.pth is not a released KAT.*--model NAME"):
        _start(tmp_path / "vit.pth", ("a", "b"))
    (tmp_path / "vit.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"vit\.pth holds no weights of a grkan_vit_micro_patch2_8"):
        _start(tmp_path / "vit.pth", ("a", "b"), model="grkan_vit_micro_patch2_8")


def test_imagenets_classes_have_the_names_of_its_folders(tmp_path):
    from grkan.train.start import _imagenet_classes

    model = timm.create_model("vit_tiny_patch16_224", depth=0)
    assert _imagenet_classes(model)[:2] == ["n01440764", "n01443537"]
    assert _imagenet_classes(timm.create_model("vit_tiny_patch16_224", depth=0, num_classes=7)) is None


def test_functions_of_another_form_do_not_fit(tmp_path):
    _save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors does not fit the model: .*form"):
        _start(tmp_path / "m.safetensors", model_args={"form": "sum_of_abs"})


def test_a_comparison_checks_the_model(tmp_path):
    _save(tmp_path / "m.safetensors")
    config = make_config({"init": str(tmp_path / "m.safetensors")})
    check_model(make_config(vars(config), resolve_model(config, "x")))
