"""UKANModel: a UNet whose bottleneck is built from spline layers (U-KAN, Li et al. 2024, arXiv 2406.02918).

Called and configured as diffusers' `UNet2DModel`: `model(sample, timestep).sample`, (B, C, h, w) in and out.
Checkpoints in the published format (class name `UKANHybrid`, see loading.py) load through `from_pretrained` too.
"""

import math
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F

from wddm.kan import KANBlock
from wddm.loading import CLASS_NAME, fetched, load_published, load_strictly, read_config
from wddm.wavelets import check_multiple, sides


class UKANModel(ModelMixin, ConfigMixin):
    """Denoiser with a Kolmogorov-Arnold bottleneck, which is left out if the maps that enter it have a side under 8.

    Args:
        sample_size: side of the coefficient maps, or (height, width).
        block_out_channels: width of every level; each level but the last halves the sides.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention_levels: levels (0 = finest) whose residual blocks are followed by self-attention.
        attention_head_dim, norm_num_groups: as in diffusers, but reduced to the greatest common divisor with the width.
        num_train_timesteps: rows T of the time table; timesteps, whole or not, are clamped to [0, T - 1].
        base_channels: width of the first convolution, None: the first level's; the time embedding is 4 times as wide.
        num_class_embeds: number of classes plus one for "no label"; None: the network takes no labels.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self, sample_size: int | tuple[int, int] = 16, in_channels: int = 12, out_channels: int = 12,
        block_out_channels: tuple[int, ...] = (128, 256), layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (), attention_head_dim: int = 64, dropout: float = 0.0,
        norm_num_groups: int = 32, num_train_timesteps: int = 1000, base_channels: int | None = None,
        num_class_embeds: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        width, levels = base_channels or block_out_channels[0], len(block_out_channels)
        check_halvings(sample_size, levels)
        self.gradient_checkpointing, time_width = False, 4 * width
        self.time_embedding = TimeEmbedding(num_train_timesteps, width, time_width)
        self.class_embedding = nn.Embedding(num_class_embeds, time_width) if num_class_embeds else None
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)

        def residual(c_in: int, c_out: int, level: int) -> ResidualBlock:
            head_dim = attention_head_dim if level in attention_levels else 0
            return ResidualBlock(c_in, c_out, time_width, dropout, norm_num_groups, head_dim)

        self.down, skips = nn.ModuleList(), [width]
        for level, c_out in enumerate(block_out_channels):
            for _ in range(layers_per_block):
                self.down.append(residual(width, c_out, level))
                skips.append(width := c_out)
            if level < levels - 1:
                self.down.append(Downsample2D(width, use_conv=True, name="op"))
                skips.append(width)
        has_bottleneck = min(sides(sample_size)) // 2**levels >= 4
        self.bottleneck = KANBottleneck(width, time_width, norm_num_groups) if has_bottleneck else None
        self.up = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(block_out_channels))):
            for _ in range(layers_per_block + 1):
                self.up.append(residual(width + skips.pop(), c_out, level))
                width = c_out
            if level:
                self.up.append(Upsample2D(width, use_conv=True))
        self.norm_out = nn.GroupNorm(math.gcd(norm_num_groups, width), width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Denoise `sample` (B, C, h, w) at `timestep`, a number or one per sample (B,); class_labels are (B,)."""
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = with_labels(self.time_embedding(timestep), self.class_embedding, class_labels)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        call = self._gradient_checkpointing_func if recompute else nn.Module.__call__
        skips = [x := self.conv_in(sample)]
        for block in self.down:
            skips.append(x := call(block, x, time) if isinstance(block, ResidualBlock) else block(x))
        if self.bottleneck is not None:
            x = call(self.bottleneck, x, time)
        for block in self.up:
            x = call(block, torch.cat([x, skips.pop()], dim=1), time) if isinstance(block, ResidualBlock) else block(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return UNet2DOutput(sample=x) if return_dict else (x,)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """Load from a folder or Hub repository, in our format or the published one, strictly and in eval mode."""
        folder = fetched(path, kwargs) / (kwargs.pop("subfolder", None) or "")
        config = read_config(cls, folder)
        if config.get("_class_name") == CLASS_NAME:
            return load_published(cls, folder, config).to(kwargs.get("torch_dtype"))
        return load_strictly(super().from_pretrained, folder, **kwargs)


class TimeEmbedding(TimestepEmbedding):
    """Table of sinusoids (a row per timestep, linear between rows; sin and cos interleaved) -> linear, SiLU, linear."""

    def __init__(self, rows: int, width: int, time_width: int) -> None:
        super().__init__(width, time_width)
        frequency = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
        phase = torch.arange(rows).unsqueeze(1) * frequency  # (rows, width / 2)
        table = torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)
        self.table = nn.Parameter(table, requires_grad=False)  # stored in checkpoints, counted as parameters

    def forward(self, timestep: Tensor) -> Tensor:
        last = len(self.table) - 1
        low = timestep.floor().long().clamp(0, last)
        fraction = (timestep - low).clamp(0, 1).to(self.table.dtype).unsqueeze(1)
        return super().forward(torch.lerp(self.table[low], self.table[(low + 1).clamp_max(last)], fraction))


class ResidualBlock(ResnetBlock2D):
    """diffusers' residual block, then self-attention if `head_dim` is not 0; time is (B, time_width)."""

    def __init__(self, c_in: int, c_out: int, time_width: int, dropout: float, groups: int, head_dim: int) -> None:
        sizes = {"in_channels": c_in, "out_channels": c_out, "temb_channels": time_width, "dropout": dropout}
        groups_in, groups = math.gcd(groups, c_in), math.gcd(groups, c_out)
        super().__init__(**sizes, groups=groups_in, groups_out=groups, eps=1e-5)
        self.attention = nn.Identity()
        if head_dim:
            sizes = {"heads": c_out // math.gcd(head_dim, c_out), "dim_head": math.gcd(head_dim, c_out)}
            self.attention = Attention(c_out, **sizes, norm_num_groups=groups, bias=True, residual_connection=True)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(super().forward(x, time))


class KANBottleneck(nn.Module):
    """Two patch embeddings down (c -> 3c/2 -> 2c), each with a KAN block, and back up with additive skips."""

    def __init__(self, width: int, time_width: int, groups: int) -> None:
        super().__init__()
        middle, deep = 3 * width // 2, 2 * width
        self.embed1, self.kan1 = PatchEmbedding(width, middle), KANBlock(middle, time_width)
        self.embed2, self.kan2 = PatchEmbedding(middle, deep), KANBlock(deep, time_width)
        self.decode1, self.kan3 = Decode(deep, middle, time_width, groups), KANBlock(middle, time_width)
        self.decode2 = Decode(middle, width, time_width, groups)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(middle), nn.LayerNorm(deep), nn.LayerNorm(middle)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        half = on_tokens(self.kan1, self.norm1, self.embed1(x), time)  # (B, 3c/2, h/2, w/2)
        quarter = on_tokens(self.kan2, self.norm2, self.embed2(half), time)  # (B, 2c, h/4, w/4)
        half = half + self.decode1(quarter, time, half.shape[-2:])
        return x + self.decode2(on_tokens(self.kan3, self.norm3, half, time), time, x.shape[-2:])


class PatchEmbedding(nn.Module):
    """3x3 convolution of stride 2, then LayerNorm over channels: (B, c, h, w) -> (B, c', h/2, w/2)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.LayerNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, -1)).movedim(-1, 1)


class Decode(nn.Module):
    """GroupNorm, SiLU, 3x3 conv, plus time, bilinear up to `size`, SiLU: (B, c, h, w) -> (B, c', *size)."""

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(math.gcd(groups, c_in), c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_width, c_out)

    def forward(self, x: Tensor, time: Tensor, size: torch.Size) -> Tensor:
        x = self.conv(F.silu(self.norm(x))) + self.time(F.silu(time))[:, :, None, None]
        return F.silu(F.interpolate(x, size=size, mode="bilinear"))


def on_tokens(block: KANBlock, norm: nn.LayerNorm, x: Tensor, time: Tensor) -> Tensor:
    """Apply a token block and its norm to a map (B, c, h, w), whose positions are the tokens."""
    tokens = x.flatten(2).transpose(1, 2)  # (B, hw, c)
    return norm(block(tokens, time)).transpose(1, 2).unflatten(2, x.shape[-2:])


def check_halvings(size: int | tuple[int, int], levels: int) -> None:
    """Raise a ValueError if maps of this size cannot be halved once per level after the first."""
    remedy = "give fewer widths, a smaller level or another resolution"
    for side in sides(size):
        check_multiple("maps of side", side, 2 ** (levels - 1), f"{levels} widths", remedy)


def with_labels(time: Tensor, embedding: nn.Embedding | None, labels: Tensor | None) -> Tensor:
    """Time embedding (B, E), plus that of labels (B,) if the network has one; ValueError for one without the other."""
    if (embedding is None) != (labels is None):
        got, wanted = ("no class_labels", "one per sample") if labels is None else ("class_labels", "none")
        raise ValueError(f"got {got}, wanted {wanted}: they belong to a network built with num_class_embeds")
    return time if embedding is None else time + embedding(labels)
