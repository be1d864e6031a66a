"""intervals: how far a number may be from what endless images would give; 90 % unless said otherwise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval of the given confidence, and what it comes from; `per_packet` (2, P) has one for each."""

    low: float
    high: float
    per_packet: np.ndarray
    confidence: float
    resamples: int
    seed: int
    count: int


def draws(count: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each of `count` images is in every set resampled with replacement, (resamples, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def resampled(
    per_image: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda means: means,
    *,
    resamples: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap percentile interval (2, ...) of a statistic of the mean over images of `per_image` (N, ...).

    `statistic` maps means (resamples, ...) of resampled sets to values (resamples, ...).
    """
    count = len(per_image)
    means = (draws(count, resamples, seed) / count) @ per_image.reshape(count, -1)
    values = statistic(means.reshape(resamples, *per_image.shape[1:]))
    return np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


def about(value: np.ndarray | float, drawn: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Percentile interval (2, ...) of a distance, of its values (R, ...) on resampled sets less their mean.

    The duplicates in a resampled set add to a distance's upward bias, which is no part of its uncertainty.
    """
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    return np.maximum(0.0, value + np.quantile(drawn - np.mean(drawn, 0), tails, axis=0))


def share(hits: int, count: int) -> tuple[float, float, float]:
    """hits / count, and its interval (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(int(hits), count).proportion_ci(0.9, "wilson")
    return hits / count, float(interval.low), float(interval.high)


def band(values: np.ndarray, confidence: float = 0.9) -> float:
    """How far the share of values (N,) under any limit may be from that of endless values, all limits at once.

    Dvoretzky, Kiefer and Wolfowitz 1956, with the constant of Massart 1990: of any distribution.
    """
    return float(np.sqrt(np.log(2 / (1 - confidence)) / (2 * len(values))))


def median(values: np.ndarray) -> tuple[float, float, float]:
    """The median (N,) and its interval, between two order statistics: of any distribution.

    Of fewer than 8 values it is their range, whose confidence is 1 - 2^(1 - N): under 90 % for fewer than 5.
    """
    from scipy.stats import binom

    ends = (binom.ppf([0.05, 0.95], len(values), 0.5).astype(int) - [1, 0]).clip(0, len(values) - 1)
    return float(np.median(values)), *np.sort(values)[ends].tolist()
