"""data: named sources -> prepared uint8 arrays with a manifest; prepared arrays -> batches on a device.

`prepare` writes a folder of `images.npy` (uint8, (N, H, W, C)), `labels.npy` (int64, (N,), where there are
any) and, last, `manifest.json`, a function of the settings and the source alone. `load` opens it. Where
images come from and how they are resized is in `sources.py`, how tensors are made of them in `batches.py`.
"""

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from wddm.batches import ahead, to_unit
from wddm.batches import batches as batches
from wddm.sources import SOURCES, Source, decode, listing_sha256
from wddm.wavelets import WaveletCodec

NOTEBOOK = "notebooks/01_prepare.ipynb"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: uint8 memory map (N, H, W, C), labels (N,) or None, and `manifest.json`."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    manifest: dict
    folder: Path


def prepare(
    dataset: str,
    resolution: int,
    folder: str | Path,
    *,
    dataset_path: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Make `folder` hold a data set and open it; at once if it is there, intact, with equal settings.

    Args:
        dataset: a name in `SOURCES`.
        resolution: side of the square images in pixels, even.
        folder: `data/<dataset>-<resolution>` by custom; written aside, renamed when it is whole.
        dataset_path: local copy of a Hub data set in the Hub's Parquet layout; the folder of "folder".
        seed: chooses the crops of `patches`, and the images under a limit; has no influence otherwise.
        limit: at most so many images, drawn at random from all.
        progress: whether to print a progress bar.

    Raises:
        ValueError: a bad argument, an image that does not decode. ConnectionError: the Hub is out of reach.
    """
    settings = _settings(dataset, resolution, dataset_path, seed, limit)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # a second process waits, then finds it done
        reason = _reason_to_prepare(folder, settings)
        if reason is None:
            return load(folder)
        if reason:
            print(f"{folder}: {reason}; preparing it anew")
        staging = folder.with_name(f".{folder.name}.preparing")
        shutil.rmtree(staging, ignore_errors=True)  # of an earlier attempt that died
        source = SOURCES[dataset](resolution, settings["dataset_path"], seed)
        staging.mkdir()
        try:
            labels = _write_images(source, settings, staging, progress)
            _write_manifest(source, settings, labels, staging)
            _replace(folder, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return load(folder)


def load(folder: str | Path, verify: bool = False) -> Dataset:
    """Open a prepared folder; `verify` also compares the sha256 of the arrays with the manifest.

    Raises:
        FileNotFoundError: nothing was prepared there. ValueError: it is damaged.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"got {folder}, wanted a prepared data set: run {NOTEBOOK} first")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if "labels" in manifest["sha256"] else None
        if images.dtype != np.uint8 or list(images.shape) != manifest["shape"]:
            raise ValueError(f"images.npy is {images.dtype} {list(images.shape)}, not uint8 {manifest['shape']}")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"labels.npy holds {len(labels)} labels for {len(images)} images")
        for name, sha256 in manifest["sha256"].items() if verify else ():
            if _sha256(folder / f"{name}.npy") != sha256:
                raise ValueError(f"the sha256 of {name}.npy is not the one in the manifest")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"got {folder}, which is damaged ({message}): run {NOTEBOOK} again") from None
    return Dataset(images, labels, manifest["class_names"], manifest, folder)


def check_source(
    dataset: str,
    resolution: int,
    *,
    dataset_path: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> None:
    """Raise the ValueError that `prepare` would, as far as it can be known without network and decoding."""
    settings = _settings(dataset, resolution, dataset_path, seed, limit)
    if dataset_path is not None or dataset == "folder":
        SOURCES[dataset](resolution, settings["dataset_path"], seed)


def _settings(dataset: str, resolution: int, dataset_path, seed: int, limit: int | None) -> dict:
    """What the prepared bytes are a function of, checked. A seed without influence is None."""
    if dataset not in SOURCES:
        close = get_close_matches(str(dataset), SOURCES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of them"
        raise ValueError(f"got dataset={dataset!r}, wanted one of {', '.join(SOURCES)}: {hint}")
    for name, value, least, wanted in (
        ("resolution", resolution, 2, "an even number of pixels, 2 or more"),
        ("seed", seed, 0, "an integer, 0 or more"),
        ("limit", 1 if limit is None else limit, 1, "an integer, 1 or more, or None for all"),
    ):
        if type(value) is not int or value < least or (name == "resolution" and value % 2):
            raise ValueError(f"got {name}={value!r}, wanted {wanted}: change {name}")
    path = None if dataset_path is None else str(dataset_path)
    return {
        "dataset": dataset,
        "resolution": resolution,
        "seed": seed if limit is not None or dataset == "patches" else None,
        "limit": limit,
        "dataset_path": path,
        "files_sha256": path and listing_sha256(path),
    }


def _reason_to_prepare(folder: Path, settings: dict) -> str | None:
    """None if the folder is intact and has these settings; otherwise why it is not, "" if it is new."""
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "manifest.json" not in present and present - {"images.npy", "labels.npy"}:
        raise ValueError(f"got folder={folder}, which holds other files, wanted a new one: choose another")
    try:
        before = load(folder, verify=True).manifest
    except FileNotFoundError:
        return ""
    except ValueError as error:
        return str(error).split(": run")[0].removeprefix(f"got {folder}, which ")
    changed = [key for key in settings if before.get(key) != settings[key]]
    return ", ".join(f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in changed) or None


def _write_images(source: Source, settings: dict, to: Path, progress: bool) -> list[int | None]:
    """Decode and resize into `to`/images.npy, on all cores and a few chunks at a time; returns the labels."""
    rows, limit = np.arange(source.count), settings["limit"]
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(settings["seed"]).choice(rows, limit, replace=False))
    if not len(rows):
        raise ValueError(f"got {source.name} with no images, wanted 1 or more: give other files")
    shape = (len(rows), settings["resolution"], settings["resolution"], source.channels)
    images = np.lib.format.open_memmap(to / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    labels = []
    bar = tqdm(total=len(rows), desc="decoding", unit="image", file=sys.stdout, disable=not progress)
    workers = min(8, os.cpu_count() or 1)
    with bar, ThreadPoolExecutor(workers) as pool:
        chunks = ahead(pool, partial(decode, shape=shape[1:]), source.read(rows), depth=2 * workers)
        for pixels, chunk_labels in chunks:
            images[len(labels) : len(labels) + len(pixels)] = pixels
            labels += chunk_labels
            bar.update(len(pixels))
    images.flush()
    return labels


def _write_manifest(source: Source, settings: dict, labels: list[int | None], to: Path) -> None:
    """Write `to`/labels.npy and, last, manifest.json; without a clock, so that it can be reproduced."""
    images = np.load(to / "images.npy", mmap_mode="r")
    labelled = None not in labels and max(labels) >= 0  # unlabelled splits on the Hub say -1
    names, counts = source.class_names if labelled else None, None
    if labelled:
        np.save(to / "labels.npy", np.array(labels, np.int64))
        values, sizes = (v.tolist() for v in np.unique(labels, return_counts=True))
        counts = {names[v] if names else str(v): size for v, size in zip(values, sizes, strict=True)}
    levels = _statistics(images)
    manifest = {
        **settings,
        "source": source.name,
        "revision": source.revision,
        "split": source.split,
        "count": len(images),
        "shape": list(images.shape),
        "sha256": {name: _sha256(to / f"{name}.npy") for name in ("images", "labels")[: 1 + labelled]},
        "class_names": names,
        "class_counts": counts,
        "pixels": levels.pop("0"),
        "bands": levels,
    }
    (to / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _statistics(images: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation per channel of images in [-1, 1] ("0") and of their dyadic Haar packets.

    Levels 1 to 3, as far as they divide the size; channels in the order of `WaveletCodec(level=level)`.
    """
    codec = WaveletCodec("haar", level=1)  # packets of packets are the next level's packets
    levels = [level for level in range(4) if images.shape[1] % 2**level == 0]
    moments = {level: np.zeros((2, images.shape[-1] * 4**level)) for level in levels}
    step = max(1, 2**21 // images[0].size)
    for start in range(0, len(images), step):
        z = to_unit(torch.from_numpy(images[start : start + step].transpose(0, 3, 1, 2).copy()))
        for level in levels:
            z = codec.encode(z) if level else z
            variance, mean = (v.double().numpy() for v in torch.var_mean(z, (0, 2, 3), correction=0))
            moments[level] += len(z) / len(images) * np.stack([mean, variance + mean**2])
    return {
        str(level): {
            "mean": mean.round(6).tolist(),
            "std": np.sqrt((squares - mean**2).clip(0)).round(6).tolist(),
        }
        for level, (mean, squares) in moments.items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(folder: Path, staging: Path) -> None:
    """Put the finished `staging` in the place of `folder`, durably."""
    for path in (*staging.iterdir(), staging):
        _fsync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)  # works for folders too
    os.fsync(descriptor)
    os.close(descriptor)
