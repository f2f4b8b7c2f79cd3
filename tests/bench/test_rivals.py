import math
import sys
import types

import numpy as np
import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

import grkan
from grkan.bench import bytes_kept, rivals
from grkan.bench.rivals import FORWARD, TRAINING, rational_by_horner, rational_by_loop, rational_by_powers, spline
from grkan.rational import reference

RATIONALS = [rational_by_loop, rational_by_powers, rational_by_horner]


def _problem(order=(5, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 5, 8), (2, order[0] + 1))]
    tensors += [torch.randn(2, order[1], generator=generator, dtype=torch.float64), torch.randn(3, 5, 8)]
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("order", [(5, 4), (7, 6), (1, 1)])
@pytest.mark.parametrize("function", RATIONALS)
def test_rationals_agree_with_the_reference(function, order):
    x, a, b, grad = _problem(order)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    expected = reference.rational(x.unflatten(-1, (2, 4)), a, b, "abs_of_sum").flatten(-2)
    found = function(x, a, b)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), gradients)


@pytest.mark.parametrize("function", RATIONALS)
def test_half_types_get_float32_arithmetic(function):
    x, a, b, _ = _problem(dtype=torch.float32)
    half = x.bfloat16()
    assert torch.equal(function(half, a, b), function(half.float(), a, b).bfloat16())


def test_the_spline_is_that_of_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)  # past the last knots, where it is 0
    coefficients = torch.randn(1, 11, dtype=torch.float64)
    knots = np.linspace(-1 - 3 / 4, 1 + 3 / 4, 15)
    bases = [interpolate.BSpline.basis_element(knots[i : i + 5], extrapolate=False)(x.numpy()) for i in range(11)]
    expected = sum(c * np.nan_to_num(basis) for c, basis in zip(coefficients[0].tolist(), bases, strict=True))
    np.testing.assert_allclose(spline(x, coefficients).numpy(), expected, atol=1e-12)
    inside = x[x.abs() < 1]
    whole = interpolate.BSpline(knots, coefficients[0].numpy(), 3)
    np.testing.assert_allclose(spline(inside, coefficients).numpy(), whole(inside.numpy()), atol=1e-12)


def test_each_group_has_its_spline():
    x, coefficients = torch.randn(4, 6), torch.randn(2, 11)
    halves = [spline(half, row[None]) for half, row in zip(x.chunk(2, -1), coefficients, strict=True)]
    torch.testing.assert_close(spline(x, coefficients), torch.cat(halves, -1))


def test_every_activation_gives_its_gradients(tiny):
    found = rivals.activations("cpu", (2, 16), torch.bfloat16, TRAINING, compiles=True)
    for name, rival in found.items():
        found_dtypes = [g.dtype for g in rival.call()]
        inputs = 2 if name == "SwiGLU" else 1
        learned = 0 if name in ("clone", "GELU", "SiLU", "ReLU squared", "SwiGLU") else 1 if "spline" in name else 2
        assert found_dtypes == [torch.bfloat16] * inputs + [torch.float32] * learned, name
        assert all(g.isfinite().all() for g in rival.call()), name


def test_polynorm_and_xielu_are_those_of_their_papers():
    x = torch.randn(3, 5, dtype=torch.float64)
    weight, bias = torch.tensor([0.2, 0.5, -0.3], dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    rows = [sum(w * row**p / (row**p).square().mean().sqrt() for p, w in enumerate(weight, 1)) + bias for row in x]
    torch.testing.assert_close(rivals.polynorm(x, weight, bias), torch.stack(rows), rtol=1e-4, atol=1e-5)
    raw = torch.tensor([0.3, -0.7], dtype=torch.float64)
    a_p, a_n = torch.log1p(raw.exp()) + torch.tensor([0, 0.5], dtype=torch.float64)
    expected = [float(a_p * v**2 + v / 2 if v > 0 else a_n * (math.exp(v) - 1 - v) + v / 2) for v in x.flatten()]
    torch.testing.assert_close(rivals.xielu(x, *raw), torch.tensor(expected, dtype=torch.float64).view_as(x))


def test_xielu_is_that_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    theirs = activations.XIELUActivation(dtype=torch.float32)
    x = torch.linspace(-5, 5, 101)
    found = rivals.xielu(x, theirs.alpha_p.detach(), theirs.alpha_n.detach())
    torch.testing.assert_close(found, theirs._xielu_python(x).detach().reshape(-1))


def test_bytes_kept_by_activations(tiny):
    found = rivals.activations("cpu", (2, 16), torch.bfloat16, TRAINING, compiles=False)
    tensor = 2 * 16 * 2
    kept = {name: rival.facts["bytes kept"] / tensor for name, rival in found.items()}
    assert {name: kept[name] for name in ("clone", "GELU", "SiLU", "grkan (5,4)", "grkan (7,6)")} == {
        "clone": 0, "GELU": 1, "SiLU": 1, "grkan (5,4)": 1, "grkan (7,6)": 1,
    }  # fmt: skip
    assert kept["SwiGLU"] == 3  # x, v and SiLU(x)
    assert not rivals.activations("cpu", (2, 16), torch.float32, FORWARD, compiles=False)["GELU"].facts


@pytest.fixture
def kernels_of_others(monkeypatch):
    """Modules with the interfaces of the three packages, which are installed with a GPU alone."""
    called = []

    class RationalTriton1DGroup:
        @staticmethod
        def apply(x, a, b, groups):
            called.append(("released", tuple(x.shape), tuple(a.shape), tuple(b.shape), groups))
            return x * a.sum() * b.sum()

    def rat_cuda(x, a, b):
        called.append(("felippe-alves", tuple(x.shape), tuple(a.shape), tuple(b.shape)))
        return x * a.sum() * b.sum()

    class FlashRationalTriton1DGroup:
        @staticmethod
        def apply(x, a, b):
            assert x.dtype == torch.float32
            called.append(("FlashKAT", tuple(x.shape), tuple(a.shape), tuple(b.shape)))
            return x * a.sum() * b.sum()

    flash = "rational_kat.kernels.flash_rational_triton"
    for name in ("rational_kat", "rational_kat.kernels"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, attribute in (
        ("kat_rational", RationalTriton1DGroup),
        (flash, FlashRationalTriton1DGroup),
        ("rational_kat_cu", rat_cuda),
    ):
        module = types.ModuleType(name)
        setattr(module, attribute.__name__, attribute)
        monkeypatch.setitem(sys.modules, name, module)
    return called


def test_others_kernels_compete_where_they_are_installed(kernels_of_others):
    a, b = rivals._swish((5, 4), "cpu")
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    for name, entry in rivals._installed_kernels((a, b)).items():
        y = entry.function(x, *entry.learned)
        assert (y.shape, y.dtype) == (x.shape, x.dtype), name
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), entry.learned))
    assert kernels_of_others == [
        ("released", (2, 3, 16), (8, 6), (8, 4), 8),
        ("FlashKAT", (2, 3, 16), (8, 6), (8, 4)),
        ("felippe-alves", (6, 16), (6,), (8, 4)),
    ]


def test_others_kernels_are_for_a_gpu(kernels_of_others, monkeypatch):
    assert not any("Triton" in name for name in rivals.activations("cpu", (2, 16), torch.float32, FORWARD, False))
    for name in ("kat_rational", "rational_kat.kernels.flash_rational_triton", "rational_kat_cu"):
        monkeypatch.setitem(sys.modules, name, None)
    assert rivals._installed_kernels(rivals._swish((5, 4), "cpu")) == {}


def test_ways_to_compute_the_function_give_the_same(tiny):
    found = rivals.activations("cpu", (2, 16), torch.float32, FORWARD, compiles=True)
    ours = found["grkan (5,4)"].call()
    for name in ("powers in a loop", "powers at once", "Horner", "Horner, compiled"):
        torch.testing.assert_close(found[name].call(), ours)
    # Both orders are the table's fits to it; 1.7e-3 is the largest error of (5,4) on [-10, 10].
    silu = found["SiLU"].call()
    assert 2e-3 > (ours - silu).abs().max() > (found["grkan (7,6)"].call() - silu).abs().max()


def test_a_gpu_has_neither_powers_nor_splines(tiny):
    names = ["clone", "GELU", "SiLU", "ReLU squared", "SwiGLU", "PolyNorm", "xIELU", "Horner", "grkan (5,4)",
             "grkan (7,6)", "PolyNorm, compiled", "xIELU, compiled", "Horner, compiled"]  # fmt: skip
    assert list(rivals.activations("meta", (2, 16), torch.float32, FORWARD, compiles=True)) == names


def test_traffic_is_what_has_to_be_read_and_written(tiny):
    size = 2 * 16 * 4
    for pass_, tensors in (
        (FORWARD, {"clone": 2, "GELU": 2, "SwiGLU": 3}),
        (TRAINING, {"clone": 2, "grkan (5,4)": 5, "SwiGLU": 8}),
    ):
        found = rivals.activations("cpu", (2, 16), torch.float32, pass_, compiles=False)
        assert {name: found[name].traffic // size for name in tensors} == tensors


def test_a_single_call_records_its_gradient():
    forward, training = (rivals.single_calls("cpu", pass_) for pass_ in (FORWARD, TRAINING))
    names = ["GELU", "SiLU", "grkan", "its kernel, without autograd", "an empty autograd.Function"]
    assert list(forward) == list(training) == names
    for name in ("GELU", "grkan"):
        assert forward[name].call().requires_grad
    assert [tuple(g.shape) for g in training["grkan"].call()] == [(1, 192), (8, 6), (8, 4)]
    assert len(training["an empty autograd.Function"].call()) == 3
    assert forward["its kernel, without autograd"].call() is None


def test_facts_of_layers():
    found = rivals.mlps("cpu", (2, 3, 8), TRAINING)
    facts = {name: rival.facts for name, rival in found.items()}
    assert list(facts) == ["Mlp", "B-spline KAN", "B-spline KAN, hidden d", "GRKAN"]
    products = 2 * 8 * 32
    assert facts["Mlp"]["parameters"] == products + 32 + 8
    assert facts["GRKAN"]["parameters"] == products + 32 + 8 + 2 * 8 * (6 + 4)
    assert facts["B-spline KAN"]["parameters"] == 12 * products
    assert facts["B-spline KAN, hidden d"]["parameters"] == 12 * 2 * 8 * 8
    assert facts["Mlp"]["operations a token"] == 2 * products
    assert facts["GRKAN"]["operations a token"] == 2 * products + 21 * (8 + 32)
    # 349 is the paper's count for each weight of a spline with 8 intervals.
    assert facts["B-spline KAN"]["operations a token"] == 349 * products
    assert facts["Mlp"]["multiply-adds a token"] == facts["GRKAN"]["multiply-adds a token"] == products
    assert facts["B-spline KAN"]["multiply-adds a token"] == 12 * products
    assert facts["Mlp"]["bytes kept"] == 4 * 2 * 3 * (8 + 32 + 32)


def test_layers_give_the_gradients_of_all_that_they_learn():
    for name, rival in rivals.mlps("cpu", (2, 3, 8), TRAINING).items():
        assert sum(g.numel() for g in rival.call()) == 2 * 3 * 8 + rival.facts["parameters"], name


def test_a_training_step_trains():
    model, images, labels = nn.Linear(4, 2), torch.randn(3, 4), torch.tensor([0, 1, 1])
    before = model.weight.clone()
    rivals._train_step(model, torch.optim.AdamW(model.parameters(), lr=0.1), images, labels)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("width", [192, 384])
def test_a_block_keeps_at_most_three_fifths_of_what_the_mlp_keeps(width):
    """x and the output of fc1, 5 d floats a token, where the MLP keeps 9 d."""
    x = torch.randn(2, 197, width, requires_grad=True)
    kept = bytes_kept(grkan.GRKAN(width, 4 * width), x)
    assert kept == 5 * x.numel() * 4
    assert kept <= 0.60 * bytes_kept(Mlp(width, 4 * width), x)


def test_kat_tiny_keeps_at_most_four_fifths_of_what_vit_tiny_keeps():
    x = torch.randn(2, 3, 224, 224)
    kat, vit = (timm.create_model(f"{name}_tiny_patch16_224").train() for name in ("kat", "vit"))
    assert bytes_kept(kat, x) <= 0.80 * bytes_kept(vit, x)
