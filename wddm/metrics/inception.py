"""Inception: FID, KID, Inception score, precision and recall, as torch-fidelity computes them.

Here the features are extracted once for all of them, and every number gets its interval. Images are uint8
(N, H, W, 1 or 3).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from wddm.metrics.frechet import factor
from wddm.metrics.intervals import Estimate, distance_estimate, resample_counts, share

LAYERS = ("2048", "logits_unbiased")
BATCH = 64  # torch-fidelity's own: features round differently in batches of another size
SUBSET, SPLITS = 1000, 10  # images in a subset of KID, parts of IS; its own too, as are 100 subsets and seed 2020
NORMAL90 = 1.6449  # half a 90 % interval of a Gaussian, in standard deviations
Features = dict[str, np.ndarray]


def find_weights(path: str | Path | None = None) -> Path | None:
    """The file given, or the one that torch-fidelity has downloaded, or None.

    Raises:
        ValueError: the file given is not there, or not Inception's.
    """
    if path is None:
        return found if (found := _source()[1]).is_file() else None
    got, wanted = f"got inception_weights={str(path)!r}", f"wanted torch-fidelity's: {remedy()}"
    try:
        names = torch.load(path, weights_only=True, mmap=True).keys()  # torch-fidelity itself would unpickle anything
    except Exception as error:
        raise ValueError(f"{got} ({' '.join(str(error).split())[:100]}), {wanted}") from None
    if not {"Conv2d_1a_3x3.conv.weight", "fc.bias"} <= set(names):
        raise ValueError(f"{got} of another network, {wanted}")
    return Path(path)


def remedy() -> str:
    """The one command that gets the weights."""
    (url, place), home = _source(), Path.home()
    return f"curl -L --create-dirs -o {'~' / place.relative_to(home) if place.is_relative_to(home) else place} {url}"


def build(weights: Path, device: str | torch.device = "cpu") -> torch.nn.Module:
    """torch-fidelity's network with these weights."""
    from torch_fidelity.utils import create_feature_extractor

    options = {"cuda": False, "feature_extractor_weights_path": str(weights), "verbose": False}
    return create_feature_extractor("inception-v3-compat", list(LAYERS), **options).to(device)


def features(
    images: np.ndarray, network: torch.nn.Module, progress: Callable[[range], Iterable[int]] = lambda batches: batches
) -> Features:
    """float32 "2048" (N, 2048) and "logits_unbiased" (N, 1008)."""
    device, found = next(network.parameters()).device, []
    for start in progress(range(0, len(images), BATCH)):
        batch = torch.from_numpy(np.array(images[start : start + BATCH])).permute(0, 3, 1, 2)  # (B, C, H, W)
        with torch.no_grad():
            found.append([output.cpu() for output in network(batch.expand(-1, 3, -1, -1).to(device))])
    return {name: torch.cat(parts).numpy() for name, *parts in zip(LAYERS, *found, strict=True)}


def scores(generated: Features, real: Features, *, resamples: int = 20, seed: int = 0) -> dict[str, Estimate[float]]:
    """fid, kid, inception_score, precision and recall with their intervals.

    FID: `fid_interval`. KID: where 90 % of the subsets lie. IS: the standard error over its parts. Precision and
    recall, of `generated` and `real` images in the other set's balls of 3 neighbours: binomial (Wilson), with the
    balls held fixed.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    pools = [torch.from_numpy(side["2048"]) for side in (generated, real)]
    found = fid_statistics_to_metric(*map(fid_features_to_statistics, pools), False)
    found |= kid_features_to_metric(*pools, kid_subset_size=min(SUBSET, *map(len, pools)), verbose=False)
    found |= isc_features_to_metric(torch.from_numpy(generated["logits_unbiased"]), splits=SPLITS)
    found |= prc_features_to_metric(*pools, save_cpu_ram=True, prc_batch_size=2000, verbose=False)
    fid = found["frechet_inception_distance"]
    estimates = {"fid": fid_interval(fid, generated, real, resamples=resamples, seed=seed)}
    for key, name, parts in (("kid", "kernel_inception_distance", 1), ("inception_score", "inception_score", SPLITS)):
        mean, half = found[f"{name}_mean"], NORMAL90 * found[f"{name}_std"] / parts**0.5
        estimates[key] = Estimate(mean, mean - half, mean + half)
    for key, pool in zip(("precision", "recall"), pools, strict=True):
        estimates[key] = share(round(found[key] * len(pool)), len(pool))._replace(value=found[key])
    return estimates


def fid_interval(
    fid: float, generated: Features, real: Features, *, resamples: int = 20, seed: int = 0
) -> Estimate[float]:
    """A FID with its bootstrap interval; the real images are held fixed.

    Features are multiplied once by a factor of the real covariance, so that a resampled set costs the eigenvalues of
    one symmetric matrix.
    """
    reference = real["2048"].astype(np.float64)
    centre, root = reference.mean(0), factor(torch.from_numpy(np.cov(reference.T))).numpy()
    x = generated["2048"] - centre  # (N, 2048), float64
    count, turned, distances = len(x), x @ root, []
    for weights in resample_counts(count, resamples, seed):
        mean = weights @ x / count
        rows = (turned - mean @ root) * np.sqrt(weights / (count - 1))[:, None]
        products = rows.T @ rows if count > rows.shape[1] else rows @ rows.T  # the same eigenvalues
        cross = np.sqrt(np.linalg.eigvalsh(products).clip(0)).sum()
        variance = (weights @ (x - mean) ** 2).sum() / (count - 1)
        distances.append(mean @ mean + variance - 2 * cross)  # the trace of the real covariance is left out
    return distance_estimate(fid, np.array(distances))


def _source() -> tuple[str, Path]:
    """Where torch-fidelity downloads its weights from, and to."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    return url, Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
