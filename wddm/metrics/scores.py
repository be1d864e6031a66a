"""Scores: what a set of images is worth beside a prepared one: METRICS by name, and all of them by `evaluate`.

Every metric is a function of samples (uint8, (N, H, W, C)), a reference and `Options` that returns scores, each with
its interval and its floor. A new one is a function and its entry in METRICS. What depends on the reference alone is
kept in `.statistics/` of its folder, under the sha256 of its images.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image

from wddm.data import Dataset, load
from wddm.files import sha256, whole, written_aside
from wddm.metrics import diagnostics, frechet, inception
from wddm.metrics.diagnostics import Vectors, haar_packets
from wddm.metrics.intervals import Estimate, median, share

RESAMPLES = 20
SEARCHED = 256  # samples whose nearest real images are looked for
INCEPTION = {  # key of metrics.json -> name
    "fid": "FID", "kid": "KID", "inception_score": "Inception score", "precision": "precision", "recall": "recall",
}  # fmt: skip
Estimates = dict[str, Estimate[float]]


@dataclass(frozen=True)
class Options:
    """What the metrics are told; each takes what it needs."""

    level: int = 3  # of the FWD's wavelet packets
    seed: int = 0  # of everything random
    device: diagnostics.Device = "cpu"  # where networks run and moments are added up
    inception_weights: str | Path | None = None  # torch-fidelity's file; None: where torch-fidelity downloads it to
    progress: Callable[[range], Iterable[int]] = lambda batches: batches  # wraps a range of batches, to show a bar


@dataclass(frozen=True)
class Score:
    """One number of a report: `estimate` is None where it was not computed, and `protocol` then says why.

    `floor` is what real images score in the place of generated ones, as many as there are, but at most half of the
    set, against all the others; computed as the score is. `count` and `count_real`: how many images were compared.
    """

    key: str
    name: str
    estimate: Estimate[float] | None
    floor: Estimate[float] | None
    count: int
    count_real: int
    protocol: str
    detail: Any = None

    @property
    def value(self) -> float | None:
        return self.estimate and self.estimate.value

    def row(self) -> dict[str, Any]:
        """For a table."""
        interval = "{1:.3g} to {2:.3g}".format(*self.estimate) if self.estimate else ""
        floor = "{:.3g} ({:.3g} to {:.3g})".format(*self.floor) if self.floor else ""
        return {
            "metric": self.name, "value": self.value, "90 % interval": interval, "floor": floor,
            "images": self.count, "real": self.count_real, "how": self.protocol,
        }  # fmt: skip

    def record(self) -> dict[str, float]:
        """For metrics.json: nothing where nothing was computed."""
        known = {self.key: self.estimate, f"{self.key}_floor": self.floor}
        ends = ("", "_low", "_high")
        return {key + end: v for key, found in known.items() if found for end, v in zip(ends, found, strict=True)}


def evaluate(samples: np.ndarray, reference: Dataset, options: Options = Options()) -> dict[str, list[Score]]:
    """The scores of every metric in METRICS, by its name.

    Raises:
        ValueError: images of another shape than the reference's, too few for FWD, weights that are none.
    """
    if samples.dtype != np.uint8 or samples.shape[1:] != reference.images.shape[1:]:
        raise ValueError(
            f"got {samples.dtype} images {samples.shape[1:]} and a reference of {reference.images.shape[1:]}, wanted "
            "uint8 and the same height, width and colours: give another reference, or convert the images"
        )
    inception.find_weights(options.inception_weights)  # a mistake is told before anything is computed
    return {name: metric(samples, reference, options) for name, metric in METRICS.items()}


def wavelet(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """FWD; `detail` is the `frechet.Frechet` with all packets."""
    name, stem, vectors = f"FWD, level {options.level}", f"fwd-level{options.level}", haar_packets(options.level)
    return [_distance("fwd", name, stem, vectors, samples, reference, options)]


def classifier(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """Frechet distance in the features of a small classifier of the reference; `detail` is the `frechet.Frechet`."""
    known_as = f"{reference.manifest['dataset']}-{reference.manifest['resolution']}-classifier"
    key, name = f"fd_{known_as.replace('-', '_')}", f"FD, {known_as} (not FID)"
    try:
        network = reference_classifier(reference, options.seed)
        stem = f"{known_as}-{hashlib.sha256(safetensors.torch.save(network.state_dict())).hexdigest()[:8]}"
        vectors = frechet.features(network.to(options.device))
        score = _distance(key, name, stem, vectors, samples, reference, options)
    except ValueError as error:  # no labels, or too few images
        return [Score(key, name, None, None, len(samples), len(reference.images), f"not computed: {error}")]
    judged = f"classifier right on {network.accuracy.value:.1%} of {len(network.right):,} held-out images"
    return [replace(score, protocol=f"{score.protocol}; {judged}")]


def by_inception(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """FID, KID, Inception score, precision and recall; one score without a value where there are no weights."""
    counts, path = (len(samples), len(reference.images)), inception.find_weights(options.inception_weights)
    if path is None:
        names = ", ".join(INCEPTION.values())
        return [Score("fid", names, None, None, *counts, "not computed: no Inception weights")]
    digest, network = sha256(path), inception.build(path, options.device)
    extract = partial(inception.features, network=network, progress=options.progress)
    compare = partial(inception.scores, resamples=RESAMPLES, seed=options.seed)

    def between_real(count: int) -> Estimates:
        chosen, others = frechet.split(len(reference.images), count, options.seed)
        return compare(*({name: values[rows] for name, values in real.items()} for rows in (chosen, others)))

    real = _kept(reference, f"inception-{digest[:16]}", lambda: extract(reference.images))
    found = compare(extract(samples), real)
    floors = _floors(f"inception-{digest[:16]}", between_real, samples, reference, options)
    protocol = f"torch-fidelity, weights {digest[:8]}, {_protocol(options)}"
    return [Score(key, name, found[key], floors.get(key), *counts, protocol) for key, name in INCEPTION.items()]


def copies(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """Whether samples are training images: distance to the nearest, share nearer than real ones, share memorised.

    The first SEARCHED samples are compared with all real images; as many real images, with all others, give the floor.
    `detail`: rows and distances (n, 3) of the samples' neighbours, distances (m, 2) of the real images'.
    """
    real = reference.images
    rows, distances = diagnostics.nearest_neighbours(samples[:SEARCHED], real, k=3)
    drawn = np.random.default_rng(options.seed).choice(len(real), min(SEARCHED, len(real)), replace=False)
    apart = diagnostics.nearest_neighbours(real[np.sort(drawn)], real, k=3)[1][:, 1:]  # the nearest is the image itself
    near, memorised = np.quantile(apart[:, 0], 0.01), diagnostics.memorised
    statistics: dict[str, tuple[str, Callable[[np.ndarray], Estimate[float]]]] = {
        "nearest_distance": ("median distance to the nearest real image", lambda d: median(d[:, 0])),
        "copies_share": ("share nearer to one than 99 % of those are", lambda d: share((d[:, 0] < near).sum(), len(d))),
        "memorised_share": ("share memorised", lambda d: share(memorised(d).sum(), len(d))),
    }
    counts, detail = (len(distances), len(real)), {"rows": rows, "distances": distances, "apart": apart}
    return [
        Score(key, name, estimate(distances), estimate(apart), *counts, f"seed {options.seed}", detail)
        for key, (name, estimate) in statistics.items()
    ]


METRICS: dict[str, Callable[[np.ndarray, Dataset, Options], list[Score]]] = {
    "wavelet": wavelet, "classifier": classifier, "inception": by_inception, "copies": copies,
}  # fmt: skip


def fairness(count: int, reference: Dataset) -> str:
    """What must be said beside scores of `count` samples: what they compare, and how far a perfect model is biased."""
    total, half = len(reference.images), min(count, len(reference.images) // 2)
    expected, others = (1 / count + 1 / total) / (1 / half + 1 / (total - half)), total - half
    few = "Fewer than 10,000 images: compares only within this workbook, and only at this number. "
    return few * (count < 10_000) + (
        f"Scores: {count:,} samples against {total:,} real images; floors: {half:,} real images against the {others:,} "
        f"others, so that FWD and FD of a perfect model would be about {expected:.2f} times their floor."
    )


def as_json(found: dict[str, list[Score]], images: Path, reference: Dataset) -> dict[str, Any]:
    """The scores for a file, with the images and the reference that they compare."""
    rows = []
    for score in itertools.chain(*found.values()):
        low, high = score.estimate[1:] if score.estimate else (None, None)
        row = vars(score) | {"value": score.value, "low": low, "high": high}
        rows.append({name: value for name, value in row.items() if name not in ("estimate", "detail")})
    return {
        "images": str(images),
        "reference": {"folder": str(reference.folder), "sha256": reference.sha256},
        "scores": rows,
        "versions": {name: version(name) for name in ("wddm", "torch", "torch-fidelity")},
    }


def read_images(path: Path) -> np.ndarray:
    """uint8 (N, H, W, C) of a samples.npy, or of a folder that holds one or PNGs as `wddm sample` writes them.

    Raises:
        ValueError: there are none, or they are not of one size and colour.
    """
    array = path / "samples.npy" if path.is_dir() else path
    if array.suffix == ".npy" and array.is_file():
        return np.load(array, mmap_mode="r")
    files = sorted(file for file in path.glob("*.png") if file.name != "grid.png")  # an overview by `wddm sample`
    if not files:
        raise ValueError(f"got {path}, wanted a folder of PNGs, or samples.npy: give what wddm sample wrote")
    images = [np.atleast_3d(np.asarray(Image.open(file))) for file in files]
    for file, pixels in zip(files, images, strict=True):
        if pixels.dtype != np.uint8 or pixels.shape != images[0].shape or pixels.shape[-1] not in (1, 3):
            raise ValueError(
                f"got {file} of {pixels.dtype} {pixels.shape} beside {images[0].shape}, wanted 8-bit grey or RGB "
                "images of one size: convert them"
            )
    return np.stack(images)


def find_reference(reference: str, root: Path) -> Dataset:
    """A prepared folder, or the prepared set under `root`/data that is named "digits" or "digits-16", say.

    Raises:
        ValueError: there is none of that name, or several.
    """
    if Path(reference, "manifest.json").is_file():
        return load(reference)
    folders = sorted(path.parent for path in root.glob("data/[!.]*/manifest.json"))
    named = [folder for folder in folders if f"{folder.name}-".startswith(f"{reference}-")]
    if len(named) != 1:
        have = ", ".join(folder.name for folder in named or folders) or "nothing"
        remedy = "give the name of one" if named else "run 01_prepare"
        raise ValueError(f"got reference={reference!r}, wanted a folder or one prepared set ({have}): {remedy}")
    return load(named[0])


def reference_classifier(reference: Dataset, seed: int = 0) -> diagnostics.Classifier:
    """The classifier of a labelled reference, trained once and kept in `.statistics/` if that is allowed."""
    if reference.labels is None:
        raise ValueError("got a reference without labels, wanted one for a classifier to learn from: choose another")
    folder = _place(reference, f"classifier-{reference.manifest['sha256']['labels'][:8]}-{seed}")
    if (folder / "config.json").is_file():
        return diagnostics.Classifier.from_pretrained(folder)
    network = diagnostics.fit_classifier(reference.images, reference.labels, seed)
    with suppress(OSError), written_aside(folder) as aside:
        network.save_pretrained(aside)
    return network


def _place(reference: Dataset, name: str) -> Path:
    """Where something that depends on the reference alone is kept."""
    return reference.folder / ".statistics" / f"{reference.sha256[:16]}-{name}"


def _kept(reference: Dataset, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, from `.statistics/` of the reference if it is there; written there if that is allowed."""
    path = _place(reference, f"{name}.npz")
    if path.is_file():
        with np.load(path) as arrays:
            return dict(arrays)
    made = make()
    with suppress(OSError), whole(path) as aside:
        np.savez(aside, **made)
    return made


def _distance(
    key: str, name: str, stem: str, vectors: Vectors, samples: np.ndarray, reference: Dataset, options: Options
) -> Score:
    """A Frechet distance and its floor; `stem` begins the names under which moments and floor are kept."""
    images, seed, device = reference.images, options.seed, options.device

    def between_real(count: int) -> Estimates:
        return {key: frechet.split_floor(images, vectors, count, RESAMPLES, seed, device).distance}

    real = frechet.Moments(**_kept(reference, stem, lambda: frechet.moments(images, vectors, device=device).state()))
    found = frechet.distance(real, samples, vectors, resamples=RESAMPLES, seed=seed, device=device)
    floor = _floors(stem, between_real, samples, reference, options).get(key)
    return Score(key, name, found.distance, floor, len(samples), len(images), _protocol(options), found)


def _floors(
    stem: str, between_real: Callable[[int], Estimates], samples: np.ndarray, reference: Dataset, options: Options
) -> Estimates:
    """What `between_real` finds between as many real images as samples, half of them at most, and all others; kept."""
    count = min(len(reference.images) // 2, len(samples))
    name = f"{stem}-split-{count}-{options.seed}-{RESAMPLES}"
    try:
        found = _kept(reference, name, lambda: {key: np.array(each) for key, each in between_real(count).items()})
    except ValueError:  # too few images to be split
        return {}
    return {key: Estimate(*each.tolist()) for key, each in found.items()}


def _protocol(options: Options) -> str:
    return f"{RESAMPLES} resamples, seed {options.seed}"
