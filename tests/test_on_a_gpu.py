"""The library in its users' hands on a GPU. The numbers of the kernels are in tests/rational/test_gpu.py."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import grkan
from grkan import cli

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def native():
    """The kernel or an error."""
    torch.manual_seed(0)
    with grkan.set_backend("native"):
        yield


def make_layer(dtype=torch.float32):
    torch.manual_seed(0)
    return grkan.GRKAN(32, 64).to(DEVICE, dtype)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def run(model, x):
    """The output and the gradients of a module, as float64."""
    x = x.detach().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y.float().square().sum(), (x, *model.parameters()))
    return [t.detach().double() for t in (y, *grads)]


def assert_close(found, wanted, tolerance):
    """Relative to the largest scalar of each tensor."""
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)], ids=str
)
def test_a_layer_computes_what_it_does_in_float64_on_the_cpu(dtype, tolerance):
    layer, x = make_layer(dtype), draw(3, 50, 32, dtype=dtype)
    exact = copy.deepcopy(layer).to("cpu", torch.float64)
    assert_close([t.cpu() for t in run(layer, x)], run(exact, x.double().cpu()), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer, x = make_layer(), draw(3, 50, 32)
    with torch.autocast(DEVICE, dtype):
        assert layer(x).dtype == dtype
        found = run(layer, x)
    assert_close(found, run(layer, x), 4e-2)


def test_float16_with_a_gradient_scaler():
    layer = make_layer()
    optimizer = torch.optim.AdamW(grkan.param_groups(layer, weight_decay=0.01), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler(DEVICE)
    x, goal = draw(256, 32), draw(256, 32)
    losses = []
    for _ in range(50):
        with torch.autocast(DEVICE, torch.float16):
            loss = (layer(x).float() - goal).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("half", [False, True])
def test_compiled_training(mode, half):
    layer, x = make_layer(), draw(4, 50, 32)
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    for _ in range(4):  # a CUDA graph is recorded in the second call
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE, torch.bfloat16) if half else nullcontext():
            found = run(compiled, x)
            wanted = run(layer, x)
        assert_close(found, wanted, 3e-2 if half else 1e-4)
        x = draw(4, 50, 32)


def test_compiled_for_any_batch():
    layer = make_layer()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    for rows in (3, 64, 7, 1000):
        x = draw(rows, 32)
        assert_close(run(compiled, x), run(layer, x), 1e-4)


def test_a_cuda_graph_of_a_training_step():
    """Captured once and replayed with other inputs, extreme ones among them."""
    layer, x = make_layer(), draw(64, 32).requires_grad_()
    leaves = (x, *layer.parameters())

    def step():
        y = layer(x)
        return y, torch.autograd.grad(y.sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = step()
    for extreme in (1.0, 1e6, torch.inf):
        with torch.no_grad():
            x.copy_(draw(64, 32))
            x[0, 0] = extreme
        graph.replay()
        wanted_y, wanted = step()
        for actual, expected in zip((y, *grads), (wanted_y, *wanted), strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)


def test_a_second_stream():
    layer, x = make_layer(), draw(512, 512, 32)
    wanted = run(layer, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(found, wanted, 1e-6)


def test_checkpointing_and_offloading_change_nothing():
    layer, x = make_layer(), draw(64, 32)
    wanted = run(layer, x)
    for around in (nullcontext(), torch.autograd.graph.save_on_cpu(pin_memory=True)):
        t = x.detach().requires_grad_()
        with around:
            y = checkpoint(layer, t, use_reentrant=False)
            found = [y, *torch.autograd.grad(y.square().sum(), (t, *layer.parameters()))]
        assert_close([t.double() for t in found], wanted, 1e-6)


def test_the_operators_obey_pytorchs_rules():
    x, a, b, weight = draw(6, 8), draw(4, 6), draw(4, 4), draw(5, 8)
    x, a, b, weight = (t.requires_grad_() for t in (x, a, b, weight))
    torch.library.opcheck(torch.ops.grkan.group_rational.default, (x, a, b, "abs_of_sum", 1))
    torch.library.opcheck(torch.ops.grkan.rational_linear.default, (x, a, b, weight, None, "abs_of_sum"))


def test_transforms():
    x, a, b = (draw(*shape, dtype=torch.float64) for shape in ((5, 8), (4, 6), (4, 4)))

    def loss(x):
        return grkan.group_rational(x, a, b).sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(found, torch.func.grad(loss)(x))
    exact = torch.func.hessian(loss)(x[0])
    with grkan.set_backend("reference"):
        torch.testing.assert_close(exact, torch.func.hessian(loss)(x[0]))


def test_made_on_the_gpu():
    with torch.device(DEVICE):
        layer = grkan.GRKAN(32, 64)
    assert {p.device.type for p in layer.parameters()} == {DEVICE}
    with torch.device("meta"):
        late = grkan.GRKAN(32, 64)
    late.to_empty(device=DEVICE)
    for module in late.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert run(late, draw(5, 32))[0].isfinite().all()


def test_convert_a_model_on_the_gpu():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("grkan_vit_micro_patch4_28").to(DEVICE).eval()
    images = draw(64, *vit.default_cfg["input_size"])
    state, wanted = torch.cuda.get_rng_state(), vit(images)
    report = grkan.convert_(vit, calibration=images)
    assert len(report.layers) > 0
    assert {p.device.type for p in vit.parameters()} == {DEVICE}
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert (vit(images) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("shard", [False, True])
def test_data_parallel_by_nccl(shard, tmp_path):
    """In one process: the way of the tensors is that of many."""
    from torch.distributed.fsdp import fully_shard

    layer, x = make_layer(), draw(64, 32)
    wanted = run(layer, x)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device(DEVICE, 0))
    try:
        if shard:
            fully_shard(layer)
            y = layer(x)
            y.square().sum().backward()
            grads = [p.grad.full_tensor() for p in layer.parameters()]
        else:
            y = nn.parallel.DistributedDataParallel(layer)(x)
            y.square().sum().backward()
            grads = [p.grad for p in layer.parameters()]
        assert_close([t.detach().double() for t in (y, *grads)], [wanted[0], *wanted[2:]], 1e-5)
    finally:
        dist.destroy_process_group()


def test_export_a_model_on_the_gpu(tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = timm.create_model("kat_micro_patch2_8").to(DEVICE).eval()
    path = grkan.export(model, tmp_path / "model.onnx")
    assert {p.device.type for p in model.parameters()} == {DEVICE}
    images = draw(3, *model.default_cfg["input_size"])
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach().cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["--precision=no", "--precision=bf16", "--precision=fp16", "--compile"])
def test_the_commands(tmp_path, capsys, setting):
    """A run and the evaluation of its weights."""
    pytest.importorskip("timm")
    run = tmp_path / "run"
    settings = ["--data=digits", "--model=kat_micro_patch2_8", "--epochs=6", "--batch-size=32", f"--output={run}"]
    assert cli.main(["train", *settings, setting]) == 0
    assert cli.main(["eval", str(run), "--data=digits"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["top1"] > 25  # chance is 10
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["top1"] == pytest.approx(last["top1"], abs=1)
