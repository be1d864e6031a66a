"""moments: streaming means and covariances in float64, and the Frechet distance of two Gaussians that have them."""

from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


class Moments:
    """Streaming mean (..., d) and unbiased covariance (..., d, d) of vectors, in float64 on the device they are on.

    Leading dimensions are independent populations of the same number of vectors. Batches are merged by the
    update of Chan et al. (1983), which does not cancel where the mean is large.

    >>> moments = Moments().update(np.zeros((5, 3))).update(np.ones((7, 3)))
    >>> moments.count, moments.mean.shape, moments.covariance.shape
    (12, (3,), (3, 3))
    """

    def __init__(self, count: int = 0, mean: Any = 0.0, scatter: Any = 0.0) -> None:
        self.count, self._mean, self._scatter = int(count), torch.as_tensor(mean), torch.as_tensor(scatter)

    def update(self, vectors: np.ndarray | Tensor, weights: np.ndarray | None = None) -> "Moments":
        """Add vectors (..., n, d), every one `weights` (n,) times if given (whole numbers)."""
        x = torch.as_tensor(vectors).detach().double()
        repeats = torch.ones(x.shape[-2]) if weights is None else torch.as_tensor(weights)
        repeats, count = repeats.to(x)[:, None], int(repeats.sum())  # (n, 1)
        if count:
            mean = (x * repeats).sum(-2) / count
            if not mean.isfinite().all():
                raise ValueError(f"got vectors {tuple(x.shape)} with NaN or infinity, wanted numbers: look before this")
            self._add(count, mean, (x - mean[..., None, :]) * repeats.sqrt())
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Add what another one has seen."""
        if other.count:
            mean = other._mean.to(self._mean.device) if self.count else other._mean
            self._add(other.count, mean, mean[..., None, :][..., :0, :])
            self._scatter += other._scatter.to(mean.device)
        return self

    def _add(self, count: int, mean: Tensor, centred: Tensor) -> None:
        """Add `count` vectors with this mean (..., d), given less the mean (..., n, d); in place, for memory."""
        if not self.count:
            self._mean, self._scatter = torch.zeros_like(mean), mean.new_zeros(*mean.shape, mean.shape[-1])
        total, shift = self.count + count, mean - self._mean
        rows = torch.cat([centred, shift[..., None, :] * (self.count * count / total) ** 0.5], -2)
        rows = rows.reshape(-1, *rows.shape[-2:])  # (P, n + 1, d)
        self._scatter.view(-1, *self._scatter.shape[-2:]).baddbmm_(rows.mT, rows)
        self._mean, self.count = self._mean + shift * (count / total), total

    def __getitem__(self, part: slice | int) -> "Moments":
        """Of some of the populations, or one; the memory is shared."""
        return Moments(self.count, self._mean[part], self._scatter[part])

    def distances(self, other: "Moments") -> np.ndarray:
        """Frechet distance (P,) of each of P populations to that of the other; one at a time, for memory."""
        pairs = ((self[p], other[p]) for p in range(len(self._mean)))
        return np.array([frechet_distance(a.mean, a.covariance, b.mean, b.covariance) for a, b in pairs])

    def state(self) -> dict[str, np.ndarray]:
        """What `Moments(**state)` takes."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self._scatter.cpu().numpy()}

    @property
    def mean(self) -> np.ndarray:
        return self._mean.cpu().numpy()

    @property
    def covariance(self) -> np.ndarray:
        if self.count < 2:
            raise ValueError(f"got {self.count} vectors, wanted 2 or more for a covariance: give more")
        return self._scatter.cpu().numpy() / (self.count - 1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float | np.ndarray:
    """Squared Frechet distance of Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    The last trace is the sum of the singular values of F1' F2 for any F F' = C: real, symmetric in its arguments,
    and without the square roots of rounding errors that singular covariances give otherwise. Means (..., d),
    covariances (..., d, d); an array if there are leading dimensions (Dowson & Landau 1982).
    """
    mean1, cov1, mean2, cov2 = (np.asarray(v, np.float64) for v in (mean1, cov1, mean2, cov2))
    if mean1.shape != mean2.shape or not cov1.shape == cov2.shape == (*mean1.shape, mean1.shape[-1]):
        shapes = ", ".join(str(v.shape) for v in (mean1, cov1, mean2, cov2))
        raise ValueError(f"got shapes {shapes}, wanted (..., d), (..., d, d) twice: compare vectors of equal size")
    if mean1.ndim > 1:
        return np.array([frechet_distance(*one) for one in zip(mean1, cov1, mean2, cov2, strict=True)])
    with _libraries().limit(limits=1, user_api="blas"):  # threads make it up to 20-fold slower
        cross = np.linalg.svd(factor(cov1).T @ factor(cov2), compute_uv=False).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


@cache
def _libraries() -> ThreadpoolController:
    """Of linear algebra; to look for them takes longer than a small matrix."""
    return ThreadpoolController()


def factor(matrix: np.ndarray) -> np.ndarray:
    """F (d, d) with F F' = the positive semi-definite matrix (d, d)."""
    try:
        return np.linalg.cholesky(matrix)  # a tenth of the time
    except np.linalg.LinAlgError:  # singular
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0))
