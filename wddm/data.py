"""data: named sources -> prepared uint8 arrays with a manifest; prepared arrays -> batches on a device.

`prepare` writes a folder of `images.npy` (uint8, (N, H, W, C)), `labels.npy` (int64, (N,), where there are
any) and, last, `manifest.json`, a function of the settings and the source alone. `load` opens it. Where
images come from is in `sources.py`, what becomes of them in `decoding.py`, how tensors are made of them in
`batches.py`, and what there is for sets beyond one disk in `streams.py`.
"""

import json
import math
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from wddm.batches import batches as batches
from wddm.contents import duplicates as duplicates
from wddm.contents import statistics, write_header
from wddm.decoding import decoded
from wddm.files import sha256, written_aside
from wddm.sources import SOURCES, Source, listing_sha256

NOTEBOOK = "notebooks/01_prepare.ipynb"
IMAGES_PER_PROCESS = 1024  # fewer do not pay for its start
NAMED = 10  # skipped files that the manifest names


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
    on_error: str = "stop",
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
        on_error: "stop" at an image that does not decode, or "skip" it; the manifest counts the skipped ones. A
            Parquet file that is damaged itself stops either.
        progress: whether to print a progress bar.

    Raises:
        ValueError: a bad argument, an image that does not decode. ConnectionError: the Hub is out of reach.
    """
    settings = _settings(dataset, resolution, dataset_path, seed, limit, on_error)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # a second process waits, then finds it done
        reason = _reason_to_prepare(folder, settings)
        if reason is None:
            return load(folder)
        if reason:
            print(f"{folder}: {reason}; preparing it anew")
        source = SOURCES[dataset](resolution, settings["dataset_path"], seed)
        with written_aside(folder, "preparing") as staging:
            labels, skipped = _write_images(source, settings, staging, progress)
            _write_manifest(source, settings, labels, skipped, staging)
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
        for name, written in manifest["sha256"].items() if verify else ():
            if sha256(folder / f"{name}.npy") != written:
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
    on_error: str = "stop",
) -> None:
    """Raise the ValueError that `prepare` would, as far as it can be known without network and decoding."""
    settings = _settings(dataset, resolution, dataset_path, seed, limit, on_error)
    if dataset_path is not None or dataset == "folder":
        SOURCES[dataset](resolution, settings["dataset_path"], seed)


def _settings(dataset: str, resolution: int, dataset_path, seed: int, limit: int | None, on_error: str) -> dict:
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
    if on_error not in ("stop", "skip"):
        raise ValueError(f"got on_error={on_error!r}, wanted stop or skip: choose one of them")
    path = None if dataset_path is None else str(dataset_path)
    return {
        "dataset": dataset,
        "resolution": resolution,
        "seed": seed if limit is not None or dataset == "patches" else None,
        "limit": limit,
        "on_error": on_error,
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


def _write_images(source: Source, settings: dict, to: Path, progress: bool) -> tuple[list[int | None], list[str]]:
    """Decode and resize into `to`/images.npy, on all cores and a few chunks at a time; labels, and what was skipped."""
    rows, limit = np.arange(source.count), settings["limit"]
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(settings["seed"]).choice(rows, limit, replace=False))
    shape = (settings["resolution"], settings["resolution"], source.channels)
    chunks = source.read(rows, max(1, min(256, 2**22 // math.prod(shape))))
    labels, skipped = [], []
    bar = tqdm(total=len(rows), desc="decoding", unit="image", file=sys.stdout, disable=not progress)
    decoding = decoded(chunks, shape, processes=len(rows) // IMAGES_PER_PROCESS)
    with (to / "images.npy").open("wb") as file, bar, decoding as results:
        write_header(file, (len(rows), *shape))
        for pixels, chunk_labels, failed in results:
            if failed and settings["on_error"] == "stop":
                where, why = failed[0]
                raise ValueError(f"got {where}, which does not decode ({why}): repair or remove it, or on_error=skip")
            pixels.tofile(file)
            labels += chunk_labels
            skipped += [where for where, _ in failed]
            bar.update(len(pixels) + len(failed))
        file.seek(0)
        write_header(file, (len(labels), *shape))
    if not labels:
        raise ValueError(f"got {source.name} with no images ({len(skipped)} skipped), wanted some: give other files")
    return labels, skipped


def _write_manifest(source: Source, settings: dict, labels: list[int | None], skipped: list[str], to: Path) -> None:
    """Write `to`/labels.npy and, last, manifest.json; without a clock, so that it can be reproduced."""
    labelled = None not in labels and max(labels) >= 0  # unlabelled splits on the Hub say -1
    names, counts = source.class_names if labelled else None, None
    if labelled:
        np.save(to / "labels.npy", np.array(labels, np.int64))
        values, sizes = (v.tolist() for v in np.unique(labels, return_counts=True))
        counts = {names[v] if names else str(v): size for v, size in zip(values, sizes, strict=True)}
    bands = statistics(to / "images.npy")
    manifest = {
        **settings,
        "source": source.name,
        "revision": source.revision,
        "split": source.split,
        "count": len(labels),
        "skipped": {"count": len(skipped), "first": skipped[:NAMED]},
        "shape": list(np.load(to / "images.npy", mmap_mode="r").shape),
        "sha256": {name: sha256(to / f"{name}.npy") for name in ("images", "labels")[: 1 + labelled]},
        "class_names": names,
        "class_counts": counts,
        "pixels": bands.pop("0"),
        "bands": bands,
    }
    (to / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
