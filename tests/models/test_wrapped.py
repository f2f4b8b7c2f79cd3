"""save_model and load_model of what people hold while they train."""

import os
import socket
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.swa_utils import AveragedModel

import grkan
from grkan.models import load_model, read_metadata, save_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


def micro(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("kat_micro_patch2_8", depth=1, **kwargs)


def compiled_blocks(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, grkan.GRKAN))
    return model


@contextmanager
def one_process():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile in place": lambda model: (model.compile(backend="eager"), model)[1],
    "compiled blocks": compiled_blocks,
    "activation checkpointing": checkpointed,
    "DataParallel": nn.DataParallel,
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "AveragedModel": AveragedModel,
    "compile, DataParallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "DataParallel, compile, ModelEmaV3": lambda model: ModelEmaV3(
        torch.compile(nn.DataParallel(model), backend="eager")
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_model_inside_is_saved(tmp_path, wrap):
    path, model = tmp_path / "m.safetensors", micro()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(wrap(model), path, classes=list("0123456789"))
    loaded = load_model(path)
    assert read_metadata(path)["model"] == "kat_micro_patch2_8"
    assert loaded.grkan_metadata["classes"] == list("0123456789")
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("kind", ["compile", "DataParallel", "ModelEmaV3"])
def test_weights_are_loaded_into_a_wrapped_model(tmp_path, kind):
    path, model = tmp_path / "m.safetensors", micro()
    save_model(model, path)
    other = WRAPPERS[kind](micro(1))
    assert load_model(path, other) is other
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(getattr(other, "module", other)(x), model.eval()(x))


def test_ddp(tmp_path):
    path, model = tmp_path / "m.safetensors", micro()
    with one_process():
        save_model(nn.parallel.DistributedDataParallel(model), path)
    assert torch.equal(load_model(path).head.weight, model.head.weight)


def test_a_converted_part_of_a_model(tmp_path):
    path, x = tmp_path / "m.safetensors", torch.randn(2, 16)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))

    converted = model()
    grkan.convert_(converted[1], calibration=x)
    save_model(nn.DataParallel(converted), path)
    assert torch.equal(load_model(path, model())(x), converted(x))


class TestAStateDict:
    @pytest.mark.parametrize("kind", ["compile", "compiled blocks", "DataParallel", "compile, DataParallel"])
    def test_is_saved_under_the_names_of_the_model(self, tmp_path, kind):
        path, model = tmp_path / "m.safetensors", micro()
        wrapped = WRAPPERS[kind](model)
        state = {name: tensor + 1 for name, tensor in wrapped.state_dict().items() if tensor.is_floating_point()}
        save_model(wrapped, path, {**wrapped.state_dict(), **state})
        assert torch.equal(load_model(path).head.weight, model.head.weight + 1)

    def test_of_a_sharded_model(self, tmp_path):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        path, model = tmp_path / "m.safetensors", micro()
        head = model.head.weight.detach().clone()
        with one_process():
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match=r"cls_token is sharded.*save_model\(model, path, state_dict\)"):
                save_model(model, path)
            assert not os.path.exists(path)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            save_model(model, path, state_dict=state)
        assert torch.equal(load_model(path).head.weight, head)

    def test_of_fsdp1(self, tmp_path):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.fsdp import FullyShardedDataParallel

        path, model = tmp_path / "m.safetensors", micro()
        head = model.head.weight.detach().clone()
        with one_process():
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
            with pytest.raises(ValueError, match=r"_flat_param is sharded"):
                save_model(model, path)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            save_model(model, path, state_dict=state)
        assert torch.equal(load_model(path).head.weight, head)

    def test_ties_its_weights(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        save_model(model, tmp_path / "m.safetensors", model.state_dict())
        assert torch.equal(
            load_model(tmp_path / "m.safetensors", nn.Sequential(*map(nn.Linear, (4, 4), (4, 4))))[1].weight,
            model[0].weight,
        )

    @pytest.mark.parametrize("change", [{"head.weight": None}, {"tail": torch.ones(1)}])
    def test_has_the_names_of_the_model(self, tmp_path, change):
        model = micro()
        state = {name: tensor for name, tensor in {**model.state_dict(), **change}.items() if tensor is not None}
        with pytest.raises(
            ValueError, match=f"state_dict must have the same names as the model; {next(iter(change))} and 0"
        ):
            save_model(model, tmp_path / "m.safetensors", state)

    @pytest.mark.parametrize("state", [[1], {"head.weight": 1}])
    def test_is_a_mapping_of_tensors(self, tmp_path, state):
        with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors"):
            save_model(micro(), tmp_path / "m.safetensors", state)

    def test_on_the_meta_device(self, tmp_path):
        state = {name: tensor.to("meta") for name, tensor in micro().state_dict().items()}
        with pytest.raises(ValueError, match="are meta or fake tensors"):
            save_model(micro(), tmp_path / "m.safetensors", state)


class TestConversion:
    def model(self):
        torch.manual_seed(0)
        return timm.create_model("grkan_vit_micro_patch2_8", depth=1).eval()

    @pytest.mark.parametrize("kind", ["compile", "DataParallel", "compile, DataParallel"])
    def test_of_what_is_inside(self, tmp_path, kind):
        x, inner = torch.randn(2, 1, 8, 8), self.model()
        wrapped = WRAPPERS[kind](inner)
        before = wrapped(x)
        report = grkan.convert_(wrapped, calibration=x)
        assert [layer["name"] for layer in report.layers] == ["blocks.0.mlp"]
        assert isinstance(inner.blocks[0].mlp, grkan.GRKAN)
        after = wrapped(x)
        assert 0 < (after - before).norm() / before.norm() < 0.05
        assert torch.equal(after, inner(x))
        other = WRAPPERS[kind](self.model())
        grkan.apply_conversion_(other, report.recipe)
        assert torch.equal(other(x), after)
        save_model(wrapped, tmp_path / "m.safetensors")
        assert torch.equal(load_model(tmp_path / "m.safetensors")(x), after)

    @pytest.mark.parametrize("kind", ["ModelEmaV3", "AveragedModel"])
    def test_of_what_keeps_a_list_of_parameters(self, kind):
        model = WRAPPERS[kind](self.model())
        recipe = grkan.convert_(self.model()).recipe
        message = rf"before it is wrapped, because {kind} keeps .*; convert the module inside, \.module"
        for convert in (grkan.convert_, lambda model: grkan.apply_conversion_(model, recipe)):
            with pytest.raises(ValueError, match=message):
                convert(model)

    def test_of_what_fabric_has_set_up(self):
        fabric = type("_FabricModule", (nn.Module,), {"module": property(lambda self: self._forward_module)})()
        fabric._forward_module = self.model()
        with pytest.raises(ValueError, match=r"because _FabricModule keeps .*; convert the module inside, \.module"):
            grkan.convert_(fabric)

    def test_of_what_is_distributed(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with one_process():
            with pytest.raises(ValueError, match="DistributedDataParallel keeps a list of the parameters"):
                grkan.convert_(nn.parallel.DistributedDataParallel(self.model()))
            model = self.model()
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match="before it is sharded; its cls_token is a DTensor"):
                grkan.convert_(model)

    def test_of_what_fsdp1_holds(self):
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        with one_process():
            cpu = torch.device("cpu")
            with pytest.raises(ValueError, match="before it is wrapped, because FullyShardedDataParallel keeps a list"):
                grkan.convert_(FSDP(self.model(), device_id=cpu))
            model = self.model()
            model.blocks[0] = FSDP(model.blocks[0], device_id=cpu)
            with pytest.raises(ValueError, match=r"because FullyShardedDataParallel .*blocks\.0 is wrapped"):
                grkan.convert_(model)
