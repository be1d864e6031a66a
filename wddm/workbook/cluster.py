"""Runs the members of a sweep, each as a process `wddm run` of its own: on this machine, or by Dask on many.

Many machines see the workbook's folder under one path. All state is in this folder; the scheduler only assigns members
to workers. A process that runs a member holds the lock of its run, as everywhere. The client holds a lock `.<run>` for
as long as it wants that run; once that lock is free, by Ctrl-C or because the client is dead, the member stops gently.
"""

import contextlib
import fcntl
import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from wddm.files import read_json, write_text
from wddm.workbook.experiments import Experiment
from wddm.workbook.kernel import Stop
from wddm.workbook.parameters import read_yaml
from wddm.workbook.records import is_locked, lock
from wddm.workbook.report import PROGRESS_LINE

CLUSTERS = {"local": "distributed.LocalCluster", "ssh": "distributed.SSHCluster", "slurm": "dask_jobqueue.SLURMCluster"}
LOCAL = {"kind": "local", "threads_per_worker": 1, "preload": "import os; os.setpgrp()"}  # Ctrl-C is the client's alone
SET_BY_DASK = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")  # in workers
EVERY = 60.0  # seconds between the lines of a progress bar that are shown
LOST = "the scheduler is gone: start one, and the same command goes on"
PATIENCE = 120.0  # seconds to wait for a lock: by default, NFS takes 90 to release those of a machine that is gone


class Member(NamedTuple):
    """A run of a sweep, which a process of its own is to execute."""

    experiment: Experiment
    options: list[str]  # of `wddm run`
    lock: int  # file descriptor of the lock of the run or, in the client of a cluster, of the lock `.<run>`


def start(member: Member, stop: Stop, environment: Mapping[str, str], show: Callable[[str], object]) -> int:
    """Run a member as a process; returns its exit code. Its lines go to `show` and log.txt, progress once a minute."""
    root, run, due = member.experiment.root, member.experiment.run, 0.0
    write_text(file := root / "reports" / run / ".asked.yaml", member.experiment.as_yaml())
    command = [sys.executable, "-m", "wddm", "run", str(file.relative_to(root)), f"--held={member.lock}"]
    process = subprocess.Popen(
        command + member.options, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True, pass_fds=(member.lock,), env=environment,
    )  # fmt: skip
    stop.listeners.add(lambda kill: process.terminate())  # not SIGINT, which is ignored in the background of a script
    with process, file.with_name("log.txt").open("a") as log:
        for line in filter(None, map(str.rstrip, process.stdout or ())):
            if PROGRESS_LINE.match(line):
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + EVERY
            print(line, file=log, flush=True)
            show(f"{run} | {line}")
    return process.returncode if process.returncode >= 0 else 1


def run_beside(members: list[Member], jobs: int, stop: Stop) -> list[int]:
    """Run the members on this machine, `jobs` at a time; returns their exit codes."""
    free: SimpleQueue[str | None] = SimpleQueue()
    for name in itertools.islice(itertools.cycle(gpus() or [None]), jobs):
        free.put(name)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda member: run_on_gpu(member, stop, free), members))


def run_on_gpu(member: Member, stop: Stop, free: "SimpleQueue[str | None]") -> int:
    """Run a member on one of the free GPUs, or on all if it trains in several processes; returns its exit code."""
    if stop.requested:
        return 130
    gpu, several = free.get(), member.experiment.parameters.get("num_processes", 1) > 1
    only = {} if gpu is None or several else {"CUDA_VISIBLE_DEVICES": gpu}
    try:
        return start(member, stop, os.environ | only, lambda line: print(f"{line}\n", end="", flush=True))
    finally:
        free.put(gpu)


def gpus() -> list[str]:
    """The GPUs that CUDA may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def run_by_dask(members: list[Member], where: str, jobs: int, stop: Stop) -> list[int]:
    """Run the members on the cluster `where` (see `connect`) as it has room for them; returns their exit codes."""
    futures, codes = dict[Any, str](), list[int]()
    given = {name: os.environ.get(name) for name in SET_BY_DASK}  # before a local cluster sets them in this process

    def listener(kill: bool) -> None:
        for one in members:
            fcntl.flock(one.lock, fcntl.LOCK_UN)
        if kill and futures:
            client.cancel(list(futures))

    stop.listeners.add(listener)
    with contextlib.ExitStack() as closing:
        client = connect(where, jobs, closing)
        from distributed import as_completed

        client.subscribe_topic(topic := f"wddm-{client.id}", lambda event: print(event[1], flush=True))
        print(f"{client.scheduler.address}, dashboard {client.dashboard_link}: waiting for a worker", flush=True)
        while not (workers := client.scheduler_info()["workers"]) and not stop.requested:
            time.sleep(0.2)
        with_gpus = any("GPU" in worker["resources"] for worker in workers.values())
        for one in members if workers else ():
            resources = {"GPU": one.experiment.parameters.get("num_processes", 1)} if with_gpus else None
            options = {"key": f"{one.experiment.run}-{topic}", "resources": resources}
            futures[client.submit(run_in_worker, one, topic, given, **options)] = one.experiment.run
        for future in as_completed(futures):
            code = future.result() if future.status == "finished" else future.exception() or LOST
            codes.append(code if isinstance(code, int) else 1)
            how = "ended ok" if code == 0 else "stopped" if stop.requested else f"failed ({code}), see its log.txt"
            print(f"[{len(codes)}/{len(members)}] {futures[future]} {how}", flush=True)
    stop.listeners.discard(listener)
    return codes


def run_in_worker(member: Member, topic: str, given: dict[str, str | None]) -> int | str:
    """Run a member from a Dask worker while the client wants it; returns its exit code, or why it cannot run."""
    from distributed import get_worker

    worker, stop, root, run = get_worker(), Stop(), member.experiment.root, member.experiment.run
    if not is_locked(root, f".{run}"):
        return f"got no lock of the client in {root}/runs, seen from {worker.address}: see params/cluster/README.md"
    own = {name: value for name, value in (os.environ | given).items() if value is not None}
    with os.fdopen(lock(root, run, PATIENCE)) as held, ThreadPoolExecutor(1) as pool:
        one = member._replace(lock=held.fileno())
        process = pool.submit(start, one, stop, own, lambda line: worker.log_event(topic, line))
        while not wait([process], timeout=1.0).done and is_locked(root, f".{run}"):
            continue
        if not process.done():
            stop.tell(kill=False)
        return process.result()


def connect(where: str, jobs: int, closing: contextlib.ExitStack) -> Any:
    """A Dask client: of a scheduler, given by address or by its .json, or of a new cluster that ends with `closing`.

    A new cluster is "local", with `jobs` workers on this machine, or a YAML: `kind` is a key of CLUSTERS, `scale` the
    number of workers to ask for; the rest are arguments of the cluster's class. ValueError, one line, if that fails.
    """
    try:
        from distributed import Client

        place: Any = where
        if where.endswith(".json") and not (place := read_json(Path(where)).get("address")):
            raise ValueError("no address of a scheduler in it")
        if where == "local" or where.endswith(".yaml"):
            settings = LOCAL | {"n_workers": jobs} if where == "local" else read_yaml(Path(where))
            if (kind := settings.pop("kind", None)) not in CLUSTERS:
                raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(CLUSTERS)}: change it")
            (module, name), scale = CLUSTERS[kind].split("."), settings.pop("scale", None)
            place = closing.enter_context(getattr(importlib.import_module(module), name)(**settings))
            place.scale(scale) if scale else None
        return closing.enter_context(Client(place, timeout=10))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        brought = "what this brings: pip install 'wddm[cluster]' (in a clone: .venv/bin/pip install -e '.[cluster]')"
        wanted = brought if isinstance(error, ImportError) else "another: see params/cluster/README.md"
        raise ValueError(f"got --cluster {where} ({' '.join(str(error).split())}), wanted {wanted}") from None
