import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from grkan.models.spline import GRID, ORDER, SplineKAN, SplineMlp, cubic_bases


@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_the_closed_form_is_the_bases_of_scipy(limit):
    step = 2 * limit / 8
    x = np.linspace(-limit - 2, limit + 2, 301)
    knots = -limit + step * np.arange(-3, 8 + 4)
    expected = np.stack([np.nan_to_num(BSpline.basis_element(knots[k : k + 5], False)(x)) for k in range(11)], -1)
    np.testing.assert_allclose(cubic_bases(torch.from_numpy(x), 8, limit).numpy(), expected, atol=1e-13)


def test_the_layer_is_a_sum_of_splines_and_of_silu():
    layer = SplineKAN(3, 4, limit=2.0)
    x = torch.randn(5, 3)
    curves = torch.einsum("nik,jik->nj", cubic_bases(x, GRID, 2.0), layer.spline)
    torch.testing.assert_close(layer(x), curves + torch.nn.functional.silu(x) @ layer.base.T)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 4 * (1 + GRID + ORDER)


def test_the_layers_keep_the_variance_at_the_start():
    torch.manual_seed(0)
    y = SplineMlp(256)(torch.randn(2000, 256))
    assert y.var().item() == pytest.approx(1.0, rel=0.15)
