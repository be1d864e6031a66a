"""sources: where images come from. A new data set is one function and a line in `SOURCES`.

Such a function takes (resolution, dataset_path, seed) and returns a `Source`: how many images there are, and
a reader that hands them over in chunks, encoded or as pixels. `decode` makes of a chunk what `data.prepare`
stores.

Every image is made RGB (digits: one channel), resized until its shorter side is the resolution with PIL's
antialiased Lanczos filter, and cropped to the centre; one that has the size already passes untouched.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

CHUNK = 256  # images handed over at a time
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
PATCHES = 10_000  # crops in `patches`

Item = tuple[bytes | Path | np.ndarray | None, int | None, str]  # image, label, where it is from


@dataclass(frozen=True)
class Source:
    """Images to prepare. `read(rows)` yields chunks of items for ascending row numbers, in order."""

    name: str
    count: int
    read: Callable[[np.ndarray], Iterator[list[Item]]]
    channels: int = 3
    class_names: list[str] | None = None
    revision: str | None = None
    split: str = "all"


def digits(resolution: int, dataset_path: str | None, seed: int) -> Source:
    """The 1,797 handwritten digits in scikit-learn: 8x8, 17 grey levels, 1 channel, 10 classes; enlarged."""
    from sklearn.datasets import load_digits

    _embedded("digits", dataset_path)
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    read = partial(_items, pixels, bunch.target, "digits")
    return Source("scikit-learn load_digits", len(pixels), read, 1, [str(digit) for digit in range(10)])


def patches(resolution: int, dataset_path: str | None, seed: int) -> Source:
    """10,000 random full-scale crops of the two photographs (the classes) in scikit-learn, 427x640 pixels."""
    from sklearn.datasets import load_sample_images

    _embedded("patches", dataset_path)
    bunch = load_sample_images()
    photographs = np.stack(bunch.images)
    if resolution > min(photographs.shape[1:3]):
        raise ValueError(f"got resolution={resolution}, wanted at most 426 for patches: choose a smaller one")
    rng = np.random.default_rng(seed)
    photo = rng.integers(len(photographs), size=PATCHES)
    top, left = (rng.integers(side - resolution + 1, size=PATCHES) for side in photographs.shape[1:3])
    crops = np.lib.stride_tricks.sliding_window_view(photographs, (resolution, resolution), axis=(1, 2))

    def read(rows: np.ndarray) -> Iterator[list[Item]]:
        for part in np.split(rows, range(CHUNK, len(rows), CHUNK)):
            pixels = crops[photo[part], top[part], left[part]].transpose(0, 2, 3, 1)  # (n, r, r, C)
            yield from _items(pixels, photo[part], "patches", np.arange(len(part)))

    names = [Path(name).stem for name in bunch.filenames]
    return Source("scikit-learn load_sample_images", PATCHES, read, class_names=names)


def folder(resolution: int, dataset_path: str | None, seed: int) -> Source:
    """All images, or all Parquet files, below a folder; subfolders that hold all images are classes."""
    if dataset_path is None:
        raise ValueError('got dataset="folder" alone, wanted a folder of images: give dataset_path')
    tables, files = _files(dataset_path, {".parquet"}), _files(dataset_path, SUFFIXES)
    if bool(tables) == bool(files):
        found = f"{len(tables)} Parquet files and {len(files)} images"
        raise ValueError(f"got {found} in {dataset_path}, wanted one or the other: separate them")
    if tables:
        return _parquet(dataset_path, tables)
    tops = [file.relative_to(dataset_path).parts[:-1][:1] for file in files]
    names = sorted({top[0] for top in tops if top})
    labelled = all(tops) and len(names) > 1
    labels = [names.index(top[0]) for top in tops] if labelled else None
    read = partial(_items, files, labels, "")
    return Source(dataset_path, len(files), read, class_names=names if labelled else None)


def hub(resolution: int, dataset_path: str | None, seed: int, *, repo: str, split: str) -> Source:
    """Splits ("train+validation") of "owner/name@revision" on the Hub, or of a copy laid out so."""
    repo, _, revision = repo.partition("@")
    name = dataset_path or repo
    root, commit = (Path(dataset_path), None) if dataset_path else _download(repo, revision or None, split)
    files = _files(root, {".parquet"})
    tables = files if root.is_file() else []
    for part in split.split("+") if not root.is_file() else ():
        pattern = re.compile(rf"(^|[/_.-]){part}([/.-].*)?\.parquet$")
        found = [file for file in files if pattern.search(file.relative_to(root).as_posix())]
        shards = re.search(r"-of-(\d+)", found[0].name) if found else None
        if not found or (shards and len(found) != int(shards[1])):
            wanted = f"{int(shards[1])} files" if shards else "files"
            raise ValueError(
                f"got {len(found)} Parquet files of split {part!r} in {name}, wanted {wanted} "
                f"({part}-*.parquet): give dataset_path a complete copy in the Hub's layout"
            )
        tables += found
    return _parquet(name, tables, revision=commit, split=split)


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "patches": patches,
    "cifar10": partial(hub, repo="uoft-cs/cifar10@0b2714987fa478483af9968de7c934580d0bb9a2", split="train"),
    "stl10": partial(hub, repo="jxie/stl10", split="unlabeled"),
    "celebahq": partial(
        hub,
        repo="korexyz/celeba-hq-256x256@42078a1fb27b6079eaab8cf453efd3d79a8b7bda",
        split="train+validation",
    ),
    "folder": folder,
}


def decode(chunk: list[Item], shape: tuple[int, int, int]) -> tuple[np.ndarray, list[int | None]]:
    """uint8 (n, H, W, C) and the labels of a chunk; ValueError, which names it, for what is not an image."""
    pixels = np.empty((len(chunk), *shape), np.uint8)
    for out, (image, _, where) in zip(pixels, chunk, strict=True):
        try:
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            else:
                image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
                image = ImageOps.exif_transpose(image)
            image = image.convert("RGB" if shape[2] == 3 else "L")
            if image.size != shape[:2]:
                image = ImageOps.fit(image, shape[:2], Image.Resampling.LANCZOS)
        except Exception as error:  # PIL's decoders raise nearly everything
            message = " ".join(str(error).split())
            raise ValueError(f"got {where}, which does not decode ({message}): repair or remove it") from None
        out[:] = np.asarray(image).reshape(shape)
    return pixels, [label for _, label, _ in chunk]


def listing_sha256(root: str | Path) -> str:
    """What is there: sha256 of the names and sizes of the images and Parquet files below a folder."""
    files = _files(root, {".parquet", *SUFFIXES})
    lines = [f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _embedded(dataset: str, dataset_path: str | None) -> None:
    if dataset_path is not None:
        raise ValueError(f"got dataset_path={dataset_path}, wanted none, {dataset} is embedded: leave it out")


def _download(repo: str, revision: str | None, split: str) -> tuple[Path, str]:
    """Folder and commit of the Parquet files of a Hub data set, from the Hub or else from the cache."""
    from huggingface_hub import HfApi, snapshot_download

    wanted = {"revision": revision, "allow_patterns": [f"*{part}*.parquet" for part in split.split("+")]}
    reason = None
    try:  # one request that is not retried, so that a machine without network says so at once
        wanted["revision"] = HfApi().dataset_info(repo, revision=revision, timeout=10).sha
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        reason = type(error).__name__
    try:
        root = snapshot_download(repo, repo_type="dataset", local_files_only=bool(reason), **wanted)
    except Exception as error:
        raise ConnectionError(
            f"got no answer from the Hugging Face Hub for {repo} ({reason or type(error).__name__}), wanted "
            "it or a copy in its cache: connect to the network, or give dataset_path a folder of its Parquet "
            f"files, or bring here the cache of `huggingface-cli download {repo} --repo-type dataset`"
        ) from None
    return Path(root), Path(root).name


def _files(root: str | Path, suffixes: set[str]) -> list[Path]:
    """The file itself, or the files below a folder, hidden ones left out, in order of name."""
    root = Path(root)
    if not root.exists():
        raise ValueError(f"got dataset_path={root}, which does not exist: give a folder of images or Parquet")
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    shown = (file for file in files if not any(part[0] == "." for part in file.relative_to(root).parts))
    return [file for file in shown if file.suffix.lower() in suffixes]


def _items(images, labels, name: str, rows: np.ndarray) -> Iterator[list[Item]]:
    """Chunks of an indexable of pixels or, where there is no name, of files."""
    for part in np.split(rows, range(CHUNK, len(rows), CHUNK)):
        yield [
            (images[i], None if labels is None else int(labels[i]), f"{name} {i}" if name else str(images[i]))
            for i in part
        ]


def _parquet(name: str, tables: list[Path], **origin) -> Source:
    """The first column of images, and the labels if there are any, of Parquet files as on the Hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features

    try:
        counts = [pq.ParquetFile(file).metadata.num_rows for file in tables]
        schema = pq.read_schema(tables[0])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"got {name}, wanted whole Parquet files ({error}): fetch them again") from None
    holds = [pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 for kind in schema.types]
    if not any(holds):
        raise ValueError(f"got columns {schema.names} in {tables[0]}, wanted one of images: give other files")
    column = schema.names[holds.index(True)]
    feature = Features.from_arrow_schema(schema).get("label")
    labelled = feature is not None and pa.types.is_integer(schema.field("label").type)
    columns = [column, "label"] if labelled else [column]

    def read(rows: np.ndarray) -> Iterator[list[Item]]:
        first = 0
        for file, count in zip(tables, counts, strict=True):
            chosen = rows[slice(*np.searchsorted(rows, (first, first + count)))] - first
            if len(chosen):
                yield from _table_items(file, columns, chosen)
            first += count

    names = feature.names if isinstance(feature, ClassLabel) else None
    return Source(name, sum(counts), read, class_names=names, **origin)


def _table_items(file: Path, columns: list[str], rows: np.ndarray) -> Iterator[list[Item]]:
    """Chunks of the given rows of one Parquet file; columns: of images, perhaps of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(CHUNK, columns=columns):
            part = rows[slice(*np.searchsorted(rows, (first, first + len(batch))))]
            taken = batch.take(pa.array(part - first)).to_pydict()
            labels = taken.get("label", [None] * len(part))
            cells = zip(taken[columns[0]], labels, part, strict=True)
            yield [(cell and cell["bytes"], label, f"{file}, row {row}") for cell, label, row in cells]
            first += len(batch)
    except pa.ArrowException as error:
        raise ValueError(f"got {file}, which is damaged after row {first} ({error}): fetch it again") from None
