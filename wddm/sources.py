"""sources: where images come from. A new data set is one function and a line in `SOURCES`.

Such a function takes (resolution, dataset_path, seed), refuses what it can without the network, and returns a
`Source`: what tells its images from all others, and how to open them. Opened `Images` are handed over one by one,
encoded or as pixels; what is made of them is the rule at the top of `decoding.py`.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from wddm.decoding import Item
from wddm.files import Digests

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
PATCHES = 10_000  # crops in `patches`
CHUNK, CHUNK_BYTES = 256, 2**22  # images that are decoded at a time, and what encoded ones take on average, at most


@dataclass(frozen=True)
class Images:
    """Images to decode. `read` yields those of ascending rows in order; `chunk` of them are decoded at a time."""

    count: int
    read: Callable[[np.ndarray], Iterator[Item]]
    channels: int = 3
    class_names: list[str] | None = None
    revision: str | None = None
    chunk: int = CHUNK


@dataclass(frozen=True)
class Source:
    """A set that can be opened. `content` is the same text for the same images, and another one for any others."""

    name: str
    content: Callable[[Digests], str]
    open: Callable[[], Images]
    split: str = "all"


def digits(resolution: int, dataset_path: str | None, seed: int) -> Source:
    """The 1,797 handwritten digits in scikit-learn: 8x8, 17 grey levels, 1 channel, 10 classes; enlarged."""

    def opened() -> Images:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        read = partial(map, lambda i: (pixels[i], int(bunch.target[i]), f"digits {i}"))
        return Images(len(pixels), read, 1, [str(digit) for digit in range(10)])

    return _embedded("digits", dataset_path, "load_digits", ["data/digits.csv.gz"], opened)


def patches(resolution: int, dataset_path: str | None, seed: int) -> Source:
    """10,000 random full-scale crops of the two photographs (the classes) in scikit-learn, 427x640 pixels."""

    def opened() -> Images:
        from sklearn.datasets import load_sample_images

        bunch = load_sample_images()
        rng = np.random.default_rng(seed)
        photo = rng.integers(len(bunch.images), size=PATCHES)
        top, left = (rng.integers(side - resolution + 1, size=PATCHES) for side in bunch.images[0].shape[:2])

        def crop(i: int) -> Item:
            y, x = top[i], left[i]
            return bunch.images[photo[i]][y : y + resolution, x : x + resolution], int(photo[i]), f"patches {i}"

        return Images(PATCHES, partial(map, crop), class_names=[Path(name).stem for name in bunch.filenames])

    if resolution > 427:
        raise ValueError(f"got resolution={resolution}, wanted at most 426 for patches: choose a smaller one")
    files = ["images/china.jpg", "images/flower.jpg"]
    return _embedded("patches", dataset_path, "load_sample_images", files, opened)


def folder(resolution: int, dataset_path: str | None, seed: int) -> Source:
    """All images, or all Parquet files, below a folder; subfolders that hold all images are classes."""
    if dataset_path is None:
        raise ValueError('got dataset="folder" alone, wanted a folder of images: give dataset_path')
    root = Path(dataset_path)
    tables, files = _files(root, {".parquet"}), _files(root, SUFFIXES)
    if bool(tables) == bool(files):
        found = f"{len(tables)} Parquet files and {len(files)} images"
        raise ValueError(f"got {found} in {root}, wanted one or the other: separate them")
    opened = partial(_tables, tables) if tables else partial(_pictures, root, files)
    return _local(dataset_path, root, tables or files, opened)


def hub(resolution: int, dataset_path: str | None, seed: int, *, repo: str, split: str) -> Source:
    """Splits ("train+validation") of "owner/name@revision" on the Hub, or of a copy laid out so."""
    if dataset_path is not None:
        files = shards(dataset_path, split)
        return _local(dataset_path, Path(dataset_path), files, partial(_tables, files), split)
    name, _, revision = repo.partition("@")

    def content(_: Digests) -> str:
        pinned = re.fullmatch("[0-9a-f]{40}", revision)
        return f"{name}@{revision if pinned else snapshot(name, [], revision=revision or None).name}"

    def opened() -> Images:
        root = snapshot(name, [f"*{part}*.parquet" for part in split.split("+")], revision=revision or None)
        return replace(_tables(shards(root, split)), revision=root.name)

    return Source(name, content, opened, split)


SOURCES: dict[str, Callable[[int, str | None, int], Source]] = {
    "digits": digits,
    "patches": patches,
    "cifar10": partial(hub, repo="uoft-cs/cifar10@0b2714987fa478483af9968de7c934580d0bb9a2", split="train"),
    "stl10": partial(hub, repo="jxie/stl10", split="unlabeled"),
    "celebahq": partial(
        hub, repo="korexyz/celeba-hq-256x256@42078a1fb27b6079eaab8cf453efd3d79a8b7bda", split="train+validation"
    ),
    "folder": folder,
}


def shards(root: str | Path, split: str) -> list[Path]:
    """Parquet files of "train+validation" below a folder in the Hub's layout; a file stands for itself.

    Raises:
        ValueError: there are none, or fewer than the names ("-of-00004") say.
    """
    root = Path(root)
    files = _files(root, {".parquet"})
    if root.is_file():
        return files
    chosen = []
    for part in split.split("+"):
        pattern = re.compile(rf"(^|[/_.-]){re.escape(part)}([/.-].*)?\.parquet$")
        found = [file for file in files if pattern.search(file.relative_to(root).as_posix())]
        total = re.search(r"-of-(\d+)", found[0].name) if found else None
        if not found or (total and len(found) != int(total[1])):
            wanted = f"{int(total[1]) if total else ''} files ({part}-*.parquet)".lstrip()
            raise ValueError(
                f"got {len(found)} Parquet files of split {part!r} in {root}, wanted {wanted}: give a complete copy"
            )
        chosen += found
    return chosen


def _files(root: Path, suffixes: set[str]) -> list[Path]:
    """The file itself, or the files below a folder, hidden ones left out, in order of name."""
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    shown = (file for file in files if not any(part[0] == "." for part in file.relative_to(root).parts))
    return [file for file in shown if file.suffix.lower() in suffixes]


def _local(name: str, root: Path, files: list[Path], opened: Callable[[], Images], split: str = "all") -> Source:
    """A set of files below `root`, which is the same one when the folder was moved or copied."""

    def content(digests: Digests) -> str:
        readable = [file for file in files if file.is_file() and os.access(file, os.R_OK)]
        others = [str(file.relative_to(root)) for file in sorted({*files} - {*readable})]  # they will not decode
        return digests.of_files(root, readable) + f", not readable: {others}" * bool(others)

    return Source(name, content, opened, split)


def _embedded(
    dataset: str, dataset_path: str | None, loader: str, files: list[str], opened: Callable[[], Images]
) -> Source:
    """A set that comes with scikit-learn, which is not imported to tell the content of its files."""
    if dataset_path is not None:
        raise ValueError(f"got dataset_path={dataset_path}, wanted none, {dataset} is embedded: leave it out")
    root = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets")))
    return _local(f"scikit-learn {loader}", root, [root / file for file in files], opened)


def _pictures(root: Path, files: list[Path]) -> Images:
    """Files of images; the folders at the top are classes if all files are in one and there are several."""
    tops = [file.relative_to(root).parts[:-1][:1] for file in files]
    names = sorted({top[0] for top in tops if top})
    labelled = all(tops) and len(names) > 1
    read = partial(map, lambda i: (files[i], names.index(tops[i][0]) if labelled else None, str(files[i])))
    return Images(len(files), read, class_names=names if labelled else None)


def _tables(files: list[Path]) -> Images:
    """The first column of images in Parquet files as on the Hub, with the integers of a column `label`.

    Read by pyarrow and not by `datasets`, which copies the files to Arrow ones and maps those into memory: reading
    100,000 images of 64x64 so peaks at three times the memory.

    Raises:
        ValueError: a file is no Parquet, is cut off, or holds other columns than the first.
    """
    import pyarrow as pa
    from datasets import ClassLabel, Features

    headers = [_parquet(file).metadata for file in files]
    counts, (schema, *others) = [one.num_rows for one in headers], [one.schema.to_arrow_schema() for one in headers]
    holds = [pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 for kind in schema.types]
    if not any(holds):
        raise ValueError(f"got columns {schema.names} in {files[0]}, wanted one of images: give other files")
    feature = Features.from_arrow_schema(schema).get("label")
    labelled = feature is not None and pa.types.is_integer(schema.field("label").type)
    columns = [schema.names[holds.index(True)], *["label"] * labelled]
    for file, other in zip(files[1:], others, strict=True):
        if not set(columns) <= set(other.names):
            raise ValueError(f"got columns {other.names} in {file}, wanted those of {files[0]}: separate them")
    stored = sum(one.row_group(i).total_byte_size for one in headers for i in range(one.num_row_groups))
    chunk = max(1, min(CHUNK, CHUNK_BYTES * sum(counts) // max(1, stored)))

    def read(rows: np.ndarray) -> Iterator[Item]:
        first = 0
        for file, count in zip(files, counts, strict=True):
            chosen = rows[slice(*np.searchsorted(rows, (first, first + count)))] - first
            if len(chosen):
                yield from _cells(file, columns, chosen, chunk)
            first += count

    names = feature.names if isinstance(feature, ClassLabel) else None
    return Images(sum(counts), read, class_names=names, chunk=chunk)


def _cells(file: Path, columns: list[str], rows: np.ndarray, chunk: int) -> Iterator[Item]:
    """The given rows of a Parquet file, of which `chunk` are held at a time; columns: of images, perhaps of labels."""
    import pyarrow as pa

    first, parquet = 0, _parquet(file)
    try:
        for batch in parquet.iter_batches(chunk, columns=columns):
            part = rows[slice(*np.searchsorted(rows, (first, first + len(batch))))]
            for row, values in zip(part, batch.take(pa.array(part - first)).to_pylist(), strict=True):
                cell = values[columns[0]] or {}
                yield cell.get("bytes"), values.get("label"), f"{file}, row {row} {cell.get('path') or ''}".rstrip()
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, f"which is damaged after row {first}", error) from None


def _parquet(file: Path) -> "ParquetFile":
    """pyarrow's reader, made to hold some pages of a file in memory, where by default it holds a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "wanted a whole Parquet file", error) from None


def _unreadable(file: Path, how: str, error: Exception) -> ValueError:
    return ValueError(f"got {file}, {how} ({' '.join(str(error).split())}): fetch it again")


def snapshot(
    repo: str, patterns: list[str], *, repo_type: str = "dataset", revision: str | None = None, **hub: Any
) -> Path:
    """Folder of the files of a Hub repository, named after the commit that the revision stands for.

    Without patterns nothing is fetched: the name is all that is asked for. Files that are there already are not
    fetched again, and one whose connection breaks is taken up where it broke. While the Hub is out of reach, its cache
    on this machine answers, or else it is a ConnectionError. `hub`: cache_dir, token, local_files_only.
    """
    from huggingface_hub import HfApi, snapshot_download

    fetch = partial(snapshot_download, repo, repo_type=repo_type, revision=revision, allow_patterns=patterns)
    try:  # one request that is not retried, so that a machine without network says so at once
        about = HfApi(token=hub.get("token")).repo_info(repo, repo_type=repo_type, revision=revision, timeout=10)
        return Path(fetch(tqdm_class=_Bar, **hub) if patterns else str(about.sha))
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        try:
            return Path(fetch(**hub | {"local_files_only": True}))
        except Exception:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    raise ConnectionError(
        f"got nothing from the Hugging Face Hub for {repo} ({reason}), wanted it or a copy in its cache: connect to "
        f"the network, or give{' dataset_path' * (repo_type == 'dataset')} a folder of its files, or bring here the "
        f"cache of `hf download {repo} --repo-type {repo_type}`"
    )


class _Bar(tqdm):
    """Of the bars that the Hub's client draws, the one of the bytes that have arrived, as plain text on stdout."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["disable"] = not str(options.get("desc")).startswith("Reconstructing")
        options |= {"desc": "downloading", "bar_format": None, "file": sys.stdout}
        super().__init__(*arguments, **options)

    def set_description(self, *_: Any, **__: Any) -> None:
        """It keeps its own."""
