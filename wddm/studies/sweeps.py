"""sweeps: finished runs side by side: what they differ in, what they cost, how they learned, where they fall short."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wddm.backbones import load_backbone
from wddm.data import Dataset
from wddm.metrics import frechet, scores
from wddm.profiling import forward_flops
from wddm.training import read_log
from wddm.workbook.records import Finished

PASSES = 3  # forward, and backward at twice its cost


def grouped(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
    """The runs of each variant, which differ in their seeds alone."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def differences(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """A row per variant: how many runs it has, and those parameters that are not the same in all variants."""
    variants = {name: [run.parameters for run in members] for name, members in grouped(runs).items()}
    keys = dict.fromkeys(key for run in runs for key in run.parameters if key not in ("run", "seed"))
    differing = [key for key in keys if len({repr(members[0].get(key)) for members in variants.values()}) > 1]
    return [
        {"variant": name, "runs": len(members)} | {key: _shown(members[0].get(key)) for key in differing}
        for name, members in variants.items()
    ]


def _shown(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else value


def summary(runs: Sequence[Finished], metric: str) -> list[dict[str, Any]]:
    """A row per variant, least first: mean, least and most over seeds, and the mean in multiples of the best and floor.

    Variants without the metric are left out.
    """
    rows = []
    for name, members in grouped(runs).items():
        if values := [run.metrics[metric] for run in members if run.metrics.get(metric) is not None]:
            floors = [run.metrics[f"{metric}_floor"] for run in members if run.metrics.get(f"{metric}_floor")]
            row = {"variant": name, "runs": len(values), "mean": np.mean(values), "least": min(values)}
            rows.append(row | {"most": max(values), "floor": np.mean(floors) if floors else None})
    rows.sort(key=lambda row: row["mean"])
    for row in rows:
        row["over the best"] = row["mean"] / rows[0]["mean"]
        row["over the floor"] = row["mean"] / row["floor"] if row["floor"] else None
    return rows


def everything(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """A row per run: parameters that differ, seed, metrics and timings, for a file."""
    differing = {row["variant"]: row for row in differences(runs)}
    return [
        {"run": run.name, **differing[run.variant], "runs": None, "seed": run.parameters.get("seed")}
        | run.metrics
        | run.timings
        for run in runs
    ]


def curve(logs: Sequence[Sequence[Mapping[str, Any]]], key: str, points: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Images seen (K,) and a logged quantity (S, K) of S runs: means over at most `points` equal parts of log(images).

    Parts in which a run has logged none are left out; K may be 0.
    """
    rows = [[(row["images_seen"], row[key]) for row in log if row.get(key) is not None] for log in logs]
    tables = [np.reshape(each, (-1, 2)) for each in rows]
    if not tables or not all(map(len, tables)):
        return np.empty(0), np.empty((len(tables), 0))
    seen = np.concatenate(tables)[:, 0]
    edges = np.geomspace(seen.min(), seen.max() + 1, points + 1)
    sums = np.zeros((len(tables), points, 3))  # of 1, images and values
    for total, table in zip(sums, tables, strict=True):
        np.add.at(total, np.digitize(table[:, 0], edges) - 1, np.insert(table, 0, 1, axis=1))
    full = (sums[..., 0] > 0).all(0)
    means = sums[:, full] / sums[:, full, :1]
    return means[..., 1].mean(0), means[..., 2]


def learning(root: Path, runs: Sequence[Finished], key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By variant, the `curve` of a logged quantity over its runs; of those that logged it."""
    logs = {name: [read_log(root / "runs" / run.name) for run in members] for name, members in grouped(runs).items()}
    found = {name: curve([log for log in each if log], key) for name, each in logs.items()}
    return {name: each for name, each in found.items() if len(each[0])}


def in_seconds(
    root: Path, runs: Sequence[Finished], curves: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same curves over seconds of training instead of images: mean over a variant's runs of what their logs say.

    Without the time that held-out losses and distances take.
    """
    found = {}
    for name, members in grouped(runs).items():
        if name in curves:
            clocks = []
            for log in filter(None, (read_log(root / "runs" / run.name) for run in members)):
                seen, rates = (np.array([row[key] for row in log]) for key in ("images_seen", "images_per_s"))
                clocks.append(np.interp(curves[name][0], seen, np.cumsum(np.diff(seen, prepend=0) / rates)))
            found[name] = np.mean(clocks, 0), curves[name][1]
    return found


def reaching(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], reference: str, unit: str = "thousand images"
) -> list[dict[str, Any]]:
    """A row per variant: the images after which all its seeds are as near as the reference is in the end, on average.

    `curves`: by variant, images seen (K,) and distances (S, K); or seconds, which is then the `unit`. An upper bound:
    between two measurements nothing is known.
    """
    if reference not in curves:
        raise ValueError(f"got reference={reference!r}, wanted one of {', '.join(curves)}: choose one that has a curve")
    in_all, wanted = curves[reference][0][-1], curves[reference][1][:, -1].mean()
    rows = []
    for name, (seen, distances) in curves.items():
        there = seen[(distances <= wanted).all(0)] if name != reference else seen[-1:]
        row = {"variant": name, "in the end": distances[:, -1].mean(), "seeds": len(distances)}
        row[unit] = there[0] / (1 if unit == "seconds" else 1000) if len(there) else None
        rows.append(row | {f"share of {unit.split()[-1]}": there[0] / in_all if len(there) else None})
    return rows


def values(
    runs: Sequence[Finished], metric: str
) -> tuple[dict[str, list[float]], dict[str, list[tuple[float, float]]] | None]:
    """By variant, a number of each run and the ends of its interval; no intervals where a run has none."""
    having = [run for run in runs if run.metrics.get(metric) is not None]
    groups = grouped(having).items()
    if not having:
        raise ValueError(
            f"got {len(runs)} runs without {metric!r}, wanted it in their metrics.json: choose another metric"
        )
    found = {name: [run.metrics[metric] for run in members] for name, members in groups}
    ends = f"{metric}_low", f"{metric}_high"
    if not all(run.metrics.get(end) is not None for run in having for end in ends):
        return found, None
    return found, {name: [tuple(run.metrics[end] for end in ends) for run in members] for name, members in groups}


def first_samples(root: Path, runs: Sequence[Finished], count: int = 16) -> dict[str, np.ndarray]:
    """By variant, the first samples uint8 (count, H, W, C) of its first run: the same seeds, so the same noise."""
    files = {name: root / "runs" / members[0].name / "samples.npy" for name, members in grouped(runs).items()}
    return {name: np.load(file, mmap_mode="r")[:count] for name, file in files.items() if file.exists()}


def compute(root: Path, run: Finished) -> dict[str, float]:
    """What a run's training took: operations of a forward pass per image, images, and operations in all."""
    flops = forward_flops(load_backbone(root / "runs" / run.name / "pipeline" / "backbone"))
    images = run.metrics["train_images"]
    return {"forward_flops": flops, "train_images": images, "train_flops": PASSES * flops * images}


def spending(root: Path, runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """A row per variant: size of the network, what a forward pass and the training took, and how fast that went."""
    rows = []
    for name, members in grouped(runs).items():
        spent, first = [compute(root, run) for run in members], members[0]
        row = {"variant": name, "runs": len(members), "parameters": first.metrics["parameters"]}
        row["GFLOP/image"] = spent[0]["forward_flops"] / 1e9
        row["kimg"] = np.mean([each["train_images"] for each in spent]) / 1000
        row["images/s"] = np.median([run.timings["train_images_per_s"] for run in members])
        row["TFLOP"] = np.mean([each["train_flops"] for each in spent]) / 1e12
        rows.append(row | {"relative": row["TFLOP"] / (rows or [row])[0]["TFLOP"]})
    return rows


def packets(
    root: Path, runs: Sequence[Finished], reference: Dataset, level: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Distance in every Haar packet (4^L,), by variant the mean over its runs; and that of real images."""
    found, counts = {}, []
    for name, members in grouped(runs).items():
        samples = [np.load(root / "runs" / run.name / "samples.npy", mmap_mode="r") for run in members]
        options = scores.Options(level=level, seed=seed)
        each = [scores.wavelet(images, reference, options)[0].detail.per_packet for images in samples]
        found[name], counts = np.mean(each, 0), [*counts, *map(len, samples)]
    count = min(len(reference.images) // 2, min(counts))
    return found, frechet.split_floor(reference.images, level, count=count, seed=seed).per_packet


def by_codec(runs: Sequence[Finished]) -> list[Finished]:
    """The runs, their variants named after the codec; in order of those names' first appearance by level."""
    return sorted(
        (replace(run, variant=codec_name(run.parameters)) for run in runs), key=lambda run: run.parameters["level"]
    )


def codec_name(parameters: Mapping[str, Any]) -> str:
    """level 2, db2, pyramid, dyadic: as far as it is not haar, packet and band, and matters at this level."""
    level = parameters["level"]
    parts = ["pixels" if not level else f"level {level}"]
    parts += [parameters["wavelet"]] * (level > 0 and parameters["wavelet"] != "haar")
    parts += [parameters["transform"]] * (level > 1 and parameters["transform"] != "packet")
    parts += [parameters["scaling"]] * (parameters["scaling"] != "band")
    return ", ".join(parts)
