"""plain: what ours is measured against: a bare PyTorch loop, a spline layer by recursion, a DataLoader that decodes
images as it goes. They compute the same as ours, which tests check, without accelerate, meter, log, schedule or
checkpoint.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from wddm.kan import ORDER, SplineLinear, knots


def haar(x: Tensor, level: int) -> Tensor:
    """Coefficients (B, 4^L C, H/2^L, W/2^L) of images (B, C, H, W): Haar packets, A H V D, divided by 2^L."""
    for _ in range(level):
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        x = torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], dim=1) / 4
    return x


class BareLoop:
    """Forward, loss, backward, gradients clipped to norm 1, AdamW, moving average; the model predicts the clean image.

    Args:
        model: the denoiser, on its device.
        level: of the Haar packets, with dyadic scaling.
        bf16: run the forward pass under autocast.
    """

    def __init__(self, model: ModelMixin, level: int, *, learning_rate: float = 1e-3, bf16: bool = False) -> None:
        self.model, self.level = model, level
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, weight_decay=1e-2, fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        a = torch.cos((torch.arange(1001).double() / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
        a = (a[1:] / a[:-1]).clamp_min(1e-3).cumprod(0)  # a_t, (1000,), of Nichol & Dhariwal 2021
        self.alphas_cumprod = a.float().to(self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def step(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """One step on images (B, C, H, W) in [-1, 1], noise (B, 4^L C, h, w) and timesteps (B,); its loss."""
        z = haar(images, self.level)
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        with self.autocast:
            output = self.model(a.sqrt() * z + (1 - a).sqrt() * noise, t).sample
        loss = (output - z).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1e-3)
        return loss.detach()


class RecursiveSplineLinear(SplineLinear):
    """`SplineLinear` with its bases by the recursion of Cox and de Boor, as textbooks give it:

    B_{i,0}(x) = 1 for t_i <= x < t_{i+1}, else 0
    B_{i,k}(x) = (x - t_i) / (t_{i+k} - t_i) B_{i,k-1}(x) + (t_{i+k+1} - x) / (t_{i+k+1} - t_{i+1}) B_{i+1,k-1}(x)
    """

    def forward(self, x: Tensor) -> Tensor:
        spline_weight = (self.spline_weight * self.spline_scaler.unsqueeze(-1)).flatten(1)
        return F.linear(F.silu(x), self.base_weight) + F.linear(recursive_basis(x).flatten(-2), spline_weight)


def recursive_basis(x: Tensor) -> Tensor:
    """Values of the 8 cubic B-splines at x: (...,) -> (..., 8)."""
    grid, x = knots().to(x), x.unsqueeze(-1)
    bases = ((x >= grid[:-1]) & (x < grid[1:])).to(x.dtype)  # (..., 11)
    for k in range(1, ORDER + 1):
        rising = (x - grid[: -(k + 1)]) / (grid[k:-1] - grid[: -(k + 1)]) * bases[..., :-1]
        falling = (grid[k + 1 :] - x) / (grid[k + 1 :] - grid[1:-k]) * bases[..., 1:]
        bases = rising + falling
    return bases


def with_recursion(model: nn.Module) -> nn.Module:
    """The model, changed in place: spline layers recursive, with the same parameters, spline weights (out, in, 8)."""
    for module in model.modules():
        if type(module) is SplineLinear:
            module.__class__ = RecursiveSplineLinear
            module.spline_weight.data = module.spline_weight.data.transpose(1, 2).contiguous()
    return model


def as_png(images: np.ndarray) -> list[bytes]:
    """Images uint8 (N, H, W, C) as PNG files."""
    files = []
    for pixels in images:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file := io.BytesIO(), "png")
        files.append(file.getvalue())
    return files


class Pictures(Dataset):
    """Encoded images, decoded when they are asked for: float (C, H, W) in [-1, 1], mirrored with probability 1/2."""

    def __init__(self, files: Sequence[bytes], channels: int) -> None:
        self.files, self.mode = files, "RGB" if channels == 3 else "L"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = np.asarray(Image.open(io.BytesIO(self.files[index])).convert(self.mode), np.float32)
        x = torch.from_numpy(pixels / 127.5 - 1)
        x = x.unsqueeze(0) if x.ndim == 2 else x.permute(2, 0, 1)
        return x.flip(-1) if torch.rand(()) < 0.5 else x


def loader_batches(images: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    """Endless batches (B, C, H, W) of a DataLoader that decodes PNGs in this process."""
    loader = DataLoader(Pictures(as_png(images), images.shape[-1]), batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader
