"""The variance gain against exact integrals."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

import grkan
from grkan.nn import GRKAN, GroupRational, RationalLinear, variance_gain
from grkan.nn.init import keep_start, starts_kept
from grkan.rational import table
from grkan.rational.fit import fit
from grkan.rational.reference import rational

EXACT = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0),
    "leaky_relu": lambda x: x if x > 0 else x / 100,
    "gelu": lambda x: x * mpmath.ncdf(x),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "elu": lambda x: x if x > 0 else mpmath.expm1(x),
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
}


def exact_gain(f):
    return 1 / mpmath.quad(lambda x: f(x) ** 2 * mpmath.npdf(x), [-12, -3, 0, 3, 12])


@pytest.mark.parametrize("name", EXACT)
def test_names_are_the_exact_functions(name):
    assert variance_gain(name) == pytest.approx(float(exact_gain(EXACT[name])), rel=1e-9)


def test_published_figures():
    assert [round(variance_gain(name), 4) for name in ("identity", "relu", "gelu", "silu")] == [1, 2, 2.3517, 2.8108]
    assert variance_gain("swish") == variance_gain("silu")


def test_callables_modules_fits_and_coefficients_of_one_function_agree():
    assert variance_gain(np.tanh) == pytest.approx(variance_gain("tanh"), rel=1e-12)
    assert variance_gain(torch.nn.GELU()) == pytest.approx(variance_gain("gelu"), rel=1e-12)
    assert variance_gain(torch.nn.functional.gelu) == pytest.approx(variance_gain("gelu"), rel=1e-12)
    assert variance_gain(torch.nn.ReLU(inplace=True)) == pytest.approx(2, rel=1e-12)
    elu = fit("elu", form="sum_of_abs", order=(3, 2), interval=(-3, 3))
    expected = variance_gain(elu.numerator, elu.denominator, form="sum_of_abs")
    assert variance_gain(elu) == expected  # not its own argument form, which is abs_of_sum here
    assert variance_gain(elu.numerator, elu.denominator) != pytest.approx(expected, rel=1e-3)
    assert variance_gain(GroupRational(4, elu, (3, 2), "sum_of_abs")) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["abs_of_sum", "sum_of_abs"])
def test_coefficients_with_a_kink_off_the_panels(form):
    a, b = [0.1, 1.0, -0.3], [0.7, -0.9]  # A changes its sign at 7/9

    def f(x):
        inner = b[0] * x + b[1] * x**2 if form == "abs_of_sum" else abs(b[0]) * abs(x) + abs(b[1]) * x**2
        return (a[0] + a[1] * x + a[2] * x**2) / (1 + abs(inner))

    edges = [-12, -3, 0, mpmath.mpf(7) / 9, 3, 12]
    expected = 1 / mpmath.quad(lambda x: f(x) ** 2 * mpmath.npdf(x), edges)
    assert variance_gain(a, b, form=form) == pytest.approx(float(expected), rel=1e-6)


def test_several_groups_give_the_inverse_of_the_mean_power():
    numerator, denominator = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.zeros(1, 2)
    assert variance_gain(numerator, denominator) == pytest.approx(1 / 5, rel=1e-12)
    shared = variance_gain(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5], [0.5], [0.0]]))
    one = variance_gain([0.0, 1.0], [0.5])
    assert shared == pytest.approx(3 / (2 / one + 1), rel=1e-12)


def test_the_gain_of_the_table_is_what_a_sample_shows():
    numerator, denominator = (torch.tensor([c]) for c in table.coefficients("swish", (5, 4), "abs_of_sum"))
    z = torch.randn(1, 2_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    power = rational(z, numerator, denominator, "abs_of_sum").square().mean().item()
    assert variance_gain(numerator, denominator) == pytest.approx(1 / power, rel=5e-3)


def test_the_default_device_and_dtype_do_not_matter():
    expected = variance_gain("gelu")
    with torch.device("meta"):
        assert variance_gain("gelu") == expected
        assert math.isfinite(variance_gain([0.0, 1.0], [0.1]))
    assert variance_gain(torch.ones(2).half(), torch.zeros(1).half()) == pytest.approx(0.5, rel=1e-12)


class TestFakeTensors:
    """PyTorch's way to plan memory and sharding for models that are too large to make."""

    @pytest.mark.parametrize("layer", [GRKAN, lambda width: RationalLinear(width, 8), lambda _: GroupRational(4)])
    def test_layers_are_made_trained_and_loaded(self, layer):
        with FakeTensorMode():
            made = layer(16)
            optimiser = torch.optim.AdamW(grkan.param_groups(made, 0.1, lr=1e-3))
            y = made(torch.randn(3, 16, requires_grad=True))
            y.sum().backward()
            optimiser.step()
            made.load_state_dict(made.state_dict())
            for module in made.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        assert y.shape == layer(16)(torch.randn(3, 16)).shape
        assert all(is_fake(p) and is_fake(p.grad) for p in made.parameters())

    def test_the_start_is_known(self):
        with FakeTensorMode():
            act = GroupRational(2, "gelu")
            assert variance_gain("gelu") == variance_gain(torch.nn.functional.gelu) == pytest.approx(2.3517, abs=1e-4)
        real = GroupRational(2, "gelu")
        assert act._initial == real._initial
        act.load_state_dict(real.state_dict(), assign=True)
        assert torch.equal(act(torch.ones(2)), real(torch.ones(2)))

    def test_a_start_is_kept(self):
        with FakeTensorMode():
            layer = torch.nn.Linear(8, 16)
            keep_start(layer, 1.0)
            with starts_kept(layer):
                torch.nn.init.zeros_(layer.weight)
        assert is_fake(layer.weight)

    def test_nothing_is_written(self, tmp_path):
        with FakeTensorMode():
            layer = GRKAN(16)
        for write in (grkan.save_model, grkan.export):
            with pytest.raises(ValueError, match="meta or fake tensors"):
                write(layer, tmp_path / "file")
        assert not list(tmp_path.iterdir())

    def test_a_conversion_is_refused(self):
        with FakeTensorMode():
            model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
            with pytest.raises(ValueError, match='convert it on the device "meta" instead'):
                grkan.convert_(model, start="scratch")
        assert type(model[1]) is torch.nn.GELU


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((np.zeros_like,), ValueError, r"positive and finite"),
        (([0.0, 0.0], [1.0]), ValueError, r"positive and finite"),
        ((lambda x: x * np.inf,), ValueError, r"positive and finite"),
        ((lambda x: x[:2],), ValueError, r"same shape as its argument"),
        (([0.0, 1.0],), TypeError, r"numerator with its denominator"),
        (("gelu", [0.5]), TypeError, r"numerator must be numbers; got 'gelu'"),
        (("swich",), ValueError, r"^function_or_numerator must be one of .*'swish'"),
        ((torch.nn.GELU,), TypeError, "the result of function_or_numerator must be numbers; got GELU"),
        ((torch.ones(2, 3), torch.ones(3, 2)), ValueError, r"\(2, 3\) and \(3, 2\)"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match), np.errstate(invalid="ignore"):
        variance_gain(*arguments)


@pytest.mark.parametrize(("form", "error"), [("A", ValueError), (3, TypeError)])
def test_an_unknown_form(form, error):
    with pytest.raises(error, match=f"form must be 'abs_of_sum' or 'sum_of_abs'; got {form!r}"):
        variance_gain("gelu", form=form)
