"""Charts of training, of pixels and of wavelet bands: arrays in, a matplotlib `Figure` out.

Bands: A (approximation), H, V, D (horizontal, vertical, diagonal detail).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike

from wddm.plots.images import checked
from wddm.plots.style import ACCENT, GENERATED, REAL, ROUND, legend, logarithmic, need, palette, panels, ticks

Ends = ArrayLike | None  # (2, K): the low and the high ends of intervals
DIFFUSION_TIME = "diffusion time t (steps)"


def lines(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    log: str = "",
    dashed: Sequence[str] = (),
    parts: Sequence[str] = (),
) -> Figure:
    """Curves by name, each (x, y), with a legend beside the panel; `log`: "x", "y" or "xy".

    The curves named in `dashed` are references, in grey; those in `parts` add up to another: thin, in shades of green.
    """
    plain, shades = [name for name in series if name not in (*dashed, *parts)], np.linspace(0.35, 0.9, len(parts))
    colors = dict(zip(plain, palette(len(plain)), strict=True)) | dict.fromkeys(dashed, REAL)
    colors |= dict(zip(parts, colormaps["YlGn"](shades), strict=True))
    with panels(2.6) as (figure, (axes,)):
        for name, (x, y) in series.items():
            need(np.shape(x) == np.shape(y), f"{name} {np.shape(y)}", np.shape(x), "pass a y for every x")
            dashes, width = "--" if name in dashed else "-", 0.8 if name in parts else None
            axes.plot(x, y, dashes, label=name, color=colors[name], linewidth=width)
        logarithmic(axes, log)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        legend(figure, columns=1 + len(series) // 20)
    return figure


def band_trajectory(
    times: ArrayLike, std_by_band: Mapping[str, ArrayLike], quantity: str = "standard deviation"
) -> Figure:
    """Standard deviation or error (S,) of each band at the `times` (S,) of a denoising, noise at the left."""
    figure = lines({name: (times, y) for name, y in std_by_band.items()}, DIFFUSION_TIME, quantity, "y")
    figure.axes[0].invert_xaxis()
    return figure


def noise_schedule(times: ArrayLike, snr_by_band: Mapping[str, ArrayLike]) -> Figure:
    """Signal-to-noise power ratio (T,) of each band over `times` (T,); dashed where signal equals noise."""
    figure = lines({name: (times, y) for name, y in snr_by_band.items()}, DIFFUSION_TIME, "signal-to-noise ratio", "y")
    figure.axes[0].axhline(1, color=REAL, linestyle="--", linewidth=0.8)
    return figure


def training_curves(rows: Sequence[Mapping[str, float]], window: int | None = None) -> Figure:
    """Loss, learning rate and gradient norm over images seen.

    `rows`: dicts or a DataFrame with images_seen, loss, lr, grad_norm and, in some, validation_loss. What is noisy is
    drawn faint under its running mean over `window` rows (a fiftieth of them).
    """
    import pandas as pd

    frame, names = pd.DataFrame(rows), ["images_seen", "loss", "lr", "grad_norm"]
    need(set(names) <= set(frame), f"{len(frame)} rows of {list(frame)}", names, "pass a dict per step")
    seen, width = frame.images_seen / 1000, min(len(frame), window or max(1, len(frame) // 50))
    smooth = frame[names].rolling(width, min_periods=1, center=True).mean()
    with panels(2.8, "AB;AC", width_ratios=(3, 2), sharex=True) as (figure, (left, top, bottom)):
        for axes, name, title in ((left, "loss", "Loss"), (bottom, "grad_norm", "Gradient norm")):
            axes.plot(seen, frame[name], color=GENERATED, alpha=0.3, linewidth=0.5)
            axes.plot(seen, smooth[name], color=GENERATED)
            axes.set(title=title, xlabel="images seen (thousands)")
            logarithmic(axes)
        if "validation_loss" in frame and (measured := frame.validation_loss.notna()).any():
            held_out = frame.validation_loss[measured]
            left.plot(seen[measured], held_out, ".-", color=ACCENT, linewidth=0.8, label="held-out")
            left.legend()
        top.plot(seen, frame.lr, color=GENERATED)
        top.set(title="Learning rate", ylim=(0, None))
        top.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))  # of all three, which share it
        top.yaxis.set_major_locator(MaxNLocator(3, steps=ROUND))
        top.yaxis.set_major_formatter("{x:g}")
    return figure


def band_histograms(values_by_band: Mapping[str, ArrayLike]) -> Figure:
    """Density of any number of coefficients of each band, logarithmic, standard deviations in the legend."""
    with panels(2.6) as (figure, (axes,)):
        for (name, values), color in zip(values_by_band.items(), palette(len(values_by_band)), strict=True):
            values = np.asarray(values)
            need(values.ndim == 1 and values.size, f"{name} {values.shape}", "(n,)", "ravel the band")
            density, edges = np.histogram(values, 80, density=True)
            axes.stairs(density, edges, color=color, label=f"{name}, std {values.std():#.2g}")
        logarithmic(axes)
        axes.set(xlabel="coefficient", ylabel="density")
        legend(figure, columns=1 + len(values_by_band) // 20)
    return figure


def channel_histograms(images: ArrayLike, generated: ArrayLike | None = None) -> Figure:
    """Pixel values of images (N, H, W, C), a panel per channel, with a line for those of generated images."""
    samples = {"real": checked(images)} | ({} if generated is None else {"generated": checked(generated)})
    titles = ("Red", "Green", "Blue") if np.shape(images)[-1] == 3 else ("",)
    with panels(2.0, "ABC"[: len(titles)], sharey=True) as (figure, axs):
        for channel, (axes, title) in enumerate(zip(axs, titles, strict=True)):
            for name, sample in samples.items():
                parts = np.array_split(sample, 1 + sample.size // 2**24)  # counted in 64 bits, so not all at once
                counts = sum(np.bincount(part[..., channel].ravel() // 4, minlength=64) for part in parts)
                style: dict[str, Any] = {"color": "0.78", "fill": True} if name == "real" else {"color": GENERATED}
                axes.stairs(100 * counts / np.sum(counts), np.arange(0, 257, 4), label=name, **style)
            axes.set(title=title, xlabel="pixel value", xticks=(0, 128, 255))
        axs[0].set(ylabel="pixels (%)")
        if generated is not None:
            legend(figure)
    return figure


def spectra(
    frequency: ArrayLike,
    real_power: ArrayLike,
    generated_power: ArrayLike,
    real_interval: Ends = None,
    generated_interval: Ends = None,
) -> Figure:
    """Radial power spectra (F,) over spatial frequency (F,) in cycles/pixel, and their ratio underneath.

    Intervals (2, F) are shaded.
    """
    shapes = [np.shape(values) for values in (frequency, real_power, generated_power)]
    need(len(set(shapes)) == 1, f"shapes {shapes}", "(F,) three times", "use the same frequencies")
    with panels(3.4, "A;B", height_ratios=(2, 1), sharex=True) as (figure, (power, ratio)):
        power.plot(frequency, real_power, color=REAL, label="real")
        power.plot(frequency, generated_power, color=GENERATED, label="generated")
        ratio.plot(frequency, np.divide(generated_power, real_power), color=GENERATED)
        ratio.axhline(1, color=REAL)
        for interval, color in ((real_interval, REAL), (generated_interval, GENERATED)):
            if interval is not None:
                power.fill_between(frequency, *np.asarray(interval), color=color, alpha=0.25, linewidth=0)
        if generated_interval is not None:
            reals = real_power if real_interval is None else np.asarray(real_interval)[::-1]  # each at its worst
            ends = np.divide(generated_interval, reals)
            ratio.fill_between(frequency, *ends, color=GENERATED, alpha=0.25, linewidth=0)
        logarithmic(power, "xy")
        logarithmic(ratio)
        power.set(ylabel="power")
        power.legend()
        ratio.set(ylabel="generated\n/ real", xlabel="spatial frequency (cycles/pixel)")
    return figure


@contextmanager
def _bands(height: float, labels: Sequence[str], *samples: ArrayLike) -> Iterator[tuple[Figure, Axes, np.ndarray]]:
    """A panel with a tick per band, at the positions returned, for samples (bands,); the labels of many are turned."""
    sizes = len(labels), *map(np.size, samples)
    need(len(set(sizes)) == 1, f"{sizes} labels, real, generated", "equally many", "pass one per band")
    with panels(height) as (figure, (axes,)):
        axes.margins(y=0.12)
        yield figure, axes, np.arange(len(labels))
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_xticks(range(len(labels)), labels, rotation=90 * (len(labels) > 16))
        axes.set(xlabel="band")
        axes.grid(axis="x", visible=False)
        legend(figure, "upper right", 2)


def band_energy(
    labels: Sequence[str],
    real: ArrayLike,
    generated: ArrayLike,
    real_interval: Ends = None,
    generated_interval: Ends = None,
) -> Figure:
    """Energy (bands,) of real beside generated images, generated / real over the bars; intervals (2, bands)."""
    pairs = ("real", REAL, real, real_interval), ("generated", GENERATED, generated, generated_interval)
    with _bands(2.6, labels, real, generated) as (figure, axes, at):
        tops = np.maximum(real, generated)
        for shift, (name, color, values, interval) in zip((-0.2, 0.2), pairs, strict=True):
            axes.bar(at + shift, values, 0.38, color=color, label=name)
            if interval is not None:
                axes.vlines(at + shift, *np.asarray(interval), color="0.15", linewidth=0.8)
                tops = np.maximum(tops, np.asarray(interval)[1])
        turned = len(labels) > 16
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "size": 6.5, "rotation": 90 * turned}
        for x, top, ratio in zip(at, tops, np.divide(generated, real), strict=True):
            axes.annotate(f"×{ratio:.2f}", (x, top), (0, 2), **place)
        axes.margins(y=0.3 if turned else 0.12)
        axes.set(ylabel="energy (mean square)")
        logarithmic(axes)
    return figure


def band_kurtosis(
    labels: Sequence[str],
    real: ArrayLike,
    generated: ArrayLike,
    real_interval: ArrayLike,
    generated_interval: ArrayLike,
) -> Figure:
    """Excess kurtosis (bands,) with intervals (2, bands), linear to 1 and logarithmic beyond; 0 is a Gaussian."""
    pairs = ("real", REAL, real, real_interval), ("generated", GENERATED, generated, generated_interval)
    with _bands(2.4, labels, real, generated) as (figure, axes, at):
        axes.set_yscale("symlog", linthresh=1)
        for shift, (name, color, values, interval) in zip((-0.12, 0.12), pairs, strict=True):
            axes.plot(at + shift, values, "o", color=color, label=name)
            axes.vlines(at + shift, *np.asarray(interval), color=color, linewidth=2, alpha=0.5)
        axes.axhline(0, color="0.15", linewidth=0.6)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(ylabel="excess kurtosis")
    return figure


def _shades(
    axes: Axes, values: np.ndarray, texts: np.ndarray | None, norm: Normalize, quantity: str, size: float = 6
) -> None:
    """Numbers (rows, columns) as shades, dark is more, with texts on them and a colour bar; NaN is left white."""
    import seaborn as sns  # takes a second

    low, high = norm.vmin, norm.vmax
    bar = {"label": quantity, "format": "%g", "ticks": ticks(low, high) if low and high else None}
    sns.heatmap(values, norm=norm, cmap="crest", annot=texts, fmt="", annot_kws={"size": size}, cbar_kws=bar, ax=axes)
    if drawn := axes.collections[0].colorbar:
        drawn.minorticks_off()
    axes.grid(visible=False)


def heat_map(
    values: ArrayLike, rows: Sequence[str], columns: Sequence[str], quantity: str, ylabel: str = "", xlabel: str = ""
) -> Figure:
    """Numbers (rows, columns) as a table of shades on a logarithmic scale, dark is more; NaN is left white."""
    values, wanted = np.asarray(values, float), (len(rows), len(columns))
    need(values.shape == wanted, f"values {values.shape}", wanted, "pass a name per row and column")
    seen = values[np.isfinite(values) & (values > 0)]
    need(seen.size, "no positive numbers", "some", "give what was measured")
    norm = LogNorm(seen.min(), max(seen.max(), 1.01 * seen.min()))
    texts = np.array([[_short(value) for value in row] for row in values]) if len(columns) <= 16 else None
    with panels(max(1.8, 1.0 + 0.3 * len(rows))) as (figure, (axes,)):
        _shades(axes, values, texts, norm, quantity)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90 * (max(map(len, columns)) > 4))
        axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def _short(value: float) -> str:
    """Two digits: 0.10, 2.0, 30, 8k."""
    return EngFormatter(places=0, sep="")(value) if value >= 99.5 else f"{value:#.2g}".rstrip(".")


def packet_map(per_packet: ArrayLike, level: int, order: str = "codec", interval: Ends = None) -> Figure:
    """Fréchet distance of each of the 4^L Haar packets, placed by frequency, low at the top left.

    Beneath each, half the width of its `interval` (2, 4^L), in per cent of it.

    Packet p has a base-4 digit per split, 0..3 = A, H, V, D. In order "codec" the last split is the most
    significant digit (as in stacked channels), in order "path" the first (as in PyWavelets' node paths). A
    high-pass split reverses the frequencies beneath it, so the digits' bits are a Gray code of the position.
    """
    values, side = np.asarray(per_packet, dtype=float), 2**level
    need(values.shape == (4**level,), f"{values.shape} distances", f"({4**level},)", f"match level {level}")
    need(order in ("codec", "path"), f"order={order!r}", "codec or path", "say which split comes first")
    digits = np.arange(4**level) // 4 ** np.arange(level)[:, None] % 4  # (L, 4^L), least significant first
    splits = digits[:: 1 if order == "codec" else -1]
    bits = np.bitwise_xor.accumulate([splits & 1, splits >> 1], axis=1)  # (2, L, 4^L): vertical, horizontal
    row, column = np.tensordot(bits, 2 ** np.arange(level)[::-1], (1, 0))
    grid, texts, top = np.empty((side, side)), np.empty((side, side), object), values.max()
    grid[row, column] = values
    texts[row, column] = [f"{value:.2g}" for value in values]
    if interval is not None:
        low, high = np.asarray(interval)
        texts[row, column] += [f"\n±{half:.0f}%" for half in 50 * (high - low) / values]
    norm = LogNorm(np.clip(values.min(), top / 1e4, top / 10), top, clip=True) if top > 0 else Normalize()
    with panels(3.4) as (figure, (axes,)):
        figure.set_size_inches(4.3, 3.4)
        _shades(axes, grid, texts, norm, "Fréchet distance", min(6, 44 / side))
        at, names = np.linspace(0, side, 6), ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]
        axes.set_xticks(at, names)
        axes.set_yticks(at, names, rotation=0)
        axes.set(xlabel="horizontal frequency (cycles/pixel)", ylabel="vertical frequency (cycles/pixel)")
    return figure
