"""The files that say what became of a run: status.json, record.json and its lock; and the runs that are finished.

runs/<run>/record.json has the sha256 of everything that a run made, and of what it was made from:

    {"data":     {"by": "01_prepare", "path": "data/<set>/manifest.json", "sha256": ..., "parameters": ..., "from": {}},
     "pipeline": {"by": "02_train", "path": "runs/x/pipeline", ..., "from": {"data": <sha256>}}, "samples": ...}

An entry without sha256 was begun and not finished. `taken` checks an entry before what it names is used.

Two commands never work on one run at a time, not even on machines that share the folder: its lock is a `flock` on
runs/.locks/<run>. The processes that a command starts inherit it; the system releases it when the last of them dies.
"""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from wddm.files import digest, read_json
from wddm.workbook.parameters import read_yaml

MAKERS = {"data": "01_prepare", "pipeline": "02_train", "samples": "03_sample", "metrics": "04_evaluate"}
PATIENCE = 1.0, 20.0  # seconds to wait for a lock: if its command is alive; if it is dead, for its processes to end


def read_status(folder: Path, mine: bool = False) -> dict[str, dict[str, Any]]:
    """status.json of reports/<run>/, brought up to date: "running" becomes "killed" if no process holds the run's lock
    or the caller does (`mine`); "ok" becomes "pending" if the notebook, in JupyterLab, has since changed its numbers.
    """
    status = {name: entry for name, entry in read_json(folder / "status.json").items() if isinstance(entry, dict)}
    running = [entry for entry in status.values() if entry.get("state") == "running"]
    if running and (mine or not is_locked(folder.absolute().parents[1], folder.name)):
        for entry in running:
            entry.update(state="killed", error="the process is gone")
    of = read_json(folder.absolute().parents[1] / "runs" / folder.name / "numbers.json")
    for name, entry in ((name, entry) for name, entry in status.items() if entry.get("state") == "ok"):
        for kind, own in entry.get("recorded", {}).items():
            numbers = read_json(folder / f"{kind}.json")
            if any(numbers.get(key) != x and of.get(f"{kind}/{key}", name) == name for key, x in own.items()):
                entry["state"] = "pending"
    return status


def lock(root: Path, run: str, patience: float = 0.0) -> int:
    """Lock a run; returns a file descriptor. Closing it, or dying, releases the lock. ValueError: others keep it."""
    path = root / "runs" / ".locks" / run
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, began = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = path.read_text()
        if time.monotonic() - began > max(patience, PATIENCE[not _is_alive(holder)]):
            os.close(descriptor)
            remedy = "wait for it to end, or choose another name with -p run=..."
            raise ValueError(f"run {run!r} is under way (process {holder or 'unknown'}): {remedy}")
        time.sleep(0.05)
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


def is_locked(root: Path, run: str) -> bool:
    """Whether a command, or a process that a command has started, works on this run."""
    try:
        with (root / "runs" / ".locks" / run).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _is_alive(holder: str) -> bool:
    pid, _, machine = holder.partition(" on ")
    try:
        os.kill(int(pid), 0)
    except (ValueError, OSError) as error:
        return isinstance(error, PermissionError)  # alive, but another user's
    return machine in ("", socket.gethostname())  # processes of another machine are not known here


def read_record(root: Path, run: str) -> dict[str, dict[str, Any]]:
    """name -> entry of record.json: what a run has begun or made so far."""
    entries, needed = read_json(root / "runs" / run / "record.json"), {"by", "parameters", "from"}
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict) and entry.keys() >= needed}


def prepared_set(root: Path, run: str) -> dict[str, str | None]:
    """{"data": the folder, relative to the root, of the prepared set that a run has made, or None}."""
    path = read_record(root, run).get("data", {}).get("path")
    return {"data": path and str(Path(path).parent)}


def taken(root: Path, run: str, name: str) -> dict[str, Any]:
    """The entry of what a run made; ValueError if it is unfinished, changed, or not made from what the run has now."""
    entry, maker = read_record(root, run).get(name), MAKERS.get(name, name)
    remedy = f"run {maker} of this run again"
    if entry is None:
        raise ValueError(f"got no {name} of run {run!r}, wanted it made and recorded: run {maker} of this run first")
    if "sha256" not in entry:
        raise ValueError(f"got {name} of run {run!r} begun and not finished, wanted it whole: {remedy}, it goes on")
    for source, before in entry["from"].items():
        if (now := taken(root, run, source))["sha256"] != before:
            raise ValueError(f"got {entry['path']}, made before {now['path']} changed, wanted one made of it: {remedy}")
    if entry["sha256"] not in (None, digest(root / entry["path"])):
        raise ValueError(f"got {entry['path']}, which is not what {entry['by']} left there, wanted that: {remedy}")
    return entry


@dataclass(frozen=True)
class Finished:
    """A run that ended ok. Runs of one `variant` (what a sweep chose, see `variants`) differ in their seeds alone."""

    name: str
    variant: str
    parameters: dict[str, Any]
    metrics: dict[str, float | None]
    timings: dict[str, float | None]


def collect(root: Path, runs: list[str]) -> tuple[list[Finished], list[str]]:
    """The finished runs in reports/ of these names or patterns with `*`, in that order; and the names without any.

    ValueError: no run matches; or a run has changed since its numbers were computed.
    """
    folders = [file.parent for file in sorted((root / "reports").glob("*/metrics.json"))]
    matches = {one: [path for path in folders if fnmatchcase(path.name, one) and _is_finished(path)] for one in runs}
    found = {path.name: path for paths in matches.values() for path in paths}
    if not found:
        raise ValueError(f"got no finished runs like {', '.join(runs)} in reports/, wanted some: run the sweep first")
    by_name, rows = variants(found), []
    for name, folder in found.items():
        record, parameters, states = read_record(root, name), read_yaml(folder / "params.yaml"), read_status(folder)
        if "metrics" in record:
            taken(root, name, "metrics")
        for entry in (one for one in record.values() if one["by"] in states):
            if other := [f"{k} {v}" for k, v in entry["parameters"].items() if parameters.get(k, v) != v]:
                got = f"got {name}, whose {entry['by']} ran again with {', '.join(other)}"
                raise ValueError(f"{got}, wanted it as in its params.yaml: run its YAML again")
        numbers = (read_json(folder / f"{kind}.json") for kind in ("metrics", "timings"))
        rows.append(Finished(name, by_name[name], parameters, *numbers))
    return rows, [pattern for pattern, paths in matches.items() if not paths]


def _is_finished(folder: Path) -> bool:
    return all(one.get("state") == "ok" for one in read_status(folder).values()) and (folder / "params.yaml").exists()


def variants(names: Iterable[str]) -> dict[str, str]:
    """run -> what its sweep chose, without the seed: x-level=2-seed=0 -> level 2; with several sweeps, x, level 2."""
    parts = {name: re.split(r"-(?=\w+=)", name) for name in names}
    several, found = len({base for name, (base, *_) in parts.items() if "=" in name}) > 1, {}
    for name, (base, *chosen) in parts.items():
        chosen = [one.replace("=", " ", 1) for one in chosen if not one.startswith("seed=")]
        found[name] = ", ".join([base] * (several or not chosen) + chosen)
    return found
