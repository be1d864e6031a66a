"""Figures of the reports: arrays in, a matplotlib `Figure` out; nothing shown, nothing saved, no state left.

Here are the charts, 900 pixels wide (6 inches at 150 dpi); those made of images are in `mosaics`. Bands: A
(approximation), H, V, D (horizontal, vertical, diagonal detail). Grey is real data, blue generated.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from wddm.mosaics import (  # noqa: F401  (the figures made of images are plots too)
    checked,
    coefficient_bands,
    compare_grids,
    compose,
    image_grid,
    need,
    neighbours,
    panels,
    stacked,
    trajectory,
)

REAL, GENERATED, ACCENT = "0.45", "#0173b2", "#d55e00"


def _ticks(low: float, high: float) -> Locator:
    """Round numbers on a logarithmic axis, neither one nor twenty of them."""
    if high < 8 * low:
        return MaxNLocator(5)
    return LogLocator(subs=(1, 2, 5) if high < 40 * low else (1, 3) if high < 300 * low else (1,))


def _log(axes: Axes, name: str = "y") -> None:
    """Logarithmic axis; one that spans under four decades is labelled 0.1, not as a power."""
    axes.set(**{f"{name}scale": "log"})
    axis, (low, high) = getattr(axes, f"{name}axis"), getattr(axes, f"get_{name}lim")()
    axis.set_major_locator(_ticks(low, high))
    axis.set_minor_formatter(NullFormatter())
    if high < 1e4 * low:
        axis.set_major_formatter("{x:g}")


def _palette(count: int) -> list:
    """A colour per band; of 16 or more, a hue per band of the last split and shades for the earlier ones."""
    if count <= 10 or count % 4:
        return sns.color_palette("colorblind" if count <= 10 else "husl", count)
    hues, shades = sns.color_palette("colorblind", 4), count // 4
    return [shade for hue in hues for shade in sns.light_palette(hue, shades + 2, reverse=True)[:shades]]


def _over_time(times: ArrayLike, series: Mapping[str, ArrayLike], ylabel: str) -> Figure:
    """One line per band over diffusion time, logarithmic y, legend beside the panel."""
    with panels(2.6) as (figure, (axes,)):
        for (name, y), color in zip(series.items(), _palette(len(series)), strict=True):
            shape = np.shape(y)
            need(shape == np.shape(times), f"{name} {shape}", np.shape(times), "pass a value per time")
            axes.plot(times, y, color=color, label=name)
        _log(axes)
        axes.set(xlabel="diffusion time t (steps)", ylabel=ylabel)
        figure.legend(loc="outside right center", ncols=1 + len(series) // 20)
    return figure


def band_trajectory(
    times: ArrayLike, std_by_band: Mapping[str, ArrayLike], quantity: str = "standard deviation"
) -> Figure:
    """Standard deviation or error (S,) of each band at the `times` (S,) of a denoising, noise at the left."""
    figure = _over_time(times, std_by_band, quantity)
    figure.axes[0].invert_xaxis()
    return figure


def noise_schedule(times: ArrayLike, snr_by_band: Mapping[str, ArrayLike]) -> Figure:
    """Signal-to-noise power ratio (T,) of each band over `times` (T,); dashed where signal equals noise."""
    figure = _over_time(times, snr_by_band, "signal-to-noise ratio")
    figure.axes[0].axhline(1, color=REAL, linestyle="--", linewidth=0.8)
    return figure


def training_curves(rows: Sequence[Mapping[str, float]], window: int | None = None) -> Figure:
    """Loss, learning rate and gradient norm over images seen.

    `rows`: dicts or a DataFrame with images_seen, loss, lr, grad_norm and, in some, validation_loss. What is noisy is
    drawn faint under its running mean over `window` rows (a fiftieth of them).
    """
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
    names, got = ("images_seen", "loss", "lr", "grad_norm"), list(rows[0]) if rows else []
    need(set(names) <= set(got), f"{len(rows)} rows of {got}", names, "pass a dict per step")
    seen, loss, rate, norm = (np.array([row[name] for row in rows], dtype=float) for name in names)
    box = np.ones(min(len(rows), window or max(1, len(rows) // 50)))
    with panels(2.8, "AB;AC", width_ratios=(3, 2), sharex=True) as (figure, axs):
        for axes, noisy, title in ((axs[0], loss, "Loss"), (axs[2], norm, "Gradient norm")):
            smooth = np.convolve(noisy, box, "same") / np.convolve(np.ones_like(noisy), box, "same")
            axes.plot(seen / 1000, noisy, color=GENERATED, alpha=0.3, linewidth=0.5)
            axes.plot(seen / 1000, smooth, color=GENERATED)
            axes.set(title=title, xlabel="images seen (thousands)")
            _log(axes)
        if measured := [row for row in rows if row.get("validation_loss")]:
            x, y = ([row[name] for row in measured] for name in ("images_seen", "validation_loss"))
            axs[0].plot(np.divide(x, 1000), y, ".-", color=ACCENT, linewidth=0.8, label="held-out")
            axs[0].legend()
        axs[1].plot(seen / 1000, rate, color=GENERATED)
        axs[1].set_title("Learning rate")
    return figure


def spectra(frequency: ArrayLike, real_power: ArrayLike, generated_power: ArrayLike) -> Figure:
    """Radial power spectra (F,) over spatial frequency (F,) in cycles/pixel, and their ratio underneath."""
    shapes = [np.shape(values) for values in (frequency, real_power, generated_power)]
    need(len(set(shapes)) == 1, f"shapes {shapes}", "(F,) three times", "use the same frequencies")
    with panels(3.4, "A;B", height_ratios=(2, 1), sharex=True) as (figure, (power, ratio)):
        power.plot(frequency, real_power, color=REAL, label="real")
        power.plot(frequency, generated_power, color=GENERATED, label="generated")
        ratio.plot(frequency, np.divide(generated_power, real_power), color=GENERATED)
        ratio.axhline(1, color=REAL)
        _log(power, "x"), _log(power), _log(ratio)
        power.set(ylabel="power"), power.legend()
        ratio.set(ylabel="generated\n/ real", xlabel="spatial frequency (cycles/pixel)")
    return figure


def band_energy(labels: Sequence[str], real: ArrayLike, generated: ArrayLike) -> Figure:
    """Energy (bands,) of real beside generated images, with generated / real written over the bars."""
    sizes, at = (len(labels), len(real), len(generated)), np.arange(len(labels))
    turn = 90 * (len(labels) > 16)
    need(len(set(sizes)) == 1, f"{sizes} labels, real, generated", "equally many", "pass one per band")
    with panels(2.6) as (figure, (axes,)):
        axes.bar(at - 0.2, real, 0.38, color=REAL, label="real")
        axes.bar(at + 0.2, generated, 0.38, color=GENERATED, label="generated")
        for x, r, g in zip(at, real, generated, strict=True):
            place = {"textcoords": "offset points", "ha": "center", "rotation": turn}
            axes.annotate(f"×{g / r:.2f}", (x, max(r, g)), (0, 2), size=6.5, **place)
        axes.set(xlabel="band", ylabel="energy (mean square)")
        axes.set_xticks(at, labels, rotation=turn)
        axes.margins(x=0.01, y=0.3 if turn else 0.12)
        axes.grid(axis="x", visible=False)
        _log(axes)
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def band_histograms(values_by_band: Mapping[str, ArrayLike]) -> Figure:
    """Density of any number of coefficients of each band, logarithmic, standard deviations in the legend."""
    with panels(2.6) as (figure, (axes,)):
        palette = _palette(len(values_by_band))
        for (name, values), color in zip(values_by_band.items(), palette, strict=True):
            shape = np.shape(values)
            need(len(shape) == 1 and shape[0] > 0, f"{name} {shape}", "(n,)", "ravel the band")
            density, edges = np.histogram(values, 80, density=True)
            axes.stairs(density, edges, color=color, label=f"{name}, std {np.std(values):#.2g}")
        _log(axes)
        axes.set(xlabel="coefficient", ylabel="density")
        figure.legend(loc="outside right center", ncols=1 + len(values_by_band) // 20)
    return figure


def channel_histograms(images: ArrayLike, generated: ArrayLike | None = None) -> Figure:
    """Pixel values of images (N, H, W, C), a panel per channel, with a line for those of generated images."""
    both = [checked(images)] if generated is None else [checked(images), checked(generated)]
    titles = ("Red", "Green", "Blue") if np.shape(images)[-1] == 3 else ("",)
    with panels(2.0, "ABC"[: len(titles)], sharey=True) as (figure, axs):
        for channel, (axes, title) in enumerate(zip(axs, titles, strict=True)):
            for sample, color, name in zip(both, ("0.78", GENERATED), ("real", "generated"), strict=False):
                parts = np.array_split(sample, 1 + sample.size // 2**24)  # counted in 64 bits, so not all at once
                counts = sum(np.bincount(part[..., channel].ravel() // 4, minlength=64) for part in parts)
                style = {"color": color, "fill": name == "real", "label": name}
                axes.stairs(100 * counts / counts.sum(), np.arange(0, 257, 4), **style)
            axes.set(title=title, xlabel="pixel value", xticks=(0, 128, 255))
        axs[0].set(ylabel="pixels (%)")
        if len(both) == 2:
            figure.legend(*axs[0].get_legend_handles_labels(), loc="outside right center")
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
        ticks = norm and _ticks(norm.vmin, top)
        bar = figure.colorbar(image, label="Fréchet distance", ticks=ticks, format="%g")
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


def variants(values: Mapping[str, Sequence[float]], quantity: str, floor: float | None = None) -> Figure:
    """A row per variant with a dot per seed and a line at their mean, logarithmic; dashed where the floor is."""
    need(bool(values), "no variants", "one or more", "give the values of each")
    with panels(0.8 + 0.25 * len(values)) as (figure, (axes,)):
        for row, seeds in enumerate(values.values()):
            axes.plot(seeds, [row] * len(seeds), "o", color=GENERATED, markersize=4, alpha=0.7)
            axes.plot([np.mean(seeds)] * 2, [row - 0.3, row + 0.3], color=GENERATED)
        if floor is not None:
            axes.axvline(floor, color=REAL, linestyle="--", linewidth=0.8, label="floor: two halves of the real set")
            figure.legend(loc="outside upper right")
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set(xlabel=quantity, xscale="log")
    return figure
