"""The chain of custody: what a report says is what was done, whoever else had hands in runs/ and data/ meanwhile."""

import hashlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, as_process, wddm
from local_data import png_folder
from test_workbook import SECOND, wait_for, write_notebook

from wddm.backbones import build_backbone
from wddm.cli import main
from wddm.experiment import by_half_life, distances_to, labels_of
from wddm.files import digest, sha256, whole, written_aside
from wddm.training import Trainer
from wddm.wavelets import WaveletCodec
from wddm.workbook import open_run, records
from wddm.workbook.parameters import read_schema

TINY = {
    "train_kimg": 0.32, "batch_size": 32, "warmup_kimg": 0.1, "widths": "[8]", "checkpoint_kimg": 0, "preview_kimg": 0,
    "num_samples": 20, "sampling_steps": 2, "limit": 200,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the record


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A run whose notebook 01 and 02 have made a file each."""
    write_notebook(tmp_path / "notebooks/01_prepare.ipynb", SECOND)
    (tmp_path / "params").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/set").mkdir(parents=True)
    for path in ("data/set/manifest.json", "runs/x/pipeline/weights"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    first = open_run("x", "01_prepare", {"run": "x", "level": 2})
    assert first.parameters == {"run": "x", "seed": 0, "level": 2}
    first.made("data", tmp_path / "data/set/manifest.json")
    second = open_run("x")
    second.take("data")
    second.made("pipeline", tmp_path / "runs/x/pipeline")
    return open_run("x")


def test_what_was_made_is_taken(book) -> None:
    assert book.take("pipeline") == book.folder / "pipeline" and book.data_folder() == book.root / "data/set"
    entry = records.read_record(book.root, "x")["data"]
    assert (entry["by"], entry["parameters"]["level"]) == ("01_prepare", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda book: (book.folder / "record.json").unlink(), "got no pipeline of run"),
        (lambda book: shutil.rmtree(book.folder), "got no pipeline of run 'x', wanted it made and recorded: run 02"),
        (lambda book: book.begin("pipeline"), "begun and not finished, wanted it whole: run 02_train"),
        (lambda book: (book.folder / "pipeline/weights").write_text("w"), "which is not what"),
        (lambda book: (book.folder / "pipeline/more").write_text("w"), "which is not what"),
        (lambda book: shutil.rmtree(book.folder / "pipeline"), "which is not what"),
        (lambda book: (book.root / "data/set/manifest.json").write_text("w"), "got data/set/manifest.json, which is"),
        (lambda book: shutil.rmtree(book.root / "data/set"), "got data/set/manifest.json, which is not what"),
        (lambda book: book.made("data", book.root / "notebooks"), "made before notebooks changed"),
        (lambda book: (book.folder / "record.json").write_text("{"), "wanted it made and recorded"),
    ],
)  # fmt: skip
def test_what_is_stale_is_refused_in_one_line(book, change, message) -> None:
    change(book)
    with pytest.raises(ValueError, match=r"run 0\d_\w+ of this run") as caught:
        book.take("pipeline")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_content_is_what_counts(tmp_path) -> None:
    """Not name, size and time: another picture with all three of the first is noticed."""
    file = tmp_path / "a"
    file.write_text("one")
    old = time.time() - 60
    os.utime(file, (old, old))
    before = digest(file)
    file.write_text("two")
    os.utime(file, (old, old))
    assert digest(file) != before


@pytest.mark.parametrize(("age", "times"), [(0, 2), (60, 1)])
def test_a_file_is_read_again_if_it_was_just_written_or_has_changed(tmp_path, monkeypatch, age, times) -> None:
    """Until its times are settled, they may not tell the next change from the last one."""
    file, now, read, reads = tmp_path / "a", time.time, hashlib.file_digest, []
    monkeypatch.setattr(time, "time", lambda: now() + age)
    monkeypatch.setattr(hashlib, "file_digest", lambda *what: reads.append(1) or read(*what))
    file.write_text("one")
    assert sha256(file) == sha256(file) == hashlib.sha256(b"one").hexdigest() and len(reads) == times
    time.sleep(0.05)  # the clock of a file system ticks
    file.write_text("two")
    assert sha256(file) == hashlib.sha256(b"two").hexdigest()


def test_links_to_a_bigger_disk_stay_links(tmp_path) -> None:
    (tmp_path / "big/a").mkdir(parents=True)
    (tmp_path / "big/file").write_text("old")
    for name in ("a", "file"):
        (tmp_path / name).symlink_to(tmp_path / "big" / name)
    for content in ("1", "2"):
        with written_aside(tmp_path / "a") as aside:
            (aside / "x").write_text(content)
        with whole(tmp_path / "file") as aside:
            aside.write_text(content)
        assert (tmp_path / "a").is_symlink() and (tmp_path / "big/a/x").read_text() == content
        assert (tmp_path / "file").is_symlink() and (tmp_path / "big/file").read_text() == content


# ---------------------------------------------------------------------------------------- parameters, told once


def test_every_parameter_is_declared_in_one_notebook() -> None:
    """Except those that every run has, and those that a checkpoint from elsewhere does not store."""
    seen: dict[str, list[str]] = {}
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        for name in read_schema(path):
            seen.setdefault(name, []).append(path.stem)
    shared = {name for name, notebooks in seen.items() if len(notebooks) > 1}
    assert shared == {"run", "seed", "prediction_type", "resolution"}


def test_there_is_one_set_of_defaults() -> None:
    """The notebooks' cells and Python's functions have the same; for the recipe see test_experiments.py."""
    schema = {name: one.default for name, one in read_schema(ROOT / "notebooks/02_train.ipynb").items()}
    python: dict[str, object] = {}
    for function in (WaveletCodec, build_backbone, Trainer, distances_to, labels_of, by_half_life):
        for name, one in inspect.signature(function).parameters.items():
            if one.default is not inspect.Parameter.empty and name in schema:
                default = list(one.default) if isinstance(one.default, tuple) else one.default
                assert python.setdefault(name, default) == default, name
    assert {name: schema[name] for name in python} == python
    assert schema.keys() - python.keys() <= {
        "run",
        "num_processes",
        "backbone",
        "half_lives_kimg",
    }  # asked for, in Python


@pytest.mark.parametrize(
    ("notebook", "name"), [("01_prepare", "shuffle"), ("02_train", "cooldown"), ("03_sample", "extra")]
)
def test_a_parameter_that_nothing_takes_is_an_error_that_names_it(root, capsys, notebook, name) -> None:
    path = root / "notebooks" / f"{notebook}.ipynb"
    before = path.read_text()
    try:
        path.write_text(before.replace('"run: str = ', f'"{name}: float = 0.5\\n",\n    "run: str = ', 1))
        assert main(["run", str(root / "params/quickstart.yaml"), "-p", "run=refused"]) == 2
    finally:
        path.write_text(before)
    error = capsys.readouterr().err
    assert name in error and "nothing takes" in error and error.count("\n") == 1
    assert not (root / "reports/refused").exists()


# -------------------------------------------------------------------------------------------- two at one time


def test_two_starts_of_one_run_are_one(tmp_path) -> None:
    write_notebook(tmp_path / "notebooks/01_a.ipynb", SECOND, "import time; time.sleep(1)")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/x.yaml").write_text("")
    command = [sys.executable, "-m", "wddm", "run", "params/x.yaml", "--force"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert "is under way" in "".join(errors) and "".join(errors).count("\n") == 1


def test_train_leaves_a_run_under_way_alone(root, capsys) -> None:
    held = records.lock(root, "busy")
    try:
        assert main(["train", str(root / "params/quickstart.yaml"), "-p", "run=busy"]) == 2
    finally:
        os.close(held)
    assert "run 'busy' is under way" in capsys.readouterr().err and not (root / "runs/busy").exists()


def test_a_lock_outlives_its_command_as_long_as_what_that_started(tmp_path) -> None:
    """A child that has inherited the lock holds it; when that child dies it is free, even if its pid is used again."""
    held = records.lock(tmp_path, "x")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held,))
    os.close(held)
    assert records.is_locked(tmp_path, "x")
    child.kill()
    child.communicate()
    assert not records.is_locked(tmp_path, "x")
    os.close(records.lock(tmp_path, "x"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_members_of_a_sweep_end_with_their_parent(tmp_path, how) -> None:
    """The parent and its children ignore Ctrl-C, as processes do that a script starts in the background."""
    loop = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open(f'saved-{level}', 'w').close()"
    write_notebook(tmp_path / "notebooks/01_a.ipynb", SECOND, f"open(f'began-{{level}}', 'w').close()\n{loop}")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/x.yaml").write_text("sweep: {level: [1, 2]}")
    command = [sys.executable, "-m", "wddm", "run", "params/x.yaml", "--jobs", "2"]
    ignoring = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    parent = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, preexec_fn=ignoring)
    wait_for(lambda: len(list(tmp_path.glob("began-*"))) == 2, seconds=60)
    assert all(records.is_locked(tmp_path, f"x-level={level}") for level in (1, 2))
    parent.send_signal(how)
    assert parent.wait(timeout=30) == (130 if how == signal.SIGTERM else -how)
    wait_for(lambda: not any(records.is_locked(tmp_path, f"x-level={level}") for level in (1, 2)), seconds=30)
    assert len(list(tmp_path.glob("saved-*"))) == 2  # gently
    states = [records.read_status(tmp_path / f"reports/x-level={level}")["01_a"]["state"] for level in (1, 2)]
    assert states == ["killed", "killed"]


def test_what_a_notebook_opens_without_declaring_it_counts(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params/x.yaml").write_text("")
    (tmp_path / "runs/other").mkdir(parents=True)
    np.save(tmp_path / "runs/other/samples.npy", np.zeros(3))
    cell = "import numpy as np, pathlib\nnp.load('runs/other/samples.npy', mmap_mode='r')\n"
    cell += "pathlib.Path('own').write_text('x')"
    write_notebook(tmp_path / "notebooks/01_a.ipynb", SECOND, cell)
    monkeypatch.chdir(tmp_path)
    skipped = []
    for change in (lambda: None, lambda: None, lambda: np.save(tmp_path / "runs/other/samples.npy", np.ones(3))):
        change()
        assert main(["run", "params/x.yaml"]) == 0
        skipped.append("unchanged, skipped" in capsys.readouterr().out)
    assert skipped == [False, True, False]


# ---------------------------------------------------------------------------------- on the real notebooks, tiny


def record(root: Path, run: str) -> dict:
    return json.loads((root / "runs" / run / "record.json").read_text())


@pytest.mark.slow
def test_a_sweep_over_sources_trains_each_on_its_own(root) -> None:
    """Side by side, on folders whose files have the same names and sizes; then on one source with two seeds."""
    for name, value in (("red", 0), ("blue", 255)):
        png_folder(root / name, np.full((12, 8, 8, 3), value, np.uint8))
    (root / "params/sources.yaml").write_text(
        "notebooks: [01_prepare]\nresolution: 8\nsweep: {dataset: [folder], dataset_path: [red, blue]}\n"
    )
    (root / "params/sources-patches.yaml").write_text(
        "notebooks: [01_prepare]\nresolution: 8\nsweep: {dataset: [patches], limit: [5], seed: [0, 1]}\n"
    )
    both = ["params/sources.yaml", "params/sources-patches.yaml"]
    for words in ([both[0], "--jobs", "2"], both[1:]):
        done = wddm(root, "run", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(path.name for path in (root / "runs").glob("sources-*"))
    sets = [root / Path(record(root, run)["data"]["path"]).parent for run in runs]
    assert len({*sets}) == len(sets) == 4
    images = {run: np.load(folder / "images.npy") for run, folder in zip(runs, sets, strict=True)}
    means = {run: float(pixels.mean()) for run, pixels in images.items() if "folder" in run}
    assert {run.rpartition("=")[2]: mean for run, mean in means.items()} == {"red": 0, "blue": 255}
    assert sorted(map(len, images.values())) == [5, 5, 12, 12]
    again = wddm(root, "run", *both)
    assert again.stdout.count("unchanged, skipped") == 4 and again.returncode == 0


@pytest.mark.slow
def test_other_hands_at_every_stage_are_noticed(root) -> None:
    """Samples emptied, the network overwritten by plain papermill, a longer training asked for but not run."""

    def run(*options: str, **more: object) -> subprocess.CompletedProcess:
        return wddm(root, "run", "params/quickstart.yaml", *options, run="hands", **{**TINY, **more})

    done = run("--from", "prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    place = root / "runs/hands"
    weights, samples = place / "pipeline/backbone/diffusion_pytorch_model.safetensors", place / "samples.npy"
    kept = weights.read_bytes(), samples.read_bytes(), (root / "reports/hands/metrics.json").read_bytes()

    samples.write_bytes(b"")
    done = run()
    assert done.returncode == 0 and "[3/4] 03_sample ..." in done.stdout, done.stdout
    assert done.stdout.count("unchanged, skipped") == 3 and samples.read_bytes() == kept[1]

    (root / "params/other.yaml").write_text(yaml.safe_dump(
        {"run": "hands", "level": 2, "seed": 1, "train_kimg": 0.16, "batch_size": 32, "widths": [8], "preview_kimg": 0}
    ))  # fmt: skip
    words = ["out.ipynb", "-f", "params/other.yaml", "-k", "python3"]
    other = as_process("papermill", "notebooks/02_train.ipynb", *words, root=root)
    assert other.returncode == 0, other.stderr
    refused = run("--only", "sample")
    assert refused.returncode == 2 and "02_train ran with other parameters (" in refused.stderr
    assert "level 2 -> 1" in refused.stderr and refused.stderr.count("\n") == 1
    done = run()
    assert done.returncode == 0 and "[2/4] 02_train ..." in done.stdout, done.stdout
    assert (weights.read_bytes(), samples.read_bytes(), (root / "reports/hands/metrics.json").read_bytes()) == kept

    record_file = place / "record.json"
    before = record_file.read_text()
    entry = json.loads(before)
    del entry["pipeline"]["sha256"]  # as while it is trained
    record_file.write_text(json.dumps(entry))
    begun = run("--only", "sample")
    assert begun.returncode == 2 and "02_train was begun and is not finished" in begun.stderr
    record_file.write_text(before)

    longer = run("--only", "sample", train_kimg=0.64)
    assert longer.returncode == 2 and "train_kimg 0.32 -> 0.64" in longer.stderr
    assert yaml.safe_load((root / "reports/hands/params.yaml").read_text())["train_kimg"] == 0.32

    weights.write_bytes(kept[0][:-4] + b"\0\0\0\0")
    (root / "params/other.yaml").write_text("run: hands\n")
    other = as_process("papermill", "notebooks/03_sample.ipynb", *words, root=root)
    assert other.returncode != 0 and "which is not what 02_train left there" in other.stderr
