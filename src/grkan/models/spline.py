"""B-spline KAN layers (arXiv 2404.19756), only for comparisons with KAT."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import variance_gain

GRID, ORDER = 8, 3
"""The grid and order of all B-splines here. They give a layer 12 weights for each of d_in d_out, and a ViT with layers
d to d the sizes that KAT's paper reports for its "ViT with KAN": 12.8, 50.4 and 199.8 million parameters."""


class SplineKAN(nn.Module):
    """A layer with a spline for every weight: y_j = sum_i w_ji SiLU(x_i) + sum_ik c_jik B_k(x_i).

    The bases are the same for all outputs, so the second sum is a linear layer on d_in (GRID + ORDER) inputs.

    Args:
        in_features: d_in.
        out_features: d_out.
        limit: the bases cover [-limit, limit], in GRID intervals. Outside, only the first sum remains.

    Shape:
        (..., in_features) to (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, limit: float = 1.0) -> None:
        super().__init__()
        self.limit = limit
        self.base = nn.Parameter(torch.empty(out_features, in_features))
        self.spline = nn.Parameter(torch.empty(out_features, in_features, GRID + ORDER))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw weights whose first sum keeps the variance and whose splines start near zero, as in KANs."""
        width = self.base.shape[1]
        nn.init.normal_(self.base, std=(variance_gain("silu") / width) ** 0.5)
        nn.init.normal_(self.spline, std=0.1 / width**0.5)

    def bases(self, x: Tensor) -> Tensor:
        """Compute the GRID + ORDER cubic B-splines, in a new last dimension."""
        return cubic_bases(x, GRID, self.limit)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(x), self.base) + F.linear(self.bases(x).flatten(-2), self.spline.flatten(1))


def cubic_bases(x: Tensor, grid: int, limit: float) -> Tensor:
    """Compute the grid + 3 cubic B-splines on uniform knots that are not 0 on [-limit, limit], in a new last dimension.

    The closed form is used, as the recursion takes four times as long. In units of the distance between knots, with t
    measured from its middle, each spline is (max(2 - |t|, 0)^3 - 4 max(1 - |t|, 0)^3) / 6.
    """
    step = 2 * limit / grid
    middles = torch.arange(-1, grid + 2, dtype=x.dtype, device=x.device) - grid / 2
    t = (x.unsqueeze(-1) / step - middles).abs()
    return (F.relu(2 - t) ** 3 - 4 * F.relu(1 - t) ** 3) / 6


class SplineMlp(nn.Module):
    """Two B-spline layers in place of a transformer's MLP; the arguments are those of timm's `Mlp`.

    The layer norm in front gives inputs of standard deviation 1, so the splines cover [-3, 3].
    """

    def __init__(
        self, in_features: int, hidden_features: int | None = None, out_features: int | None = None, **_: Any
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = SplineKAN(in_features, hidden_features, limit=3.0)
        self.fc2 = SplineKAN(hidden_features, out_features or in_features, limit=3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))
