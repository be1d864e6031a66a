"""plots: what is drawn is what was given, at its place, and nothing global changes."""

import sys
from functools import cache
from itertools import pairwise, product
from subprocess import run

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import pywt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from benchmarks import figures
from wddm import plots
from wddm.metrics.intervals import Estimate
from wddm.plots import charts, style
from wddm.wavelets import WaveletCodec

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (10, 8, 6, 1), dtype=np.uint8)
FIVE, TWO = RNG.integers(0, 256, (10, 6, 8, 5), dtype=np.uint8), RNG.integers(0, 256, (10, 6, 8, 2), dtype=np.uint8)
ENERGY, TIMES = np.array([0.25, 0.008, 0.006, 0.001]), np.array([900.0, 500.0, 20.0])
STATES = RNG.normal(size=(3, 12, 4, 4))
STD = {"A": np.array([1, 0.8, 0.5]), "H": np.array([1, 0.6, 0.09])}
ROWS = [
    {"step": k, "images_seen": 500 * k, "loss": 1 / k, "lr": 1e-4 * k, "grad_norm": 2 + k % 3, "band_loss": {"A": 1}}
    for k in range(1, 251)
]


def estimate(value, low=np.nan, high=np.nan):
    return Estimate(*np.broadcast_arrays(np.asarray(value, float), low, high))


KURTOSIS = (
    estimate([0, 2, 9, 40], [-0.1, 1, 5, 30], [0.1, 3, 20, 60]),
    estimate([-1, 0.2, 3, 9], [-2, 0, 2, 8], [0, 1, 4, 10]),
)
CURVE = pd.DataFrame({"steps": [5, 10, 20], "fwd": [0.4, 0.2, 0.1]})
CURVE = CURVE.assign(fwd_low=0.8 * CURVE.fwd, fwd_high=1.3 * CURVE.fwd, seconds=CURVE.steps / 50)
BOTH = pd.concat([CURVE.assign(spacing=spacing) for spacing in ("leading", "trailing")])
SEEDS = pd.DataFrame({"variant": ["published"] * 2 + ["modern"] * 2, "fwd": [0.9, 1.0, 0.02, 0.03]})
KID = "KID, EfficientNet-Lite0 on ImageNet, not Inception (x 1000), to the real images"
FIGURES = {
    "image_grid": lambda: plots.image_grid(RGB, 4, [f"t{k}" for k in range(10)]),
    "training_curves": lambda: plots.training_curves(ROWS),
    "coefficient_bands": lambda: plots.coefficient_bands(STATES[0], list("AHVD")),
    "histograms": lambda: plots.histograms(
        {"A": STATES[:, 0], "H": STATES[:, 1]}, "coefficient", np.linspace(-4, 4, 81), "y"
    ),
    "trajectory": lambda: plots.trajectory(STATES, list("AHVD"), TIMES, RGB[:3]),
    "spectra": lambda: plots.spectra([0.1, 0.2, 0.5], estimate([9, 4, 1]), estimate([9, 5, 3])),
    "beside": lambda: plots.beside("AHVD", *KURTOSIS, "excess kurtosis", "x"),
    "distributions": lambda: plots.distributions(
        {
            "root-mean-square distance to the nearest image": ([1, 2], [0, 1, 2]),
            "over the distance to the second nearest": ([0.5, 0.67], [0, 0.25, 1]),
        },
        1 / 3,
    ),
    "packet_map": lambda: plots.packet_map(estimate(np.arange(1, 17)), 2),
    "neighbours": lambda: plots.neighbours(RGB[:2], RGB[2:6].reshape(2, 2, 8, 8, 3), [[1, 2], [3, 4]]),
    "stacked": lambda: plots.stacked({"10 images": RGB[0], "20 images": RGB[1]}),
    "variants": lambda: plots.variants(SEEDS, "fwd", "distance", 0.01),
    "quality_curves": lambda: plots.quality_curves(
        {"ddim": BOTH, "heun": BOTH[:3]},
        "fwd",
        "FWD",
        {"steps": "steps"},
        by="spacing",
        floor=0.08,
        reference=("ddpm", Estimate(0.15, 0.1, 0.2)),
    ),
    "lines": lambda: plots.lines({"a": ([1, 2], [3, 4]), "b": ([1, 3], [1, 9])}, "steps", "error", "xy", ["b"]),
    "speedup_against_flops": lambda: figures.speedup_against_flops(
        [
            {"dataset": d, "kind": k, "over": o, "work": w, "flop_ratio": 4, "speedup": 3, "low": 2, "high": 5}
            for d, k, o, w in product(["digits", "stl10"], ["unet", "ukan"], ["pixels"], ["training", "sampling"])
        ]
    ),
    "rates_by_level": lambda: figures.rates_by_level(
        [
            {"dataset": "digits", "kind": kind, "level": level, "network": "wavelets" if level else "pixels, preset"}
            | {f"{w}_images_per_s{e}": 9 for w in ("training", "sampling") for e in ("", "_q1", "_q3")}
            for kind, level in product(["unet", "ukan"], range(3))
        ]
    ),
    "scaling": lambda: figures.scaling(
        pd.DataFrame(
            [
                {"work": work, "over": over, "images": n, "pixels": n, "seconds": n / 50, "memory_gib": 0.1}
                for work, over, n in product(["training", "sampling"], ["images", "pixels"], [64, 256, 1024])
            ]
        )
    ),
}
NAMES = [f"level {k}, train_kimg 104, backbone unet, prediction_type v_prediction, widths [128, 256]" for k in range(4)]
LONG = pd.concat([CURVE.assign(variant=name) for name in NAMES])
WIDE = {
    "variants": lambda: plots.variants(LONG, "fwd", "distance", 0.01),
    "quality_curves": lambda: plots.quality_curves({"": LONG}, "fwd", KID, {"steps": "steps"}, by="variant"),
    "lines": lambda: plots.lines({name: ([1, 2], [3, 4]) for name in NAMES}, "x", "y"),
    "stacked": lambda: plots.stacked({name: plots.compose(RGB, 10) for name in NAMES}),
    "trajectory": lambda: plots.trajectory(RNG.normal(size=(3, 20, 3, 4)), NAMES[0].split(", ")[:4], TIMES, FIVE[:3]),
    "scaling": lambda: figures.scaling(
        pd.DataFrame(
            [
                {"work": work, "over": over, "images": n, "pixels": n, "seconds": n / 50, "memory_gib": 0.1}
                for work, over, n in product(["training", "sampling"], ["images", "pixels"], [64, 256, 1024])
            ]
        )
    ),
    "histograms": lambda: plots.histograms(
        {f"Channel {k + 1}": FIVE[..., k] for k in range(5)}, "pixel value", np.arange(0, 257, 4)
    ),
    "one step": lambda: plots.training_curves(ROWS[:1]),
    "long training": lambda: plots.training_curves([row | {"images_seen": 10**6 * row["step"]} for row in ROWS]),
    "short training": lambda: plots.training_curves(ROWS[:2]),
}  # long names, many channels, images that are not square


def canvas(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def cells(figure):
    """The numbers of a table of shades, masked where there is none."""
    return figure.axes[0].collections[0].get_array()


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def pixels(figure):
    """The figure as it is printed, (height, width, 3)."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def agg(figure):
    FigureCanvasAgg(figure)
    return figure


@cache
def drawn_once(name):
    figure = agg((FIGURES | {f"wide {name}": draw for name, draw in WIDE.items()})[name]())
    figure.canvas.draw()
    return figure


def packets(image, level):
    """Energy of each Haar packet of an image (H, W), stacked as by the codec."""
    bands = [image]
    for _ in range(level):
        split = np.array([(a, *details) for a, details in (pywt.dwt2(band, "haar") for band in bands)])
        bands = np.concatenate(split.swapaxes(0, 1))
    return estimate([np.square(band).sum() for band in bands])


def test_import_has_no_effects():
    code = (
        "import matplotlib; before = dict(matplotlib.rcParams); import wddm.plots, sys; "
        "assert dict(matplotlib.rcParams) == before; "
        "assert not {'torch', 'seaborn', 'pandas', 'scipy'} & {*sys.modules}; "
        "assert not [m for m in sys.modules if m.startswith('wddm.') and not m.startswith('wddm.plots')"
        " and m not in ('wddm.metrics', 'wddm.metrics.intervals')]"
    )
    run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_every_figure_is_tested():
    offered = {name for module in (charts, style) for name in module.__all__}
    assert offered <= set(vars(plots))
    assert offered | {"speedup_against_flops", "rates_by_level", "scaling"} == {*FIGURES, "compose", "shown_channels"}


@pytest.mark.parametrize("name", FIGURES)
def test_leaves_no_state_and_ignores_the_callers(name):
    plain = np.asarray(drawn_once(name).canvas.buffer_rgba())[..., :3]
    theirs = {"xtick.labelsize": 30, "grid.color": "red", "lines.linestyle": ":", "image.origin": "lower"}
    with matplotlib.rc_context(theirs):
        before = dict(matplotlib.rcParams)
        figure = FIGURES[name]()
        assert dict(matplotlib.rcParams) == before
        assert plt.get_fignums() == []
        np.testing.assert_array_equal(pixels(agg(figure)), plain)


def written(axes):
    """Everything legible in a panel, ticks outside its view left out."""
    ticks = []
    for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
        low, high = sorted(axis.get_view_interval())
        ticks += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        ticks += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    artists = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]
    return [artist for artist in artists if artist.get_text() and artist.get_visible()]


@pytest.mark.parametrize("name", [*FIGURES, *(f"wide {name}" for name in WIDE)])
def test_nothing_is_cut_off_or_overlaps(name):
    figure = drawn_once(name)
    frame, artists = figure.bbox, [artist for axes in figure.axes for artist in written(axes)]
    artists += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [artist.get_window_extent() for artist in artists]
    for k, (artist, box) in enumerate(zip(artists, boxes, strict=True)):
        assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1, artist
        assert frame.y0 - 1 <= box.y0 and box.y1 <= frame.y1 + 1, artist
        assert not any(box.padded(-2).overlaps(other.padded(-2)) for other in boxes[:k]), artist


@pytest.mark.parametrize("images", [RGB, GREY, FIVE, TWO], ids=["rgb", "grey", "five", "two"])
@pytest.mark.parametrize("gap", [(1, 1), (3, 2), (0, 0)])
def test_compose_puts_image_k_at_its_place(images, gap):
    (_, h, w, _), composed = images.shape, plots.compose(images, 4, gap)
    assert composed.shape == (3 * (h + gap[0]) - gap[0], 4 * (w + gap[1]) - gap[1], 3)
    rest = np.ones(composed.shape[:2], dtype=bool)
    for k, image in enumerate(images):
        y, x = k // 4 * (h + gap[0]), k % 4 * (w + gap[1])
        shown = image[..., :3] if image.shape[-1] >= 3 else image[..., :1]
        np.testing.assert_array_equal(composed[y : y + h, x : x + w], np.broadcast_to(shown, (h, w, 3)))
        rest[y : y + h, x : x + w] = False
    assert (composed[rest] == 255).all()


def test_image_grid_prints_whole_pixels():
    figure = agg(plots.image_grid(RGB, 4))
    drawn, printed = canvas(figure), pixels(figure)
    scale = (drawn.shape[1] - 3 * 3) // (4 * 8)
    assert scale > 1
    for k, image in enumerate(RGB):
        y, x = k // 4 * (8 * scale + 3), k % 4 * (8 * scale + 3)
        enlarged = image.repeat(scale, 0).repeat(scale, 1)
        np.testing.assert_array_equal(drawn[y : y + 8 * scale, x : x + 8 * scale], enlarged)
    np.testing.assert_array_equal(printed, drawn)


def test_image_grid_titles_are_over_their_images():
    figure = plots.image_grid(RGB, 4, [f"t{k}" for k in range(10)])
    height, width = canvas(figure).shape[:2]
    for k, text in enumerate(figure.axes[0].texts):
        x, y = text.get_position()
        assert text.get_text() == f"t{k}"
        assert abs(x - width * (k % 4 + 0.5) / 4) < 3
        assert k // 4 * height / 3 - 20 < y < k // 4 * height / 3 + 30


def test_grids_beside_each_other_are_titled():
    grids = [plots.compose(images, 3) for images in (np.zeros_like(RGB[:9]), np.full_like(RGB[:9], 200))]
    figure = plots.image_grid(grids, 2, ["Real", "Generated"], gap=24)
    drawn = canvas(figure)
    half = drawn.shape[1] // 2
    assert set(np.unique(drawn[:, :half])) == {0, 255} and set(np.unique(drawn[:, half:])) == {200, 255}
    real, generated = figure.axes[0].texts
    assert (real.get_text(), generated.get_text()) == ("Real", "Generated")
    assert real.get_position()[0] < half < generated.get_position()[0]


def test_training_curves_show_the_rows():
    loss, rate, norm = plots.training_curves([row | {"band_loss": {"A": 1.0}} for row in ROWS]).axes  # as logs have it
    seen = np.array([row["images_seen"] for row in ROWS]) / 1000
    for axes, name in ((loss, "loss"), (rate, "lr"), (norm, "grad_norm")):
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), seen)
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), [row[name] for row in ROWS])
    smooth, raw = loss.lines[1].get_ydata(), loss.lines[0].get_ydata()
    np.testing.assert_allclose(smooth[100], raw[98:103].mean())
    np.testing.assert_allclose(smooth[0], raw[:3].mean())
    assert loss.get_yscale() == "log" and "thousands" in loss.get_xlabel()


def test_training_curves_leave_aside_what_else_was_logged():
    """The rows of a log hold dicts too: a loss per part of the times."""
    curves = plots.training_curves([row | {"loss_by_snr": {"low": 0.1}} for row in ROWS]).axes[0].lines[1]
    np.testing.assert_array_equal(curves.get_ydata(), plots.training_curves(ROWS).axes[0].lines[1].get_ydata())


def test_training_curves_take_a_dataframe_and_a_single_row():
    pandas = pytest.importorskip("pandas")
    frame = plots.training_curves(pandas.DataFrame(ROWS)).axes[0].lines[0]
    np.testing.assert_array_equal(frame.get_ydata(), [row["loss"] for row in ROWS])
    assert len(plots.training_curves(ROWS[:1]).axes[0].lines[1].get_ydata()) == 1


def test_coefficient_bands_are_named_and_scaled_singly():
    coefficients = np.concatenate([scale * STATES[0, :3] for scale in (1, 0.1, 0.01, 0)])
    figure = plots.coefficient_bands(coefficients, list("AHVD"))
    wanted = [f"{b}  std {coefficients[3 * k : 3 * k + 3].std():#.2g}" for k, b in enumerate("AHVD")]
    assert texts(figure) == wanted
    side = canvas(figure).shape[0]
    tiles = [canvas(figure)[:, k * (side + 3) : k * (side + 3) + side] for k in range(4)]
    np.testing.assert_array_equal(tiles[1], tiles[0])
    np.testing.assert_array_equal(tiles[2], tiles[0])
    assert np.ptp(tiles[0]) > 150 and set(np.unique(tiles[3])) == {128}  # a band of zeros is mid-grey


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_coefficient_bands_at_every_level(level, channels):
    coefficients = RNG.normal(size=(4**level * channels, 4, 4))
    assert len(texts(plots.coefficient_bands(coefficients, range_labels(4**level)))) == 4**level


def test_of_many_channels_the_first_are_shown_and_captions_say_so():
    five, two = (RNG.normal(size=(4, channels, 3, 4)) for channels in (5, 2))
    for bands, shown in ((five, five[:, :3]), (two, two[:, :1])):
        figure = plots.coefficient_bands(bands.reshape(-1, 3, 4), list("AHVD"))
        wanted = plots.coefficient_bands(shown.reshape(-1, 3, 4), list("AHVD"))
        np.testing.assert_array_equal(canvas(figure), canvas(wanted))
        assert texts(figure)[0] == f"A  std {bands[0].std():#.2g}"
    path = plots.trajectory(five.reshape(1, 20, 3, 4), list("AHVD"), TIMES[:1], FIVE[:1])
    image, side = canvas(path), (canvas(path).shape[0] - 4 * 3) // 5
    np.testing.assert_array_equal(image[:side], FIVE[0, ..., :3].repeat(side // 6, 0).repeat(side // 6, 1))
    near = plots.neighbours(TWO[:1], TWO[None, 1:3], [[1, 2]])
    assert (np.ptp(canvas(near), axis=-1) == 0).all()  # grey
    assert [plots.shown_channels(channels) for channels in (1, 3)] == ["", ""]
    assert plots.shown_channels(5) == " Shown of 5 channels: channels 1 to 3 as RGB."
    assert plots.shown_channels(2) == " Shown of 2 channels: channel 1 as grey."


def test_ticks_of_training_curves_stand_apart_at_any_length():
    for images in (3, 400, 10**5, 10**7):
        figure = agg(plots.training_curves([row | {"images_seen": images * row["step"]} for row in ROWS[:40]]))
        figure.canvas.draw()
        for axes in (figure.axes[0], figure.axes[2]):
            low, high = axes.get_xlim()
            ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = sorted(tick.label1.get_window_extent().padded(5).extents.tolist() for tick in ticks)
            assert len(boxes) > 1 and all(a[2] < b[0] for a, b in pairwise(boxes))


def test_an_axis_with_negative_numbers_is_not_logarithmic():
    axes = plots.variants(SEEDS.assign(kid=SEEDS.fwd - 0.5), "kid", "KID").axes[0]
    assert (axes.get_xscale(), FIGURES["variants"]().axes[0].get_xscale()) == ("linear", "log")


@pytest.mark.parametrize(("highest", "scale"), [(9.0, "linear"), (900.0, "symlog")])
def test_an_interval_that_ends_below_zero_is_drawn_whole(highest, scale):
    table = pd.DataFrame({"steps": [5, 10], "kid": [highest, 2.0], "kid_high": [highest + 3, 5.0], "by": "x"})
    tables = {"a": table.assign(kid_low=table.kid - 6), "b": table.assign(kid_low=1.0)}  # the panels share their axis
    axes = plots.quality_curves(tables, "kid", "KID", {"steps": "steps"}, by="by").axes[0]
    assert axes.get_yscale() == scale and axes.get_ylim()[0] < -4 and axes.get_ylim()[1] > highest + 3


def range_labels(count):
    return [f"b{k}" for k in range(1, count + 1)]


def test_folded_bands_keep_the_number_of_their_cell():
    names = WaveletCodec(level=2, transform="pyramid").bands()
    titles = texts(plots.coefficient_bands(RNG.normal(size=(16, 4, 4)), names))
    assert [title.split()[0] for title in titles] == names and "H1.0" in names


def test_lines_are_the_values_given_and_references_dashed():
    (axes,) = FIGURES["lines"]().axes
    a, b = axes.lines
    np.testing.assert_array_equal(a.get_xydata(), [[1, 3], [2, 4]])
    np.testing.assert_array_equal(b.get_xydata(), [[1, 1], [3, 9]])
    assert (a.get_linestyle(), b.get_linestyle(), axes.get_xscale(), axes.get_yscale()) == ("-", "--", "log", "log")
    bumps = {f"b{k}": ([1, 2], [k, 1]) for k in range(8)}
    *parts, whole = plots.lines({**bumps, "sum": ([1, 2], [28, 8])}, "x", "y", parts=list(bumps)).axes[0].lines
    assert len({to_rgba(line.get_color()) for line in (*parts, whole)}) == 9
    assert all(line.get_linewidth() < whole.get_linewidth() for line in parts)
    (alone,) = plots.lines({"a": ([2, 1], [0.5, 0.0])}, "x", "y", "y").axes[0].lines  # 0 has no place on the axis
    assert alone.get_marker() == "o" and a.get_marker() == "None"
    with pytest.raises(ValueError, match="same first dimension"):
        plots.lines({"a": ([1, 2], [3])}, "x", "y")


def test_one_channel_bands_are_blue_below_zero_and_red_above():
    tile = canvas(plots.coefficient_bands([[[-1.0, 1.0], [0.0, 0.5]]], ["A"]))
    h, w = np.array(tile.shape[:2]) // 4
    low, high, zero = tile[h, w].astype(int), tile[h, 3 * w].astype(int), tile[3 * h, w].astype(int)
    assert low[2] > low[0] + 50 and high[0] > high[2] + 50
    assert zero.min() > 235 and np.ptp(zero) < 10


def test_three_channel_bands_are_coloured_about_mid_grey():
    tile = canvas(plots.coefficient_bands([[[0, 1], [0, 0]], [[0, 0], [-1, 0]], [[0, 0], [0, 0]]], ["A"]))
    h, w = np.array(tile.shape[:2]) // 4
    assert tile[h, 3 * w].tolist() == [255, 128, 128] and tile[3 * h, w].tolist() == [128, 0, 128]


def test_trajectory_has_a_row_per_band_and_a_column_per_time():
    states = np.full((3, 4, 4, 4), -1.0)
    states[2, 1] = 1.0  # the last step of band H
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 8, 1), 100, np.uint8)
    figure = plots.trajectory(states, list("AHVD"), TIMES, images)
    assert texts(figure) == ["t = 900", "t = 500", "t = 20", "image", *"AHVD"]
    drawn = canvas(figure).astype(int)
    h, w = drawn.shape[0] / 5, drawn.shape[1] / 3
    at = [[drawn[int(h * (r + 0.5)), int(w * (c + 0.5))] for c in range(3)] for r in range(5)]
    assert [pixel.tolist() for pixel in at[0]] == [[0] * 3, [100] * 3, [200] * 3]
    red = [[bool(pixel[0] > pixel[2]) for pixel in row] for row in at[1:]]
    assert red == [[False] * 3, [False, False, True], [False] * 3, [False] * 3]


def test_lines_over_time_are_the_input():
    axes = plots.lines({name: (TIMES, y) for name, y in STD.items()}, "t", "std", "y", backwards=True).axes[0]
    for line, (name, values) in zip(axes.lines[: len(STD)], STD.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xdata(), TIMES)
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert axes.get_yscale() == "log" and axes.xaxis_inverted()
    assert [text.get_text() for text in axes.figure.legends[0].texts] == list(STD)


@pytest.mark.parametrize("count", [10, 13, 16, 48])
def test_every_band_has_its_colour(count):
    axes = plots.lines({f"b{k}": (TIMES, STD["A"]) for k in range(count)}, "t", "std", "y").axes[0]
    assert len({to_rgba(line.get_color()) for line in axes.lines[:count]}) == count


def test_spectra_show_power_and_ratio():
    power, ratio = plots.spectra([0.1, 0.2, 0.5], estimate([9, 4, 1]), estimate([9, 5, 3])).axes
    assert [line.get_label() for line in power.lines] == ["real", "generated"]
    np.testing.assert_array_equal(power.lines[0].get_ydata(), [9, 4, 1])
    np.testing.assert_array_equal(power.lines[1].get_ydata(), [9, 5, 3])
    np.testing.assert_allclose(ratio.lines[0].get_ydata(), [1, 1.25, 3])
    assert (power.get_xscale(), power.get_yscale(), ratio.get_yscale()) == ("log",) * 3
    assert "cycles/pixel" in ratio.get_xlabel()


def test_intervals_are_drawn_where_they_are():
    real, generated = estimate(ENERGY, ENERGY / 2, ENERGY * 2), estimate(ENERGY * 2, ENERGY, ENERGY * 3)
    (axes,) = plots.beside("AHVD", real, generated, "energy (mean square)", "x").axes
    bars = np.concatenate([lines.get_segments() for lines in axes.collections])
    np.testing.assert_allclose(bars[:4, :, 0].T, [ENERGY / 2, ENERGY * 2])
    np.testing.assert_allclose(bars[4:, :, 0].T, [ENERGY, ENERGY * 3])
    np.testing.assert_allclose([line.get_xdata() for line in axes.lines], [ENERGY, ENERGY * 2])
    assert [label.get_text() for label in axes.get_yticklabels()] == list("AHVD")
    assert axes.yaxis_inverted() and axes.get_xscale() == "log"
    # the ratio spans each interval at its worst: low over the real high, high over the real low
    real, generated = estimate([9, 4], [8, 3], [10, 5]), estimate([9, 3], [7, 2], [11, 6])
    power, ratio = plots.spectra([0.1, 0.5], real, generated).axes
    for axes, area, low, high in ((power, 0, 3, 10), (power, 1, 2, 11), (ratio, 0, 2 / 5, 6 / 3)):
        heights = axes.collections[area].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (low, high)
    axes = FIGURES["beside"]().axes[0]
    np.testing.assert_array_equal(np.array(axes.collections[1].get_segments())[:, :, 0].T, KURTOSIS[1][1:])
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 2, 9, 40])
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] < -2 and axes.get_xlim()[1] > 60


def test_curves_points_and_fronts_are_where_they_were_measured():
    left, right = FIGURES["quality_curves"]().axes
    lines = {line.get_label(): line for line in left.lines if len(line.get_xdata()) == 3}
    np.testing.assert_allclose(lines["trailing"].get_xydata(), CURVE[["steps", "fwd"]])
    np.testing.assert_allclose(left.collections[0].get_segments()[0], [[5, 0.32], [5, 0.52]])
    assert (left.get_title(), right.get_title()) == ("ddim", "heun")
    axis = {"steps": "network evaluations", "seconds": "seconds per image"}
    steps, seconds = plots.quality_curves({"": BOTH}, "fwd", "FWD", axis, by="spacing").axes
    assert (steps.get_xlabel(), seconds.get_xlabel()) == tuple(axis.values())
    np.testing.assert_allclose(seconds.lines[1].get_xydata(), CURVE[["seconds", "fwd"]])


@pytest.mark.parametrize(("floor", "shown"), [(0.08, True), (0.001, False), (-0.1, False), (None, False)])
def test_a_floor_far_below_all_else_does_not_stretch_the_axis(floor, shown):
    curves = plots.quality_curves(
        {"": CURVE.assign(name="ddim")}, "fwd", "FWD", {"steps": "steps"}, by="name", floor=floor
    )
    for figure in (curves, plots.variants(SEEDS.assign(fwd=CURVE.fwd.min()), "fwd", "distance", floor)):
        assert (
            "floor: real images" in [text.get_text() for one in figure.legends for text in one.get_texts()]
        ) == shown


def test_bars_at_one_place_stand_side_by_side():
    figure = plots.quality_curves({"": BOTH}, "fwd", "FWD", {"steps": "steps"}, by="spacing")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for leading, trailing in (axes.lines, axes.collections):
        places = [artist.get_transform().transform((5, 0.4))[0] for artist in (leading, trailing)]
        assert places[0] + 2 < places[1]


def test_a_legend_of_long_names_stays_within_the_figure():
    names = [f"level 1, train_kimg 104, backbone unet, recipe modern, seed {k}" for k in range(5)]
    table = pd.concat([CURVE.assign(variant=name) for name in names])
    figure = plots.quality_curves({"": table}, "fwd", "FWD", {"seconds": "s"}, by="variant", floor=0.1)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y1 < figure.axes[0].get_window_extent().y0


def test_speedups_far_apart_stand_on_positive_axes():
    row = {"dataset": "cifar10", "kind": "unet", "over": "pixels", "work": "training"}
    rows = [row | {"flop_ratio": r, "speedup": r / 4, "low": r / 5, "high": r / 3} for r in (2, 60)]
    (axes,) = figures.speedup_against_flops(rows).axes
    assert axes.get_xlim() == axes.get_ylim() and 0 < axes.get_xlim()[0] < 0.4 and axes.get_xlim()[1] > 60


def test_work_that_was_never_run_is_an_empty_panel():
    row = {"dataset": "digits", "kind": "unet", "level": 1, "network": "wavelets"}
    row |= {f"training_images_per_s{end}": None for end in ("", "_q1", "_q3")}
    row |= {f"sampling_images_per_s{end}": 9 for end in ("", "_q1", "_q3")}
    figure = figures.rates_by_level([row])
    figure.draw_without_rendering()
    assert [len(axes.lines) for axes in figure.axes] == [0, 1]


def test_variants_have_a_dot_and_an_interval_per_seed():
    table = pd.DataFrame({"variant": "a", "fwd": [1.0, 3.0], "fwd_low": [0.5, 2], "fwd_high": [2, 4]})
    figure = plots.variants(table, "fwd", "FWD")
    axes = figure.axes[0]
    assert axes.lines[0].get_xdata().tolist() == [1, 3] and axes.lines[1].get_xdata().tolist() == [2, 2]
    segments = axes.collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[0.5, 2], [2, 4]]
    np.testing.assert_allclose([segment[0, 1] for segment in segments], axes.lines[0].get_ydata())


def test_distributions_are_cumulative() -> None:
    distance, ratio = FIGURES["distributions"]().axes
    assert [line.get_label() for line in distance.lines] == ["real", "generated"]
    np.testing.assert_allclose(distance.lines[1].get_xydata()[1:], [[0, 1 / 3], [1, 2 / 3], [2, 1]])
    np.testing.assert_allclose(ratio.lines[1].get_xydata()[1:], [[0, 1 / 3], [0.25, 2 / 3], [1, 1]])
    assert set(ratio.lines[2].get_xdata()) == {1 / 3} and len(distance.lines) == 2


def test_cumulative_curves_stand_in_a_band_of_their_size():
    values = np.linspace(0.1, 0.9, 200)
    (axes,) = plots.distributions({"probability": (values, values[:50])}, 0.5).axes
    for line, band, count in zip(axes.lines[:2], axes.collections, (200, 50), strict=True):
        corners = band.get_paths()[0].vertices
        reach = np.sqrt(np.log(20) / 2 / count)  # 0.087 and 0.173
        np.testing.assert_allclose(corners[:, 1].min(), line.get_ydata()[1] - reach)
        np.testing.assert_allclose(corners[:, 1].max(), 1 + reach)


def test_histograms_count_each_set_of_values():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[..., 1], images[0, ..., 2] = 255, 130
    names = ("Red", "Green", "Blue")
    values = {name: images[..., k] for k, name in enumerate(names)}
    figure = plots.histograms(values, "pixel value", np.arange(0, 257, 4))
    assert tuple(axes.get_title() for axes in figure.axes) == names
    wanted = [{0: 100}, {252: 100}, {0: 50, 128: 50}]
    for axes, bins in zip(figure.axes, wanted, strict=True):
        for patch in axes.patches:
            share, edges, _ = patch.get_data()
            assert {int(edge): value for edge, value in zip(edges, share, strict=False) if value} == bins
    assert FIGURES["histograms"]().axes[0].get_yscale() == "log"


@pytest.mark.parametrize("level", [1, 2, 3])
def test_packet_map_agrees_with_pywavelets_frequency_order(level):
    image = RNG.normal(size=(16, 16))
    tree = pywt.WaveletPacket2D(image, "haar", maxlevel=level)
    wanted = [[np.square(node.data).sum() for node in row] for row in tree.get_level(level, "freq")]
    figure = plots.packet_map(packets(image, level), level)
    np.testing.assert_allclose(cells(figure), wanted)
    for text in figure.axes[0].texts:
        column, row = np.array(text.get_position()).astype(int)
        assert text.get_text() == f"{wanted[row][column]:.2g}"


def test_packet_map_places_oscillations_by_frequency():
    n, level = 64, 2
    for cell in range(4):
        wave = np.cos(np.pi * (cell + 0.5) / 4 * np.arange(n) + 0.3)  # mid of the cell's frequencies
        across, down = np.broadcast_to(wave, (n, n)), np.broadcast_to(wave[:, None], (n, n))
        for image, place in ((across, (0, cell)), (down, (cell, 0))):
            drawn = cells(plots.packet_map(packets(image, level), level))
            assert np.unravel_index(drawn.argmax(), (4, 4)) == place


def test_packet_map_says_how_far_each_may_be_off():
    values = np.arange(1.0, 17)
    low, high = values * np.linspace(0.01, 0.16, 16) * [[-1], [1]] + values
    figure = plots.packet_map(estimate(values, low, high), 2)
    assert sorted(texts(figure), key=lambda text: float(text.split()[0])) == [
        f"{value:.2g}\n±{value:.0f}%" for value in values
    ]


def test_packet_map_of_more_packets_than_can_be_read_has_colours_alone():
    assert len(texts(plots.packet_map(estimate(np.arange(1, 257)), 4))) == 256
    assert texts(plots.packet_map(estimate(np.arange(1, 1025)), 5)) == []  # of 256 x 256 pixels


def test_packet_map_of_a_set_and_itself_warns_of_nothing(recwarn):
    assert texts(plots.packet_map(estimate(np.zeros(4), 0, 0), 1)) == 4 * ["0"] and not recwarn.list


def test_packet_map_axes_are_cycles_per_pixel_and_the_bar_is_named():
    axes, bar = plots.packet_map(estimate(np.arange(16)), 2).axes
    for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()[::-1])):
        at = [float(tick.label1.get_text()) for tick in axis.get_major_ticks()]
        np.testing.assert_allclose(axis.get_ticklocs(), np.array(at) * 8)  # 4 packets span half a cycle
        assert ends == (0, 4) and (at[0], at[-1]) == (0, 0.5)
    assert bar.get_ylabel() == "Fréchet distance"
    for values in (np.zeros(4), np.full(4, 3.0), [0, 1, 2, 1e9]):
        pixels(agg(plots.packet_map(estimate(values), 1)))


def test_neighbours_are_under_their_samples_with_distances():
    shades = np.array([[11, 12, 13], [21, 22, 23]], dtype=np.uint8)
    nearest = np.broadcast_to(shades[..., None, None, None], (2, 3, 8, 8, 1))
    figure = plots.neighbours(np.full((2, 8, 8, 1), 1, np.uint8), nearest, shades / 100)
    drawn = canvas(figure)
    tile, columns = (drawn.shape[1] - 3) // 2, drawn.shape[1] // 4
    step = (drawn.shape[0] - tile) / 3
    seen = [[drawn[int(r * step + tile / 2), c, 0] for c in (columns, 3 * columns)] for r in range(4)]
    assert seen == [[1, 1], [11, 21], [12, 22], [13, 23]]
    placed = {text.get_text(): text.get_position() for text in figure.axes[0].texts if text.get_text()}
    x, y = placed["0.220"]
    assert drawn.shape[1] / 2 < x and 2 * step + tile < y < 2 * step + tile + 24


@pytest.mark.parametrize("images", [RGB / 255, RGB[0], RGB[..., 0], RGB[:0]])
def test_what_are_no_images_is_refused_in_one_line(images):
    with pytest.raises(ValueError, match=r"^got [^\n]+, wanted uint8 \(N, H, W, C\): convert them$"):
        plots.image_grid(images)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.image_grid([RGB[0], RGB[0, :5]]),
        lambda: plots.neighbours(RGB[:2], RGB[:2], [1, 2]),
        lambda: plots.neighbours(RGB[:2], RGB[None, :2], [[1, 2]]),
        lambda: plots.neighbours(RGB[:2], RGB[:6].reshape(2, 3, 8, 8, 3), [[1, 2], [3, 4], [5, 6]]),
        lambda: plots.coefficient_bands(STATES, list("AHVD")),
        lambda: plots.coefficient_bands(STATES[0], list("AHVDX")),
        lambda: plots.coefficient_bands(STATES[0, :11], list("AHVD")),
        lambda: plots.trajectory(STATES, list("AHVD"), TIMES[:2], RGB[:3]),
        lambda: plots.trajectory(STATES, list("AHVDX"), TIMES, RGB[:3]),
        lambda: plots.trajectory(STATES, list("AHVD"), TIMES, RGB[:3, :6]),
        lambda: plots.lines({"A": (TIMES, [1, 2])}, "t", "std"),
        lambda: plots.lines({"A": (TIMES, STATES)}, "t", "std"),
        lambda: plots.training_curves([]),
        lambda: plots.training_curves([{"loss": 1}]),
        lambda: plots.spectra([0.1, 0.2], estimate([1, 2]), estimate([1, 2, 3])),
        lambda: plots.beside("AHV", *KURTOSIS, "excess kurtosis"),
        lambda: plots.packet_map(estimate(np.ones(15)), 2),
        lambda: plots.packet_map(estimate(np.ones(16)), 1),
        lambda: plots.quality_curves({}, "fwd", "FWD", {"steps": "steps"}, by="solver"),
        lambda: plots.trajectory(STATES, list("AHVD"), TIMES, RGB[:2]),
        lambda: plots.image_grid(RGB, titles=["one"]),
    ],
)
def test_wrong_shapes_are_an_error(draw):
    with pytest.raises((ValueError, KeyError, IndexError)):
        draw()
    assert plt.get_fignums() == []
