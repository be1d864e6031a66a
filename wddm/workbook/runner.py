"""Runs experiments: which notebooks, in which order, whether they have to, and what became of them.

status.json of reports/<run>/ is written before and after each launch, here and nowhere else:
{"02_train": {"state", "seconds", "error", "started", "pid", "fingerprint", "recorded", "outputs", "opened"}, ...},
where state is pending, running, ok, failed or killed.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from wddm.workbook import cluster, kernel, provenance
from wddm.workbook.experiments import Experiment
from wddm.workbook.records import digests, lock, read_json, read_record, read_status, write_json, write_text
from wddm.workbook.report import format_seconds, render, write_index

Preflight = Callable[[Experiment], None] | None
RECORDS = ("metrics", "timings")  # the .json files that notebooks write into
WATCH = "__import__('wddm.workbook.provenance', fromlist=['watch']).watch({!r}, {!r}, {!r})"


def run(
    experiments: list[Experiment], *, only: str | None = None, start: str | None = None, force: bool = False,
    jobs: int = 1, cluster: str | None = None, preflight: Preflight = None, held: int | None = None,
) -> int:  # fmt: skip
    """Run every experiment, `jobs` at a time, and then the summaries; one that fails does not stop the others.

    `only` and `start` choose notebooks by name, with or without the number. `preflight(experiment)` may refuse, by
    ValueError, one of which something is going to run, before anything has. `cluster`: see `cluster.connect`. `held`:
    the lock, where the process that started this one has it. Returns 0 ok, 1 a notebook failed, 130 interrupted.
    """
    names = [experiment.run for experiment in experiments]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"run: two experiments are called {twins[0]!r}; give each its own name")
    chosen = _choose(experiments, only, start)
    options = [f"--{key}={value}" for key, value in (("only", only), ("from", start)) if value] + ["--force"] * force
    tasks = [Task(one, chosen[one.source], options) for one in experiments]
    if not (tasks := [task for task in tasks if task.chosen]):
        raise ValueError(f"got --only {only} and --from {start}, which leave no notebook to run: give one of them")
    try:
        return _run(tasks, jobs, cluster, preflight, held)
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | FileNotFoundError):
            raise
        place = error.filename or experiments[0].root
        remedy = "make room, or make it writable, and run it again: what is finished stays"
        raise ValueError(f"got {place}, which cannot be written ({error.strerror or error}): {remedy}") from None


def _run(tasks: list["Task"], jobs: int, where: str | None, preflight: Preflight, held: int | None) -> int:
    members, summaries = ([task for task in tasks if task.experiment.is_summary is kind] for kind in (False, True))
    with contextlib.ExitStack() as locks:
        for task in tasks:
            task.lock = held or lock(task.root, "." * bool(where and task in members) + task.experiment.run)
            locks.callback(os.close, task.lock)
        problems = dict.fromkeys(line for task in tasks for line in task.problems(preflight))
        if problems:
            raise ValueError("\n".join(problems))
        write_index(tasks[0].root)
        stop = locks.enter_context(kernel.stop_on_signals())
        if where and members:
            codes = cluster.run_by_dask([task.member() for task in members], where, jobs, stop)
        elif jobs > 1 and len(members) > 1:
            codes = cluster.run_beside([task.member() for task in members], jobs, stop)
        else:
            codes = [task.run(stop) for task in members if not stop.requested]
        codes += [task.run(stop) for task in summaries if not stop.requested]
        write_index(tasks[0].root)
    return 130 if stop.requested else max(codes)


class Task:
    """One experiment with the notebooks chosen from it, the lock on its run, and the record of it."""

    def __init__(self, experiment: Experiment, chosen: list[Path], options: list[str]) -> None:
        self.experiment, self.options, self.force = experiment, options, "--force" in options
        self.root, self.folder = experiment.root, experiment.root / "reports" / experiment.run
        self.chosen = [notebook for notebook in experiment.notebooks if notebook in chosen]
        self.status, self.known, self.lock = read_status(self.folder), digests(self.root), -1

    def problems(self, preflight: Preflight) -> list[str]:
        """Why it cannot run: what earlier notebooks made is of other parameters, or `preflight` refuses it."""
        found = self.stale()
        if preflight and not found and not all(map(self.is_current, self.chosen)):
            try:
                preflight(self.experiment.until(self.chosen[-1]))
            except ValueError as error:
                found = [f"{self.experiment.source}: {line}" for line in str(error).splitlines()]
        self.known.save()
        return found

    def stale(self) -> list[str]:
        """What notebooks that are left out have not finished, or made with other parameters, a line each."""
        made, found = {entry["by"]: entry for entry in read_record(self.root, self.experiment.run).values()}, []
        notebooks = self.experiment.notebooks
        for notebook in notebooks[: notebooks.index(self.chosen[0])]:
            if (entry := made.get(notebook.stem)) is None:
                continue  # the notebook that wants it says so
            then, now = entry["parameters"], self.experiment.values(notebook)
            why = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name])
            if why:
                got, remedy = f"ran with other parameters ({why})", ", or set them back"
            elif "sha256" not in entry:
                got, remedy = "was begun and is not finished", ""
            else:
                continue
            remedy = "let it run too (without --only and --from)" + remedy
            found.append(f"run {self.experiment.run!r}: {notebook.stem} {got}: {remedy}")
        return found

    def is_current(self, notebook: Path) -> bool:
        """Whether the notebook last ended ok, and what it depends on and what it made are as they were then."""
        entry, name, numbers = self.status.get(notebook.stem, {}), notebook.stem, self.recorded()
        return (
            not self.force
            and entry.get("state") == "ok"
            and (self.folder / f"{name}.html").exists()
            and entry.get("fingerprint") == provenance.fingerprint(self.experiment, notebook, self.known)
            and entry.get("outputs") == provenance.outputs(self.experiment, notebook, self.known)
            and all(own.items() <= numbers[kind].items() for kind, own in entry["recorded"].items())
            and all(self.known.of(self.root / path) == digest for path, digest in entry.get("opened", {}).items())
        )

    def member(self) -> cluster.Member:
        """What a process of its own is started with."""
        return cluster.Member(self.experiment, self.options, self.lock)

    def run(self, stop: kernel.Stop) -> int:
        """Run the chosen notebooks, in order, up to the first that does not end ok."""
        print(f"{self.experiment.source} -> reports/{self.experiment.run}/", flush=True)
        write_text(self.folder / "params.yaml", self.experiment.as_yaml())
        notebooks, status = self.experiment.notebooks, self.status
        self.set_pending(
            one for one in notebooks
            if one.stem not in status or (one in self.chosen and status[one.stem].get("state") != "ok")
        )  # fmt: skip
        for position, notebook in enumerate(self.chosen):
            label = f"[{notebooks.index(notebook) + 1}/{len(notebooks)}] {notebook.stem}"
            if self.is_current(notebook):
                print(f"{label} unchanged, skipped", flush=True)
                continue
            print(f"{label} ...", flush=True)
            if self.launch(notebook, stop) != "ok" or stop.requested:
                self.set_pending(later for later in self.chosen[position + 1 :] if not self.is_current(later))
                return 1
        return 0

    def launch(self, notebook: Path, stop: kernel.Stop) -> str:
        """Execute and render one notebook; returns the state that it ended in."""
        name, began, run = notebook.stem, time.monotonic(), self.experiment.run
        environment = provenance.environment(self.root, self.experiment.parameters.get("seed"))
        write_json(self.folder / "environment.json", environment)
        self.set_pending([notebook])
        before = self.recorded()
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        made_of = provenance.fingerprint(self.experiment, notebook, self.known)
        self.update(name, state="running", pid=os.getpid(), started=started, fingerprint=made_of)
        log = self.root / "runs" / run / f".{name}.opened"
        log.parent.mkdir(parents=True, exist_ok=True)
        source, target = notebook.relative_to(self.root), Path("reports", run, f"{name}.ipynb")
        first = WATCH.format(str(log), str(self.root), run)
        job = kernel.Job(source, target, self.experiment.values(notebook), first, held=(self.lock,))
        with contextlib.chdir(self.root):
            state, error = kernel.execute(job, stop)
        seconds, opened = round(time.monotonic() - began, 2), provenance.opened(log)
        entry: dict[str, Any] = {}
        if state == "ok":  # else there may be no time to read what it left
            entry["outputs"] = provenance.outputs(self.experiment, notebook, self.known)
            entry["opened"] = provenance.hashes(self.root, opened, self.known)
        entry["recorded"] = {
            kind: {key: number for key, number in numbers.items() if key not in before[kind]}
            for kind, numbers in self.recorded().items()
        }
        self.update(name, state=state, error=error, seconds=seconds, **entry)
        self.known.save()
        try:
            page = str(render(self.folder, name).relative_to(self.root))
        except Exception as problem:  # hours of training outlive a page that cannot be drawn
            page = f"none, {problem!r}"
        end = f"ok in {format_seconds(seconds)}" if state == "ok" else f"{name} {state}: {error}  (report: {page})"
        print(end, flush=True)
        return state

    def update(self, name: str, **entry: Any) -> None:
        self.status[name] = self.status.get(name, {}) | entry
        write_json(self.folder / "status.json", self.status)
        write_index(self.root)

    def set_pending(self, notebooks: Iterable[Path]) -> None:
        """Notebooks that have yet to run: numbers that they recorded for other parameters are removed."""
        for notebook in list(notebooks):
            for kind, keys in self.status.get(notebook.stem, {}).get("recorded", {}).items():
                numbers = self.recorded()[kind]
                write_json(self.folder / f"{kind}.json", {key: numbers[key] for key in numbers if key not in keys})
            self.status[notebook.stem] = {"state": "pending", "seconds": None, "error": None}
        write_json(self.folder / "status.json", self.status)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The numbers in metrics.json and timings.json."""
        return {kind: read_json(self.folder / f"{kind}.json") for kind in RECORDS}


def _choose(experiments: list[Experiment], only: str | None, start: str | None) -> dict[Path, list[Path]]:
    """Of every YAML the notebooks that --only and --from leave, given as 02_train or train."""
    chosen: dict[Path, list[Path]] = {}
    for experiment in experiments:  # a summary comes last
        known = chosen.setdefault(experiment.source, [])
        known += [notebook for notebook in experiment.notebooks if notebook not in known]
    for source, notebooks in chosen.items():
        for name in filter(None, (only, start)):
            found = [notebook for notebook in notebooks if name in (notebook.stem, re.sub(r"^\d+_", "", notebook.stem))]
            if not found:
                names = ", ".join(notebook.stem for notebook in notebooks)
                raise ValueError(f"there is no notebook {name!r} in this run; known: {names}")
            left = chosen[source]
            chosen[source] = found if name is only else left[left.index(found[0]) :] if found[0] in left else []
    return chosen
