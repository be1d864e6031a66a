"""Figures that set side by side: settings of one checkpoint, runs of a sweep. Arrays in, a matplotlib `Figure` out.

Distances are drawn with the ends of their intervals, (K, 3): value, low, high. Grey is real data; bars span 90 %.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import ArrayLike

from wddm.plots.mosaics import need, panels
from wddm.plots.verdicts import GENERATED, REAL, log_axis, ticks

MARKERS = "osD^vP*Xdph"
Curve = tuple[ArrayLike, ArrayLike]  # x (K,), and y (K, 3): value, low, high


def _style(names: Sequence[str]) -> dict[str, dict]:
    """A colour and a marker of its own for each name."""
    colors = sns.color_palette("colorblind" if len(names) <= 10 else "husl", len(names))
    return {
        name: {"color": color, "marker": MARKERS[k % len(MARKERS)], "markersize": 4}
        for k, (name, color) in enumerate(zip(names, colors, strict=True))
    }


def _levels(axes: Axes, floor: float | None, reference: tuple[str, Sequence[float]] | None) -> None:
    """The floor, dashed, and the interval of the reference, shaded."""
    if floor is not None:
        axes.axhline(floor, color=REAL, linestyle="--", linewidth=0.8, label="floor: real images")
    if reference is not None:
        name, (value, low, high) = reference
        axes.axhspan(low, high, color="0.85", label=name)
        axes.axhline(value, color="0.6", linewidth=0.8)


def _legend_below(figure: Figure, axs: Sequence[Axes], columns: int = 4) -> None:
    """One legend under all panels, without what several of them name alike."""
    named = {label: handle for axes in axs for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=columns)


def quality_curves(
    curves: Mapping[str, Mapping[str, Curve]],
    quantity: str,
    xlabel: str,
    floor: float | None = None,
    reference: tuple[str, Sequence[float]] | None = None,
) -> Figure:
    """A distance with its intervals over steps, say: a panel by title, a line by name; both axes logarithmic.

    `reference`: name, and value, low and high, of what the lines are compared with.
    """
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    need(bool(names), "no curves", "one or more", "give what was measured")
    style = _style(names)
    with panels(3.4, "ABCDEF"[: len(curves)], sharey=True) as (figure, axs):
        for axes, (title, lines) in zip(axs, curves.items(), strict=True):
            _levels(axes, floor, reference)
            for name, (x, y) in lines.items():
                y = np.asarray(y, float)
                need(y.shape == (len(x), 3), f"{name} {y.shape}", (len(x), 3), "pass value, low and high of each")
                axes.plot(x, y[:, 0], label=name, **style[name])
                axes.vlines(x, y[:, 1], y[:, 2], color=style[name]["color"], linewidth=2.5, alpha=0.35)
            axes.set(title=title, xlabel=xlabel)
            log_axis(axes, "x"), log_axis(axes)
            at = sorted({float(one) for x, _ in lines.values() for one in x})
            axes.set_xticks(at, [f"{one:g}" for one in at])
            axes.minorticks_off()
        axs[0].set(ylabel=quantity)
        _legend_below(figure, axs)
    return figure


def trade_off(
    points: Mapping[str, Curve], fronts: Mapping[str, ArrayLike], quantity: str, floor: float | None = None
) -> Figure:
    """A distance against costs: a panel by cost, a point by setting, its solver by name; the Pareto front as a line.

    `points`: by solver, costs (K, costs) and distances (K,). `fronts`: by cost, the settings (n, 2) on the front.
    """
    style = _style(list(points))
    with panels(3.2, "ABCDEF"[: len(fronts)], sharey=True) as (figure, axs):
        for column, (axes, (cost, front)) in enumerate(zip(axs, fronts.items(), strict=True)):
            _levels(axes, floor, None)
            front = np.asarray(front, float)
            axes.step(*front[np.argsort(front[:, 0])].T, where="post", color="0.2", linewidth=0.8, label="Pareto front")
            for name, (costs, values) in points.items():
                wanted = (len(values), len(fronts))
                need(np.shape(costs) == wanted, f"{name} {np.shape(costs)}", wanted, "pass a cost per panel")
                axes.plot(np.asarray(costs)[:, column], values, linestyle="none", label=name, **style[name])
            axes.set(xlabel=cost)
            log_axis(axes, "x"), log_axis(axes)
        axs[0].set(ylabel=quantity)
        _legend_below(figure, axs)
    return figure


def heat_map(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    quantity: str,
    ylabel: str = "",
    xlabel: str = "",
) -> Figure:
    """Numbers (rows, columns) as a table of shades on a logarithmic scale, dark is more; NaN is left white."""
    values, wanted = np.asarray(values, float), (len(rows), len(columns))
    need(values.shape == wanted, f"values {values.shape}", wanted, "pass a name per row and column")
    seen = values[np.isfinite(values) & (values > 0)]
    need(bool(seen.size), "no positive numbers", "some", "give what was measured")
    norm = LogNorm(seen.min(), max(seen.max(), 1.01 * seen.min()))
    with panels(max(1.8, 1.0 + 0.3 * len(rows))) as (figure, (axes,)):
        image = axes.imshow(values, "crest", norm, aspect="auto", interpolation="nearest")
        for (y, x), value in np.ndenumerate(values if len(columns) <= 16 else np.empty((0, 0))):
            if np.isfinite(value):
                ink = "white" if norm(value) > 0.4 else "0.15"
                short = f"{value:#.2g}".rstrip(".") if value < 99.5 else EngFormatter(places=0, sep="")(value)  # 8k
                axes.text(x, y, short, size=6, color=ink, ha="center", va="center")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xticks(range(len(columns)), columns, rotation=90 * (max(map(len, columns)) > 4), size=6.5)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(visible=False)
        bar = figure.colorbar(image, label=quantity, ticks=ticks(norm.vmin, norm.vmax), format="%g")
        bar.minorticks_off(), bar.outline.set_visible(False)
    return figure


def learning_curves(
    curves: Mapping[str, Curve], quantity: str, floor: float | None = None, *, seconds: bool = False
) -> Figure:
    """A quantity over images seen, a line per variant at the mean over its seeds, shaded from least to most.

    `curves`: by variant, images seen (K,), or seconds, and values (S, K), one row per seed; both axes logarithmic.
    """
    style, columns = _style(list(curves)), 1 if max(map(len, curves)) > 40 else 2
    with panels(3.4 + 0.2 * len(curves) * (columns == 1)) as (figure, (axes,)):
        _levels(axes, floor, None)
        for name, (seen, values) in curves.items():
            values, x = np.asarray(values, float), np.asarray(seen) / (1 if seconds else 1000)
            fits = values.ndim == 2 and values.shape[1] == len(x)
            need(fits, f"{name} {values.shape}", f"(seeds, {len(x)})", "pass a row per seed")
            color, label = style[name]["color"], f"{name} ({len(values)})"
            axes.plot(x, values.mean(0), ".-", color=color, linewidth=1, markersize=3, label=label)
            axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="seconds of training" if seconds else "images seen (thousands)", ylabel=quantity)
        log_axis(axes, "x"), log_axis(axes)
        figure.legend(loc="outside lower center", ncols=columns)
    return figure


def variants(
    values: Mapping[str, Sequence[float]],
    quantity: str,
    floor: float | None = None,
    intervals: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> Figure:
    """A row per variant with a dot per seed and a line at their mean, logarithmic; dashed where the floor is.

    `intervals`: by variant, (low, high) of each seed's number.
    """
    need(bool(values), "no variants", "one or more", "give the values of each")
    with panels(0.8 + 0.25 * len(values)) as (figure, (axes,)):
        for row, (name, seeds) in enumerate(values.items()):
            at = row + 0.12 * (np.arange(len(seeds)) - (len(seeds) - 1) / 2) * (intervals is not None)
            axes.plot(seeds, at, "o", color=GENERATED, markersize=4, alpha=0.7)
            axes.plot([np.mean(seeds)] * 2, [row - 0.3, row + 0.3], color=GENERATED)
            if intervals is not None:
                axes.hlines(at, *np.transpose(intervals[name]), color=GENERATED, linewidth=2, alpha=0.3)
        if floor is not None:
            axes.axvline(floor, color=REAL, linestyle="--", linewidth=0.8, label="floor: real images")
            figure.legend(loc="outside upper right")
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set(xlabel=quantity)
        log_axis(axes, "x")
    return figure
