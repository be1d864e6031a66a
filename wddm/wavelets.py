"""WaveletCodec: images <-> stacked, scaled wavelet coefficients, and the only place that knows how they are stacked.

An image (B, C, H, W) in [-1, 1] becomes (B, 4^L C, H/2^L, W/2^L): L levels of a periodised, separable discrete
wavelet transform (Mallat 1989), bands stacked as channels, every channel shifted and scaled. Bands are named as in
PyWavelets: A approximation, H horizontal detail (high-pass along the height), V vertical, D diagonal.
Level 0 is the identity, so that a model of pixels needs no code of its own.
"""

import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import product
from typing import Self

import numpy as np
import pywt
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import functional as F

HAAR = ("haar", "db1")
ANY_CASE = ("backbone", "model_type", "prediction_type", "scheduler", "solver")  # whose values may be in capitals


class WaveletCodec(ModelMixin, ConfigMixin):
    """Invertible map between images and the coefficients that a denoiser works on; calling it encodes.

    Args:
        wavelet: any orthogonal or biorthogonal family of PyWavelets that reconstructs perfectly.
        level: number of splits L.
        transform: "packet" splits every band again at each level; "pyramid" splits only A and folds the finer
            details to the coarsest grid by space-to-depth, so that the shape is the same.
        scaling: "band" gives every channel zero mean and unit variance, with statistics from `fit`; "dyadic" divides
            by 2^L (Haar stays in [-1, 1]), as the published models do; "none" leaves the coefficients as they are.
        band_order: order of the bands within one split; published models have "AVHD".
        channels: number of image channels; only "band" scaling needs it, and `fit` sets it. Until then z is nan.
    """

    shift: Tensor
    scale: Tensor
    clip_value: Tensor
    to = torch.nn.Module.to  # diffusers' own warns about modules to keep in float32; there are none

    @register_to_config
    def __init__(
        self, wavelet: str = "haar", level: int = 1, transform: str = "packet", scaling: str = "band",
        band_order: str = "AHVD", channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("transform", transform, ("packet", "pyramid"))
        check_choice("scaling", scaling, ("band", "dyadic", "none"))
        check_choice("band_order", band_order, ("AHVD", "AVHD"))
        if level < 0:
            raise ValueError(f"got level={level}, wanted 0 or more: level 0 works on pixels")
        self.filter_length = filter_length(wavelet)
        if wavelet not in HAAR and level > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pytorch-wavelets imports the deprecated pkg_resources
                from pytorch_wavelets import DWTForward, DWTInverse
            self.analysis = DWTForward(1, wavelet, mode="periodization")
            self.synthesis = DWTInverse(wavelet, mode="periodization")
        statistics = (4**level * channels, 1, 1) if scaling == "band" and channels else (1, 1, 1)
        self.register_buffer("shift", torch.zeros(statistics))
        self.register_buffer("scale", torch.full(statistics, {"band": torch.nan, "none": 1.0}.get(scaling, 2.0**level)))
        self.register_buffer("clip_value", torch.tensor(2.0**level if scaling == "none" else 1.0))  # the largest |z|

    def encode(self, images: Tensor) -> Tensor:
        """Coefficients (B, 4^L C, H/2^L, W/2^L) of images (B, C, H, W) in [-1, 1]; ValueError if they do not fit."""
        self.check_size(*images.shape[-2:])
        self._check(images, images.shape[1])
        return (self._stack(images, self.config.level) - self.shift) / self.scale

    forward = encode  # so that a codec is exported, compiled and hooked as any module

    def decode(self, coefficients: Tensor) -> Tensor:
        """Images (B, C, H, W) of coefficients (B, 4^L C, h, w): the inverse of `encode`, not clipped."""
        channels, bands = coefficients.shape[1], 4**self.config.level
        check_multiple("channels", channels, bands, "4^level", "decode with the level that encoded")
        self._check(coefficients, channels // bands)
        return self._unstack(coefficients * self.scale + self.shift, self.config.level)

    @torch.no_grad()
    def fit(self, images: np.ndarray, batch_size: int = 1024) -> Self:
        """Set `clip_value`, and for "band" scaling the channel statistics, from uint8 images (N, H, W, C)."""
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(f"got {images.dtype} images {images.shape}, wanted uint8 (N, H, W, C): give a Dataset's")
        level, (height, width, channels) = self.config.level, images.shape[1:]
        self.check_size(height, width)
        sums, extremes = torch.zeros(2, 4**level * channels, dtype=torch.float64), []
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)
            z = self._stack((batch.float() / 127.5 - 1).to(self.clip_value), level)
            extremes += [z.amin((0, 2, 3)), z.amax((0, 2, 3))]
            sums += torch.stack([(z.double() ** power).sum((0, 2, 3)) for power in (1, 2)]).cpu()
        if self.config.scaling == "band":
            mean, square = sums / (len(images) * height * width / 4**level)
            std = (square - mean.square()).clamp_min(1e-8).sqrt()
            self.register_to_config(channels=channels)
            self.shift, self.scale = (value.view(-1, 1, 1).to(self.scale) for value in (mean, std))
        scaled = (torch.stack(extremes)[..., None, None] - self.shift) / self.scale  # (2 batches, 4^L C, 1, 1)
        self.clip_value = scaled.abs().max().clamp_min(1.0)
        return self

    def bands(self) -> list[str]:
        """Names of the 4^L bands in channel order, each of C consecutive channels.

        A packet is named by its path ("AH": the H of A), a folded detail by band, level and place in the cell ("H1.0").
        """
        order, level = self.config.band_order, self.config.level
        if not level:
            return ["pixels"]
        if self.config.transform == "packet":
            return ["".join(reversed(path)) for path in product(order, repeat=level)]
        cells = ((depth, band, i) for depth in range(1, level) for band in order[1:] for i in range(4**depth))
        return [*order, *(f"{band}{level - depth}.{i}" for depth, band, i in cells)]

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """(4^L C, H/2^L, W/2^L): the shape of one image's coefficients."""
        cells = 2**self.config.level
        return channels * cells**2, height // cells, width // cells

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, saying which side and what to do, if images of this size cannot be encoded."""
        level, taps = self.config.level, f"{self.filter_length} (the filter of {self.config.wavelet!r})"
        why, remedy = f"2^level, level={level}", "resize the images, or choose a smaller level"
        for name, side in (("height", height), ("width", width)):
            check_multiple(name, side, 2**level, why, remedy)
            shortest = 2 * side // 2**level  # side of the maps that the last split gets
            if level and shortest < self.filter_length:
                got = f"got {name} {side}, which is {shortest} at level {level}, wanted at least {taps}"
                raise ValueError(f"{got}: choose a shorter wavelet, a smaller level or larger images")

    def _check(self, x: Tensor, channels: int) -> None:
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"got {x.dtype} {tuple(x.shape)}, wanted floats (B, C, H, W): convert it, or unsqueeze(0)")
        if self.config.scaling == "band" and self.config.channels != channels:
            fitted = f"statistics for {self.config.channels}" if self.config.channels else "no statistics"
            wanted = 'those of the training images for scaling="band": call codec.fit(images) first'
            raise ValueError(f"got images of {channels} channels and {fitted}, wanted {wanted}")

    def _stack(self, x: Tensor, level: int) -> Tensor:
        if level == 0:
            return x
        z = self._split(x)
        if self.config.transform == "packet" or level == 1:
            return self._stack(z, level - 1)
        a, details = z.tensor_split([x.shape[1]], dim=1)
        cell = 2 ** (level - 1)  # one position of the coarsest grid holds cell x cell finer ones
        folded = F.pixel_unshuffle(details, cell).unflatten(1, (3, -1, cell**2)).transpose(2, 3).flatten(1, 3)
        return torch.cat((self._stack(a, level - 1), folded), dim=1)  # folded: (B, 3 cell^2 C, h, w)

    def _unstack(self, z: Tensor, level: int) -> Tensor:
        if level == 0:
            return z
        if self.config.transform == "packet" or level == 1:
            return self._merge(self._unstack(z, level - 1))
        a, folded = z.tensor_split([z.shape[1] // 4], dim=1)
        cell = 2 ** (level - 1)
        details = folded.unflatten(1, (3, cell**2, -1)).transpose(2, 3).flatten(1, 3)  # (B, 3 C cell^2, h, w)
        return self._merge(torch.cat((self._unstack(a, level - 1), F.pixel_shuffle(details, cell)), dim=1))

    def _split(self, x: Tensor) -> Tensor:
        """One split (B, C, H, W) -> (B, 4C, H/2, W/2): A of all channels, then the details in `band_order`."""
        if self.config.wavelet not in HAAR:
            a, (details,) = self.analysis(x.to(self.dtype))  # (B, C, h, w), (B, C, 3, h, w)
            return torch.cat((a, *self._ordered(*details.unbind(2))), dim=1)
        # exact, and 3 (32x32) to 19 times (256x256) faster than filtering on two CPU cores
        left, right = x[..., 0::2], x[..., 1::2]
        low, high = left + right, left - right  # along the width
        a, h = low[..., 0::2, :] + low[..., 1::2, :], low[..., 0::2, :] - low[..., 1::2, :]
        v, d = high[..., 0::2, :] + high[..., 1::2, :], high[..., 0::2, :] - high[..., 1::2, :]
        return torch.cat((a, *self._ordered(h, v, d)), dim=1) / 2

    def _merge(self, z: Tensor) -> Tensor:
        a, *details = z.chunk(4, dim=1)
        h, v, d = self._ordered(*details)
        if self.config.wavelet not in HAAR:
            return self.synthesis((a, [torch.stack((h, v, d), dim=2)]))
        x = a.new_empty(*a.shape[:-2], 2 * a.shape[-2], 2 * a.shape[-1])
        for row, even, odd in ((0, a + h, v + d), (1, a - h, v - d)):
            x[..., row::2, 0::2], x[..., row::2, 1::2] = even + odd, even - odd
        return x / 2

    def _ordered(self, h: Tensor, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reorder details from PyWavelets' order to `band_order`, or back."""
        return (v, h, d) if self.config.band_order == "AVHD" else (h, v, d)


def check_choice(name: str, got: str, wanted: Iterable[str]) -> str:
    """Return `got`, in lower case if `name` is in `ANY_CASE`; ValueError listing the choices if it is none of them."""
    found = got.lower() if name in ANY_CASE and isinstance(got, str) else got
    if found not in wanted:
        close = get_close_matches(str(got)[:100], wanted, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of them"
        raise ValueError(f"got {name}={got!r:.100}, wanted one of {', '.join(wanted)}: {hint}")
    return found


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size, which is such a pair, or one number where both are equal."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width


def check_multiple(name: str, got: int, factor: int, reason: str, remedy: str) -> None:
    """Raise a ValueError that says why and what to do, if `got` is not a multiple of `factor`."""
    if got % factor:
        raise ValueError(f"got {name} {got}, wanted a multiple of {factor} ({reason}): {remedy}")


def filter_length(wavelet: str) -> int:
    """Length of a wavelet's filters; ValueError if it is unknown, continuous or not exactly invertible (dmey)."""
    if wavelet not in pywt.wavelist(kind="discrete") or wavelet == "dmey":  # its round trip is 2e-2 off
        wanted = "wanted an orthogonal or biorthogonal one that reconstructs perfectly"
        raise ValueError(f"got wavelet={wavelet!r}, {wanted}: choose haar, db2, sym4")
    return int(pywt.Wavelet(wavelet).dec_len)
