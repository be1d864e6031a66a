"""Figures of scores: arrays in, a matplotlib `Figure` out. Grey is real data, blue generated; bars span 90 %."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from wddm.mosaics import need, panels

REAL, GENERATED, ACCENT = "0.45", "#0173b2", "#d55e00"


def ticks(low: float, high: float) -> Locator:
    """Round numbers on a logarithmic axis, neither one nor twenty of them."""
    if high < 8 * low:
        return MaxNLocator(5)
    return LogLocator(subs=(1, 2, 5) if high < 40 * low else (1, 3) if high < 300 * low else (1,))


def log_axis(axes: Axes, name: str = "y") -> None:
    """Logarithmic axis; one that spans under four decades is labelled 0.1, not as a power."""
    axes.set(**{f"{name}scale": "log"})
    axis, (low, high) = getattr(axes, f"{name}axis"), getattr(axes, f"get_{name}lim")()
    axis.set_major_locator(ticks(low, high))
    axis.set_minor_formatter(NullFormatter())
    if high < 1e4 * low:
        axis.set_major_formatter("{x:g}")


def score_chart(scores: Mapping[str, Sequence[float]]) -> Figure:
    """Distances by name, each (value, low, high, floor), as multiples of what real images score in their place."""
    need(bool(scores), "no scores", "some", "give those that were computed")
    with panels(0.9 + 0.32 * len(scores)) as (figure, (axes,)):
        for row, (value, low, high, floor) in enumerate(scores.values()):
            axes.plot([low / floor, high / floor], [row, row], color=GENERATED, linewidth=5, alpha=0.35)
            axes.plot(value / floor, row, "o", color=GENERATED)
            axes.annotate(f"{value:.3g}", (value / floor, row), (0, 6), textcoords="offset points", ha="center", size=7)
        axes.axvline(1, color=REAL)
        axes.set_xlim(min(0.8, 0.9 * axes.get_xlim()[0]), 1.2 * axes.get_xlim()[1])
        log_axis(axes, "x")
        axes.set_yticks(range(len(scores)), scores)
        axes.set(ylim=(len(scores) - 0.4, -0.7), xlabel="distance to the real images, as a multiple of the floor (1)")
        axes.grid(axis="y", visible=False)
    return figure


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
            ratio.fill_between(frequency, *np.divide(generated_interval, real_power), color=GENERATED, alpha=0.25, lw=0)
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


def packet_map(per_packet: ArrayLike, level: int, order: str = "codec") -> Figure:
    """Fréchet distance of each of the 4^L Haar packets, placed by frequency, low at the top left.

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
    grid[row, column] = values
    norm = LogNorm(np.clip(values.min(), top / 1e4, top / 10), top, clip=True) if top > 0 else None
    with panels(3.4) as (figure, (axes,)):
        figure.set_size_inches(4.3, 3.4)
        options = {"aspect": "auto", "interpolation": "nearest", "extent": (0, 0.5, 0.5, 0)}
        image = axes.imshow(grid, "crest", norm, **options)
        for (y, x), value in np.ndenumerate(grid):
            ink, at = "white" if norm and norm(value) > 0.4 else "0.15", (np.array([x, y]) + 0.5) * side
            axes.text(*at, f"{value:.2g}", size=6, color=ink, ha="center", va="center")
        axes.set(xlabel="horizontal frequency (cycles/pixel)", ylabel="vertical frequency (cycles/pixel)")
        axes.grid(visible=False)
        at = norm and ticks(norm.vmin, top)
        bar = figure.colorbar(image, label="Fréchet distance", ticks=at, format="%g")
        bar.minorticks_off(), bar.outline.set_visible(False)
    return figure


def class_counts(names: Sequence[str], counts_generated: ArrayLike, share_real: ArrayLike) -> Figure:
    """Predicted classes (K,) of generated images, and what the real share (K,) and chance would give."""
    counts, share = np.asarray(counts_generated), np.asarray(share_real) / np.sum(share_real)
    shapes = {counts.shape, share.shape, (len(names),)}
    need(len(shapes) == 1, f"shapes {shapes}", f"({len(names)},)", "pass one number per name")
    expected, spread = share * counts.sum(), 2 * np.sqrt(share * (1 - share) * counts.sum())
    with panels(0.7 + 0.2 * len(names)) as (figure, (axes,)):
        axes.barh(names, counts, color=GENERATED, alpha=0.6, label="generated")
        axes.errorbar(expected, names, xerr=spread, fmt="|k", elinewidth=0.8, label="expected ± 2 std")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="images")
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def confidence(real: ArrayLike, generated: ArrayLike, threshold: float) -> Figure:
    """Distribution of a classifier's top-class probability, real (N,) and generated (M,), and a threshold."""
    with panels(2.6) as (figure, (axes,)):
        for name, values, color in (("real", real, REAL), ("generated", generated, GENERATED)):
            fits = np.ndim(values) == 1 and len(values)
            need(fits, f"{name} {np.shape(values)}", "(N,)", "pass a probability per image")
            label = f"{name}, {np.mean(np.less(values, threshold)):.1%} below {threshold:g}"
            axes.ecdf(values, color=color, label=label)
        axes.axvline(threshold, color=ACCENT, linestyle="--", linewidth=0.8)
        axes.set(xlabel="top-class probability", ylabel="share of images below", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left")
    return figure


def nearest_distances(real: ArrayLike, generated: ArrayLike) -> Figure:
    """Share of real (N,) and generated (M,) images whose nearest training image is nearer, over distance and ratio.

    Each (n, 2): distances to the nearest and the second nearest. Dashed: a third, from where on it is a copy.
    """
    with panels(2.4, "AB", sharey=True) as (figure, (distance, ratio)):
        for name, values, color in (("real", real, REAL), ("generated", generated, GENERATED)):
            values = np.asarray(values)
            fits = values.ndim == 2 and values.shape[1] == 2 and len(values)
            need(fits, f"{name} {values.shape}", "(n, 2)", "pass the two nearest")
            distance.ecdf(values[:, 0], color=color, label=name)
            second = np.where(values[:, 1] > 0, values[:, 1], 1)
            ratio.ecdf(np.where(values[:, 1] > 0, values[:, 0] / second, 0), color=color)
        ratio.axvline(1 / 3, color=ACCENT, linestyle="--", linewidth=0.8)
        distance.set(xlabel="distance to the nearest training image\n(root mean square, pixels 0 to 1)")
        distance.set(ylabel="share of images below", xlim=(0, None), ylim=(0, 1))
        ratio.set(xlabel="distance to the nearest / to the second nearest", xlim=(0, 1))
        distance.legend(loc="upper left")
    return figure


def responses(found: Mapping[str, tuple[ArrayLike, Mapping[str, ArrayLike]]], units: Mapping[str, str]) -> Figure:
    """How distances, as multiples of their value for intact images, grow with what is done to real images.

    `found`: by kind, the amounts (K,), and by distance its values and the ends of their intervals (K, 3); `units`: by
    kind, of the amounts.
    """
    with panels(2.6, "ABCDEF"[: len(found)], sharey=True) as (figure, axs):
        for axes, (kind, (amounts, curves)) in zip(axs, found.items(), strict=True):
            for (name, values), color, marker in zip(curves.items(), (GENERATED, ACCENT, REAL), "osD", strict=False):
                wanted, values = (len(amounts), 3), np.asarray(values)
                need(values.shape == wanted, f"{name} {values.shape}", wanted, "pass value, low and high per amount")
                middle, low, high = (values / values[0, 0]).T
                axes.plot(amounts, middle, color=color, marker=marker, markersize=4, label=name)
                axes.fill_between(amounts, low, high, color=color, alpha=0.25, linewidth=0)
            axes.set(title=kind.capitalize(), xlabel=units[kind])
        axs[0].set(ylabel="distance / distance of\nintact images")
        for axes in axs:
            log_axis(axes)
        figure.legend(*axs[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
