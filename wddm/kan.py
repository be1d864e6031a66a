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
        y = torch.cat([F.linear(_bases(part).flatten(1), weight.flatten(1)) for part in x.split(_rows(x))])
        ctx.dtype = y.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """B'(d) = -((2 - d)_+^2 - 4 (1 - d)_+^2) / 2, and d' = sign / SPACING."""
        x, weight = ctx.saved_tensors
        low = weight.flatten(1).to(ctx.dtype)
        of_x, of_weight = torch.empty_like(x), None
        for part, of_y, out in zip(*(t.split(_rows(x)) for t in (x, gradient, of_x)), strict=True):
            bases = part.new_empty(len(part), BASES, part.shape[1])
            of_bases = (of_y @ low).view_as(bases)
            for piece, *rows in zip(*(t.split(_rows_at_once(x)) for t in (part, bases, of_bases, out)), strict=True):
                _bases_and_gradient(piece, *rows)
            product = (of_y.T @ bases.flatten(1).to(ctx.dtype)).to(weight.dtype)
            of_weight = product if of_weight is None else of_weight.add_(product)
        return of_x, of_weight.view_as(weight)


def _bases(x: Tensor) -> Tensor:
    """(n, in) -> (n, 8, in)."""
    bases = x.new_empty(len(x), BASES, x.shape[1])
    for piece, out in zip(x.split(_rows_at_once(x)), bases.split(_rows_at_once(x)), strict=True):
        _basis(*_ramps(_offsets(piece)), out)
    return bases


def _bases_and_gradient(x: Tensor, bases: Tensor, of_bases: Tensor, of_x: Tensor) -> None:
    """Of x (n, in), write its bases (n, 8, in) and, of the gradient of these, that of x."""
    offsets = _offsets(x)
    outer, inner = _ramps(offsets)
    _basis(outer, inner, bases)
    slope = outer.square_().sub_(inner.square_(), alpha=4).mul_(offsets.sign_())
    torch.sum(slope.mul_(of_bases), 1, out=of_x)
    of_x.mul_(-0.5 / SPACING)


def _rows(x: Tensor) -> int:
    """Rows of x (n, in) whose bases, in 8 MiB or 256 on a GPU, are held for a matrix product."""
    return max(1, (2**21 if x.device.type == "cpu" else 2**26) // (BASES * x.shape[1]))


def _rows_at_once(x: Tensor) -> int:
    """Rows whose bases, in half a MiB, stay in a core's own cache while they are made; on a GPU, all of them."""
    return max(1, 2**17 // (BASES * x.shape[1])) if x.device.type == "cpu" else _rows(x)


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
