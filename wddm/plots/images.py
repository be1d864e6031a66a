"""Figures made of images: arrays in, a matplotlib `Figure` out.

Images are uint8 (N, H, W, C), C = 1 or 3; each of their pixels is a whole number of pixels of the figure. Coefficients
are stacked as by the codec, channel = band * C + colour.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from wddm.plots.style import DPI, WIDTH, need, panels


def checked(images: ArrayLike) -> np.ndarray:
    """Images (N, H, W, C) as RGB (N, H, W, 3). ValueError for another shape or type."""
    images = np.asarray(images)
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3) and images.size
    need(fits, f"{images.dtype} images {images.shape}", "uint8 (N, H, W, 1 or 3)", "convert, channels last")
    return np.broadcast_to(images, (*images.shape[:3], 3))


def compose(images: ArrayLike, columns: int, gap: tuple[int, int] = (1, 1)) -> np.ndarray:
    """White canvas with image k at row k // columns; `gap` in pixels between rows and between columns."""
    images, (y, x) = checked(images), gap
    (count, height, width, _), rows = images.shape, -(-len(images) // columns)
    tiles = np.full((rows * columns, height + y, width + x, 3), 255, np.uint8)
    tiles[:count, :height, :width] = images
    grid = tiles.reshape(rows, columns, height + y, width + x, 3).swapaxes(1, 2)
    return grid.reshape(rows * (height + y), columns * (width + x), 3)[: -y or None, : -x or None]


def _mosaic(
    images: ArrayLike,
    columns: int,
    texts: Sequence[str] = (),
    sides: Sequence[str] = (),
    gap: int = 3,
    below: bool = False,
) -> Figure:
    """Enlarged images in rows, texts above (or below) them in order, and a text at the left of each row."""
    images, columns = checked(images), max(1, min(columns, len(images)))
    fitting, largest = round(WIDTH * DPI / columns / (images.shape[2] + 1)), max(6, 220 // images.shape[2])
    scale = max(1, min(fitting, largest))
    images = images.repeat(scale, 1).repeat(scale, 2)  # from here on lengths are in pixels of the figure
    (height, width), line = images.shape[1:3], 24 * any(texts)
    space = line if any(texts[:-columns] if below else texts[columns:]) else gap
    canvas = compose(images, columns, (space, gap))
    left = 14 + 9 * max(map(len, sides)) if sides else 0
    w, h = left + canvas.shape[1], line + canvas.shape[0]
    with panels(1) as (figure, (axes,)):
        figure.set(layout_engine="none", size_inches=(w / DPI, h / DPI))
        axes.set_position((left / w, line * below / h, 1 - left / w, 1 - line / h))
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        size = min(7, 110 / DPI * width / max(map(len, texts), default=1))
        for k, text in enumerate(texts):
            x, y = k % columns * (width + gap) + width / 2, k // columns * (height + space)
            y, where = (y + height + 4, "top") if below else (y - 4, "bottom")
            axes.text(x, y, text, size=size, ha="center", va=where)
        for row, text in enumerate(sides):
            axes.text(-8, row * (height + space) + height / 2, text, size=7, ha="right", va="center")
    return figure


def image_grid(images: ArrayLike, columns: int = 16, titles: Sequence[str] | None = None) -> Figure:
    """Images (N, H, W, C) in a tight grid, row by row; `titles` (N) puts a short one over each."""
    titles = list(titles or ())
    count = len(np.asarray(images))
    need(len(titles) in (0, count), f"{len(titles)} titles", count, "pass one per image")
    return _mosaic(images, columns, titles)


def compare_grids(real: ArrayLike, generated: ArrayLike, columns: int = 8) -> Figure:
    """Two grids of equally many images (N, H, W, C) side by side, titled Real and Generated."""
    wanted, got = np.shape(real), np.shape(generated)
    need(got == wanted, f"{wanted} and {got}", "the same shape twice", "pass equally many")
    columns = max(1, min(columns, wanted[0]))
    return _mosaic([compose(real, columns), compose(generated, columns)], 2, ("Real", "Generated"), gap=24)


def stacked(pictures: Mapping[str, ArrayLike]) -> Figure:
    """Pictures (H, W, C) of one size under each other, each with its name at the left."""
    return _mosaic(np.stack([np.asarray(picture) for picture in pictures.values()]), 1, sides=list(pictures), gap=6)


def neighbours(samples: ArrayLike, nearest: ArrayLike, distances: ArrayLike) -> Figure:
    """Samples (N, H, W, C) over their nearest training images (N, k, H, W, C), distances (N, k) beneath."""
    samples, nearest, distances = np.asarray(samples), np.asarray(nearest), np.asarray(distances)
    wanted = (len(samples), *nearest.shape[1:2], *samples.shape[1:])
    need(len(wanted) == 5 and nearest.shape == wanted, f"nearest {nearest.shape}", wanted, "index real")
    need(distances.shape == wanted[:2], f"distances {distances.shape}", wanted[:2], "pass one per neighbour")
    ranked = nearest.swapaxes(0, 1).reshape(-1, *samples.shape[1:])
    texts = [""] * len(samples) + [f"{distance:#.3g}".rstrip(".") for distance in distances.T.flat]
    sides = ["sample", "nearest", *(f"nearest {rank}" for rank in range(2, nearest.shape[1] + 1))]
    return _mosaic(np.concatenate([samples, ranked]), len(samples), texts, sides, below=True)


def _band_tile(band: np.ndarray) -> np.ndarray:
    """Band (C, h, w) as uint8 (h, w, 3), zero amid a scale that ends at the 99.5th percentile of |value|."""
    scaled = np.clip(band / (np.percentile(np.abs(band), 99.5) or 1) / 2 + 0.5, 0, 1)
    rgb = matplotlib.colormaps["RdBu_r"](scaled[0])[..., :3] if len(band) == 1 else scaled.transpose(1, 2, 0)
    return np.round(255 * rgb).astype(np.uint8)


def coefficient_bands(coefficients: ArrayLike, labels: Sequence[str], channels: int = 1) -> Figure:
    """Bands (4^L C, h, w) of an image, each on a symmetric scale of its own, titled with name and spread.

    One channel: blue negative, white zero, red positive. Three: colours about mid-grey. `labels`: one per
    band or, as the codec gives them, one per channel (the colour's digit is then dropped).
    """
    coefficients = np.asarray(coefficients)
    bands, rest = divmod(len(coefficients), channels)
    fits = coefficients.ndim == 3 and not rest and bands and len(labels) in (bands, bands * channels)
    wanted = f"(bands * {channels}, h, w)"
    need(fits, f"{coefficients.shape}, {len(labels)} labels", wanted, "pass one image and a label per band")
    names = labels if len(labels) == bands else [label.removesuffix("0") for label in labels[::channels]]
    grouped = coefficients.reshape(bands, channels, *coefficients.shape[1:])
    texts = [f"{name}  std {band.std():#.2g}" for name, band in zip(names, grouped, strict=True)]
    return _mosaic([_band_tile(band) for band in grouped], 4 if bands <= 4 else 8, texts)


def trajectory(states: ArrayLike, labels: Sequence[str], times: ArrayLike, images: ArrayLike | None = None) -> Figure:
    """Denoising by band: states (S, bands * C, h, w), a column per time, a row per label.

    `images` (S, H, W, C), H a multiple of h, puts the decoded images on top. Each tile has its own scale, as
    in `coefficient_bands`. About ten steps read best.
    """
    states, times, rows = np.asarray(states), np.asarray(times), len(labels)
    steps = len(times)
    fits = states.ndim == 4 and len(states) == steps and states.shape[1] in (rows, 3 * rows)
    wanted = f"({steps}, {rows} or {3 * rows}, h, w)"
    need(fits, f"states {states.shape}", wanted, "pass a label per band and a time per state")
    bands = states.reshape(steps, rows, -1, *states.shape[2:]).swapaxes(0, 1)
    tiles = np.stack([_band_tile(band) for row in bands for band in row])
    if images is not None:
        images, (h, w) = checked(images), states.shape[2:]
        tiles = tiles.repeat(images.shape[1] // h, 1).repeat(images.shape[2] // w, 2)
        need(images.shape == (steps, *tiles.shape[1:]), f"images {images.shape}", f"{steps} of a multiple of {h} x {w}",
             "decode the states")  # fmt: skip
        tiles, labels = np.concatenate([images, tiles]), ["image", *labels]
    return _mosaic(tiles, steps, [f"t = {t:.4g}" for t in times], labels)
