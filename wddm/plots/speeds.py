"""Figures of speed: rows of efficiency.py in, a matplotlib `Figure` out."""

from collections.abc import Mapping, Sequence
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter

from wddm.plots.mosaics import need, panels
from wddm.plots.verdicts import REAL, log_axis

Rows = Sequence[Mapping[str, Any]]
MARKERS = "osD^v"


def speedup_against_flops(rows: Rows) -> Figure:
    """Measured speed-up over the ratio of FLOPs, a panel for each kind of work, bars spanning 90 % intervals.

    `rows`: dataset, kind, over, work, flop_ratio, speedup, low, high. A colour per data set and network, a shape per
    pixel network that the wavelet one is compared with; on the line, time goes as FLOPs do.
    """
    rows = [row for row in rows if row["speedup"] is not None]
    need(bool(rows), "no measured speed-ups", "one or more", "raise max_step_seconds")
    works, colors, markers = _keys(rows, "work"), _colors(rows), dict(zip(_keys(rows, "over"), MARKERS, strict=False))
    with panels(3.4, "AB"[: len(works)], sharex=True, sharey=True) as (figure, axs):
        for axes, work in zip(axs, works, strict=True):
            for row in (row for row in rows if row["work"] == work):
                color = colors[row["dataset"], row["kind"]]
                axes.vlines(row["flop_ratio"], row["low"], row["high"], color=color, linewidth=0.8)
                axes.plot(row["flop_ratio"], row["speedup"], markers[row["over"]], color=color, markersize=4)
            axes.set(title=work.capitalize(), xlabel="FLOPs on pixels / on wavelets")
        axs[0].set(ylabel="speed on wavelets / on pixels")
        _square(axs)
        handles = [Line2D([], [], marker="o", ls="", color=c, label=f"{d}, {k}") for (d, k), c in colors.items()]
        handles += [Line2D([], [], marker=m, ls="", color=REAL, label=f"over {over}") for over, m in markers.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def rates_by_level(rows: Rows) -> Figure:
    """Images a second of the presets at each level, a panel for each kind of work, bars spanning quartiles.

    `rows`: dataset, kind, level, network, and {work}_images_per_s with _q1 and _q3, None where it was not run.
    """
    presets = [row for row in rows if row["network"] in ("wavelets", "pixels, preset")]
    works = ("training", "sampling")
    need(
        any(row[f"{work}_images_per_s"] for row in presets for work in works),
        "no measured speeds", "one or more", "raise max_step_seconds",
    )  # fmt: skip
    with panels(3.0, "AB") as (figure, axs):
        for axes, work in zip(axs, works, strict=True):
            for (dataset, kind), color in _colors(presets).items():
                ours = [row for row in presets if (row["dataset"], row["kind"]) == (dataset, kind)]
                ours = [row for row in ours if row[f"{work}_images_per_s"] is not None]
                value, low, high = ([row[f"{work}_images_per_s{end}"] for row in ours] for end in ("", "_q1", "_q3"))
                levels = [row["level"] for row in ours]
                axes.plot(levels, value, "o-", color=color, markersize=4, label=f"{dataset}, {kind}")
                axes.vlines(levels, low, high, color=color, linewidth=3, alpha=0.4)
            log_axis(axes)
            axes.set(title=work.capitalize(), xlabel="wavelet level (0: pixels)")
            axes.set_xticks(sorted({row["level"] for row in presets}))
        axs[0].set(ylabel="images/s")
        figure.legend(*axs[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _keys(rows: Rows, name: str) -> list:
    return list(dict.fromkeys(row[name] for row in rows))


def _colors(rows: Rows) -> dict[tuple[str, str], Any]:
    """A hue per data set, its lighter shade for the second network."""
    palette = sns.color_palette("Paired")
    datasets, kinds = _keys(rows, "dataset"), _keys(rows, "kind")
    found = dict.fromkeys((row["dataset"], row["kind"]) for row in rows)
    return {key: palette[(2 * datasets.index(key[0]) + 1 - kinds.index(key[1])) % len(palette)] for key in found}


def _square(axs: Sequence[Axes]) -> None:
    """Both axes logarithmic, from the same low to the same high end, with the diagonal."""
    for axes in axs:
        axes.set(xscale="log", yscale="log")  # first: linear limits may lie below zero
    low = min(1, *axs[0].get_xlim(), *axs[0].get_ylim()) * 0.9
    high = max(2, *axs[0].get_xlim(), *axs[0].get_ylim()) * 1.1
    at = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    for axes in axs:
        axes.plot([low, high], [low, high], color=REAL, linestyle="--", linewidth=0.8, zorder=0)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(at))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
