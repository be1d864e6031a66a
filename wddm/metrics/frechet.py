"""FWD, the Frechet distance between the wavelet packets of two sets of images (arXiv 2312.15289).

Images, as `diagnostics` takes them, are cut into 4^level Haar packets of d = C H W / 4^level values each. Only means
and covariances are kept, in float64, on the `device`. `resamples` sets of generated images are drawn by `seed` for a
bootstrap interval, with the real images held fixed; with 0 of them the interval's ends are nan.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from wddm.metrics.diagnostics import Device, Images, UnitBatches, haar_packets
from wddm.metrics.intervals import Estimate, distance_estimate, resample_counts

GROUP_BYTES = 2**30  # of covariances held at a time
Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Frechet:
    """Distances of the 4^level `packets`, in the channel order of `WaveletCodec`, and their mean, `distance`."""

    distance: Estimate[float]
    packets: Estimate[np.ndarray]  # (4^level,) each

    @property
    def value(self) -> float:
        return self.distance.value

    @property
    def per_packet(self) -> np.ndarray:
        return self.packets.value


@dataclass(frozen=True)
class Moments:
    """Means and covariances, float64, of P populations (packets), each of `count` vectors of d values."""

    count: int | np.ndarray
    mean: np.ndarray  # (P, d)
    covariance: np.ndarray  # (P, d, d), unbiased


Side = Images | UnitBatches | Moments  # images, or the moments of their packets


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float | np.ndarray:
    """Squared Frechet distance of Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    The trace of the root is the sum of the singular values of F1' F2 for any F F' = C: real, symmetric, and exact for
    singular covariances (Dowson & Landau 1982). Means (..., d), covariances (..., d, d) -> (...); a float for one pair.
    """
    m1, c1, m2, c2 = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (mean1, cov1, mean2, cov2))
    if m1.shape != m2.shape or not c1.shape == c2.shape == (*m1.shape, m1.shape[-1]):
        shapes = ", ".join(str(tuple(v.shape)) for v in (m1, c1, m2, c2))
        raise ValueError(f"got shapes {shapes}, wanted (..., d), (..., d, d) twice: compare vectors of equal size")
    with threadpool_limits(1):  # more are up to ten times slower on small matrices, and round differently
        cross = np.linalg.svd((factor(c1).mT @ factor(c2)).numpy(), compute_uv=False).sum(-1)
    traces = (c1 + c2).diagonal(dim1=-2, dim2=-1).sum(-1)
    distance = ((m1 - m2).square().sum(-1) + traces).numpy() - 2 * cross
    return distance if np.ndim(distance) else float(distance)


def factor(matrix: Tensor) -> Tensor:
    """F (..., d, d) with F F' = the positive semi-definite matrix (..., d, d)."""
    found, failed = torch.linalg.cholesky_ex(matrix)  # takes a tenth of the time of eigh
    if (singular := failed > 0).any():
        values, vectors = torch.linalg.eigh(matrix[singular])
        found[singular] = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return found


def frechet_wavelet_distance(
    real: Side, generated: Side, level: int = 3, *, resamples: int = 0, seed: int = 0, device: Device = "cpu"
) -> Frechet:
    """Frechet distance between the Haar packets of real and of generated images: the mean of all 4^level, and each.

    Its upward bias goes about as 1 / images: compare only numbers of equal counts, and see `split_floor`. Time grows
    with d^3, see `packet_level`. ValueError for fewer than d images, whose covariance is singular.
    """
    sides = (real, generated)
    one, other = (s if isinstance(s, UnitBatches | Moments) else UnitBatches(s, device=device) for s in sides)
    if isinstance(other, Moments) or resamples == 1:
        raise ValueError(f"got resamples={resamples}, wanted 0, or 2 and more, of images, not of moments: change it")
    values, count = check(other, level), other.count
    images = [tuple(next(iter(side)).shape[1:]) for side in (one, other) if isinstance(side, UnitBatches)]
    if len(set(images)) > 1:
        raise ValueError(f"got images (C, H, W) of {images[0]} and {images[1]}, wanted one shape: convert some")
    weights = np.concatenate([np.ones((1, count), int), resample_counts(count, resamples, seed)])  # (1 + R, n)
    step = max(1, GROUP_BYTES // (8 * values**2 * (2 + resamples)))  # packets at a time
    found = np.empty((1 + resamples, 4**level))
    for part in (slice(start, start + step) for start in range(0, 4**level, step)):
        (m,), drawn = _moments(one, level, part), _moments(other, level, part, weights)
        found[:, part] = [frechet_distance(m.mean, m.covariance, n.mean, n.covariance) for n in drawn]
    mean = distance_estimate(float(found[0].mean()), found[1:].mean(1))  # of the images as they are, and resampled
    return Frechet(mean, distance_estimate(found[0], found[1:]))


def split_floor(
    real: Images, level: int = 3, count: int | None = None, *, resamples: int = 0, seed: int = 0, device: Device = "cpu"
) -> Frechet:
    """The distance of `count` real images chosen at random, by default half of them, to all the others.

    A perfect generator scores about (1/n + 1/N) / (1/n + 1/(N - n)) times this, with n = `count` images against all N.
    """
    check(UnitBatches(real), level)
    chosen, others = (UnitBatches(real, rows, device=device) for rows in split(len(real), count, seed))
    return frechet_wavelet_distance(others, chosen, level, resamples=resamples, seed=seed)


def split(size: int, count: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random choice of `count` rows of `size`, by default half of them, and all the others; both sorted."""
    count = size // 2 if count is None else count
    if not 1 <= count <= size // 2:
        raise ValueError(f"got count={count} of {size} images, wanted 1 to {size // 2}: change count")
    shuffled = np.random.default_rng(seed).permutation(size)
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])


def packet_level(shape: Sequence[int], level: int | None = None) -> int:
    """`level`, or by default the smallest from 2 on whose 2^level divides both sides of images (H, W, C) and that
    leaves 192 values in a packet at most, as for 32 x 32 RGB; if there is none, the largest that divides, at most 8.
    """
    dividing = [n for n in range(9) if not np.remainder(shape[:2], 2**n).any()]
    return next((n for n in dividing[2:] if np.prod(shape) <= 192 * 4**n), dividing[-1]) if level is None else level


def moments(images: Images, level: int = 3, device: Device = "cpu") -> Moments:
    """`Moments` of the 4^level packets of images; `frechet_wavelet_distance` takes them in place of the real images."""
    return _moments(UnitBatches(images, device=device), level)[0]


def accumulated(batches: Iterable[Tensor], weights: np.ndarray) -> list[Moments]:
    """R `Moments` of float64 vectors in batches (P, n, d); a row of `weights` (R, N) says how often each one counts."""
    start = 0
    for x in batches:
        if not start:  # differences from one origin are added up, so that nothing cancels where means are large
            origin, shape = x.mean(1, keepdim=True), (len(weights), len(x), x.shape[-1])
            sums, squares = x.new_zeros(shape), x.new_zeros(*shape, shape[-1])
        x, parts = x - origin, torch.as_tensor(weights[:, start : start + x.shape[1]]).to(x)
        sums += (parts @ x).transpose(0, 1)
        for each, part in zip(squares, parts, strict=True):
            each.baddbmm_((x if (part == 1).all() else x * part[:, None]).mT, x)  # in place, to save memory
        start += x.shape[1]
    found = []
    for count, first, second in zip(weights.sum(1).tolist(), sums, squares, strict=True):
        covariance = second.sub_(first[..., None] * first[..., None, :] / count).div_(count - 1)
        found.append(Moments(count, (origin[:, 0] + first / count).cpu().numpy(), covariance.cpu().numpy()))
    return found


def check(images: UnitBatches, level: int) -> int:
    """The number of values d in a packet; ValueError for anything but images, or for fewer than d of them."""
    values = haar_packets(next(iter(replace(images, batch_size=1))), level).shape[-1]
    if images.count < (minimum := max(values, 2)):
        got = f"got {images.count} images for packets of {values} values, wanted {minimum} images or more"
        raise ValueError(f"{got}: give more (num_samples), or choose a deeper level (fwd_level)")
    return values


def _moments(
    side: UnitBatches | Moments, level: int, part: slice = slice(None), weights: np.ndarray | None = None
) -> list[Moments]:
    """`Moments` of the packets in `part`, one for each row of `weights` (R, n): how often each image counts."""
    if isinstance(side, Moments):
        return [Moments(side.count, side.mean[part], side.covariance[part])]
    check(side, level)
    weights = np.ones((1, side.count)) if weights is None else weights
    batches = replace(side, batch_values=2**22)  # covariances are large: many images are added to them at once
    return accumulated((haar_packets(batch, level, part) for batch in batches), weights)
