import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from local_data import encoded, png_folder, prepare, write_shard, write_table
from local_data import pictures as noise
from PIL import Image

from wddm import data, files, sources


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


def test_cifar10_rows_and_labels(tmp_path, cifar10):
    import pyarrow.parquet as pq

    prepared = prepare("cifar10", 32, tmp_path / "out", dataset_path=cifar10, limit=100)
    table = pq.read_table(cifar10 / "plain_text" / "train-00000-of-00001.parquet")
    rows = np.sort(np.random.default_rng(0).choice(50_000, 100, replace=False))
    for image, label, row in zip(prepared.images, prepared.labels, rows.tolist(), strict=True):
        cell = table["img"][row].as_py()["bytes"]
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(cell)).convert("RGB")))
        assert label == table["label"][row].as_py()
    assert prepared.class_names[3] == "cat"


def test_stl10_from_a_local_copy(tmp_path):
    """Unlabeled 96x96 PNG in four shards, beside the labelled splits, to 64."""
    images = noise(12, 96)
    for i, part in enumerate(np.split(images, 4)):
        shard = tmp_path / "copy" / "data" / f"unlabeled-0000{i}-of-00004.parquet"
        write_shard(shard, [encoded(image) for image in part], [-1] * 3, column="image", names=["airplane", "bird"])
    write_shard(tmp_path / "copy/data/train-00000-of-00001.parquet", [encoded(images[0])], [0], column="image")
    prepared = prepare("stl10", 64, tmp_path / "out", dataset_path=tmp_path / "copy")
    oracle = [Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS) for image in images]
    np.testing.assert_array_equal(prepared.images, np.stack([np.asarray(image) for image in oracle]))
    assert prepared.labels is None and prepared.class_names is None and prepared.manifest["class_counts"] is None
    assert prepared.manifest["split"] == "unlabeled"


def test_celebahq_from_a_local_copy(tmp_path):
    """Two splits of 256x256 JPEG with two classes, as they are."""
    images = noise(5, 256)
    cells = [encoded(image, "JPEG", quality=95) for image in images]
    for name, part in (("train-00000-of-00002", slice(0, 2)), ("train-00001-of-00002", slice(2, 4)),
                       ("validation-00000-of-00001", slice(4, 5))):  # fmt: skip
        labels = [0, 1, 1, 0, 1][part]
        write_shard(
            tmp_path / f"copy/data/{name}.parquet", cells[part], labels, column="image", names=["female", "male"]
        )
    prepared = prepare("celebahq", 256, tmp_path / "out", dataset_path=tmp_path / "copy")
    oracle = np.stack([np.asarray(Image.open(io.BytesIO(cell))) for cell in cells])  # validation after train
    np.testing.assert_array_equal(prepared.images, oracle)
    np.testing.assert_array_equal(prepared.labels, [0, 1, 1, 0, 1])
    assert prepared.manifest["class_counts"] == {"female": 2, "male": 3}
    assert prepared.manifest["split"] == "train+validation" and prepared.manifest["count"] == 5
    half = prepare("celebahq", 128, tmp_path / "half", dataset_path=tmp_path / "copy", limit=2)
    assert half.images.shape == (2, 128, 128, 3)


def test_a_folder_of_anything(tmp_path):
    """Nested, of any format, mode and size; the folders at the top are classes, hidden files are not images."""
    images = noise(6, 16)
    for name in ("b/deep/er", "a", "a/.hidden"):
        (tmp_path / "in" / name).mkdir(parents=True)
    Image.fromarray(images[0]).save(tmp_path / "in/a/first.PNG")
    Image.fromarray(images[1]).save(tmp_path / "in/a/second.webp", lossless=True)
    Image.fromarray(images[2][..., 0]).save(tmp_path / "in/b/deep/er/grey.tiff")
    Image.fromarray(images[3]).resize((40, 30)).save(tmp_path / "in/b/large.jpeg")
    (tmp_path / "in/a/.hidden/no.png").write_bytes(b"")
    (tmp_path / "in/b/notes.txt").write_text("no image")
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    np.testing.assert_array_equal(prepared.images[:2], images[:2])
    np.testing.assert_array_equal(prepared.images[2], images[2][..., :1].repeat(3, -1))
    assert prepared.class_names == ["a", "b"] and prepared.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "in/loose.png").write_bytes(encoded(images[4]))
    assert prepare("folder", 16, tmp_path / "loose", dataset_path=tmp_path / "in").labels is None


def cell(value: int) -> dict:
    return {"bytes": encoded(np.full((4, 4, 3), value, np.uint8)), "path": None}


LABELS = {  # the column and its values: labels, names, note
    "labels": ([0, 1, 1], [0, 1, 1], None, ""),
    "fine_label": ([2, None, -1], [2, -1, -1], None, ""),
    "kind": (["dog", None, "cat"], [1, -1, 0], ["cat", "dog"], ""),
    "indoor": ([True, False, None], [1, 0, -1], ["False", "True"], ""),
    "label": ([0.0, 1.0, None], [0, 1, -1], None, ""),  # integers, as pandas writes them beside a null
    "weight": ([0.5, 1.0, 2.0], None, None, ""),
    "none": ([-1, -1, None], None, None, ""),
    "either": (None, None, None, "no labels: any of the columns either, other could be, name one label"),
}


@pytest.mark.parametrize("column", LABELS)
def test_a_column_of_labels_is_found_by_its_kind(tmp_path, column):
    values, labels, names, note = LABELS[column]
    columns = {column: values} if values else {column: [1, 2, 3], "other": [1, 2, 3]}
    folder = write_table(tmp_path / "in/part-0.parquet", [cell(i) for i in range(3)], **columns)
    prepared = prepare("folder", 4, tmp_path / "out", dataset_path=folder)
    np.testing.assert_array_equal(prepared.images[:, 0, 0, 0], [0, 1, 2])
    assert (None if prepared.labels is None else prepared.labels.tolist()) == labels
    assert prepared.class_names == names and prepared.manifest["note"] == note
    if labels:
        counts = prepared.manifest["class_counts"]
        assert sum(counts.values()) == 3 - labels.count(-1) and set(counts) <= set(names or "012")
        said = [f"unlabelled: {labels.count(-1)}"] if -1 in labels else []
        assert prepared.notes == said and prepared.manifest["unlabelled"] == labels.count(-1)


@pytest.mark.parametrize("values", [["0", "1"], ["cat", "dog"], [True, False]])
def test_labels_of_several_types_are_refused(tmp_path, values):
    """They would be classes of one name: 1 and "1"."""
    write_table(tmp_path / "in/a.parquet", [cell(0), cell(1)], label=[0, 1])
    write_table(tmp_path / "in/b.parquet", [cell(2), cell(3)], label=values)
    with pytest.raises(ValueError, match="got labels of several types in the column label, wanted one") as caught:
        prepare("folder", 4, tmp_path / "out", dataset_path=tmp_path / "in")
    assert "\n" not in str(caught.value)


def test_what_is_no_label_may_be_of_several_types(tmp_path):
    write_table(tmp_path / "in/a.parquet", [cell(i) for i in range(30)], id=list(range(30)))
    write_table(tmp_path / "in/b.parquet", [cell(i) for i in range(30)], id=[f"n{i}" for i in range(30)])
    prepared = prepare("folder", 4, tmp_path / "out", dataset_path=tmp_path / "in")
    assert prepared.labels is None and "values of the column id occur once" in prepared.manifest["note"]


def test_several_labels_to_an_image_are_none(tmp_path):
    folder = write_table(tmp_path / "in/part-0.parquet", [cell(i) for i in range(3)], label=[[0], [1, 2], []])
    assert prepare("folder", 4, tmp_path / "out", dataset_path=folder).labels is None


def test_labels_beyond_the_names_and_broken_metadata_are_refused_before_decoding(tmp_path):
    write_shard(tmp_path / "beyond/a.parquet", [b""] * 2, [0, 5])
    metadata = {"broken": b"{", "unknown": json.dumps({"info": {"features": {"x": {"_type": "New"}}}}).encode()}
    write_shard(tmp_path / "names/a.parquet", [b""] * 2, [0, 1])
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "names/a.parquet")
    for name, text in metadata.items():
        (tmp_path / name).mkdir()
        pq.write_table(table.replace_schema_metadata({b"huggingface": text}), tmp_path / name / "a.parquet")
    for name, message in {"beyond": "got label 5 in .*wanted at most 1", **dict.fromkeys(metadata, "metadata")}.items():
        with pytest.raises(ValueError, match=message) as caught:
            prepare("folder", 4, tmp_path / "out", dataset_path=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_rows_that_name_a_file_are_read_and_empty_ones_said(tmp_path, pictures):
    png_folder(tmp_path / "in/data/images", pictures[:1])
    write_table(tmp_path / "in/data/a.parquet", [{"bytes": None, "path": "images/000.png"}, cell(7), None])
    with pytest.raises(ValueError, match=r"a\.parquet, row 2, which does not decode \(there is nothing in its place"):
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", on_error="skip")
    np.testing.assert_array_equal(prepared.images[0], pictures[0])
    assert prepared.images[1].max() == 7 and prepared.manifest["skipped"]["count"] == 1
    Image.fromarray(pictures[1]).save(tmp_path / "in/data/images/000.png")
    again = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", on_error="skip")
    np.testing.assert_array_equal(again.images[0], pictures[1])


def test_metadata_csv_labels_the_images(tmp_path, pictures):
    folder = png_folder(tmp_path / "in/images", pictures[:4]).parent
    (folder / "metadata.csv").write_text(
        "file_name,label\nimages/002.png,dog\nimages/000.png,cat\nimages/001.png,\nx.png,cat\n"
    )
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    assert prepared.labels.tolist() == [0, -1, 1, -1] and prepared.class_names == ["cat", "dog"]
    assert prepared.manifest["unlabelled"] == 2 and "x.png (in metadata" in prepared.manifest["left_out"]["first"][0]
    (folder / "metadata.csv").write_text("file_name,kind\nimages/002.png,7\nimages/000.png,-1\n")
    assert prepare("folder", 16, tmp_path / "out", dataset_path=folder).labels.tolist() == [-1, -1, 7, -1]
    (folder / "metadata.csv").write_text("file_name,kind\nimages/002.png,7\nimages/000.png,3\n./images/002.png,8\n")
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    assert prepared.labels.tolist() == [3, -1, 8, -1] and "/002.png (twice in metadata.csv: " in prepared.notes[0]
    (folder / "metadata.csv").write_text("name,label\nimages/002.png,7\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, wanted columns file_name and label"):
        prepare("folder", 16, tmp_path / "out", dataset_path=folder)


def test_a_change_in_a_linked_folder_is_a_change_of_the_whole(tmp_path, pictures):
    folder, elsewhere = png_folder(tmp_path / "in", pictures[:1]), png_folder(tmp_path / "elsewhere", pictures[2:4])
    (folder / "more").symlink_to(elsewhere)
    before, sets = files.digest(folder), [prepare("folder", 16, tmp_path / "out", dataset_path=folder)]
    Image.fromarray(pictures[5]).save(elsewhere / "001.png")
    sets.append(prepare("folder", 16, tmp_path / "out", dataset_path=folder))
    assert files.digest(folder) != before and sets[0].folder != sets[1].folder
    np.testing.assert_array_equal(sets[1].images, pictures[[0, 2, 5]])


def test_splits_are_not_classes(tmp_path, pictures):
    for i, part in enumerate(("train", "val", "test")):
        png_folder(tmp_path / "in" / part / "cat", pictures[4 * i : 4 * i + 2])
        png_folder(tmp_path / "in" / part / "dog", pictures[4 * i + 2 : 4 * i + 4])
        write_shard(tmp_path / f"tables/data/{part}-00000-of-00001.parquet", [encoded(pictures[i])], [i % 2])
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    np.testing.assert_array_equal(prepared.images, pictures[:4])
    assert prepared.class_names == ["cat", "dog"] and prepared.labels.tolist() == [0, 0, 1, 1]
    assert prepared.notes == ["left out: 1 (8 files of other splits than train)"]
    assert prepared.manifest["split"] == "train"
    for split, rows in (("validation", [4, 5, 6, 7]), ("test+val", [8, 9, 10, 11, 4, 5, 6, 7])):
        prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", split=split)
        np.testing.assert_array_equal(prepared.images, pictures[rows])
    for split, row in (("train", 0), ("validation", 1), ("test", 2)):
        prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "tables", split=split)
        np.testing.assert_array_equal(prepared.images, pictures[[row]])
    with pytest.raises(ValueError, match=r"of split 'dev' .*a split of test, train, validation"):
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "tables", split="dev")
    with pytest.raises(ValueError, match=r"got split='test', wanted none, .* has no splits"):
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in/test", split="test")


def test_a_folder_that_holds_one_folder_is_that_one(tmp_path, pictures):
    """As archives unpack: classes and splits are still found. A split alone stays one."""
    for part, rows in (("train", pictures[:4]), ("test", pictures[4:8])):
        png_folder(tmp_path / "in/photos" / part / "cat", rows[:2])
        png_folder(tmp_path / "in/photos" / part / "dog", rows[2:])
        png_folder(tmp_path / "alone" / part / "cat", rows) if part == "test" else None
    (tmp_path / "in/.DS_Store").touch()
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    np.testing.assert_array_equal(prepared.images, pictures[:4])
    assert prepared.class_names == ["cat", "dog"] and prepared.manifest["split"] == "train"
    assert prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in/photos").folder == prepared.folder
    assert len(prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "alone", split="test").images) == 4


def test_cifar10_has_its_own_test_split(tmp_path, hub_copy, pictures):
    prepared = prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy, split="test")
    np.testing.assert_array_equal(prepared.images, pictures[:1])


def test_images_by_what_is_inside(tmp_path, pictures):
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.avif": "AVIF", "d.pbm": "PPM", "e.jp2": "JPEG2000", "f": "PNG"}
    kinds |= {"g.jpg": "PNG", "h.data": "WEBP"}
    for name, kind in kinds.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded(pictures[0], kind))
    (tmp_path / "in/readme").write_text("no image")
    (tmp_path / "in/i.png").write_bytes(encoded(pictures[0], "EPS"))  # PIL would start an interpreter for it
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", on_error="skip")
    assert len(prepared.images) == 8 and prepared.manifest["left_out"]["first"] == ["readme: no image"]
    assert prepared.manifest["skipped"]["first"] == [str(tmp_path / "in/i.png")]
    np.testing.assert_array_equal(prepared.images[[3, 4, 5, 6]], pictures[[0] * 4])
    with pytest.raises(ValueError, match=r"i\.png, which does not decode \(of no known format"):
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")


def test_grey_sets_stay_grey_and_images_need_not_be_square(tmp_path, pictures):
    (tmp_path / "in").mkdir()
    for i, image in enumerate(pictures[:3]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"in/{i}.{('png', 'tif', 'bmp')[i]}")
    prepared = prepare("folder", 8, tmp_path / "out", dataset_path=tmp_path / "in", width=16)
    oracle = [image[4:12, :, :1] for image in pictures[:3]]
    np.testing.assert_array_equal(prepared.images, oracle)
    assert prepared.folder.name.startswith("folder-8x16-") and prepared.manifest["width"] == 16
    assert prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", width=16).manifest["width"] is None
    rgb = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", channels=3)
    np.testing.assert_array_equal(rgb.images, pictures[:3, ..., :1].repeat(3, -1))
    Image.fromarray(pictures[3]).save(tmp_path / "in/3.png")
    assert prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in").images.shape == (4, 16, 16, 3)
    assert prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", channels=1).images.shape[-1] == 1


def test_arrays_of_any_channels(tmp_path):
    bands = np.random.default_rng(0).integers(0, 65536, (6, 8, 8, 5), dtype=np.uint16)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/bands.npy", bands)
    prepared = prepare("folder", 8, tmp_path / "out", dataset_path=tmp_path / "in/bands.npy")
    np.testing.assert_array_equal(prepared.images, bands >> 8)
    assert prepared.labels is None
    np.save(tmp_path / "in/labels.npy", [0, 1, -1, 2, 2, 1])
    prepared = prepare("folder", 8, tmp_path / "out", dataset_path=tmp_path / "in", limit=3)
    rows = np.sort(np.random.default_rng(0).choice(6, 3, replace=False))
    np.testing.assert_array_equal(prepared.images, bands[rows] >> 8)
    np.testing.assert_array_equal(prepared.labels, np.array([0, 1, -1, 2, 2, 1])[rows])
    np.save(tmp_path / "grey.npy", bands[..., 0].astype(">u2"))
    np.save(tmp_path / "float.npy", np.asfortranarray(bands[..., :3] / 65535))
    files = [tmp_path / "grey.npy", tmp_path / "float.npy"]
    grey, rgb = (prepare("folder", 8, tmp_path / "out", dataset_path=file) for file in files)
    np.testing.assert_array_equal(grey.images, bands[..., :1] >> 8)
    np.testing.assert_array_equal(rgb.images, np.round(bands[..., :3] / 65535 * 255))
    bad = {"whole": np.zeros((5, 8, 8), np.int64), "first": np.zeros((5, 3, 8, 8), np.uint8), "flat": np.zeros((5, 8))}
    for name, pixels in bad.items():
        np.save(tmp_path / f"{name}.npy", pixels)
        with pytest.raises(ValueError, match=rf"{name}\.npy, wanted one \(N, H, W\)"):
            prepare("folder", 8, tmp_path / "out", dataset_path=tmp_path / f"{name}.npy")
    with pytest.raises(ValueError, match=r"got channels=3 for .*, wanted 5"):
        prepare("folder", 8, tmp_path / "out", dataset_path=tmp_path / "in", channels=3)
    np.save(tmp_path / "in/labels.npy", [0.5])
    with pytest.raises(ValueError, match=r"got labels float64 \(1,\) of 6 images"):
        prepare("folder", 8, tmp_path / "out", dataset_path=tmp_path / "in")


def test_emoji_are_the_bitmaps_of_the_font(tmp_path):
    from matplotlib.font_manager import findSystemFonts

    with pytest.raises(ValueError, match="fonts-noto-color-emoji") as caught:
        prepare("emoji", 64, tmp_path, dataset_path=next(font for font in findSystemFonts() if "Emoji" not in font))
    assert "\n" not in str(caught.value)
    if not any("NotoColorEmoji" in font for font in findSystemFonts()):
        pytest.skip("needs the font NotoColorEmoji, which is not here")
    with pytest.raises(ValueError, match=r"got split='test', wanted none, NotoColorEmoji.ttf has no splits"):
        prepare("emoji", 64, tmp_path, split="test")
    prepared = prepare("emoji", 64, tmp_path)
    assert 1300 < len(prepared.images) < 2000 and prepared.images.shape[1:] == (64, 64, 3)
    assert prepared.class_names == sorted(prepared.class_names) and min(prepared.manifest["class_counts"].values()) > 50
    assert (prepared.images[:, 0, 0] == 255).all(-1).mean() > 0.8 and "drawings" in prepared.notes[0]
    images = sources.SOURCES["emoji"]((64, 64), None, 0, "train").open(False)
    items = {where: (image, label) for image, label, where in images.read(np.arange(images.count))}
    for code, group in {0x1F600: "smileys", 0x1F43B: "nature", 0x1F355: "food", 0x1F680: "travel"}.items():
        assert prepared.class_names[items[f"U+{code:X}"][1]] == group
    flags = [where for where in items if re.search("U\\+1F1[EF]|U\\+1F3F[BCDEF]", where)]
    grinning, row = Image.open(io.BytesIO(items["U+1F600"][0])), list(items).index("U+1F600")
    assert not flags and grinning.size == (136, 128)
    yellow = prepared.images[row, 32, 8].astype(int)
    assert yellow[0] > 200 and yellow[1] > 130 and yellow[2] < 120


# ------------------------------------------------------------------------------------------- what is not right


def test_what_does_not_decode_is_named(tmp_path, pictures, hub_copy):
    folder = png_folder(tmp_path / "in", pictures[:3])
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"001\.png, which does not decode") as caught:
        prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    assert "\n" not in str(caught.value)
    shard = hub_copy / "plain_text" / "train-00001-of-00002.parquet"
    cells = [encoded(image) for image in pictures[13:]]
    cells[4] = b"not an image"
    write_shard(shard, cells, [0] * 10)
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet, row 4, which does not decode"):
        prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy)
    cells[4] = None
    write_shard(shard, cells, [0] * 10)
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet, row 4, which does not decode"):
        prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy)
    assert not list((tmp_path / "out").glob("[!.]*")) and not list(tmp_path.rglob(".*.preparing"))


def test_a_row_is_named_by_the_path_that_it_has(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": encoded(noise(1)[0]), "path": "cats/1.png"}, {"bytes": b"", "path": "cats/2.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "some.parquet")
    with pytest.raises(ValueError, match=r"some\.parquet, row 1 cats/2\.png, which does not decode"):
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "some.parquet")


def test_skipped_images_are_counted_and_named(tmp_path, pictures):
    folder = png_folder(tmp_path / "in", pictures[:15])
    for i in range(1, 13):
        (folder / f"{i:03}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"001\.png.*on_error=skip"):
        prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=folder, on_error="skip")
    np.testing.assert_array_equal(prepared.images, pictures[[0, 13, 14]])
    np.testing.assert_array_equal(np.load(prepared.folder / "images.npy"), pictures[[0, 13, 14]])
    manifest = prepared.manifest
    assert manifest["count"] == 3 and manifest["shape"] == [3, 16, 16, 3] and manifest["on_error"] == "skip"
    assert manifest["skipped"] == {"count": 12, "first": [str(folder / f"{i:03}.png") for i in range(1, 11)]}
    for i in (0, 13, 14):
        (folder / f"{i:03}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"no images \(15 skipped\)"):
        prepare("folder", 16, tmp_path / "none", dataset_path=folder, on_error="skip")


def test_what_cannot_be_taken_is_counted_and_named(tmp_path, pictures, capsys, monkeypatch):
    """Links that lead nowhere or round, what is no file or no image. Linked folders and strange names are fine."""
    folder, elsewhere = png_folder(tmp_path / "in", pictures[:2]), png_folder(tmp_path / "elsewhere", pictures[2:4])
    whole = prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    assert whole.notes == [] and capsys.readouterr().out == ""
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("missing")
    (folder / "folder.png/up").symlink_to(folder)
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.png")
    os.mkdir(folder / ".hidden")
    (folder / "secret.png").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "secret.png")  # root may read everything
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    assert prepared.manifest["left_out"] == {"count": 6, "first": [
        "folder.png/up: a link that leads round", "loop.png: Too many levels of symbolic links",
        "notes.txt: no image", "nowhere.png: a link that leads nowhere", "pipe.png: no regular file",
        "secret.png: no permission",
    ]}  # fmt: skip
    assert prepared.sha256 == whole.sha256 and prepared.manifest["skipped"]["count"] == 0
    assert capsys.readouterr().out.startswith("left out: 6 (folder.png/up: a link that leads round; ")
    (folder / "more").symlink_to(elsewhere)
    image = (folder / "000.png").read_bytes()
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(image)
    (folder / "two\nlines.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"two\\nlines\.png, which does not decode"):
        prepare("folder", 16, tmp_path / "out", dataset_path=folder)
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=folder, on_error="skip")
    np.testing.assert_array_equal(prepared.images, pictures[[0, 1, 0, 2, 3]])
    assert prepared.manifest["skipped"] == {"count": 1, "first": [str(folder / "two\\nlines.png")]}


def test_damaged_and_foreign_parquet_is_refused_by_name_or_skipped(tmp_path, hub_copy, pictures):
    shard = hub_copy / "plain_text" / "train-00001-of-00002.parquet"
    whole = shard.read_bytes()

    def refused(content: bytes, message: str) -> None:
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train-00001-of-00002\.parquet.*{message}") as caught:
            prepare("cifar10", 16, tmp_path / "out", dataset_path=hub_copy)
        assert "\n" not in str(caught.value) and not list((tmp_path / "out").glob("[!.]*"))
        prepared = prepare("cifar10", 16, tmp_path / message[:9], dataset_path=hub_copy, on_error="skip")
        np.testing.assert_array_equal(prepared.images, pictures[:13])
        counted = prepared.manifest["skipped"]["count"], prepared.manifest["left_out"]["count"]
        assert counted == ((10, 0) if "row" in message else (0, 1))

    refused(whole[:-20], "wanted a whole Parquet file")
    refused(b"", "wanted a whole Parquet file")
    refused(b"<!DOCTYPE html>" * 20, "wanted a whole Parquet file")
    refused(whole[:200] + bytes(3000) + whole[3200:], "damaged after row 0")
    write_shard(shard, [encoded(noise(1)[0])], column="picture")
    refused(shard.read_bytes(), "wanted columns and classes of")


def test_what_stands_behind_damage_in_parquet_is_read(tmp_path, pictures):
    file = tmp_path / "copy/train-00000-of-00001.parquet"
    write_shard(file, [encoded(picture) for picture in pictures[:6]], row_group_size=2)
    whole, middle = file.read_bytes(), encoded(pictures[2])
    at = whole.index(middle[:60])
    file.write_bytes(whole[: at - 40] + bytes(len(middle)) + whole[at - 40 + len(middle) :])
    prepared = prepare("cifar10", 16, tmp_path / "out", dataset_path=tmp_path / "copy", on_error="skip")
    np.testing.assert_array_equal(prepared.images, pictures[[0, 1, 4, 5]])
    assert prepared.manifest["skipped"]["count"] == 2


def test_parquet_without_images_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "some.parquet")
    with pytest.raises(ValueError, match=r"got columns \['text'\] in .*some\.parquet, wanted one of images"):
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "some.parquet")


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
        ({"on_error": "ignore"}, "got on_error='ignore', wanted one of stop, skip"),
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
        ({"dataset": "folder", "dataset_path": __file__}, r"0 images.*left out \['test_sources.py: no image'\]"),
        ({"dataset": "folder", "dataset_path": ""}, "got dataset_path='', which does not exist"),
        ({"dataset": "folder", "dataset_path": "~/no/such"}, f"got dataset_path={Path.home()}/no/such, which does not"),
        ({"width": 5}, "got width=5, wanted an even"),
        ({"channels": 0}, "got channels=0, wanted an integer"),
        ({"split": "test"}, "got split='test', wanted none, scikit-learn load_digits has no splits"),
        ({"dataset": "patches", "split": "validation"}, "got split='validation', wanted none, .* has no splits"),
        ({"dataset": "stl10", "dataset_path": str(Path(__file__).parent)}, "of split 'unlabeled' in .*tests"),
        (
            {"dataset": "cifar10", "dataset_path": __file__},
            "of split 'train' in .*: unpack it, or set dataset to folder",
        ),
        ({"dataset": "patches", "resolution": 500}, "got 500x500 for patches, wanted 426x640 at most"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare(**{"dataset": "digits", "resolution": 16, "root": tmp_path / "out", **settings})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_source_is_checked_at_once_and_without_a_trace(tmp_path, hub_copy):
    before = sorted(tmp_path.rglob("*"))
    start = time.process_time()
    data.opened(*data.check_source("cifar10", 32, dataset_path=hub_copy, limit=5, on_error="skip"))
    with pytest.raises(ValueError, match="split 'unlabeled'"):
        data.check_source("stl10", 64, dataset_path=hub_copy)
    assert time.process_time() - start < 1 and sorted(tmp_path.rglob("*")) == before


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
    with pytest.raises(ConnectionError, match=r"network.*dataset_path.*hf download") as caught:
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


class FakeHub(BaseHTTPRequestHandler):
    """One repository of one file, which is cut off near its end the first time."""

    protocol_version, commit, name, content, asked = (
        "HTTP/1.1",
        "c0ffee" * 6 + "c0ff",
        "unlabeled-00000-of-00001.parquet",
        b"",
        [],
    )

    def do_GET(self):
        size, body, headers = len(self.content), self.content, {"X-Repo-Commit": self.commit, "ETag": '"1"'}
        if "/resolve/" not in self.path:
            file = {
                "type": "file",
                "path": self.name,
                "size": size,
                "oid": "0",
                "lfs": {"oid": "1", "size": size, "pointerSize": 1},
            }
            info = {"id": "jxie/stl10", "sha": self.commit, "siblings": [], "tags": [], "downloads": 0, "likes": 0}
            body = json.dumps([file] if "/tree/" in self.path else info).encode()
        elif part := self.headers["Range"]:
            first = int(re.match(r"bytes=(\d+)-", part)[1])
            body, headers["Content-Range"] = body[first:], f"bytes {first}-{size - 1}/{size}"
        self.send_response(206 if "Content-Range" in headers else 200)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET" and "/resolve/" in self.path:
            self.asked.append(size - len(body))
        if self.command == "GET":
            self.wfile.write(body[:-1_000_000] if self.asked == [0] else body)
        if self.asked == [0]:
            self.asked.append("cut")
            self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD, log_message = do_GET, lambda *_: None


def test_a_download_goes_on_where_it_was_cut_off_and_is_kept(tmp_path):
    write_shard(tmp_path / "shard", [os.urandom(2**20) for _ in range(24)], [-1] * 24, column="image")
    FakeHub.content = (tmp_path / "shard").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from wddm.sources import SOURCES; s = SOURCES['stl10']((64, 64), None, 0, 'train'); "
    code += "images = s.open(False); print(f'@{images.count} {images.revision} {s.content()}')"
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    for _ in range(2):  # the second time without the server
        options = {"env": {**os.environ, **variables}, "stdout": subprocess.PIPE, "text": True, "timeout": 60}
        result = subprocess.run([sys.executable, "-c", code], **options).stdout
        assert result == f"@24 {FakeHub.commit} jxie/stl10@{FakeHub.commit}\n"
        server.shutdown()
        server.server_close()
    assert FakeHub.asked[:2] == [0, "cut"] and FakeHub.asked[2] >= 10_000_000 and len(FakeHub.asked) == 3


def test_why_a_folder_has_no_labels_is_said(tmp_path, pictures):
    folder = png_folder(tmp_path / "in", pictures[:2])
    np.save(folder / "labels.npy", np.arange(2))
    for name in ("cat", "dog"):
        png_folder(folder / name, pictures[:1])
    said = prepare("folder", 16, tmp_path / "out", dataset_path=folder).notes
    assert said[0] == "no labels: 2 images are in none of the folders cat, dog"
    assert said[1].startswith("left out: 1 (") and said[1].endswith("labels.npy: no labels of these)")
    captioned = png_folder(tmp_path / "captioned", noise(22))
    rows = "".join(f"{i:03}.png,a picture of {i}\n" for i in range(22))
    (captioned / "metadata.csv").write_text(f"file_name,text\n{rows}")
    assert "most values of the column text occur once" in prepare(
        "folder", 16, tmp_path / "out", dataset_path=captioned
    ).notes[0]  # fmt: skip


def test_training_and_testing_are_splits_too(tmp_path, pictures):
    png_folder(tmp_path / "in/training", pictures[:2])
    png_folder(tmp_path / "in/testing", pictures[2:5])
    assert len(prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in").images) == 2
    assert len(prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", split="test").images) == 3


@pytest.mark.parametrize("beside", ["README.txt", "__MACOSX/photos/._x.png", ".DS_Store", "LICENSE"])
def test_what_lies_beside_the_only_folder_hides_neither_splits_nor_classes(tmp_path, pictures, beside):
    """As archives unpack: else the test images would be trained on, without labels."""
    for part, rows in (("train", pictures[:4]), ("test", pictures[4:8])):
        png_folder(tmp_path / "in/photos" / part / "cat", rows[:2])
        png_folder(tmp_path / "in/photos" / part / "dog", rows[2:])
    (tmp_path / "in" / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "in" / beside).write_bytes(b"no image")
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    np.testing.assert_array_equal(prepared.images, pictures[:4])
    assert prepared.class_names == ["cat", "dog"] and prepared.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "classes").mkdir()
    (tmp_path / "in/photos/train").rename(tmp_path / "classes/birds")
    (tmp_path / "classes/LICENSE").touch()
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "classes")
    assert prepared.class_names == ["cat", "dog"] and prepared.labels.tolist() == [0, 0, 1, 1]


def test_splits_with_a_year_are_splits(tmp_path, pictures):
    """COCO's are called train2017 and val2017."""
    png_folder(tmp_path / "in/train2017", pictures[:2])
    png_folder(tmp_path / "in/val2017", pictures[2:5])
    same = [
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", split=split)
        for split in ("train", "Training", "train + training")
    ]
    np.testing.assert_array_equal(same[0].images, pictures[:2])
    assert same[0].labels is None and len({prepared.folder for prepared in same}) == 1
    assert len(prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", split="validation").images) == 3


def test_the_labels_of_an_array_are_those_beside_it(tmp_path, pictures):
    for part, label in (("test", 1), ("train", 2)):
        (tmp_path / "in" / part).mkdir(parents=True)
        np.save(tmp_path / "in" / part / "images.npy", pictures[:4] // label)
        np.save(tmp_path / "in" / part / "labels.npy", np.full(4, label))
    for part, label in (("test", 1), ("train", 2)):
        prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in", split=part)
        np.testing.assert_array_equal(prepared.images, pictures[:4] // label)
        assert prepared.labels.tolist() == [label] * 4


@pytest.mark.parametrize(
    "place", [("images/x.npy", "labels/labels.npy"), ("data/x.npy", "labels.npy"), ("x.npy", "Labels.npy")]
)
def test_the_only_labels_are_those_of_the_array(tmp_path, pictures, place):
    folders = []
    for root in ("a", "b/c"):
        for name, content in zip(place, (pictures[:4], np.array([0, 1, 0, 1])), strict=True):
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / root / name, content)
        prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / root)
        assert prepared.labels.tolist() == [0, 1, 0, 1]
        folders.append(prepared.folder)
    assert folders[0] == folders[1]


def test_shards_whose_classes_stand_in_another_order_are_refused(tmp_path, pictures):
    for name, names in (("a", ("cat", "dog")), ("b", ("dog", "cat"))):
        write_shard(tmp_path / f"in/{name}.parquet", [encoded(x) for x in pictures[:2]], [0, 1], names=names)
    with pytest.raises(ValueError, match=r"b\.parquet, wanted columns and classes of .*a\.parquet: separate them"):
        prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")


def test_of_columns_of_images_that_called_image_is_taken_and_an_index_is_no_label(tmp_path, pictures):
    import pandas as pd
    import pyarrow as pa

    cells = [[{"bytes": encoded(one), "path": None} for one in part] for part in (pictures[:4], pictures[4:8])]
    table = pd.DataFrame({"mask": cells[1], "image": cells[0], "kind": ["b", "a", "b", "a"]}, index=[5, 7, 8, 9])
    (tmp_path / "in").mkdir()
    pa.parquet.write_table(pa.Table.from_pandas(table), tmp_path / "in/x.parquet")
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    np.testing.assert_array_equal(prepared.images, pictures[:4])
    assert prepared.labels.tolist() == [1, 0, 1, 0] and prepared.class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("file_name\ncat/000.png\n", ["cat", "dog"]),  # says nothing of labels: the folders do
        ("file_name,score\ncat/000.png,0.5\ndog/000.png,1.5\n", ["cat", "dog"]),  # a number is no class
        ("file_name,kind\ncat/000.png,x,\ncat/001.png,y,\ndog/000.png,y,\ndog/001.png,x,\n", ["x", "y"]),
    ],
)
def test_a_table_of_no_labels_leaves_those_of_folders(tmp_path, pictures, table, names):
    for i, folder in enumerate(("cat", "dog")):
        png_folder(tmp_path / "in" / folder, pictures[2 * i : 2 * i + 2])
    (tmp_path / "in/metadata.csv").write_text(table)
    prepared = prepare("folder", 16, tmp_path / "out", dataset_path=tmp_path / "in")
    assert prepared.class_names == names
    assert prepared.labels.tolist() == ([0, 0, 1, 1] if names == ["cat", "dog"] else [0, 1, 1, 0])
