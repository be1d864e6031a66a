"""sweeps: finished runs side by side: what they differ in, what they cost, how they learned, where they fall short.

A run has a name, a variant (runs of one variant differ in their seeds alone), and parameters, metrics and timings by
name. `everything` makes a table of them, a row per run, which most other functions read.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wddm.backbones import PASSES, forward_flops, load_backbone
from wddm.data import Dataset
from wddm.metrics import frechet, scores
from wddm.steps import read_log
from wddm.wavelets import check_choice


def differences(runs: Sequence[Any]) -> pd.DataFrame:
    """A row per variant: how many runs it has, and its values of the parameters that are not the same in all runs."""
    names = pd.Series([run.variant for run in runs], name="variant")
    table = pd.DataFrame([run.parameters for run in runs], dtype=object).drop(columns=["run", "seed"], errors="ignore")
    table = table.where(table.notna(), None)  # a parameter that a run does not know counts as not set
    first = table[~names.duplicated()].set_axis(names.unique(), axis=0)
    for key, name in itertools.product(table, first.index):
        if len(values := dict.fromkeys(table[key][(names == name).to_numpy()].map(str))) > 1:
            first.loc[name, key] = " / ".join(values)
    differing = first.loc[:, table.map(repr).nunique() > 1]
    differing = differing.map(lambda value: ", ".join(map(str, value)) if isinstance(value, list) else value)
    return names.value_counts(sort=False).rename("runs").to_frame().join(differing).reset_index()


def everything(runs: Sequence[Any], metric: str) -> pd.DataFrame:
    """A row per run: name, variant, parameters that differ, seed, metrics, timings. ValueError if nothing compares."""
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} finished run, {runs[0].name}, wanted two or more to compare: name others")
    check_choice("metric", metric, sorted({key for run in runs for key, x in run.metrics.items() if x is not None}))
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
    """A row per variant, best first: a metric's mean, range and outermost interval ends; ratios to best and floor."""
    keys = [metric + end for end in ("", "_low", "_high", "_floor")]
    having = table.reindex(columns=["variant", *keys]).dropna(subset=metric)
    groups = having.set_axis(["variant", "value", "low", "high", "floor"], axis=1).groupby("variant", sort=False)
    found = groups.value.agg([("runs", "size"), ("mean", "mean"), ("minimum", "min"), ("maximum", "max")])
    ends = [groups.low.min(), groups.high.max(), groups.floor.mean()]
    found = found.join(ends).sort_values("mean", kind="stable").reset_index()
    ratios = {"over the best": found["mean"].min(), "over the floor": found.floor}
    return found.assign(**{name: found["mean"] / np.where(by > 0, by, np.nan) for name, by in ratios.items()})


def curve(logs: Sequence[Sequence[Mapping[str, Any]]], key: str, points: int = 40) -> pd.DataFrame:
    """Mean and range ({key}_low, {key}_high) of a logged quantity over runs, by kimg (thousand images) and seconds of
    training: a row for each of `points` equal parts of log(images) in which all runs have logged it.
    """
    tables = [pd.DataFrame(log).reindex(columns=sorted({"images_seen", "images_per_s", key})) for log in logs]
    for log in tables:
        log["seconds"] = (log.images_seen.diff().fillna(log.images_seen) / log.images_per_s).cumsum()
        log["kimg"] = log.images_seen / 1000
    rows = pd.concat(dict(enumerate(tables)), names=["run"]).astype(float).dropna(subset=key)
    edges = np.geomspace(rows.kimg.min(), rows.kimg.max() + 1e-3, points + 1)
    means = rows.groupby([np.digitize(rows.kimg, edges), "run"])[[key, "kimg", "seconds"]].mean()
    parts = means.groupby(level=0)
    ends = {f"{key}_low": parts[key].min(), f"{key}_high": parts[key].max()}
    found = parts.mean().assign(runs=parts.size(), **ends)
    return found[found.runs == len(logs)]


def learning(root: Path, table: pd.DataFrame, key: str) -> pd.DataFrame:
    """The `curve` of a logged quantity for each variant, over its runs that have a log; none if they did not log it."""
    runs = table.groupby("variant", sort=False)["run"]
    logs = {name: [log for run in each if (log := read_log(root / "runs" / run))] for name, each in runs}
    found = [curve(own, key).assign(variant=name, legend=f"{name} ({len(own)})") for name, own in logs.items() if own]
    return pd.concat(found) if found else pd.DataFrame({"variant": []})


def reaching(curves: pd.DataFrame, key: str, reference: str, over: str = "kimg") -> list[dict[str, Any]]:
    """By variant: after how many kimg (or seconds) its worst seed is as low as the mean of the reference in the end."""
    by_variant = dict(iter(curves.groupby("variant", sort=False)))
    check_choice("reference", reference, by_variant)
    last, rows = by_variant[reference].iloc[-1], []
    for name, each in by_variant.items():
        there = each[over][each[f"{key}_high"] <= last[key]] if name != reference else each[over][-1:]
        first = there.iloc[0] if len(there) else None
        row = {"variant": name, "in the end": each[key].iloc[-1], "seeds": each.runs.iloc[-1], over: first}
        rows.append(row | {f"share of {over}": first and first / last[over]})
    return rows


def first_samples(root: Path, table: pd.DataFrame, count: int = 16) -> dict[str, np.ndarray]:
    """By variant: the first samples, uint8 (count, H, W, C), of its first run; all have the same seeds and noise."""
    runs = table.drop_duplicates("variant").set_index("variant")["run"]
    files = {name: root / "runs" / run / "samples.npy" for name, run in runs.items()}
    return {name: np.load(file, mmap_mode="r")[:count] for name, file in files.items() if file.exists()}


def with_compute(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with each run's floating-point operations, of a forward pass of one image and of the whole training."""
    flops = [forward_flops(load_backbone(root / "runs" / run / "pipeline" / "backbone")) for run in table.run]
    return table.assign(forward_flops=flops, train_flops=PASSES * np.array(flops) * table.train_images)


def packets(root: Path, table: pd.DataFrame, reference: Dataset, level: int, seed: int = 0) -> pd.DataFrame:
    """Distances, a column per Haar packet: a row per variant, the mean over its runs, and "real images", the floor."""
    samples = [np.load(root / "runs" / run / "samples.npy", mmap_mode="r") for run in table.run]
    measured = [scores.wavelet(images, reference, scores.Options(level, seed))[0].detail for images in samples]
    count = min(len(reference.images) // 2, *map(len, samples))
    floor = frechet.split_floor(reference.images, level, count=count, seed=seed).per_packet
    means = pd.DataFrame([one.per_packet for one in measured]).groupby(table.variant.to_numpy(), sort=False).mean()
    return pd.concat([means, pd.DataFrame([floor], index=["real images"])])
