"""The layers on several devices: sharding rules for DTensors, a style for tensor parallelism, a helper for FSDP2.

The rules belong to the operators, so `grkan.group_rational` and the modules take DTensors of any placement. If the
channels are cut, each piece must hold whole groups, and it uses their coefficients. Every other dimension can be cut
anywhere; then the gradients of the coefficients are sums over the pieces. Any other placement is gathered first.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

from .errors import GrkanTypeError, GrkanValueError
from .nn import GroupRational
from .rational.arguments import check_module

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

_Rule = tuple[list[Placement | None], list[Placement | None]]  # of the outputs, and of the arguments


class GroupParallel(ParallelStyle):
    """Tensor parallelism for the second function of an MLP: each rank has the groups of its own channels.

    For `torch.distributed.tensor.parallel.parallelize_module`, between the two styles of the linear layers:

        parallelize_module(mlp, mesh, {"fc1": ColwiseParallel(), "act2": GroupParallel(), "fc2": RowwiseParallel()})

    The coefficients become DTensors, `Shard(0)`; a numerator that all groups share is replicated. The module then takes
    a DTensor, or the local channels of this rank, and returns the same kind.

    Raises:
        TypeError: the module is not a `GroupRational`.
        ValueError: the number of ranks does not divide its number of groups.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name in ("numerator", "denominator"):
            shard_groups_(module, name, device_mesh, self.src_data_rank)
        return module


def shard_groups_(module: nn.Module, name: str, mesh: DeviceMesh, source: int | None) -> None:
    """Turn one of the two parameters of a `GroupRational` into a DTensor; the errors are those of `GroupParallel`.

    Args:
        module: changed in place; from then on it takes a plain tensor as the channels of this rank.
        name: "numerator" or "denominator".
        mesh: of one dimension.
        source: the rank whose coefficients count; None: all ranks have the same.
    """
    if not isinstance(module, GroupRational):
        raise GrkanTypeError(
            f"GroupParallel must be applied to a GroupRational, such as act2; got a {type(module).__name__}"
        )
    if mesh.ndim != 1:
        raise GrkanValueError(f"GroupParallel needs a mesh with one dimension, such as mesh['tp']; got {mesh}")
    if module.num_groups % mesh.size():
        raise GrkanValueError(
            f"num_groups must be a multiple of the number of ranks, {mesh.size()}, so that each rank has whole groups; "
            f"got {module.num_groups}"
        )
    parameter = getattr(module, name)
    placement = Replicate() if name == "numerator" and module.share_numerator else Shard(0)
    sharded = distribute_tensor(parameter, mesh, [placement], src_data_rank=source)
    module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
    module.groups_are_local = True


def shard_(
    module: nn.Module, mesh: DeviceMesh | None = None, policy: "MixedPrecisionPolicy | None" = None, **options: Any
) -> nn.Module:
    """Run `torch.distributed.fsdp.fully_shard` on a module, and keep its rational functions in float32.

    A policy such as MixedPrecisionPolicy(param_dtype=torch.bfloat16) rounds all parameters of a module, and 8 bits are
    too few for coefficients: GELU of order (7, 6) would be off by 3.2e-2 instead of 3.3e-3. FSDP also refuses a unit
    that mixes bfloat16 weights and float32 coefficients. So the functions under `module` become a unit of their own in
    float32, and the rest another. Call it where you would call `fully_shard`: for every block, then for the model.

    Args:
        module: as for `fully_shard`, which changes it in place.
        mesh: as for `fully_shard`.
        policy: the `mp_policy` of everything but the coefficients; None: no mixed precision.
        **options: other arguments of `fully_shard`, such as reshard_after_forward and offload_policy.

    Returns:
        The module.

    Raises:
        TypeError: module is not a module.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    check_module("module", module)
    acts = [m for m in module.modules() if isinstance(m, GroupRational) and not isinstance(m, FSDPModule)]
    if acts:
        own = {key: value for key, value in options.items() if key == "offload_policy"}
        # Do not cast inputs; x keeps the dtype of the layers around the function.
        in_float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
        units: Any = [act for act in acts if act is not module] or module
        fully_shard(units, mesh=mesh, mp_policy=in_float32, **own)
    if not isinstance(module, FSDPModule):
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy(), **options)
    return module


_ops = torch.ops.grkan


@register_sharding(_ops.group_rational.default)
def _forward_rules(x: Any, numerator: Any, denominator: Any, form: str, dim: int) -> list[_Rule]:
    return [
        ([of_x], [of_x, *coefficients, None, None])
        for of_x, coefficients, _ in _placements(x, numerator, denominator, dim)
    ]


@register_sharding(_ops.group_rational_backward.default)
def _backward_rules(grad: Any, x: Any, numerator: Any, denominator: Any, form: str, dim: int) -> list[_Rule]:
    return [
        ([of_x, *gradients], [of_x, of_x, *coefficients, None, None])
        for of_x, coefficients, gradients in _placements(x, numerator, denominator, dim)
    ]


def _placements(
    x: Any, numerator: Any, denominator: Any, dim: int
) -> list[tuple[Placement, list[Placement], list[Placement]]]:
    """Return the placements that x, its coefficients and their gradients may have on one dimension of the mesh."""
    rows = [t.shape[0] for t in (numerator, denominator)]
    groups = max(rows)
    whole: list[Placement] = [Replicate(), Replicate()]
    rules: list[tuple[Placement, list[Placement], list[Placement]]] = [(Replicate(), whole, whole)]
    rules += [(Shard(d), whole, [Partial(), Partial()]) for d in range(x.ndim) if d != dim or groups == 1]
    if groups > 1 and groups % x.mesh.size() == 0:  # of the whole mesh, as each of its dimensions may cut the channels
        own: list[Placement] = [Shard(0) if n == groups else Replicate() for n in rows]
        gradients: list[Placement] = [Shard(0) if n == groups else Partial() for n in rows]
        rules.append((Shard(dim), own, gradients))
    return rules
