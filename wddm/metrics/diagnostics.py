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
MOST = 5000  # labelled real images, at most, that a classifier is fitted to and tested on


class Spectrum(NamedTuple):
    frequency: np.ndarray  # (F,), in cycles/pixel
    power: Estimate[np.ndarray]  # (F,)


class BandStatistics(NamedTuple):  # a value per Haar packet: arrays (4^L,)
    bands: list[str]
    energy: Estimate[np.ndarray]  # mean square
    std: np.ndarray
    kurtosis: Estimate[np.ndarray]  # excess: 0 for a Gaussian; nan for a band without any detail


class Verdict(NamedTuple):
    """What a classifier fitted to real images says of N generated ones, and of M real ones held out."""

    labels: np.ndarray  # (N,), predicted classes of the generated images
    class_counts: dict[int, int]  # by class, how many generated images are predicted to be of it
    confidence: np.ndarray  # (N,), probabilities of the predicted classes
    held_out: np.ndarray  # (M,), the same of the held-out real images
    threshold: float  # the 10th percentile of `held_out`: 90 % of real images pass
    accuracy: Estimate[float]  # the share of held-out images whose class is predicted right

    @property
    def classes_seen(self) -> int:
        return sum(count > 0 for count in self.class_counts.values())


@dataclass
class UnitBatches:
    """Iterates over images, or those in `rows`, in batches (B, C, H, W) of float64 in [0, 1] on the device.

    Apple's GPUs ("mps") have no float64: the CPU takes their place. ValueError for anything but images as at the top.
    """

    images: Any  # of the kinds at the top of this module
    rows: np.ndarray | None = None
    batch_size: int = 512
    batch_values: int = 2**20  # 8 MiB of float64; larger batches wait for memory
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.images, list | tuple):
            kinds = {f"{x.mode} {x.size}" if isinstance(x, Image.Image) else type(x).__name__ for x in self.images}
            if len(kinds) != 1 or min(kinds).split()[0] not in ("L", "RGB"):
                got = ", ".join(sorted(kinds)[:3]) or "no images"
                raise ValueError(f"got a list of {got}, wanted PIL images of one size, all L or all RGB: convert them")
            self.images = np.stack([np.atleast_3d(np.asarray(image)) for image in self.images])

    @property
    def count(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        images, shape = self.images, tuple(getattr(self.images, "shape", ()))
        kind = str(getattr(images, "dtype", type(images).__name__)).removeprefix("torch.")
        last = kind == "uint8"  # channels come last
        sides = shape[1:3] if last else shape[2:]
        fits = kind in ("uint8", "float16", "bfloat16", "float32", "float64") and len(shape) == 4 and min(shape) > 0
        if not fits or min(sides) <= 4 < shape[3 if last else 1]:  # so short a side: channels
            wanted = "uint8 (N, H, W, C) or float (N, C, H, W): convert or transpose them, or give a Dataset's .images"
            raise ValueError(f"got {kind} images {shape}, wanted one or more, {wanted}")
        device = "cpu" if torch.device(self.device).type == "mps" else self.device
        size = max(1, min(self.batch_size, self.batch_values // np.prod(shape[1:])))
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            batch = images[part if self.rows is None else self.rows[part]]
            batch = (batch.detach() if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))).to(device)
            if last:
                yield batch.permute(0, 3, 1, 2).double().div_(255)
            elif batch.min() >= 0 and batch.max() <= 1:
                yield batch.double()
            else:
                ends = f"{batch.min().item():g} to {batch.max().item():g}"
                raise ValueError(f"got {batch.dtype} images from {ends}, wanted floats in [0, 1]: rescale them")


def of_each(images: Images, function: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Values (N, ...) of a function (B, C, H, W) -> (B, ...); written to one array, as parts would fragment memory."""
    batches, start, found = UnitBatches(images), 0, np.empty(0)
    for batch in batches:
        part = function(batch).numpy()
        found = found if start else np.empty((batches.count, *part.shape[1:]), part.dtype)
        found[start : (start := start + len(part))] = part
    return found


def haar_packets(batch: Tensor, level: int, part: slice = slice(None)) -> Tensor:
    """Haar packets (P, B, C H W / 4^L) of float64 images (B, C, H, W): `part` of the 4^L in `WaveletCodec`'s order."""
    codec, size = WaveletCodec("haar", level, scaling="none").to(batch), max(1, CACHED // batch[0].numel())
    packets = [codec.encode(images).unflatten(1, (4**level, -1)).flatten(2)[:, part] for images in batch.split(size)]
    return torch.cat(packets).transpose(0, 1)  # encoded some at a time, as a core's own cache is several times faster


def radial_power_spectrum(images: Images) -> Spectrum:
    """Radial power spectrum to 1/2 cycle/pixel, means removed, averaged over images; white noise has its variance."""
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
    """Energy, standard deviation and kurtosis of each Haar packet; the details of photographs are heavy-tailed."""

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
    """Images as vectors (N, d), float32 from 0 to 255; images larger than `side` x `side` are averaged to that."""

    def small(batch: Tensor) -> Tensor:
        sides = min(side, batch.shape[2]), min(side, batch.shape[3])
        return torch.nn.functional.adaptive_avg_pool2d(255 * batch, sides).float().flatten(1)

    return of_each(images, small)


def nearest_neighbours(generated: Images, real: Images, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows and RMS distances in [0, 1], (n, k), of the k real images nearest to each generated one, at most 32 x 32."""
    rows, distances = nearest(pixels(generated, 32), pixels(real, 32), k)
    return rows, distances / 255


def nearest(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and RMS distances (n, k), ascending, of the k real vectors (m, d) nearest to each generated one (n, d)."""
    from sklearn.neighbors import NearestNeighbors

    if not 1 <= k <= len(real):
        raise ValueError(f"got k={k} with {len(real)} real images, wanted 1 to {len(real)}: change k")
    rows = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(real).kneighbors(generated, return_distance=False)
    apart = [np.sqrt(((real[i] - one.astype(float)) ** 2).mean(1)) for i, one in zip(rows, generated, strict=True)]
    return rows, np.stack(apart)


def memorised(distances: np.ndarray, ratio: float = 1 / 3) -> np.ndarray:
    """Which samples (n,) are copies, by ascending `distances` (n, k >= 2): at most `ratio` times as far from one image
    as from the next (Yoon et al. 2023). A sample that equals several images is a copy, too.
    """
    if distances.ndim != 2 or distances.shape[1] < 2:
        raise ValueError(f"got distances {distances.shape}, wanted (n, 2 or more): ask for k=2 neighbours or more")
    return distances[:, 0] <= distances[:, 1] * ratio


def judge(generated: np.ndarray, real: np.ndarray, labels: np.ndarray, seed: int = 0) -> Verdict:
    """Classify generated images, vectors (N, d), by a classifier fitted to real ones (R, d) and their labels (R,).

    It is a logistic regression on 500 radial basis functions, sure only of what resembles images that it has seen. It
    is fitted to three quarters of the real images and tested on the rest; images with a negative label are left out.
    """
    from sklearn import kernel_approximation, linear_model, model_selection, pipeline

    rows = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))[:MOST]
    sizes = np.unique(labels[rows], return_counts=True)[1]
    if len(real) != len(labels) or len(sizes) < 2 or min(sizes) < 2 or len(rows) <= 4 * (len(sizes) - 1):
        got = f"got {len(real)} images and {len(labels)} labels of {len(sizes)} classes"
        wanted = "one label each of 2 classes or more, 2 images of each and 4 on average"
        raise ValueError(f"{got}, of one {min(sizes, default=0)}, wanted {wanted}: give their labels, or more images")
    fitted, held_out = model_selection.train_test_split(rows, test_size=0.25, random_state=seed, stratify=labels[rows])
    gamma = 2 / (real.shape[1] * real[fitted].var() + 1e-12)
    bases = kernel_approximation.Nystroem(gamma=gamma, n_components=min(500, len(fitted)), random_state=seed)
    model = pipeline.make_pipeline(bases, linear_model.LogisticRegression(C=10, max_iter=500))
    model.fit(real[fitted], labels[fitted])
    known, probability = (model.predict_proba(vectors) for vectors in (real[held_out], generated))
    found = model.classes_[probability.argmax(1)]
    counts = {int(name): int(np.sum(found == name)) for name in model.classes_}
    accuracy = share((model.classes_[known.argmax(1)] == labels[held_out]).sum(), len(held_out))
    return Verdict(found, counts, probability.max(1), known.max(1), float(np.quantile(known.max(1), 0.1)), accuracy)
