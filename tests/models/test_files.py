"""save_model and load_model: what comes back, and what is refused."""

import json
import os

import pytest
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import nn

import grkan.models.kat
from grkan.models import files, load_model, read_metadata, save_model
from grkan.models.metadata import FORMAT_VERSION
from grkan.nn import GRKAN, GroupRational


def micro(**kwargs):
    return timm.create_model("kat_micro_patch2_8", **kwargs)


def image(channels=1, size=8, dtype=torch.float32):
    return torch.randn(3, channels, size, size).to(dtype)


def assert_same(model, other, x):
    other_state = other.state_dict()
    assert list(model.state_dict()) == list(other_state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == other_state[name].dtype, name
        assert torch.equal(tensor, other_state[name]), name
    assert torch.equal(model.eval()(x), other(x))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"order": (7, 6), "form": "sum_of_abs", "share_numerator": True, "num_groups": 4},
        {"act_init": ("gelu", ([0.0, 1.0, 0.1, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]))},
        {"depth": 1, "embed_dim": 48, "drop_path_rate": 0.1, "class_token": False, "global_pool": "avg"},
        {"attn_init": "mimetic", "mlp_init": "trunc_normal", "norm_layer": "rmsnorm"},
    ],
)
def test_round_trip(tmp_path, arguments):
    model = micro(**arguments)
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert not loaded.training
    assert type(loaded) is type(model)
    assert_same(model, loaded, image())
    again = json.loads(json.dumps({**arguments}))
    assert {key: loaded.grkan_arguments[key] for key in again} == again


@pytest.mark.parametrize("name", timm.list_models("kat_*") + timm.list_models("grkan_vit_micro_*"))
def test_every_registered_model(tmp_path, name):
    model = timm.create_model(name, depth=1)
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert_same(model, loaded, torch.randn(1, *model.default_cfg["input_size"]))
    assert tuple(loaded.grkan_metadata["preprocessing"]["input_size"]) == model.default_cfg["input_size"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path, dtype):
    model = micro().to(dtype)
    save_model(model, tmp_path / "m.safetensors")
    assert_same(model, load_model(tmp_path / "m.safetensors"), image(dtype=dtype))


@pytest.mark.parametrize("pool", [None, "avg"])
def test_a_changed_classifier_and_input_size(tmp_path, pool):
    model = micro()
    model.reset_classifier(3, pool)
    model.set_input_size((12, 12))
    save_model(model, tmp_path / "m.safetensors", classes=["a", "b", "c"])
    loaded = load_model(tmp_path / "m.safetensors")
    assert_same(model, loaded, image(size=12))
    assert loaded.grkan_metadata["preprocessing"]["input_size"] == [1, 12, 12]


@pytest.mark.parametrize("name", ["grkan_vit_micro_patch2_8", "vit_tiny_patch16_224", "resnet18"])
def test_other_models_of_the_registry(tmp_path, name):
    arguments = {"num_classes": 4, "in_chans": 1}
    model = timm.create_model(name, **arguments)
    save_model(model, tmp_path / "m.safetensors", arguments=arguments)
    loaded = load_model(tmp_path / "m.safetensors")
    assert_same(model, loaded, image(size=8 if "micro" in name else 224))
    save_model(loaded, tmp_path / "again.safetensors")  # it remembers its arguments
    assert_same(model, load_model(tmp_path / "again.safetensors"), image(size=8 if "micro" in name else 224))


@pytest.mark.skipif(not hasattr(timm.models, "get_model_args"), reason="this timm does not keep a model's arguments")
def test_what_timm_keeps_of_a_model_is_enough(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    model.reset_classifier(4)
    save_model(model, tmp_path / "m.safetensors")
    assert_same(model, load_model(tmp_path / "m.safetensors"), image(3, 32))


def test_the_twin_keeps_its_mlp_init(tmp_path):
    save_model(
        timm.create_model("grkan_vit_micro_patch2_8", mlp_init="variance_preserving"), tmp_path / "m.safetensors"
    )
    loaded = load_model(tmp_path / "m.safetensors")
    loaded.init_weights()
    assert loaded.blocks[0].mlp.fc2.weight.std().item() == pytest.approx((2.3517 / 384) ** 0.5, rel=0.02)


def test_metadata(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(micro(num_classes=2), path, classes=("zero", "one"), preprocessing={"mean": (0.5,), "crop_pct": 0.9})
    metadata = read_metadata(path)
    assert metadata["model"] == "kat_micro_patch2_8"
    assert metadata["arguments"]["num_classes"] == 2
    assert metadata["classes"] == ["zero", "one"]
    assert metadata["preprocessing"] == {"mean": [0.5], "crop_pct": 0.9}
    assert metadata["forms"]["blocks.0.mlp.act1"] == "abs_of_sum"
    assert len(metadata["forms"]) == 8
    assert metadata["grkan_version"] == grkan.__version__
    loaded = load_model(path)
    assert loaded.grkan_metadata == metadata
    save_model(loaded, path)
    assert read_metadata(path) == metadata


def test_preprocessing_fits_the_model(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(timm.create_model("kat_micro_patch4_32", in_chans=1, img_size=40), path)
    preprocessing = read_metadata(path)["preprocessing"]
    assert preprocessing["input_size"] == [1, 40, 40]
    assert preprocessing["mean"] == preprocessing["std"] == [0.5]


def test_a_loaded_model_that_is_changed_and_saved_again(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(micro(num_classes=2), path, classes=["a", "b"])
    model = load_model(path)
    model.set_input_size((12, 12))
    save_model(model, path)
    assert read_metadata(path)["preprocessing"]["input_size"] == [1, 12, 12]
    assert read_metadata(path)["classes"] == ["a", "b"]
    assert_same(model, load_model(path), image(size=12))
    model.reset_classifier(3)
    with pytest.raises(ValueError, match="a name for each of the model's 3 outputs; got 2"):
        save_model(model, path)


def test_a_feature_extractor(tmp_path):
    model = micro(features_only=True, out_indices=(1, 2)).eval()
    save_model(model, tmp_path / "m.safetensors")
    x = image()
    torch.testing.assert_close(load_model(tmp_path / "m.safetensors")(x), model(x), rtol=0, atol=0)


def test_a_module_that_grkan_cannot_build(tmp_path):
    path = tmp_path / "layer.safetensors"
    layer = GRKAN(16, 32)
    save_model(layer, path)
    with pytest.raises(ValueError, match=r"does not say how to build.*load_model\(path, model=\.\.\.\)"):
        load_model(path)
    other = load_model(path, GRKAN(16, 32))
    assert_same(layer, other, torch.randn(2, 16))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.act = GroupRational(2)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight
        self.first = self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.act(self.second(self.first(self.embed(x)))))


def test_tied_weights(tmp_path):
    model, other = Tied(), Tied()
    save_model(model, tmp_path / "m.safetensors")
    load_model(tmp_path / "m.safetensors", other)
    assert_same(model, other, torch.arange(5))
    assert other.head.weight is other.embed.weight


def test_a_parameter_that_is_not_contiguous(tmp_path):
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    model.weight.data = torch.randn(3, 4).T
    save_model(model, tmp_path / "m.safetensors")
    assert torch.equal(load_model(tmp_path / "m.safetensors", other).weight, model.weight)


class TestRefused:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "m.safetensors"
        save_model(micro(), path)
        return path

    def rewrite(self, path, **fields):
        state = safetensors.torch.load_file(path)
        metadata = {**read_metadata(path), **fields}
        safetensors.torch.save_file(state, path, metadata={"grkan": json.dumps(metadata)})

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no model file .*none.safetensors"):
            load_model(tmp_path / "none.safetensors")

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder, not a model file"):
            load_model(tmp_path)

    @pytest.mark.parametrize("size", [0, 5, 1000, -1])
    def test_truncated(self, path, size):
        data = path.read_bytes()
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
            load_model(path)

    def test_a_pickle(self, path):
        torch.save({"a": torch.ones(2)}, path)
        with pytest.raises(ValueError, match="not a safetensors file"):
            load_model(path)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_foreign(self, path, metadata):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"was not written by grkan\.save_model"):
            load_model(path)

    def test_damaged_metadata(self, path):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata={"grkan": '{"format_version": 1'})
        for function in (load_model, read_metadata):
            with pytest.raises(ValueError, match=r"m\.safetensors is damaged: its metadata is not JSON"):
                function(path)

    def test_newer_format(self, path):
        self.rewrite(path, format_version=FORMAT_VERSION + 1)
        with pytest.raises(ValueError, match=r"has format 2, .* reads only formats up to 1: upgrade grkan"):
            load_model(path)

    def test_unknown_model(self, path):
        self.rewrite(path, model="kat_giant")
        with pytest.raises(ValueError, match="holds a 'kat_giant', which timm does not know"):
            load_model(path)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"num_grups": 4}, "TypeError.*num_grups"),
            ({"num_heads": 0}, "ZeroDivisionError"),
            ({"norm_layer": "none"}, "KeyError: 'none'"),
        ],
    )
    def test_arguments_that_do_not_fit(self, path, arguments, match):
        self.rewrite(path, arguments=arguments)
        with pytest.raises(ValueError, match=f"cannot be built: {match}"):
            load_model(path)

    def test_a_failure_of_the_machine_is_not_the_files(self, path, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        for module, name in ((timm, "create_model"), (files, "apply_recipe"), (nn.Module, "load_state_dict")):
            self.rewrite(path, conversion={"version": 1, "layers": []})
            with monkeypatch.context() as patch:
                patch.setattr(module, name, fail)
                with pytest.raises(RuntimeError, match=r"^CUDA error"):
                    load_model(path)

    def test_a_recipe_that_is_wrong(self, path):
        self.rewrite(path, conversion={"version": 1, "layers": [3]})
        with pytest.raises(ValueError, match="holds a converted model, of which the layer 0 of recipe must be"):
            load_model(path)

    def test_a_file_cannot_name_another_file(self, path, tmp_path):
        self.rewrite(path, arguments={"checkpoint_path": str(tmp_path / "evil.pt"), "pretrained": True})
        load_model(path)  # would fail: there is no such file

    @pytest.mark.parametrize(
        ("other", "match"),
        [
            ({"form": "sum_of_abs"}, "has the form 'abs_of_sum' instead of 'sum_of_abs'"),
            ({"depth": 5}, r"blocks\.4\.norm1\.weight is missing; .*, and \d+ more"),
            ({"depth": 3}, r"blocks\.3\.\S+ is unknown; .*, and \d+ more"),
            ({"num_classes": 7}, r"head\.weight has shape \(10, 96\) instead of \(7, 96\)"),
            ({"order": (7, 6)}, r"act1\.numerator has shape \(48,\) instead of \(64,\)"),
        ],
    )
    def test_another_model_which_stays_unchanged(self, path, other, match):
        model = micro(**other)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=match) as caught:
            load_model(path, model)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.training
        assert not hasattr(model, "grkan_metadata")

    def test_arguments_that_are_not_json(self, tmp_path):
        path = tmp_path / "m.safetensors"
        model = micro(norm_layer=nn.LayerNorm)
        with pytest.raises(TypeError, match="norm_layer must be valid JSON"):
            save_model(model, path)
        assert os.listdir(tmp_path) == []
        save_model(model, path, arguments={"norm_layer": "layernorm"})
        load_model(path)

    def test_the_wrong_number_of_classes(self, tmp_path):
        with pytest.raises(ValueError, match="a name for each of the model's 10 outputs; got 2"):
            save_model(micro(), tmp_path / "m.safetensors", classes=["a", "b"])

    def test_no_data(self, path):
        for function in (lambda model: save_model(model, path), lambda model: load_model(path, model)):
            with pytest.raises(ValueError, match="are meta or fake tensors"):
                function(micro(device="meta"))

    @pytest.mark.parametrize(
        ("call", "match"),
        [
            (lambda path: load_model(None), "path must be a str or a pathlib.Path; got None"),
            (lambda path: read_metadata(3), "path must be a str or a pathlib.Path; got 3"),
            (lambda path: load_model(path, "vit"), "model must be a torch.nn.Module; got 'vit'"),
            (lambda path: load_model(path, nn.Linear), "model must be a torch.nn.Module; got <class"),
            (lambda path: save_model(None, path), "model must be a torch.nn.Module; got None"),
            (lambda path: save_model(micro(), 3), "path must be a str or a pathlib.Path; got 3"),
            (lambda path: save_model(micro(), path, arguments=3), "arguments must be a mapping; got 3"),
            (lambda path: save_model(micro(), path, preprocessing=3), "preprocessing must be a mapping; got 3"),
            (lambda path: save_model(micro(), path, classes="0123456789"), "classes must be a sequence of names"),
        ],
    )
    def test_wrong_types(self, path, call, match):
        before = path.read_bytes()
        with pytest.raises(TypeError, match=match):
            call(path)
        assert path.read_bytes() == before

    def test_a_pipe_is_not_replaced(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="is a device or a pipe"):
            save_model(micro(), tmp_path / "pipe")
        assert (tmp_path / "pipe").is_fifo()

    def test_places_that_cannot_be_written(self, tmp_path):
        with pytest.raises(IsADirectoryError, match="is a folder, not a file"):
            save_model(micro(), tmp_path)
        with pytest.raises(FileNotFoundError, match=r"there is no such folder: .*nowhere"):
            save_model(micro(), tmp_path / "nowhere" / "m.safetensors")


def test_others_may_read_a_model_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(micro(), tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failing", ["write", "sync"])
def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / "m.safetensors"
    save_model(micro(), path)
    before = path.read_bytes()
    original = safetensors.torch.save_file

    def full(*args, **kwargs):
        original(*args, **kwargs)
        raise SafetensorError("No space left on device")

    def broken(_):
        raise OSError("No space left on device")

    if failing == "write":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    else:
        monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space left on device"):
        save_model(micro(num_classes=3), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]
