"""Figures of scores: arrays in, a matplotlib `Figure` out. Grey is real data, blue generated; bars span 90 %."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from wddm.metrics.intervals import band
from wddm.plots.mosaics import need, panels

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


def score_chart(scores: Mapping[str, tuple[float, float, float, Sequence[float]]]) -> Figure:
    """Distances by name, each (value, low, high, floor), as multiples of what real images score in their place.

    The floor is (value, low, high) itself.
    """
    need(bool(scores), "no scores", "some", "give those that were computed")
    with panels(0.9 + 0.32 * len(scores)) as (figure, (axes,)):
        for row, (*score, floor) in enumerate(scores.values()):
            (value, *span), (_, *real) = np.divide(score, floor[0]), np.divide(floor, floor[0])
            axes.plot(real, [row, row], color=REAL, linewidth=16, alpha=0.35, solid_capstyle="butt")
            axes.plot(span, [row, row], color=GENERATED, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot(value, row, "o", color=GENERATED)
            axes.annotate(f"{score[0]:.3g}", (value, row), (0, 6), textcoords="offset points", ha="center", size=7)
        axes.axvline(1, color=REAL)
        seen = np.concatenate([line.get_xdata() for line in axes.lines])
        axes.set_xlim(0.8 * seen.min(), 1.25 * seen.max())
        log_axis(axes, "x")
        axes.set_yticks(range(len(scores)), scores)
        axes.set(ylim=(len(scores) - 0.4, -0.7), xlabel="distance to the real images, as a multiple of the floor (1)")
        axes.grid(axis="y", visible=False)
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
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def confidence(real: ArrayLike, generated: ArrayLike, threshold: float) -> Figure:
    """Distribution of a classifier's top-class probability, real (N,) and generated (M,), and a threshold."""
    with panels(2.6) as (figure, (axes,)):
        for name, values, color in (("real", real, REAL), ("generated", generated, GENERATED)):
            fits = np.ndim(values) == 1 and len(values)
            need(fits, f"{name} {np.shape(values)}", "(N,)", "pass a probability per image")
            _shares(axes, values, color, f"{name}, {np.mean(np.less(values, threshold)):.1%} below {threshold:g}")
        axes.axvline(threshold, color=ACCENT, linestyle="--", linewidth=0.8)
        axes.set(xlabel="top-class probability", ylabel="share of images below", xlim=(0, 1), ylim=(0, 1))
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def _shares(axes: Axes, values: ArrayLike, color: str, name: str) -> None:
    """The share of values (N,) below, over the values, and the band in which 90 % of whole curves lie."""
    line, reach = axes.ecdf(values, color=color, label=name), band(values)
    x, y = line.get_xydata()[1:].T  # the first is -inf
    axes.fill_between(x, y - reach, y + reach, step="post", color=color, alpha=0.2, linewidth=0)


def nearest_distances(real: ArrayLike, generated: ArrayLike) -> Figure:
    """Share of real (N,) and generated (M,) images whose nearest training image is nearer, over distance and ratio.

    Each (n, 2): distances to the nearest and the second nearest. Dashed: a third, from where on it is a copy.
    """
    with panels(2.4, "AB", sharey=True) as (figure, (distance, ratio)):
        for name, values, color in (("real", real, REAL), ("generated", generated, GENERATED)):
            values = np.asarray(values)
            fits = values.ndim == 2 and values.shape[1] == 2 and len(values)
            need(fits, f"{name} {values.shape}", "(n, 2)", "pass the two nearest")
            _shares(distance, values[:, 0], color, name)
            _shares(ratio, np.where(values[:, 1] > 0, values[:, 0] / np.maximum(values[:, 1], 1e-300), 0), color, name)
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
