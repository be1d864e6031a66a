"""scores: numbers for a set of images against a prepared one, and what they were computed from.

A `Score` carries value, interval, floor, counts and protocol. What depends on the reference alone is kept in
`statistics/` of its folder, under the sha256 of its images. Under `accelerate launch` every process calls these
functions with the same arguments, does its share, and has the result.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wddm import metrics
from wddm.data import Dataset
from wddm.files import sha256, whole
from wddm.intervals import median, share
from wddm.metrics import diagnostics, features, inception
from wddm.metrics.moments import Moments

RESAMPLES = 20
INCEPTION = {  # key of metrics.json -> name, whether more is better
    "fid": "FID", "kid": "KID", "inception_score": "Inception score", "precision": "precision", "recall": "recall",
}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One number of a report: `value` None where it was not computed, and `protocol` then says why.

    `low` and `high` are the ends of a 90 % interval. `floor` is what real images score in the place of generated
    ones, as many as there are, but at most half of the set, against all the others; (value, low, high), computed as
    the score is. `count` and `count_real`: how many images were compared.
    """

    key: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    floor: tuple[float, float, float] | None
    count: int
    count_real: int
    protocol: str
    detail: Any = None

    def row(self) -> dict[str, Any]:
        """For a table."""
        interval = "" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        floor = "{:.3g} ({:.3g} to {:.3g})".format(*self.floor) if self.floor else ""
        return {
            "metric": self.name, "value": self.value, "90 % interval": interval, "floor": floor,
            "images": self.count, "real": self.count_real, "how": self.protocol,
        }  # fmt: skip

    def record(self) -> dict[str, float | None]:
        """For metrics.json: nothing where nothing was computed."""
        parts = {"": self.value, "_low": self.low, "_high": self.high}
        parts |= dict(zip(("_floor", "_floor_low", "_floor_high"), self.floor or (), strict=False))
        return {self.key + part: value for part, value in parts.items() if value is not None}


def caveat(samples: Sequence) -> str:
    """What must be said beside numbers of so many images."""
    few = "Fewer than 10,000 images: compares only within this workbook, and only at this number. "
    return few * (len(samples) < 10_000)


def fairness(samples: Sequence, reference: Dataset) -> str:
    """How many images scores and floors compare, and what a perfect model would score by the bias of distances."""
    n, total = len(samples), len(reference.images)
    half = min(n, total // 2)
    expected, others = (1 / n + 1 / total) / (1 / half + 1 / (total - half)), total - half
    return (
        f"Scores: {n:,} samples against {total:,} real images; floors: {half:,} real images against the {others:,} "
        f"others, so that FWD and FD of a perfect model would be about {expected:.2f} times their floor."
    )


def kept(reference: Dataset, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` returns, from `statistics/` of the reference if it is there; written there if that is allowed."""
    path = statistics(reference) / f"{reference.manifest['sha256']['images'][:16]}-{name}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return dict(arrays)
    made = make()
    with suppress(OSError), whole(path) as aside:
        np.savez(aside, **made)
    return made


def wavelet(samples: np.ndarray, reference: Dataset, level: int = 3, *, seed: int = 0, **how) -> Score:
    """FWD with its interval and floor; `detail` is the `metrics.Frechet` with all packets."""
    name = f"fwd-level{level}"
    real = Moments(**kept(reference, name, lambda: metrics.packet_moments(reference.images, level, **how).state()))
    options = {"resamples": RESAMPLES, "seed": seed, **how}
    found = metrics.frechet_wavelet_distance(real, samples, level, **options)
    return _frechet_score("fwd", f"FWD, level {level}", found, reference, name, options, level=level)


def classifier(samples: np.ndarray, reference: Dataset, *, seed: int = 0, **how) -> Score:
    """Frechet distance in the features of a small classifier of the reference, trained once; `detail`: the network."""
    known_as = f"{reference.manifest['dataset']}-{reference.manifest['resolution']}-classifier"
    key, name = f"fd_{known_as.replace('-', '_')}", f"FD, {known_as} (not FID)"
    if reference.labels is None:
        return _none(key, name, samples, reference, "the reference has no labels to train a classifier on")
    network = _network(reference, seed, how.get("processes"))
    extractor, stem = network.to(how.get("device", "cpu")), f"{known_as}-{network.key}"
    try:
        make = lambda: metrics.feature_moments(reference.images, extractor, **how).state()  # noqa: E731
        options = {"resamples": RESAMPLES, "seed": seed, **how}
        real = Moments(**kept(reference, stem, make))
        found = metrics.frechet_feature_distance(real, samples, extractor, **options)
    except ValueError as error:  # too few images
        return _none(key, name, samples, reference, str(error))
    score = _frechet_score(key, name, found, reference, stem, options, feature_extractor=extractor)
    judged = f"right on {network.accuracy:.1%} of {network.held_out:,} held-out images"
    return replace(score, protocol=f"{score.protocol}; classifier {judged}", detail=network)


def by_inception(
    samples: np.ndarray,
    reference: Dataset,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
    device: str | torch.device = "cpu",
    processes: Any = None,
    **_: Any,
) -> list[Score]:
    """FID, KID, Inception score, precision and recall; one score without a value where there are no weights."""
    path = inception.find_weights(weights)
    if path is None:
        names = "FID, KID, IS, precision, recall"
        return [_none("fid", names, samples, reference, "no Inception weights")]
    network, bootstrap = inception.build(path, device), {"resamples": RESAMPLES, "seed": seed}
    stem = f"inception-{network.key[:16]}"
    extract = lambda images: inception.features(images, network, processes=processes, progress=progress)  # noqa: E731
    real, generated = kept(reference, stem, lambda: extract(reference.images)), extract(samples)
    found = inception.scores(generated, real, **bootstrap)

    def apart(count: int) -> dict[str, tuple]:
        parts = metrics.split(len(reference.images), count, seed)
        return inception.scores(*({name: real[name][rows] for name in real} for rows in parts), **bootstrap)

    floor = _floor(reference, stem, len(samples), seed, apart)
    how = f"torch-fidelity, weights {network.key[:8]}, {RESAMPLES} resamples, seed {seed}"
    counts = (len(samples), len(reference.images))
    return [Score(key, INCEPTION[key], *found[key], floor.get(key), *counts, how) for key in INCEPTION]


def copies(samples: np.ndarray, reference: Dataset, *, seed: int = 0, most: int = 256, **_: Any) -> list[Score]:
    """Whether samples are training images: distance to the nearest, share nearer than real ones, share memorised.

    Of the first `most` samples, and as many real images and the nearest of the others to each. `detail` of the first
    score: rows and distances (n, 3) of the samples' neighbours, distances (m, 2) of the real images'.
    """
    real, drawn = reference.images, min(most, len(reference.images))
    rows, distances = diagnostics.nearest_neighbours(samples[:most], real, k=3)
    chosen = np.sort(np.random.default_rng(seed).choice(len(real), drawn, replace=False))
    apart = diagnostics.nearest_neighbours(real[chosen], real, k=3)[1][:, 1:]  # the nearest is the image itself
    limit = np.quantile(apart[:, 0], 0.01)
    counts, how = (len(distances), len(real)), f"seed {seed}"
    detail = {"rows": rows, "distances": distances, "apart": apart}
    middle, name = median(distances[:, 0]), "median distance to the nearest real image"
    found = [Score("nearest_distance", name, *middle, median(apart[:, 0]), *counts, how, detail)]
    for key, name, of_samples, of_real in (
        ("copies_share", "share nearer to one than 99 % of those are", distances[:, 0] < limit, apart[:, 0] < limit),
        ("memorised_share", "share memorised", diagnostics.memorised(distances), diagnostics.memorised(apart)),
    ):
        values, floor = (share(hits.sum(), len(hits)) for hits in (of_samples, of_real))
        found.append(Score(key, name, *values, floor, *counts, how))
    return found


def statistics(reference: Dataset) -> Path:
    """Where what depends on the reference alone is kept."""
    return reference.folder / "statistics"


def _network(reference: Dataset, seed: int, processes: Any) -> features.FeatureNet:
    """The reference's classifier, trained by the first process and read by the others."""
    path = statistics(reference) / f"{reference.manifest['sha256']['images'][:16]}-classifier-{seed}.safetensors"
    if not path.is_file() and (processes is None or processes.is_main_process):
        features.save(features.fit_features(reference.images, reference.labels, seed), path)
    if processes:
        processes.wait_for_everyone()
    network = features.load(path)
    network.key = sha256(path)[:8]
    return network


def _frechet_score(
    key: str, name: str, found: metrics.Frechet, reference: Dataset, stem: str, options: dict, **of: Any
) -> Score:
    """The score of a Frechet distance, with its floor from a split of the reference."""

    def apart(count: int) -> dict[str, tuple]:
        half = metrics.split_floor(reference.images, count=count, **of, **options)
        return {"distance": (half.value, half.interval.low, half.interval.high)}

    floor = _floor(reference, stem, found.count_generated, options["seed"], apart)
    ends, how = (found.interval.low, found.interval.high), f"{RESAMPLES} resamples, seed {options['seed']}"
    counts = found.count_generated, found.count_real
    return Score(key, name, found.value, *ends, floor.get("distance"), *counts, how, found)


def _floor(
    reference: Dataset, stem: str, count: int, seed: int, apart: Callable[[int], dict[str, tuple]]
) -> dict[str, tuple[float, float, float]]:
    """What `apart` finds, with ends, between `count` real images, half of them at most, and the others; kept."""
    count = min(len(reference.images) // 2, count)
    name = f"{stem}-split-{count}-{seed}-{RESAMPLES}"
    try:
        found = kept(reference, name, lambda: {key: np.array(ends) for key, ends in apart(count).items()})
    except ValueError:  # too few images to be split
        return {}
    return {key: tuple(ends.tolist()) for key, ends in found.items()}


def _none(key: str, name: str, samples: np.ndarray, reference: Dataset, why: str) -> Score:
    return Score(key, name, None, None, None, None, len(samples), len(reference.images), f"not computed: {why}")
