"""What is measured against what: the plain code computes what ours does, and the two notebooks measure it."""

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, wddm
from torch.testing import assert_close

from benchmarks import against_pixels, against_plain, figures, peers, plain, profiling, scale, workloads
from benchmarks.matched import matched
from benchmarks.profiling import Measurement, ready
from wddm.backbones import BACKBONES, build_backbone
from wddm.data import prepare
from wddm.kan import SplineLinear, spline_basis
from wddm.objective import noise_scheduler
from wddm.wavelets import WaveletCodec

DIGITS = {"backbone": "ukan", "dataset": "digits", "level": 1}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_plain_haar_transform_is_the_codecs(level: int) -> None:
    images = torch.rand(2, 3, 16, 8) * 2 - 1
    assert_close(plain.haar(images, level), WaveletCodec("haar", level, scaling="dyadic").encode(images))


def test_recursion_gives_the_bases_of_the_closed_form() -> None:
    x = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    assert_close(plain.recursive_basis(x), spline_basis(x), atol=1e-6, rtol=0)


def test_a_model_with_recursion_is_the_same_model() -> None:
    model = build_backbone(**DIGITS).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    wanted = model(x, t).sample
    parameters = {name: id(p) for name, p in model.named_parameters()}
    plain.with_recursion(model)
    assert not any(type(module) is SplineLinear for module in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert_close(model(x, t).sample, wanted, atol=1e-5, rtol=1e-5)


def test_the_bare_loop_takes_the_steps_of_ours(tmp_path: Path) -> None:
    """The same weights after two steps from the same noise, in float64: Adam magnifies the rounding of gradients that
    are zero. And a moving average between old and new ones."""
    model = build_backbone(**DIGITS).double()
    images, twin = workloads.noise_images(DIGITS, 8), deepcopy(model)
    trainer = workloads.Unsaved(
        model=model, codec=WaveletCodec("haar", 1, scaling="dyadic"), images=images, folder=tmp_path, train_kimg=1,
        batch_size=8, weighting="none", learning_rate=1e-3,
        schedule="constant_with_warmup", warmup_kimg=0, cpu=True, precision="no",
    )  # fmt: skip
    loop = plain.BareLoop(twin.train(), level=1)
    assert_close(loop.alphas_cumprod, noise_scheduler().alphas_cumprod, atol=1e-7, rtol=1e-5)
    trainer.noise_scheduler.alphas_cumprod = loop.alphas_cumprod = noise_scheduler().alphas_cumprod.double()
    x = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 127.5 - 1
    for _ in range(2):
        noise, t = trainer.draw_noise()
        loss, *_ = trainer.optimise(x)
        assert_close(loop.step(x, noise, t), loss)
        trainer.step += 1
    before = [average.clone() for average in loop.average]
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(theirs, ours)
    loop.step(x, noise, t)
    for old, average, p in zip(before, loop.average, loop.parameters, strict=True):
        assert_close(average, old + 1e-3 * (p - old))


def test_networks_are_compiled_where_that_is_asked_for(monkeypatch) -> None:
    """With a backend that compiles nothing: what real ones do is PyTorch's business."""
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: (compiled.append(model), compile(model, backend="eager"))[1])
    makers = {m.__name__: partial(m, DIGITS, batch_size=2) for m in (workloads.training, workloads.bare_training)}
    makers["sampling"] = partial(workloads.sampling, DIGITS, batch_size=2, sampling_steps=1)
    for compile_it in (False, True):
        with ready({name: partial(make, compile=compile_it) for name, make in makers.items()}) as calls:
            for call in calls.values():
                call()
        assert len(compiled) == 3 * compile_it


def test_both_data_paths_give_the_images() -> None:
    images = workloads.noise_images({"dataset": "digits"}, 12)
    for maker in (workloads.prepared_batches, workloads.decoded_batches):
        batch = next(maker(images, batch_size=4, steps=2))
        known = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        known = torch.cat([known, known.flip(-1)])
        assert batch.shape == (4, 1, 16, 16)
        assert (batch[:, None] - known).abs().amax((2, 3, 4)).amin(1).max() < 1e-6


def test_every_network_on_wavelets_has_its_three_equals_on_pixels() -> None:
    found = {(entry.name, entry.level): entry for entry in against_pixels.entries("ukan", "cifar10", [0, 1, 7], 64)}
    wavelets, same = found[against_pixels.WAVELETS, 1], found[against_pixels.SAME, 1]
    assert set(found) == {(against_pixels.PRESET, 0)} | {
        (n, 1) for n in (against_pixels.WAVELETS, against_pixels.SAME, against_pixels.MATCHED)
    }
    ends = 2 * 9 * (12 - 3) * 128 + (12 - 3)  # weights of the first and last convolution, biases of the last
    assert wavelets.parameters - same.parameters == ends
    assert 3.9 < same.flops / wavelets.flops < 4.1
    matched = found[against_pixels.MATCHED, 1]
    assert abs(matched.parameters / wavelets.parameters - 1) < 0.05 and matched.network["level"] == 0


def test_all_networks_get_the_batch_that_the_largest_has_memory_for(monkeypatch) -> None:
    """They are only timed once the batch has been found; what is too large for it here is a network on pixels."""
    tried, timed = [], []

    def alone(make) -> Measurement:
        level, images = make.args[0]["level"], make.keywords["batch_size"]
        tried.append((level, images))
        return Measurement(reason="out of memory") if level == 0 and images > 2 else Measurement(np.ones(1), 0.1)

    def time_in_turn(calls, **limits) -> dict[int, np.ndarray]:
        timed.append(len(calls))
        return {name: np.full(5, 8.0) for name in calls}

    monkeypatch.setattr(profiling, "measure_alone", alone)
    monkeypatch.setattr(profiling, "time_in_turn", time_in_turn)
    found = against_pixels.entries("unet", "digits", [0, 1], 64)
    found = against_pixels.measure(found, rate=1e12, batch_size=8, max_seconds=1e3)
    assert tried[:12] == [(level, images) for images in (8, 4, 2) for level in (0, 1, 0, 0)]
    assert {work: {one.measured[work].batch_size for one in found} for work in ("training", "sampling")} == {
        "training": {2}, "sampling": {2}
    }  # fmt: skip
    assert timed == [4, 4] and against_pixels.costs(found)[1]["training_images_per_s"] == 2 / 8


def entry(name: str, level: int, flops: int, seconds: list[float] | None) -> against_pixels.Entry:
    network = {"dataset": "digits", "backbone": "unet", "level": level}
    one = Measurement(reason="slow") if seconds is None else Measurement(np.array(seconds), 0.5)
    return against_pixels.Entry(name, level, network, 1000, flops, {"training": one, "sampling": one})


def test_speedups_are_paired_and_stand_beside_the_ratio_of_flops() -> None:
    found = [
        entry(against_pixels.PRESET, 0, 400, [3.0, 6, 9, 3, 3]),
        entry(against_pixels.WAVELETS, 1, 100, [1.0, 2, 3, 1, 1]),
        entry(against_pixels.SAME, 1, 500, None),
        entry(against_pixels.SAME, 2, 500, [1.0] * 5),
    ]
    rows = against_pixels.speedups(found)
    assert [(row["over"], row["work"]) for row in rows] == [
        (over, work) for over in (against_pixels.PRESET, against_pixels.SAME) for work in ("training", "sampling")
    ]
    assert rows[0]["flop_ratio"] == 4 and (rows[0]["speedup"], rows[0]["low"], rows[0]["high"]) == (3, 3, 3)
    assert rows[2]["flop_ratio"] == 5 and rows[2]["speedup"] is None
    costs = against_pixels.costs(found)
    assert costs[1]["training_images_per_s"] == 1 and costs[2]["training_not_run"] == "slow"
    assert against_pixels.cost_table(costs)[2]["training (images/s)"] == "not run: slow"
    claimed = against_pixels.claim_table(rows, 1, 3.0)
    assert claimed[0]["3-fold not ruled out"] == "1 of 1" and claimed[1]["times as fast"] == "not run"
    drawn = figures.speedup_against_flops(rows[:2]), figures.rates_by_level(costs)
    assert [len(figure.axes) for figure in drawn] == [2, 2]


@pytest.mark.parametrize(
    ("ratios", "wanted", "met"),
    [
        ([(6.0, 5.5, 7.0), (9.0, 8.0, 9.5)], 5, "yes"),
        ([(9.0, 8.0, 9.5), (3.0, 2.5, 4.0)], 5, "no"),
        ([(6.0, 4.5, 7.0)], 5, "open"),
        ([(None, None, None)], 5, "not run"),
    ],
)
def test_a_claim_is_judged_by_the_interval_of_the_smallest_ratio(ratios: list, wanted: float, met: str) -> None:
    names = ("times_as_fast", "low", "high")
    rows = [dict(zip(names, ratio, strict=True)) for ratio in ratios]
    assert against_plain.claim("fast", rows, wanted)["met"] == met


def test_a_comparison_is_of_as_many_images_as_both_have_memory_for(monkeypatch) -> None:
    def alone(make) -> Measurement:
        fits = make.keywords["batch_size"] <= 4
        return Measurement(np.ones(1), 0.1) if fits else Measurement(reason="out of memory")

    monkeypatch.setattr(profiling, "measure_alone", alone)
    ours = against_plain.Benchmarks(rate=1e9, batch_size=16, max_seconds=9)
    row = ours.compared(forever, forever, flops=1)
    assert row["of"] == "4 images" and row["not_run"] is None and row["times_as_fast"] > 0
    row = ours.compared(forever, forever, flops=1e12)
    assert row["of"] == "16 images" and row["not_run"] == "over 1.6e+04 s a step"


def forever(*, batch_size: int, steps: int) -> Iterator[int]:
    while True:
        yield sum(range(1000))


def test_the_largest_batch_is_the_last_that_fits(monkeypatch) -> None:
    def alone(make) -> Measurement:
        return Measurement(np.ones(1), 0.1 * make.keywords["batch_size"])

    monkeypatch.setattr(profiling, "measure_alone", alone)
    found = against_plain.largest_batch(DIGITS, limit_gib=1.0)
    assert (found["largest batch"], found["memory (GiB)"]) == (8, pytest.approx(0.8))
    assert against_plain.largest_batch(DIGITS, limit_gib=0.05)["largest batch"] == 0
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no capacity_gib and no GPU"):
            against_plain.largest_batch(DIGITS, limit_gib=None)


def report_of(root: Path, name: str, *options: str, **values: object) -> Path:
    """reports/<name> of a run of params/<name>.yaml."""
    done = wddm(root, "run", f"params/{name}.yaml", *options, **values)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "reports" / name


def test_operators_are_counted_and_timed_alone() -> None:
    def products(steps: int):
        a = torch.ones(256, 256)
        while True:
            for _ in range(steps):
                (a @ a).add_(1)
            yield

    rows, seconds = profiling.by_operator(products, steps=3)
    table = pd.DataFrame(rows).set_index("operator")
    assert table.calls["aten::mm"] == table.calls["aten::add_"] == 1 and seconds > 0
    assert table.drop(profiling.OUTSIDE).index[0] == "aten::mm" and table.seconds[profiling.OUTSIDE] >= 0
    twice = pd.concat([table.assign(network=name).reset_index() for name in "ab"])
    shares = profiling.shares(twice, ["network"], most=1)
    assert [*shares.index] == ["aten::mm", profiling.REST, profiling.OUTSIDE]
    assert shares.sum().to_numpy() == pytest.approx([100, 100], abs=0.2) and shares.a.tolist() == shares.b.tolist()


@pytest.mark.slow
def test_operators(root: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks", dirs_exist_ok=True)
    report = report_of(root, "operators", datasets="[digits]", batch_size=2, steps=1, threads="[1, 2]")
    table = pd.read_csv(report / "operators.csv")
    assert {"aten::convolution_backward", "aten::_fused_adamw_", profiling.OUTSIDE} <= {*table.operator}
    assert {*table.threads} == {1, 2} and table.seconds.min() >= 0
    page = (report / "operators.html").read_text()
    assert "Traceback (most" not in page and "Warning:" not in page and "digits, 2 threads (%)" in page


@pytest.mark.slow
def test_efficiency(root: Path) -> None:
    """A network that is too slow is counted all the same, and its row says why it was not run."""
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks", dirs_exist_ok=True)
    tiny = {"datasets": "[digits, celebahq]", "levels": "[0, 2]", "backbones": "[unet]", "rounds": 5, "batch_size": 2}
    report = report_of(root, "efficiency", sampling_steps=1, max_step_seconds=0.5, **tiny)
    costs = pd.read_csv(report / "efficiency.csv")
    assert len(costs) == 8 and costs.parameters.min() > 0 and costs.forward_gflop.min() > 0
    digits = costs[costs.dataset == "digits"]
    assert digits.training_images_per_s.min() > 0 and digits.training_memory_gib.min() > 0
    slow = costs[(costs.dataset == "celebahq") & (costs.level == 0)]
    if not torch.cuda.is_available():
        assert slow.training_images_per_s.isna().all() and slow.training_not_run.str.endswith("s a step").all()
    over = {against_pixels.PRESET, against_pixels.SAME, against_pixels.MATCHED}
    assert set(pd.read_csv(report / "speedups.csv").over) == over
    page = (report / "efficiency.html").read_text()
    assert "Traceback (most" not in page and "Warning:" not in page and "it/s]" not in page
    assert {p.stem for p in (report / "figures").glob("*.png")} == {"rates", "speedups"}


@pytest.mark.slow
def test_benchmarks(root: Path) -> None:
    """The cells that a GPU runs, at tiny size, without compilation, which takes minutes on a CPU."""
    tiny = {"datasets": "[digits]", "levels": "[1]", "backbones": "[unet, ukan]", "rounds": 5, "batch_size": 2}
    small = {
        "images_per_step": 2,
        "dataset": "digits",
        "resolution": 16,
        "limit": 64,
        "capacity_dataset": "digits",
        "capacity_gib": 0.05,
    }
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks", dirs_exist_ok=True)
    report = report_of(
        root,
        "benchmarks-full",
        "--only",
        "benchmarks",
        max_step_seconds=60,
        comparison_seconds=0,
        compiled=False,
        **tiny,
        **small,
    )
    loops = pd.read_csv(report / "loops.csv")
    assert len(loops) == 2 and loops.times_as_fast.min() > 0.1
    assert 0 < loops.share_of_rate.max() < 1
    heads = pd.read_csv(report / "heads.csv")
    assert heads.times_as_fast.tolist() == [pytest.approx(1, rel=0.9)] and heads.of.tolist() == ["2 images"]
    claims = pd.read_csv(report / "benchmarks.csv")
    assert len(claims) == 6 and set(claims.met) <= {"yes", "no", "open"}
    fixed = pd.read_csv(report / "fixed.csv").set_index("what").seconds
    assert fixed["import wddm"] < fixed["wddm run, nothing to do"] < fixed["wddm run, an empty notebook"]
    assert json.loads((report / "timings.json").read_text())["loop_ratio"] > 0.1
    page = (report / "benchmarks.html").read_text()
    assert "Traceback (most" not in page and "Warning:" not in page


POWERS = {"FWD": (1, 1.5), "training": (0.5, 1), scale.KID: (2, None)}  # seconds by images, by pixels


def made_up(work: str, count: int, side: int) -> Measurement:
    """A cost that is a product of powers, and memory that does not grow."""
    by_images, by_pixels = POWERS[work]
    return Measurement(np.array([1e-3 * count**by_images * side ** (2 * (by_pixels or 0))]), 0.25)


def test_slopes_are_the_powers_and_what_is_steep_is_named(monkeypatch) -> None:
    monkeypatch.setattr(scale, "alone", made_up)
    table = scale.study([16, 64, 4, 256], [4, 16, 8], side=2, count=8, max_seconds=1e9, works=tuple(POWERS))
    found = scale.slopes(table).set_index("work")
    for work, powers in POWERS.items():
        got = found.loc[work, ["seconds over images", "seconds over pixels"]].astype(float)
        np.testing.assert_allclose(got, [np.nan if power is None else power for power in powers], rtol=1e-6)
    assert found["memory over images"].abs().max() < 1e-9 and found["GiB"].eq(0.25).all()
    assert found.loc["FWD", "ms an image"] == pytest.approx(8) and (found["images"] == 256).all()
    assert set(table[table.over == "pixels"].images) == {8, 1024}  # the FWD takes what a packet wants
    said = scale.conclusion(found.reset_index())
    assert f"in images: {scale.KID} (2.00); in pixels: FWD (1.50)." in said
    legend = figures.scaling(table).legends[0].get_texts()
    assert {text.get_text() for text in legend} >= {"training: 0.50, 1.00", "FWD: 1.00, 1.50"}
    assert np.isnan(scale.slope([4], [1]))


def test_what_a_smaller_point_predicts_over_the_budget_is_not_measured(monkeypatch) -> None:
    """At 1 ms an image and value: 4 s of 4,000 images predict 16 s; and a process that died predicts nothing."""
    asked = []

    def measure(work: str, count: int, side: int) -> Measurement:
        asked.append(count)
        return Measurement(reason="died") if count == 2000 else Measurement(np.array([1e-3 * count]), 0.1)

    monkeypatch.setattr(scale, "alone", measure)
    rows = scale.series("training", [(1000, 8), (2000, 8), (4000, 8), (16000, 8), (64000, 8)], 10)
    assert asked == [1000, 2000, 4000] and [row["seconds"] for row in rows] == [1, None, 4, None, None]
    absent = scale.unmeasured(pd.DataFrame(rows))
    assert absent.reason.tolist() == ["died", "would take 16 s", "would take 64 s"]


@pytest.mark.parametrize("work", scale.WORKS)
def test_every_work_gets_ready_and_is_done(work: str, tmp_path: Path) -> None:
    if work == "EfficientNet's features":
        pytest.importorskip("efficientnet_lite_pytorch")
    done = scale.WORKS[work](scale.noise(tmp_path / "noise", 48, 16), tmp_path)
    next(done)
    result = next(done)
    if work.startswith("preparation"):
        images = scale.noise(tmp_path / "again", 48, 16)
        assert sorted(map(bytes, result.images)) == sorted(map(bytes, images))


@pytest.mark.slow
def test_scale(root: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks", dirs_exist_ok=True)
    report = report_of(
        root, "scale", counts="[64, 128]", sides="[8, 16]", resolution=8, num_samples=32, max_seconds=0.05
    )
    points = pd.read_csv(report / "points.csv")
    assert set(points.work) == set(scale.WORKS) and points.seconds.notna().groupby(points.work).any().all()
    assert (points.seconds.notna() ^ points.reason.notna()).all() and points.reason.notna().any()
    assert len(pd.read_csv(report / "slopes.csv")) == len(scale.WORKS)
    page = (report / "scale.html").read_text()
    assert "Steeper than linear" in page and "would take" in page and "Traceback (most" not in page
    assert {p.stem for p in (report / "figures").glob("*.png")} == {"scaling"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_matched_is_a_pixel_network_of_the_same_size(backbone: str) -> None:
    network = {"backbone": backbone, "dataset": "cifar10", "level": 1}
    with torch.device("meta"):
        wavelet = build_backbone(**network)
        pixel = build_backbone(**matched(network))
    assert pixel.config.in_channels == 3 and pixel.config.sample_size == 32
    assert abs(pixel.num_parameters() / wavelet.num_parameters() - 1) < 0.05


@pytest.mark.slow
def test_the_race_of_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With this workbook alone, which needs no library: two learning rates, then the better one with another seed."""
    folder = prepare("digits", 16, tmp_path, limit=200, progress=False).folder
    monkeypatch.setattr(peers, "PEERS", {"wddm, level 1": (partial(peers.ours, level=1), (2e-3, 1e-9))})
    task = peers.Task("", str(folder), 0.0, seconds=1, count=20)
    raced = peers.race(task, [0, 1], level=2)
    assert raced.learning_rate.tolist() == [1e-9, 2e-3, 2e-3] and raced.chosen.tolist() == [False, True, True]
    assert (raced.training_s >= 1).all() and (raced.images_seen % 96 == 0).all() and (raced.images_seen > 0).all()
    assert [images.shape for images in raced.samples] == [(20, 16, 16, 1)] * 3
    row = peers.summary(raced).iloc[0]
    assert row["learning rate"] == 2e-3 and row["lines"] > 20 and " to " in row.FWD


def test_nobody_is_told_labels_of_a_set_without_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (20, 16, 16, 1), np.uint8))
    folder = prepare("folder", 16, tmp_path, dataset_path=tmp_path / "images.npy", progress=False).folder
    row = {"kid_efficientnet": 0.1, "fwd": 1.0, "images_seen": 1, "sampling_s": 1.0, "memory_gib": 1.0}
    monkeypatch.setattr(peers, "measured", lambda task, level: vars(task) | row)
    raced = peers.race(peers.Task("", str(folder), 0.0, seconds=1), [0, 1], level=1)
    without = [name for name in peers.PEERS if "told" not in name]
    assert set(raced.peer) == set(without) and peers.summary(raced).peer.tolist() == without
