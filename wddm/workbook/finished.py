"""Finished runs, as notebooks that compare them see them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wddm.workbook.records import digests, read_json, read_record, read_status, taken


@dataclass(frozen=True)
class Finished:
    """A run that ended ok: its resolved parameters and its numbers.

    Runs of one `variant` differ in their seeds alone; it is named by what a sweep chose, or by the run.
    """

    name: str
    variant: str
    parameters: dict[str, Any]
    metrics: dict[str, float | None]
    timings: dict[str, float | None]


def collect(root: Path, runs: list[str]) -> tuple[list[Finished], list[str]]:
    """The finished runs of reports/, given by names or patterns with `*`, in that order; and names of none.

    Raises:
        ValueError: there are no finished ones; or what one of them made is not what its numbers were computed from.
    """
    import yaml

    found: dict[str, Path] = {}
    absent = []
    for pattern in runs:
        folders = [path for path in sorted((root / "reports").glob(pattern)) if _is_finished(path)]
        found |= {path.name: path for path in folders}
        absent += [pattern] * (not folders)
    if not found:
        raise ValueError(f"got no finished runs like {', '.join(runs)} in reports/, wanted some: run the sweep first")
    bases, known = {name.split("=")[0].rpartition("-")[0] for name in found if "=" in name}, digests(root)
    rows = []
    for name, folder in found.items():
        if "metrics" in read_record(root, name):
            taken(root, name, "metrics", known)
        parameters = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        metrics, timings = (read_json(folder / f"{kind}.json") for kind in ("metrics", "timings"))
        rows.append(Finished(name, _variant(name, several=len(bases) > 1), parameters, metrics, timings))
    known.save()
    return rows, absent


def run_data_folder(root: Path, run: str) -> Path:
    """The prepared set that a run used; ValueError if it is not there any more, or changed."""
    return (root / taken(root, run, "data", digests(root))["path"]).parent


def _is_finished(folder: Path) -> bool:
    states = {entry["state"] for entry in read_status(folder).values()}
    return states <= {"ok"} and (folder / "metrics.json").exists() and (folder / "params.yaml").exists()


def _variant(name: str, several: bool) -> str:
    """x-level=2-seed=0 -> level 2; with the x if there are `several`."""
    base, *chosen = re.split(r"-(?=\w+=)", name)
    kept = [one.replace("=", " ", 1) for one in chosen if not one.startswith("seed=")]
    return ", ".join([base] * (several or not kept) + kept)
