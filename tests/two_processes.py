"""What `test_parallel.py` runs under torchrun: every check compares two gloo processes with one.

    torchrun --nproc-per-node 2 tests/two_processes.py RESULTS.json FOLDER [NAME ...]

The results are {name: null, or what went wrong}. A check that fails on one process only would leave the other one
waiting; so does nothing here before a collective that differs between the two, and gloo gives up after a minute.
"""

import contextlib
import copy
import datetime
import itertools
import json
import re
import sys
import traceback
import types
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import grkan
from grkan.errors import GrkanTypeError, GrkanValueError
from grkan.parallel import shard_

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def close(actual, expected, tolerance=1e-5):
    """The largest difference, relative to the largest number."""
    actual, expected = whole(actual).detach().double(), whole(expected).detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"off by {error:.2e}"


def mlp(**arguments):
    """A GRKAN whose groups all differ."""
    torch.manual_seed(0)
    layer = grkan.GRKAN(32, 64, **arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLAN = {"fc1": ColwiseParallel(), "act2": grkan.GroupParallel(), "fc2": RowwiseParallel()}


@check
def dtensors_of_any_placement_go_through():
    x, grad = numbers(4, 6, 32), numbers(4, 6, 32, seed=2)
    for groups, shared, form in itertools.product((8, 2, 1, 3), (False, True), ("abs_of_sum", "sum_of_abs")):
        channels = 24 if groups == 3 else 32
        a, b = numbers(1 if shared else groups, 6, seed=3), numbers(groups, 4, seed=4)
        one = [t.clone().requires_grad_() for t in (x[..., :channels].contiguous(), a, b)]
        expected = grkan.group_rational(*one, form=form)
        expected.backward(grad[..., :channels].contiguous())
        for placement, of_b in itertools.product((Replicate(), Shard(0), Shard(1), Shard(2)), (Replicate(), Shard(0))):
            placements = placement, Replicate() if shared else of_b, of_b
            two = [
                distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip(one, placements, strict=True)
            ]
            y = grkan.group_rational(*two, form=form)
            close(y, expected)
            y.backward(distribute_tensor(grad[..., :channels].contiguous(), mesh, [placement]))
            for actual, right in zip(two, one, strict=True):
                close(actual.grad, right.grad)


@check
def channels_first_and_partial_sums():
    x, a, b = numbers(4, 32, 5, 5), numbers(8, 6, seed=3), numbers(8, 4, seed=4)
    expected = grkan.group_rational(x, a, b, channel_dim=1)
    a, b = (distribute_tensor(t, mesh, [Replicate()]) for t in (a, b))
    for d in range(4):
        y = grkan.group_rational(distribute_tensor(x, mesh, [Shard(d)]), a, b, channel_dim=1)
        close(y, expected)
    halves = DTensor.from_local(x / 2, mesh, [Partial()])  # F of a sum is not the sum of F
    close(grkan.group_rational(halves, a, b, channel_dim=1), expected)


@check
def rational_linear_of_dtensors():
    tensors = numbers(4, 6, 32), numbers(8, 6, seed=2), numbers(8, 4, seed=3), numbers(16, 32, seed=4), numbers(16)
    compiled = torch.compile(grkan.rational_linear, backend="aot_eager", fullgraph=True)
    layouts = {
        "replicated": (Replicate(),) * 5,
        "batch": (Shard(0), *(Replicate(),) * 4),
        "columns": (Replicate(), Replicate(), Replicate(), Shard(0), Shard(0)),
        "rows": (Shard(2), Shard(0), Shard(0), Shard(1), Replicate()),
    }
    one = [t.clone().requires_grad_() for t in tensors]
    expected = grkan.rational_linear(*one)
    expected.square().sum().backward()
    for function, placements in itertools.product((grkan.rational_linear, compiled), layouts.values()):
        two = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(tensors, placements, strict=True)]
        y = function(*two)
        close(y, expected)
        y.square().sum().backward()
        for actual, right in zip(two, one, strict=True):
            close(actual.grad, right.grad)


@check
def tensor_parallel_training_is_that_of_one_process():
    x = numbers(64, 32)
    target = torch.sin(3 * x) @ numbers(32, 32, seed=5) / 4
    for shared, form in ((False, "abs_of_sum"), (True, "sum_of_abs")):
        for make in (lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=1e-3)):
            one = mlp(share_numerator=shared, form=form)
            two = copy.deepcopy(one)
            parallelize_module(two, mesh, PLAN)
            assert two.act2.denominator.placements == (Shard(0),)
            optimizers = [make(m.parameters()) for m in (one, two)]
            for _ in range(100):
                for module, optimizer in zip((one, two), optimizers, strict=True):
                    optimizer.zero_grad()
                    (module(x) - target).square().mean().backward()
                    optimizer.step()
            close(two(x), one(x))
            gathered = get_model_state_dict(two, options=StateDictOptions(full_state_dict=True))
            for name, value in one.state_dict().items():
                close(gathered[name], value)
            fresh = mlp(share_numerator=shared, form=form)
            fresh.load_state_dict(gathered)
            close(fresh(x), one(x))


@check
def tensor_parallel_with_dtensors_between():
    one, x, grad = mlp(), numbers(4, 6, 32).requires_grad_(), numbers(4, 6, 32, seed=2)
    two, z = copy.deepcopy(one), x.detach().clone().requires_grad_()
    parallelize_module(two, mesh, {**PLAN, "fc1": ColwiseParallel(use_local_output=False)})
    expected = one(x)
    expected.backward(grad)
    y = two(z)
    y.backward(grad)
    close(y, expected)
    close(z.grad, x.grad)
    for actual, right in zip(two.parameters(), one.parameters(), strict=True):
        close(actual.grad, right.grad)


@check
def sequence_parallel():
    one, x, grad = mlp(), numbers(4, 6, 32).requires_grad_(), numbers(4, 6, 32, seed=2)
    two = copy.deepcopy(one)
    plan = {
        "act1": SequenceParallel(),
        "fc1": ColwiseParallel(input_layouts=Shard(1)),
        "act2": grkan.GroupParallel(),
        "fc2": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(two, mesh, plan)
    part = slice(3 * rank, 3 * rank + 3)
    z = x.detach()[:, part].clone().requires_grad_()
    expected = one(x)
    expected.backward(grad)
    y = two(z)
    y.backward(grad[:, part])
    close(y, expected[:, part])
    close(z.grad, x.grad[:, part])
    for (name, actual), right in zip(two.named_parameters(), one.parameters(), strict=True):
        assert isinstance(actual.grad, DTensor), name
        close(actual.grad, right.grad)


@check
def sequence_parallel_around_the_mlp():
    one, x = mlp(), numbers(4, 6, 32)
    two = copy.deepcopy(one)
    parallelize_module(two, mesh, {**PLAN, "fc2": RowwiseParallel(output_layouts=Shard(1))})
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True)
    parallelize_module(two, mesh, gather)
    part = slice(3 * rank, 3 * rank + 3)
    close(two(x[:, part]), one(x)[:, part])


@check
def a_plan_without_group_parallel_is_refused():
    layer = mlp()
    parallelize_module(layer, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    with pytest.raises(GrkanValueError, match=r"64 channels.*32.*GroupParallel"):
        layer(numbers(4, 32))


@check
def groups_that_the_ranks_do_not_divide_are_refused():
    torch.manual_seed(0)
    layer = grkan.GRKAN(30, 60, num_groups=3)
    with pytest.raises(GrkanValueError, match=r"num_groups.* multiple of the number of ranks, 2.*got 3"):
        parallelize_module(layer, mesh, PLAN)
    with pytest.raises(GrkanTypeError, match=r"GroupParallel must be applied to a GroupRational.*Linear"):
        parallelize_module(layer, mesh, {"fc1": grkan.GroupParallel()})


@check
def transformers_plans():
    """`tp_plan` of a converted LLaMA, whose activation lies between the two, and of its wrapped linear layers."""
    transformers = pytest.importorskip("transformers")
    distributed = pytest.importorskip("transformers.distributed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    one = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 8))
    grkan.convert_(one, calibration=[{"input_ids": ids}])
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "numerator" in name or "denominator" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if rank == 0:
        one.save_pretrained(folder / "llama")
    dist.barrier()
    two = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "llama", distributed_config=distributed.DistributedConfig(tp_plan="auto", tp_size=2)
    ).eval()
    act = two.model.layers[0].mlp.act_fn
    assert act.denominator.placements == (Shard(0),)
    assert two.model.layers[0].mlp.down_proj.weight.placements == (Shard(1),)
    close(two(input_ids=ids).logits, one(input_ids=ids).logits)
    for model in (one, two):
        model(input_ids=ids, labels=ids).loss.backward()
    for name in ("numerator", "denominator"):
        close(getattr(act, name).grad, getattr(one.model.layers[0].mlp.act_fn, name).grad, 1e-4)
    plain = transformers.LlamaForCausalLM(config)
    if rank == 0:
        plain.save_pretrained(folder / "plain")
    dist.barrier()
    sharded = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "plain", distributed_config=distributed.DistributedConfig(tp_plan="auto", tp_size=2)
    )
    with pytest.raises(GrkanValueError, match="shard"):
        grkan.convert_(sharded, calibration=[{"input_ids": ids}])


def kat(**arguments):
    torch.manual_seed(0)
    return timm.create_model("kat_micro_patch2_8", depth=2, **arguments)


BATCHES = [
    (numbers(16, 1, 8, 8, seed=s), torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(s)))
    for s in range(4)
]


def train(model, shard=True, step=None, accumulate=1):
    """A few steps; each process takes every second image."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for x, y in BATCHES:
        if shard:
            x, y = x[rank::2], y[rank::2]
        optimizer.zero_grad()
        for k in range(accumulate):
            last = k == accumulate - 1
            with model.no_sync() if shard and not last and isinstance(model, DDP) else contextlib.nullcontext():
                images, labels = x[k::accumulate], y[k::accumulate]
                loss = nn.functional.cross_entropy(model(images).float(), labels) / accumulate
                loss.backward()
        optimizer.step()
    return model


def gathered(model):
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in state.items()}


def same_weights(model, expected, tolerance=3e-5):
    state = model if isinstance(model, dict) else gathered(model)
    expected = expected.state_dict()
    assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
    for name, value in expected.items():
        close(state[name], value, tolerance)


def shard_blocks(model, **options):
    for block in model.blocks:
        shard_(block, mesh, **options)
    return shard_(model, mesh, **options)


@check
def fsdp2_trains_as_one_process():
    expected = train(kat(), shard=False)
    same_weights(train(shard_blocks(kat())), expected)
    same_weights(train(shard_(kat(), mesh)), expected)  # all in one unit
    same_weights(train(shard_blocks(kat(), offload_policy=CPUOffloadPolicy(pin_memory=False))), expected)
    checkpointed = kat()
    checkpointed.set_grad_checkpointing(True)
    same_weights(train(shard_blocks(checkpointed)), expected)


@check
def fsdp2_checkpoint_wrapper():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    model = kat()
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, grkan.GRKAN)
    )
    same_weights(train(shard_blocks(model)), train(kat(), shard=False))
    assert grkan.no_weight_decay(model) <= {name for name, _ in model.named_parameters()}


@check
def fsdp2_from_the_meta_device():
    with torch.device("meta"):
        models = [kat(), kat()]
    for model, how in zip(models, ("init_weights", "reset_parameters"), strict=True):
        shard_blocks(model)
        model.to_empty(device="cpu")
        if how == "init_weights":
            model.init_weights()
        else:
            for module in model.modules():
                if callable(reset := getattr(module, how, None)):
                    reset()
        state, fresh = gathered(model), kat().state_dict()
        for name, value in fresh.items():
            if "act" in name:
                close(state[name], value, 0)
            elif "mlp.fc" in name and name.endswith("weight"):
                ratio = state[name].std() / value.std()
                assert 0.95 < ratio < 1.05, (how, name, ratio)
        weight = state["blocks.0.mlp.fc1.weight"]
        assert not torch.equal(*weight.chunk(2))  # each rank draws its own part
    train(models[0])


@check
def accelerate_scatters_the_weights_of_the_first_process():
    """What it calls for FSDP2 with cpu_ram_efficient_loading, after the model was moved to meta and sharded."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import fsdp_utils

    assert accelerate
    source = nn.Sequential(kat())  # it asks the model for parameters of its own in a way of transformers' models
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    with torch.device("meta"):
        model = nn.Sequential(kat())
    shard_blocks(model[0])
    shard_(model, mesh)
    main = types.SimpleNamespace(is_main_process=dist.get_rank() == 0)
    fsdp_utils.fsdp2_load_full_state_dict(main, model, source.state_dict() if main.is_main_process else {})
    same_weights(model, source)
    assert "0.blocks.0.mlp.act1._extra_state" in model.state_dict()


@check
def fsdp2_in_bfloat16_keeps_the_coefficients_in_float32():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard_blocks(kat(), policy=policy)
    seen = set()
    for module in model.modules():
        if isinstance(module, grkan.GroupRational):
            module.register_forward_hook(
                lambda m, args, y: seen.add((args[0].dtype, y.dtype, m.coefficients()[0].dtype, m.denominator.dtype))
            )
    train(model)
    assert seen == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)}, seen
    # With them rounded, too, this would be off by a percent.
    one, x = mlp(), numbers(64, 32)
    two = shard_(copy.deepcopy(one), mesh, policy)
    close(two(x), one.to(torch.bfloat16)(x.bfloat16()), 0)


@check
def fsdp2_of_a_bfloat16_model():
    model = shard_blocks(kat().to(torch.bfloat16))
    for x, y in BATCHES[:1]:
        nn.functional.cross_entropy(model(x[rank::2].bfloat16()).float(), y[rank::2]).backward()
    dtypes = {"numerator" in n or "denominator" in n: p.dtype for n, p in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(p.grad is not None for p in model.parameters())


@check
def fsdp2_of_a_rational_linear():
    torch.manual_seed(0)
    one = nn.Sequential(grkan.RationalLinear(96, 96), grkan.RationalLinear(96, 10))
    two = copy.deepcopy(one)
    for layer in two:
        shard_(layer, mesh)
    shard_(two, mesh)
    assert all(isinstance(m, FSDPModule) for layer in two for m in (layer, layer.act))
    close(two(numbers(4, 96)), one(numbers(4, 96)))
    for layer in (alone := copy.deepcopy(one)):
        torch.distributed.fsdp.fully_shard(layer.act, mesh=mesh)
    torch.distributed.fsdp.fully_shard(alone, mesh=mesh)
    close(alone(numbers(4, 96)), one(numbers(4, 96)))


@check
def a_checkpoint_of_two_processes():
    """Read again by the test, in one process; and here, into a model that is not sharded."""
    model = train(shard_blocks(kat()))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    state = gathered(model)
    if rank == 0:
        torch.save(state, folder / "gathered.pt")
        grkan.save_model(model, folder / "gathered.safetensors", state_dict=state)
    again = shard_blocks(kat(num_classes=10))
    target = {"model": get_model_state_dict(again)}
    dcp.load(target, checkpoint_id=folder / "dcp")
    set_model_state_dict(again, target["model"])
    for name, value in gathered(again).items():
        close(value, state[name], 0)


@check
def ddp():
    expected = train(kat(), shard=False)
    same_weights(train(DDP(kat())).module.state_dict(), expected)
    same_weights(train(DDP(kat(), static_graph=True)).module.state_dict(), expected)
    same_weights(train(DDP(kat()), accumulate=2).module.state_dict(), expected)
    model = kat()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    same_weights(train(DDP(model)).module.state_dict(), expected)


@check
def steps_scaled_by_the_data_of_both():
    """Each process calibrates with its part; a sharded model is refused."""
    one, x = grkan.GRKAN(16, 32, 16), 9.0 * numbers(40, 16)
    two = copy.deepcopy(one)
    gradient = [torch.ones_like(p) for p in one.act1.parameters()]
    for model, part in ((one, x), (DDP(two), x[:30] if rank == 0 else x[30:])):
        optimizer = torch.optim.SGD(grkan.param_groups(model, 0.0), lr=0.1)
        grkan.scale_coefficient_steps(optimizer, model, part)
        optimizer.zero_grad()
        act = getattr(model, "module", model).act1
        for p, g in zip(act.parameters(), gradient, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, q in zip(two.act1.parameters(), one.act1.parameters(), strict=True):
        close(p, q, 1e-4)
    model = DDP(copy.deepcopy(one))
    said = "must have at least one batch" if rank == 1 else "must succeed in every process; it failed in another"
    with pytest.raises(GrkanValueError, match=said):
        grkan.scale_coefficient_steps(torch.optim.AdamW(model.parameters()), model, [] if rank == 1 else [x])
    sharded = shard_blocks(kat())
    with pytest.raises(GrkanValueError, match=r"model must have whole coefficients; those of .* are sharded"):
        grkan.scale_coefficient_steps(torch.optim.AdamW(sharded.parameters()), sharded, numbers(2, 3, 32, 32))


@check
def the_lines_of_the_documentation():
    page = (Path(__file__).parent.parent / "docs" / "in_other_hands.md").read_text(encoding="utf-8")
    x = numbers(4, 1, 8, 8)
    for section in ("FSDP2", "Tensor parallelism", "DDP"):
        (block,) = re.findall(rf"^## {section}\n.*?```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
        namespace = {"torch": torch, "grkan": grkan, "mesh": mesh, "model": kat()}
        exec(compile(block, section, "exec"), namespace)
        model = namespace["model"]
        y = model(x)
        y.float().sum().backward()
        close(y, kat()(x), 3e-2 if section == "FSDP2" else 1e-5)  # FSDP2's lines compute in bfloat16


@check
def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import MixedPrecision, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def shard(model, **options):
        wrap = ModuleWrapPolicy({timm.models.vision_transformer.Block})
        return FSDP(model, auto_wrap_policy=wrap, use_orig_params=True, device_id=torch.device("cpu"), **options)

    def state_of(model):
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            return model.state_dict()

    expected = train(kat(), shard=False)
    same_weights(state_of(train(shard(kat()))), expected)

    def start(module):
        module.to_empty(device="cpu", recurse=False)
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    with torch.device("meta"):
        layers = nn.Sequential(grkan.GRKAN(96, 384), grkan.GRKAN(96, 384))
    torch.manual_seed(0)
    sharded = FSDP(
        layers,
        auto_wrap_policy=ModuleWrapPolicy({grkan.GRKAN}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        param_init_fn=start,
    )
    y = sharded(numbers(512, 96))
    assert 0.6 < y.square().mean() < 1.6, y.square().mean()
    mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mixed._module_classes_to_ignore = (*mixed._module_classes_to_ignore, grkan.GroupRational)
    train(shard(kat(), mixed_precision=mixed))


@check
def sharded_layers_start_themselves():
    def in_order(model):
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def by_layer(model):
        for layer in model:
            layer.init_weights()

    width = 192
    for start in (in_order, by_layer):
        with torch.device("meta"):
            layers = grkan.GRKAN(width, 4 * width), grkan.RationalLinear(width, width), grkan.GroupRational(3, "gelu")
            model = nn.Sequential(*layers)
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh).to_empty(device="cpu")
        torch.manual_seed(dist.get_rank())
        start(model[:2])
        model[2].init_weights()
        expected = grkan.GRKAN(8).state_dict()
        for name, value in model[0].state_dict().items():
            if "erator" in name or "_extra_state" in name:
                assert torch.equal(whole(value), expected[name]), name
        assert torch.equal(whole(model[2].numerator), grkan.GroupRational(3, "gelu").numerator)
        x = numbers(1024, width)
        for layer in model[:2]:
            y = layer(x)
            assert 0.8 < y.square().mean() / x.square().mean() < 1.25
            x = y
        x.sum().backward()
        assert whole(model[0].act2.numerator.grad).any()


@check
def a_sharded_kat_starts_itself():
    with torch.device("meta"):
        model = timm.create_model("kat_micro_patch2_8", depth=1, attn_init="mimetic")
    fully_shard(model, mesh=mesh).to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    model.init_weights()
    state = {name: whole(t) for name, t in model.state_dict().items()}
    assert all(t.isfinite().all() for t in state.values())
    value = state["blocks.0.attn.qkv.weight"][2 * 96 :].T
    product = value @ state["blocks.0.attn.proj.weight"].T
    assert -0.5 < product.diagonal().mean() < -0.3, product.diagonal().mean()  # 0.4 Z - 0.4 I


def main(results, names):
    problems = {}
    for name, function in CHECKS.items():
        if names and name not in names:
            continue
        try:
            torch.manual_seed(0)
            function()
            problem = None
        except Exception:
            problem = f"process {rank}: {traceback.format_exc()}"
            print(name, problem, file=sys.stderr, flush=True)  # if it failed alone, the other one waits elsewhere
        problems_of_all = [None, None]
        dist.all_gather_object(problems_of_all, problem)
        problems[name] = next((p for p in problems_of_all if p), None)
        if rank == 0:
            Path(results).write_text(json.dumps(problems))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, mesh, folder = dist.get_rank(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), Path(sys.argv[2])
    main(sys.argv[1], sys.argv[3:])
    dist.destroy_process_group()
