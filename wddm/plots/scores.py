"""Charts of distances, classes and speeds: what was measured in, a matplotlib `Figure` out.

A distance comes with the ends of its 90 % interval: value, low, high. The floor is what real images score.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from wddm.metrics.intervals import band
from wddm.plots.style import ACCENT, GENERATED, MARKERS, REAL, legend, logarithmic, need, palette, panels

if TYPE_CHECKING:
    import pandas as pd

Curve = tuple[ArrayLike, ArrayLike]  # x (K,), and y (K, 3): value, low, high
Rows = Sequence[Mapping[str, Any]]


def score_chart(scores: Mapping[str, tuple[float, float, float, Sequence[float]]]) -> Figure:
    """Distances by name, each (value, low, high, floor), as multiples of what real images score in their place.

    The floor is (value, low, high) itself.
    """
    need(scores, "no scores", "some", "give those that were computed")
    with panels(0.9 + 0.32 * len(scores)) as (figure, (axes,)):
        for row, (*score, floor) in enumerate(scores.values()):
            (value, *span), (_, *real) = np.divide(score, floor[0]), np.divide(floor, floor[0])
            axes.plot(real, [row, row], color=REAL, linewidth=16, alpha=0.35, solid_capstyle="butt")
            axes.plot(span, [row, row], color=GENERATED, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot(value, row, "o", color=GENERATED)
            axes.annotate(f"{score[0]:.3g}", (value, row), (0, 6), textcoords="offset points", ha="center", size=7)
        axes.axvline(1, color=REAL)
        axes.margins(x=0.08)
        logarithmic(axes, "x")
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
    need(values, "no variants", "one or more", "give the values of each")
    with panels(0.8 + 0.25 * len(values)) as (figure, (axes,)):
        if floor is not None:
            axes.axvline(floor, color=REAL, linestyle="--", linewidth=0.8, label="floor: real images")
            legend(figure, "upper right")
        for row, (name, seeds) in enumerate(values.items()):
            at = row + 0.12 * (np.arange(len(seeds)) - (len(seeds) - 1) / 2) * (intervals is not None)
            axes.plot(seeds, at, "o", color=GENERATED, alpha=0.7)
            axes.plot([np.mean(seeds)] * 2, [row - 0.3, row + 0.3], color=GENERATED)
            if intervals is not None:
                axes.hlines(at, *np.transpose(intervals[name]), color=GENERATED, linewidth=2, alpha=0.3)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set(xlabel=quantity)
        logarithmic(axes, "x")
    return figure


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker of its own for each name."""
    names = list(dict.fromkeys(names))
    colors = zip(names, palette(len(names)), strict=True)
    return {name: {"color": color, "marker": MARKERS[k % len(MARKERS)]} for k, (name, color) in enumerate(colors)}


@contextmanager
def _row(
    count: int, height: float, quantity: str, floor: float | None = None, log: str = "xy", columns: int = 4
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Panels in a row, of one `quantity`, logarithmic, one legend beneath, and a dashed line where the floor is."""
    with panels(height, "ABCDEF"[:count], sharey=True) as (figure, axs):
        for axes in axs if floor is not None else ():
            axes.axhline(floor, color=REAL, linestyle="--", linewidth=0.8, label="floor: real images")
        yield figure, axs
        for axes in axs:
            logarithmic(axes, log)
        axs[0].set(ylabel=quantity)
        legend(figure, "lower center", columns)


def _curves(
    axes: Axes, curves: Mapping[str, Curve], styles: Mapping[str, dict[str, Any]], shaded: bool = False
) -> None:
    """Lines by name, and as bars or as shaded bands where the low and the high ends of their values are."""
    for name, (x, values) in curves.items():
        y, wanted = np.asarray(values, float), (np.size(x), 3)
        need(y.shape == wanted, f"{name} {y.shape}", wanted, "pass value, low and high of each")
        axes.plot(x, y[:, 0], label=name, **styles[name])
        if shaded:
            axes.fill_between(x, y[:, 1], y[:, 2], color=styles[name]["color"], alpha=0.2, linewidth=0)
        else:
            axes.vlines(x, y[:, 1], y[:, 2], color=styles[name]["color"], linewidth=2.5, alpha=0.35)


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
    styles = _styles(name for lines in curves.values() for name in lines)
    need(styles, "no curves", "one or more", "give what was measured")
    with _row(len(curves), 3.4, quantity, floor, log="y") as (figure, axs):
        for axes, (title, lines) in zip(axs, curves.items(), strict=True):
            if reference is not None:
                name, (value, low, high) = reference
                axes.axhspan(low, high, color="0.85", label=name)
                axes.axhline(value, color="0.6", linewidth=0.8)
            _curves(axes, lines, styles)
            axes.set(title=title, xlabel=xlabel, xscale="log")
            axes.set_xticks(np.unique(np.concatenate([np.asarray(x) for x, _ in lines.values()])))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    return figure


def learning_curves(
    curves: Mapping[str, Curve], quantity: str, floor: float | None = None, *, seconds: bool = False
) -> Figure:
    """A quantity over images seen, a line per variant at the mean over its seeds, shaded from lowest to highest.

    `curves`: by variant, images seen (K,), or seconds, and values (S, K), one row per seed; both axes logarithmic.
    """
    lines: dict[str, Curve] = {}
    for name, (seen, seeds) in curves.items():
        values, x = np.asarray(seeds, float), np.asarray(seen) / (1 if seconds else 1000)
        need(values.shape[1:] == x.shape, f"{name} {values.shape}", f"(seeds, {len(x)})", "pass a row per seed")
        lines[f"{name} ({len(values)})"] = x, np.stack([values.mean(0), values.min(0), values.max(0)], 1)
    columns = 1 if max(map(len, curves)) > 40 else 2
    styles = {name: style | {"marker": ".", "linewidth": 1} for name, style in _styles(lines).items()}
    with _row(1, 3.4 + 0.2 * len(curves) * (columns == 1), quantity, floor, columns=columns) as (figure, (axes,)):
        _curves(axes, lines, styles, shaded=True)
        axes.set(xlabel="seconds of training" if seconds else "images seen (thousands)")
    return figure


def trade_off(
    points: Mapping[str, Curve], fronts: Mapping[str, ArrayLike], quantity: str, floor: float | None = None
) -> Figure:
    """A distance against costs: a panel by cost, a point by setting, its solver by name; the Pareto front as a line.

    `points`: by solver, costs (K, costs) and distances (K,). `fronts`: by cost, the settings (n, 2) on the front.
    """
    styles = _styles(points)
    with _row(len(fronts), 3.2, quantity, floor) as (figure, axs):
        for column, (axes, (cost, front)) in enumerate(zip(axs, fronts.items(), strict=True)):
            x, y = np.array(sorted(np.asarray(front).tolist())).T
            axes.step(x, y, "0.2", where="post", linewidth=0.8, label="Pareto front")
            for name, (costs, values) in points.items():
                wanted = (np.size(values), len(fronts))
                need(np.shape(costs) == wanted, f"{name} {np.shape(costs)}", wanted, "pass a cost per panel")
                axes.plot(np.asarray(costs)[:, column], values, linestyle="none", label=name, **styles[name])
            axes.set(xlabel=cost)
    return figure


def class_counts(names: Sequence[str], counts_generated: ArrayLike, share_real: ArrayLike) -> Figure:
    """Predicted classes (K,) of generated images, and what the real share (K,) and chance would give."""
    counts, share = np.asarray(counts_generated), np.asarray(share_real) / np.sum(share_real)
    shapes = {counts.shape, share.shape, (len(names),)}
    need(len(shapes) == 1, f"shapes {shapes}", f"({len(names)},)", "pass one number per name")
    expected, spread = share * counts.sum(), 1.645 * np.sqrt(share * (1 - share) * counts.sum())
    with panels(0.7 + 0.2 * len(names)) as (figure, (axes,)):
        axes.barh(names, counts, color=GENERATED, alpha=0.6, label="generated")
        axes.errorbar(expected, names, xerr=spread, fmt="|k", elinewidth=0.8, label="expected, 90 %")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="images")
        legend(figure, "upper right", 2)
    return figure


def _shares(axes: Axes, values: np.ndarray, color: str, name: str) -> None:
    """The share of values (N,) below, over the values, and the band in which 90 % of whole curves lie."""
    line, reach = axes.ecdf(values, color=color, label=name), band(values)
    x, y = line.get_xydata()[1:].T  # the first is -inf
    axes.fill_between(x, y - reach, y + reach, step="post", color=color, alpha=0.2, linewidth=0)


def confidence(real: ArrayLike, generated: ArrayLike, threshold: float) -> Figure:
    """Distribution of a classifier's top-class probability, real (N,) and generated (M,), and a threshold."""
    with panels(2.6) as (figure, (axes,)):
        for name, sample, color in (("real", real, REAL), ("generated", generated, GENERATED)):
            values = np.asarray(sample)
            need(values.ndim == 1 and values.size, f"{name} {values.shape}", "(N,)", "pass a probability per image")
            _shares(axes, values, color, f"{name}, {np.mean(values < threshold):.1%} below {threshold:g}")
        axes.axvline(threshold, color=ACCENT, linestyle="--", linewidth=0.8)
        axes.set(xlabel="top-class probability", ylabel="share of images below", xlim=(0, 1), ylim=(0, 1))
        legend(figure, "upper right", 2)
    return figure


def nearest_distances(real: ArrayLike, generated: ArrayLike) -> Figure:
    """Share of real (N,) and generated (M,) images whose nearest training image is nearer, over distance and ratio.

    Each (n, 2): distances to the nearest and the second nearest. Dashed: a third, from where on it is a copy.
    """
    with panels(2.4, "AB", sharey=True) as (figure, (distance, ratio)):
        for name, sample, color in (("real", real, REAL), ("generated", generated, GENERATED)):
            values = np.asarray(sample, float)
            fits = values.ndim == 2 and values.shape[1] == 2 and len(values)
            need(fits, f"{name} {values.shape}", "(n, 2)", "pass the two nearest")
            nearest, second = values.T
            _shares(distance, nearest, color, name)
            _shares(ratio, np.divide(nearest, second, where=second > 0, out=np.zeros(len(values))), color, name)
        ratio.axvline(1 / 3, color=ACCENT, linestyle="--", linewidth=0.8)
        distance.set(xlabel="distance to the nearest training image\n(root mean square, pixels 0 to 1)")
        distance.set(ylabel="share of images below", xlim=(0, None), ylim=(0, 1))
        ratio.set(xlabel="distance to the nearest / to the second nearest", xlim=(0, 1))
        distance.legend(loc="upper left")
    return figure


def _table(rows: Rows) -> tuple["pd.DataFrame", dict[str, Any]]:
    """Rows with their `label`, "dataset, kind", and its colours: a hue per data set, a lighter shade for the second."""
    import pandas as pd

    table = pd.DataFrame(rows).assign(label=lambda table: table.dataset + ", " + table.kind)
    hues, shades = (pd.factorize(table[name])[0] for name in ("dataset", "kind"))
    return table, dict(zip(table.label, colormaps["Paired"]((2 * hues + 1 - shades) % 12), strict=True))


def speedup_against_flops(rows: Rows) -> Figure:
    """Measured speed-up over the ratio of FLOPs, a panel for each kind of work, bars spanning 90 % intervals.

    `rows`: dataset, kind, over, work, flop_ratio, speedup, low, high. A colour per data set and network, a shape per
    pixel network that the wavelet one is compared with; on the line, time goes as FLOPs do.
    """
    rows = [row for row in rows if row["speedup"] is not None]
    need(rows, "no measured speed-ups", "one or more", "raise max_step_seconds")
    table, colors = _table(rows)
    works, markers = table.work.unique(), dict(zip(table.over.unique(), MARKERS, strict=False))
    drawn = table[["flop_ratio", "low", "high"]].to_numpy(float)
    ends = 0.8 * min(1, drawn.min()), 1.25 * max(2, drawn.max())
    with _row(len(works), 3.4, "speed on wavelets / on pixels", columns=3) as (figure, axs):
        for axes, work in zip(axs, works, strict=True):
            for row in table[table.work == work].itertuples():
                axes.vlines(row.flop_ratio, row.low, row.high, color=colors[row.label], linewidth=0.8)
                axes.plot(row.flop_ratio, row.speedup, markers[row.over], color=colors[row.label])
            axes.axline((1, 1), (2, 2), color=REAL, linestyle="--", linewidth=0.8, zorder=0)
            axes.set(title=work.capitalize(), xlabel="FLOPs on pixels / on wavelets", aspect="equal")
            axes.set(xlim=ends, ylim=ends)
        for name, color in colors.items():
            axs[0].plot([], [], "o", color=color, label=name)
        for over, marker in markers.items():
            axs[0].plot([], [], marker, color=REAL, label=f"over {over}")
    return figure


def rates_by_level(rows: Rows) -> Figure:
    """Images a second of the presets at each level, a panel for each kind of work, bars spanning quartiles.

    `rows`: dataset, kind, level, network, and {work}_images_per_s with _q1 and _q3, None where it was not run.
    """
    table, colors = _table([row for row in rows if row["network"] in ("wavelets", "pixels, preset")])
    works = {"Training": "training_images_per_s", "Sampling": "sampling_images_per_s"}
    measured = table[[*works.values()]].notna().any(axis=None)
    need(measured, "no measured speeds", "one or more", "raise max_step_seconds")
    styles = {label: {"color": color, "marker": "o"} for label, color in colors.items()}
    with _row(2, 3.0, "images/s", log="y", columns=3) as (figure, axs):
        for axes, (work, rate) in zip(axs, works.items(), strict=True):
            found = table.dropna(subset=rate).groupby("label", sort=False)
            _curves(
                axes, {label: (ours.level, ours[[rate, f"{rate}_q1", f"{rate}_q3"]]) for label, ours in found}, styles
            )
            axes.set(title=work, xlabel="wavelet level (0: pixels)", xticks=table.level.unique())
    return figure
