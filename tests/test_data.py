import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from local_data import encoded, png_folder, prepare, write_shard
from local_data import hub_copy as write_hub_copy
from local_data import pictures as noise
from PIL import Image, ImageColor

from wddm import data, decoding
from wddm.data import batches, fits


def test_two_preparations_are_byte_identical_and_the_second_call_returns(tmp_path, hub_copy, capsys):
    roots = [tmp_path / "a", tmp_path / "b"]
    folders = [prepare("cifar10", 16, root, dataset_path=hub_copy).folder for root in roots]
    assert folders[0].parent == roots[0] and folders[0].name == folders[1].name
    for name in ("manifest.json", "images.npy", "labels.npy"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    before = os.stat(folders[0] / "manifest.json")
    prepare("cifar10", 16, roots[0], dataset_path=hub_copy, seed=5)  # a seed without influence
    assert os.stat(folders[0] / "manifest.json").st_ino == before.st_ino
    assert capsys.readouterr().out == ""


def test_the_manifest_says_what_was_prepared_from_what(tmp_path):
    prepared = prepare("patches", 32, tmp_path, limit=300)
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest == prepared.manifest and "time" not in " ".join(manifest)
    expected = {"dataset": "patches", "resolution": 32, "seed": 0, "limit": 300, "on_error": "stop", "split": "all"}
    expected |= {"count": 300, "shape": [300, 32, 32, 3], "revision": None, "skipped": {"count": 0, "first": []}}
    assert expected.items() <= manifest.items()
    assert prepared.sha256 == hashlib.sha256((prepared.folder / "images.npy").read_bytes()).hexdigest()


def test_other_options_or_files_are_other_sets_and_the_same_are_found(tmp_path, pictures, capsys):
    folder, root = png_folder(tmp_path / "in", pictures[:4]), tmp_path / "out"
    before = prepare("folder", 16, root, dataset_path=folder)
    options = [{}, {"limit": 2}, {"limit": 2, "seed": 1}, {"limit": 3}, {"on_error": "skip"}]
    sets = [prepare("folder", 16, root, dataset_path=folder, **option) for option in options]
    assert sets[0].folder == before.folder and [len(one.images) for one in sets] == [4, 2, 2, 3, 4]
    Image.fromarray(pictures[9]).save(folder / "009.png")
    sets.append(prepare("folder", 16, root, dataset_path=folder))
    (folder / "009.png").rename(folder / "010.png")
    sets.append(prepare("folder", 16, root, dataset_path=folder))
    assert len(sets[-1].images) == len(sets[-2].images) == 5
    assert len({one.folder for one in sets}) == len(sets) == len(list(root.glob("folder-16-*")))
    np.testing.assert_array_equal(before.images, pictures[:4])
    (folder / "010.png").unlink()
    shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / "moved")
    for place in ("copy", "moved"):
        again = prepare("folder", 16, root, dataset_path=tmp_path / place)
        assert again.folder == before.folder and again.manifest == before.manifest
    assert len(list(root.glob("folder-16-*"))) == len(sets) and capsys.readouterr().out == ""


def test_a_picture_replaced_by_another_of_the_same_name_size_and_time_is_noticed(tmp_path):
    picture = tmp_path / "in/a.bmp"
    picture.parent.mkdir()
    for colour in ("red", "blue", "lime"):
        Image.new("RGB", (4, 4), colour).save(picture)
        os.utime(picture, ns=(10**18, 10**18))
        prepared = prepare("folder", 4, tmp_path / "out", dataset_path=picture.parent)
        np.testing.assert_array_equal(prepared.images[0, 0, 0], ImageColor.getrgb(colour))


def test_two_processes_prepare_a_set_once(tmp_path, hub_copy):
    code = "import sys; from wddm import data; print(data.prepare('cifar10', 16, sys.argv[1], dataset_path=sys.argv[2]"
    command = [sys.executable, "-c", code + ", progress=True).sha256)", str(tmp_path / "out"), str(hub_copy)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("decoding" in text for text in said) == 1 and len({text.split()[-1] for text in said}) == 1


def test_links_to_a_bigger_disk_stay_and_are_written_through(tmp_path):
    disk = tmp_path / "disk"
    (disk / "data").mkdir(parents=True)
    (tmp_path / "data").symlink_to(disk / "data")
    prepared = prepare("digits", 8, tmp_path / "data", limit=9)
    assert prepared.folder.parent == tmp_path / "data" and (disk / "data" / prepared.folder.name).is_dir()
    prepared.folder.rename(disk / "moved")
    (disk / "data" / prepared.folder.name).symlink_to(disk / "moved")
    (disk / "moved/images.npy").write_bytes(b"damaged")
    (disk / ".moved.preparing").mkdir()
    (disk / ".moved.old").mkdir()
    again = prepare("digits", 8, tmp_path / "data", limit=9)
    assert again.sha256 == prepared.sha256 and (disk / "data" / prepared.folder.name).is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["data", "moved"]


def test_damage_is_noticed_and_repaired(tmp_path, capsys):
    prepared = prepare("digits", 8, tmp_path / "out")
    intact, folder = np.array(prepared.images), prepared.folder
    path = folder / "images.npy"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    data.load(folder)
    with pytest.raises(ValueError, match=r"sha256 of images\.npy.*01_prepare"):
        data.load(folder, verify=True)
    again = prepare("digits", 8, tmp_path / "out")
    np.testing.assert_array_equal(again.images, intact)
    assert "damaged" in capsys.readouterr().out and again.folder == folder
    path.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match=r"damaged.*run notebooks/01_prepare\.ipynb again"):
        data.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        data.load(folder)
    np.testing.assert_array_equal(prepare("digits", 8, tmp_path / "out").images, intact)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir())[-1:] == [folder.name]
    assert len(list((tmp_path / "out").glob("[!.]*"))) == 1


def test_nothing_prepared_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run notebooks/01_prepare\.ipynb first"):
        data.load(tmp_path / "none")


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    prepare("digits", 8, tmp_path, limit=9)
    assert (tmp_path / "thesis.tex").exists()


def test_duplicates_are_grouped():
    images = noise(20)
    assert data.duplicates(images) == []
    images[[3, 19]], images[[7, 11, 12]] = images[0], images[5]
    images[2], images[17] = images[1], images[16]
    images[2, 15, 15, 2] ^= 1  # all but the same
    assert data.duplicates(images) == [[5, 7, 11, 12], [0, 3, 19], [16, 17]]


@pytest.mark.slow
def test_cifar10_is_prepared_in_time(tmp_path, cifar10):
    start = time.perf_counter()
    prepared = prepare("cifar10", 32, tmp_path / "out", dataset_path=cifar10)
    assert time.perf_counter() - start < 30
    assert prepared.images.shape == (50_000, 32, 32, 3)
    assert prepared.manifest["class_counts"] == dict.fromkeys(prepared.class_names, 5000)


# --------------------------------------------------------------------------------------------------- kill -9


def prepare_until(root: Path, source: Path, event: str | None, number: int, counted) -> None:
    """Prepare, but die of kill -9 at the event of that number (a file opened or renamed, a pickle read ...)."""
    import datasets  # noqa: F401  (imports are no moments of this; the server that forks may be another test's)
    import pyarrow.parquet  # noqa: F401

    decoding.IMAGES_PER_PROCESS, seen = 1, 0
    decoding.tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which outlives a killed process

    def count(name: str, _) -> None:
        nonlocal seen
        if event in (None, name):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    prepare("cifar10", 8, root, dataset_path=source)
    counted.send(seen)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs os.fork")
def test_kill_9_at_22_moments_then_a_clean_run(tmp_path):
    source = write_hub_copy(tmp_path / "copy", noise(600, 8))
    clean = prepare("cifar10", 8, tmp_path / "clean", dataset_path=source).folder
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["wddm.data", "datasets", "pyarrow.parquet", "pytest"])

    def attempt(root: Path, event: str | None, number: int) -> int | None:
        """How many events there were, or None if it was killed."""
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=prepare_until, args=(root, source, event, number, sender))
        process.start()
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL)
        return None if process.exitcode else receiver.recv()

    total = attempt(tmp_path / "whole", None, 0)
    moments = [(None, total * k // 17) for k in range(1, 17)]  # and around what is done last
    moments += [("os.rename", 1), ("os.rename", 1), ("shutil.rmtree", 5)]
    moments += [("os.rename", 2), ("shutil.rmtree", 4), ("shutil.rmtree", 6)]
    staged = 0
    for i, moment in enumerate(moments):
        root = tmp_path / f"{i}"
        folder, staging = root / clean.name, root / f".{clean.name}.preparing"
        if i % 2:  # in the place of one that is damaged
            prepare("cifar10", 8, root, dataset_path=source)
            (folder / "images.npy").write_bytes(b"damaged")
        assert attempt(root, *moment) is None
        staged += staging.exists()
        if folder.exists() and (not i % 2 or (folder / "images.npy").read_bytes() != b"damaged"):
            assert len(data.load(folder, verify=True).images) == 600
        prepare("cifar10", 8, root, dataset_path=source)
        for path in clean.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()
        assert not staging.exists() and not (root / f".{clean.name}.old").exists()
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
        data.opened(*data.check_source("cifar10", 256, dataset_path=source))
        before = peak()
        data.prepare("cifar10", 256, folder, dataset_path=source, progress=False)
        print(peak() - before, peak())
    """
    command = [sys.executable, "-c", code, str(tmp_path / "copy"), str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    more, whole = map(float, done.stdout.split())
    assert more < 300 and whole < 1500, (more, whole)


# --------------------------------------------------------------------------------------------------- batches


def numbered(count: int) -> np.ndarray:
    """Image i holds the value i everywhere, but for a left column that is 255."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 4 * 6).reshape(count, 4, 6, 1)
    images[:, :, 0] = 255
    return images


def take(count: int, *args, **settings) -> torch.Tensor:
    return torch.cat(list(islice(batches(*args, **settings), count)))


def rows(batch: torch.Tensor) -> list[int]:
    return ((batch[:, 0, 0, 2] + 1) * 127.5).round().int().tolist()


def test_batches_are_one_permutation_per_epoch_end_to_end():
    stream = take(10, numbered(23), 7, seed=0)
    assert stream.dtype == torch.float32 and stream.shape == (70, 1, 4, 6)
    epochs = [rows(stream[start : start + 23]) for start in (0, 23, 46)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(23))
    assert epochs[0] != rows(take(10, numbered(23), 7, seed=1)[:23])


def test_batches_cover_the_range_exactly_and_keep_the_pixels(pictures):
    extremes = np.zeros((2, 2, 2, 3), np.uint8)
    extremes[1] = 255
    assert sorted(take(1, extremes, 2, seed=0).unique().tolist()) == [-1.0, 1.0]
    batch = take(1, pictures, 23, seed=4)
    assert batch.is_contiguous()
    found = ((batch + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert sorted(map(bytes, found)) == sorted(map(bytes, pictures))


@pytest.mark.parametrize("seen", [0, 7, 21, 23, 30, 116])
@pytest.mark.parametrize("batch_size", [7, 50])
def test_resumed_stream_is_the_stream(pictures, seen, batch_size):
    whole = take(seen + 3 * batch_size, pictures, 1, seed=2, flip=True)
    resumed = take(3, pictures, batch_size, seed=2, flip=True, start=seen)
    torch.testing.assert_close(resumed, whole[seen:], rtol=0, atol=0)


def test_ranks_take_contiguous_slices_of_the_global_batch(pictures):
    whole = take(5, pictures, 12, seed=2, flip=True)
    ranks = [take(5, pictures, 12, seed=2, flip=True, rank=r, world_size=3).view(5, 4, 3, 16, 16) for r in range(3)]
    torch.testing.assert_close(torch.cat(ranks, 1).flatten(0, 1), whole, rtol=0, atol=0)


def test_flips_mirror_half_of_the_images_and_change_with_the_epoch():
    stream = take(1, numbered(200), 400, seed=0, flip=True)
    mirrored = stream[:, 0, 0, -1] == 1
    assert torch.equal(mirrored, stream[:, 0, 0, 0] != 1)
    first, second = mirrored[:200], mirrored[200:]
    assert 70 < first.sum() < 130 and not torch.equal(first, second)
    assert rows(stream[:, :, :, 1:]) == rows(take(1, numbered(200), 400, seed=0)[:, :, :, 1:])


def test_resident_set_gives_the_same_batches(pictures):
    settings = {"seed": 3, "flip": True, "start": 5}
    host = take(6, pictures, 9, **settings)
    torch.testing.assert_close(take(6, pictures, 9, on_device=True, **settings), host, rtol=0, atol=0)
    if torch.cuda.is_available():
        for on_device in (True, False):
            other = take(6, pictures, 9, device="cuda", on_device=on_device, **settings)
            torch.testing.assert_close(other.cpu(), host, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"world_size": 3}, {"rank": 1}, {"start": -1}])
def test_impossible_batches_are_refused_at_the_call(pictures, settings):
    with pytest.raises(ValueError, match=r"wanted a batch size that world_size divides"):
        batches(pictures, **{"batch_size": 8, "seed": 0, **settings})
    with pytest.raises(ValueError, match="wanted uint8"):
        batches(pictures / 255, 8, seed=0)


def test_the_set_is_kept_on_an_accelerator_where_it_fits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * 2**30, 80 * 2**30))
    cuda, other = torch.device("cuda"), torch.device("mps")
    assert fits(2**31 - 1, cuda) and not fits(2**31, cuda) and fits(2**30 - 1, other) and not fits(2**30, other)
    seen = []
    monkeypatch.setattr("wddm.data.fits", lambda nbytes, device: seen.append((nbytes, device.type)))
    (
        batches(noise(4), 2, seed=0, device="meta"),
        batches(noise(4), 2, seed=0),
        batches(noise(4), 2, seed=0, device="meta", on_device=True),
    )
    assert seen == [(4 * 16 * 16 * 3, "meta")]


def test_every_batch_has_memory_of_its_own(pictures):
    first, second = islice(batches(pictures, 5, seed=0), 2)
    kept = first.clone()
    second.zero_()
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
