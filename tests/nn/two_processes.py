"""The start of layers and models that are sharded over two processes; `test_grkan.py` runs it with torchrun."""

import itertools
import sys
import warnings
from functools import partial

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from grkan.nn import GRKAN, GroupRational, RationalLinear

WIDTH = 192


def reset_in_order(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def init_weights(model):
    for layer in model:
        layer.init_weights()


def record(squares, module, inputs, output):
    squares.append(output.square().mean().item())


def main():
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    torch.manual_seed(rank)
    for start in (reset_in_order, init_weights):
        with torch.device("meta"):
            model = nn.Sequential(GRKAN(WIDTH, 4 * WIDTH), RationalLinear(WIDTH, WIDTH), GroupRational(3, "gelu"))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh).to_empty(device="cpu")
        start(model[:2])
        model[2].init_weights()
        expected = GRKAN(8).state_dict()
        for name, value in model[0].state_dict().items():
            if "erator" in name:
                assert torch.equal(value.full_tensor(), expected[name]), name
            elif "_extra_state" in name:
                assert torch.equal(value, expected[name]), name
        assert torch.equal(model[2].state_dict()["numerator"].full_tensor(), GroupRational(3, "gelu").numerator)
        squares = [1.0]
        for layer in model[:2]:
            layer.register_forward_hook(partial(record, squares))
        model(torch.randn(1024, WIDTH)).sum().backward()
        assert all(0.8 < after / before < 1.25 for before, after in itertools.pairwise(squares)), squares
        assert model[0].act2.numerator.grad.full_tensor().any()
    with torch.device("meta"):
        model = timm.create_model("kat_micro_patch2_8", depth=1, attn_init="mimetic")
    fully_shard(model, mesh=mesh).to_empty(device="cpu")
    model.init_weights()
    state = {name: t.full_tensor() for name, t in model.state_dict().items() if hasattr(t, "full_tensor")}
    assert all(t.isfinite().all() for t in state.values())
    value = state["blocks.0.attn.qkv.weight"][2 * 96 :].T
    product = value @ state["blocks.0.attn.proj.weight"].T
    assert -0.5 < product.diagonal().mean() < -0.3, product.diagonal().mean()  # 0.4 Z - 0.4 I
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
