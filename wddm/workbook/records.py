"""The files that say what became of a run: JSON written whole, status.json, record.json, its lock, and finished runs.

runs/<run>/record.json says of everything that a run made what it was made from, by content:

    {"data":     {"by": "01_prepare", "path": "data/<set>/manifest.json", "sha256": ..., "parameters": ..., "from": {}},
     "pipeline": {"by": "02_train", "path": "runs/x/pipeline", ..., "from": {"data": <sha256>}}, "samples": ...}

An entry without sha256 was begun and not finished. Whoever takes something checks it: `taken`.

Two commands never work on one run at a time, on machines that share the folder neither: its lock is `flock` on
runs/.locks/<run>, which the processes that a command starts inherit, and the system releases when the last one dies.
"""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wddm.files import digest, read_json
from wddm.workbook.parameters import read_yaml

MAKERS = {"data": "01_prepare", "pipeline": "02_train", "samples": "03_sample", "metrics": "04_evaluate"}
PATIENCE = 1.0, 20.0  # seconds to wait for a lock; and where its command is dead, for what that has started to end


def read_status(folder: Path, mine: bool = False) -> dict[str, dict[str, Any]]:
    """status.json of reports/<run>/; what is said to run while no process holds the run's lock, or this one (`mine`),
    was killed, and what was ok while another hand, in JupyterLab, has replaced its numbers is due again.
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
    """The lock of a run as a file descriptor: to close it, or to die, releases it. ValueError: others keep it."""
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
    """Whether a command works on this run, or something that one has started."""
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
        return isinstance(error, PermissionError)  # someone else's
    return machine in ("", socket.gethostname())  # of another one nobody knows


def read_record(root: Path, run: str) -> dict[str, dict[str, Any]]:
    """What a run has made so far."""
    entries, needed = read_json(root / "runs" / run / "record.json"), {"by", "parameters", "from"}
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict) and entry.keys() >= needed}


def prepared_set(root: Path, run: str) -> dict[str, str | None]:
    """{"data": the folder of the prepared set that a run has made, if it has}, relative to the root."""
    path = read_record(root, run).get("data", {}).get("path")
    return {"data": path and str(Path(path).parent)}


def taken(root: Path, run: str, name: str) -> dict[str, Any]:
    """What a run made, if it is finished, unchanged, and made from what the run holds now; else ValueError."""
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
    """A run that ended ok; those of one `variant` (what a sweep chose, or the run) differ in their seeds alone."""

    name: str
    variant: str
    parameters: dict[str, Any]
    metrics: dict[str, float | None]
    timings: dict[str, float | None]


def collect(root: Path, runs: list[str]) -> tuple[list[Finished], list[str]]:
    """The finished runs of reports/, given by names or patterns with `*`, in that order; and names of none.

    ValueError: there are no finished ones; or what one of them made is not what its numbers were computed from.
    """
    matches = {pattern: list(filter(_is_finished, sorted((root / "reports").glob(pattern)))) for pattern in runs}
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


def run_data_folder(root: Path, run: str) -> Path:
    """The prepared set that a run used; ValueError if it is not there any more, or changed."""
    return (root / taken(root, run, "data")["path"]).parent


def _is_finished(folder: Path) -> bool:
    states = {entry.get("state") for entry in read_status(folder).values()}
    return states <= {"ok"} and (folder / "metrics.json").exists() and (folder / "params.yaml").exists()


def variants(names: Iterable[str]) -> dict[str, str]:
    """By run, what its sweep chose but the seed: x-level=2-seed=0 -> level 2, or x, level 2 if sweeps are several."""
    parts = {name: re.split(r"-(?=\w+=)", name) for name in names}
    several, found = len({base for name, (base, *_) in parts.items() if "=" in name}) > 1, {}
    for name, (base, *chosen) in parts.items():
        chosen = [one.replace("=", " ", 1) for one in chosen if not one.startswith("seed=")]
        found[name] = ", ".join([base] * (several or not chosen) + chosen)
    return found
