"""Figures of spectra and bands: arrays in, a `Figure` out. Grey is real data, blue generated; bars span 90 %."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from wddm.plots.mosaics import need, panels
from wddm.plots.verdicts import GENERATED, REAL, log_axis, ticks


def spectra(
    frequency: ArrayLike,
    real_power: ArrayLike,
    generated_power: ArrayLike,
    real_interval: ArrayLike | None = None,
    generated_interval: ArrayLike | None = None,
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
                power.fill_between(frequency, *interval, color=color, alpha=0.25, linewidth=0)
        if generated_interval is not None:
            reals = real_power if real_interval is None else np.asarray(real_interval)[::-1]  # each at its worst
            ratio.fill_between(frequency, *np.divide(generated_interval, reals), color=GENERATED, alpha=0.25, lw=0)
        log_axis(power, "x"), log_axis(power), log_axis(ratio)
        power.set(ylabel="power"), power.legend()
        ratio.set(ylabel="generated\n/ real", xlabel="spatial frequency (cycles/pixel)")
    return figure


def band_energy(
    labels: Sequence[str],
    real: ArrayLike,
    generated: ArrayLike,
    real_interval: ArrayLike | None = None,
    generated_interval: ArrayLike | None = None,
) -> Figure:
    """Energy (bands,) of real beside generated images, generated / real over the bars; intervals (2, bands)."""
    sizes, at = (len(labels), len(real), len(generated)), np.arange(len(labels))
    turn = 90 * (len(labels) > 16)
    need(len(set(sizes)) == 1, f"{sizes} labels, real, generated", "equally many", "pass one per band")
    with panels(2.6) as (figure, (axes,)):
        tops = [np.asarray(real), np.asarray(generated)]
        for k, (values, interval, color) in enumerate(
            ((real, real_interval, REAL), (generated, generated_interval, GENERATED))
        ):
            axes.bar(at + 0.4 * k - 0.2, values, 0.38, color=color, label=("real", "generated")[k])
            if interval is not None:
                axes.vlines(at + 0.4 * k - 0.2, *interval, color="0.15", linewidth=0.8)
                tops[k] = np.maximum(values, interval[1])
        for x, r, g, top in zip(at, real, generated, np.maximum(*tops), strict=True):
            place = {"textcoords": "offset points", "ha": "center", "rotation": turn}
            axes.annotate(f"×{g / r:.2f}", (x, top), (0, 2), size=6.5, **place)
        axes.set(xlabel="band", ylabel="energy (mean square)")
        axes.set_xticks(at, labels, rotation=turn)
        axes.margins(x=0.01, y=0.3 if turn else 0.12)
        axes.grid(axis="x", visible=False)
        log_axis(axes)
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def band_kurtosis(
    labels: Sequence[str],
    real: ArrayLike,
    generated: ArrayLike,
    real_interval: ArrayLike,
    generated_interval: ArrayLike,
) -> Figure:
    """Excess kurtosis (bands,) with intervals (2, bands), linear to 1 and logarithmic beyond; 0 is a Gaussian."""
    sizes, at = (len(labels), len(real), len(generated)), np.arange(len(labels))
    need(len(set(sizes)) == 1, f"{sizes} labels, real, generated", "equally many", "pass one per band")
    with panels(2.4) as (figure, (axes,)):
        for offset, values, interval, color, name in (
            (-0.12, real, real_interval, REAL, "real"),
            (0.12, generated, generated_interval, GENERATED, "generated"),
        ):
            axes.plot(at + offset, values, "o", markersize=4, color=color, label=name)
            axes.vlines(at + offset, *interval, color=color, linewidth=2, alpha=0.5)
        axes.axhline(0, color="0.15", linewidth=0.6)
        axes.margins(y=0.12)
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="band", ylabel="excess kurtosis")
        axes.set_xticks(at, labels, rotation=90 * (len(labels) > 16))
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def packet_map(per_packet: ArrayLike, level: int, order: str = "codec", interval: ArrayLike | None = None) -> Figure:
    """Fréchet distance of each of the 4^L Haar packets, placed by frequency, low at the top left.

    Beneath each, half the width of its `interval` (2, 4^L), in per cent of it.

    Packet p has a base-4 digit per split, 0..3 = A, H, V, D. In order "codec" the last split is the most
    significant digit (as in stacked channels), in order "path" the first (as in PyWavelets' node paths). A
    high-pass split reverses the frequencies beneath it, so the digits' bits are a Gray code of the position.
    """
    values = np.asarray(per_packet, dtype=float)
    need(values.shape == (4**level,), f"{values.shape} distances", f"({4**level},)", f"match level {level}")
    need(order in ("codec", "path"), f"order={order!r}", "codec or path", "say which split comes first")
    digits = np.arange(4**level) // 4 ** np.arange(level)[:, None] % 4  # (L, 4^L), least significant first
    splits = digits[:: 1 if order == "codec" else -1]
    bits = np.bitwise_xor.accumulate([splits & 1, splits >> 1], axis=1)  # (2, L, 4^L): vertical, horizontal
    row, column = np.tensordot(bits, 2 ** np.arange(level)[::-1], (1, 0))
    grid, top, side = np.empty((2**level, 2**level)), values.max(), 0.5 / 2**level
    grid[row, column], texts = values, np.empty(grid.shape, object)
    texts[row, column] = [f"{value:.2g}" for value in values]
    if interval is not None:
        halves = 50 * np.subtract(*np.asarray(interval)[::-1]) / values
        texts[row, column] += [f"\n±{half:.0f}%" for half in halves]
    norm = LogNorm(np.clip(values.min(), top / 1e4, top / 10), top, clip=True) if top > 0 else None
    with panels(3.4) as (figure, (axes,)):
        figure.set_size_inches(4.3, 3.4)
        options = {"aspect": "auto", "interpolation": "nearest", "extent": (0, 0.5, 0.5, 0)}
        image = axes.imshow(grid, "crest", norm, **options)
        for (y, x), value in np.ndenumerate(grid):
            ink, at = "white" if norm and norm(value) > 0.4 else "0.15", (np.array([x, y]) + 0.5) * side
            axes.text(*at, texts[y, x], size=min(6, 44 / 2**level), color=ink, ha="center", va="center")
        axes.set(xlabel="horizontal frequency (cycles/pixel)", ylabel="vertical frequency (cycles/pixel)")
        axes.grid(visible=False)
        at = norm and ticks(norm.vmin, top)
        bar = figure.colorbar(image, label="Fréchet distance", ticks=at, format="%g")
        bar.minorticks_off(), bar.outline.set_visible(False)
    return figure
