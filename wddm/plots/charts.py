"""Charts: numbers in, a matplotlib `Figure` out.

Bands: A (approximation), H, V, D (horizontal, vertical, diagonal detail). Intervals are of 90 %, shaded or bars. The
floor is what real images score in the place of generated ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

from wddm.metrics.intervals import Estimate, band
from wddm.plots import style
from wddm.plots.style import ACCENT, DASHED, GENERATED, REAL, SIDES, Texts, palette, panels, wrapped

__all__ = [
    "beside", "distributions", "histograms", "lines", "packet_map", "quality_curves", "spectra",
    "training_curves", "variants",
]  # fmt: skip

Estimates = Estimate[np.ndarray]
Curve = tuple[ArrayLike, ArrayLike]
FLOOR = {"color": REAL, "label": "floor: real images", **DASHED}
AREA: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}


def lines(
    series: Mapping[str, Curve], xlabel: str, ylabel: str, log: str = "", dashed: Texts = (), parts: Texts = (),
    backwards: bool = False,
) -> Figure:  # fmt: skip
    """Curves by name, each (x, y). `log`: the axes that are logarithmic, "x", "y" or "xy".

    `dashed`: names of reference curves; `parts`: of curves that add up to another; `backwards`: largest x at the left.
    """
    plain, shades = [name for name in series if name not in (*dashed, *parts)], np.linspace(0.35, 0.9, len(parts))
    colors = dict(zip(plain, palette(len(plain)), strict=True)) | dict.fromkeys(dashed, REAL)
    colors |= dict(zip(parts, colormaps["YlGn"](shades), strict=True))
    with panels(2.6, log=log, legend="right center") as (figure, (axes,)):
        for name, (x, y) in series.items():
            dashes = "--" if name in dashed else "o" if "y" in log and np.count_nonzero(y) < 2 else "-"  # one point
            axes.plot(x, y, dashes, label=name, color=colors[name], linewidth=0.8 if name in parts else None)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_inverted(backwards)
    return figure


def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Curves, with running means, of rows with images_seen, loss, lr and grad_norm, some also with validation_loss."""
    import pandas as pd

    frame, names = pd.DataFrame(rows), ["images_seen", "loss", "lr", "grad_norm"]
    seen = frame["images_seen"] / 1000
    smooth = frame[names].rolling(max(1, len(frame) // 50), min_periods=1, center=True).mean()
    titles = {"loss": "Loss", "lr": "Learning rate", "grad_norm": "Gradient norm"}
    with panels(2.8, "AB;AC", width_ratios=(3, 2), sharex=True) as (figure, axs):
        for axes, (name, title) in zip(axs, titles.items(), strict=True):
            axes.plot(seen, frame[name], color=GENERATED, alpha=0.3, linewidth=0.5)
            axes.plot(seen, frame.lr if name == "lr" else smooth[name], "-" if len(frame) > 1 else "o", color=GENERATED)
            axes.set(title=title, xlabel="images seen (thousands)" if name != "lr" else "")
            style.logarithmic(axes, "y" * (name != "lr"))
        if len(held_out := frame.reindex(columns=["validation_loss"]).dropna()):
            axs[0].plot(seen[held_out.index], held_out, ".-", color=ACCENT, linewidth=0.8, label="held-out")
            axs[0].legend()
        axs[1].set(xlim=(0, None), ylim=(0, None))
        axs[1].xaxis.set_major_locator(MaxNLocator(4, steps=style.ROUND))  # of all three, which share it
        axs[1].yaxis.set_major_locator(MaxNLocator(3, steps=style.ROUND))
        axs[1].yaxis.set_major_formatter("{x:g}")
    return figure


def histograms(values: Mapping[str, ArrayLike], quantity: str, edges: ArrayLike, log: str = "") -> Figure:
    """Histograms by name, in per cent of the values (any shape) between `edges`: a panel each, on the same axes."""
    with panels(2.0, "ABCDEFGH"[: len(values)], log, sharex=True, sharey=True) as (figure, axs):
        for axes, (name, each) in zip(axs, values.items(), strict=True):
            counts, _ = np.histogram(each, edges)
            axes.stairs(100 * counts / np.size(each), edges, color="0.78", fill=True)
            axes.set(title=name, xlabel=quantity)
        axs[0].set(ylabel="share (%)")
    return figure


def spectra(frequency: ArrayLike, real: Estimates, generated: Estimates) -> Figure:
    """Radial power spectra (F,) over spatial frequency (F,) in cycles/pixel, and their ratio underneath."""
    with panels(3.4, "A;B", log="xy", height_ratios=(2, 1), sharex=True) as (figure, (power, ratio)):
        for (name, color), (value, low, high) in zip(SIDES, (real, generated), strict=True):
            power.plot(frequency, value, color=color, label=name)
            power.fill_between(frequency, low, high, color=color, **AREA)
        ratio.plot(frequency, generated.value / real.value, color=GENERATED)
        ratio.axhline(1, color=REAL)
        ratio.fill_between(frequency, generated.low / real.high, generated.high / real.low, color=GENERATED, **AREA)
        power.set(ylabel="power")
        power.legend()
        ratio.set(ylabel="generated\n/ real", xlabel="spatial frequency (cycles/pixel)")
    return figure


def beside(labels: Texts, real: Estimates, generated: Estimates, quantity: str, log: str = "") -> Figure:
    """A row for each of K labels (bands, classes, distances): values (K,), real and generated, with intervals."""
    rows = np.arange(len(labels))
    with panels(0.7 + 0.25 * len(labels), log=log, legend="upper right") as (figure, (axes,)):
        for (name, color), (values, low, high), shift in zip(SIDES, (real, generated), (-0.12, 0.12), strict=True):
            axes.plot(values, rows + shift, "o", color=color, label=name)
            axes.hlines(rows + shift, low, high, color=color, linewidth=2, alpha=0.5)
        axes.set_yticks(rows, wrapped(labels))
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlabel=quantity)
        axes.grid(axis="y", visible=False)
    return figure


def packet_map(distances: Estimates, level: int) -> Figure:
    """Heat map of the Haar packets' Fréchet distances (4^L,), low frequencies top left; with numbers up to level 4."""
    import pywt  # here, as seaborn takes a second
    import seaborn as sns

    values, side = np.reshape(distances.value, 4**level), 2**level
    nodes = pywt.WaveletPacket2D(np.zeros((side, side)), "haar", maxlevel=level).get_level(level, "freq")
    # a path is a letter per split, the first split first; a packet's number is a base-4 digit per split, the last first
    digits = str.maketrans("ahvd", "0123")
    packets = np.array([[int(node.path[::-1].translate(digits), 4) for node in row] for row in nodes])
    halves = 50 * (distances.high - distances.low) / np.where(values > 0, values, np.nan)
    texts = [f"{x:.2g}" + ("" if np.isnan(half) else f"\n±{half:.0f}%") for x, half in zip(values, halves, strict=True)]
    top, at, names = values.max() or 1, np.linspace(0, side, 6), ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    ends = np.clip(values.min(), top / 1e4, top / 10), top
    bar = {"label": "Fréchet distance", "format": "%g", "ticks": style.ticks(*ends)}
    look: dict[str, Any] = {"norm": LogNorm(*ends, clip=True), "annot_kws": {"size": min(6, 44 / side)}}
    with panels(3.4) as (figure, (axes,)):
        figure.set_size_inches(4.3, 3.4)
        labels = np.array(texts)[packets] if level < 5 else None  # beyond 4 too small to read
        sns.heatmap(values[packets], annot=labels, fmt="", cmap="crest", cbar_kws=bar, ax=axes, **look)
        axes.collections[0].colorbar.minorticks_off()  # type: ignore[union-attr]
        axes.grid(visible=False)
        axes.set_xticks(at, names)
        axes.set_yticks(at, names, rotation=0)
        axes.set(xlabel="horizontal frequency (cycles/pixel)", ylabel="vertical frequency (cycles/pixel)")
    return figure


def variants(table: Any, metric: str, quantity: str, floor: float | None = None) -> Figure:
    """A row per variant of a table of runs: a dot per seed with its interval, a line at the mean; dashed: the floor."""
    groups = dict(iter(table.dropna(subset=metric).groupby("variant", sort=False)))
    names = wrapped(groups)
    with panels(0.8 + 0.14 * sum(2 + x.count("\n") for x in names), log="x", legend="upper right") as (figure, (axes,)):
        for row, seeds in enumerate(groups.values()):
            at, values = row + 0.12 * (np.arange(len(seeds)) - (len(seeds) - 1) / 2), seeds[metric]
            axes.plot(values, at, "o", color=GENERATED, alpha=0.7)
            axes.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=GENERATED)
            low, high = (seeds.get(f"{metric}_{end}", values) for end in ("low", "high"))
            axes.hlines(at, low, high, color=GENERATED, linewidth=2, alpha=0.3)
        if floor is not None and floor > max(0, table[metric].min() / 20):  # KID's floor is far off, or below 0
            axes.axvline(floor, **FLOOR)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel=quantity)
    return figure


def quality_curves(
    tables: Mapping[str, Any], metric: str, quantity: str, axis: Mapping[str, str], *, by: str, xscale: str = "log",
    floor: float | None = None, reference: tuple[str, Sequence[float]] | None = None,
) -> Figure:  # fmt: skip
    """A metric with its interval (columns metric, metric_low, metric_high), a line for each value of the column `by`.

    A panel for each of `tables` (by title) and each x column of `axis` (to its label). `reference`: name, its estimate.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table.get(by, ())))
    colors = dict(zip(names, palette(len(names)), strict=True))
    drawn = [(title, table, x) for title, table in tables.items() for x in axis]
    with panels(3.4, "ABCDEFGHIJ"[: len(drawn)], "y", "lower center", sharey=True) as (figure, axs):
        for axes, (title, table, x) in zip(axs, drawn, strict=True):
            if floor is not None and floor > max(0, table[metric].min() / 20):
                axes.axhline(floor, **FLOOR)
            if reference is not None:
                name, (value, low, high) = reference
                axes.axhspan(low, high, color="0.85", label=name)
                axes.axhline(value, color="0.6", linewidth=0.8)
            for name, one in table.groupby(by, sort=False):
                k, color, ends = names.index(name), colors[name], (one[f"{metric}_low"], one[f"{metric}_high"])
                marker = style.MARKERS[k % len(style.MARKERS)] if len(one) <= 20 else None
                side = 0.03 * (k + 0.5 - len(names) / 2) * (table[x].nunique() <= 8)  # inches: bars hide each other
                shift = axes.transData + ScaledTranslation(side, 0, figure.dpi_scale_trans)
                axes.plot(one[x], one[metric], label=name, color=color, marker=marker)[0].set_transform(shift)
                axes.vlines(one[x], *ends, color=color, alpha=0.35, linewidth=2.5).set_transform(shift)
            axes.set(title=title, xlabel=axis[x], xscale=xscale)
            style.logarithmic(axes, "x" * (xscale == "log"))
            if table[x].dtype.kind == "i":  # steps, levels: a tick at every one
                axes.set_xticks(table[x].unique())
        axs[0].set(ylabel=wrapped([quantity])[0])
    return figure


def distributions(quantities: Mapping[str, tuple[ArrayLike, ArrayLike]], threshold: float) -> Figure:
    """Distribution functions of `quantities`, by name, for real (N,) and generated images (M,): a panel each.

    Shaded: the band in which 90 % of whole curves lie. Dashed, in the last panel: `threshold`.
    """
    with panels(2.6, "ABCD"[: len(quantities)], legend="upper right", sharey=True) as (figure, axs):
        for axes, (name, both) in zip(axs, quantities.items(), strict=True):
            for (side, color), values in zip(SIDES, both, strict=True):
                line, reach = axes.ecdf(values, color=color, label=side), band(np.asarray(values))
                x, y = np.asarray(line.get_xydata())[1:].T  # the first is -inf
                axes.fill_between(x, y - reach, y + reach, step="post", color=color, **AREA)
            axes.set(xlabel=wrapped([name], 40)[0], ylim=(0, 1))
        axs[0].set(ylabel="share of images below")
        axs[-1].axvline(threshold, color=ACCENT, **DASHED)
    return figure
