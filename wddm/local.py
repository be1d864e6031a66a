"""local: images and labels from files (pictures, Parquet as on the Hub, arrays); lists a folder by kind and split."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wddm.decoding import Item, opened
from wddm.files import plain, refusing, walk

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

KINDS = {".parquet": "table", ".npy": "array", "metadata.csv": "labels", "labels.npy": "labels"}
KINDS |= dict.fromkeys([".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"], "image")
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
SPLITS |= {"training": "train", "testing": "test", "unlabeled": "unlabeled"}
CHUNK, CHUNK_BYTES = 256, 2**22  # most images decoded at a time, and most bytes that they take encoded
REMEDY = "fetch or write it again"


@dataclass(frozen=True)
class Images:
    """Images to decode: `read` takes ascending row numbers and yields an item each; `chunk` are decoded at a time."""

    count: int
    read: Callable[[np.ndarray], Iterator[Item]]
    channels: int | None = None  # None: 1 if all are grey by their headers, else 3
    class_names: list[str] | None = None
    note: str = ""  # what a user should know of the images
    left_out: Sequence[str] = ()  # what is not read, and why
    revision: str | None = None
    chunk: int = CHUNK


def listed(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Files below a folder by kind (table, array, image, labels), in order of name; and those left out, and why."""
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS.values()}
    left_out = []
    for file, trouble in walk(root):
        kind = KINDS.get(file.name.lower()) or KINDS.get(file.suffix.lower())
        if not kind and not trouble:  # its header may tell what its name does not
            with suppress(Exception), opened(file):
                kind = "image"
        if kind and not trouble:
            found[kind].append(file)
        else:
            name = file.relative_to(root) if file != root else file.name
            left_out.append(f"{plain(name)}: {trouble or 'no image'}")
    return found, left_out


def split_of(root: Path, file: Path) -> str | None:
    """The split of a file, or None: for images by the top folder, for Parquet and arrays by a word in the path."""
    path = file.relative_to(root)
    whole = KINDS.get(file.suffix.lower()) in ("table", "array")
    words = re.split("[/_.-]", path.as_posix())[::-1] if whole else path.parts[:-1][:1]
    return next(filter(None, map(split_called, words)), None)


def split_called(word: str) -> str | None:
    """The split that a word of a path names, as train, Training or val2017 do; None for other words."""
    return SPLITS.get(re.sub("(19|20)[0-9]{2}$", "", word.lower()))


def of_split(root: Path, files: list[Path], split: str) -> list[Path]:
    """Files of the splits in "train+validation", in this order; ValueError if one has none or not all (-of-00004)."""
    chosen = []
    for part in split.split("+"):
        found = [file for file in files if split_of(root, file) == part]
        total = re.search(r"-of-0*(\d+)", found[0].name) if found else None
        if not found or (total and len(found) != int(total[1])):
            kind = "images" if files and files[0].suffix != ".parquet" else "Parquet files"
            there = ", ".join(sorted({split_of(root, file) or "none" for file in files})) or "none"
            have = f"got {len(found)} {kind} of split {part!r} in {plain(root)}, wanted {total[1] if total else 'some'}"
            remedy = f"give all, or choose a split of {there}" if files else "unpack it, or set dataset to folder"
            raise ValueError(f"{have} files: {remedy}")
        chosen += found
    return chosen


def pictures(root: Path, files: list[Path], tables: list[Path], in_splits: bool, skip: bool) -> Images:
    """Image files; labels are those in metadata.csv, or else the top folders, if every image is in one of several."""
    tops = [(*file.relative_to(root).parts[in_splits:-1], "")[0] for file in files]
    folders = sorted({*tops} - {""})
    labels, names, note, left_out = _of_csv(tables, files) if tables else (np.full(len(files), -1), None, "", [])
    labelled = note or (labels >= 0).any()
    if not labelled and len(folders) > 1 and "" in tops:
        note = f"no labels: {tops.count('')} images are in none of the folders {', '.join(folders)[:80]}"
    elif not labelled and len(folders) > 1:
        labels, names = np.array([folders.index(top) for top in tops]), folders
    read = partial(map, lambda i: (files[i], int(labels[i]), plain(files[i])))
    return Images(len(files), read, None, names, note, left_out)


def _of_csv(tables: list[Path], files: list[Path]) -> tuple[np.ndarray, list[str] | None, str, list[str]]:
    """From metadata.csv with a column file_name: labels of `files`, class names, a note, and the rows left out."""
    import pandas as pd

    frames = []
    for table in tables:
        with refusing(plain(table), "columns file_name and label", REMEDY):
            frame = pd.read_csv(table, index_col=False, keep_default_na=False, na_values=[""])
            frames.append(frame.set_index(pd.Index([table.parent / name for name in frame.pop("file_name")])))
    known = pd.concat(frames).convert_dtypes()
    column, note = _label_column([n for n in known if n == "label" or known[n].dtype.kind != "f"], [])
    left_out = sorted(f"{plain(path)} (in metadata.csv, but not there)" for path in {*known.index} - {*files})
    before, known = known[known.index.duplicated("last")], known[~known.index.duplicated("last")].reindex(files)
    left_out += [f"{plain(path)} (twice in metadata.csv: the last row counts)" for path in before.index]
    return *(numbers(known[column], column) if column else (np.full(len(files), -1), None, note)), left_out


def _label_column(candidates: list[str], classes: list[str]) -> tuple[str | None, str]:
    """The column of labels: "label", or the only one of classes, or the only candidate; else None, and a note why."""
    for only in (["label"] if "label" in candidates else [], classes, candidates):
        if len(only) == 1:
            return only[0], ""
    return None, f"no labels: any of the columns {', '.join(candidates)} could be, name one label" * bool(candidates)


def numbers(values: "pd.Series", column: str) -> tuple[np.ndarray, list[str] | None, str]:
    """Class numbers (-1: none) of integers, strings or bools; class names, None for integers; a note if no classes."""
    import pandas as pd

    labels = values.convert_dtypes()
    if labels.nunique() > max(1000 if column == "label" else 20, len(labels) / 2):
        return np.full(len(labels), -1), None, f"no labels: most values of the column {column} occur once"
    if labels.dtype == object and labels.dropna().map(type).nunique() > 1:
        raise ValueError(f"got labels of several types in the column {column}, wanted one type: write them alike")
    if pd.api.types.is_integer_dtype(labels):
        return np.maximum(labels.fillna(-1).to_numpy(np.int64), -1), None, ""
    codes, names = pd.factorize(labels, sort=True)
    return codes.astype(np.int64), [str(name) for name in names], ""


def npy(files: list[Path], labels: list[Path], skip: bool) -> Images:
    """Images of one array (.npy): uint8, uint16 or floats in [0, 1]; and their integer labels in labels.npy, if any."""
    with refusing(plain(files[0]), "an array of numbers (.npy)", REMEDY):
        pixels = np.load(files[0], mmap_mode="r")
        classes = np.load(labels[0]) if labels else np.full(len(pixels), -1)
    wanted = "wanted one (N, H, W) or (N, H, W, C) of uint8, uint16 or floats in [0, 1], N integer labels: convert it"
    known = f"{pixels.dtype.kind}{pixels.itemsize}" in ("u1", "u2", "f2", "f4", "f8")
    if len(files) > 1 or pixels.ndim not in (3, 4) or not pixels.size or not known:
        raise ValueError(f"got {len(files)} arrays, {pixels.dtype} {pixels.shape} in {plain(files[0])}, {wanted}")
    first, height, width = pixels.shape[1:] if pixels.ndim == 4 else (1, 0, 0)
    if first < 5 < width or first < height == width:
        raise ValueError(f"got channels first, {pixels.shape}, in {plain(files[0])}, {wanted}")
    if classes.shape != pixels.shape[:1] or classes.dtype.kind not in "iu":
        raise ValueError(f"got labels {classes.dtype} {classes.shape} of {len(pixels)} images, {wanted}")
    read = partial(map, lambda i: (np.asarray(pixels[i]), max(int(classes[i]), -1), f"{plain(files[0])} {i}"))
    return Images(len(pixels), read, 1 if pixels.ndim == 3 else pixels.shape[3])


def tables(files: list[Path], skip: bool, *, beside: Sequence[Path] = ()) -> Images:
    """Images and labels of Parquet files laid out as on the Hub; `beside`: image files that rows may name.

    pyarrow reads them: `datasets` would copy them to Arrow files first, and peak at three times the memory.
    """
    import pandas as pd

    counts, parts, left_out, columns = {}, [], [], None
    for file in files:
        try:
            parquet = _parquet(file)
            columns = columns or _columns(file, parquet.schema_arrow)
            image, label, classes, note = columns
            named = _columns(file, parquet.schema_arrow)[2] if label else None
            if not {image, label} - {None} <= {*(have := parquet.schema_arrow.names)} or named not in (None, classes):
                wanted = f"wanted columns and classes of {plain(files[0])}"
                raise ValueError(f"got {have} in {plain(file)}, {wanted}: separate them")
            with refusing(plain(file), f"a whole column {label}", REMEDY):
                parts += [parquet.read([label])[label].to_pandas()] if label else []
            counts[file] = parquet.metadata.num_rows
        except ValueError as error:
            if not skip:
                raise
            left_out.append(str(error))
    if not counts:
        raise ValueError(f"got {len(files)} Parquet files of which none can be read, wanted whole ones: {left_out[0]}")
    count = sum(counts.values())
    labels, names, note = numbers(pd.concat(parts), label) if label else (np.full(count, -1), None, note)
    if classes and max(labels) >= len(classes):
        raise ValueError(f"got label {max(labels)} in {plain(files[0])}, wanted at most {len(classes) - 1}: correct it")
    chunk = max(1, min(CHUNK, CHUNK_BYTES * count // sum(file.stat().st_size for file in counts)))

    def read(rows: np.ndarray) -> Iterator[Item]:
        first = 0
        for file, count in counts.items():
            here = rows[slice(*np.searchsorted(rows, (first, first + count)))]
            yield from _rows(file, image, here - first, chunk, labels[first:], {*beside})
            first += count

    return Images(count, read, None, classes or names, note, left_out, chunk=chunk)


def _columns(file: Path, schema: "pa.Schema") -> tuple[str, str | None, list[str] | None, str]:
    """The columns of images and of labels, the class names if they are stored, and a note if no column is of labels."""
    from datasets import ClassLabel, Features

    with refusing(plain(file), "metadata that `datasets` reads", REMEDY):
        features = Features.from_arrow_schema(schema)
    images = [one.name for one in schema if "bytes" in getattr(one.type, "names", ())]
    images.sort(key=lambda name: name not in ("image", "img"))  # an image comes before its mask
    if not images:
        raise ValueError(f"got columns {schema.names} in {plain(file)}, wanted one of images: write it with `datasets`")
    kinds = {name: str(getattr(kind, "dtype", "")) for name, kind in features.items()}
    kinds.pop("__index_level_0__", None)  # the index that pandas stores
    candidates = [n for n in kinds if re.match("." if n == "label" else "u?int|bool|(large_)?string", kinds[n])]
    classes = {name: kind.names for name, kind in features.items() if isinstance(kind, ClassLabel)}
    label, note = _label_column(candidates, list(classes))
    return images[0], label, classes.get(label or ""), note


def _rows(file: Path, name: str, rows: np.ndarray, chunk: int, labels: np.ndarray, beside: set[Path]) -> Iterator[Item]:
    """Items of ascending `rows` of a Parquet file, images from the column `name`; `chunk` rows are held at a time."""
    parquet, chosen, first = _parquet(file), {*rows.tolist()}, 0
    for group in range(parquet.num_row_groups):
        end = first + parquet.metadata.row_group(group).num_rows
        due = rows[slice(*np.searchsorted(rows, (first, end)))]
        try:
            for batch in parquet.iter_batches(chunk, row_groups=[group], columns=[name]) if len(due) else ():
                for row, cell in enumerate(batch[name].to_pylist(), first):
                    if row in chosen:
                        image, path = (cell or {}).get("bytes"), (cell or {}).get("path") or ""
                        if not image and beside:  # a row may name a file
                            image = next((folder / path for folder in file.parents if folder / path in beside), None)
                        yield image, int(labels[row]), f"{plain(file)}, row {row} {plain(path)}".rstrip()
                first += len(batch)
        except Exception as error:  # pyarrow raises many kinds
            for row in due[due >= first]:
                yield f"the file is damaged after row {first}: {error}", int(labels[row]), f"{plain(file)}, row {row}"
        first = end


def _parquet(file: Path) -> "ParquetFile":
    """pyarrow's reader, set to hold some pages of a file in memory; by default it would hold a whole row group."""
    import pyarrow.parquet as pq

    with refusing(plain(file), "a whole Parquet file", REMEDY):
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
