"""The files of a run in reports/: text and JSON, whole or not there, and what they say of its state and results."""

import json
import os
import re
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


def collect(root: Path, pattern: str) -> list[dict]:
    """A row per run of reports/<pattern>: metrics, timings, what a sweep chose (from the name), and its `variant`.

    The variant is what a sweep chose but for the seed.
    """
    rows = []
    for folder in sorted((root / "reports").glob(pattern)):
        if metrics := read_json(folder / "metrics.json"):
            chosen = dict(re.findall(r"(?<=-)(\w+)=(.*?)(?=-\w+=|$)", folder.name))
            variant = ", ".join(f"{key} {value}" for key, value in chosen.items() if key != "seed") or folder.name
            found = metrics | read_json(folder / "timings.json")
            rows.append({"run": folder.name, "variant": variant, **chosen, **found})
    if not rows:
        raise ValueError(f"got no finished runs like reports/{pattern}, wanted some: run the sweep first")
    return rows


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
