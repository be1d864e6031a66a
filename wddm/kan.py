"""Kolmogorov-Arnold layers: a learned spline on every edge (Liu et al. 2024, arXiv 2404.19756), and the token block
that U-KAN builds its bottleneck from (Li et al. 2024, arXiv 2406.02918).

Splines are cubic on one uniform grid of 5 intervals over [-1, 1]: 8 bases, support within [-2.2, 2.2], zero outside.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

INTERVALS, ORDER = 5, 3
BASES = INTERVALS + ORDER
SPACING = 2 / INTERVALS
PER_PRODUCT = 2**21  # basis values in memory for one matrix product: 8 MiB
PER_CHUNK = 2**17  # basis values computed at once: half a MiB, which fits the cache of one core


def knots() -> Tensor:
    """The 12 knots of the uniform grid, ascending, (12,)."""
    return torch.arange(-ORDER, INTERVALS + ORDER + 1) * SPACING - 1


def spline_basis(x: Tensor) -> Tensor:
    """Values of the 8 cubic B-splines at x: (...,) -> (..., 8). On a uniform grid every basis is the same piecewise
    cubic of the distance d to its centre, in knot spacings: B(d) = ((2 - d)_+^3 - 4 (1 - d)_+^3) / 6.
    """
    return _basis(*_ramps(_offsets(x.unsqueeze(-1)))).squeeze(-1)


class SplineSum(torch.autograd.Function):
    """y_o = sum_ik W_oki B_k(x_i): (n, in), (out, 8, in) -> (n, out), some rows at a time. Differentiable once.

    The basis values would take 8 times the memory of x, so they are not kept: the backward pass computes them again.
    Under autocast the matrix products run in its dtype.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        parts = x.split(_rows(x, PER_PRODUCT))
        return torch.cat([F.linear(_bases(part).flatten(1), weight.flatten(1)) for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        cast, rows = weight.flatten(1).to(gradient.dtype), _rows(x, PER_PRODUCT)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight).flatten(1)
        for part, grad_y, grad_part in zip(x.split(rows), gradient.split(rows), grad_x.split(rows), strict=True):
            bases = _bases(part, (grad_y @ cast).unflatten(1, (BASES, -1)), grad_part)
            grad_weight.add_(grad_y.T @ bases.flatten(1).to(gradient.dtype))
        return grad_x, grad_weight.view_as(weight)


def _bases(x: Tensor, grad_bases: Tensor | None = None, grad_x: Tensor | None = None) -> Tensor:
    """Basis values (n, 8, in) at x (n, in). If their gradient is given, the gradient of x is written to `grad_x`.

    B'(d) = -((2 - d)_+^2 - 4 (1 - d)_+^2) / 2, and d' = sign / SPACING.
    """
    bases, rows = x.new_empty(len(x), BASES, x.shape[1]), _rows(x, PER_CHUNK)
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        offsets = _offsets(x[chunk])
        outer, inner = _ramps(offsets)
        _basis(outer, inner, bases[chunk])
        if grad_bases is not None and grad_x is not None:
            slope = outer.square_().sub_(inner.square_(), alpha=4).mul_(offsets.sign_())
            torch.sum(slope.mul_(grad_bases[chunk]), 1, out=grad_x[chunk]).mul_(-0.5 / SPACING)
    return bases


def _rows(x: Tensor, values: int) -> int:
    """Number of rows of x (n, in) that have `values` basis values in all; on a GPU, with its larger memory, 2^26."""
    return max(1, (values if x.device.type == "cpu" else 2**26) // (BASES * x.shape[1]))


def _offsets(x: Tensor) -> Tensor:
    """Signed distances (..., 8, in) of x (..., in) to the 8 centres, in knot spacings."""
    centres = torch.arange(BASES, device=x.device, dtype=x.dtype) - (1 + 1 / SPACING)
    return (x / SPACING).unsqueeze(-2) - centres.unsqueeze(-1)


def _ramps(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(2 - d)_+ and (1 - d)_+ of the distances d."""
    distance = offsets.abs()
    return (2 - distance).relu_(), (1 - distance).relu_()


def _basis(outer: Tensor, inner: Tensor, out: Tensor | None = None) -> Tensor:
    """B(d) from the two ramps of d, written to `out` if it is given."""
    return torch.sub(outer.pow(3), inner.pow(3), alpha=4, out=out).div_(6)


class SplineLinear(nn.Module):
    """y = W_b SiLU(x) + sum_k (s * W_k) B_k(x), with s a scale per edge."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, BASES, in_features))
        self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5))
        nn.init.uniform_(self.spline_weight, -0.05 / INTERVALS, 0.05 / INTERVALS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.spline_weight * self.spline_scaler.unsqueeze(1)  # (out, 8, in)
        splines = SplineSum.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return F.linear(F.silu(x), self.base_weight) + splines


class KANBlock(nn.Module):
    """LayerNorm -> spline layer -> plus projected time. As in the published models, no residual path goes around it."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spline = SplineLinear(width, width)
        self.time = nn.Linear(time_width, width)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Tokens (B, N, D) and time (B, E) -> (B, N, D)."""
        return self.spline(self.norm(tokens)) + self.time(F.silu(time)).unsqueeze(1)
