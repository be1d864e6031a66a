"""Kolmogorov-Arnold layers: a learned spline on every edge (Liu et al. 2024, arXiv 2404.19756), and the token block
that U-KAN builds its bottleneck from (Li et al. 2024, arXiv 2406.02918).

Splines are cubic on one uniform grid of 5 intervals over [-1, 1]: 8 bases, support within [-2.2, 2.2], zero outside.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INTERVALS, ORDER = 5, 3
BASES = INTERVALS + ORDER
SPACING = 2 / INTERVALS


def knots() -> Tensor:
    """The 12 knots of the uniform grid, ascending, (12,)."""
    return torch.arange(-ORDER, INTERVALS + ORDER + 1) * SPACING - 1


def spline_basis(x: Tensor) -> Tensor:
    """Values of the 8 cubic B-splines at x: (...,) -> (..., 8).

    On a uniform grid every basis is the same piecewise cubic of the distance d to its centre, in knots:
    B(d) = ((2 - d)_+^3 - 4 (1 - d)_+^3) / 6, so no recursion over orders and no tensor of 11 intervals.
    """
    centres = (torch.arange(BASES, device=x.device, dtype=x.dtype) - 1) * SPACING - 1
    distance = ((x.unsqueeze(-1) - centres) / SPACING).abs()
    return ((2 - distance).relu().pow(3) - 4 * (1 - distance).relu().pow(3)) / 6


class SplineLinear(nn.Module):
    """y = W_b SiLU(x) + sum_k (s * W_k) B_k(x): (..., in) -> (..., out), s a scale per edge."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, in_features, BASES))
        self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5))
        nn.init.uniform_(self.spline_weight, -0.05 / INTERVALS, 0.05 / INTERVALS)

    def forward(self, x: Tensor) -> Tensor:
        spline_weight = (self.spline_weight * self.spline_scaler.unsqueeze(-1)).flatten(1)  # (out, in * 8)
        return F.linear(F.silu(x), self.base_weight) + F.linear(spline_basis(x).flatten(-2), spline_weight)


class KANBlock(nn.Module):
    """LayerNorm -> spline layer -> plus projected time; tokens (B, N, D), time (B, E) -> (B, N, D).

    There is no residual path around it, as in the published models.
    """

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spline = SplineLinear(width, width)
        self.time = nn.Linear(time_width, width)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        return self.spline(self.norm(tokens)) + self.time(F.silu(time)).unsqueeze(1)
