"""Oracle: scipy's B-splines."""

import numpy as np
import torch
from scipy.interpolate import BSpline
from torch.testing import assert_close

from wddm.kan import BASES, ORDER, KANBlock, SplineLinear, SplineSum, knots, spline_basis


def scipy_basis(x: np.ndarray) -> np.ndarray:
    elements = [BSpline.basis_element(knots().double().numpy()[k : k + ORDER + 2], extrapolate=False)
                for k in range(BASES)]  # fmt: skip
    return np.nan_to_num(np.stack([element(x) for element in elements], axis=-1))


def test_basis_is_scipys_inside_and_outside_the_grid() -> None:
    x = np.concatenate([np.linspace(-3, 3, 1201), knots().double().numpy()])
    assert_close(spline_basis(torch.from_numpy(x)), torch.from_numpy(scipy_basis(x)), atol=1e-6, rtol=0)


def test_basis_is_a_partition_of_unity_on_the_grid() -> None:
    x = torch.linspace(-1, 1, 501, dtype=torch.float64)
    assert_close(spline_basis(x).sum(-1), torch.ones_like(x), atol=1e-6, rtol=0)


def test_layer_is_the_sum_over_edges() -> None:
    layer, x = SplineLinear(3, 2), torch.randn(5, 3)
    basis = torch.from_numpy(scipy_basis(x.double().numpy())).float()
    wanted = torch.zeros(5, 2)
    for o in range(2):
        for i in range(3):
            spline = (basis[:, i] * layer.spline_weight[o, :, i]).sum(-1)
            base = layer.base_weight[o, i] * x[:, i] * torch.sigmoid(x[:, i])
            wanted[:, o] += base + layer.spline_scaler[o, i] * spline
    assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


def test_the_sum_keeps_no_bases_for_its_backward_pass() -> None:
    x, weight, kept = torch.randn(7, 5, requires_grad=True), torch.randn(3, 8, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (kept.append(saved), saved)[1], lambda saved: saved):
        SplineSum.apply(x, weight)
    assert [saved.shape for saved in kept] == [x.shape, weight.shape]


def test_the_sum_is_that_of_the_bases_however_many_rows_there_are() -> None:
    x, weight = torch.randn(2**13 + 1, 64, requires_grad=True), torch.randn(3, 8, 64, requires_grad=True)  # two parts
    wanted = torch.einsum("nik,oki->no", spline_basis(x), weight)
    assert_close(SplineSum.apply(x, weight), wanted, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(wanted)
    wanted = torch.autograd.grad(wanted, (x, weight), gradient)
    assert_close(torch.autograd.grad(SplineSum.apply(x, weight), (x, weight), gradient), wanted, atol=1e-3, rtol=1e-4)


def test_under_autocast_the_products_are_of_its_type_and_gradients_of_the_weights() -> None:
    x, weight = torch.randn(7, 5, requires_grad=True), torch.randn(3, 8, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = SplineSum.apply(x, weight)
    low.float().sum().backward()
    assert low.dtype == torch.bfloat16 and weight.grad.dtype == x.grad.dtype == torch.float32
    assert_close(low.float(), SplineSum.apply(x, weight), atol=0.1, rtol=0.05)


def test_gradient_reaches_every_edge() -> None:
    layer = SplineLinear(4, 3).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(torch.rand(400, 4, dtype=torch.float64) * 2 - 1).square().sum().backward()
    assert all((p.grad != 0).all() for p in layer.parameters())


def test_block_adds_projected_time_and_has_no_residual_path() -> None:
    block, tokens, time = KANBlock(6, 4), torch.randn(2, 5, 6), torch.randn(2, 4)
    wanted = block.spline(block.norm(tokens)) + block.time(torch.nn.functional.silu(time))[:, None]
    assert_close(block(tokens, time), wanted)
