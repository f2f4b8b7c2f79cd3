"""A plain copy computes what the model does, and every tracer and exporter takes it, for other sizes as well."""

import pickle

import pytest
import torch

import grkan


def changed(module):
    """Every group a function of its own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "numerator" in name or "denominator" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def kat(**arguments):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("kat_micro_patch2_8", depth=2, **arguments)


CASES = {
    "kat": (kat, (2, 1, 8, 8)),
    "released form": (lambda: kat(form="sum_of_abs", share_numerator=True), (2, 1, 8, 8)),
    "convolutions": (lambda: grkan.GRKAN(16, 32, use_conv=True), (2, 16, 5, 6)),
    "width unknown": (lambda: grkan.GroupRational(8), (2, 3, 24)),
    "channels first": (lambda: grkan.GroupRational(8, channel_dim=1), (8, 24, 7)),
    "channels before the last": (lambda: grkan.GroupRational(8, channel_dim=-2), (2, 24, 7)),
    "(7, 6)": (lambda: grkan.RationalLinear(24, 7, order=(7, 6)), (2, 3, 24)),
    "polynomial": (lambda: grkan.GroupRational(1, ([1.0, 2.0, 3.0], []), (2, 0)), (2, 3, 24)),
    "constant": (lambda: grkan.GroupRational(2, ([2.0, 0.0], [0.0]), (1, 1)), (2, 3, 24)),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    make, shape = CASES[request.param]
    return changed(make()), torch.randn(shape, generator=torch.Generator().manual_seed(1))


def agree(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def test_agrees_and_leaves_the_model_alone(case):
    model, x = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = grkan.plain(model)
    agree(copied(x), model(x))
    assert not any(isinstance(m, grkan.GroupRational) for m in copied.modules())
    assert not any(p.requires_grad for p in copied.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    agree(pickle.loads(pickle.dumps(copied))(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("how", ["jit", "fx", "export"])
def test_traces_are_right_for_another_batch(case, how):
    model, x = case
    copied, more = grkan.plain(model), torch.cat([x, x.flip(0)])
    if how == "jit":
        program = torch.jit.trace(copied, x)
    elif how == "fx":
        program = torch.fx.symbolic_trace(copied)
    else:
        program = torch.export.export(copied, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert "grkan::" not in str(program.graph)
    assert "ops.grkan" not in str(program.graph)
    agree(program(more), model(more))


@torch.no_grad()
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(dynamo, tmp_path):
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model, path = changed(kat()), str(tmp_path / "model.onnx")
    x = torch.randn(2, 1, 8, 8)
    shapes = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(grkan.plain(model), (x,), path, dynamo=dynamo, verbose=False, input_names=["x"], **shapes)
    more = torch.randn(5, 1, 8, 8)
    (y,) = runtime.InferenceSession(path).run(None, {"x": more.numpy()})
    agree(torch.from_numpy(y), model(more))


@torch.no_grad()
def test_far_from_zero():
    act = grkan.GroupRational(1, "gelu")
    x = torch.tensor([1e3, -1e4, 1e5, -1e6, 1e6]).reshape(-1, 1)
    assert ((grkan.plain(act)(x) - act(x)).abs() <= 1e-5 * act(x).abs().max(dim=1, keepdim=True).values).all()
    assert grkan.plain(act)(torch.full((1, 1), 1e20)).isnan().all()  # as documented: no silent clipping


@torch.no_grad()
def test_half_types_are_computed_in_float32():
    act, x = changed(grkan.GroupRational(4)), torch.randn(64, 16)
    for dtype in (torch.float16, torch.bfloat16):
        y = grkan.plain(act).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert (
            torch.equal(y, act(x.to(dtype).float()).to(dtype))
            or (y.float() - act(x.to(dtype)).float()).abs().max() < 2e-2
        )


def test_a_shared_function_stays_shared():
    act = grkan.GroupRational(4)
    copied = grkan.plain(torch.nn.Sequential(act, torch.nn.Linear(16, 16), act))
    assert copied[0] is copied[2]


def test_mistakes():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got 'kat'"):
        grkan.plain("kat")
    layer = grkan.RationalLinear(8, 8)
    layer.act.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"must not have hooks.* act has some"):
        grkan.plain(layer)
    with pytest.raises(ValueError, match=r"must not have hooks.* it has some"):
        grkan.plain(layer.act)
