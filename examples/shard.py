"""Train a KAT whose parameters are split over processes by FSDP2, tensor parallelism, or both.

    torchrun --nproc-per-node 4 examples/shard.py                        FSDP2 over four
    torchrun --nproc-per-node 4 examples/shard.py --tensor-parallel 2    pairs share every layer, FSDP2 over the pairs

It runs on GPUs, and on CPUs for a trial. The model is created on the meta device, so no process ever holds all of it.
"""

import argparse
import os

import timm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

import grkan


def make_model(name: str, tensor_parallel: int, device: str) -> torch.nn.Module:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    mesh = init_device_mesh(
        device, (dist.get_world_size() // tensor_parallel, tensor_parallel), mesh_dim_names=("data", "tensor")
    )
    for block in model.blocks:
        if tensor_parallel > 1:
            # fc1 gives a process part of the channels, act2 holds the groups of this part, and fc2 adds the parts up.
            plan = {"mlp.fc1": ColwiseParallel(), "mlp.act2": grkan.GroupParallel(), "mlp.fc2": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kat_tiny_patch16_224")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes that share a layer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()

    if "WORLD_SIZE" not in os.environ:
        parser.error("start it by torchrun, as above")
    if int(os.environ["WORLD_SIZE"]) % options.tensor_parallel:
        parser.error(
            f"--tensor-parallel must divide the number of processes, {os.environ['WORLD_SIZE']}; "
            f"got {options.tensor_parallel}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    model = make_model(options.model, options.tensor_parallel, device)
    optimiser = torch.optim.AdamW(grkan.param_groups(model, 0.05), lr=1e-3)

    # Processes that share a layer see the same images.
    generator = torch.Generator().manual_seed(dist.get_rank() // options.tensor_parallel)
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(options.batch, *size, generator=generator).to(device)
    labels = torch.randint(0, 10, (options.batch,), generator=generator).to(device)
    for step in range(options.steps):
        loss = cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if dist.get_rank() == 0 and step % max(1, options.steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    print(f"process {dist.get_rank()} holds {local:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
