"""A model whose weights and optimiser state are cut into as many parts as there are processes (FSDP)."""

import atexit
import secrets
import shutil
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ..errors import GrkanValueError
from ..parallel import shard_
from .processes import from_main

_PARTS = "parts-"


def shard_model_(model: nn.Module, device: torch.device, precision: str) -> None:
    """Cut the parameters into parts, block by block: they become DTensors.

    Args:
        model: the model, on the device; it is changed.
        device: the device of this process.
        precision: "bf16" computes in bfloat16, except for rational coefficients; "no" in float32.

    Raises:
        ValueError: the precision is another one.
    """
    if precision not in ("no", "bf16"):
        raise GrkanValueError(f"precision must be no or bf16 with shard; got {precision}")
    if not dist.is_initialized():  # one process, which can finish a run that several have begun
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else None
    for module in list(model.modules()):
        blocks = getattr(module, "blocks", None)  # timm's name, in a ViT and in the stages of others
        for block in blocks if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else ():
            shard_(block, mesh, policy)
    shard_(model, mesh, policy)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather the whole weights on the CPU of the main process; all processes must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def save_parts(folder: Path, model: nn.Module, optimizer: Any, averaged: nn.Module | None) -> str:
    """Write each process's part of the weights and of the optimiser's state.

    Returns:
        The name of a new folder in `folder`. Earlier ones stay until `remove_other_parts`.
    """
    name = from_main(lambda: f"{_PARTS}{secrets.token_hex(8)}")
    dcp.save(_parts(model, optimizer, averaged), checkpoint_id=folder / name)
    return name


def load_parts(path: Path, model: nn.Module, optimizer: Any, averaged: nn.Module | None) -> None:
    """Read what `save_parts` has written, with any number of processes.

    Raises:
        ValueError: the files are damaged or missing.
    """
    parts = _parts(model, optimizer, averaged)
    try:
        dcp.load(parts, checkpoint_id=path)
    except (dist.checkpoint.CheckpointException, OSError) as error:
        raise GrkanValueError(f"{path} is damaged; choose another --output to start again") from error
    set_model_state_dict(model, parts["model"])
    set_optimizer_state_dict(model, optimizer, parts["optimizer"])
    if averaged is not None:
        set_model_state_dict(averaged, parts["averaged"])


def remove_other_parts(folder: Path, name: str) -> None:
    """Delete the other folders of `save_parts` in `folder`: earlier or unfinished ones."""
    for path in folder.glob(f"{_PARTS}*"):
        if path.name != name:
            shutil.rmtree(path)


def _parts(model: nn.Module, optimizer: Any, averaged: nn.Module | None) -> dict[str, Any]:
    parts = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return parts if averaged is None else {**parts, "averaged": get_model_state_dict(averaged)}
