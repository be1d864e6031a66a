"""Figures made of images, and the house style: arrays in, a matplotlib `Figure` out; no state is left.

Images are uint8 (N, H, W, C), C = 1 or 3. Coefficients are stacked as by the codec, channel = band * C +
colour; bands: A (approximation), H, V, D (horizontal, vertical, diagonal detail). An image pixel is a whole
number of screen pixels, at 150 dpi.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib.style
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

WIDTH, DPI, SMALL = 6.0, 150, 7  # inches, dots per inch, points
SIGNED = sns.color_palette("vlag", as_cmap=True)
STYLE = sns.axes_style("whitegrid") | sns.plotting_context("paper", font_scale=0.85) | {
    "font.sans-serif": ["DejaVu Sans"], "patch.force_edgecolor": False, "grid.color": "0.92",
    "axes.edgecolor": "0.7", "axes.spines.top": False, "axes.spines.right": False,
    "legend.edgecolor": "white", "savefig.dpi": DPI,
}  # fmt: skip


@contextmanager
def panels(height: float, layout: str = "A", **options) -> Iterator[tuple[Figure, list[Axes]]]:
    """Figure and panels, to be drawn on in the house style whatever rcParams hold; `height` in inches."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        yield figure, list(figure.subplot_mosaic(layout, **options).values())
        for axes in figure.axes:  # ticks are made lazily, from rcParams at that moment: make them now
            axes.tick_params(which="both", labelsize=STYLE["xtick.labelsize"])


def need(condition: bool, got: object, wanted: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"got {got}, wanted {wanted}: {remedy}")


def checked(images: ArrayLike) -> np.ndarray:
    """Checked images (N, H, W, C) as RGB (N, H, W, 3)."""
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


def _mosaic(images, columns: int, texts=(), sides=(), below: bool = False, gap: int = 3) -> Figure:
    """Enlarged images in rows, texts above (or below) them in order, and a text at the left of each row."""
    images, columns = checked(images), max(1, min(columns, len(images)))
    fitting, largest = round(WIDTH * DPI / columns / (images.shape[2] + 1)), max(6, 220 // images.shape[2])
    scale = max(1, min(fitting, largest))
    images = images.repeat(scale, 1).repeat(scale, 2)  # from here on lengths are in screen pixels
    (height, width), line, left = images.shape[1:3], 24 * any(texts), 9 * max(map(len, sides), default=0)
    space = line if any(texts[:-columns] if below else texts[columns:]) else gap
    canvas = compose(images, columns, (space, gap))
    left += 14 * bool(left)
    w, h = left + canvas.shape[1], line + canvas.shape[0]
    with panels(1) as (figure, (axes,)):
        figure.set(layout_engine="none", size_inches=(w / DPI, h / DPI))
        axes.set_position((left / w, line * below / h, 1 - left / w, 1 - line / h))
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        size = min(SMALL, 110 / DPI * width / max(map(len, texts), default=1))
        for k, text in enumerate(texts):
            x, y = k % columns * (width + gap) + width / 2, k // columns * (height + space)
            y, where = (y + height + 4, "top") if below else (y - 4, "bottom")
            axes.text(x, y, text, size=size, ha="center", va=where)
        for row, text in enumerate(sides):
            axes.text(-8, row * (height + space) + height / 2, text, size=SMALL, ha="right", va="center")
    return figure


def image_grid(images: ArrayLike, columns: int = 16, titles: Sequence[str] | None = None) -> Figure:
    """Images (N, H, W, C) in a tight grid, row by row; `titles` (N) puts a short one over each."""
    titles = list(titles or ())
    need(len(titles) in (0, len(images)), f"{len(titles)} titles", len(images), "pass one per image")
    return _mosaic(images, columns, titles)


def compare_grids(real: ArrayLike, generated: ArrayLike, columns: int = 8) -> Figure:
    """Two grids of equally many images (N, H, W, C) side by side, titled Real and Generated."""
    shapes, columns = (np.shape(real), np.shape(generated)), max(1, min(columns, len(real)))
    need(shapes[0] == shapes[1], f"{shapes[0]} and {shapes[1]}", "the same shape twice", "pass equally many")
    return _mosaic([compose(real, columns), compose(generated, columns)], 2, ("Real", "Generated"), gap=24)


def stacked(pictures: Mapping[str, ArrayLike]) -> Figure:
    """Pictures (H, W, C) of one size under each other, each with its name at the left."""
    return _mosaic(np.stack(list(pictures.values())), 1, sides=list(pictures), gap=6)


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
    rgb = SIGNED(scaled[0])[..., :3] if len(band) == 1 else scaled.transpose(1, 2, 0)
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
    states, steps, rows = np.asarray(states), len(times), len(labels)
    fits = states.ndim == 4 and len(states) == steps and states.shape[1] in (rows, 3 * rows)
    wanted = f"({steps}, {rows} or {3 * rows}, h, w)"
    need(fits, f"states {states.shape}", wanted, "pass a label per band and a time per state")
    bands = states.reshape(steps, rows, -1, *states.shape[2:]).swapaxes(0, 1)
    tiles = np.stack([_band_tile(band) for row in bands for band in row])
    if images is not None:
        images, (h, w) = checked(images), states.shape[2:]
        tiles = tiles.repeat(images.shape[1] // h, 1).repeat(images.shape[2] // w, 2)
        wanted = f"{steps} of a multiple of {h} x {w}"
        fits = images.shape == (steps, *tiles.shape[1:])
        need(fits, f"images {images.shape}", wanted, "decode the states")
        tiles, labels = np.concatenate([images, tiles]), ["image", *labels]
    return _mosaic(tiles, steps, [f"t = {t:.4g}" for t in times], labels)
