"""Diagnostics compare samples with real images: spectra, wavelet bands, nearest neighbours and classes.

Images are uint8 (N, H, W, C), a memory map for instance, float (N, C, H, W) in [0, 1], or a list of PIL images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wddm.metrics.intervals import Estimate, resampled, share
from wddm.wavelets import WaveletCodec

Images = np.ndarray | Tensor | list[Image.Image]
Device = str | torch.device
CACHED = 2**16  # values that are transformed at a time: half a MiB, which a core's own cache holds
MOST = 5000  # labelled real images that a classifier is fitted to and tested on


class Spectrum(NamedTuple):
    frequency: np.ndarray  # (F,), in cycles/pixel
    power: Estimate[np.ndarray]  # (F,)


class BandStatistics(NamedTuple):  # of every Haar packet, arrays (4^L,)
    bands: list[str]
    energy: Estimate[np.ndarray]  # mean square
    std: np.ndarray
    kurtosis: Estimate[np.ndarray]  # excess: 0 for a Gaussian; nan for a band without any detail


class Verdict(NamedTuple):
    """What a classifier of real images makes of generated ones."""

    labels: np.ndarray  # (N,), their classes
    class_counts: dict[int, int]  # how many images have each class as their top one
    confidence: np.ndarray  # (N,), their top probabilities
    held_out: np.ndarray  # (M,), top probabilities of real images that it was not fitted to
    threshold: float  # the 10th percentile of these: 90 % of real images pass
    accuracy: Estimate[float]  # the share of these whose class it found

    @property
    def classes_seen(self) -> int:
        return sum(count > 0 for count in self.class_counts.values())


@dataclass
class UnitBatches:
    """Iterates over images, or those in `rows`, in batches (B, C, H, W) of float64 in [0, 1] on the device.

    Apple's GPUs ("mps") have no float64: the CPU takes their place. ValueError for anything but such images.
    """

    images: Any  # see above
    rows: np.ndarray | None = None
    batch_size: int = 512
    batch_values: int = 2**20  # 8 MiB of float64; larger batches wait for memory
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.images, list):
            return
        kinds = {(getattr(image, "mode", type(image).__name__), getattr(image, "size", None)) for image in self.images}
        if len(kinds) != 1 or not {mode for mode, _ in kinds} <= {"L", "RGB"}:
            got = ", ".join(f"{mode} {size}" for mode, size in list(kinds)[:3]) or "no images"
            raise ValueError(f"got a list of {got}, wanted PIL images of one size, all L or all RGB: convert them")
        self.images = np.stack([np.atleast_3d(np.asarray(image)) for image in self.images])

    @property
    def count(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        images, shape = self.images, tuple(self.images.shape)
        last = images.dtype in (np.uint8, torch.uint8)  # channels are
        sides = shape[1:3] if last else shape[2:]
        if len(shape) != 4 or not min(shape) or min(sides) <= 4 < shape[3 if last else 1]:  # so short a side is colours
            wanted = "uint8 (N, H, W, C) or float (N, C, H, W): transpose them, or give others"
            raise ValueError(f"got {images.dtype} images {shape}, wanted one or more, {wanted}")
        device = "cpu" if torch.device(self.device).type == "mps" else self.device
        size = max(1, min(self.batch_size, self.batch_values // np.prod(shape[1:])))
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            batch = images[part if self.rows is None else self.rows[part]]
            batch = (batch.detach() if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))).to(device)
            if last:
                yield batch.permute(0, 3, 1, 2).double().div_(255)
            elif batch.is_floating_point() and batch.min() >= 0 and batch.max() <= 1:
                yield batch.double()
            else:
                ends = f"{batch.min().item():g} to {batch.max().item():g}"
                raise ValueError(f"got {batch.dtype} images from {ends}, wanted floats in [0, 1]: rescale them")


def of_each(images: Images, function: Callable[[Tensor], Tensor]) -> np.ndarray:
    """What a function of batches (B, C, H, W) finds of each image (N, ...); one array, as parts scatter the memory."""
    batches, start, found = UnitBatches(images), 0, np.empty(0)
    for batch in batches:
        part = function(batch).numpy()
        found = found if start else np.empty((batches.count, *part.shape[1:]), part.dtype)
        found[start : (start := start + len(part))] = part
    return found


def haar_packets(batch: Tensor, level: int, part: slice = slice(None)) -> Tensor:
    """Some of the 4^L Haar packets (P, B, C H W / 4^L) of float64 images (B, C, H, W), in `WaveletCodec`'s order."""
    codec, size = WaveletCodec("haar", level, scaling="none").to(batch), max(1, CACHED // batch[0].numel())
    packets = [codec.encode(images).unflatten(1, (4**level, -1)).flatten(2)[:, part] for images in batch.split(size)]
    return torch.cat(packets).transpose(0, 1)  # encoded some at a time, as a core's own cache is several times faster


def radial_power_spectrum(images: Images) -> Spectrum:
    """Power to 1/2 cycle/pixel, over rings, colours and images less their means; v for white noise of variance v."""
    height, width = next(iter(UnitBatches(images, batch_size=1))).shape[-2:]
    side = min(height, width)
    y, x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    ring = (torch.hypot(y[:, None], x) * side).round().long().flatten()  # (H W,)
    rings = torch.arange(1, side // 2 + 1)

    def powers(batch: Tensor) -> Tensor:  # (B, F)
        power = torch.fft.fft2(batch - batch.mean((-2, -1), keepdim=True), norm="ortho").abs().square().mean(1)
        sums = power.new_zeros(len(batch), int(ring.max()) + 1).index_add_(1, ring, power.flatten(1))
        return (sums / torch.bincount(ring))[:, rings]

    return Spectrum((rings / side).double().numpy(), resampled(of_each(images, powers)))


def band_statistics(images: Images, level: int = 3) -> BandStatistics:
    """Energy, spread and tails of the Haar packets; those of details in photographs are heavy-tailed."""

    def moments(batch: Tensor) -> Tensor:  # (B, 4, 4^L)
        packets = haar_packets(batch, level)
        return torch.stack([(packets**p).mean(2).T for p in (1, 2, 3, 4)], 1)

    per_image = of_each(images, moments)
    energy, mean = resampled(per_image[:, 1]), per_image[:, 0].mean(0)
    bands, std = WaveletCodec("haar", level=level).bands(), np.sqrt(np.maximum(energy.value - mean**2, 0))
    return BandStatistics(bands, energy, std, resampled(per_image, _kurtosis))


def _kurtosis(moments: np.ndarray) -> np.ndarray:
    m1, m2, m3, m4 = np.moveaxis(moments, -2, 0)
    variance = np.where(m2 - m1**2 > 1e-12 * m2, m2 - m1**2, np.nan)  # below, rounding is all that is left
    return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2 - 3


def pixels(images: Images, side: int) -> np.ndarray:
    """Images as vectors (N, d) of grey levels, float32; larger ones averaged to `side` x `side` pixels."""

    def small(batch: Tensor) -> Tensor:
        sides = min(side, batch.shape[2]), min(side, batch.shape[3])
        return torch.nn.functional.adaptive_avg_pool2d(255 * batch, sides).float().flatten(1)

    return of_each(images, small)


def nearest_neighbours(generated: Images, real: Images, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k real images nearest to each generated one, larger ones averaged to 32 x 32: rows, RMS distances (n, k)."""
    rows, distances = nearest(pixels(generated, 32), pixels(real, 32), k)
    return rows, distances / 255


def nearest(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of vectors (n, d) and (m, d)."""
    from sklearn.neighbors import NearestNeighbors

    if not 1 <= k <= len(real):
        raise ValueError(f"got k={k} with {len(real)} real images, wanted 1 to {len(real)}: change k")
    rows = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(real).kneighbors(generated, return_distance=False)
    apart = [np.sqrt(((real[i] - one.astype(float)) ** 2).mean(1)) for i, one in zip(rows, generated, strict=True)]
    return rows, np.stack(apart)


def memorised(distances: np.ndarray, ratio: float = 1 / 3) -> np.ndarray:
    """Which samples (n,) are copies: three times as near to one image as to the next (Yoon et al. 2023), of distances
    (n, k >= 2) in order; among several equal ones too.
    """
    if distances.ndim != 2 or distances.shape[1] < 2:
        raise ValueError(f"got distances {distances.shape}, wanted (n, 2 or more): ask for k=2 neighbours or more")
    return distances[:, 0] <= distances[:, 1] * ratio


def judge(generated: np.ndarray, real: np.ndarray, labels: np.ndarray, seed: int = 0) -> Verdict:
    """The classes of generated images, and how sure of them a classifier of real ones is; all as vectors (N, d).

    A logistic regression on 500 radial basis functions, which is sure only of what resembles images that it has seen.
    It is fitted to three quarters of the images and measured on the rest; those with a negative label are left out.
    """
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline

    rows, classes = np.flatnonzero(labels >= 0), len(np.unique(labels[labels >= 0]))
    if len(real) != len(labels) or classes < 2:
        got = f"got {len(real)} images and {len(labels)} labels of {classes} classes"
        raise ValueError(f"{got}, wanted one label each of 2 classes or more: give the labels of these images")
    rows = np.random.default_rng(seed).permutation(rows)[:MOST]
    fitted, held_out = train_test_split(rows, test_size=0.25, random_state=seed, stratify=labels[rows])
    gamma = 2 / (real.shape[1] * real[fitted].var() + 1e-12)
    bases = Nystroem(gamma=gamma, n_components=min(500, len(fitted)), random_state=seed)
    model = make_pipeline(bases, LogisticRegression(C=10, max_iter=500)).fit(real[fitted], labels[fitted])
    known, probability = (model.predict_proba(vectors) for vectors in (real[held_out], generated))
    found = model.classes_[probability.argmax(1)]
    counts = {int(name): int(np.sum(found == name)) for name in model.classes_}
    accuracy = share((model.classes_[known.argmax(1)] == labels[held_out]).sum(), len(held_out))
    return Verdict(found, counts, probability.max(1), known.max(1), float(np.quantile(known.max(1), 0.1)), accuracy)
