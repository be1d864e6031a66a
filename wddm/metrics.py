"""metrics: distances between sets of images, streamed in float64.

Images are uint8 (N, H, W, C), a memory map for instance, or float (N, C, H, W) in [0, 1] everywhere. The
Frechet wavelet distance (FWD, arXiv 2312.15289) needs no network weights. Spectra, nearest neighbours and the
class judge are in `diagnostics.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from wddm.diagnostics import Images, packets


class Moments:
    """Streaming mean (..., d) and unbiased covariance (..., d, d) of vectors, in float64.

    Leading dimensions are independent populations of the same number of vectors. Batches are merged by the
    update of Chan et al. (1983), which does not cancel where the mean is large.

    >>> moments = Moments().update(np.zeros((5, 3))).update(np.ones((7, 3)))
    >>> moments.count, moments.mean.shape, moments.covariance.shape
    (12, (3,), (3, 3))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = 0.0

    def update(self, vectors: np.ndarray | Tensor, weights: np.ndarray | None = None) -> "Moments":
        """Add vectors (..., n, d), every one `weights` (n,) times if given (whole numbers)."""
        x = torch.as_tensor(vectors).detach().cpu().double()
        if not x.isfinite().all():
            raise ValueError(f"got vectors {tuple(x.shape)} with NaN or infinity, wanted numbers: look before this")
        repeats = torch.ones(x.shape[-2]) if weights is None else torch.as_tensor(weights)
        repeats = repeats.double()[:, None]  # (n, 1)
        batch = Moments()
        batch.count = int(repeats.sum())
        if batch.count:
            mean = (x * repeats).sum(-2) / batch.count
            centred = (x - mean[..., None, :]) * repeats.sqrt()
            batch.mean, batch.scatter = mean.numpy(), (centred.mT @ centred).numpy()
        return self.merge(batch)

    def merge(self, other: "Moments") -> "Moments":
        """Add what another one has seen."""
        if other.count:
            count, difference = self.count + other.count, other.mean - self.mean
            outer = difference[..., :, None] * difference[..., None, :]
            self.scatter = self.scatter + other.scatter + outer * (self.count * other.count / count)
            self.mean = self.mean + difference * (other.count / count)
            self.count = count
        return self

    @property
    def covariance(self) -> np.ndarray:
        if self.count < 2:
            raise ValueError(f"got {self.count} vectors, wanted 2 or more for a covariance: give more")
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class FrechetWavelet:
    """FWD: `value` is the mean of `per_packet` (4^L,), in the channel order of `WaveletCodec`."""

    value: float
    per_packet: np.ndarray
    level: int
    count_real: int
    count_generated: int


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval of the given confidence, and what it comes from."""

    low: float
    high: float
    confidence: float
    resamples: int
    seed: int
    count: int


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float | np.ndarray:
    """Squared Frechet distance of Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    The last trace is the sum of the singular values of C1^1/2 C2^1/2: real, symmetric in its arguments, and
    without the square roots of rounding errors that singular covariances give otherwise. Means (..., d),
    covariances (..., d, d); an array if there are leading dimensions (Dowson & Landau 1982).
    """
    mean1, cov1, mean2, cov2 = (np.asarray(v, np.float64) for v in (mean1, cov1, mean2, cov2))
    if mean1.shape != mean2.shape or not cov1.shape == cov2.shape == (*mean1.shape, mean1.shape[-1]):
        shapes = ", ".join(str(v.shape) for v in (mean1, cov1, mean2, cov2))
        raise ValueError(f"got shapes {shapes}, wanted (..., d), (..., d, d) twice: compare vectors of equal size")
    with threadpool_limits(1, "blas"):  # many small matrices: threads make it slower, 20-fold on a busy machine
        cross = np.linalg.svd(_square_root(cov1) @ _square_root(cov2), compute_uv=False).sum(-1)
    traces = np.trace(cov1, axis1=-2, axis2=-1) + np.trace(cov2, axis1=-2, axis2=-1)
    distance = np.square(mean1 - mean2).sum(-1) + traces - 2 * cross
    return float(distance) if distance.ndim == 0 else distance


def packet_moments(images: Images, level: int = 3, *, batch_size: int = 512, rows: np.ndarray | None = None) -> Moments:
    """Moments (4^L, d) of the d = C H W / 4^L values of every Haar packet, of all images or the given rows.

    Raises:
        ValueError: fewer images than values, so that the covariance would be singular.
    """
    count, values = len(images) if rows is None else len(rows), int(np.prod(images.shape[1:])) // 4**level
    if count < max(values, 2):
        raise ValueError(
            f"got {count} images for packets of {values} values at level {level}, wanted {max(values, 2)} "
            "images or more: give more images, or choose a deeper level"
        )
    moments = Moments()
    for batch in packets(images, level, batch_size, rows):
        moments.update(batch.transpose(0, 1))
    return moments


def frechet_wavelet_distance(
    real: Images | Moments, generated: Images | Moments, level: int = 3, *, batch_size: int = 512
) -> FrechetWavelet:
    """Mean over the 4^L Haar packets of the Frechet distance of real and generated values (arXiv 2312.15289).

    Either may be given as its `packet_moments` of that level. The distance is biased upwards, about as 1 /
    images: compare only numbers with equal counts, and see `half_split_floor`.
    """
    moments = [
        images if isinstance(images, Moments) else packet_moments(images, level, batch_size=batch_size)
        for images in (real, generated)
    ]
    if any(len(m.mean) != 4**level for m in moments):
        raise ValueError(f"got moments of {[len(m.mean) for m in moments]} packets, wanted {4**level} (level {level})")
    m1, m2 = moments
    per_packet = frechet_distance(m1.mean, m1.covariance, m2.mean, m2.covariance)
    return FrechetWavelet(float(per_packet.mean()), per_packet, level, m1.count, m2.count)


def half_split_floor(
    real: Images, level: int = 3, *, seed: int = 0, count: int | None = None, batch_size: int = 512
) -> FrechetWavelet:
    """What perfection scores: FWD between disjoint random sets of `count` real images, by default halves."""
    count = len(real) // 2 if count is None else count
    if not 1 <= count <= len(real) // 2:
        raise ValueError(f"got count={count} of {len(real)} images, wanted 1 to {len(real) // 2}: change count")
    shuffled = np.random.default_rng(seed).permutation(len(real))
    halves = (np.sort(shuffled[:count]), np.sort(shuffled[count : 2 * count]))
    moments = (packet_moments(real, level, batch_size=batch_size, rows=rows) for rows in halves)
    return frechet_wavelet_distance(*moments, level=level)


def bootstrap_interval(
    real: Images | Moments,
    generated: Images,
    level: int = 3,
    *,
    resamples: int = 20,
    confidence: float = 0.9,
    seed: int = 0,
    batch_size: int = 512,
) -> Interval:
    """How far the FWD of this many generated images varies from draw to draw; the real images are held fixed.

    A percentile interval over sets resampled with replacement, moved to have its mean at the FWD itself: the
    duplicates in a resampled set add to the upward bias, which is no part of the uncertainty. One pass over
    the images for all resamples; memory grows with resamples x 4^L x d^2.
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"got resamples={resamples}, confidence={confidence}, wanted 2 or more, and between 0 and 1: change them"
        )
    if not isinstance(real, Moments):
        real = packet_moments(real, level, batch_size=batch_size)
    value = frechet_wavelet_distance(real, generated, level, batch_size=batch_size).value
    count, rng = len(generated), np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # (resamples, N)
    drawn, start = [Moments() for _ in weights], 0
    for batch in packets(generated, level, batch_size):
        part = slice(start, start + len(batch))
        for moments, weight in zip(drawn, weights, strict=True):
            moments.update(batch.transpose(0, 1), weight[part])
        start += len(batch)
    values = np.array([frechet_wavelet_distance(real, moments, level).value for moments in drawn])
    tail = (1 - confidence) / 2
    low, high = value + np.quantile(values - values.mean(), [tail, 1 - tail])
    return Interval(max(0.0, float(low)), float(high), confidence, resamples, seed, count)


def _square_root(matrices: np.ndarray) -> np.ndarray:
    """Symmetric square root (..., d, d) of positive semi-definite matrices."""
    values, vectors = np.linalg.eigh(matrices)
    return (vectors * np.sqrt(values.clip(0))[..., None, :]) @ vectors.swapaxes(-1, -2)
