"""Sweeps by Dask, with real schedulers, workers and clients on this machine. Oracle: the same sweep with `--jobs 1`."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, as_process
from test_workbook import SECOND, load, states, wait_for, write_notebook

from wddm import workbook
from wddm.workbook import cluster
from wddm.workbook.parameters import read_yaml
from wddm.workbook.records import is_locked, lock, read_json

pytest.importorskip("distributed", reason="needs wddm[cluster]")

CLIENT = """
import sys
from pathlib import Path
from wddm import workbook
root = Path.cwd()
sys.exit(workbook.run(workbook.load_experiments(root / "params/x.yaml", root), cluster=sys.argv[1], jobs=2))
"""  # the command, without what it imports to check parameters
ALONE = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "OMP"))}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    (tmp_path / "params").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def client(root: Path, where: str) -> subprocess.Popen:
    """`wddm run params/x.yaml --cluster where --jobs 2`, leading a process group as if started by a shell."""
    environment = ALONE | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, where], cwd=root, env=environment, start_new_session=True, **PIPES
    )


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere.json", "no address of a scheduler in it"),
        ("nowhere.yaml", "cannot be read"),
        ("params/kind.yaml", "kind: got 'slrm', wanted one of local, ssh, slurm"),
        ("params/keys.yaml", "must be a non empty list"),
        ("tpc://host:8786", "tpc"),
    ],
)
def test_a_cluster_that_is_none_is_refused_in_one_line(root, where, message) -> None:
    write_notebook(root / "notebooks/01_a.ipynb", SECOND, "1")
    (root / "params/kind.yaml").write_text("kind: slrm\n")
    (root / "params/keys.yaml").write_text("kind: ssh\nhots: [a]\n")
    with pytest.raises(ValueError, match=r"^got --cluster ") as caught:
        workbook.run(load(root, "sweep: {level: [1]}"), cluster=where)
    assert (
        message in str(caught.value) and "\n" not in str(caught.value) and "params/cluster/README" in str(caught.value)
    )
    assert not (root / "reports/x-level=1").exists()


def test_without_dask_one_line_says_what_brings_it(root, monkeypatch) -> None:
    write_notebook(root / "notebooks/01_a.ipynb", SECOND, "1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=re.escape(".venv/bin/pip install -e '.[cluster]'")):
        workbook.run(load(root, ""), cluster="local")


def test_what_a_client_has_asked_for_is_refused_to_the_next(root) -> None:
    write_notebook(root / "notebooks/01_a.ipynb", SECOND, "1")
    held = lock(root, ".x-level=1")
    try:
        with pytest.raises(ValueError, match=r"x-level=1' is under way"):
            workbook.run(load(root, "sweep: {level: [1]}"), cluster="nowhere.json")
    finally:
        os.close(held)


def test_a_worker_that_sees_no_lock_of_the_client_runs_nothing(root, monkeypatch) -> None:
    import distributed

    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(address="tcp://far:1"))
    monkeypatch.setattr(cluster, "start", lambda *_: 1 / 0)
    write_notebook(root / "notebooks/01_a.ipynb", SECOND, "1")
    member = cluster.Member(load(root, "")[0], [], -1)
    told = cluster.run_in_worker(member, "topic", {})
    assert f"got no lock of the client in {root}/runs, seen from tcp://far:1" in told and not is_locked(root, "x")


def test_what_dask_sets_for_its_workers_is_taken_back() -> None:
    import dask.config

    assert set(dask.config.get("distributed.nanny.pre-spawn-environ")) == set(cluster.SET_BY_DASK)


@pytest.mark.parametrize("name", ["ssh", "slurm"])
def test_the_settings_that_come_with_it_are_those_of_their_class(name) -> None:
    import inspect

    import dask_jobqueue
    import distributed

    settings = read_yaml(ROOT / "params/cluster" / f"{name}.yaml")
    assert settings.pop("kind") == name
    if name == "ssh":
        assert settings.keys() <= inspect.signature(distributed.SSHCluster).parameters.keys()
    else:
        settings.pop("scale")

        async def written() -> str:  # in this thread: the one that Dask would start is given ten seconds, no more
            async with dask_jobqueue.SLURMCluster(**settings, asynchronous=True) as slurm:
                return slurm.job_script()

        script = asyncio.run(written())
        assert "--nthreads 1" in script and "--resources GPU=1" in script and "#SBATCH --gres=gpu:1" in script


# ------------------------------------------------------------------------------------------------ on one machine

WORK = """\
import os, time
print("threads", os.environ.get("OMP_NUM_THREADS"))
with open(f"times-{level}", "w") as file:
    file.write(str(time.time()))
if level == 2:
    raise ValueError("two")
time.sleep(3)
with open(f"times-{level}", "a") as file:
    file.write(f" {time.time()}")
"""
LOOP = """\
import time
open(f"began-{level}", "w").close()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saving")
    open(f"saved-{level}", "w").close()
    raise
"""


@pytest.mark.slow
def test_members_wait_for_a_gpu_and_one_that_fails_is_shown_with_its_page(root) -> None:
    """Two threads share one GPU; and torch has as many threads as the client asks for, not as Dask sets."""
    write_notebook(root / "notebooks/01_a.ipynb", SECOND, WORK)
    (root / "params/x.yaml").write_text("sweep: {level: [1, 3, 2]}")
    settings = "kind: local\nn_workers: 1\nthreads_per_worker: 2\nresources: {GPU: 1}\n"
    (root / "params/one.yaml").write_text(settings)
    process = client(root, "params/one.yaml")
    shown = process.communicate(timeout=240)[0]
    assert process.returncode == 1, shown
    assert "x-level=2 | 01_a failed: ValueError: two  (report: reports/x-level=2/01_a.html)" in shown
    assert re.search(r"\[\d/3\] x-level=2 failed \(1\), see its log.txt\n", shown)
    assert shown.count("ended ok") == 2 and shown.count("| threads None") == 3 and "dashboard http://" in shown
    assert [states(root, f"x-level={level}") for level in (1, 2, 3)] == [["ok"], ["failed"], ["ok"]]
    assert "ValueError: two" in (root / "reports/x-level=2/log.txt").read_text()
    one, three = (tuple(map(float, (root / f"times-{level}").read_text().split())) for level in (1, 3))
    assert one[1] < three[0] or three[1] < one[0], shown  # one after the other


@pytest.mark.slow
def test_ctrl_c_stops_members_gently_and_shows_it(root) -> None:
    write_notebook(root / "notebooks/01_a.ipynb", SECOND, LOOP)
    (root / "params/x.yaml").write_text("sweep: {level: [1, 2, 3]}")
    process = client(root, "local")
    wait_for(lambda: len(list(root.glob("began-*"))) == 2, seconds=240)
    os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 130, shown
    assert sorted(path.name for path in root.glob("saved-*")) == ["saved-1", "saved-2"] and "| saving" in shown
    assert not (root / "began-3").exists() and "Traceback" not in shown
    assert states(root, "x-level=1") == states(root, "x-level=2") == ["killed"]
    assert not any(is_locked(root, f"{mark}x-level={level}") for mark in ("", ".") for level in (1, 2, 3))


# ------------------------------------------------------------------------------------------------ whatever dies

TRAIN = """\
import hashlib, time
from wddm import workbook
from wddm.files import read_json, write_json
book = workbook.open_run(run)
checkpoint, pipeline = book.folder / "checkpoint.json", book.folder / "pipeline"
state = read_json(checkpoint) or {"step": 0, "weights": str(seed)}
if state["step"]:
    print(f"resumed at step {state['step']} of 60")
for step in workbook.progress(range(state["step"], 60)):
    time.sleep(0.1)
    state = {"step": step + 1, "weights": hashlib.sha256(state["weights"].encode()).hexdigest()}
    write_json(checkpoint, state)
pipeline.mkdir(exist_ok=True)
(pipeline / "weights").write_text(state["weights"])
book.record(loss=int(state["weights"][:8], 16))
"""  # in which a step lost, or done twice, changes all that follows
RUNS = [f"x-seed={seed}" for seed in range(6)]


def dask(root: Path, role: str, *words: str) -> subprocess.Popen:
    """A scheduler or a worker as a process of its own, as on another machine."""
    command = [sys.executable, "-m", "dask", role, "--scheduler-file", str(root / "scheduler.json"), *words]
    with (root / "dask.txt").open("a") as log:
        return subprocess.Popen(command, cwd=root.parent, env=ALONE | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)


def start_cluster(root: Path) -> tuple[subprocess.Popen, list[subprocess.Popen]]:
    (root / "scheduler.json").unlink(missing_ok=True)
    scheduler = dask(root, "scheduler", "--port", "0", "--no-dashboard")
    wait_for(lambda: (root / "scheduler.json").exists(), seconds=60)
    return scheduler, [dask(root, "worker", "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(2)]


def in_training(root: Path) -> set[str]:
    """Runs that are under way and have a checkpoint of the first third."""
    steps = {run: read_json(root / "runs" / run / "checkpoint.json").get("step", 60) for run in RUNS}
    return {run for run in RUNS if steps[run] < 20 and is_locked(root, run)}


def kept(root: Path) -> dict[str, bytes]:
    """What has to be the same in all runs: numbers and weights."""
    files = [*root.glob("reports/*/metrics.json"), *root.glob("runs/*/pipeline/*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_whatever_dies_six_members_end_with_the_bytes_of_one_job(root) -> None:
    """A worker, the scheduler and the client are killed in the middle of trainings; nothing finished runs again."""
    write_notebook(root / "notebooks/02_train.ipynb", 'run: str = "x"\nseed: int = 0\n', TRAIN)
    (root / "params/x.yaml").write_text(f"sweep: {{seed: [{', '.join(run[-1] for run in RUNS)}]}}")
    shutil.copytree(root, alone := root / "alone")
    assert as_process("wddm", "run", "params/x.yaml", root=alone).returncode == 0
    wanted, launches, resumed = kept(alone), 0, 0
    assert len(wanted) == 12

    scheduler, (first, *workers) = start_cluster(root)
    try:
        asking = client(root, "scheduler.json")
        wait_for(lambda: len(in_training(root)) == 2, seconds=240)
        first.kill()
        workers.append(dask(root, "worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"))
        wait_for(lambda: len(list(root.glob("reports/*/metrics.json"))) == 2, seconds=240)
        wait_for(lambda: in_training(root), seconds=240)
        scheduler.kill()
        shown = asking.communicate(timeout=60)[0]
        assert asking.returncode == 1 and cluster.LOST in shown, shown
        wait_for(lambda: not any(is_locked(root, run) for run in RUNS), seconds=60)
        assert all(worker.wait(60) is not None for worker in workers)

        scheduler, workers = start_cluster(root)
        asking = client(root, "scheduler.json")
        wait_for(lambda: in_training(root), seconds=240)
        asking.kill()
        wait_for(lambda: not any(is_locked(root, run) for run in RUNS), seconds=60)
        asking = client(root, "scheduler.json")
        shown = asking.communicate(timeout=300)[0]
        assert asking.returncode == 0 and shown.count("ended ok") == 6, shown
    finally:
        for process in (first, scheduler, *workers, asking):
            process.kill()
            process.communicate()
    assert kept(root) == wanted
    for run in RUNS:
        log = (root / "reports" / run / "log.txt").read_text()
        launches, resumed = launches + log.count("[1/1] 02_train ..."), resumed + log.count("resumed at step")
        assert len(re.findall(r"^ok in", log, re.M)) == 1, log  # and after that it is "unchanged, skipped"
    assert resumed >= 2 and launches - len(RUNS) <= 5  # the three kills stopped one, two and two at most
