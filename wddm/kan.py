"""Kolmogorov-Arnold layers: a learned spline on every edge (Liu et al. 2024, arXiv 2404.19756), and the token block
that U-KAN builds its bottleneck from (Li et al. 2024, arXiv 2406.02918).

Splines are cubic on one uniform grid of 5 intervals over [-1, 1]: 8 bases, support within [-2.2, 2.2], zero outside.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

INTERVALS, ORDER = 5, 3
BASES = INTERVALS + ORDER
SPACING = 2 / INTERVALS


def knots() -> Tensor:
    """The 12 knots of the uniform grid, ascending, (12,)."""
    return torch.arange(-ORDER, INTERVALS + ORDER + 1) * SPACING - 1


def spline_basis(x: Tensor) -> Tensor:
    """Values of the 8 cubic B-splines at x: (...,) -> (..., 8). Differentiable once.

    On a uniform grid every basis is the same piecewise cubic of the distance d to its centre, in knots:
    B(d) = ((2 - d)_+^3 - 4 (1 - d)_+^3) / 6, so no recursion over orders and no tensor of 11 intervals.
    """
    return _Basis.apply(x)


class _Basis(torch.autograd.Function):
    """Keeps x for the backward pass, an eighth of one basis, in the place of every step between; works in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        outer, inner = _ramps(_offsets(x).abs_())
        outer.mul_(outer.square())
        inner.mul_(inner.square())
        return outer.sub_(inner, alpha=4).div_(6)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        """B'(d) = -((2 - d)_+^2 - 4 (1 - d)_+^2) / 2, and d' = sign / SPACING."""
        offsets = _offsets(*ctx.saved_tensors)
        outer, inner = _ramps(offsets.abs())
        slope = outer.square_().sub_(inner.square_(), alpha=4).mul_(offsets.sign_())
        return slope.mul_(gradient).sum(-1).mul_(-0.5 / SPACING)


def _offsets(x: Tensor) -> Tensor:
    """Signed distances to the 8 centres, in knots, (..., 8)."""
    centres = (torch.arange(BASES, device=x.device, dtype=x.dtype) - 1) * SPACING - 1
    return (x.unsqueeze(-1) - centres).div_(SPACING)


def _ramps(distance: Tensor) -> tuple[Tensor, Tensor]:
    """(2 - d)_+, which takes the place of d, and (1 - d)_+."""
    inner = (1 - distance).relu_()
    return distance.neg_().add_(2).relu_(), inner


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
