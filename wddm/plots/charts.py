"""Charts of training, of pixels and of wavelet bands: arrays in, a matplotlib `Figure` out.

Bands: A (approximation), H, V, D (horizontal, vertical, diagonal detail). Intervals are shaded, or bars.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike

from wddm.metrics.intervals import Estimate
from wddm.plots import style
from wddm.plots.style import ACCENT, DASHED, GENERATED, REAL, SIDES, need, palette, panels, shaped

__all__ = [
    "band_energy", "band_histograms", "band_kurtosis", "band_trajectory", "channel_histograms", "heat_map", "lines",
    "noise_schedule", "packet_map", "spectra", "training_curves",
]  # fmt: skip

Estimates = Estimate[np.ndarray]
Series = Mapping[str, tuple[ArrayLike, ArrayLike]]
DIFFUSION_TIME = "diffusion time t (steps)"


def lines(
    series: Series, xlabel: str, ylabel: str, log: str = "", dashed: Sequence[str] = (), parts: Sequence[str] = ()
) -> Figure:
    """Curves by name, each (x, y), with a legend beside the panel; `log`: "x", "y" or "xy".

    The curves named in `dashed` are references, in grey; those in `parts` add up to another: thin, in shades of green.
    """
    plain, shades = [name for name in series if name not in (*dashed, *parts)], np.linspace(0.35, 0.9, len(parts))
    colors = dict(zip(plain, palette(len(plain)), strict=True)) | dict.fromkeys(dashed, REAL)
    colors |= dict(zip(parts, colormaps["YlGn"](shades), strict=True))
    with panels(2.6, log=log, legend="right center") as (figure, (axes,)):
        for name, (x, y) in series.items():
            dashes, width = "--" if name in dashed else "-", 0.8 if name in parts else None
            y = shaped(name, y, np.shape(x), "pass a y for every x")
            axes.plot(x, y, dashes, label=name, color=colors[name], linewidth=width)
        axes.set(xlabel=xlabel, ylabel=ylabel)
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
    figure.axes[0].axhline(1, color=REAL, **DASHED)
    return figure


def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, learning rate and gradient norm over images seen.

    `rows`: dicts or a DataFrame with images_seen, loss, lr, grad_norm and, in some, validation_loss. What is noisy is
    drawn faint under its running mean over a fiftieth of the rows.
    """
    import pandas as pd

    frame, names = pd.DataFrame(rows), ["images_seen", "loss", "lr", "grad_norm"]
    need(set(names) <= set(frame), f"{len(frame)} rows of {list(frame)}", names, "pass a dict per step")
    seen = frame.images_seen / 1000
    smooth = frame[names].rolling(max(1, len(frame) // 50), min_periods=1, center=True).mean()
    with panels(2.8, "AB;AC", width_ratios=(3, 2), sharex=True) as (figure, (left, top, bottom)):
        for axes, name, title in ((left, "loss", "Loss"), (bottom, "grad_norm", "Gradient norm")):
            axes.plot(seen, frame[name], color=GENERATED, alpha=0.3, linewidth=0.5)
            axes.plot(seen, smooth[name], color=GENERATED)
            axes.set(title=title, xlabel="images seen (thousands)")
            style.logarithmic(axes, "y")
        held_out = frame.reindex(columns=["images_seen", "validation_loss"]).dropna()
        if len(held_out):
            x, y = held_out.images_seen / 1000, held_out.validation_loss
            left.plot(x, y, ".-", color=ACCENT, linewidth=0.8, label="held-out")
            left.legend()
        top.plot(seen, frame.lr, color=GENERATED)
        top.set(title="Learning rate", ylim=(0, None))
        top.xaxis.set_major_locator(MaxNLocator(5, steps=style.ROUND))  # of all three, which share it
        top.yaxis.set_major_locator(MaxNLocator(3, steps=style.ROUND))
        top.yaxis.set_major_formatter("{x:g}")
    return figure


def band_histograms(values_by_band: Mapping[str, ArrayLike]) -> Figure:
    """Density of any number of coefficients of each band, logarithmic, standard deviations in the legend."""
    with panels(2.6, log="y", legend="right center") as (figure, (axes,)):
        for (name, values), color in zip(values_by_band.items(), palette(len(values_by_band)), strict=True):
            values = shaped(name, values, ("n",), "ravel the band")
            axes.stairs(*np.histogram(values, 80, density=True), color=color, label=f"{name}, std {values.std():#.2g}")
        axes.set(xlabel="coefficient", ylabel="density")
    return figure


def channel_histograms(images: ArrayLike) -> Figure:
    """Pixel values of images (N, H, W, C), a panel per channel."""
    titles, images = ("Red", "Green", "Blue") if np.shape(images)[-1] == 3 else ("",), style.checked(images)
    with panels(2.0, "ABC"[: len(titles)], sharey=True) as (figure, axs):
        for channel, (axes, title) in enumerate(zip(axs, titles, strict=True)):
            counts = np.sum([np.bincount(image[..., channel].ravel(), minlength=256) for image in images], 0)
            shares = 100 * counts.reshape(64, 4).sum(1) / counts.sum()
            axes.stairs(shares, np.arange(0, 257, 4), color="0.78", fill=True)
            axes.set(title=title, xlabel="pixel value", xticks=(0, 128, 255))
        axs[0].set(ylabel="pixels (%)")
    return figure


def spectra(frequency: ArrayLike, real: Estimates, generated: Estimates) -> Figure:
    """Radial power spectra (F,) over spatial frequency (F,) in cycles/pixel, and their ratio underneath."""
    area: dict[str, Any] = {"alpha": 0.25, "linewidth": 0}
    with panels(3.4, "A;B", log="xy", height_ratios=(2, 1), sharex=True) as (figure, (power, ratio)):
        for (name, color), (value, low, high) in zip(SIDES, (real, generated), strict=True):
            value = shaped(name, value, np.shape(frequency), "use the same frequencies")
            power.plot(frequency, value, color=color, label=name)
            power.fill_between(frequency, low, high, color=color, **area)
        ratio.plot(frequency, generated.value / real.value, color=GENERATED)
        ratio.axhline(1, color=REAL)
        worst = generated.low / real.high, generated.high / real.low
        ratio.fill_between(frequency, *worst, color=GENERATED, **area)
        power.set(ylabel="power")
        power.legend()
        ratio.set(ylabel="generated\n/ real", xlabel="spatial frequency (cycles/pixel)")
    return figure


def _bands(axes: Axes, labels: Sequence[str], real: Estimates, generated: Estimates) -> np.ndarray:
    """Make a tick per band, turned where there are many, and return their positions."""
    at = np.arange(len(labels))
    for estimates in (real, generated):
        shaped("values", estimates.value, at.shape, "pass one per band")
    axes.margins(y=0.12)
    axes.set(xlabel="band", xlim=(-0.6, len(labels) - 0.4))
    axes.set_xticks(at, labels, rotation=90 * (len(labels) > 16))
    axes.grid(axis="x", visible=False)
    return at


def band_energy(labels: Sequence[str], real: Estimates, generated: Estimates) -> Figure:
    """Energy (bands,) of real beside generated images, generated / real over the bars."""
    with panels(2.6, log="y", legend="upper right") as (figure, (axes,)):
        at = _bands(axes, labels, real, generated)
        for (name, color), energy, shift in zip(SIDES, (real, generated), (-0.2, 0.2), strict=True):
            axes.bar(at + shift, energy.value, 0.38, color=color, label=name)
            axes.vlines(at + shift, energy.low, energy.high, color="0.15", linewidth=0.8)
        turned, tops = len(labels) > 16, np.nanmax([*real, *generated], 0)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "size": 6.5, "rotation": 90 * turned}
        for x, top, ratio in zip(at, tops, generated.value / real.value, strict=True):
            axes.annotate(f"×{ratio:.2f}", (x, top), (0, 2), **place)
        axes.margins(y=0.3 if turned else 0.12)
        axes.set(ylabel="energy (mean square)")
    return figure


def band_kurtosis(labels: Sequence[str], real: Estimates, generated: Estimates) -> Figure:
    """Excess kurtosis (bands,), linear to 1 and logarithmic beyond; 0 is a Gaussian."""
    with panels(2.4, legend="upper right") as (figure, (axes,)):
        at = _bands(axes, labels, real, generated)
        axes.set_yscale("symlog", linthresh=1)
        for (name, color), kurtosis, shift in zip(SIDES, (real, generated), (-0.12, 0.12), strict=True):
            axes.plot(at + shift, kurtosis.value, "o", color=color, label=name)
            axes.vlines(at + shift, kurtosis.low, kurtosis.high, color=color, linewidth=2, alpha=0.5)
        axes.axhline(0, color="0.15", linewidth=0.6)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(ylabel="excess kurtosis")
    return figure


def _shades(
    axes: Axes, values: np.ndarray, texts: Any, ends: tuple[float, float], quantity: str, size: float = 6
) -> None:
    """Numbers (rows, columns) as shades, dark is more, with texts on them and a colour bar; NaN is left white."""
    import seaborn as sns  # takes a second

    bar, look = {"label": quantity, "format": "%g", "ticks": style.ticks(*ends)}, {"size": size}
    norm = LogNorm(*ends, clip=True)
    sns.heatmap(values, norm=norm, cmap="crest", annot=texts, fmt="", annot_kws=look, cbar_kws=bar, ax=axes)
    if drawn := axes.collections[0].colorbar:
        drawn.minorticks_off()
    axes.grid(visible=False)


def heat_map(
    values: ArrayLike, rows: Sequence[str], columns: Sequence[str], quantity: str, ylabel: str = "", xlabel: str = ""
) -> Figure:
    """Numbers (rows, columns) as a table of shades on a logarithmic scale, dark is more; NaN is left white."""
    values = shaped("values", values, (len(rows), len(columns)), "pass a name per row and column").astype(float)
    seen = values[values > 0]
    need(seen.size, "no positive numbers", "some", "give what was measured")
    ends = seen.min(), max(seen.max(), 1.01 * seen.min())
    texts = np.array([[_short(value) for value in row] for row in values]) if len(columns) <= 16 else None
    with panels(max(1.8, 1.0 + 0.3 * len(rows))) as (figure, (axes,)):
        _shades(axes, values, texts, ends, quantity)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90 * (max(map(len, columns)) > 4))
        axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def _short(value: float) -> str:
    """Two digits: 0.10, 2.0, 30, 8k."""
    return EngFormatter(places=0, sep="")(value) if value >= 99.5 else f"{value:#.2g}".rstrip(".")


def packet_map(distances: Estimates, level: int) -> Figure:
    """Fréchet distance of each of the 4^L Haar packets (4^L,), placed by frequency, low at the top left.

    Beneath each, half the width of its interval, if it has one, in per cent of it.

    Packet p has a base-4 digit per split, 0..3 = A, H, V, D, the last split first, as in stacked channels. A high-pass
    split reverses the frequencies beneath it, so the digits' bits are a Gray code of the position.
    """
    values, side = shaped("distances", distances.value, (4**level,), f"match level {level}"), 2**level
    splits = np.arange(4**level) // 4 ** np.arange(level)[:, None] % 4  # (L, 4^L), the first split first
    bits = np.bitwise_xor.accumulate([splits & 1, splits >> 1], axis=1)  # (2, L, 4^L): vertical, horizontal
    row, column = np.tensordot(bits, 2 ** np.arange(level)[::-1], (1, 0))
    packets = np.argsort(row * side + column).reshape(side, side)  # which one is where
    halves = 50 * (distances.high - distances.low) / values
    texts = [f"{x:.2g}" + ("" if np.isnan(half) else f"\n±{half:.0f}%") for x, half in zip(values, halves, strict=True)]
    top = values.max() or 1
    with panels(3.4) as (figure, (axes,)):
        figure.set_size_inches(4.3, 3.4)
        ends = np.clip(values.min(), top / 1e4, top / 10), top
        _shades(axes, values[packets], np.array(texts)[packets], ends, "Fréchet distance", min(6, 44 / side))
        at, names = np.linspace(0, side, 6), ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]
        axes.set_xticks(at, names)
        axes.set_yticks(at, names, rotation=0)
        axes.set(xlabel="horizontal frequency (cycles/pixel)", ylabel="vertical frequency (cycles/pixel)")
    return figure
