"""sweeps: finished runs side by side: what they differ in, what they cost, how they learned, where they fall short.

A run is a dataclass with name, variant (runs of one variant differ in their seeds alone), and its resolved parameters,
metrics and timings by name. `everything` makes a table of them, which the other functions read, most of them to say
something of every variant, in the order in which the table names them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wddm.backbones import load_backbone
from wddm.data import Dataset
from wddm.metrics import scores
from wddm.metrics.frechet import split_floor
from wddm.steps import read_log
from wddm.studies.profiling import PASSES, forward_flops
from wddm.wavelets import check_choice

Curve = tuple[np.ndarray, np.ndarray]  # images seen (K,), or seconds, and a logged quantity of S runs (S, K)


def differences(runs: Sequence[Any]) -> pd.DataFrame:
    """How many runs a variant has, and those parameters that are not the same in all variants."""
    names = pd.Series([run.variant for run in runs], name="variant")
    table = pd.DataFrame([run.parameters for run in runs], dtype=object).drop(columns=["run", "seed"], errors="ignore")
    table = table.where(table.notna(), None)  # a parameter that a run does not know is as one that is not set
    first = table[~names.duplicated()].set_axis(names.unique(), axis=0)
    differing = first.loc[:, first.map(repr).nunique() > 1]
    differing = differing.map(lambda value: ", ".join(map(str, value)) if isinstance(value, list) else value)
    return names.value_counts(sort=False).rename("runs").to_frame().join(differing).reset_index()


def everything(runs: Sequence[Any]) -> pd.DataFrame:
    """A row per run: its name and variant, the parameters that differ, the seed, metrics and timings."""
    differing = differences(runs).drop(columns="runs").set_index("variant").to_dict("index")
    return pd.DataFrame(
        {"run": run.name, "variant": run.variant, **differing[run.variant], "seed": run.parameters.get("seed")}
        | run.metrics
        | run.timings
        for run in runs
    )


def one_set(folders: Mapping[str, Path]) -> Path:
    """The folder of the prepared set that all runs used, of their folders by name."""
    first, *others = dict.fromkeys(folders.values())
    if others:
        names = ", ".join(folder.name for folder in (first, *others))
        raise ValueError(
            f"got runs of {1 + len(others)} prepared sets, {names}, wanted one: compare runs of the same images"
        )
    return first


def members(table: pd.DataFrame) -> dict[str, list[str]]:
    """The names of the runs of each variant."""
    return table.groupby("variant", sort=False)["run"].agg(list).to_dict()


def summary(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean, minimum and maximum of a metric over seeds, best first, and the mean in multiples of the best and floor.

    Variants without the metric are left out.
    """
    having = table.reindex(columns=["variant", metric, f"{metric}_floor"]).dropna(subset=metric)
    groups = having.set_axis(["variant", "value", "floor"], axis=1).groupby("variant", sort=False)
    found = groups.value.agg([("runs", "size"), ("mean", "mean"), ("minimum", "min"), ("maximum", "max")])
    found = found.join(groups.floor.mean()).sort_values("mean", kind="stable").reset_index()
    found["over the best"] = found["mean"] / found["mean"].min()
    return found.assign(**{"over the floor": found["mean"] / found.floor.replace(0, np.nan)})


def values(
    table: pd.DataFrame, metric: str
) -> tuple[dict[str, list[float]], dict[str, list[tuple[float, float]]] | None]:
    """By variant, a number of each run and the ends of its interval; no intervals where a run has none."""
    having = table.reindex(columns=["variant", metric, f"{metric}_low", f"{metric}_high"]).dropna(subset=metric)
    if having.empty:
        raise ValueError(f"got {len(table)} runs without {metric!r}, wanted it in their metrics: choose another metric")
    groups = having.groupby("variant", sort=False)
    intervals = {name: list(group.iloc[:, 2:].itertuples(index=False, name=None)) for name, group in groups}
    return groups[metric].agg(list).to_dict(), None if having.isna().any(axis=None) else intervals


def curve(logs: Sequence[Sequence[Mapping[str, Any]]], key: str, points: int = 40) -> Curve:
    """A logged quantity of S runs over images seen: means over at most `points` equal parts of log(images).

    Parts in which a run has logged none are left out; K may be 0.
    """
    tables = [pd.DataFrame(log, columns=["images_seen", key]).dropna() for log in logs]
    if not tables or not all(map(len, tables)):
        return np.empty(0), np.empty((len(tables), 0))
    rows = pd.concat(tables, keys=range(len(tables)), names=["run", None]).astype(float)
    edges = np.geomspace(rows.images_seen.min(), rows.images_seen.max() + 1, points + 1)
    parts = rows.groupby([np.digitize(rows.images_seen, edges), "run"]).mean().unstack().dropna()
    return parts.images_seen.mean(axis=1).to_numpy(), parts[key].to_numpy().T


def logs(root: Path, table: pd.DataFrame) -> dict[str, list[list[dict[str, Any]]]]:
    """By variant, the rows that its runs have logged; of those that have."""
    found = {name: [read_log(root / "runs" / run) for run in runs] for name, runs in members(table).items()}
    return {name: [log for log in each if log] for name, each in found.items() if any(each)}


def learning(root: Path, table: pd.DataFrame, key: str) -> dict[str, Curve]:
    """By variant, the `curve` of a logged quantity over its runs; of those that logged it."""
    found = {name: curve(each, key) for name, each in logs(root, table).items()}
    return {name: each for name, each in found.items() if len(each[0])}


def in_seconds(root: Path, table: pd.DataFrame, curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The same curves over seconds of training instead of images: the mean over a variant's runs, as their logs say.

    Without the time that held-out losses and distances take.
    """
    found, logged = {}, logs(root, table)
    for name, (seen, quantity) in curves.items():
        clocks = []
        for log in map(pd.DataFrame, logged[name]):
            seconds = np.cumsum(np.diff(log.images_seen, prepend=0) / log.images_per_s)
            clocks.append(np.interp(seen, log.images_seen, seconds))
        found[name] = np.mean(clocks, axis=0), quantity
    return found


def reaching(curves: Mapping[str, Curve], reference: str, unit: str = "thousand images") -> list[dict[str, Any]]:
    """The images after which all seeds of a variant are as near as the reference is in the end, on average.

    `curves` hold distances, over images seen or over seconds, which is then the `unit`. An upper bound: between two
    measurements nothing is known.
    """
    check_choice("reference", reference, curves)
    in_all, wanted = curves[reference][0][-1], curves[reference][1][:, -1].mean()
    rows = []
    for name, (seen, distances) in curves.items():
        there = seen[(distances <= wanted).all(0)] if name != reference else seen[-1:]
        row = {"variant": name, "in the end": distances[:, -1].mean(), "seeds": len(distances)}
        row[unit] = there[0] / (1 if unit == "seconds" else 1000) if len(there) else None
        rows.append(row | {f"share of {unit.split()[-1]}": there[0] / in_all if len(there) else None})
    return rows


def first_samples(root: Path, table: pd.DataFrame, count: int = 16) -> dict[str, np.ndarray]:
    """By variant, the first samples uint8 (count, H, W, C) of its first run: the same seeds, so the same noise."""
    files = {name: root / "runs" / runs[0] / "samples.npy" for name, runs in members(table).items()}
    return {name: np.load(file, mmap_mode="r")[:count] for name, file in files.items() if file.exists()}


def with_compute(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with the operations of a forward pass per image, and of the whole training, of every run."""
    folders = (root / "runs" / run / "pipeline" / "backbone" for run in table["run"])
    flops = pd.Series([forward_flops(load_backbone(folder)) for folder in folders], index=table.index)
    return table.assign(forward_flops=flops, train_flops=PASSES * flops * table.train_images)


def spending(table: pd.DataFrame) -> pd.DataFrame:
    """Of a table with compute: each variant's network, what a forward pass and the training took, and how fast."""
    groups = table.groupby("variant", sort=False)
    found = pd.DataFrame({"runs": groups.size(), "parameters": groups.parameters.first()})
    found["GFLOP/image"] = groups.forward_flops.first() / 1e9
    found["kimg"] = groups.train_images.mean() / 1000
    found["images/s"] = groups.train_images_per_s.median()
    found["TFLOP"] = groups.train_flops.mean() / 1e12
    found["relative"] = found.TFLOP / found.TFLOP.iloc[0]
    return found.reset_index()


def packets(
    root: Path, table: pd.DataFrame, reference: Dataset, level: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Distance in every Haar packet (4^L,), by variant the mean over its runs; and that of real images."""
    found, counts, options = {}, [len(reference.images) // 2], scores.Options(level, seed)
    for name, runs in members(table).items():
        samples = [np.load(root / "runs" / run / "samples.npy", mmap_mode="r") for run in runs]
        each = [scores.wavelet(images, reference, options)[0].detail.per_packet for images in samples]
        found[name], counts = np.mean(each, 0), [*counts, *map(len, samples)]
    return found, split_floor(reference.images, level, count=min(counts), seed=seed).per_packet


def by_codec(runs: Sequence[Any]) -> list[Any]:
    """The runs, their variants named after the codec; in order of those names' first appearance by level."""
    named = (replace(run, variant=codec_name(run.parameters)) for run in runs)
    return sorted(named, key=lambda run: run.parameters["level"])


def codec_name(parameters: Mapping[str, Any]) -> str:
    """level 2, db2, pyramid, dyadic: as far as it is not haar, packet and band, and matters at this level."""
    level = parameters["level"]
    parts = [f"level {level}" if level else "pixels"]
    parts += [parameters["wavelet"]] * (level > 0 and parameters["wavelet"] != "haar")
    parts += [parameters["transform"]] * (level > 1 and parameters["transform"] != "packet")
    parts += [parameters["scaling"]] * (parameters["scaling"] != "band")
    return ", ".join(parts)
