"""sources: where images come from. A new data set is one function and a line in `SOURCES`.

Such a function takes (resolution, dataset_path, seed) and returns a `Source`: how many images there are, and
a reader that hands them over in chunks, encoded or as pixels. What is made of them (colour, orientation,
transparency, 16 bits, resizing and cropping) is the rule at the top of `decoding.py`.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wddm import parquet
from wddm.decoding import Item

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
PATCHES = 10_000  # crops in `patches`


@dataclass(frozen=True)
class Source:
    """Images to prepare. `read(rows, size)` yields those of ascending rows in order, up to `size` at a time."""

    name: str
    count: int
    read: Callable[[np.ndarray, int], Iterator[list[Item]]]
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

    def read(rows: np.ndarray, size: int) -> Iterator[list[Item]]:
        for part in np.split(rows, range(size, len(rows), size)):
            pixels = crops[photo[part], top[part], left[part]].transpose(0, 2, 3, 1)  # (n, r, r, C)
            yield from _items(pixels, photo[part], "patches", np.arange(len(part)), size)

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
        return _tables(dataset_path, tables)
    tops = [file.relative_to(dataset_path).parts[:-1][:1] for file in files]
    names = sorted({top[0] for top in tops if top})
    labelled = all(tops) and len(names) > 1
    labels = [names.index(top[0]) for top in tops] if labelled else None
    read = partial(_items, files, labels, "")
    return Source(dataset_path, len(files), read, class_names=names if labelled else None)


def hub(resolution: int, dataset_path: str | None, seed: int, *, repo: str, split: str) -> Source:
    """Splits ("train+validation") of "owner/name@revision" on the Hub, or of a copy laid out so."""
    repo, _, revision = repo.partition("@")
    root, found = (dataset_path, None) if dataset_path else _download(repo, revision or None, split)
    return _tables(dataset_path or repo, shards(root, split), revision=found, split=split)


def shards(root: str | Path, split: str) -> list[Path]:
    """Parquet files of "train+validation" below a folder in the Hub's layout; a file stands for itself.

    Raises:
        ValueError: there are none, or fewer than the names ("-of-00004") say.
    """
    files = _files(root, {".parquet"})
    if Path(root).is_file():
        return files
    chosen = []
    for part in split.split("+"):
        pattern = re.compile(rf"(^|[/_.-]){re.escape(part)}([/.-].*)?\.parquet$")
        found = [file for file in files if pattern.search(file.relative_to(root).as_posix())]
        total = re.search(r"-of-(\d+)", found[0].name) if found else None
        if not found or (total and len(found) != int(total[1])):
            wanted = f"{int(total[1])} files" if total else "files"
            raise ValueError(
                f"got {len(found)} Parquet files of split {part!r} in {root}, wanted {wanted} "
                f"({part}-*.parquet): give dataset_path a complete copy in the Hub's layout"
            )
        chosen += found
    return chosen


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


def listing_sha256(root: str | Path) -> str:
    """What is there: sha256 of the names and sizes of the images and Parquet files below a folder."""
    files = _files(root, {".parquet", *SUFFIXES})
    lines = [f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _embedded(dataset: str, dataset_path: str | None) -> None:
    if dataset_path is not None:
        raise ValueError(f"got dataset_path={dataset_path}, wanted none, {dataset} is embedded: leave it out")


def commit(repo: str, revision: str | None) -> str:
    """That a revision of a data set on the Hub stands for now; ConnectionError if the Hub does not answer at once."""
    from huggingface_hub import HfApi

    try:  # one request, which is not retried
        return HfApi().dataset_info(repo, revision=revision, timeout=10).sha
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        raise _unreachable(repo, error) from None


def _download(repo: str, revision: str | None, split: str) -> tuple[Path, str]:
    """Folder and commit of the Parquet files of a Hub data set, from the Hub or else from its cache.

    Files that are there already are not fetched again, and one whose connection breaks is taken up where it broke.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"*{part}*.parquet" for part in split.split("+")]
    wanted = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    try:
        commit(repo, revision)  # asked only whether it is there: the cache must learn what the revision stands for
        root = snapshot_download(repo, tqdm_class=_Bar, **wanted)
    except Exception as error:
        try:
            root = snapshot_download(repo, local_files_only=True, **wanted)
        except Exception:
            raise (error if isinstance(error, ConnectionError) else _unreachable(repo, error)) from None
    return Path(root), Path(root).name


def _unreachable(repo: str, error: Exception) -> ConnectionError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return ConnectionError(
        f"got nothing from the Hugging Face Hub for {repo} ({reason}), wanted it or a copy in its cache: connect to "
        "the network, or give dataset_path a folder of its Parquet files, or bring here the cache of "
        f"`hf download {repo} --repo-type dataset`"
    )


class _Bar(tqdm):
    """Of the bars that the Hub's client draws, the one of the bytes that have arrived, as plain text on stdout."""

    def __init__(self, *arguments, **options) -> None:
        options["disable"] = not str(options.get("desc")).startswith("Reconstructing")
        options |= {"desc": "downloading", "bar_format": None, "file": sys.stdout}
        super().__init__(*arguments, **options)

    def set_description(self, *_, **__) -> None:
        """It keeps its own."""


def _files(root: str | Path, suffixes: set[str]) -> list[Path]:
    """The file itself, or the files below a folder, hidden ones left out, in order of name."""
    root = Path(root)
    if not root.exists():
        raise ValueError(f"got dataset_path={root}, which does not exist: give a folder of images or Parquet")
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    shown = (file for file in files if not any(part[0] == "." for part in file.relative_to(root).parts))
    return [file for file in shown if file.suffix.lower() in suffixes]


def _items(images, labels, name: str, rows: np.ndarray, size: int) -> Iterator[list[Item]]:
    """Chunks of an indexable of pixels or, where there is no name, of files."""
    for part in np.split(rows, range(size, len(rows), size)):
        yield [
            (images[i], None if labels is None else int(labels[i]), f"{name} {i}" if name else str(images[i]))
            for i in part
        ]


def _tables(name: str, files: list[Path], **origin) -> Source:
    count, read, names = parquet.images(files)
    return Source(name, count, read, class_names=names, **origin)
