"""sources: where images come from. A new data set is one function and a line in `SOURCES`.

Such a function takes ((height, width), dataset_path, seed, split), refuses what it can without the network, and returns
a `Source`: what tells its images from all others, and how to open them. Opened `Images` are read one by one, encoded or
as pixels; the rule at the top of `decoding.py` says how each is decoded.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from wddm import local
from wddm.decoding import Item
from wddm.files import digest_of, plain, refusing, snapshot

CELEBAHQ = "42078a1fb27b6079eaab8cf453efd3d79a8b7bda"  # commit on the Hub
PATCHES = 10_000  # crops in `patches`
EMOJI = {  # first code point of each block -> its group, roughly Unicode's
    0: "symbols", 0x1F300: "nature", 0x1F32D: "food", 0x1F330: "nature", 0x1F345: "food", 0x1F380: "activities",
    0x1F3D4: "travel", 0x1F3F5: "objects", 0x1F400: "nature", 0x1F440: "people", 0x1F493: "symbols", 0x1F4A1: "objects",
    0x1F500: "symbols", 0x1F550: "travel", 0x1F56F: "objects", 0x1F600: "smileys", 0x1F645: "people", 0x1F680: "travel",
    0x1F7E0: "symbols", 0x1F90C: "people", 0x1F910: "smileys", 0x1F930: "people", 0x1F93F: "activities",
    0x1F950: "food", 0x1F970: "smileys", 0x1F97B: "objects", 0x1F980: "nature", 0x1F9B0: "people", 0x1F9C0: "food",
    0x1F9CC: "people", 0x1F9E0: "objects", 0x1FAB0: "nature", 0x1FAC0: "people", 0x1FAD0: "food", 0x1FAE0: "smileys",
    0x1FAF0: "people",
}  # fmt: skip
FLAGS_AND_TONES = {*range(0x1F1E6, 0x1F200), 0x1F3F3, 0x1F3F4, *range(0x1F3FB, 0x1F400), *range(0xE0000, 0xFFFFF)}
FONT = "install fonts-noto-color-emoji, or give its NotoColorEmoji.ttf, with bitmaps (CBDT), as dataset_path"
Open = Callable[[bool], local.Images]  # whether to leave out Parquet files that cannot be opened


@dataclass(frozen=True)
class Source:
    """A set of images that can be opened. `content` returns the same text for the same images, another for others."""

    name: str
    content: Callable[[], str]
    open: Open
    split: str = "all"
    left_out: Sequence[str] = ()  # files in the folder that are not read, and why


def digits(size: tuple[int, int], dataset_path: str | None, seed: int, split: str) -> Source:
    """The 1,797 handwritten digits in scikit-learn: 8x8, 17 grey levels, 1 channel, 10 classes; enlarged."""

    def opened(skip: bool) -> local.Images:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        read = partial(map, lambda i: (pixels[i], int(bunch.target[i]), f"digits {i}"))
        return local.Images(len(pixels), read, 1, list("0123456789"))

    return _embedded("digits", dataset_path, "load_digits", ["data/digits.csv.gz"], opened)


def patches(size: tuple[int, int], dataset_path: str | None, seed: int, split: str) -> Source:
    """10,000 random full-scale crops of the two photographs (the classes) in scikit-learn, 427x640 pixels."""

    def opened(skip: bool) -> local.Images:
        from sklearn.datasets import load_sample_images

        bunch = load_sample_images()
        rng = np.random.default_rng(seed)
        photo = rng.integers(len(bunch.images), size=PATCHES)
        top, left = (rng.integers(have - side + 1, size=PATCHES) for have, side in zip((427, 640), size, strict=True))
        crops = [sliding_window_view(image, (*size, 3)) for image in bunch.images]
        read = partial(map, lambda i: (crops[photo[i]][top[i], left[i], 0], int(photo[i]), f"patches {i}"))
        return local.Images(PATCHES, read, 3, [Path(name).stem for name in bunch.filenames])

    if size[0] > 427 or size[1] > 640:
        raise ValueError(f"got {size[0]}x{size[1]} for patches, wanted 426x640 at most: choose a smaller resolution")
    return _embedded("patches", dataset_path, "load_sample_images", ["images/china.jpg", "images/flower.jpg"], opened)


def emoji(size: tuple[int, int], dataset_path: str | None, seed: int, split: str) -> Source:
    """The 1,600 bitmaps (136x128) of the font Noto Color Emoji, no flags or skin tones; classes: Unicode's, roughly."""
    from matplotlib.font_manager import findSystemFonts

    fonts = findSystemFonts([dataset_path] if dataset_path else None)
    path = Path(next((font for font in sorted(fonts) if "NotoColorEmoji" in font), dataset_path or ""))
    if not path.is_file():
        raise ValueError(f"got no font Noto Color Emoji, wanted it: {FONT}")

    def opened(skip: bool) -> local.Images:
        from fontTools.ttLib import TTFont

        with refusing(path, "a font of colour bitmaps", FONT):
            font = TTFont(path, lazy=True)
            bitmaps = font["CBDT"].strikeData[0]
        spelled = {glyph: [code] for code, glyph in font.getBestCmap().items() if code > 127}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            for first, ligatures in getattr(lookup.SubTable[0], "ligatures", {}).items():
                for one in ligatures:
                    parts = [spelled.get(part, [0]) for part in (first, *one.Component)]
                    spelled.setdefault(one.LigGlyph, list(itertools.chain(*parts)))
        glyphs = [glyph for glyph, codes in spelled.items() if glyph in bitmaps and not FLAGS_AND_TONES & {*codes}]
        glyphs.sort(key=spelled.__getitem__)
        groups = sorted({*EMOJI.values()})

        def drawn(i: int) -> Item:
            codes = spelled[glyphs[i]]
            group = EMOJI[max(start for start in EMOJI if start <= max(codes))]
            return bitmaps[glyphs[i]].imageData, groups.index(group), " ".join(f"U+{code:X}" for code in codes)

        return local.Images(len(glyphs), partial(map, drawn), 3, groups, "few drawings, easily learned by heart")

    return _local(path.name, path, [path], opened)


def folder(size: tuple[int, int], dataset_path: str | None, seed: int, split: str) -> Source:
    """All images, all Parquet files, or the one array (.npy) below a folder, of one split where there are several."""
    if dataset_path is None:
        raise ValueError('got dataset="folder" alone, wanted a folder of images: give dataset_path')
    root = Path(dataset_path)
    found, left_out = local.listed(root)
    tables, arrays, pictures, labels = (found[kind] for kind in ("table", "array", "image", "labels"))
    every = tables or arrays or pictures
    if not every or (every is arrays and pictures):
        got = f"{len(tables)} Parquet files and {len(pictures)} images, {len(arrays)} arrays in {plain(root)}"
        remedy = "separate them" if pictures else "give a folder that has some, archives unpacked"
        left = f", left out {left_out[:3]}" * bool(left_out)
        raise ValueError(f"got {got}{left}, wanted one of the three: {remedy}")
    shared = os.path.commonpath([file.parent for file in itertools.chain(*found.values())]) if root.is_dir() else root
    for part in itertools.takewhile(lambda part: not local.split_called(part), Path(shared).relative_to(root).parts):
        root /= part  # enter the only folder, as archives unpack one beside a README
    splits = {local.split_of(root, file) for file in every} - {None}
    files = local.of_split(root, every, split) if splits else every
    others, beside, used = len(every) - len(files), [*pictures, *arrays] if tables else [], []
    if tables:
        opened = partial(local.tables, files, beside=beside)
    elif arrays:
        of_split = {None, local.split_of(root, files[0])}
        own = [file for file in labels if file.suffix.lower() == ".npy" and local.split_of(root, file) in of_split]
        used = [file for file in own if file.parent == files[0].parent] or own[: len(own) == 1]
        opened = partial(local.npy, files, used)
    else:
        used = [file for file in labels if file.suffix != ".npy"]
        opened = partial(local.pictures, root, files, used, bool(splits))
    left_out += [f"{others} files of other splits than {split}"] * bool(others)
    left_out += [f"{plain(file.relative_to(root))}: no labels of these" for file in labels if file not in used]
    left_out += [f"{len(beside)} files beside Parquet ones, but for those that rows name"] * bool(beside)
    return _local(dataset_path, root, [*files, *labels, *beside], opened, split if splits else "all", left_out)


def hub(size: tuple[int, int], dataset_path: str | None, seed: int, split: str, *, repo: str, own: str) -> Source:
    """Splits ("train+validation") of a `repo` "owner/name@commit" on the Hub, or of a copy; "train" means its `own`."""
    split = own if split == "train" else split
    if dataset_path is not None:
        root = Path(dataset_path)
        files = local.listed(root)[0]["table"]
        files = files if files and root.is_file() else local.of_split(root, files, split)
        return _local(dataset_path, root, files, partial(local.tables, files), split)
    name, _, commit = repo.partition("@")  # without one, the newest

    def opened(skip: bool) -> local.Images:
        root = snapshot(name, [f"*{part}*.parquet" for part in split.split("+")], revision=commit or None)
        files = local.of_split(root, sorted(root.rglob("*.parquet")), split)
        return replace(local.tables(files, skip), revision=root.name)

    return Source(name, lambda: f"{name}@{commit or snapshot(name, []).name}", opened, split)


SOURCES: dict[str, Callable[[tuple[int, int], str | None, int, str], Source]] = {
    "digits": digits,
    "patches": patches,
    "emoji": emoji,
    "cifar10": partial(hub, repo="uoft-cs/cifar10@0b2714987fa478483af9968de7c934580d0bb9a2", own="train"),
    "stl10": partial(hub, repo="jxie/stl10", own="unlabeled"),
    "celebahq": partial(hub, repo=f"korexyz/celeba-hq-256x256@{CELEBAHQ}", own="train+validation"),
    "folder": folder,
}


def _local(
    name: str, root: Path, files: list[Path], opened: Open, split: str = "all", left_out: Sequence[str] = ()
) -> Source:
    """A set of files below `root`; its content stays the same when the folder is moved or copied."""
    told = f", left out: {left_out}" * bool(left_out)
    return Source(plain(name), lambda: digest_of(root, files) + told, opened, split, left_out)


def _embedded(dataset: str, path: str | None, loader: str, files: list[str], opened: Open) -> Source:
    """A set that comes with scikit-learn; its files are hashed without importing scikit-learn."""
    if path is not None:
        raise ValueError(f"got dataset_path={path}, wanted none, {dataset} is embedded: leave it out")
    root = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets")))
    return _local(f"scikit-learn {loader}", root, [root / file for file in files], opened)
