"""Runs experiments: which notebooks, in which order, whether they have to, and what became of them.

status.json of reports/<run>/ is written before and after each launch, here and nowhere else:
{"02_train": {"state", "seconds", "error", "started", "pid", "fingerprint", "recorded", "outputs", "opened"}, ...},
where state is pending, running, ok, failed or killed.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from wddm.workbook import kernel, lock, provenance
from wddm.workbook.experiments import Experiment, pipeline_notebooks
from wddm.workbook.records import digests, read_json, read_record, read_status, write_json, write_text
from wddm.workbook.report import format_seconds, render, write_index

RECORDS = ("metrics", "timings")  # the .json files that notebooks write into
WATCH = "__import__('wddm.workbook.provenance', fromlist=['watch']).watch({!r}, {!r}, {!r})"


def run(
    experiments: list[Experiment],
    *,
    only: str | None = None,
    start: str | None = None,
    force: bool = False,
    jobs: int = 1,
    preflight: Callable[[Experiment], None] | None = None,
    held: int | None = None,
) -> int:
    """Run every experiment, `jobs` at a time, and then the summaries; one that fails does not stop the others.

    `only` and `start` choose notebooks by name, with or without the number; the summary's come after those of the
    sweep. `preflight(experiment)` may refuse, by ValueError, one of which something is going to run; nothing has run
    then. `held`: the lock of the run, where the process that started this one has it. Returns 0 ok, 1 a notebook
    failed, 130 interrupted.
    """
    names = [experiment.run for experiment in experiments]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"run: two experiments are called {twins[0]!r}; give each its own name")
    chosen = _choose(experiments, only, start)
    tasks = [Task(one, chosen[one.source], only, start, force) for one in experiments]
    tasks = [task for task in tasks if task.chosen]
    members, summaries = ([task for task in tasks if task.experiment.is_summary is kind] for kind in (False, True))
    with contextlib.ExitStack() as locks:
        for task in tasks:
            task.lock = lock.acquire(task.root, task.experiment.run) if held is None else held
            locks.callback(os.close, task.lock)
        problems = dict.fromkeys(line for task in tasks for line in task.problems(preflight))
        if problems:
            raise ValueError("\n".join(problems))
        stop = locks.enter_context(kernel.stop_on_signals())
        if jobs > 1 and len(members) > 1:
            with ThreadPoolExecutor(jobs) as pool:
                codes = list(pool.map(lambda task: _run_as_process(task, stop), members))
        else:
            codes = [task.run(stop) for task in members if not stop.requested]
        codes += [task.run(stop) for task in summaries if not stop.requested]
        write_index(experiments[0].root)
    return 130 if stop.requested else max(codes)


class Task:
    """One experiment with the notebooks chosen from it, the lock on its run, and the record of it."""

    def __init__(
        self, experiment: Experiment, chosen: list[Path], only: str | None, start: str | None, force: bool
    ) -> None:
        self.experiment, self.only, self.start, self.force = experiment, only, start, force
        self.root, self.folder = experiment.root, experiment.root / "reports" / experiment.run
        self.chosen = [notebook for notebook in experiment.notebooks if notebook in chosen]
        self.status, self.known, self.lock = read_status(self.folder), digests(self.root), -1

    def problems(self, preflight: Callable[[Experiment], None] | None) -> list[str]:
        """Why it cannot run: what earlier notebooks made is of other parameters, or `preflight` refuses it."""
        found = self.stale()
        if preflight and not found and not all(self.is_current(notebook) for notebook in self.chosen):
            try:
                preflight(self.experiment)
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
            before, now = entry["parameters"], self.experiment.values(notebook)
            why = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name])
            if why or "sha256" not in entry:
                got = f"ran with other parameters ({why})" if why else "was begun and is not finished"
                found.append(
                    f"run {self.experiment.run!r}: {notebook.stem} {got}: let it run too (without --only and --from)"
                    + ", or set them back" * bool(why)
                )
        return found

    def is_current(self, notebook: Path) -> bool:
        """Whether the notebook last ended ok, and what it depends on and what it made are as they were then."""
        entry, name = self.status.get(notebook.stem, {}), notebook.stem
        return (
            not self.force
            and entry.get("state") == "ok"
            and (self.folder / f"{name}.html").exists()
            and entry.get("fingerprint") == provenance.fingerprint(self.experiment, notebook, self.known)
            and entry.get("outputs") == provenance.outputs(self.experiment, notebook, self.known)
            and all(numbers.items() <= self.recorded()[kind].items() for kind, numbers in entry["recorded"].items())
            and all(self.known.of(self.root / path) == digest for path, digest in entry.get("opened", {}).items())
        )

    def run(self, stop: kernel.Stop) -> int:
        """Run the chosen notebooks, in order, up to the first that does not end ok."""
        print(f"{self.experiment.source} -> reports/{self.experiment.run}/", flush=True)
        write_parameters(self.experiment, self.folder / "params.yaml")
        notebooks = self.experiment.notebooks
        self.set_pending(
            notebook
            for notebook in notebooks
            if notebook.stem not in self.status
            or (notebook in self.chosen and self.status[notebook.stem]["state"] != "ok")
        )
        for position, notebook in enumerate(self.chosen):
            label = f"[{notebooks.index(notebook) + 1}/{len(notebooks)}] {notebook.stem}"
            if self.is_current(notebook):
                print(f"{label} unchanged, skipped", flush=True)
                continue
            print(f"{label} ...", flush=True)
            state = self.launch(notebook, stop)
            if state != "ok" or stop.requested:
                self.set_pending(later for later in self.chosen[position + 1 :] if not self.is_current(later))
                return 1
        return 0

    def launch(self, notebook: Path, stop: kernel.Stop) -> str:
        """Execute and render one notebook; returns the state that it ended in."""
        name, began = notebook.stem, time.monotonic()
        environment = provenance.environment(self.root, self.experiment.parameters.get("seed"))
        write_json(self.folder / "environment.json", environment)
        self.set_pending([notebook])
        before = self.recorded()
        self.update(
            name,
            state="running",
            pid=os.getpid(),
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            fingerprint=provenance.fingerprint(self.experiment, notebook, self.known),
        )
        log = self.root / "runs" / self.experiment.run / f".{name}.opened"
        log.parent.mkdir(parents=True, exist_ok=True)
        job = kernel.Job(
            notebook.relative_to(self.root),
            (self.folder / f"{name}.ipynb").relative_to(self.root),
            self.experiment.values(notebook),
            first=WATCH.format(str(log), str(self.root), self.experiment.run),
            held=(self.lock,),
        )
        with contextlib.chdir(self.root):
            state, error = kernel.execute(job, stop)
        seconds, opened = round(time.monotonic() - began, 2), provenance.opened(log)
        self.update(
            name,
            state=state,
            error=error,
            seconds=seconds,
            recorded={
                kind: {key: number for key, number in numbers.items() if key not in before[kind]}
                for kind, numbers in self.recorded().items()
            },
            outputs=provenance.outputs(self.experiment, notebook, self.known),
            opened=provenance.hashes(self.root, opened, self.known) if state == "ok" else {},
        )
        self.known.save()
        try:
            page = render(self.folder, name).relative_to(self.root)
        except Exception as problem:  # hours of training outlive a page that cannot be drawn
            page = f"none, {problem!r}"
        if state != "ok":
            print(f"{name} {state}: {error}  (report: {page})", flush=True)
        else:
            print(f"ok in {format_seconds(seconds)}", flush=True)
        return state

    def update(self, name: str, **entry: Any) -> None:
        self.status[name] = self.status.get(name, {}) | entry
        write_json(self.folder / "status.json", self.status)
        write_index(self.root)

    def set_pending(self, notebooks: Iterable[Path]) -> None:
        """Notebooks that have yet to run: numbers that they recorded for other parameters are removed."""
        for notebook in list(notebooks):
            for kind, keys in self.status.get(notebook.stem, {}).get("recorded", {}).items():
                numbers = read_json(self.folder / f"{kind}.json")
                write_json(
                    self.folder / f"{kind}.json",
                    {key: number for key, number in numbers.items() if key not in keys},
                )
            self.status[notebook.stem] = {"state": "pending", "seconds": None, "error": None}
        write_json(self.folder / "status.json", self.status)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The numbers in metrics.json and timings.json."""
        return {kind: read_json(self.folder / f"{kind}.json") for kind in RECORDS}


def write_parameters(experiment: Experiment, path: Path) -> None:
    """All parameters of a run as a YAML that `wddm run` accepts."""
    import yaml

    content = dict(experiment.parameters)
    if experiment.notebooks != pipeline_notebooks(experiment.root):
        folder = experiment.root / "notebooks"
        content["notebooks"] = [
            notebook.relative_to(folder).with_suffix("").as_posix() for notebook in experiment.notebooks
        ]
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _choose(experiments: list[Experiment], only: str | None, start: str | None) -> dict[Path, list[Path]]:
    """Of every YAML the notebooks that --only and --from leave, given as 02_train or train."""
    chosen = {}
    for experiment in experiments:  # a summary comes last
        known = chosen.setdefault(experiment.source, [])
        known += [notebook for notebook in experiment.notebooks if notebook not in known]
    for source, notebooks in chosen.items():
        for name in filter(None, (only, start)):
            found = [notebook for notebook in notebooks if name in (notebook.stem, re.sub(r"^\d+_", "", notebook.stem))]
            if not found:
                known = ", ".join(notebook.stem for notebook in notebooks)
                raise ValueError(f"there is no notebook {name!r} in this run; known: {known}")
            left = chosen[source]
            chosen[source] = found if name is only else left[left.index(found[0]) :] if found[0] in left else []
    return chosen


def _run_as_process(task: Task, stop: kernel.Stop) -> int:
    """Run a task by `wddm run` in a process of its own, its lines marked with the run's name.

    It inherits the lock of its run, and stops gently when its standard input ends, as it does when this process dies.
    """
    if stop.requested:
        return 130
    name, parameters = task.experiment.run, task.folder / "params.yaml"
    write_parameters(task.experiment, parameters)
    options = {"--only": task.only, "--from": task.start}
    command = [
        sys.executable,
        "-m",
        "wddm",
        "run",
        str(parameters.relative_to(task.root)),
        f"--held={task.lock}",
        *["--force"] * task.force,
        *(word for option, value in options.items() if value for word in (option, value)),
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(
        command, cwd=task.root, start_new_session=True, pass_fds=(task.lock,), **pipes
    ) as process:

        def listener(kill: bool) -> None:
            process.send_signal(signal.SIGINT)  # it knows itself what a second one means

        stop.listeners.add(listener)
        for line in io.TextIOWrapper(process.stdout, newline="\n"):
            print(f"{name} | {line.rstrip().rpartition(chr(13))[2]}", flush=True)
        stop.listeners.discard(listener)
    return process.returncode
