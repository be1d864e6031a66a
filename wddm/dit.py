"""DiTModel: a transformer on coefficients, without convolutions (DiT, Peebles & Xie 2023, arXiv 2212.09748).

Every position of the coefficient maps is one token: the wavelet level takes the place of DiT's patch size.
Called and configured as diffusers' `UNet2DModel`: `model(sample, timestep).sample`, (B, C, h, w) in and out.
"""

from functools import partial

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F

from wddm.ukan import with_labels
from wddm.wavelets import sides

plain_norm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)  # scale and shift come from the time embedding


class DiTModel(ModelMixin, ConfigMixin):
    """Denoiser of self-attention and MLP blocks, which the time embedding modulates (adaLN-Zero).

    Arguments mean the same as in `UKANModel`, but `block_out_channels` holds one width per block, all equal.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self, sample_size: int | tuple[int, int] = 16, in_channels: int = 12, out_channels: int = 12,
        block_out_channels: tuple[int, ...] = (128, 128, 128, 128), attention_head_dim: int = 64, dropout: float = 0.0,
        num_class_embeds: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        width = block_out_channels[0]
        if {width} != set(block_out_channels) or width % 4 or width % attention_head_dim:
            got = f"got widths {list(block_out_channels)} and heads of {attention_head_dim}"
            wanted = "wanted the same width for all blocks, a multiple of 4 and of the heads: for example [64, 64]"
            raise ValueError(f"{got}, {wanted}")
        self.gradient_checkpointing = False
        positions = get_2d_sincos_pos_embed(width, sides(sample_size)).float()  # (h w, width)
        self.register_buffer("positions", positions, persistent=False)
        self.frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0.0)
        self.time = TimestepEmbedding(256, width)
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.proj_in, self.proj_out = nn.Linear(in_channels, width), nn.Linear(width, out_channels)
        self.blocks = nn.ModuleList(DiTBlock(width, attention_head_dim, dropout) for _ in block_out_channels)
        self.norm_out, self.modulation_out = plain_norm(width), nn.Linear(width, 2 * width)
        for layer in (self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """See `UKANModel.forward`."""
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = self.time(self.frequencies(timestep).to(self.dtype))  # (B, width)
        time = F.silu(with_labels(time, self.class_embedding, class_labels))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        call = self._gradient_checkpointing_func if recompute else nn.Module.__call__
        x = self.proj_in(sample.flatten(2).transpose(1, 2)) + self.positions.to(sample.dtype)  # (B, h w, width)
        for block in self.blocks:
            x = call(block, x, time)
        shift, scale = self.modulation_out(time).unsqueeze(1).chunk(2, dim=-1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.transpose(1, 2).unflatten(2, sample.shape[-2:])
        return UNet2DOutput(sample=x) if return_dict else (x,)


class DiTBlock(nn.Module):
    """Self-attention, then an MLP, on tokens (B, N, width); time (B, width) shifts, scales and gates each of them."""

    def __init__(self, width: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.head_dim, self.modulation = head_dim, nn.Linear(width, 6 * width)
        self.norm1, self.qkv, self.proj = plain_norm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2, self.mlp = plain_norm(width), nn.Sequential(widen, nn.GELU("tanh"), nn.Dropout(dropout), narrow)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)  # starts as the identity

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time).unsqueeze(1).chunk(6, dim=-1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, -1, self.head_dim))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, heads, N, head_dim)
        x = x + gate1 * self.proj(attended.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
