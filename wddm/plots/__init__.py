"""Figures of the reports: arrays in, a matplotlib `Figure` out; nothing shown, nothing saved, no state left.

Here are the charts, 900 pixels wide (6 inches at 150 dpi); those made of images are in `mosaics`, those of scores in
`verdicts`, those that set side by side in `comparisons`. Bands: A (approximation), H, V, D (horizontal, vertical,
diagonal detail). Grey is real data, blue generated.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from wddm.plots.comparisons import (  # noqa: F401  (and those that set side by side)
    heat_map,
    learning_curves,
    quality_curves,
    trade_off,
    variants,
)
from wddm.plots.frequencies import (  # noqa: F401  (those of spectra and bands)
    band_energy,
    band_kurtosis,
    packet_map,
    spectra,
)
from wddm.plots.mosaics import (  # noqa: F401  (the figures made of images are plots too)
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
from wddm.plots.speeds import rates_by_level, speedup_against_flops  # noqa: F401  (and those of speed)
from wddm.plots.verdicts import (  # noqa: F401  (and those of scores)
    ACCENT,
    GENERATED,
    REAL,
    class_counts,
    confidence,
    log_axis,
    nearest_distances,
    responses,
    score_chart,
)


def _palette(count: int) -> list:
    """A colour per band; of 16 or more, a hue per band of the last split and shades for the earlier ones."""
    if count <= 10 or count % 4:
        return sns.color_palette("colorblind" if count <= 10 else "husl", count)
    hues, shades = sns.color_palette("colorblind", 4), count // 4
    return [shade for hue in hues for shade in sns.light_palette(hue, shades + 2, reverse=True)[:shades]]


def lines(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    log: str = "",
    dashed: Sequence[str] = (),
    height: float = 2.6,
) -> Figure:
    """Curves by name, each (x, y), legend beside the panel; `log`: "x", "y" or "xy"; `dashed` ones are references."""
    with panels(height) as (figure, (axes,)):
        colors = iter(_palette(len(series)))
        for name, (x, y) in series.items():
            need(np.shape(x) == np.shape(y), f"{name} {np.shape(y)}", np.shape(x), "pass a y for every x")
            style = {"color": REAL, "linestyle": "--"} if name in dashed else {"color": next(colors)}
            axes.plot(x, y, label=name, **style)
        for name in log:
            log_axis(axes, name)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        figure.legend(loc="outside right center")
    return figure


def _over_time(times: ArrayLike, series: Mapping[str, ArrayLike], ylabel: str) -> Figure:
    """One line per band over diffusion time, logarithmic y, legend beside the panel."""
    with panels(2.6) as (figure, (axes,)):
        for (name, y), color in zip(series.items(), _palette(len(series)), strict=True):
            shape = np.shape(y)
            need(shape == np.shape(times), f"{name} {shape}", np.shape(times), "pass a value per time")
            axes.plot(times, y, color=color, label=name)
        log_axis(axes)
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
            log_axis(axes)
        if measured := [row for row in rows if row.get("validation_loss")]:
            x, y = ([row[name] for row in measured] for name in ("images_seen", "validation_loss"))
            axs[0].plot(np.divide(x, 1000), y, ".-", color=ACCENT, linewidth=0.8, label="held-out")
            axs[0].legend()
        axs[1].plot(seen / 1000, rate, color=GENERATED)
        axs[1].set_title("Learning rate")
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
        log_axis(axes)
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
