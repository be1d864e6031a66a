"""WaveletCodec: images <-> stacked, scaled wavelet coefficients, and the only place that knows how they are stacked.

An image (B, C, H, W) in [-1, 1] becomes (B, 4^L C, H/2^L, W/2^L): L levels of a periodised, separable discrete
wavelet transform (Mallat 1989), bands stacked as channels, every channel shifted and scaled. Bands are named as in
PyWavelets: A approximation, H horizontal detail (high-pass along the height), V vertical, D diagonal.
Level 0 is the identity, so that a model of pixels is a setting of the codec and of nothing else.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np
import pywt
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

HAAR = ("haar", "db1")


class WaveletCodec(ModelMixin, ConfigMixin):
    """Invertible map between images and the coefficients that a denoiser works on; called, it encodes.

    Args:
        wavelet: any orthogonal or biorthogonal family of PyWavelets that reconstructs perfectly ("haar", "db2", ...).
        level: number of splits L; 0 is the identity.
        transform: "packet" splits every band again at each level; "pyramid" splits only A and folds the finer
            details to the coarsest grid by space-to-depth, so that the shape is the same.
        scaling: "band" gives every channel zero mean and unit variance, with statistics from `fit`; "dyadic" divides
            by 2^L (Haar stays in [-1, 1]), as the published models do; "none" leaves the coefficients as they are.
        band_order: order of the bands within one split; "AVHD" is what the published models use.
        channels: image channels; only "band" scaling needs it, and `fit` fills it in.

    Raises:
        ValueError: unknown wavelet, transform, scaling or band order; a wavelet that loses something; negative level.
    """

    shift: Tensor
    scale: Tensor
    clip_value: Tensor

    @register_to_config
    def __init__(
        self,
        wavelet: str = "haar",
        level: int = 1,
        transform: str = "packet",
        scaling: str = "band",
        band_order: str = "AHVD",
        channels: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("transform", transform, ("packet", "pyramid"))
        check_choice("scaling", scaling, ("band", "dyadic", "none"))
        check_choice("band_order", band_order, ("AHVD", "AVHD"))
        if level < 0:
            raise ValueError(f"got level={level}, wanted 0 or more: level 0 works on pixels")
        self.filter_length = filter_length(wavelet)
        if wavelet not in HAAR and level > 0:
            self.analysis, self.synthesis = filter_banks(wavelet)
        statistics = (4**level * channels, 1, 1) if scaling == "band" and channels else (1, 1, 1)
        self.register_buffer("shift", torch.zeros(statistics))
        self.register_buffer("scale", torch.full(statistics, 2.0**level if scaling == "dyadic" else 1.0))
        self.register_buffer("clip_value", torch.tensor(1.0))  # the largest |coefficient|, where solvers clip

    def encode(self, images: Tensor) -> Tensor:
        """Coefficients (B, 4^L C, H/2^L, W/2^L) of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: a side is not divisible by 2^L or shorter than the filter; "band" scaling was not fitted.
        """
        self.check_size(*images.shape[-2:])
        self._check_statistics(images.shape[1])
        return (self._stack(images) - self.shift) / self.scale

    forward = encode  # so that a codec is exported, compiled and hooked as any module

    def decode(self, coefficients: Tensor) -> Tensor:
        """Images (B, C, H, W) of coefficients (B, 4^L C, h, w): the inverse of `encode`, not clipped.

        Raises:
            ValueError: the channels are not those of this level; "band" scaling was not fitted.
        """
        channels, bands = coefficients.shape[1], 4**self.config.level
        if channels % bands:
            raise ValueError(
                f"got {channels} channels, wanted a multiple of {bands} (4^level, level={self.config.level}): "
                "decode with the level that encoded"
            )
        self._check_statistics(channels // bands)
        return self._unstack(coefficients * self.scale + self.shift)

    @torch.no_grad()
    def fit(self, images: np.ndarray, batch_size: int = 1024) -> Self:
        """Measure uint8 images (N, H, W, C): the channel statistics of "band" scaling, and `clip_value`."""
        if self.config.scaling == "band":
            mean, std = self._moments(images, batch_size)
            self.register_to_config(channels=images.shape[-1])
            self.shift, self.scale = (value.view(-1, 1, 1).to(self.scale) for value in (mean, std))
        largest = max(self.encode(batch).abs().max().item() for batch in self._batches(images, batch_size))
        self.clip_value = torch.tensor(max(1.0, largest)).to(self.clip_value)
        return self

    def bands(self) -> list[str]:
        """Names of the 4^L bands in channel order, each standing for C consecutive channels.

        Packets are named by their path, first split first ("AH": the H of A). Folded details of a pyramid carry
        their level and position in the cell ("H1.0" to "H1.3").
        """
        order, level = self.config.band_order, self.config.level
        if level == 0:
            return ["pixels"]
        names = list(order)
        for depth in range(2, level + 1):
            if self.config.transform == "packet":
                names = [path + band for band in order for path in names]
            else:
                cells = range(4 ** (depth - 1))
                names = names + [f"{band}{level - depth + 1}.{i}" for band in order[1:] for i in cells]
        return names

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """(4^L C, H/2^L, W/2^L): the shape of one image's coefficients."""
        cells = 2**self.config.level
        return channels * cells**2, height // cells, width // cells

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, saying which side and what to do, if images of this size cannot be encoded."""
        level, wavelet = self.config.level, self.config.wavelet
        for name, side in (("height", height), ("width", width)):
            if side % 2**level:
                raise ValueError(
                    f"got {name} {side}, wanted a multiple of {2**level} (2^level, level={level}): "
                    f"resize the images, or choose a smaller level"
                )
            if level and side // 2 ** (level - 1) < self.filter_length:
                raise ValueError(
                    f"got {name} {side}, which is {side // 2 ** (level - 1)} at level {level}, wanted at least "
                    f"{self.filter_length} (the filter of {wavelet!r}): choose a shorter wavelet, a smaller level "
                    "or larger images"
                )

    def _check_statistics(self, channels: int) -> None:
        """Raise a ValueError if "band" scaling has no statistics of images with so many channels."""
        if self.config.scaling == "band" and self.config.channels != channels:
            fitted = f"statistics for {self.config.channels}" if self.config.channels else "no statistics"
            raise ValueError(
                f"got images of {channels} channels and {fitted}, wanted statistics of the training images for "
                'scaling="band": call codec.fit(images) first'
            )

    def _stack(self, x: Tensor) -> Tensor:
        """Unscaled coefficients: `level` splits of everything (packet) or of A only (pyramid)."""
        folded: list[Tensor] = []
        for depth in range(1, self.config.level + 1):
            x = self._split(x)
            if self.config.transform == "pyramid" and depth < self.config.level:
                x, details = x.tensor_split([x.shape[1] // 4], dim=1)
                folded.insert(0, _fold(details, 2 ** (self.config.level - depth)))
        return torch.cat([x, *folded], dim=1) if folded else x

    def _unstack(self, z: Tensor) -> Tensor:
        """Inverse of `_stack`."""
        level, channels = self.config.level, z.shape[1]
        sizes = [channels]
        if self.config.transform == "pyramid" and level:
            sizes = [channels // 4 ** (level - 1), *(3 * channels // 4 ** (level - d) for d in range(1, level))]
        x, *folded = z.split(sizes, dim=1)
        for depth in range(level):
            if depth and folded:
                x = torch.cat([x, _unfold(folded[depth - 1], 2**depth)], dim=1)
            x = self._merge(x)
        return x

    def _split(self, x: Tensor) -> Tensor:
        """One split (B, C, H, W) -> (B, 4C, H/2, W/2): A of all channels, then the details in `band_order`."""
        if self.config.wavelet not in HAAR:
            a, (details,) = self.analysis(x)  # (B, C, h, w), (B, C, 3, h, w)
            return torch.cat((a, *self._ordered(*details.unbind(2))), dim=1)
        # 3 (32x32) to 19 times (256x256) faster than filtering on two CPU cores, and exact
        left, right = x[..., 0::2], x[..., 1::2]
        low, high = left + right, left - right  # along the width
        a, h = low[..., 0::2, :] + low[..., 1::2, :], low[..., 0::2, :] - low[..., 1::2, :]
        v, d = high[..., 0::2, :] + high[..., 1::2, :], high[..., 0::2, :] - high[..., 1::2, :]
        return torch.cat((a, *self._ordered(h, v, d)), dim=1) / 2

    def _merge(self, z: Tensor) -> Tensor:
        """Inverse of `_split`: (B, 4C, h, w) -> (B, C, 2h, 2w)."""
        a, *details = z.chunk(4, dim=1)
        h, v, d = self._ordered(*details)
        if self.config.wavelet not in HAAR:
            return self.synthesis((a, [torch.stack((h, v, d), dim=2)]))
        top, low = (a + h, v + d), (a - h, v - d)
        x = a.new_empty(*a.shape[:-2], 2 * a.shape[-2], 2 * a.shape[-1])
        x[..., 0::2, 0::2], x[..., 0::2, 1::2] = top[0] + top[1], top[0] - top[1]
        x[..., 1::2, 0::2], x[..., 1::2, 1::2] = low[0] + low[1], low[0] - low[1]
        return x / 2

    def _ordered(self, h: Tensor, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Details from PyWavelets' order to `band_order`, or back: V and H swap, or nothing does."""
        return (v, h, d) if self.config.band_order == "AVHD" else (h, v, d)

    def _moments(self, images: np.ndarray, batch_size: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (float64) of every unscaled coefficient channel."""
        totals, values = torch.zeros(2, 4**self.config.level * images.shape[-1], dtype=torch.float64), 0
        for batch in self._batches(images, batch_size):
            z = self._stack(batch).double()
            totals += torch.stack((z.sum((0, 2, 3)), z.square().sum((0, 2, 3)))).cpu()
            values += z[:, 0].numel()
        mean, square = totals / values
        return mean, (square - mean.square()).clamp_min(1e-8).sqrt()

    def _batches(self, images: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        """uint8 (N, H, W, C) -> (B, C, H, W) in [-1, 1], of the codec's type and on its device, batch by batch."""
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size]))
            yield (batch.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.clip_value)

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> None:
        """Take `clip_value` from codecs that were saved when it was called `limit`."""
        super()._fix_state_dict_keys_on_load(state_dict)
        if "limit" in state_dict:
            state_dict["clip_value"] = state_dict.pop("limit")


def check_choice(name: str, got: str, wanted: Iterable[str]) -> None:
    """Raise a ValueError that lists what there is, if `got` is none of it."""
    if got not in wanted:
        raise ValueError(f"got {name}={got!r}, wanted one of {', '.join(wanted)}: choose one of them")


def filter_length(wavelet: str) -> int:
    """Length of the longest filter of a PyWavelets family.

    Raises:
        ValueError: the family is unknown or continuous, or what it splits cannot be put together again (`dmey`).
    """
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(
            f"got wavelet={wavelet!r}, wanted an orthogonal or biorthogonal PyWavelets family such as haar, db2, "
            "sym4, bior4.4: see pywt.wavelist(kind='discrete')"
        )
    low, high, low_inverse, high_inverse = pywt.Wavelet(wavelet).filter_bank
    response = np.convolve(low, low_inverse) + np.convolve(high, high_inverse)  # ideally 0, ..., 0, 2, 0, ..., 0
    response[len(response) // 2] -= 2
    if np.abs(response).max() > 1e-6:
        raise ValueError(f"got wavelet={wavelet!r}, wanted one that reconstructs perfectly: choose haar, db2, sym4")
    return max(len(low), len(high), len(low_inverse), len(high_inverse))


def filter_banks(wavelet: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One level of analysis and synthesis by pytorch-wavelets, periodised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytorch-wavelets imports the deprecated pkg_resources
        from pytorch_wavelets import DWTForward, DWTInverse
    return DWTForward(1, wavelet, mode="periodization"), DWTInverse(wavelet, mode="periodization")


def _fold(details: Tensor, cell: int) -> Tensor:
    """Space-to-depth of (B, 3C, H, W) by `cell`, ordered band, position, colour: bands stay contiguous."""
    batch, channels = details.shape[:2]
    x = torch.nn.functional.pixel_unshuffle(details, cell)
    x = x.view(batch, 3, channels // 3, cell**2, *x.shape[-2:]).transpose(2, 3)
    return x.flatten(1, 3)


def _unfold(folded: Tensor, cell: int) -> Tensor:
    """Inverse of `_fold`."""
    batch, channels = folded.shape[:2]
    x = folded.view(batch, 3, cell**2, channels // (3 * cell**2), *folded.shape[-2:]).transpose(2, 3)
    return torch.nn.functional.pixel_shuffle(x.flatten(1, 3), cell)
