"""scale: seconds of CPU and peak memory of each part of the workbook, over the number of images and over their side.

Every point is measured alone, in a fresh process on one thread. A point that the one before it predicts to take longer
than `max_seconds` is not measured. What images show makes no difference: they are noise, in a temporary folder.
"""

import io
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import ModelMixin
from PIL import Image
from threadpoolctl import threadpool_limits

from benchmarks.profiling import Measurement, measure_alone
from benchmarks.workloads import Unsaved
from wddm.backbones import build_backbone
from wddm.data import prepare
from wddm.metrics import diagnostics, frechet, inception, scores
from wddm.objective import build_solver
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images
from wddm.wavelets import WaveletCodec

Work = Callable[[np.ndarray, Path], Generator[object]]  # takes images (N, S, S, 3): the second `next` is measured
KID = "KID, precision, recall of features"  # features have no side
LINEAR = 1.15  # a slope up to this one counts as linear: times of CPU vary, and caches end


def seconds_of_cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def noise(file: Path, count: int, side: int) -> np.ndarray:
    """Random images uint8 (count, side, side, 3), a memory map of `file`, which is written here."""
    rng = np.random.default_rng(0)
    with file.open("wb") as out:
        for start in range(0, count, 256):
            rng.integers(0, 256, (min(256, count - start), side, side, 3), np.uint8).tofile(out)
    return np.memmap(file, np.uint8, "r", shape=(count, side, side, 3))


def _png(image: np.ndarray) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), "png", compress_level=1)
    return file.getvalue()


def from_pngs(images: np.ndarray, folder: Path) -> Generator[object]:
    (source := folder / "source").mkdir()
    for k, image in enumerate(images):
        (source / f"{k}.png").write_bytes(_png(image))
    yield
    yield prepare("folder", images.shape[1], folder / "data", dataset_path=source, progress=False)


def from_parquet(images: np.ndarray, folder: Path) -> Generator[object]:
    (source := folder / "source").mkdir()
    for start in range(0, len(images), 1024):
        rows = [{"bytes": _png(image), "path": None} for image in images[start : start + 1024]]
        pd.DataFrame({"image": rows}).to_parquet(source / f"train-{start:07}.parquet")
    yield
    yield prepare("folder", images.shape[1], folder / "data", dataset_path=source, progress=False)


def network(side: int) -> tuple[ModelMixin, WaveletCodec]:
    """A small UNet for wavelet level 1, convolutions alone, and its codec."""
    sizes: dict[str, Any] = {"widths": [32, 32], "layers_per_block": 1, "attention_levels": []}
    return build_backbone("unet", image_size=side, image_channels=3, **sizes), WaveletCodec("haar", 1, scaling="dyadic")


def training(images: np.ndarray, folder: Path) -> Generator[object]:
    """Training on as many images as there are, in steps of 16."""
    model, codec = network(images.shape[1])
    trainer = Unsaved(
        model=model, codec=codec, images=images, folder=folder, train_kimg=len(images) / 1000, batch_size=16,
        precision="no", cpu=True, preview_kimg=0,
    )  # fmt: skip
    yield
    yield deque(trainer.steps(), maxlen=0)


def sampling(images: np.ndarray, folder: Path) -> Generator[object]:
    """Sampling as many images as there are, in two steps of DDIM."""
    model, codec = network(images.shape[1])
    pipeline = WaveletPipeline(model.eval(), build_solver("ddim", "v_prediction", spacing="trailing"), codec)
    pipeline.set_progress_bar_config(disable=True)
    yield
    yield deque(sample_images(pipeline, len(images), batch_size=16, num_inference_steps=2), maxlen=0)


def wavelet_distance(images: np.ndarray, folder: Path) -> Generator[object]:
    """FWD of a set to itself, without resampling, at the level that images of this size get."""
    yield
    yield frechet.frechet_wavelet_distance(images, images, frechet.packet_level(images.shape[1:]))


def features(images: np.ndarray, folder: Path) -> Generator[object]:
    from wddm.metrics import perceptual

    model = perceptual.build()
    yield
    yield inception.features(images, model, batch=perceptual.BATCH)


def kernel_distance(images: np.ndarray, folder: Path) -> Generator[object]:
    """KID, precision and recall of random vectors, as many as `scores.perceptual` compares."""
    step = -(-len(images) // scores.LARGEST)
    sides = np.random.default_rng(0).normal(size=(2, len(images[::step]), 1280)).astype(np.float32)
    yield
    yield inception.by_kernel(*sides, subset_size=500)


def neighbours(images: np.ndarray, folder: Path) -> Generator[object]:
    """The nearest neighbours of as many images as `scores.copies` looks for."""
    yield
    yield diagnostics.nearest_neighbours(images[: scores.SEARCHED], images, k=3)


def spectra(images: np.ndarray, folder: Path) -> Generator[object]:
    yield
    yield diagnostics.radial_power_spectrum(images)


WORKS: dict[str, Work] = {
    "preparation, PNG": from_pngs, "preparation, Parquet": from_parquet, "training": training, "sampling": sampling,
    "FWD": wavelet_distance, "EfficientNet's features": features, KID: kernel_distance,
    "nearest neighbours": neighbours, "spectrum": spectra,
}  # fmt: skip


def rehearsed(work: str, count: int, side: int) -> Generator[object]:
    """A work, ready to be measured: done once before on a few small images, so that no import is counted."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, threadpool_limits(1):
        for name, size in (("rehearsal", (64, 16)), ("measured", (count, side))):
            (place := Path(folder, name)).mkdir()
            calls = WORKS[work](noise(place / "noise", *size), place)
            next(calls)
            if name == "rehearsal":
                next(calls)
        yield
        yield next(calls)


def alone(work: str, count: int, side: int) -> Measurement:
    """Seconds of CPU and memory of a work on so many images of this side, or the reason why there are none."""
    return measure_alone(partial(rehearsed, work, count, side), seconds_of_cpu)


def series(work: str, points: Sequence[tuple[int, int]], max_seconds: float) -> list[dict[str, Any]]:
    """A row per point (images, side), smallest first, with its seconds and memory, or the `reason` why it has none."""
    rows: list[dict[str, Any]] = []
    before: tuple[float, float] | None = None  # seconds, values
    for count, side in points:
        expected = before[0] * count * side**2 / before[1] if before else 0
        row = {"work": work, "images": count, "side": side, "pixels": side**2, "seconds": None, "memory_gib": None}
        if expected > max_seconds:
            rows.append(row | {"reason": f"would take {expected:.0f} s"})
            continue
        found = alone(work, count, side)
        if found.seconds is not None:
            row |= {"seconds": (taken := float(found.seconds[-1])), "memory_gib": found.memory_gib}
            before = max(taken, 0.01), count * side**2
        rows.append(row | {"reason": found.reason})
    return rows


def study(
    counts: Sequence[int], sides: Sequence[int], side: int, count: int, max_seconds: float,
    progress: Callable[..., Any] = iter, works: Sequence[str] = tuple(WORKS),
) -> pd.DataFrame:  # fmt: skip
    """All works, measured over `counts` of images of this `side`, and over `sides` of `count` images; see `series`."""
    rows = []
    for work in progress(works):
        rows += [row | {"over": "images"} for row in series(work, [(n, side) for n in sorted(counts)], max_seconds)]
        if work != KID:
            points = [(max(count, 1024 if work == "FWD" else 0), s) for s in sorted(sides)]  # over a packet's values
            rows += [row | {"over": "pixels"} for row in series(work, points, max_seconds)]
    return pd.DataFrame(rows)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x, by least squares through the last three points, where constant costs count least."""
    if len(x) < 2:
        return math.nan
    return float(np.polyfit(np.log(x[-3:]), np.log(y[-3:]), 1)[0])


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """A row per work: the slope of its seconds and of its memory over images and over pixels, and its largest point."""
    rows = []
    for work, part in table.dropna(subset="seconds").groupby("work", sort=False):
        row: dict[str, Any] = {"work": work}
        for over, points in part.groupby("over"):
            row[f"seconds over {over}"] = slope(points[over].to_list(), points.seconds.clip(lower=0.01).to_list())
            row[f"memory over {over}"] = slope(points[over].to_list(), points.memory_gib.clip(lower=1e-3).to_list())
        last = part[part.over == "images"].iloc[-1]
        row |= {"ms an image": 1000 * last.seconds / last.images, "images": last.images, "GiB": last.memory_gib}
        rows.append(row)
    return pd.DataFrame(rows).reindex(
        columns=[
            "work", *(f"{what} over {over}" for what in ("seconds", "memory") for over in ("images", "pixels")),
            "ms an image", "images", "GiB",
        ]
    )  # fmt: skip


def conclusion(found: pd.DataFrame) -> str:
    """A sentence: which works take more than linear time, in images and in pixels, and for which it is not known."""
    said = []
    for over in ("images", "pixels"):
        steep = found[found[f"seconds over {over}"] > LINEAR]
        names = ", ".join(f"{row.work} ({row[f'seconds over {over}']:.2f})" for _, row in steep.iterrows())
        unknown = found[found[f"seconds over {over}"].isna() & ((over == "images") | (found.work != KID))]
        names = names or "none"
        said.append(f"in {over}: {names}" + f" (not known of {', '.join(unknown.work)})" * bool(len(unknown)))
    return f"Steeper than linear (slope over {LINEAR}) {'; '.join(said)}."


def unmeasured(table: pd.DataFrame) -> pd.DataFrame:
    """The points that have no seconds, and why."""
    return table[table.seconds.isna()][["work", "images", "side", "reason"]].reset_index(drop=True)


def labels(found: pd.DataFrame) -> Mapping[str, str]:
    """What a legend calls each work: its name, with its slopes over images and pixels as far as there are any."""
    names = {}
    for row in found.to_dict("records"):
        ends = [f"{row[f'seconds over {over}']:.2f}".replace("nan", "–") for over in ("images", "pixels")]
        names[row["work"]] = f"{row['work']}: {', '.join(ends)}"
    return names
