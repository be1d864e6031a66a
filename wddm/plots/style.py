"""The house style (900 pixels wide, colour-blind safe, grey for real data, blue for generated images); image figures.

Images are uint8 (N, H, W, C), enlarged by a whole factor and shown as `as_rgb` says. Coefficients are stacked as by the
codec, channel = band * C + colour. Each tile of a band has a scale of its own about zero: blue is negative, white zero,
red positive; bands of three channels are shown as colours about mid-grey.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

__all__ = ["coefficient_bands", "compose", "image_grid", "neighbours", "shown_channels", "stacked", "trajectory"]

WIDTH, DPI = 6.0, 150  # inches, dots per inch: 900 pixels
REAL, GENERATED, ACCENT = "0.45", "#0173b2", "#d55e00"
SIDES = ("real", REAL), ("generated", GENERATED)
DASHED: dict[str, Any] = {"linestyle": "--", "linewidth": 0.8}
COLORS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"]
MARKERS = "osD^vP*Xdph"
ROUND = [1, 2, 5, 10]  # steps of ticks
Texts = Sequence[str]
STYLE: dict[str, Any] = {
    "font.size": 8.2, "axes.titlesize": 8.2, "legend.fontsize": 7.5, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "text.color": "0.15", "axes.labelcolor": "0.15", "xtick.color": "0.15", "ytick.color": "0.15",
    "axes.edgecolor": "0.7", "axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "white",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.92", "xtick.bottom": False, "ytick.left": False,
    "lines.linewidth": 1.2, "lines.markersize": 4,
}  # fmt: skip


@contextmanager
def panels(
    height: float, layout: str = "A", log: str = "", legend: str = "", **options: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of this `height` (inches) and its panels, in the house style whatever rcParams hold.

    Once drawn, the axes named in `log` become logarithmic, and all panels share one legend, outside them. Layout and
    options are those of subplot_mosaic.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axs = list(figure.subplot_mosaic(layout, **options).values())
        yield figure, axs
        named: dict[str, Any] = {}
        for axes in axs:
            logarithmic(axes, log)
            named |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if legend and named:
            beside = legend.startswith("right")
            names = wrapped(named, 24 if beside else 80)
            columns = 1 + len(named) // 20 if beside else min(4, max(1, 100 // (7 + max(map(len, named)))))
            rows = sum(1 + name.count("\n") for name in names) / columns
            figure.set_figheight(max(height, 0.18 * rows) if beside else height + 0.17 * max(0, rows - 2))
            figure.legend(list(named.values()), names, loc=f"outside {legend}", ncols=columns)  # type: ignore[call-overload]
        for axes in figure.axes:  # ticks are made lazily, from rcParams at that moment: make them now
            axes.tick_params(which="both", labelsize=STYLE["xtick.labelsize"])


def wrapped(names: Iterable[str], width: int = 36, lines: int | None = None) -> list[str]:
    """Names broken into lines of at most `width` letters, at most `lines` of them."""
    return ["\n".join(textwrap.wrap(name, width, max_lines=lines, placeholder=" …")) for name in names]


def palette(count: int) -> list[Any]:
    """A colour for each of `count` curves; bands, 16 or more, get a hue by their last split, a shade by the others."""
    depths = np.linspace(1, 0, -(-count // 4) + 2)[:-2]
    shades = [1 - depth * (1 - np.array(to_rgb(hue))) for hue in COLORS[:4] for depth in depths]
    return (COLORS if count <= len(COLORS) else shades)[:count]


def ticks(low: float, high: float) -> Locator:
    """Ticks at round numbers of a logarithmic axis from `low` to `high`: more than one, fewer than twenty."""
    if high < 8 * low:
        return MaxNLocator(4, steps=ROUND)
    return LogLocator(subs=(1, 2, 5) if high < 40 * low else (1, 3) if high < 300 * low else (1,))


def logarithmic(axes: Axes, names: str) -> None:
    """Make the axes named, "x", "y" or "xy", logarithmic; a tick is 0.1, not 10^-1.

    With a lowest value v < 0, as intervals' ends may be, it is linear to -v, or all along if nothing exceeds -30 v.
    """
    for name in names:
        axis, sharing = getattr(axes, f"{name}axis"), getattr(axes, f"get_shared_{name}_axes")().get_siblings(axes)
        ends = [getattr(one.dataLim, f"interval{name}") for one in sharing]
        if (lowest := np.min(ends)) < 0 and np.max(ends) <= -30 * lowest:
            continue
        linear = {"linthresh": -lowest} if lowest < 0 else {}
        getattr(axes, f"set_{name}scale")("symlog" if linear else "log", **linear)
        axes.autoscale_view()
        low, high = np.abs(axis.get_view_interval())
        if not linear:
            axis.set_major_locator(ticks(low, high))
        axis.set_minor_formatter(NullFormatter())
        if high < 1e4 * low:
            axis.set_major_formatter("{x:g}")


def as_rgb(images: ArrayLike) -> np.ndarray:
    """Images uint8 (N, H, W, C) as RGB (N, H, W, 3): the first three channels as colours, or the first as grey."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(f"got {images.dtype} images {images.shape}, wanted uint8 (N, H, W, C): convert them")
    return np.broadcast_to(images[..., : 3 if images.shape[-1] >= 3 else 1], (*images.shape[:3], 3))


def shown_channels(channels: int) -> str:
    """A sentence for a caption: which of so many channels are shown; empty for grey and RGB."""
    shown = "channels 1 to 3 as RGB" if channels > 3 else "channel 1 as grey"
    return "" if channels in (1, 3) else f" Shown of {channels} channels: {shown}."


def compose(images: ArrayLike, columns: int, gap: tuple[int, int] = (1, 1)) -> np.ndarray:
    """White canvas with image k at row k // columns; `gap` in pixels between rows and between columns."""
    images, (y, x) = as_rgb(images), gap
    (count, height, width, _), rows = images.shape, -(-len(images) // columns)
    tiles = np.full((rows * columns, height + y, width + x, 3), 255, np.uint8)
    tiles[:count, :height, :width] = images
    grid = tiles.reshape(rows, columns, height + y, width + x, 3).swapaxes(1, 2)
    return grid.reshape(rows * (height + y), columns * (width + x), 3)[: -y or None, : -x or None]


def image_grid(
    images: ArrayLike, columns: int = 16, titles: Texts = (), sides: Texts = (), gap: int = 3, below: bool = False
) -> Figure:
    """Images (N, H, W, C) in a tight grid, row by row; titles (N) over or below them, `sides` at the left of rows."""
    images, columns = as_rgb(images), max(1, min(columns, len(images)))
    fitting, largest = round(WIDTH * DPI / columns / (images.shape[2] + 1)), max(6, 220 // images.shape[2])
    if len(titles) not in (0, len(images)):
        raise ValueError(f"got {len(titles)} titles, wanted {len(images)}: pass one per image")
    scale = max(1, min(fitting, largest))
    images = images.repeat(scale, 1).repeat(scale, 2)  # from here on lengths are in pixels of the figure
    (height, width), line = images.shape[1:3], 24 * any(titles)
    sides = wrapped(sides, lines=max(1, height // 18))
    space = line if any(titles[:-columns] if below else titles[columns:]) else gap
    canvas = compose(images, columns, (space, gap))
    left = 14 + 9 * max(len(part) for side in sides for part in side.split("\n")) if sides else 0
    w, h = left + canvas.shape[1], line + canvas.shape[0]
    with panels(1) as (figure, (axes,)):
        figure.set(layout_engine="none", size_inches=(w / DPI, h / DPI))
        axes.set_position((left / w, line * below / h, 1 - left / w, 1 - line / h))
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        size = min(7, 110 / DPI * width / max(map(len, titles), default=1))
        for k, text in ((k, text) for k, text in enumerate(titles) if text):
            x, y = k % columns * (width + gap) + width / 2, k // columns * (height + space)
            y, where = (y + height + 4, "top") if below else (y - 4, "bottom")
            axes.text(x, y, text, size=size, ha="center", va=where)
        for row, text in enumerate(sides):
            axes.text(-8, row * (height + space) + height / 2, text, size=7, ha="right", va="center")
    return figure


def stacked(pictures: Mapping[str, ArrayLike]) -> Figure:
    """Pictures (H, W, C) of one size under each other, each with its name at the left."""
    return image_grid(np.stack([np.asarray(picture) for picture in pictures.values()]), 1, sides=list(pictures), gap=6)


def neighbours(samples: ArrayLike, nearest: ArrayLike, distances: ArrayLike) -> Figure:
    """Samples (N, H, W, C) over their nearest training images (N, k, H, W, C), distances (N, k) beneath."""
    if (shape := np.shape(nearest)[:2]) != np.shape(distances):
        raise ValueError(f"got distances {np.shape(distances)}, wanted {shape}: pass one per neighbour")
    rows = np.concatenate([np.asarray(samples)[:, None], nearest], axis=1).swapaxes(0, 1)  # (1 + k, N, H, W, C)
    count = rows.shape[1]
    titles = [""] * count + [f"{distance:#.3g}".rstrip(".") for distance in np.transpose(distances).flat]
    sides = ["sample", "nearest", *(f"nearest {rank}" for rank in range(2, len(rows)))]
    return image_grid(rows.reshape(-1, *rows.shape[2:]), count, titles, sides, below=True)


def _tiles(coefficients: np.ndarray, labels: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Bands (S, bands, C, h, w) of coefficients (S, bands * C, h, w), and pictures of them, (S * bands, h, w, 3)."""
    steps, _, height, width = coefficients.shape
    bands, tiles = coefficients.reshape(steps, len(labels), -1, height, width), []
    for band in bands.reshape(-1, *bands.shape[2:]):
        band = band[: 3 if len(band) >= 3 else 1]
        scaled = np.clip(band / (np.percentile(np.abs(band), 99.5) or 1) / 2 + 0.5, 0, 1)  # zero is in the middle
        tiles.append(colormaps["RdBu_r"](scaled[0])[..., :3] if len(band) == 1 else scaled.transpose(1, 2, 0))
    return bands, np.round(255 * np.array(tiles)).astype(np.uint8)


def coefficient_bands(coefficients: ArrayLike, labels: Texts) -> Figure:
    """Bands of an image (4^L C, h, w), each titled with its label and its standard deviation over all C channels."""
    (bands,), tiles = _tiles(np.asarray(coefficients)[None], labels)
    titles = [f"{name}  std {band.std():#.2g}" for name, band in zip(labels, bands, strict=True)]
    return image_grid(tiles, 4 if len(bands) <= 4 else 8, titles)


def trajectory(states: ArrayLike, labels: Texts, times: Sequence[float], images: ArrayLike) -> Figure:
    """Denoising by band: states (S, bands * C, h, w), a column per time (S,), under the decoded images (S, H, W, C)."""
    states, images = np.asarray(states), as_rgb(images)
    tiles = _tiles(states, labels)[1].reshape(len(times), len(labels), *states.shape[2:], 3).swapaxes(0, 1)
    tiles = tiles.repeat(images.shape[1] // states.shape[2], 2).repeat(images.shape[2] // states.shape[3], 3)
    rows = np.concatenate([images[None], tiles])  # (1 + bands, S, H, W, 3)
    titles = [f"t = {t:.4g}" for t in times] + [""] * (len(tiles) * len(times))
    return image_grid(rows.reshape(-1, *rows.shape[2:]), len(times), titles, ["image", *labels])
