"""sweeps: finished runs side by side: what they differ in, what they cost, how they learned, where they fall short.

A run has a name, a variant (runs of one variant differ in their seeds alone), and its resolved parameters, metrics and
timings by name. `everything` makes a table of them, a row per run, which most other functions read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wddm.backbones import PASSES, forward_flops, load_backbone
from wddm.data import Dataset
from wddm.metrics import scores
from wddm.metrics.frechet import split_floor
from wddm.steps import read_log
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
    """A row per run: its name and variant, the parameters that differ, seed, metrics, and timings."""
    differing = differences(runs).drop(columns="runs").set_index("variant").to_dict("index")
    return pd.DataFrame(
        {"run": run.name, "variant": run.variant, **differing[run.variant], "seed": run.parameters.get("seed")}
        | run.metrics | run.timings for run in runs
    )  # fmt: skip


def one_set(folders: Iterable[Path]) -> Path:
    """The folder of the prepared set that all runs used."""
    if len(found := list(dict.fromkeys(folders))) > 1:
        names = f"{len(found)} prepared sets, {', '.join(folder.name for folder in found)}"
        raise ValueError(f"got runs of {names}, wanted one: compare runs of the same images")
    return found[0]


def summary(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean, minimum and maximum of a metric over a variant's seeds, best first, and in multiples of best and floor."""
    having = table.reindex(columns=["variant", metric, f"{metric}_floor"]).dropna(subset=metric)
    groups = having.set_axis(["variant", "value", "floor"], axis=1).groupby("variant", sort=False)
    found = groups.value.agg([("runs", "size"), ("mean", "mean"), ("minimum", "min"), ("maximum", "max")])
    found = found.join(groups.floor.mean()).sort_values("mean", kind="stable").reset_index()
    ratios = {"over the best": found["mean"].min(), "over the floor": found.floor}
    return found.assign(**{name: found["mean"] / np.where(by > 0, by, np.nan) for name, by in ratios.items()})


def curve(logs: Sequence[Sequence[Mapping[str, Any]]], key: str, over: str = "images_seen", points: int = 40) -> Curve:
    """A logged quantity of S runs over images seen, or "seconds" of training: means over parts of log(images).

    The parts are equal, `points` at most; those in which a run has logged nothing are left out, so that K may be 0.
    Seconds are without those of held-out losses and distances.
    """
    tables = [pd.DataFrame(log).reindex(columns=sorted({"images_seen", "images_per_s", key})) for log in logs]
    for log in tables:
        log["seconds"] = (log.images_seen.diff().fillna(log.images_seen) / log.images_per_s).cumsum()
    tables = [log.dropna(subset=key).astype(float) for log in tables]
    if not tables or not all(map(len, tables)):
        return np.empty(0), np.empty((len(tables), 0))
    rows = pd.concat(tables, keys=range(len(tables)), names=["run", None])
    edges = np.geomspace(rows.images_seen.min(), rows.images_seen.max() + 1, points + 1)
    parts = rows.groupby([np.digitize(rows.images_seen, edges), "run"])[[over, key]].mean().unstack().dropna()
    return parts[over].mean(axis=1).to_numpy(), parts[key].to_numpy().T


def learning(root: Path, table: pd.DataFrame, key: str, over: str = "images_seen") -> dict[str, Curve]:
    """By variant, the `curve` of a logged quantity over its runs; of those that logged it."""
    found = {}
    for name, runs in table.groupby("variant", sort=False)["run"]:
        found[name] = curve([log for run in runs if (log := read_log(root / "runs" / run))], key, over)
    return {name: each for name, each in found.items() if len(each[0])}


def reaching(curves: Mapping[str, Curve], reference: str, unit: str = "thousand images") -> list[dict[str, Any]]:
    """The images, or seconds, after which all seeds of a variant are as near as the reference is in the end on average.

    An upper bound: between two measurements nothing is known.
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
    runs = table.drop_duplicates("variant").set_index("variant")["run"]
    files = {name: root / "runs" / run / "samples.npy" for name, run in runs.items()}
    return {name: np.load(file, mmap_mode="r")[:count] for name, file in files.items() if file.exists()}


def with_compute(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with the operations of a forward pass per image, and of the whole training, of every run."""
    flops = [forward_flops(load_backbone(root / "runs" / run / "pipeline" / "backbone")) for run in table.run]
    return table.assign(forward_flops=flops, train_flops=PASSES * np.array(flops) * table.train_images)


def spending(table: pd.DataFrame) -> pd.DataFrame:
    """Of a table with compute: each variant's network, what a forward pass and the training took, and how fast."""
    groups = table.groupby("variant", sort=False)
    found = pd.DataFrame({"runs": groups.size(), "parameters": groups.parameters.first()})
    found["GFLOP/image"], found["kimg"] = groups.forward_flops.first() / 1e9, groups.train_images.mean() / 1000
    found["images/s"], found["TFLOP"] = groups.train_images_per_s.median(), groups.train_flops.mean() / 1e12
    return found.assign(relative=found.TFLOP / found.TFLOP.iloc[0]).reset_index()


def packets(root: Path, table: pd.DataFrame, reference: Dataset, level: int, seed: int = 0) -> pd.DataFrame:
    """Distance in every Haar packet, a column each: by variant the mean over its runs; "real images" is their floor."""
    options, rows, counts = scores.Options(level, seed), [], [len(reference.images) // 2]
    for run in table.run:
        samples = np.load(root / "runs" / run / "samples.npy", mmap_mode="r")
        rows.append(scores.wavelet(samples, reference, options)[0].detail.per_packet)
        counts.append(len(samples))
    floor = split_floor(reference.images, level, count=min(counts), seed=seed).per_packet
    means = pd.DataFrame(rows).groupby(table.variant.to_numpy(), sort=False).mean()
    return pd.concat([means, pd.DataFrame([floor], index=["real images"])])


def by_codec(runs: Sequence[Any]) -> list[Any]:
    """The runs by level, their variants named after the codec."""
    named = [replace(run, variant=codec_name(**run.parameters)) for run in runs]
    return sorted(named, key=lambda run: run.parameters["level"])


def codec_name(level: int, wavelet: str, transform: str, scaling: str, **_: Any) -> str:
    """level 2, db2, pyramid, dyadic: as far as it is not haar, packet and band, and matters at this level."""
    chosen = [(wavelet, "haar", 1), (transform, "packet", 2), (scaling, "band", 0)]
    names = [value for value, default, lowest in chosen if value != default and level >= lowest]
    return ", ".join([f"level {level}" if level else "pixels", *names])
