"""Charts of distances, classes and speeds: what was measured in, a matplotlib `Figure` out.

A distance comes with the ends of its 90 % interval: value, low, high. The floor is what real images score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from wddm.metrics.intervals import Estimate, band
from wddm.plots.style import ACCENT, DASHED, GENERATED, MARKERS, REAL, SIDES, need, palette, panels, shaped

__all__ = [
    "class_counts", "confidence", "learning_curves", "nearest_distances", "quality_curves", "rates_by_level",
    "score_chart", "speedup_against_flops", "trade_off", "variants",
]  # fmt: skip

Curve = tuple[ArrayLike, ArrayLike]  # x (K,), and y (K, 3): value, low, high
Rows = Sequence[Mapping[str, Any]]
ROW = "ABCDEF"  # of panels
FLOOR = {"color": REAL, "label": "floor: real images", **DASHED}


def score_chart(scores: Mapping[str, tuple[Estimate[float], Estimate[float]]]) -> Figure:
    """Distances by name, each with its floor, as multiples of that."""
    need(scores, "no scores", "some", "give those that were computed")
    with panels(0.9 + 0.32 * len(scores), log="x") as (figure, (axes,)):
        for row, (score, floor) in enumerate(scores.values()):
            for (_, *ends), color, width in ((floor, REAL, 16), (score, GENERATED, 5)):
                span = np.divide(ends, floor.value)
                axes.plot(span, [row, row], color=color, linewidth=width, alpha=0.35, solid_capstyle="butt")
            at = score.value / floor.value, row
            axes.plot(*at, "o", color=GENERATED)
            axes.annotate(f"{score.value:.3g}", at, (0, 6), textcoords="offset points", ha="center", size=7)
        axes.axvline(1, color=REAL)
        axes.margins(x=0.08)
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set(ylim=(len(scores) - 0.4, -0.7), xlabel="distance to the real images, as a multiple of the floor (1)")
        axes.grid(axis="y", visible=False)
    return figure


def variants(
    values: Mapping[str, Sequence[float]], quantity: str, floor: float | None = None,
    intervals: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> Figure:  # fmt: skip
    """A row per variant with a dot per seed and a line at their mean, logarithmic; dashed where the floor is.

    `intervals`: by variant, (low, high) of each seed's number.
    """
    with panels(0.8 + 0.25 * len(values), log="x", legend="upper right") as (figure, (axes,)):
        for row, (name, seeds) in enumerate(values.items()):
            at = row + 0.12 * (np.arange(len(seeds)) - (len(seeds) - 1) / 2)
            axes.plot(seeds, at, "o", color=GENERATED, alpha=0.7)
            axes.plot([np.mean(seeds)] * 2, [row - 0.3, row + 0.3], color=GENERATED)
            if intervals is not None:
                axes.hlines(at, *np.transpose(intervals[name]), color=GENERATED, linewidth=2, alpha=0.3)
        if floor is not None:
            axes.axvline(floor, **FLOOR)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set(xlabel=quantity)
    return figure


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker of its own for each name."""
    colors = zip(names, palette(len(names)), strict=True)
    return {name: {"color": color, "marker": MARKERS[k % len(MARKERS)]} for k, (name, color) in enumerate(colors)}


def quality_curves(
    curves: Mapping[str, Mapping[str, Curve]], quantity: str, xlabel: str, floor: float | None = None,
    reference: tuple[str, Estimate[float]] | None = None, *, xscale: str = "log", shaded: bool = False,
) -> Figure:  # fmt: skip
    """A quantity with its intervals over steps, say: a panel by title, a line by name, a tick at every x.

    `reference`: name and distance of what the lines are compared with. Many x are better `shaded` than given bars.
    """
    styles = _styles(list(dict.fromkeys(name for lines in curves.values() for name in lines)))
    need(styles, "no curves", "one or more", "give what was measured")
    look: dict[str, Any] = {"marker": ".", "linewidth": 1} if shaded else {}
    with panels(3.4, ROW[: len(curves)], "xy" if shaded else "y", "lower center", sharey=True) as (figure, axs):
        for axes, (title, lines) in zip(axs, curves.items(), strict=True):
            if floor is not None:
                axes.axhline(floor, **FLOOR)
            if reference is not None:
                name, (value, low, high) = reference
                axes.axhspan(low, high, color="0.85", label=name)
                axes.axhline(value, color="0.6", linewidth=0.8)
            for name, (x, values) in lines.items():
                y = shaped(name, values, (np.size(x), 3), "pass value, low and high of each").astype(float)
                axes.plot(x, y[:, 0], label=name, **styles[name] | look)
                if shaded:
                    axes.fill_between(x, y[:, 1], y[:, 2], color=styles[name]["color"], alpha=0.2, linewidth=0)
                else:
                    axes.vlines(x, y[:, 1], y[:, 2], color=styles[name]["color"], alpha=0.35, linewidth=2.5)
            axes.set(title=title, xlabel=xlabel, xscale=xscale)
            if not shaded:
                axes.set_xticks(np.unique(np.concatenate([[], *(np.asarray(x) for x, _ in lines.values())])))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
        axs[0].set(ylabel=quantity)
    return figure


def learning_curves(
    curves: Mapping[str, Curve], quantity: str, floor: float | None = None, *, seconds: bool = False
) -> Figure:
    """A quantity over images seen, a line per variant at the mean over its seeds, shaded from lowest to highest.

    `curves`: by variant, images seen (K,), or seconds, and values (S, K), one row per seed; both axes logarithmic.
    """
    lines: dict[str, Curve] = {}
    for name, (seen, seeds) in curves.items():
        values = shaped(name, seeds, ("seeds", np.size(seen)), "pass a row per seed")
        x = np.asarray(seen) / (1 if seconds else 1000)
        lines[f"{name} ({len(values)})"] = x, np.stack([values.mean(0), values.min(0), values.max(0)], 1)
    xlabel = "seconds of training" if seconds else "images seen (thousands)"
    return quality_curves({"": lines}, quantity, xlabel, floor, shaded=True)


def trade_off(
    points: Mapping[str, Curve], fronts: Mapping[str, ArrayLike], quantity: str, floor: float | None = None
) -> Figure:
    """A distance against costs: a panel by cost, a point by setting, its solver by name; the Pareto front as a line.

    `points`: by solver, costs (K, costs) and distances (K,). `fronts`: by cost, the settings (n, 2) on the front.
    """
    styles = _styles(list(points))
    with panels(3.2, ROW[: len(fronts)], "xy", "lower center", sharey=True) as (figure, axs):
        for column, (axes, (cost, front)) in enumerate(zip(axs, fronts.items(), strict=True)):
            if floor is not None:
                axes.axhline(floor, **FLOOR)
            x, y = np.array(sorted(np.asarray(front).tolist())).T
            axes.step(x, y, "0.2", where="post", linewidth=0.8, label="Pareto front")
            for name, (costs, values) in points.items():
                costs = shaped(name, costs, (np.size(values), len(fronts)), "pass a cost per panel")
                axes.plot(costs[:, column], values, linestyle="none", label=name, **styles[name])
            axes.set(xlabel=cost)
        axs[0].set(ylabel=quantity)
    return figure


def class_counts(names: Sequence[str], counts_generated: ArrayLike, share_real: ArrayLike) -> Figure:
    """Predicted classes (K,) of generated images, and what the real share (K,) and chance would give."""
    counts = shaped("counts", counts_generated, (len(names),), "pass one per name")
    share = shaped("shares", share_real, (len(names),), "pass one per name") / np.sum(share_real)
    expected, spread = share * counts.sum(), 1.645 * np.sqrt(share * (1 - share) * counts.sum())
    with panels(0.7 + 0.2 * len(names), legend="upper right") as (figure, (axes,)):
        axes.barh(names, counts, color=GENERATED, alpha=0.6, label="generated")
        axes.errorbar(expected, names, xerr=spread, fmt="|k", elinewidth=0.8, label="expected, 90 %")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="images")
    return figure


def _shares(axes: Axes, values: np.ndarray, color: str, name: str) -> None:
    """The share of values (N,) below, over the values, and the band in which 90 % of whole curves lie."""
    line, reach = axes.ecdf(values, color=color, label=name), band(values)
    x, y = np.asarray(line.get_xydata())[1:].T  # the first is -inf
    axes.fill_between(x, y - reach, y + reach, step="post", color=color, alpha=0.2, linewidth=0)


def confidence(real: ArrayLike, generated: ArrayLike, threshold: float) -> Figure:
    """Distribution of a classifier's top-class probability, real (N,) and generated (M,), and a threshold."""
    with panels(2.6, legend="upper right") as (figure, (axes,)):
        for (name, color), sample in zip(SIDES, (real, generated), strict=True):
            values = shaped(name, sample, ("N",), "pass a probability per image")
            _shares(axes, values, color, f"{name}, {np.mean(values < threshold):.1%} below {threshold:g}")
        axes.axvline(threshold, color=ACCENT, **DASHED)
        axes.set(xlabel="top-class probability", ylabel="share of images below", xlim=(0, 1), ylim=(0, 1))
    return figure


def nearest_distances(real: ArrayLike, generated: ArrayLike) -> Figure:
    """Share of real (N,) and generated (M,) images whose nearest training image is nearer, over distance and ratio.

    Each (n, 2): distances to the nearest and the second nearest. Dashed: a third, from where on it is a copy.
    """
    with panels(2.4, "AB", sharey=True) as (figure, (distance, ratio)):
        for (name, color), sample in zip(SIDES, (real, generated), strict=True):
            nearest, second = shaped(name, sample, ("n", 2), "pass the two nearest").T
            _shares(distance, nearest, color, name)
            _shares(ratio, np.divide(nearest, second, where=second > 0, out=np.zeros(len(nearest))), color, name)
        ratio.axvline(1 / 3, color=ACCENT, **DASHED)
        distance.set(xlabel="distance to the nearest training image\n(root mean square, pixels 0 to 1)")
        distance.set(ylabel="share of images below", xlim=(0, None), ylim=(0, 1))
        ratio.set(xlabel="distance to the nearest / to the second nearest", xlim=(0, 1))
        distance.legend(loc="upper left")
    return figure


def speedup_against_flops(rows: Rows) -> Figure:
    """Measured speed-up over the ratio of FLOPs, a panel for each kind of work, bars spanning 90 % intervals.

    `rows`: dataset, kind, over, work, flop_ratio, speedup, low, high. A colour per data set and network, a shape per
    pixel network that the wavelet one is compared with; on the line, time goes as FLOPs do.
    """
    import pandas as pd

    table = pd.DataFrame(rows).assign(label=lambda table: table.dataset + ", " + table.kind)
    labels, works = table.label.unique(), table.work.unique()
    colors = dict(zip(labels, palette(len(labels)), strict=True))
    markers = dict(zip(table.over.unique(), MARKERS, strict=False))
    measured = table[["flop_ratio", "low", "high"]]
    ends = 0.8 * min(1, measured.min(axis=None)), 1.25 * max(2, measured.max(axis=None))
    with panels(3.4, ROW[: len(works)], "xy", "lower center", sharey=True) as (figure, axs):
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
    import pandas as pd

    table = pd.DataFrame([row for row in rows if row["network"] in ("wavelets", "pixels, preset")])
    curves: dict[str, dict[str, Curve]] = {}
    for work in ("training", "sampling"):
        columns = [f"{work}_images_per_s{end}" for end in ("", "_q1", "_q3")]
        found = table.dropna(subset=columns).groupby(["dataset", "kind"], sort=False)
        curves[work.capitalize()] = {", ".join(name): (ours.level, ours[columns]) for name, ours in found}
    return quality_curves(curves, "images/s", "wavelet level (0: pixels)", xscale="linear")
