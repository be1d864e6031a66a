"""90 % intervals: how far a number may be from what infinitely many images would give."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Value = TypeVar("Value", float, np.ndarray)
ENDS = (0.05, 0.95)  # the quantiles at which an interval begins and ends


class Estimate(NamedTuple, Generic[Value]):
    """A number, or an array of numbers, and the ends of its 90 % interval; these are nan where none was computed."""

    value: Value
    low: Value
    high: Value


def resample_counts(count: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Bootstrap counts (resamples, count): how often each of `count` images is in each set drawn with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def resampled(
    per_image: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] | None = None, *, seed: int = 0
) -> Estimate[np.ndarray]:
    """The mean of `per_image` (N, ...), or a statistic of R such means, with its interval from 200 resampled sets."""
    count = len(per_image)
    weights = np.concatenate([np.ones((1, count)), resample_counts(count, 200, seed)]) / count
    means = (weights @ per_image.reshape(count, -1)).reshape(-1, *per_image.shape[1:])
    value, *drawn = statistic(means) if statistic else means
    return Estimate(value, *np.quantile(drawn, ENDS, axis=0))


def distance_estimate(value: Value, drawn: np.ndarray) -> Estimate[Value]:
    """A distance with its percentile interval, from its values `drawn` (R, ...) on R resampled sets, if there are any.

    Their mean is subtracted, as duplicates make all of them larger. Weibull's quantiles: numpy's cover 81 % at R = 20.
    """
    if not len(drawn):
        return Estimate(value, np.nan * value, np.nan * value)
    return Estimate(value, *np.maximum(0.0, value + np.quantile(drawn - drawn.mean(0), ENDS, axis=0, method="weibull")))


def share(hits: int, count: int) -> Estimate[float]:
    """hits / count with its interval (Wilson 1927)."""
    from scipy.stats import binomtest

    return Estimate(float(hits / count), *binomtest(int(hits), count).proportion_ci(ENDS[1] - ENDS[0], "wilson"))


def median(values: np.ndarray) -> Estimate[float]:
    """The median of values (N,), its interval between two order statistics; their range for fewer than 8 values."""
    from scipy.stats import binom

    ends = (binom.ppf(ENDS, len(values), 0.5).astype(int) - [1, 0]).clip(0, len(values) - 1)
    return Estimate(float(np.median(values)), *np.sort(values)[ends].tolist())


def band(values: np.ndarray, confidence: float = 0.9) -> float:
    """Half the width of the confidence band of the whole distribution function of values (N,) (Massart 1990)."""
    return float(np.sqrt(np.log(2 / (1 - confidence)) / (2 * len(values))))
