"""Frechet distances between sets of images: of wavelet packets (FWD, arXiv 2312.15289) and of a network's features.

Images are uint8 (N, H, W, C), a memory map for instance, or float (N, C, H, W) in [0, 1]. They are read in batches,
and only means and covariances are kept, in float64. What the functions share:

    vectors: what is compared, `haar_packets(level)` or `features(network)`.
    resamples, seed: how many sets of generated images are drawn for a bootstrap interval, and from which seed; the real
        images are held fixed. Without resamples the ends of the interval are nan.
    device: where images are transformed and moments are added up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from wddm.metrics.diagnostics import Device, Images, UnitBatches, Vectors, haar_packets, one_thread
from wddm.metrics.intervals import Estimate, distance_estimate, resample_counts

GROUP_BYTES = 2**29  # of covariances held at a time


@dataclass(frozen=True)
class Frechet:
    """The mean `distance` over P `packets`: 4^L for the FWD, in the channel order of `WaveletCodec`; 1 for features."""

    distance: Estimate[float]
    packets: Estimate[np.ndarray]  # (P,) each
    count_real: int
    count_generated: int

    @property
    def value(self) -> float:
        return self.distance.value

    @property
    def per_packet(self) -> np.ndarray:
        return self.packets.value


class Moments:
    """Streaming mean (..., d) and unbiased covariance (..., d, d) of vectors, in float64 on the device they are on.

    Leading dimensions are independent populations of the same number of vectors. Batches are merged by the
    update of Chan et al. (1983), which does not cancel where the mean is large.

    >>> moments = Moments().update(np.zeros((5, 3))).update(np.ones((7, 3)))
    >>> moments.count, moments.mean.shape, moments.covariance.shape
    (12, (3,), (3, 3))
    """

    def __init__(self, count: int = 0, mean: Images | float = 0.0, scatter: Images | float = 0.0) -> None:
        self.count, self._mean, self._scatter = int(count), torch.as_tensor(mean), torch.as_tensor(scatter)

    def update(self, vectors: Images, weights: np.ndarray | None = None) -> Self:
        """Add vectors (..., n, d), each of them `weights` (n,) times if given (whole numbers)."""
        x = torch.as_tensor(vectors).detach().double()
        repeats = x.new_ones(x.shape[-2]) if weights is None else torch.as_tensor(weights).to(x)
        if not (count := int(repeats.sum())):
            return self
        mean = repeats @ x / count  # (..., d)
        if not mean.isfinite().all():
            raise ValueError(f"got vectors {tuple(x.shape)} with NaN or infinity, wanted numbers: look at the images")
        if not self.count:
            self._mean, self._scatter = torch.zeros_like(mean), mean.new_zeros(*mean.shape, mean.shape[-1])
        total, shift = self.count + count, mean - self._mean
        centred = (x - mean[..., None, :]) * repeats.sqrt()[:, None]
        rows = torch.cat([centred, shift[..., None, :] * (self.count * count / total) ** 0.5], -2)
        rows = rows.reshape(-1, *rows.shape[-2:])  # (P, n + 1, d)
        self._scatter.view(-1, *self._scatter.shape[-2:]).baddbmm_(rows.mT, rows)  # in place, to save memory
        self._mean, self.count = self._mean + shift * (count / total), total
        return self

    def __getitem__(self, part: slice) -> "Moments":
        """The moments of some of the populations, as a view of these."""
        return Moments(self.count, self._mean[part], self._scatter[part])

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `Moments(**state)` is built again."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self._scatter.cpu().numpy()}

    @property
    def mean(self) -> np.ndarray:
        return self._mean.cpu().numpy()

    @property
    def covariance(self) -> np.ndarray:
        if self.count < 2:
            raise ValueError(f"got {self.count} vectors, wanted 2 or more for a covariance: give more")
        return self._scatter.cpu().numpy() / (self.count - 1)


Side = Images | UnitBatches | Moments  # of a distance: images, or the moments of their vectors


def frechet_distance(mean1: Images, cov1: Images, mean2: Images, cov2: Images) -> float | np.ndarray:
    """Squared Frechet distance of Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    The last trace is the sum of the singular values of F1' F2 for any F F' = C: real, symmetric in its arguments, and
    exact for singular covariances (Dowson & Landau 1982). Means (..., d), covariances (..., d, d) -> (...), a float if
    there are no leading dimensions.
    """
    m1, c1, m2, c2 = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (mean1, cov1, mean2, cov2))
    if m1.shape != m2.shape or not c1.shape == c2.shape == (*m1.shape, m1.shape[-1]):
        shapes = ", ".join(str(tuple(v.shape)) for v in (m1, c1, m2, c2))
        raise ValueError(f"got shapes {shapes}, wanted (..., d), (..., d, d) twice: compare vectors of equal size")
    with one_thread():
        cross = torch.linalg.svdvals(factor(c1).mT @ factor(c2)).sum(-1)
    traces = (c1 + c2).diagonal(dim1=-2, dim2=-1).sum(-1)
    distance = ((m1 - m2).square().sum(-1) + traces - 2 * cross).numpy()
    return distance if distance.ndim else float(distance)


def factor(matrix: Tensor) -> Tensor:
    """F (..., d, d) with F F' = the positive semi-definite matrix (..., d, d)."""
    found, failed = torch.linalg.cholesky_ex(matrix)  # takes a tenth of the time of eigh
    if (singular := failed > 0).any():
        values, vectors = torch.linalg.eigh(matrix[singular])
        found[singular] = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return found


def features(network: Callable[[Tensor], Tensor]) -> Vectors:
    """What a torch module in eval mode makes of float32 images (B, C, H, W) in [0, 1]: features (B, d)."""
    return lambda batch, part: torch.no_grad()(network)(batch.float())[None][part]


def moments(images: Images, vectors: Vectors, *, device: Device = "cpu") -> Moments:
    """Moments (P, d) of the vectors of images: of 4^L Haar packets of d = C H W / 4^L values, or of features, P = 1."""
    return _moments(UnitBatches(images, device=device), vectors)[0]


def frechet_wavelet_distance(
    real: Side, generated: Side, level: int = 3, *, resamples: int = 0, seed: int = 0, device: Device = "cpu"
) -> Frechet:
    """Mean over the 4^L Haar packets of the Frechet distance of real and generated values (arXiv 2312.15289).

    The distance is biased upwards, about as 1 / images: compare only numbers with equal counts, and see
    `split_floor`. Time grows with d^3, d = C H W / 4^L: images of 256 x 256 want level 5.

    Raises:
        ValueError: fewer images than the d values of a packet, so that a covariance would be singular.
    """
    return distance(real, generated, haar_packets(level), resamples=resamples, seed=seed, device=device)


def split_floor(
    real: Images, vectors: Vectors, count: int | None = None, resamples: int = 0, seed: int = 0, device: Device = "cpu"
) -> Frechet:
    """The distance of `count` real images chosen at random, by default half of them, to all the others.

    A perfect generator, compared with all N, scores lower: by about (1/n + 1/N) / (1/n + 1/(N - n)) for n = `count`.
    """
    chosen, others = (UnitBatches(real, rows, device=device) for rows in split(len(real), count, seed))
    return distance(others, chosen, vectors, resamples=resamples, seed=seed)


def split(size: int, count: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random choice of `count` rows of `size`, by default half of them, and all the others; both sorted."""
    count = size // 2 if count is None else count
    if not 1 <= count <= size // 2:
        raise ValueError(f"got count={count} of {size} images, wanted 1 to {size // 2}: change count")
    shuffled = np.random.default_rng(seed).permutation(size)
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])


def distance(
    real: Side, generated: Side, vectors: Vectors, *, resamples: int = 0, seed: int = 0, device: Device = "cpu"
) -> Frechet:
    """The mean Frechet distance over the populations of vectors.

    Of Inception's features it is the FID; of others it is not and must not be called so. Moments are taken of so many
    populations at a time that GROUP_BYTES hold them.
    """
    if resamples < 0 or resamples == 1 or (resamples and isinstance(generated, Moments)):
        raise ValueError(f"got resamples={resamples}, wanted 0, or 2 and more of images, not of moments: change it")
    one, other = (
        side if isinstance(side, UnitBatches | Moments) else UnitBatches(side, device=device)
        for side in (real, generated)
    )
    (populations, size), (wanted, _) = _shape(one, vectors), _shape(other, vectors)
    if populations != wanted:
        raise ValueError(f"got moments of {populations} packets, wanted {wanted}: take the same level")
    once = np.ones((1, other.count), int)
    weights = np.concatenate([once, resample_counts(other.count, resamples, seed)])  # (1 + R, n)
    step = max(1, GROUP_BYTES // (8 * size**2 * (2 + resamples)))
    found: list[np.ndarray] = []
    for part in (slice(start, start + step) for start in range(0, populations, step)):
        (m,), drawn = _moments(one, vectors, part), _moments(other, vectors, part, weights)
        found.append(np.array([frechet_distance(m.mean, m.covariance, n.mean, n.covariance) for n in drawn]))
    distances = np.concatenate(found, 1)  # (1 + R, P), the first row of the images as they are
    per_packet, redrawn = distances[0], distances[1:]
    mean = distance_estimate(float(per_packet.mean()), redrawn.mean(1))
    return Frechet(mean, distance_estimate(per_packet, redrawn), one.count, other.count)


def _shape(side: UnitBatches | Moments, vectors: Vectors) -> tuple[int, int]:
    """How many populations there are, and values in a vector."""
    if isinstance(side, Moments):
        return side.mean.shape[0], side.mean.shape[1]
    populations, _, size = vectors(next(iter(replace(side, batch_size=1))), slice(None)).shape
    return populations, size


def _moments(
    side: UnitBatches | Moments, vectors: Vectors, part: slice = slice(None), weights: np.ndarray | None = None
) -> list[Moments]:
    """Moments of some populations, with the images repeated as each line of `weights` (R, n) says, or once."""
    if isinstance(side, Moments):
        return [side[part]]
    weights = np.ones((1, side.count), int) if weights is None else weights
    sums, start = [Moments() for _ in weights], 0
    for batch in side:
        found = vectors(batch, part)  # (P, B, d)
        if side.count < (minimum := max(found.shape[-1], 2)):
            raise ValueError(
                f"got {side.count} images for vectors of {found.shape[-1]} values, wanted {minimum} images or more: "
                "give more images, or choose a deeper level (fewer features)"
            )
        for total, weight in zip(sums, weights, strict=True):
            total.update(found, weight[start : start + len(batch)])
        start += len(batch)
    return sums
