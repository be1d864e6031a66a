"""data: named sources -> prepared uint8 arrays with a manifest; prepared arrays -> batches on a device.

`prepare` makes `<root>/<dataset>-<resolution>-<key>/`. The key is a hash of the source's content and of the options, so
that two sets never share a folder and a set that is there is found. The folder holds `images.npy`, uint8 (N, H, W, C),
`labels.npy`, int64 (N,), if there are labels, and, written last, `manifest.json`. `load` opens it.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from wddm.decoding import RULE, ahead, is_grey, write_images
from wddm.files import refusing, sha256, written_aside
from wddm.local import Images, split_called
from wddm.sources import SOURCES, Source
from wddm.wavelets import check_choice

NOTEBOOK = "notebooks/01_prepare.ipynb"
NAMED = 10  # files that the manifest names, at most, of those skipped and of those left out


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: uint8 memory map (N, H, W, C), labels (N,) or None, and `manifest.json`."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    manifest: dict[str, Any]
    folder: Path

    @property
    def sha256(self) -> str:
        """SHA-256 of `images.npy`, in hexadecimal: what checkpoints and scores know the images by."""
        return self.manifest["sha256"]["images"]

    @property
    def notes(self) -> list[str]:
        """A line each, if there is any, for the source's note, files left out, images skipped and images unlabelled."""
        lines = [self.manifest["note"]] if self.manifest["note"] else []
        for name in ("left_out", "skipped"):
            if count := self.manifest[name]["count"]:
                lines.append(f"{name.replace('_', ' ')}: {count} ({'; '.join(self.manifest[name]['first'][:3])})")
        unlabelled = self.manifest["unlabelled"] if self.labels is not None else 0
        return [*lines, *[f"unlabelled: {unlabelled}"] * bool(unlabelled)]


def prepare(
    dataset: str, resolution: int, root: str | Path = "data", *, dataset_path: str | Path | None = None, seed: int = 0,
    limit: int | None = None, on_error: str = "stop", progress: bool = True, width: int | None = None,
    channels: int | None = None, split: str = "train",
) -> Dataset:  # fmt: skip
    """Prepare a data set below `root`, or open the one of the same content and options that is there already, intact.

    Args:
        dataset: a name in `SOURCES`.
        resolution, width: height and width of the images in pixels, even; without a width they are square.
        dataset_path: a copy of a Hub data set in the Hub's Parquet layout; the folder of "folder"; the font of "emoji".
        seed: of the crops of `patches`, and of the images that a `limit` keeps; has no influence otherwise.
        limit: the most images to keep, drawn at random from all.
        on_error: "stop" at an image or a Parquet file that cannot be read, or "skip" it and count it in the manifest.
        channels: 1 (grey), 3 (RGB), or those of an array, its default; of files by default 1 if all headers say grey.
        split: train, validation or test, of a folder that has several. For a Hub set "train" means its `own` (SOURCES).
    ConnectionError: the Hub is out of reach. ValueError: anything else that is wrong, in one line.
    """
    settings, source = check_source(
        dataset, resolution, dataset_path=dataset_path, seed=seed, limit=limit, on_error=on_error, width=width,
        channels=channels, split=split,
    )  # fmt: skip
    root = Path(root).expanduser()
    settings["content"] = source.content()
    key = hashlib.sha256(json.dumps([RULE, settings]).encode()).hexdigest()[:10]
    size = f"{resolution}x{settings['width']}" if settings["width"] else f"{resolution}"
    folder = root / f"{dataset}-{size}-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):  # a second process waits, then finds it done
        for end in ("preparing", "old"):  # left by processes that were killed while they prepared this folder
            final = Path(os.path.realpath(folder))
            shutil.rmtree(final.with_name(f".{final.name}.{end}"), ignore_errors=True)
        try:
            prepared = load(folder, verify=True)
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                print(f"{str(error).split(': run')[0].removeprefix('got ')}; preparing it anew")
            with written_aside(folder, "preparing") as staging:
                _write(source, settings, staging, progress)
            prepared = load(folder)
    print(*prepared.notes, sep="\n", end="\n" * bool(prepared.notes))
    return prepared


def load(folder: str | Path, verify: bool = False) -> Dataset:
    """Open a prepared folder. FileNotFoundError: it is none. ValueError: it is damaged; `verify` checks the sha256."""
    folder = Path(folder).expanduser()
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"got {folder}, wanted a prepared data set: run {NOTEBOOK} first")
    with refusing(f"{folder}, which is damaged", "it whole", f"run {NOTEBOOK} again"):
        manifest = json.loads((folder / "manifest.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if "labels" in manifest["sha256"] else None
        if images.dtype != np.uint8 or list(images.shape) != manifest["shape"]:
            raise ValueError(f"images.npy is {images.dtype} {list(images.shape)}, not uint8 {manifest['shape']}")
        for name, digest in manifest["sha256"].items() if verify else ():
            if sha256(folder / f"{name}.npy") != digest:
                raise ValueError(f"the sha256 of {name}.npy is not the one in the manifest")
        return Dataset(images, labels, manifest["class_names"], manifest, folder)


def check_source(
    dataset: str, resolution: int, *, dataset_path: str | Path | None = None, seed: int = 0, limit: int | None = None,
    on_error: str = "stop", width: int | None = None, channels: int | None = None, split: str = "train",
) -> tuple[dict[str, Any], Source]:  # fmt: skip
    """The options that the prepared bytes depend on (a seed without influence is None), and the source, not yet opened.

    ValueError: whatever can be found wrong without the network.
    """
    check_choice("dataset", dataset, SOURCES)
    check_choice("on_error", on_error, ("stop", "skip"))
    numbers = {"resolution": (resolution, 2), "width": (resolution if width is None else width, 2), "seed": (seed, 0)}
    numbers |= {"limit": (1 if limit is None else limit, 1), "channels": (1 if channels is None else channels, 1)}
    for name, (value, minimum) in numbers.items():
        if type(value) is not int or value < minimum or (minimum == 2 and value % 2):
            wanted = f"an {'even number' if minimum == 2 else 'integer'}, {minimum} or more"
            raise ValueError(f"got {name}={value!r}, wanted {wanted}: change {name}")
    if channels not in (None, 1, 3) and dataset != "folder":
        raise ValueError(f"got channels={channels} for {dataset}, wanted 1 or 3: change channels")
    path = None if dataset_path is None else os.path.expanduser(dataset_path)
    if path is not None and not os.path.exists(path):  # "" does not either
        raise ValueError(f"got dataset_path={path[:200] or repr(path)}, which does not exist: give a folder of files")
    size = resolution, width or resolution
    split = "+".join(dict.fromkeys(split_called(word) or word for word in split.replace(" ", "").split("+")))
    source = SOURCES[dataset](size, path, seed, split)
    if source.split == "all" and split != "train":
        raise ValueError(f"got split={split!r}, wanted none, {source.name} has no splits: leave it out")
    options = {"dataset": dataset, "resolution": resolution, "width": None if size[1] == resolution else width}
    options |= {"channels": channels, "seed": seed if limit is not None or dataset == "patches" else None}
    options |= {"limit": limit, "on_error": on_error, "split": source.split}
    return options, source


def opened(options: dict[str, Any], source: Source) -> Images:
    """The images of a source, not yet decoded; ValueError: none can be read, or not with the channels asked for."""
    images, channels = source.open(options["on_error"] == "skip"), options["channels"]
    possible = [1, 3] if images.channels in (None, 1, 3) else [images.channels]
    if channels not in (None, *possible):
        raise ValueError(f"got channels={channels} for {source.name}, wanted {str(possible)[1:-1]}: change channels")
    return images


def channels_of(images: Images, rows: np.ndarray) -> int:
    """The number of channels: the source's own, or else 1 if the headers of the ascending `rows` all say grey, or 3."""
    return images.channels or (1 if all(is_grey(image) for image, *_ in images.read(rows)) else 3)


def duplicates(images: np.ndarray) -> list[list[int]]:
    """Groups of row numbers of images uint8 (N, H, W, C) with the same pixels (by hash), the largest group first."""
    rows: dict[bytes, list[int]] = defaultdict(list)
    for row, image in enumerate(images):
        rows[hashlib.blake2b(image.tobytes(), digest_size=16).digest()].append(row)
    return sorted((same for same in rows.values() if len(same) > 1), key=lambda same: (-len(same), same[0]))


def _write(source: Source, settings: dict[str, Any], to: Path, progress: bool) -> None:
    """Write images.npy, labels.npy and, last, manifest.json; no date in them: the same input gives the same bytes."""
    images, limit = opened(settings, source), settings["limit"]
    rows = np.arange(images.count)
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(settings["seed"]).choice(rows, limit, replace=False))
    channels = settings["channels"] or channels_of(images, rows)
    shape = (settings["resolution"], settings["width"] or settings["resolution"], channels)
    items, size = images.read(rows), max(1, min(images.chunk, 2**22 // np.prod(shape)))
    chunks = iter(lambda: list(itertools.islice(items, size)), [])
    found, skipped = write_images(chunks, len(rows), shape, to / "images.npy", settings["on_error"], progress)
    if not found:
        raise ValueError(f"got {source.name} with no images ({len(skipped)} skipped), wanted some: give other files")
    labels, names, counts, left_out = np.array(found), None, None, [*source.left_out, *images.left_out]
    if labels.max() >= 0:  # some are labelled
        np.save(to / "labels.npy", labels)
        names, known = images.class_names, sorted(Counter(labels[labels >= 0].tolist()).items())
        counts = {names[label] if names else str(label): count for label, count in known}
    manifest = settings | {"source": source.name, "revision": images.revision, "note": images.note, "count": len(found)}
    for name, some in {"skipped": skipped, "left_out": left_out}.items():
        manifest[name] = {"count": len(some), "first": some[:NAMED]}
    manifest |= {"unlabelled": int((labels < 0).sum()), "shape": [len(found), *shape]}
    manifest |= {"sha256": {file.stem: sha256(file) for file in sorted(to.glob("*.npy"))}}
    manifest |= {"class_names": names, "class_counts": counts}
    (to / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def batches(
    images: np.ndarray, batch_size: int, *, seed: int, start: int = 0, device: str | torch.device = "cpu",
    flip: bool = False, rank: int = 0, world_size: int = 1, on_device: bool | None = None,
    rows: np.ndarray | None = None, labels: np.ndarray | None = None,
) -> Iterator[Any]:  # fmt: skip
    """Endless float32 batches (batch_size / world_size, C, H, W) in [-1, 1], contiguous, on the device.

    The stream is one permutation of the images per epoch, drawn from (seed, epoch), one after the other: a batch may
    span epochs, and the batch that begins after `start` images is the same wherever the stream began.

    Args:
        images: uint8 (N, H, W, C), a memory map for instance.
        batch_size, start: images in a batch, and images seen before the first batch; both over all processes.
        flip: mirror every image left to right with probability 1/2, drawn from (seed, epoch) too.
        rank, world_size: this process takes the rank-th contiguous slice of every batch.
        on_device: keep the whole set on the device; by default on an accelerator where it `fits`. Otherwise a
            thread prepares the next batches while the caller computes. The batches are the same.
        rows: numbers of the images to draw from; by default all.
        labels: int64 (N,); a batch is then (images, labels).
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"got {images.dtype} images {images.shape}, wanted uint8 (N, H, W, C): give a Dataset's")
    if batch_size < 1 or start < 0 or not 0 <= rank < world_size or batch_size % world_size:
        got = f"got batch_size={batch_size}, start={start}, rank={rank}, world_size={world_size}"
        raise ValueError(f"{got}, wanted a batch size that world_size divides and numbers from 0 on: change batch_size")
    device, rows = torch.device(device), np.arange(len(images)) if rows is None else rows
    on_device = device.type != "cpu" and fits(images.nbytes, device) if on_device is None else on_device
    share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
    drawn = _order(len(rows), batch_size, seed, start)
    order = ((rows[chosen[share]], mirrored[share] & flip) for chosen, mirrored in drawn)
    resident = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).contiguous() if on_device else None

    def batch(drawn: tuple[np.ndarray, np.ndarray]) -> Tensor | tuple[Tensor, Tensor]:
        at, mirrored = drawn
        here = None if resident is None else resident[torch.from_numpy(at).to(device)]
        x = to_batch(images[at], mirrored, device) if here is None else _finish(here, mirrored)
        return x if labels is None else (x, torch.from_numpy(labels[at]).to(device))

    return map(batch, order) if on_device else ahead(batch, order, threads=1)


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether a set takes under a quarter of a CUDA device's free memory, or under 1 GiB on any other device."""
    return nbytes < (torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30)


def to_batch(pixels: np.ndarray, mirrored: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1] on the device, flipped left to right if `mirrored` (B,)."""
    if device.type == "cpu":  # in numpy, image by image: in cache, and without threads that would compete with training
        count, height, width, channels = pixels.shape
        batch = np.empty((count, channels, height, width), np.float32)
        for out, image, mirror in zip(batch, pixels, mirrored, strict=True):
            out[:] = (image[:, ::-1] if mirror else image).transpose(2, 0, 1)
            out /= np.float32(127.5)
            out -= np.float32(1)
        return torch.from_numpy(batch)
    x = torch.from_numpy(pixels)
    x = (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
    return _finish(x.permute(0, 3, 1, 2), mirrored)


def _finish(x: Tensor, mirrored: np.ndarray) -> Tensor:
    """uint8 (B, C, H, W) on a device -> contiguous float32 in [-1, 1], flipped left to right where `mirrored` (B,)."""
    x = torch.where(torch.from_numpy(mirrored).to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def _order(count: int, batch_size: int, seed: int, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of each batch after the first `start` images, and whether to mirror each row; both (batch_size,)."""
    left, seen = np.empty((2, 0), np.int64), start % count
    for epoch in itertools.count(start // count):
        rng = np.random.default_rng([seed, epoch])
        drawn = np.stack([rng.permutation(count), rng.random(count) < 0.5])  # (2, count)
        left, seen = np.concatenate([left, drawn[:, seen:]], axis=1), 0
        while left.shape[1] >= batch_size:
            yield left[0, :batch_size], left[1, :batch_size].astype(bool)
            left = left[:, batch_size:]
