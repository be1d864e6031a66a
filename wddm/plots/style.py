"""The house style of all figures: 900 pixels wide, colour-blind safe, grey for real data, blue for generated images.

Importing it costs matplotlib alone; seaborn is imported by the functions that need it, because it takes a second.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter

WIDTH, DPI = 6.0, 150  # inches, dots per inch: 900 pixels
REAL, GENERATED, ACCENT = "0.45", "#0173b2", "#d55e00"
COLORS = [
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
]  # fmt: skip
MARKERS = "osD^vP*Xdph"
ROUND = [1, 2, 5, 10]  # steps of ticks
STYLE: dict[str, Any] = {
    "font.size": 8.2, "axes.titlesize": 8.2, "legend.fontsize": 7.5, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "text.color": "0.15", "axes.labelcolor": "0.15", "xtick.color": "0.15", "ytick.color": "0.15",
    "axes.edgecolor": "0.7", "axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "white",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.92", "xtick.bottom": False, "ytick.left": False,
    "lines.linewidth": 1.2, "lines.markersize": 4,
}  # fmt: skip


@contextmanager
def panels(height: float, layout: str = "A", **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of this `height` (inches) and its panels, in the house style whatever rcParams hold.

    The layout and its options are those of matplotlib's subplot_mosaic.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        yield figure, list(figure.subplot_mosaic(layout, **options).values())
        for axes in figure.axes:  # ticks are made lazily, from rcParams at that moment: make them now
            axes.tick_params(which="both", labelsize=STYLE["xtick.labelsize"])


def need(condition: object, got: object, wanted: object, remedy: str) -> None:
    """ValueError, in one line, unless the condition holds."""
    if not condition:
        raise ValueError(f"got {got}, wanted {wanted}: {remedy}")


def palette(count: int) -> list[Any]:
    """A colour for each of `count` curves; bands, 16 or more, get a hue per last split and shades for the earlier."""
    if count <= len(COLORS):
        return COLORS[:count]
    import seaborn as sns  # takes a second

    if count % 4:
        return sns.color_palette("husl", count)
    shades = count // 4
    return [color for hue in COLORS[:4] for color in sns.light_palette(hue, shades + 2, reverse=True)[:shades]]


def ticks(low: float, high: float) -> Locator:
    """Round numbers on a logarithmic axis, neither one nor twenty of them."""
    if high < 8 * low:
        return MaxNLocator(4, steps=ROUND)
    return LogLocator(subs=(1, 2, 5) if high < 40 * low else (1, 3) if high < 300 * low else (1,))


def logarithmic(axes: Axes, names: str = "y") -> None:
    """Make the axes named, "x", "y" or "xy", logarithmic; one under four decades is labelled 0.1, not as a power."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = axis.get_view_interval()
        axis.set_major_locator(ticks(low, high))
        axis.set_minor_formatter(NullFormatter())
        if high < 1e4 * low:
            axis.set_major_formatter("{x:g}")


def legend(figure: Figure, where: str = "right center", columns: int = 1) -> None:
    """One legend beside, over or under all panels; what several panels name alike is in it once."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        named |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if own := axes.get_legend():
            own.remove()
    figure.legend(named.values(), named.keys(), loc=f"outside {where}", ncols=columns)
