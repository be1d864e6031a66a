"""Inception: FID, KID, Inception score, precision and recall by torch-fidelity, each with its interval."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wddm.metrics.frechet import factor
from wddm.metrics.intervals import Estimate, distance_estimate, resample_counts, share

POOLED, LOGITS = "2048", "logits_unbiased"  # layers: of all scores but the Inception score, and of the Inception score
SPLITS = 10  # parts of IS: torch-fidelity's own, as are 100 subsets of KID, seed 2020 and batches of 64
NORMAL90 = 1.6449  # half a 90 % interval of a Gaussian, in standard deviations
Features = dict[str, np.ndarray]
Estimates = dict[str, Estimate[float]]
Progress = Callable[[range], Iterable[int]]


def find_weights(path: str | Path | None = None) -> Path | None:
    """The weights at `path`, else those that torch-fidelity has downloaded, or None; ValueError if not Inception's."""
    if path is None:
        return found if (found := _source()[1]).is_file() else None
    got, wanted = f"got inception_weights={str(path)!r}", f"wanted torch-fidelity's: {remedy()}"
    path = Path(path).expanduser()
    try:
        names = torch.load(path, weights_only=True, mmap=True).keys()  # torch-fidelity itself would unpickle anything
    except Exception as error:
        raise ValueError(f"{got} ({' '.join(str(error).split())[:100]}), {wanted}") from None
    if not {"Conv2d_1a_3x3.conv.weight", "fc.bias"} <= set(names):
        raise ValueError(f"{got} of another network, {wanted}")
    return path


def remedy() -> str:
    """The one command that gets the weights."""
    (url, place), home = _source(), Path.home()
    return f"curl -L --create-dirs -o {'~' / place.relative_to(home) if place.is_relative_to(home) else place} {url}"


def build(weights: Path, device: str | torch.device = "cpu") -> torch.nn.Module:
    """torch-fidelity's network with these weights."""
    from torch_fidelity.utils import create_feature_extractor

    options = {"cuda": False, "feature_extractor_weights_path": str(weights), "verbose": False}
    return create_feature_extractor("inception-v3-compat", [POOLED, LOGITS], **options).to(device)


def features(images: np.ndarray, network: Any, progress: Progress = iter, batch: int = 64) -> Features:
    """Features float32 (N, d), by name, of images uint8 (N, H, W, 1 or 3) by a feature extractor of torch-fidelity."""
    device, found = next(network.parameters()).device, []
    for start in progress(range(0, len(images), batch)):
        x = torch.from_numpy(np.array(images[start : start + batch])).permute(0, 3, 1, 2)  # (B, C, H, W)
        with torch.no_grad():
            found.append([output.cpu() for output in network(x.expand(-1, 3, -1, -1).to(device))])
    return {name: torch.cat(parts).numpy() for name, *parts in zip(network.features_list, *found, strict=True)}


def scores(generated: Features, real: Features, *, resamples: int = 20, seed: int = 0) -> Estimates:
    """By key: fid (`fid_interval`), inception_score (interval: standard error over its parts), and `by_kernel`'s."""
    from torch_fidelity import metric_fid, metric_isc

    sides = [metric_fid.fid_features_to_statistics(torch.from_numpy(side[POOLED])) for side in (generated, real)]
    fid = metric_fid.fid_statistics_to_metric(*sides, False)["frechet_inception_distance"]
    mean, spread = metric_isc.isc_features_to_metric(torch.from_numpy(generated[LOGITS]), splits=SPLITS).values()
    half = 1.833 * spread / (SPLITS - 1) ** 0.5  # Student's t of 9 degrees of freedom
    found = {"fid": fid_interval(fid, generated, real, resamples, seed)}
    found["inception_score"] = Estimate(mean, mean - half, mean + half)
    return found | by_kernel(generated[POOLED], real[POOLED])


def by_kernel(generated: np.ndarray, real: np.ndarray, subset_size: int = 1000, end: str = "") -> Estimates:
    """KID, precision and recall of features (N, d) and (M, d), 10 or more of each; `end` is appended to their keys.

    KID is the mean over 100 random subsets of `subset_size` images, at most half of the smaller set, so that the spread
    over subsets tells its error (the jackknife of Shao & Wu 1989). Precision (recall): the share of generated (real)
    images within the 3rd neighbour's distance of an image of the other set; its interval (Wilson) holds that set fixed.
    """
    from torch_fidelity import metric_kid, metric_prc

    if (smaller := min(len(generated), len(real))) < 10:
        raise ValueError(f"got {len(generated)} images and {len(real)} real ones, wanted 10 or more of each: give more")
    pools, size = [torch.from_numpy(side) for side in (generated, real)], min(subset_size, smaller // 2)
    mean, spread = metric_kid.kid_features_to_metric(*pools, kid_subset_size=size, verbose=False).values()
    half = NORMAL90 * spread * (size / (smaller - size) + 1 / 100) ** 0.5  # as if the smaller set had all the variance
    found = metric_prc.prc_features_to_metric(*pools, save_cpu_ram=True, prc_batch_size=2000, verbose=False)
    estimates = {f"kid{end}": Estimate(mean, mean - half, mean + half)}
    for key, pool in zip(("precision", "recall"), pools, strict=True):
        estimates[key + end] = share(round(found[key] * len(pool)), len(pool))._replace(value=found[key])
    return estimates


def fid_interval(fid: float, generated: Features, real: Features, resamples: int, seed: int = 0) -> Estimate[float]:
    """A FID with its bootstrap interval, the real images held fixed: one eigenvalue problem per resample."""
    reference = real[POOLED].astype(np.float64)
    centre, root = reference.mean(0), factor(torch.from_numpy(np.cov(reference.T))).numpy()
    x = generated[POOLED] - centre  # (N, 2048), float64
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
