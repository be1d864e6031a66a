"""The files of a run in reports/: text and JSON, whole or not there, and what they say of its state and results."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wddm.files import whole


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step; a reader never sees half of it."""
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> dict:
    """The content of a JSON file; {} when there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


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

    ValueError if there are no finished ones.
    """
    import yaml

    found, absent = {}, []
    for pattern in runs:
        folders = [path for path in sorted((root / "reports").glob(pattern)) if _is_finished(path)]
        found |= {path.name: path for path in folders}
        absent += [pattern] * (not folders)
    if not found:
        raise ValueError(f"got no finished runs like {', '.join(runs)} in reports/, wanted some: run the sweep first")
    bases = {name.split("=")[0].rpartition("-")[0] for name in found if "=" in name}
    rows = []
    for name, folder in found.items():
        parameters = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        numbers = (read_json(folder / f"{kind}.json") for kind in ("metrics", "timings"))
        rows.append(Finished(name, _variant(name, several=len(bases) > 1), parameters, *numbers))
    return rows, absent


def _is_finished(folder: Path) -> bool:
    states = {entry["state"] for entry in read_status(folder).values()}
    return states <= {"ok"} and (folder / "metrics.json").exists() and (folder / "params.yaml").exists()


def _variant(name: str, several: bool) -> str:
    """x-level=2-seed=0 -> level 2; with the x if there are `several`."""
    base, *chosen = re.split(r"-(?=\w+=)", name)
    kept = [one.replace("=", " ", 1) for one in chosen if not one.startswith("seed=")]
    return ", ".join([base] * (several or not kept) + kept)


def read_status(folder: Path) -> dict[str, dict]:
    """status.json of a run; what is said to run but has no living process was killed."""
    status = read_json(folder / "status.json")
    for entry in status.values():
        if entry["state"] == "running" and not _is_alive(entry.get("pid")):
            entry.update(state="killed", error="the process is gone")
    return status


def _is_alive(pid: int | None) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError):
        return False
    except PermissionError:
        pass  # someone else's
    return True
