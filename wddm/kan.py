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
HELD = 2**21  # bases in memory for a matrix product: 8 MiB
AT_ONCE = 2**17  # bases made at once: half a MiB, in a core's own cache


def knots() -> Tensor:
    """The 12 knots of the uniform grid, ascending, (12,)."""
    return torch.arange(-ORDER, INTERVALS + ORDER + 1) * SPACING - 1


def spline_basis(x: Tensor) -> Tensor:
    """Values of the 8 cubic B-splines at x: (...,) -> (..., 8).

    On a uniform grid every basis is the same piecewise cubic of the distance d to its centre, in knots:
    B(d) = ((2 - d)_+^3 - 4 (1 - d)_+^3) / 6, so no recursion over orders and no tensor of 11 intervals.
    """
    return _basis(*_ramps(_offsets(x.unsqueeze(-1)))).squeeze(-1)


class SplineSum(torch.autograd.Function):
    """y_o = sum_ik W_oki B_k(x_i): (n, in), (out, 8, in) -> (n, out), some rows at a time. Differentiable once.

    The bases take 8 times the memory of x. None is kept; the backward pass makes them again. Under autocast the
    products are of its type.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = torch.cat([F.linear(_bases(part).flatten(1), weight.flatten(1)) for part in x.split(_rows(x, HELD))])
        ctx.dtype = y.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        low = weight.flatten(1).to(ctx.dtype)
        of_x, of_weight = torch.empty_like(x), None
        for part, of_y, of_part in zip(*(t.split(_rows(x, HELD)) for t in (x, gradient, of_x)), strict=True):
            bases = _bases(part, (of_y @ low).unflatten(1, (BASES, -1)), of_part)
            product = (of_y.T @ bases.flatten(1).to(ctx.dtype)).to(weight.dtype)
            of_weight = product if of_weight is None else of_weight.add_(product)
        return of_x, of_weight.view_as(weight)


def _bases(x: Tensor, of_bases: Tensor | None = None, of_x: Tensor | None = None) -> Tensor:
    """Bases (n, 8, in) of x (n, in); of their gradient, where it is given, that of x is written to `of_x`.

    B'(d) = -((2 - d)_+^2 - 4 (1 - d)_+^2) / 2, and d' = sign / SPACING.
    """
    bases, rows = x.new_empty(len(x), BASES, x.shape[1]), _rows(x, AT_ONCE)
    for k in range(0, len(x), rows):
        some = slice(k, k + rows)
        offsets = _offsets(x[some])
        outer, inner = _ramps(offsets)
        _basis(outer, inner, bases[some])
        if of_x is not None:
            slope = outer.square_().sub_(inner.square_(), alpha=4).mul_(offsets.sign_())
            torch.sum(slope.mul_(of_bases[some]), 1, out=of_x[some]).mul_(-0.5 / SPACING)
    return bases


def _rows(x: Tensor, most: int) -> int:
    """How many rows of x (n, in) have so many bases; on a GPU always 2^26, 256 MiB."""
    return max(1, (most if x.device.type == "cpu" else 2**26) // (BASES * x.shape[1]))


def _offsets(x: Tensor) -> Tensor:
    """Signed distances of x (..., in) to the 8 centres, in knots, (..., 8, in)."""
    centres = torch.arange(BASES, device=x.device, dtype=x.dtype) - (1 + 1 / SPACING)
    return (x / SPACING).unsqueeze(-2) - centres.unsqueeze(-1)


def _ramps(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(2 - d)_+ and (1 - d)_+ of the distances d."""
    distance = offsets.abs()
    return (2 - distance).relu_(), (1 - distance).relu_()


def _basis(outer: Tensor, inner: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.sub(outer.pow(3), inner.pow(3), alpha=4, out=out).div_(6)


class SplineLinear(nn.Module):
    """y = W_b SiLU(x) + sum_k (s * W_k) B_k(x): (..., in) -> (..., out), s a scale per edge."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, BASES, in_features))
        self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5))
        nn.init.uniform_(self.spline_weight, -0.05 / INTERVALS, 0.05 / INTERVALS)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.spline_weight * self.spline_scaler.unsqueeze(1)  # (out, 8, in)
        splines = SplineSum.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return F.linear(F.silu(x), self.base_weight) + splines


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
