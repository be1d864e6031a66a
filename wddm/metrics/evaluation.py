"""evaluation: images from anywhere against a prepared set, `wddm evaluate`; and what distances notice."""

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from wddm import metrics
from wddm.data import Dataset, load
from wddm.metrics import inception, scores
from wddm.metrics.features import FeatureNet
from wddm.metrics.scores import Score

LEFT_OUT = ("grid.png",)  # `wddm sample` puts it beside the images
BLUR, NOISE, MISSING = (0, 0.5, 1, 1.5, 2), (0, 0.02, 0.05, 0.1, 0.2), (0, 0.2, 0.4, 0.6, 0.8)


def evaluate(
    samples: np.ndarray, reference: Dataset, *, level: int = 3, inception_weights: str | Path | None = None, **how
) -> list[Score]:
    """All scores. `how`: seed, batch_size, device, processes, progress.

    Raises:
        ValueError: images of another shape than the reference's, too few for FWD, weights that are none.
    """
    if samples.dtype != np.uint8 or samples.shape[1:] != reference.images.shape[1:]:
        raise ValueError(
            f"got {samples.dtype} images {samples.shape[1:]} and a reference of {reference.images.shape[1:]}, wanted "
            "uint8 and the same height, width and colours: give another reference, or convert the images"
        )
    path, progress = inception.find_weights(inception_weights), how.pop("progress", lambda batches, total: batches)
    return [
        scores.wavelet(samples, reference, level, **how),
        scores.classifier(samples, reference, **how),
        *scores.by_inception(samples, reference, weights=path, progress=progress, **how),
        *scores.copies(samples, reference, **how),
    ]


def as_json(found: list[Score], images: Path, reference: Dataset) -> dict:
    """Everything, for a file: the scores, and whose they are."""
    rows = [{name: value for name, value in vars(score).items() if name != "detail"} for score in found]
    return {
        "images": str(images),
        "reference": {"folder": str(reference.folder), "sha256": reference.manifest["sha256"]["images"]},
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
    files = sorted(file for file in path.glob("*.png") if file.name not in LEFT_OUT)
    if not files:
        raise ValueError(f"got {path}, wanted a folder of PNGs, or samples.npy: give what wddm sample wrote")
    first, images = None, None
    for row, file in enumerate(files):
        pixels = np.asarray(Image.open(file))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if first is None:
            first, images = pixels, np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.dtype != np.uint8 or pixels.shape != first.shape or pixels.shape[-1] not in (1, 3):
            raise ValueError(
                f"got {file} of {pixels.dtype} {pixels.shape} beside {first.shape}, wanted 8-bit grey or RGB images of "
                "one size: convert them"
            )
        images[row] = pixels
    return images


def find_reference(reference: str, resolution: int | None, root: Path) -> Dataset:
    """A prepared folder, or the prepared set of that name under `root`/data.

    Raises:
        ValueError: there is none; there are several and no resolution was given.
    """
    if Path(reference, "manifest.json").is_file():
        return load(reference)
    found = {path.parent.name: path.parent for path in sorted(root.glob("data/*/manifest.json"))}
    wanted = [name for name in found if name.rpartition("-")[0] == reference]
    if resolution is not None:
        wanted = [name for name in wanted if name == f"{reference}-{resolution}"]
    if len(wanted) != 1:
        have, remedy = ", ".join(wanted or found) or "nothing", "give --resolution" if wanted else "run 01_prepare"
        raise ValueError(f"got reference={reference!r}, wanted a folder or one prepared set ({have}): {remedy}")
    return load(found[wanted[0]])


def degraded(images: np.ndarray, kind: str, amount: float, seed: int = 0) -> np.ndarray:
    """uint8 (N, H, W, C), blurred by a Gaussian of `amount` pixels or with noise of that spread (of 1)."""
    if kind == "blur":
        return gaussian_filter(images.astype(np.float32), (0, amount, amount, 0)).round().clip(0, 255).astype(np.uint8)
    noise = np.random.default_rng(seed).normal(0, 255 * amount, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def responses(
    reference: Dataset, level: int, network: FeatureNet | None = None, *, seed: int = 0, most: int = 2000, **how
) -> dict[str, tuple[tuple[float, ...], dict[str, np.ndarray]]]:
    """What distances make of real images that are blurred, noisy, or short of classes.

    By kind: amounts (K,), and by distance its values and the ends of their 90 % intervals (K, 3).

    Half of the reference, `most` images at most, is compared with as many others. Missing classes leave fewer images:
    as many are taken for every amount, so that their number tells nothing. A kind that leaves too few is left out.

    Args:
        level: of the FWD.
        network: classifier of the reference whose features give another distance.
    """
    count, shuffled = min(len(reference.images) // 2, most), np.random.default_rng(seed).permutation
    one, other = np.sort(shuffled(len(reference.images))[: 2 * count].reshape(2, count))
    labels, found = None if reference.labels is None else reference.labels[other], {}
    with suppress(ValueError):  # too few images for this level
        real = metrics.packet_moments(reference.images, level, rows=one, **how)
        features = network and metrics.feature_moments(reference.images, network, rows=one, **how)
        how = {"resamples": scores.RESAMPLES, "seed": seed, **how}
        distances = {f"FWD, level {level}": lambda one: metrics.frechet_wavelet_distance(real, one, level, **how)}
        if network is not None:
            distances["FD of the classifier"] = lambda one: metrics.frechet_feature_distance(
                features, one, network, **how
            )
        for kind, (amounts, degrees) in _degrees(np.array(reference.images[other]), labels, seed).items():
            measured = {name: [distance(one) for one in degrees] for name, distance in distances.items()}
            found[kind] = (
                amounts,
                {
                    name: np.array([(m.value, m.interval.low, m.interval.high) for m in row])
                    for name, row in measured.items()
                },
            )
    return found


def _degrees(images: np.ndarray, labels: np.ndarray | None, seed: int) -> dict[str, tuple[tuple[float, ...], list]]:
    """By kind, amounts and the images to be measured."""
    sets = {
        "blur": (BLUR, [degraded(images, "blur", amount) if amount else images for amount in BLUR]),
        "noise": (NOISE, [degraded(images, "noise", amount, seed) if amount else images for amount in NOISE]),
    }
    if labels is not None:
        classes, rng = np.unique(labels), np.random.default_rng(seed)
        left = [rng.permutation(np.flatnonzero(labels >= classes[int(share * len(classes))])) for share in MISSING]
        count = min(map(len, left))
        sets["missing classes"] = (MISSING, [images[np.sort(rows[:count])] for rows in left])
    return sets
