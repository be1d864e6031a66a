"""Runs experiments: chooses the notebooks that have to run, runs them in order, and says what became of them.

status.json of reports/<run>/ is written before and after each launch, here and nowhere else:
{"02_train": {"state", "seconds", "error", "started", "pid", "commit", "device", "fingerprint", "recorded", "files"},
...}, where state is pending, running, ok, failed or killed.
"""

import contextlib
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from wddm.files import digest, read_json, write_json, write_text
from wddm.workbook import cluster, kernel, provenance
from wddm.workbook.experiments import Experiment
from wddm.workbook.parameters import read_yaml
from wddm.workbook.records import MAKERS, lock, read_record, read_status
from wddm.workbook.report import format_seconds, render, renew_headers, write_index

Preflight = Callable[[Experiment], None] | None
RECORDS = ("metrics", "timings")  # the .json files that notebooks write into
PENDING = {"state": "pending", "seconds": None, "error": None}
PACKAGE = str(Path(__file__).parents[2])  # a kernel imports wddm from here: the fingerprint is of this code
WATCH = f"__import__('sys').path.insert(0, {PACKAGE!r}); "
WATCH += "__import__('wddm.workbook.provenance', fromlist=['watch']).watch({!r}, {!r}, {!r})"


def run(
    experiments: list[Experiment], *, only: str | None = None, start: str | None = None, force: bool = False,
    jobs: int = 1, cluster: str | None = None, preflight: Preflight = None, held: int | None = None,
) -> int:  # fmt: skip
    """Run every experiment, `jobs` at a time, and then the summaries; one that fails does not stop the others.

    `only` and `start` choose notebooks by name, with or without the number. Before anything runs, `preflight` is called
    for every experiment that has a notebook to run; it refuses by ValueError. `cluster`: see `cluster.connect`. `held`:
    the run's lock, if a parent process has it. Returns 0 ok, 1 a notebook failed, 130 interrupted.
    """
    names = [experiment.run for experiment in experiments]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"run: two experiments are called {twins[0]!r}; give each its own name, no combination twice")
    chosen = _choose(experiments, only, start)
    options = [f"--{key}={value}" for key, value in (("only", only), ("from", start)) if value] + ["--force"] * force
    tasks = [Task(one, notebooks, options) for one, notebooks in zip(experiments, chosen, strict=True) if notebooks]
    if not tasks:
        raise ValueError(f"got --only {only} and --from {start}, which leave no notebook to run: give one of them")
    try:
        return _run(tasks, jobs, cluster, preflight, held)
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | FileNotFoundError):
            raise
        place = str(error.filename or experiments[0].root)[:200]
        remedy = "make room, or make it writable, and run it again: what is finished stays"
        raise ValueError(f"got {place}, which cannot be written ({error.strerror or error}): {remedy}") from None


def _run(tasks: list["Task"], jobs: int, where: str | None, preflight: Preflight, held: int | None) -> int:
    members, summaries = ([task for task in tasks if task.experiment.is_summary is kind] for kind in (False, True))
    with contextlib.ExitStack() as locks, contextlib.chdir(tasks[0].root):  # where relative paths in parameters start
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # 1,024, and a lock of each of 1,000 runs is a file
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        for task in tasks:
            task.lock = held or lock(task.root, "." * bool(where and task in members) + task.experiment.run)
            locks.callback(os.close, task.lock)
            task.status = read_status(task.folder, mine=True)
        if problems := dict.fromkeys(line for task in tasks for line in task.problems(preflight)):
            raise ValueError("\n".join(problems))
        write_index(tasks[0].root)
        stop = locks.enter_context(kernel.stop_on_signals())
        processes = [cluster.Member(task.experiment, task.options, task.lock) for task in members]
        if where and members:
            codes = cluster.run_by_dask(processes, where, jobs, stop)
        elif jobs > 1 and len(members) > 1:
            codes = cluster.run_beside(processes, jobs, stop)
        else:
            codes = [task.run(stop) for task in members if not stop.requested]
        codes += [task.run(stop) for task in summaries if not stop.requested]
        write_index(tasks[0].root)
    return 130 if stop.requested else max(codes)


class Task:
    """One experiment, the notebooks of it that were chosen, the lock on its run, and its status.json."""

    def __init__(self, experiment: Experiment, chosen: list[Path], options: list[str]) -> None:
        self.experiment, self.options, self.force = experiment, options, "--force" in options
        self.root, self.folder = experiment.root, experiment.root / "reports" / experiment.run
        self.chosen, self.lock, self.status = chosen, -1, dict[str, dict[str, Any]]()

    def problems(self, preflight: Preflight) -> list[str]:
        """Why it cannot run, a line each: see `stale`, or what `preflight` refuses."""
        notebooks = self.experiment.notebooks
        found = list(self.stale(*notebooks[: notebooks.index(self.chosen[0])]))
        if preflight and not found and not all(map(self.is_current, self.chosen)):
            try:
                preflight(self.experiment.until(self.chosen[-1]))
            except ValueError as error:
                found = [f"{self.experiment.source}: {line}" for line in str(error).splitlines()]
        return found

    def stale(self, *notebooks: Path) -> Iterator[str]:
        """A line for each of these notebooks that, by the record, has not finished or ran with other parameters."""
        made = {entry["by"]: entry for entry in read_record(self.root, self.experiment.run).values()}
        for notebook in notebooks:
            now = self.experiment.values(notebook)
            entry = made.get(notebook.stem, {"parameters": now, "sha256": None})  # no entry: who needs it says so
            then = entry["parameters"]
            why = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name])
            if why or "sha256" not in entry:
                got = f"ran with other parameters ({why})" if why else "was begun and is not finished"
                remedy = "let it run too (without --only and --from)" + ", or set them back" * bool(why)
                yield f"run {self.experiment.run!r}: {notebook.stem} {got}: {remedy}"

    def is_current(self, notebook: Path) -> bool:
        """Whether the notebook last ended ok, and all that it read and made is as it was then; False with --force."""
        entry, name = self.status.get(notebook.stem, {}), notebook.stem
        made = provenance.hashes(self.root, provenance.outputs(self.experiment, notebook))
        return (
            not self.force
            and entry.get("state") == "ok"
            and not any(self.stale(notebook))  # begun or made again since, in JupyterLab for example
            and (self.folder / f"{name}.html").exists()
            and entry.get("fingerprint") == provenance.fingerprint(self.experiment, notebook)
            and made.items() <= entry["files"].items()
            and all(digest(self.root / path) == before for path, before in entry["files"].items())
        )

    def run(self, stop: kernel.Stop) -> int:
        """Run the chosen notebooks up to one that is not ok; what is then out of date is pending. Returns 0 or 1."""
        print(f"{self.experiment.source} -> reports/{self.experiment.run}/", flush=True)
        if not self.status and any(self.folder.glob("*.md")):  # published: these numbers are of that run
            for kind in RECORDS:
                write_json(self.folder / f"{kind}.json", {})
        notebooks, values = self.experiment.notebooks, self.experiment.values
        ok = [name for name, one in self.status.items() if "files" in one]  # ended ok when last run here
        self.status = {one.stem: PENDING for one in notebooks} | self.status  # keeps numbers recorded in JupyterLab
        self.set_pending(*(one for one in self.chosen if one.stem not in ok))
        with contextlib.suppress(ValueError):  # params.yaml is missing or damaged
            before = read_yaml(file := self.folder / "params.yaml")
            others = [x for x in notebooks if any(before.get(k, v) != v for k, v in values(x).items())]
            self.set_pending(*(x for x in others if x.stem in ok and not self.is_current(x)))  # now, in case it dies
        write_text(file, self.experiment.as_yaml())
        for notebook in self.chosen:
            current = self.is_current(notebook)
            label = f"[{notebooks.index(notebook) + 1}/{len(notebooks)}] {notebook.stem}"
            print(label, "unchanged, skipped" if current else "...", flush=True)
            if failed := not current and (self.launch(notebook, stop) != "ok" or stop.requested):
                break
        self.force, later = self.force and failed, notebooks[notebooks.index(notebook) + 1 :]
        self.set_pending(*(x for x in later if x.stem in ok and not self.is_current(x)))
        self.set_pending(*self.broken())
        return int(failed)

    def broken(self) -> Iterator[Path]:
        """Notebooks, also of other YAMLs, whose results, by the record, were made from something replaced since."""
        record, gone = read_record(self.root, self.experiment.run), set[str]()
        for name in filter(record.__contains__, MAKERS):  # in the order of the notebooks
            made_of = record[name]["from"].items()
            if any(source in gone or record.get(source, {}).get("sha256") != then for source, then in made_of):
                gone.add(name)
                if self.status.get(MAKERS[name], {}).get("state") in ("ok", "pending"):
                    yield Path(MAKERS[name])

    def launch(self, notebook: Path, stop: kernel.Stop) -> str:
        """Execute and render one notebook; returns the state that it ended in."""
        name, began, run = notebook.stem, time.monotonic(), self.experiment.run
        environment = provenance.environment(self.root, self.experiment.parameters.get("seed"))
        write_json(self.folder / "environment.json", environment)
        self.set_pending(notebook)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        dirty = "-dirty" if environment.get("dirty") else ""  # as `git describe` says of files that differ
        made = {"commit": environment["commit"] and environment["commit"] + dirty, "device": environment["device"]}
        made["fingerprint"] = provenance.fingerprint(self.experiment, notebook)
        self.update(name, state="running", pid=os.getpid(), started=started, **made)
        log = self.root / "runs" / run / f".{name}.opened"
        log.parent.mkdir(parents=True, exist_ok=True)
        source, target = notebook.relative_to(self.root), Path("reports", run, f"{name}.ipynb")
        first = WATCH.format(str(log), str(self.root), run)
        state, error = kernel.execute(source, target, self.experiment.values(notebook), stop, first, (self.lock,))
        seconds, opened = round(time.monotonic() - began, 2), provenance.opened(log)
        entry: dict[str, Any] = {"state": state, "error": error, "seconds": seconds, "recorded": self.recorded(name)}
        if state == "ok":  # else it may have no time left to hash files
            entry["files"] = provenance.hashes(self.root, [*provenance.outputs(self.experiment, notebook), *opened])
        (self.folder / f"{name}.html").unlink(missing_ok=True)  # of an earlier run
        self.update(name, **entry)
        try:
            page = str(render(self.folder, name).relative_to(self.root))
        except Exception as problem:  # hours of training outlive a page that cannot be drawn
            page = f"none, {problem!r}"
        end = f"ok in {format_seconds(seconds)}" if state == "ok" else f"{name} {state}: {error}"
        print(end + f"  (report: {page})" * (state != "ok" or page.startswith("none")), flush=True)
        return state

    def update(self, name: str, **entry: Any) -> None:
        self.status[name] = self.status.get(name, {}) | entry
        write_json(self.folder / "status.json", self.status)
        renew_headers(self.folder)
        write_index(self.root)

    def set_pending(self, *notebooks: Path) -> None:
        """Mark notebooks as yet to run, and remove the numbers, figures and tables that they left in the report."""
        of = read_json(self.root / "runs" / self.experiment.run / "numbers.json")
        for notebook in notebooks:
            for file in (key for key, one in of.items() if one == notebook.stem and key.startswith("files/")):
                (self.folder / file.removeprefix("files/")).unlink(missing_ok=True)
            for kind, own in self.recorded(notebook.stem).items():
                left = {key: x for key, x in read_json(self.folder / f"{kind}.json").items() if key not in own}
                if own:
                    write_json(self.folder / f"{kind}.json", left)
            self.status[notebook.stem] = PENDING
        write_json(self.folder / "status.json", self.status)
        renew_headers(self.folder)

    def recorded(self, by: str) -> dict[str, dict[str, Any]]:
        """The numbers of metrics.json and timings.json that the notebook `by` recorded, here or in JupyterLab."""
        before = self.status.get(by, {}).get("recorded", {})
        of = read_json(self.root / "runs" / self.experiment.run / "numbers.json")  # "metrics/fwd" -> its notebook
        found = {kind: read_json(self.folder / f"{kind}.json") for kind in RECORDS}
        whose = lambda kind, key: of.get(f"{kind}/{key}", by if key in before.get(kind, ()) else None)  # noqa: E731
        return {kind: {key: own[key] for key in own if whose(kind, key) == by} for kind, own in found.items()}


def _choose(experiments: list[Experiment], only: str | None, start: str | None) -> list[list[Path]]:
    """For each experiment, the notebooks that --only and --from (02_train or train) leave; --from keeps summaries."""

    def named(notebook: Path, name: str) -> bool:
        return name in (notebook.stem, re.sub(r"^\d+_", "", notebook.stem))

    there = list(dict.fromkeys(notebook for one in experiments for notebook in one.notebooks))
    for name in filter(None, (start, only)):
        if not any(named(notebook, name) for notebook in there):
            raise ValueError(f"there is no notebook {name!r} in this run; known: {', '.join(x.stem for x in there)}")
    left = []
    for one in experiments:
        absent = 0 if not start or one.is_summary else len(one.notebooks)
        first = next((i for i, notebook in enumerate(one.notebooks) if start and named(notebook, start)), absent)
        left.append([notebook for notebook in one.notebooks[first:] if not only or named(notebook, only)])
    return left
