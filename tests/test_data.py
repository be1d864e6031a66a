import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from local_data import encoded, png_folder, prepare, write_shard
from local_data import hub_copy as write_hub_copy
from local_data import pictures as noise
from PIL import Image

from wddm import data


def test_two_preparations_are_byte_identical_and_the_second_call_returns(tmp_path, hub_copy, capsys):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        prepare("cifar10", 16, folder, dataset_path=hub_copy)
    for name in ("manifest.json", "images.npy", "labels.npy"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    before = os.stat(folders[0] / "manifest.json")
    prepare("cifar10", 16, folders[0], dataset_path=hub_copy, seed=5)  # a seed without influence
    assert os.stat(folders[0] / "manifest.json").st_ino == before.st_ino
    assert capsys.readouterr().out == ""


def test_changed_settings_or_files_prepare_anew_and_say_so(tmp_path, pictures, capsys):
    folder = png_folder(tmp_path / "in", pictures[:4])
    prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    assert len(prepare("folder", 16, tmp_path / "out", dataset_path=folder, limit=2).images) == 2
    assert "limit was None and is 2" in capsys.readouterr().out
    before = prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    Image.fromarray(pictures[9]).save(folder / "009.png")
    capsys.readouterr()
    assert len(prepare("folder", 16, tmp_path / "out", dataset_path=folder).images) == 5
    assert capsys.readouterr().out.count("\n") == 1
    np.testing.assert_array_equal(before.images, pictures[:4])  # what was open stays readable
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "in", "out"]


def test_damage_is_noticed_and_repaired(tmp_path, capsys):
    intact = np.array(prepare("digits", 8, tmp_path / "out").images)
    path = tmp_path / "out" / "images.npy"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    data.load(tmp_path / "out")
    with pytest.raises(ValueError, match=r"sha256 of images\.npy.*01_prepare"):
        data.load(tmp_path / "out", verify=True)
    np.testing.assert_array_equal(prepare("digits", 8, tmp_path / "out").images, intact)
    assert "damaged" in capsys.readouterr().out
    path.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match=r"damaged.*run notebooks/01_prepare\.ipynb again"):
        data.load(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        data.load(tmp_path / "out")
    np.testing.assert_array_equal(prepare("digits", 8, tmp_path / "out").images, intact)


def test_nothing_prepared_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run notebooks/01_prepare\.ipynb first"):
        data.load(tmp_path / "none")


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        prepare("digits", 8, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


# --------------------------------------------------------------------------------------------------- kill -9


def prepare_until(folder: Path, source: Path, event: str | None, number: int, counted) -> None:
    """Prepare, but die of kill -9 at the event of that number (a file opened or renamed, a pickle read ...)."""
    import datasets  # noqa: F401  (imports are no moments of this; the server that forks may be another test's)
    import pyarrow.parquet  # noqa: F401

    data.IMAGES_PER_PROCESS, seen = 1, 0
    data.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which who is killed leaves behind

    def count(name: str, _) -> None:
        nonlocal seen
        if event in (None, name):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    prepare("cifar10", 8, folder, dataset_path=source)
    counted.send(seen)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs os.fork")
def test_kill_9_at_20_moments_then_a_clean_run(tmp_path):
    source = write_hub_copy(tmp_path / "copy", noise(600, 8))
    clean = prepare("cifar10", 8, tmp_path / "clean", dataset_path=source).folder
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["wddm.data", "datasets", "pyarrow.parquet", "pytest"])

    def attempt(folder: Path, event: str | None, number: int) -> int | None:
        """How many events there were, or None if it was killed."""
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=prepare_until, args=(folder, source, event, number, sender))
        process.start()
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL)
        return None if process.exitcode else receiver.recv()

    total = attempt(tmp_path / "whole", None, 0)
    moments = [(None, total * k // 17) for k in range(1, 17)]  # and around what is done last
    moments += [("os.rename", 1), ("os.rename", 1), ("shutil.rmtree", 3), ("os.rename", 2)]
    staged = 0
    for i, moment in enumerate(moments):
        folder, staging = tmp_path / f"{i}", tmp_path / f".{i}.preparing"
        if i % 2:  # in the place of one with other settings
            prepare("cifar10", 8, folder, dataset_path=source, limit=5)
        assert attempt(folder, *moment) is None
        staged += staging.exists()
        if folder.exists():  # then it is whole, be it the one before
            assert len(data.load(folder, verify=True).images) in (600, 5)
        prepare("cifar10", 8, folder, dataset_path=source)
        for path in clean.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()
        assert not staging.exists() and not (tmp_path / f".{i}.old").exists()
    assert staged > 10  # in the middle of it, and not before or after


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read the peak from")
def test_memory_does_not_grow_with_the_set(tmp_path):
    """400 MB of encoded images, in row groups as `datasets` writes them, become 400 MB of pixels; neither is held."""
    cells = [encoded(image) for image in noise(16, 256)]
    write_shard(tmp_path / "copy/train-00000-of-00001.parquet", cells * 125, column="image", row_group_size=100)
    code = """if True:
        import re, sys
        from wddm import data
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1000
        source, folder = sys.argv[1:]
        data.check_source("cifar10", 256, dataset_path=source)
        before = peak()
        data.prepare("cifar10", 256, folder, dataset_path=source, progress=False)
        print(peak() - before, peak())
    """
    command = [sys.executable, "-c", code, str(tmp_path / "copy"), str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    more, whole = map(float, done.stdout.split())
    assert more < 300 and whole < 1500, (more, whole)
