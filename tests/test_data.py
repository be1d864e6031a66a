import io
import json
import multiprocessing
import os
import shutil
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from PIL import Image

from wddm import data, sources
from wddm.wavelets import WaveletCodec

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def hub_copy(tmp_path: Path, pictures: np.ndarray) -> Path:
    """Two shards of `train` and one of `test`, nested, as `datasets` writes them."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    features = Features({"img": ImageColumn(), "label": ClassLabel(names=["cat", "dog"])})
    folder = tmp_path / "copy" / "plain_text"
    folder.mkdir(parents=True)
    for name, part in (("train-00000-of-00002", pictures[:13]), ("train-00001-of-00002", pictures[13:]),
                       ("test-00000-of-00001", pictures[:1])):  # fmt: skip
        table = {"img": [Image.fromarray(p) for p in part], "label": [int(p[0, 0, 0]) % 2 for p in part]}
        Dataset.from_dict(table, features=features).to_parquet(folder / f"{name}.parquet")
    return folder.parent


def prepare(dataset: str, resolution: int, folder: Path, **settings) -> data.Dataset:
    return data.prepare(dataset, resolution, folder, progress=False, **settings)


def png_folder(folder: Path, pictures: np.ndarray) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    return folder


# ---------------------------------------------------------------------------------------------------- sources


def test_digits_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small, large = prepare("digits", 8, tmp_path / "8"), prepare("digits", 16, tmp_path / "16")
    np.testing.assert_array_equal(small.images[..., 0], np.round(bunch.images * 255 / 16))
    np.testing.assert_array_equal(small.labels, bunch.target)
    assert large.images.shape == (1797, 16, 16, 1) and large.images.dtype == np.uint8
    means = large.images.reshape(1797, 8, 2, 8, 2).mean((2, 4))
    assert np.corrcoef(means.ravel(), bunch.images.ravel())[0, 1] > 0.97
    assert large.class_names == list("0123456789") and sum(large.manifest["class_counts"].values()) == 1797


def test_patches_are_crops_and_depend_on_the_seed(tmp_path):
    from sklearn.datasets import load_sample_images

    bunch = load_sample_images()
    first = prepare("patches", 32, tmp_path / "a", limit=20)
    for crop, label in zip(first.images, first.labels, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(bunch.images[label], (32, 32), axis=(0, 1))
        corners = np.argwhere((windows[..., 0, 0] == crop[0, 0]).all(-1))
        assert any((windows[y, x].transpose(1, 2, 0) == crop).all() for y, x in corners)
    assert not np.array_equal(first.images, prepare("patches", 32, tmp_path / "b", limit=20, seed=1).images)


def test_hub_layout_reads_as_datasets_reads_it(tmp_path, hub_copy, pictures):
    from datasets import load_dataset

    prepared = prepare("cifar10", 16, tmp_path / "out", dataset_path=str(hub_copy))
    files = [str(hub_copy / "plain_text" / f"train-0000{i}-of-00002.parquet") for i in (0, 1)]
    oracle = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(prepared.images, np.stack([np.asarray(row["img"]) for row in oracle]))
    np.testing.assert_array_equal(prepared.images, pictures)  # the size is right already: untouched
    np.testing.assert_array_equal(prepared.labels, oracle["label"])
    assert prepared.class_names == ["cat", "dog"]
    assert prepared.manifest["split"] == "train" and prepared.manifest["source"] == str(hub_copy)


def test_limit_draws_rows_across_the_shards(tmp_path, hub_copy, pictures):
    prepared = prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy, limit=9, seed=3)
    rows = [int(np.flatnonzero((pictures == image).all((1, 2, 3)))[0]) for image in prepared.images]
    assert rows == sorted(set(rows)) and len(rows) == 9 and min(rows) < 13 <= max(rows)
    np.testing.assert_array_equal(prepared.labels, pictures[rows, 0, 0, 0] % 2)


def test_incomplete_copy_is_refused(tmp_path, hub_copy):
    (hub_copy / "plain_text" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"got 1 Parquet files of split 'train'.*wanted 2 files"):
        prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy)


@pytest.mark.skipif(not CIFAR.exists(), reason="needs the copy of CIFAR-10 in ../shared/data")
def test_cifar10_rows_and_labels(tmp_path):
    import pyarrow.parquet as pq

    prepared = prepare("cifar10", 32, tmp_path / "out", dataset_path=CIFAR, limit=100)
    table = pq.read_table(CIFAR / "plain_text" / "train-00000-of-00001.parquet")
    rows = np.sort(np.random.default_rng(0).choice(50_000, 100, replace=False))
    for image, label, row in zip(prepared.images, prepared.labels, rows.tolist(), strict=True):
        cell = table["img"][row].as_py()["bytes"]
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(cell)).convert("RGB")))
        assert label == table["label"][row].as_py()
    assert prepared.class_names[3] == "cat"


def test_folder_is_cropped_to_the_centre_and_resized(tmp_path):
    wide = np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    tall = Image.fromarray(wide.transpose(1, 0, 2)[..., 0])  # grey
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "in" / "b" / "wide.png")
    tall.save(tmp_path / "in" / "a" / "tall.PNG")
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    expected = np.asarray(Image.fromarray(wide).resize((32, 16), Image.Resampling.LANCZOS))[:, 8:24]
    np.testing.assert_allclose(prepared.images[1].astype(int), expected.astype(int), atol=1)
    assert (prepared.images[0] == prepared.images[0][..., :1]).all()
    assert prepared.class_names == ["a", "b"] and prepared.labels.tolist() == [0, 1]


def test_what_does_not_decode_is_named(tmp_path, pictures, hub_copy):
    folder = png_folder(tmp_path / "in", pictures[:3])
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"001\.png, which does not decode"):
        prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    shard = hub_copy / "plain_text" / "train-00001-of-00002.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = pq.read_table(shard).to_pydict()
    cells["img"][4]["bytes"] = b"not an image"
    pq.write_table(pa.table(cells), shard)
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet, row 4, which does not decode"):
        prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy)
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match="wanted whole Parquet files"):
        prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.preparing"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "cifar"}, r"got dataset='cifar'.*did you mean 'cifar10'\?"),
        ({"resolution": 15}, "got resolution=15, wanted an even"),
        ({"resolution": 0}, "got resolution=0, wanted an even"),
        ({"resolution": 16.0}, "got resolution=16.0"),
        ({"resolution": True}, "got resolution=True"),
        ({"limit": 0}, "got limit=0, wanted an integer, 1 or more"),
        ({"seed": -1}, "got seed=-1"),
        ({"dataset_path": "no/such"}, "got dataset_path=no/such, which does not exist"),
        (
            {"dataset_path": str(Path(__file__).parent)},
            "got dataset_path=.*tests, wanted none, digits is embedded",
        ),
        ({"dataset": "folder"}, "give dataset_path"),
        (
            {"dataset": "folder", "dataset_path": str(Path(__file__).parent)},
            "got 0 Parquet files and 0 images",
        ),
        ({"dataset": "stl10", "dataset_path": str(Path(__file__).parent)}, "of split 'unlabeled' in .*tests"),
        ({"dataset": "patches", "resolution": 500}, "got resolution=500, wanted at most 426"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare(**{"dataset": "digits", "resolution": 16, "folder": tmp_path / "out", **settings})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def no_network(tmp_path, monkeypatch) -> Path:
    """No Hub, and an empty cache; returns the cache."""
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_without_network_three_ways_are_named_at_once(tmp_path, no_network, capfd):
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=r"network.*dataset_path.*huggingface-cli download") as caught:
        prepare("celebahq", 256, tmp_path / "out")
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_without_network_the_cache_is_read(tmp_path, no_network, hub_copy, pictures):
    revision = sources.SOURCES["cifar10"].keywords["repo"].partition("@")[2]
    snapshot = no_network / "datasets--uoft-cs--cifar10" / "snapshots" / revision
    shutil.copytree(hub_copy, snapshot)
    prepared = prepare("cifar10", 16, tmp_path / "out")
    np.testing.assert_array_equal(prepared.images, pictures)
    assert prepared.manifest["revision"] == revision and prepared.manifest["source"] == "uoft-cs/cifar10"


# ------------------------------------------------------------------------------------------- prepared folders


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


def prepare_slowly(folder: Path, stage: str) -> None:
    decode = sources.decode
    if stage == "decoding":
        data.decode = lambda chunk, shape: (time.sleep(1), decode(chunk, shape))[1]
    else:
        data._write_manifest = lambda *_: time.sleep(60)
    prepare("patches", 32, folder, limit=1000)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs os.fork")
def test_kill_during_preparation_then_a_clean_run(tmp_path):
    clean = prepare("patches", 32, tmp_path / "clean", limit=1000)
    for stage in ("decoding", "decoded"):
        folder, staging = tmp_path / stage, tmp_path / f".{stage}.preparing"
        process = multiprocessing.get_context("fork").Process(target=prepare_slowly, args=(folder, stage))
        process.start()
        deadline = time.monotonic() + 30
        while not (staging / "images.npy").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
        process.join()
        assert process.exitcode == -9 and staging.exists() and not folder.exists()
        prepare("patches", 32, folder, limit=1000)
        for path in clean.folder.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()
        assert not staging.exists()


def test_statistics_are_those_of_the_packets(tmp_path):
    prepared = prepare("patches", 32, tmp_path / "out", limit=300)
    images = torch.from_numpy(np.array(prepared.images)).permute(0, 3, 1, 2).double() / 127.5 - 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == prepared.manifest and list(manifest["bands"]) == ["1", "2", "3"]
    np.testing.assert_allclose(manifest["pixels"]["mean"], images.mean((0, 2, 3)), atol=2e-6)
    a, (h, v, d) = pywt.dwt2(images.numpy(), "haar")
    level1 = np.concatenate([a, h, v, d], axis=1) / 2
    np.testing.assert_allclose(manifest["bands"]["1"]["mean"], level1.mean((0, 2, 3)), atol=2e-6)
    np.testing.assert_allclose(manifest["bands"]["1"]["std"], level1.std((0, 2, 3)), atol=2e-6)
    for level in (2, 3):
        z = WaveletCodec(level=level).double().encode(images).numpy()
        np.testing.assert_allclose(manifest["bands"][str(level)]["std"], z.std((0, 2, 3)), atol=2e-6)
    assert manifest["count"] == 300 and "time" not in " ".join(manifest)
    assert list(prepare("digits", 10, tmp_path / "ten").manifest["bands"]) == ["1"]


# ---------------------------------------------------------------------------------------------------- batches


def numbered(count: int) -> np.ndarray:
    """Image i holds the value i everywhere, but for a left column that is 255."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 4 * 6).reshape(count, 4, 6, 1)
    images[:, :, 0] = 255
    return images


def take(count: int, *args, **settings) -> torch.Tensor:
    return torch.cat(list(islice(data.batches(*args, **settings), count)))


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
        data.batches(pictures, **{"batch_size": 8, "seed": 0, **settings})
    with pytest.raises(ValueError, match="wanted uint8"):
        data.batches(pictures / 255, 8, seed=0)
