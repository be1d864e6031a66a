"""metrics: Frechet distances between sets of images, streamed in float64.

Images are uint8 (N, H, W, C), a memory map for instance, or float (N, C, H, W) in [0, 1] everywhere. The
Frechet wavelet distance (FWD, arXiv 2312.15289) needs no network weights; `frechet_feature_distance` takes the
features of any torch module. Options of all, called `how` below:

    batch_size: images at a time, fewer where they are large.
    device: where images are transformed and moments added up.
    processes: an accelerate.PartialState; each process then takes its share of the same images, and all get the result.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wddm.intervals import Interval, about, draws
from wddm.metrics.diagnostics import Images, fitting, haar_packets, unit_batches
from wddm.metrics.moments import Moments
from wddm.metrics.moments import frechet_distance as frechet_distance

Vectors = Callable[
    [Tensor, slice], Tensor
]  # float64 images (B, C, H, W) -> a slice of populations of vectors (P, B, d)
GROUP_BYTES = 2**29  # of covariances held at a time
TOGETHER = 128  # vectors that are added to them at a time: each time they are read and written whole


@dataclass(frozen=True)
class Frechet:
    """A distance: `value` is the mean of `per_packet` (P,); of FWD, P = 4^L in the channel order of `WaveletCodec`."""

    value: float
    per_packet: np.ndarray
    count_real: int
    count_generated: int
    interval: Interval | None = None  # where resamples were asked for


def frechet_wavelet_distance(
    real: Images | Moments, generated: Images | Moments, level: int = 3, *, resamples: int = 0, seed: int = 0, **how
) -> Frechet:
    """Mean over the 4^L Haar packets of the Frechet distance of real and generated values (arXiv 2312.15289).

    The distance is biased upwards, about as 1 / images: compare only numbers with equal counts, and see
    `split_floor`. Time grows with d^3, d = C H W / 4^L: images of 256 x 256 want level 5.

    Args:
        real, generated: images, or their `packet_moments` of that level.
        resamples: sets of generated images drawn for a bootstrap interval, seeded; 0 for none.

    Raises:
        ValueError: fewer images than the d values of a packet, so that a covariance would be singular.
    """
    return _frechet(real, generated, haar_packets(level), 4**level, resamples=resamples, seed=seed, **how)


def frechet_feature_distance(
    real: Images | Moments,
    generated: Images | Moments,
    feature_extractor: Callable[[Tensor], Tensor],
    *,
    resamples: int = 0,
    seed: int = 0,
    **how,
) -> Frechet:
    """Frechet distance of features: of Inception's it is the FID, of others it is not and must not be called so.

    Args:
        real, generated: images, or their `feature_moments`.
        feature_extractor: a torch module in eval mode, float32 images (B, C, H, W) in [0, 1] -> features (B, d).
        resamples, seed: as for `frechet_wavelet_distance`.
    """
    return _frechet(real, generated, _features(feature_extractor), 1, resamples=resamples, seed=seed, **how)


def packet_moments(images: Images, level: int = 3, **how) -> Moments:
    """Moments (4^L, d) of the d = C H W / 4^L values of every Haar packet."""
    return _moments(images, haar_packets(level), **how)[0]


def feature_moments(images: Images, feature_extractor: Callable[[Tensor], Tensor], **how) -> Moments:
    """Moments (1, d) of features."""
    return _moments(images, _features(feature_extractor), **how)[0]


def split_floor(
    real: Images,
    level: int = 3,
    *,
    feature_extractor: Callable[[Tensor], Tensor] | None = None,
    count: int | None = None,
    resamples: int = 0,
    seed: int = 0,
    **how,
) -> Frechet:
    """The distance of `count` real images chosen at random, by default half of them, to all the others.

    FWD of that level, or the distance of features. The others are fewer than all real images, so that a perfect
    generator, compared with all, scores lower: by about (1/n + 1/N) / (1/n + 1/(N - n)) for n = `count` of N.
    """
    chosen, others = split(len(real), count, seed)
    vectors = _features(feature_extractor) if feature_extractor else haar_packets(level)
    populations = 1 if feature_extractor else 4**level
    options = {"real_rows": others, "rows": chosen, "resamples": resamples, "seed": seed}
    return _frechet(real, real, vectors, populations, **options, **how)


def split(size: int, count: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random choice of `count` rows of `size`, by default half of them, and all the others; both sorted."""
    count = size // 2 if count is None else count
    if not 1 <= count <= size // 2:
        raise ValueError(f"got count={count} of {size} images, wanted 1 to {size // 2}: change count")
    shuffled = np.random.default_rng(seed).permutation(size)
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])


def _features(extractor: Callable[[Tensor], Tensor]) -> Vectors:
    def vectors(batch: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            return extractor(batch.float())[None][part]

    return vectors


def _moments(
    images: Images,
    vectors: Vectors,
    *,
    rows: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    part: slice = slice(None),
    processes: Any = None,
    **how,
) -> list[Moments]:
    """Moments of some populations of all images or the given rows, repeated by each line of `weights` (R, n)."""
    rows = np.arange(len(images)) if rows is None else rows
    values = _length(images, vectors, how)
    if len(rows) < max(values, 2):
        raise ValueError(
            f"got {len(rows)} images for vectors of {values} values, wanted {max(values, 2)} images or more: "
            "give more images, or choose a deeper level (fewer features)"
        )
    weights = np.ones((1, len(rows)), int) if weights is None else weights
    rank, size = (processes.process_index, processes.num_processes) if processes else (0, 1)
    batch = np.arange(len(rows)) // fitting(images, how.get("batch_size", 512))
    share = batch % size == rank  # whole batches: features round differently in others
    rows, weights = rows[share], weights[:, share]
    sums, start = [Moments() for _ in weights], 0
    for found in _many(vectors(batch, part) for batch in unit_batches(images, rows=rows, **how)):  # (P, B, d)
        for moments, weight in zip(sums, weights, strict=True):
            moments.update(found, weight[start : start + found.shape[1]])
        start += found.shape[1]
    return _together(sums) if size > 1 else sums


def _many(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches (P, B, d), small ones joined to TOGETHER vectors or more, or all there are."""
    held, count = [], 0
    for batch in batches:
        held, count = [*held, batch], count + batch.shape[1]
        if count >= TOGETHER:
            joined, held, count = torch.cat(held, 1) if len(held) > 1 else batch, [], 0
            yield joined
    if held:
        yield torch.cat(held, 1)


def _together(sums: list[Moments]) -> list[Moments]:
    """The moments of all processes, merged in one order."""
    from accelerate.utils import gather_object

    shares = gather_object([[moments.state() for moments in sums]])
    merged = [Moments() for _ in sums]
    for share in shares:
        for moments, state in zip(merged, share, strict=True):
            moments.merge(Moments(**state))
    return merged


def _frechet(
    real: Images | Moments,
    generated: Images | Moments,
    vectors: Vectors,
    populations: int,
    *,
    resamples: int = 0,
    confidence: float = 0.9,
    seed: int = 0,
    real_rows: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    **how,
) -> Frechet:
    """The distance of two sets, a group of populations at a time, and its interval; the real images are held fixed."""
    if resamples < 0 or resamples == 1 or not 0 < confidence < 1:
        got = f"got resamples={resamples}, confidence={confidence}"
        raise ValueError(f"{got}, wanted 0 or 2 and more, and between 0 and 1: change them")
    for moments in (real, generated):
        if isinstance(moments, Moments) and len(moments.mean) != populations:
            raise ValueError(f"got moments of {len(moments.mean)} packets, wanted {populations}: take the same level")
    count = generated.count if isinstance(generated, Moments) else len(generated if rows is None else rows)
    weights = np.concatenate([np.ones((1, count), int), draws(count, resamples, seed)])
    values = []  # of every group, (1 + resamples, packets)
    for part in _groups(real, generated, vectors, populations, resamples, **how):
        one = real[part] if isinstance(real, Moments) else _moments(real, vectors, rows=real_rows, part=part, **how)[0]
        if isinstance(generated, Moments):
            others = [generated[part]]
        else:
            others = _moments(generated, vectors, rows=rows, weights=weights, part=part, **how)
        values.append([one.distances(other) for other in others])
    per_packet, drawn = np.split(np.concatenate(values, 1), [1])  # (1, P), (resamples, P)
    value, interval = float(per_packet.mean()), None
    if resamples:
        ends = about(value, drawn.mean(1), confidence).tolist()
        interval = Interval(*ends, about(per_packet[0], drawn, confidence), confidence, resamples, seed, count)
    return Frechet(value, per_packet[0], one.count, count, interval)


def _groups(
    real: Images | Moments, generated: Images | Moments, vectors: Vectors, populations: int, resamples: int, **how
) -> list[slice]:
    """Parts of the populations whose moments fit in GROUP_BYTES."""
    given = [side for side in (real, generated) if not isinstance(side, Moments)]
    values = _length(given[0], vectors, how) if given else 1
    size = max(1, GROUP_BYTES // (8 * values**2 * (2 + resamples)))
    return [slice(start, start + size) for start in range(0, populations, size)]


def _length(images: Images, vectors: Vectors, how: dict) -> int:
    """d, the values of a vector."""
    return vectors(next(unit_batches(images, 1, device=how.get("device", "cpu"))), slice(1)).shape[-1]
