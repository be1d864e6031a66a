"""findings: what may be said of the rows of a study: means and their noise, fronts, fewest steps; tables of them."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from wddm.studies.study import SETTING, setting_of

DISTANCES, ENDS = ("fwd", "fd"), ("", "_low", "_high")


def pooled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per setting of rows of several `sets` of images: mean distances with intervals, median seconds.

    Its `solver` is the scheduler's name with the eta, where that is not 0. Rows with an error are left out.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(setting_of(row), []).append(row)
    return [dict(zip(SETTING, setting, strict=True)) | _together(sets) for setting, sets in groups.items()]


def _together(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of one setting say together."""
    first = sets[0]
    row = {
        "solver": first["scheduler"] + f", eta {first['eta']:g}" * bool(first["eta"]),
        "sets": len(sets),
        "count": first["count"],
        "evaluations": first["evaluations"],
        "seconds_per_image": float(np.median([one["seconds_per_image"] for one in sets])),
    }
    for key in (key for key in DISTANCES if key in first):
        columns = zip(*(interval(one, key) for one in sets), strict=True)
        row |= dict(zip([key + end for end in ENDS], mean_interval(*columns), strict=True))
        row[f"{key}_floor"] = first.get(f"{key}_floor")
    return row


def mean_interval(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent estimates, and its interval from theirs: errors add up in squares."""
    values, low, high = (np.asarray(each, float) for each in (values, low, high))
    below, above = (np.sqrt(np.square(values - end).sum()) / len(values) for end in (low, high))
    return float(values.mean()), float(values.mean() - below), float(values.mean() + above)


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    """Value, low and high of a distance in a row."""
    return tuple(row[key + end] for end in ENDS)


def grouped(rows: Iterable[dict[str, Any]], by: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by what one of their columns says."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row)
    return groups


def picked(rows: Iterable[dict[str, Any]], settings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of these settings, in their order; of those that have one."""
    known = {setting_of(row): row for row in rows}
    return [known[setting_of(setting)] for setting in settings if setting_of(setting) in known]


def failures(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per setting that could not be sampled, and why."""
    failed = {setting_of(row): row["error"] for row in rows if "error" in row}
    return [dict(zip(SETTING, setting, strict=True)) | {"error": error} for setting, error in failed.items()]


def lines(rows: Iterable[dict[str, Any]], key: str, by: str = "solver") -> dict[str, tuple[list[int], np.ndarray]]:
    """Of every solver, or what `by` says: steps (K,), and distances with their intervals (K, 3)."""
    return {
        name: ([row["steps"] for row in group], np.array([interval(row, key) for row in group]))
        for name, group in grouped(rows, by).items()
    }


def points(
    rows: Iterable[dict[str, Any]], costs: Sequence[str], key: str
) -> dict[str, tuple[list[list[float]], list[float]]]:
    """Of every solver: costs (K, costs) and distances (K,)."""
    return {
        name: ([[row[cost] for cost in costs] for row in group], [row[key] for row in group])
        for name, group in grouped(rows, "solver").items()
    }


def grid(rows: Iterable[dict[str, Any]], settings: Sequence[dict[str, Any]], key: str, columns: int) -> np.ndarray:
    """A distance of settings in rows of `columns`; NaN where there is none."""
    known = {setting_of(row): row[key] for row in rows}
    return np.array([known.get(setting_of(setting), np.nan) for setting in settings]).reshape(-1, columns)


def pareto_front(cost: Sequence[float], value: Sequence[float]) -> np.ndarray:
    """Which settings (N,) no other one beats: by being no more costly and no further off, and less in one of them."""
    points = np.stack([np.asarray(cost, float), np.asarray(value, float)], 1)
    no_worse = (points[:, None] <= points).all(-1)  # [i, j]: i is no worse than j
    better = (points[:, None] < points).any(-1)
    return ~(no_worse & better).any(0)


def front(rows: Sequence[dict[str, Any]], cost: str, key: str) -> np.ndarray:
    """Cost and distance (n, 2) of the rows on the Pareto front."""
    points = np.array([[row[cost], row[key]] for row in rows])
    return points[pareto_front(*points.T)]


def fewest_within(steps: Sequence[int], low: Sequence[float], reference_high: float) -> int | None:
    """The fewest steps from which on the noise of the measurement explains what a setting is behind a reference by.

    That is, from which on the interval of the setting, whose lower end is `low`, reaches down to the reference's upper
    end; None where the most steps do not. Two 90 % intervals that just touch are of numbers that differ at about 2 %.
    """
    fewest = None
    for count, end in sorted(zip(steps, low, strict=True), reverse=True):
        if end > reference_high:
            break
        fewest = count
    return fewest


def fewest_steps(
    rows: Iterable[dict[str, Any]], reference: Mapping[str, Any], distances: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per solver and distance: `fewest_within`, and how many times cheaper that is than the reference."""
    found = []
    for (solver, group), key in itertools.product(grouped(rows, "solver").items(), distances):
        by_steps = {row["steps"]: row for row in group}
        low = [row[f"{key}_low"] for row in group]
        fewest = fewest_within(list(by_steps), low, reference[f"{key}_high"])
        row = {"solver": solver, "by": key.upper(), "fewest steps": fewest}
        for cost, title in (("evaluations", "evaluations saved"), ("seconds_per_image", "time saved")):
            row[title] = f"{reference[cost] / by_steps[fewest][cost]:.3g}-fold" if fewest else "–"
        found.append(row)
    return found


def shown(row: Mapping[str, Any], details: bool = False) -> dict[str, Any]:
    """A pooled row for a table; with the steps of the detail bands, if they are to be seen."""
    found = {"solver": row["solver"], "steps": row["steps"]}
    found |= {"detail steps": row["detail_steps"] or row["steps"]} if details else {}
    found |= {"network": row["evaluations"], "ms per image": 1000 * row["seconds_per_image"]}
    for key in (key for key in DISTANCES if key in row):
        found |= {key.upper(): row[key], f"90 % of {key.upper()}": "{1:.3g} to {2:.3g}".format(*interval(row, key))}
    return found
