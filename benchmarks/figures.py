"""figures: speeds on wavelets and on pixels, costs over size; rows of another module in, a matplotlib `Figure` out."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.scale import labels, slopes
from wddm.plots.charts import quality_curves
from wddm.plots.style import DASHED, MARKERS, REAL, palette, panels

Rows = Sequence[Mapping[str, Any]]


def speedup_against_flops(rows: Rows) -> Figure:
    """Measured speed-up over the ratio of FLOPs, a panel for each kind of work, bars spanning 90 % intervals.

    `rows`: dataset, kind, over, work, flop_ratio, speedup, low, high. A colour per data set and network, a shape per
    pixel network that the wavelet one is compared with; on the dashed line, time is proportional to FLOPs.
    """
    table = pd.DataFrame(rows).assign(label=lambda table: table.dataset + ", " + table.kind)
    labels, works = table.label.unique(), table.work.unique()
    colors = dict(zip(labels, palette(len(labels)), strict=True))
    markers = dict(zip(table.over.unique(), MARKERS, strict=False))
    measured = table[["flop_ratio", "low", "high"]]
    ends = 0.8 * min(1, measured.min(axis=None)), 1.25 * max(2, measured.max(axis=None))
    with panels(3.4, "ABCDEF"[: len(works)], "xy", "lower center", sharey=True) as (figure, axs):
        for axes, work in zip(axs, works, strict=True):
            for row in table[table.work == work].itertuples():
                axes.vlines(row.flop_ratio, row.low, row.high, color=colors[row.label], linewidth=0.8)
                axes.plot(row.flop_ratio, row.speedup, markers[row.over], color=colors[row.label])
            axes.axline((1, 1), (2, 2), color=REAL, zorder=0, **DASHED)
            axes.set(title=work.capitalize(), xlabel="FLOPs on pixels / on wavelets", aspect="equal")
            axes.set(xlim=ends, ylim=ends)
        for name, color in colors.items():
            axs[0].plot([], [], "o", color=color, label=name)
        for over, marker in markers.items():
            axs[0].plot([], [], marker, color=REAL, label=f"over {over}")
        axs[0].set(ylabel="speed on wavelets / on pixels")
    return figure


def rates_by_level(rows: Rows) -> Figure:
    """Images a second of the presets at each level, a panel for each kind of work, bars spanning quartiles.

    `rows`: dataset, kind, level, network, and {work}_images_per_s with _q1 and _q3, None where it was not run.
    """
    table = pd.DataFrame([row for row in rows if row["network"] in ("wavelets", "pixels, preset")])
    table["preset"], tables = table.dataset + ", " + table.kind, {}
    names = {"": "rate", "_q1": "rate_low", "_q3": "rate_high"}
    for work in ("training", "sampling"):
        measured = table.rename(columns={f"{work}_images_per_s{end}": name for end, name in names.items()})
        tables[work.capitalize()] = measured.dropna(subset=list(names.values()))
    axis = {"level": "wavelet level (0: pixels)"}
    return quality_curves(tables, "rate", "images/s", axis, by="preset", xscale="linear")


def scaling(table: pd.DataFrame) -> Figure:
    """Seconds of CPU over the number of images, and over their pixels, a line per work with both slopes in the legend.

    `table` is what `scale.study` makes. Dashed: linear growth.
    """
    measured = table.dropna(subset="seconds").assign(seconds=lambda rows: rows.seconds.clip(lower=0.01))
    names = labels(slopes(table))
    with panels(4.2, "AB", "xy", "lower center", sharey=True) as (figure, axs):
        for axes, over in zip(axs, ("images", "pixels"), strict=True):
            part = measured[measured.over == over]
            for (work, name), color, marker in zip(names.items(), palette(len(names)), MARKERS, strict=False):
                points = part[part.work == work]
                axes.plot(points[over], points.seconds, f"{marker}-", color=color, label=name)
            start = part[over].min(), part.seconds.min()
            axes.axline(start, (10 * start[0], 10 * start[1]), color=REAL, zorder=0, **DASHED)
            axes.set(xlabel="images" if over == "images" else "pixels of an image")
        axs[0].set(ylabel="seconds of CPU, one thread")
    return figure
