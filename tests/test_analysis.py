"""Studies of settings and of runs: their arithmetic in closed form, the analysis notebooks as users run them."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, as_process, wddm
from PIL import Image

from wddm import data
from wddm.backbones import build_backbone
from wddm.files import append_row, read_rows, write_json
from wddm.metrics import scores
from wddm.metrics.intervals import Estimate
from wddm.metrics.scores import Options, wavelet
from wddm.objective import build_solver, default_solver, factors, noise_scheduler
from wddm.pipeline import WaveletPipeline
from wddm.studies import sampling, sweeps
from wddm.wavelets import WaveletCodec
from wddm.workbook import Run, collect
from wddm.workbook.records import Finished

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipeline() -> WaveletPipeline:
    """An untrained pipeline, for images of 8 x 8."""
    torch.manual_seed(0)
    backbone = build_backbone("unet", image_size=8, image_channels=1, level=1, widths=(32, 32), layers_per_block=1)
    codec = WaveletCodec("haar", 1, scaling="dyadic")
    made = WaveletPipeline(backbone.eval(), build_solver("ddim", "v_prediction"), codec)
    made.set_progress_bar_config(disable=True)
    return made


# --------------------------------------------------------------------------------------------------- settings


def test_settings_are_all_combinations_with_eta_for_ddim_alone() -> None:
    found = sampling.settings(["ddim", "heun"], [5, 10], etas=[0.0, 1.0])
    assert [(row["scheduler"], row["eta"], row["steps"]) for row in found] == [
        ("ddim", 0.0, 5), ("ddim", 0.0, 10), ("ddim", 1.0, 5), ("ddim", 1.0, 10), ("heun", 0.0, 5), ("heun", 0.0, 10),
    ]  # fmt: skip
    assert [row["spacing"] for row in found] == ["trailing"] * 6
    pairs = sampling.settings(["ddim"], [5, 10], detail_steps=[5, 10])
    assert [row["detail_steps"] for row in pairs] == [None, 10, 5, None]  # equal steps are the plain sampler


def test_cells_are_taken_in_turn_once_each_and_on_images_of_their_own() -> None:
    settings = sampling.settings(["ddim"], [5, 10])
    found = sampling.cells([*settings, *settings], sets=2, count=7, seed=3)
    assert [(cell["steps"], cell["first"], cell["count"]) for cell in found] == [(5, 3, 7), (10, 3, 7), (5, 10, 7), (10, 10, 7)]  # fmt: skip  # noqa: E501


def test_a_grid_goes_on_where_it_was_stopped(tmp_path) -> None:
    file, asked = tmp_path / "runs/x/cells.jsonl", []

    def measure(cell: dict) -> dict:
        steps = cell["steps"]
        if steps == 3 and len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(steps)
        return {"fwd": steps / 10}

    cells = [{"steps": steps} for steps in (1, 2, 3, 4)]
    with pytest.raises(KeyboardInterrupt):
        list(sampling.measured(file, cells, {"checkpoint": "a"}, measure))
    assert asked == [1, 2] and len(read_rows(file)) == 2
    file.write_text(file.read_text() + '{"context": {"chec')  # the machine went down in the middle of a line
    asked.append("again")
    rows = list(sampling.measured(file, cells, {"checkpoint": "a"}, measure))
    assert asked == [1, 2, "again", 3, 4]
    assert rows == [{"steps": steps, "fwd": steps / 10} for steps in (1, 2, 3, 4)]
    assert list(sampling.measured(file, cells, {"checkpoint": "a"}, measure)) == rows and len(asked) == 5
    list(sampling.measured(file, cells[:1], {"checkpoint": "b"}, measure))  # another one's numbers are not taken
    assert asked[5:] == [1] and len(read_rows(file)) == 5


def test_rows_are_whole_lines(tmp_path) -> None:
    file = tmp_path / "rows"
    assert read_rows(file) == []
    file.write_text('{"a": 1}\n{"a"')
    append_row(file, {"a": "ü"})
    assert read_rows(file) == [{"a": 1}, {"a": "ü"}] and file.read_bytes().count(b"\n") == 2


def test_a_checkpoint_is_known_by_weights_and_configuration(pipeline) -> None:
    def known(pipeline) -> str:
        return sampling.context(pipeline, SimpleNamespace(sha256="0"))["checkpoint"]

    before = known(pipeline)
    assert known(sampling.with_solver(pipeline, "heun", "trailing")) == before
    codec = WaveletPipeline(pipeline.backbone, pipeline.scheduler, WaveletCodec("haar", 1, scaling="none"))
    assert known(codec) != before
    weight = next(pipeline.backbone.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
        assert known(pipeline) != before
        weight.view(-1)[0] -= 1e-3


@pytest.mark.parametrize(("scheduler", "evaluations"), [("ddim", 4), ("heun", 7), ("dpmsolver++", 4)])
def test_evaluations_of_the_network_are_counted(pipeline, monkeypatch, scheduler, evaluations) -> None:
    ticks = iter([0.0, 512.0])
    monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    solver = sampling.with_solver(pipeline, scheduler, "trailing")
    samples, cost = sampling.timed_samples(solver, 150, num_inference_steps=4)  # on the CPU drawn in two batches of 128
    assert samples.shape == (150, 8, 8, 1) and not pipeline.backbone._forward_pre_hooks
    assert cost == {"evaluations": evaluations, "seconds_per_image": 2.0}


def test_what_a_solver_cannot_do_is_a_row_with_its_error(pipeline) -> None:
    cell = dict(zip(sampling.SETTING, ("ddim", 2000, 0.0, "trailing", None), strict=True)) | {"first": 0, "count": 4}
    found = sampling.quality(pipeline, None, cell, metric="fwd", batch_size=4, measuring=Options(1))
    assert found["error"].startswith("got 2000 steps")
    for metric, said in {"fwdd": "got metric='fwdd', wanted one of fwd, kid", "fid": "Inception"}.items():
        with pytest.raises(ValueError, match=said):
            scores.distances([metric], np.zeros((4, 8, 8, 1), np.uint8), None, Options())


def test_distances_of_one_network_ask_it_once(monkeypatch) -> None:
    asked = []

    def by_inception(*asked_of: object) -> list[scores.Score]:
        asked.append(asked_of)
        return [scores.Score(key, key, Estimate(1.0, 0.5, 2.0), None, 4, 4, "") for key in ("fid", "kid", "recall")]

    monkeypatch.setitem(scores.METRICS, "inception", by_inception)
    monkeypatch.setattr(scores.inception, "find_weights", lambda: ROOT)
    found = scores.distances(["kid", "fid"], np.zeros((4, 8, 8, 1), np.uint8), None, Options())
    assert [score.key for score in found] == ["fid", "kid"] and len(asked) == 1
    none = scores.Score("fid", "FID", None, None, 4, 4, "not computed: fewer than 10 images")
    monkeypatch.setitem(scores.METRICS, "inception", lambda *_: [none])
    with pytest.raises(ValueError, match="got metric='kid', not computed: fewer"):
        scores.distances(["kid"], np.zeros((4, 8, 8, 1), np.uint8), None, Options())


# --------------------------------------------------------------------------------------------------- findings


def test_the_errors_of_independent_estimates_add_up_in_squares() -> None:
    assert sampling.mean_interval([1, 3], [0, -1], [4, 7]) == (2, 2 - np.sqrt(1 + 16) / 2, 2 + np.sqrt(9 + 16) / 2)
    value, low, high = sampling.mean_interval([5] * 4, [3] * 4, [9] * 4)  # four times the images, half the error
    assert (value, low, high) == (5, 4, 7)


def test_rows_of_a_setting_are_pooled_over_sets() -> None:
    setting = dict(zip(sampling.SETTING, ("ddim", 5, 1.0, "trailing", None), strict=True))
    distance = {"fwd": 1.0, "fwd_low": 0.0, "fwd_high": 2.0, "fwd_floor": 0.1}
    rows = [
        setting | {"first": 0, "count": 8, "evaluations": 5, "seconds_per_image": s} | distance | {"fwd": value}
        for s, value in ((1.0, 1.0), (9.0, 1.5), (2.0, 0.5))
    ]
    table = sampling.pooled(rows, "fwd")
    (row,) = table.to_dict("records")
    assert (row["solver"], row["sets"], row["seconds_per_image"], row["fwd"]) == ("ddim, eta 1", 3, 2.0, 1.0)
    assert row["fwd_floor"] == 0.1 and "fd" not in row
    picked = sampling.picked(table, [setting | {"steps": 6}, setting])
    pd.testing.assert_frame_equal(picked, table)
    assert sampling.picked(table, []).empty
    shown = sampling.columns(table, "fwd", "FWD").iloc[0]
    assert (shown["network"], shown["ms per image"], shown["FWD"]) == (5, 2000, 1.0) and shown["low"] < 1 < shown[
        "high"
    ]


def test_kid_is_shown_by_its_name_and_1000_fold_wherever_it_is() -> None:
    ends = ("", "_low", "_high", "_floor")
    table = pd.DataFrame({key + end: [0.002] for key in ("kid", "kid_efficientnet", "fwd") for end in ends})
    for key in ("kid", "kid_efficientnet"):
        name, shown = scores.shown(table, key)
        assert name.startswith("KID") and "(x 1000)" in name
        assert all(np.isclose(shown[key + end], 2).all() for end in ends) and shown.fwd.item() == 0.002
    assert scores.shown(table, "fwd", 3)[0] == "FWD, level 3" and scores.shown(table, "fwd")[1].equals(table)
    assert scores.shown(table, "train_loss")[0] == "train_loss"
    without = scores.shown(table.assign(kid_floor=[None]), "kid")[1]  # too few images for a floor
    assert np.isnan(without.kid_floor).all()


def test_a_summary_has_the_ends_of_the_intervals() -> None:
    ends = {"fwd": [1.0, 2.0], "fwd_low": [0.9, 1.7], "fwd_high": [1.2, 2.2]}
    (row,) = sweeps.summary(pd.DataFrame({"variant": ["a", "a"], **ends}), "fwd").to_dict("records")
    assert (row["mean"], row["low"], row["high"]) == (1.5, 0.9, 2.2)


@pytest.mark.parametrize(
    ("low", "fewest"),
    [
        ([3.0, 0.5, 0.4, 0.3], 10),
        ([0.5, 0.5, 0.4, 1.0], 5),  # an end that just touches is within
        ([0.5, 3.0, 0.4, 0.3], 20),  # a lucky number at few steps does not count
        ([0.1, 0.1, 0.1, 1.1], None),
    ],
)
def test_within_noise_is_from_there_on(low, fewest) -> None:
    table = pd.DataFrame(
        {"solver": "ddim", "steps": [5, 10, 20, 40], "fwd_low": low, "evaluations": 1, "seconds_per_image": 1}
    )
    reference = {"fwd_high": 1.0, "evaluations": 1, "seconds_per_image": 1}
    for order in (table, table[::-1]):
        assert sampling.fewest_steps(order, reference, "fwd")[0]["fewest steps"] == fewest


def test_what_fewer_steps_save_is_counted_against_the_reference() -> None:
    rows = [
        {"solver": "ddim", "steps": n, "fwd_low": low, "evaluations": n, "seconds_per_image": 2.0 * n}
        for n, low in ((5, 9.0), (10, 1.0))
    ]
    reference = {"fwd_high": 2.0, "evaluations": 100, "seconds_per_image": 100.0}
    (row,) = sampling.fewest_steps(pd.DataFrame(rows), reference, "fwd")
    assert (row["fewest steps"], row["evaluations saved"], row["time saved"]) == (10, "10-fold", "5-fold")
    (row,) = sampling.fewest_steps(pd.DataFrame(rows[:1]), reference, "fwd")
    assert (row["fewest steps"], row["time saved"]) == (None, "–")


# ----------------------------------------------------------------------------------------------- trajectories


def answering(pipeline, monkeypatch, answer) -> WaveletPipeline:
    sampler = WaveletPipeline(pipeline.backbone, build_solver("ddim", "sample", spacing="trailing"), pipeline.codec)
    sampler.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline.backbone, "forward", lambda noisy, t: SimpleNamespace(sample=answer(noisy, t)))
    return sampler


def test_a_network_that_knows_the_answer_decides_every_band_at_once(pipeline, monkeypatch) -> None:
    clean = 0.1 * torch.tensor([4.0, 3.0, 2.0, 1.0]).view(1, 4, 1, 1).expand(2, 4, 4, 4)
    found = sampling.along_trajectory(answering(pipeline, monkeypatch, lambda noisy, t: clean), 2, 5)
    assert found["times"].tolist() == [999, 799, 599, 399, 199]
    a = factors(noise_scheduler(), torch.tensor(found["times"]))[0].flatten().numpy()
    np.testing.assert_allclose(found["signal"], np.outer(a, [0.4, 0.3, 0.2, 0.1]), rtol=1e-5)
    np.testing.assert_allclose(found["change"], 0)
    np.testing.assert_allclose((found["noise"] ** 2).mean(1), 1 - a**2, rtol=0.2)  # of 128 draws of unit noise


def test_the_error_of_an_estimate_is_relative_to_the_spread(pipeline, monkeypatch) -> None:
    codec = pipeline.codec
    z = codec.encode(torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1)
    means, spread = z.mean(0), (z - z.mean(0)).square().mean((0, 2, 3)).sqrt().numpy()
    sampler = answering(pipeline, monkeypatch, lambda noisy, t: means.expand_as(noisy))
    np.testing.assert_allclose(sampling.denoising_error(sampler, IMAGES, [10, 900]), 1, rtol=1e-5)
    sampler = answering(pipeline, monkeypatch, lambda noisy, t: noisy)  # takes all noise for signal
    found = sampling.denoising_error(sampler, IMAGES, [999])
    wanted = np.sqrt(1 + np.square(z.numpy()).mean((0, 2, 3))) / spread  # a_999 is next to 0
    np.testing.assert_allclose(found[0], wanted, rtol=0.15)


# ------------------------------------------------------------------------------------------------------ sweeps


def finished_run(root: Path, name: str, state: str = "ok", parameters: str = "level: 1\n", **metrics) -> None:
    folder = root / "reports" / name
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "status.json", {"04_evaluate": {"state": state}})
    (folder / "params.yaml").write_text(parameters)


def test_runs_that_ended_are_collected_and_the_others_named(tmp_path) -> None:
    for level, seed in itertools.product((1, 2), (0, 1)):
        finished_run(tmp_path, f"a-level={level}-seed={seed}", parameters=f"level: {level}\nseed: {seed}\n", fwd=level)
    finished_run(tmp_path, "a-level=3", state="failed", fwd=0)
    found, absent = collect(tmp_path, ["a-level=2*", "a-*", "a-level=3", "b"])
    assert [run.name for run in found][:2] == ["a-level=2-seed=0", "a-level=2-seed=1"] and len(found) == 4
    assert absent == ["a-level=3", "b"]
    assert {run.variant for run in found} == {"level 1", "level 2"}
    assert sweeps.differences(found).to_dict("records") == [
        {"variant": "level 2", "runs": 2, "level": 2},
        {"variant": "level 1", "runs": 2, "level": 1},
    ]
    finished_run(tmp_path, "a-level=1-seed=2", parameters="level: 1\nseed: 2\ntrain_kimg: 9\n", fwd=1)
    finished_run(tmp_path, "a-level=1-seed=2", parameters="level: 1\nseed: 2\ntrain_kimg: 9\n", fwd=1)
    mixed = sweeps.differences(collect(tmp_path, ["a-*"])[0]).set_index("variant")  # and it shows
    assert mixed.train_kimg["level 1"] == "None / 9" and pd.isna(mixed.train_kimg["level 2"])
    shutil.rmtree(tmp_path / "reports/a-level=1-seed=2")
    finished_run(tmp_path, "b-level=1")
    found, _ = collect(tmp_path, ["*"])
    assert {run.variant for run in found} == {"a, level 1", "a, level 2", "b, level 1"}
    finished_run(tmp_path, "plain")
    assert [run.variant for run in collect(tmp_path, ["plain"])[0]] == ["plain"]
    none = ["a-level=3", "c", "", "/a", "../a", str(tmp_path / "reports/plain")]  # names that no run can have, too
    with pytest.raises(ValueError, match="got no finished runs like a-level=3, c"):
        collect(tmp_path, none)
    assert collect(tmp_path, ["plain", *none])[1] == none


def test_a_run_that_another_hand_has_made_again_is_not_compared(tmp_path) -> None:
    """For instance 04 at another level, in JupyterLab: its numbers are no longer those of its params.yaml."""

    def made(name: str, notebook: str, **parameters) -> None:
        (tmp_path / "runs/x").mkdir(parents=True, exist_ok=True)
        book = Run("x", tmp_path, tmp_path / "runs/x", tmp_path / "reports/x", notebook, parameters)
        book.made(name, tmp_path / "reports/x/params.yaml")

    finished_run(tmp_path, "x", parameters="fwd_level: null\ntrain_kimg: 2.0\n", fwd=1)
    made("metrics", "04_evaluate", fwd_level=None)
    made("pipeline", "02_train", train_kimg=9.0)  # which is not in its report
    assert len(collect(tmp_path, ["x"])[0]) == 1
    made("metrics", "04_evaluate", fwd_level=1)
    with pytest.raises(ValueError, match="got x, whose 04_evaluate ran again with fwd_level 1, wanted it as in its"):
        collect(tmp_path, ["x"])


def runs_of(values: dict[str, list[float]], **more) -> list[Finished]:
    return [
        Finished(f"{name}-{k}", name, {"seed": k}, {"fwd": value, "fwd_floor": 0.5, **more}, {})
        for name, each in values.items()
        for k, value in enumerate(each)
    ]


def test_variants_are_summed_up_over_seeds_best_first() -> None:
    table = sweeps.everything(runs_of({"worse": [2.0, 4.0], "better": [1.0]}), "fwd")
    first, second = sweeps.summary(table, "fwd").to_dict("records")
    assert (first["variant"], first["mean"], first["over the floor"]) == ("better", 1.0, 2.0)
    assert (second["mean"], second["minimum"], second["maximum"], second["over the best"]) == (3.0, 2.0, 4.0, 3.0)
    assert np.isnan(sweeps.summary(table.drop(columns="fwd_floor"), "fwd")["over the floor"]).all()


def test_what_cannot_be_compared_is_told_in_one_line() -> None:
    runs = runs_of({"a": [1.0], "b": [2.0]}, fid=None, kid_efficientnet=0.1)
    lacking = replace(runs[1], metrics={})
    assert sweeps.everything([runs[0], lacking], "fwd").fwd.isna().tolist() == [False, True]
    with pytest.raises(ValueError, match="got 1 finished run, a-0, wanted two or more to compare: name others"):
        sweeps.everything(runs[:1], "fwd")
    for metric, hint in (
        ("kid_eficientnet", "did you mean 'kid_efficientnet'"),
        ("fwdd", "did you mean 'fwd'"),
        ("fid", ""),  # which none of them has
        ("loss", "choose one"),
    ):
        wanted = f"got metric='{metric}', wanted one of fwd, fwd_floor, kid_efficientnet: {hint}"
        with pytest.raises(ValueError, match=wanted):
            sweeps.everything(runs, metric)


def test_curves_are_means_over_equal_parts_of_log_images() -> None:
    logs = [[{"images_seen": n, "loss": 10 * n + k} for n in (1, 2, 10, 20, 100)] for k in (0, 1)]
    found = sweeps.curve(logs, "loss", points=2)  # 1 to 101: parts end at 10.05
    np.testing.assert_allclose(found.kimg, [13 / 3000, 60 / 1000])
    np.testing.assert_allclose(found[["loss_low", "loss_high"]].T, [[130 / 3, 600], [130 / 3 + 1, 601]])
    np.testing.assert_allclose(found.loss, [130 / 3 + 0.5, 600.5])
    logs[1] = [row for row in logs[1] if row["images_seen"] < 20]
    assert sweeps.curve(logs, "loss", points=2).kimg.tolist() == [pytest.approx(13 / 3000)]  # of what both have
    assert len(sweeps.curve(logs, "fwd")) == 0
    logs[0][0]["fwd"] = None
    assert len(sweeps.curve(logs, "fwd")) == 0


def test_curves_over_seconds_follow_the_logs(tmp_path) -> None:
    runs = runs_of({"a": [1.0, 1.0]})
    for run, rate in zip(runs, (10, 30), strict=True):
        folder = tmp_path / "runs" / run.name
        folder.mkdir(parents=True)
        rows = ({"images_seen": n, "images_per_s": rate} for n in (300, 600))  # 30, 60 s and 10, 20 s
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = sweeps.everything(runs, "fwd")
    found = sweeps.learning(tmp_path, table, "images_per_s")
    np.testing.assert_allclose(found.kimg, [0.3, 0.6])
    np.testing.assert_allclose(found.seconds, [(30 + 10) / 2, (60 + 20) / 2])
    np.testing.assert_allclose(found[["images_per_s_low", "images_per_s_high"]], [[10, 30], [10, 30]])
    assert found.legend.tolist() == ["a (2)"] * 2


def test_a_variant_has_reached_another_once_all_its_seeds_are_as_near() -> None:
    seeds = {
        "slow": [[9, 6, 3], [9, 6, 5]],  # 4 in the end
        "fast": [[5, 3, 1], [4, 4, 2]],
        "never": [[9, 9, 3], [9, 9, 5]],
    }
    logs = {name: [[{"images_seen": 1000 * 2**k, "images_per_s": 10, "fwd": x} for k, x in enumerate(each)]
                   for each in both] for name, both in seeds.items()}  # fmt: skip
    curves = pd.concat([sweeps.curve(both, "fwd").assign(variant=name) for name, both in logs.items()])
    rows = sweeps.reaching(curves, "fwd", "slow")
    assert [row["kimg"] for row in rows] == [4, 2, None]
    assert [row["share of kimg"] for row in rows] == [1, 0.5, None]
    assert [row["in the end"] for row in rows] == [4, 1.5, 4] and [row["seeds"] for row in rows] == [2, 2, 2]
    assert sweeps.reaching(curves, "fwd", "slow", "seconds")[1]["seconds"] == 200
    with pytest.raises(ValueError, match="got reference='other', wanted one of slow, fast, never"):
        sweeps.reaching(curves, "fwd", "other")


def test_runs_of_different_sets_are_not_compared() -> None:
    digits, patches = Path("data/digits-16-aa"), Path("data/patches-16-bb")
    assert sweeps.one_set([digits, digits]) == digits
    with pytest.raises(ValueError, match="got runs of 2 prepared sets, digits-16-aa, patches-16-bb, wanted one"):
        sweeps.one_set([digits, digits, patches])


# --------------------------------------------------------------------------------------------------- notebooks


def run(root: Path, *arguments: str) -> str:
    done = wddm(root, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def saved(report: Path, name: str) -> list[dict]:
    """Rows of <name>.csv; what is empty there is None."""
    table = pd.read_csv(report / f"{name}.csv", float_precision="round_trip").astype(object)
    return table.where(table.notna(), None).to_dict("records")


def is_clean(page: Path) -> bool:
    text = page.read_text()
    return "Traceback (most" not in text and "Warning" not in text and "it/s]" not in text


@pytest.fixture(scope="module")
def prepared(root) -> data.Dataset:
    return data.prepare("digits", 16, root / "data", limit=200, progress=False)


def leave_data(root: Path, name: str, prepared: data.Dataset) -> None:
    """What 01_prepare leaves of a run."""
    book = Run(name, root, root / "runs" / name, root / "reports" / name, "01_prepare")
    book.made("data", prepared.folder / "manifest.json")


def save_pipeline(
    folder: Path, level: int, num_class_embeds: int | None = None, predicts: str = "v_prediction"
) -> WaveletPipeline:
    """Save the pipeline of a network that has learned nothing."""
    torch.manual_seed(0)
    backbone = build_backbone("unet", dataset="digits", level=level, widths=(32,), num_class_embeds=num_class_embeds)
    codec = WaveletCodec("haar", level, scaling="dyadic")
    made = WaveletPipeline(backbone, build_solver(default_solver(predicts), predicts), codec)
    made.save_pretrained(folder)
    return made


@pytest.mark.slow
def test_sampling_dynamics_is_measured_once_and_written_down(root, prepared) -> None:
    leave_data(root, "dynamics", prepared)
    save_pipeline(root / "runs/tiny/pipeline", 1)
    (root / "params/dynamics.yaml").write_text(
        "notebooks: [analysis/sampling_dynamics]\nmodel_dir: runs/tiny/pipeline\nsolvers: [ddim, heun, ddpm]\n"
        "steps: [2, 4]\nband_steps: [2, 3]\nreference_steps: 4\nsets: 2\nnum_samples: 40\nspacing_solvers: [ddim]\n"
    )
    run(root, "run", "params/dynamics.yaml")
    report, cells = root / "reports/dynamics", root / "runs/dynamics/cells.jsonl"
    rows, measured = saved(report, "settings"), read_rows(cells)
    # ddim with eta 0 and 1, heun and ddpm, at 2 and 4 steps; two spacings more; a pair of bands each way and the 3
    assert len(rows) == 8 + 4 + 3 and len(measured) == 2 * len(rows)
    for row in rows:
        setting = {name: row[name] for name in sampling.SETTING}
        both = [one["found"] for one in measured if setting.items() <= one["cell"].items()]
        assert row["fwd"] == pytest.approx(np.mean([found["fwd"] for found in both]))
        assert row["fwd_low"] < row["fwd"] < row["fwd_high"] and row["fwd_floor"] > 0
    evaluations = {(row["solver"], row["steps"]): row["evaluations"] for row in rows if not row["detail_steps"]}
    assert (evaluations["heun", 4], evaluations["ddim", 4], evaluations["ddpm", 4]) == (7, 4, 4)
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["settings"] == len(rows) and metrics["reference_fwd"] in [row["fwd"] for row in rows]
    assert len(saved(report, "trajectory")) == 4 * 4 and len(saved(report, "denoising")) == 19 * 4
    figures = {path.stem for path in (report / "figures").glob("*.png")}
    assert figures >= {"solvers-fwd", "costs-fwd", "spacing-fwd", "band-rate-fwd", "change", "denoising"}
    assert is_clean(report / "sampling_dynamics.html")
    page = (report / "sampling_dynamics.html").read_text()
    table = page[page.index("Every solver, and the reference in the last line") :].partition("</table>")[0]
    shown = [re.findall(r"<td[^>]*>([^<]*)", row)[:2] for row in table.split("<tr>")[2:]]
    assert len(shown) == 8 and shown[-2:] == [["ddpm", "2"], ["ddpm", "4"]]
    before = cells.read_bytes()
    run(root, "run", "params/dynamics.yaml", "--force")
    assert cells.read_bytes() == before and saved(report, "settings") == rows  # timings too: nothing was measured anew


@pytest.mark.slow
def test_sampling_dynamics_ends_where_no_solver_knows_the_target(root, prepared) -> None:
    leave_data(root, "flowing", prepared)
    save_pipeline(root / "runs/flow/pipeline", 1, predicts="flow_prediction")
    (root / "params/flowing.yaml").write_text(
        "notebooks: [analysis/sampling_dynamics]\nmodel_dir: runs/flow/pipeline\nsolvers: [ddim]\nsteps: [2]\n"
        "band_steps: []\nreference_steps: 3\nsets: 1\nnum_samples: 20\nspacing_solvers: [ddim]\n"
    )
    run(root, "run", "params/flowing.yaml")
    metrics = json.loads((root / "reports/flowing/metrics.json").read_text())
    assert metrics["fwd_best"] is None and metrics["reference_fwd"] > 0
    page = (root / "reports/flowing/sampling_dynamics.html").read_text()
    assert "Not compared: spacing_solvers names none that could be sampled." in page
    assert "bars and shades: 90 % intervals" in page and "bootstrap" not in page  # those of KID are by a jackknife


@pytest.fixture(scope="module")
def compared(root, prepared) -> Path:
    """The workbook with three finished runs, and both summaries of them in one report."""
    for level, seed in ((0, 0), (1, 0), (1, 1)):
        name, folder = f"depth-level={level}-seed={seed}", root / "runs" / f"depth-level={level}-seed={seed}"
        leave_data(root, name, prepared)
        network = save_pipeline(folder / "pipeline", level).backbone
        noise = np.random.default_rng(seed).normal(0, 40 - 10 * level, (40, 16, 16, 1))
        samples = np.clip(prepared.images[:40] + noise, 0, 255).astype(np.uint8)
        np.save(folder / "samples.npy", samples)
        for k in range(1, 5):
            row = {"step": k, "images_seen": 100 * k, "images_per_s": 50, "loss": 1 / k, "fwd": 9 / (k + level)}
            row |= {"kid_efficientnet": 0.009 / (k + level) - 0.002}
            append_row(folder / "log.jsonl", row | {"band_loss": {"A": 0.2, "H": 0.4, "V": 0.6}})
        (score,) = wavelet(samples, prepared, Options(2))
        kid = {"kid_efficientnet": 0.02 - 0.01 * level, "kid_efficientnet_floor": -0.0001}
        kid |= {f"kid_efficientnet_{end}": kid["kid_efficientnet"] for end in ("low", "high")}
        metrics = score.record() | kid | {"parameters": network.num_parameters(), "train_images": 400}
        parameters = f"level: {level}\nseed: {seed}\nwavelet: haar\ntransform: packet\nscaling: band\n"
        parameters += f"prediction_type: {('sample', 'v_prediction', 'epsilon')[level + seed]}\nwidths: [8, 16]\n"
        finished_run(root, name, parameters=parameters)
        write_json(root / "reports" / name / "metrics.json", metrics)
        write_json(root / "reports" / name / "timings.json", {"train_images_per_s": 50})
    trained = (root / "notebooks/02_train.ipynb").read_text()
    assert all(f"    {key}=" in trained for key in ("parameters", "train_images", "train_images_per_s"))  # as here
    (root / "params/side.yaml").write_text(
        "notebooks: [analysis/wavelet_depth, analysis/compare]\nruns: [depth-level=*, nothing]\nclock: true\n"
        "fwd_level: 2\nreference: level 0\n"
    )
    run(root, "run", "params/side.yaml")
    return root


@pytest.mark.slow
def test_wavelet_depth_says_what_was_spent_and_where_it_falls_short(compared) -> None:
    report = compared / "reports/side"
    rows = {row["run"]: row for row in saved(report, "depth")}
    assert len(rows) == 3 and {row["variant"] for row in rows.values()} == {"level 0", "level 1"}
    for name, row in rows.items():
        metrics = json.loads((compared / "reports" / name / "metrics.json").read_text())
        assert row["fwd"] == metrics["fwd"] and row["train_flops"] == 3 * row["forward_flops"] * row["train_images"]
    pixels, wavelets = (rows[f"depth-level={level}-seed=0"] for level in (0, 1))
    assert pixels["forward_flops"] / wavelets["forward_flops"] == pytest.approx(4, rel=0.1)
    packets = {row.pop("variant"): list(row.values()) for row in saved(report, "packets")}
    assert set(packets) == {"level 0", "level 1", "real images"} and {len(each) for each in packets.values()} == {16}
    assert np.mean(packets["level 0"]) == pytest.approx(pixels["fwd"])  # the FWD is their mean
    assert json.loads((report / "metrics.json").read_text())["fwd_best"] > 0
    assert {"depth", "packets", "samples"} <= {path.stem for path in (report / "figures").glob("*.png")}
    assert is_clean(report / "wavelet_depth.html")


@pytest.mark.slow
def test_target_and_depth_ranks_targets_at_every_level(compared) -> None:
    (compared / "params/target.yaml").write_text(
        "notebooks: [analysis/target_and_depth]\nruns: [depth-level=*]\nfwd_level: 2\n"
    )
    run(compared, "run", "params/target.yaml")
    report = compared / "reports/target"
    rows = {(row["level"], row["target"]): row for row in saved(report, "targets")}
    assert set(rows) == {(0, "sample"), (1, "v_prediction"), (1, "epsilon")}
    ranked = saved(report, "ranking")
    near, far = sorted(("v_prediction", "epsilon"), key=lambda target: rows[1, target]["fwd"])
    assert [row["level"] for row in ranked] == [1, 1]  # of a level with one target there is nothing to say
    last = [ranked[-1][key] for key in ("best", "next", "its distance", "next's distance")]
    assert last == [near, far, *(pytest.approx(rows[1, target]["fwd"]) for target in (near, far))]
    figures = {path.stem for path in (report / "figures").glob("*.png")}
    assert figures >= {"fwd", "kid_efficientnet", "learning-fwd-unet-wide", "samples-level-1-unet-wide"}
    assert is_clean(report / "target_and_depth.html")


@pytest.mark.slow
def test_targets_of_different_sets_are_not_averaged(compared, prepared) -> None:
    name = "other-level=1-seed=0"
    for place in ("runs", "reports"):
        shutil.copytree(compared / place / "depth-level=1-seed=1", compared / place / name)
    leave_data(compared, name, data.prepare("digits", 16, compared / "data", limit=100, progress=False))
    (compared / "params/sets.yaml").write_text(
        f"notebooks: [analysis/target_and_depth]\nruns: [depth-level=1-seed=1, {name}]\nmetric: fwd\n"
    )
    done = wddm(compared, "run", "params/sets.yaml")
    assert done.returncode == 1 and "got runs of 2 prepared sets" in done.stdout


@pytest.mark.slow
def test_targets_that_were_measured_at_the_end_alone(compared) -> None:
    for seed in (0, 1):
        name = f"end-level=1-seed={seed}"
        for place in ("runs", "reports"):
            shutil.copytree(compared / place / f"depth-level=1-seed={seed}", compared / place / name)
        log = compared / "runs" / name / "log.jsonl"
        log.write_text(log.read_text().replace('"fwd"', '"_"').replace('"kid_efficientnet"', '"_"'))
    (compared / "params/end.yaml").write_text(
        "notebooks: [analysis/target_and_depth]\nruns: [end-*]\nmetric: fwd\nfwd_level: 2\n"
    )
    assert "Not measured on the way, but at the end alone." in run(compared, "run", "params/end.yaml")


@pytest.mark.slow
def test_compare_sets_any_runs_side_by_side(compared) -> None:
    report = compared / "reports/side"
    rows = saved(report, "runs")
    assert [row["level"] for row in rows] == [0, 1, 1] and [row["seed"] for row in rows] == [0, 0, 1]
    assert all(row["fwd_low"] < row["fwd"] < row["fwd_high"] for row in rows)
    means = {np.mean([row["fwd"] for row in rows if row["level"] == level]) for level in (0, 1)}
    assert json.loads((report / "metrics.json").read_text())["fwd_best"] == pytest.approx(min(means))
    figures = {path.stem for path in (report / "figures").glob("*.png")}
    assert figures >= {"loss", "learning-fwd", "learning-kid_efficientnet-seconds", "variants", "samples"}
    page = (report / "compare.html").read_text()
    assert "no finished runs: nothing" in page and is_clean(report / "compare.html")
    kid = page.index("KID, EfficientNet-Lite0 on ImageNet, not Inception (x 1000) by variant")
    assert kid < page.index("FWD by variant")
    for key, end in ("fwd", 9 / 4), ("kid_efficientnet", 1000 * (0.009 / 4 - 0.002)):
        reached = {row["variant"]: row for row in saved(report, f"reached-{key}")}
        assert (reached["level 0"]["kimg"], reached["level 1"]["kimg"]) == (0.4, 0.3)
        assert reached["level 0"]["in the end"] == pytest.approx(end)


@pytest.mark.slow
def test_the_floor_of_some_is_not_drawn_for_runs_of_other_numbers(compared) -> None:
    for count in (20, 40):
        name = f"few-num_samples={count}"
        for place in ("runs", "reports"):
            shutil.copytree(compared / place / "depth-level=1-seed=0", compared / place / name)
        (parameters := compared / "reports" / name / "params.yaml").write_text(
            parameters.read_text() + f"num_samples: {count}\n"
        )
    (compared / "params/few.yaml").write_text("notebooks: [analysis/compare]\nruns: [few-*]\n")
    told = run(compared, "run", "params/few.yaml")
    assert "Floors differ, as num_samples do: they stand in the tables alone" in told


@pytest.mark.slow
def test_guidance_is_measured_for_all_bands_and_for_some_alone(root, prepared) -> None:
    leave_data(root, "guided", prepared)
    save_pipeline(root / "runs/asked/pipeline", 1, num_class_embeds=11)
    (root / "params/guided.yaml").write_text(
        "notebooks: [analysis/guidance]\nmodel_dir: runs/asked/pipeline\nweights: [1.0, 2.0]\nsampling_steps: 2\n"
        "num_samples: 40\n"
    )
    run(root, "run", "params/guided.yaml")
    rows = saved(root / "reports/guided", "guidance")
    assert [(row["weight"], row["coarse"], row["details"]) for row in rows] == [
        (1, 1, 1), (2, 2, 2), (1, 1, 1), (2, 2, 1), (1, 1, 1), (2, 1, 2),
    ]  # fmt: skip
    assert [row["evaluations"] for row in rows] == [2, 4] * 3
    assert len({row["fwd"] for row in rows}) == 4 and all("asked_share" in row for row in rows)
    assert is_clean(root / "reports/guided/guidance.html")
    page = (root / "reports/guided/guidance.html").read_text()
    assert "KID, EfficientNet-Lite0" in page and "e+03 " not in page  # but 1,234, as in every table


@pytest.mark.slow
def test_guidance_of_a_model_of_pixels_without_a_judge(root) -> None:
    images, labels = IMAGES.repeat(2, 1).repeat(2, 2), [0, 1] * 11 + [0, 2]  # too few of a class for a classifier
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder := root / f"classes/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{number}.png")
    classes = data.prepare("folder", 16, root / "data", dataset_path=root / "classes", progress=False)
    leave_data(root, "pixels", classes)
    save_pipeline(root / "runs/told/pipeline", 0, num_class_embeds=4)
    (root / "params/pixels.yaml").write_text(
        "notebooks: [analysis/guidance]\nmodel_dir: runs/told/pipeline\nweights: [1.0, 2.0]\nsampling_steps: 2\n"
        "num_samples: 20\n"
    )
    run(root, "run", "params/pixels.yaml")
    rows = saved(root / "reports/pixels", "guidance")
    assert [(row["guided"], row["coarse"]) for row in rows] == [("all bands", 1), ("all bands", 2)]
    assert rows[0]["fwd"] != rows[1]["fwd"] and is_clean(root / "reports/pixels/guidance.html")
    assert "confident_share" not in rows[0] and (root / "reports/pixels/figures/fwd.png").exists()


@pytest.mark.slow
def test_a_study_refuses_images_that_are_not_those_of_their_manifest(root, prepared) -> None:
    """Otherwise its numbers would be kept as the set's, and used when the set is whole again."""
    save_pipeline(root / "runs/told/pipeline", 1, 11)
    leave_data(root, "damaged", prepared)
    (root / "params/damaged.yaml").write_text(
        "notebooks: [analysis/guidance]\nmodel_dir: runs/told/pipeline\nweights: [1.0]\nnum_samples: 80\n"
        "sampling_steps: 1\nfwd_level: 1\n"
    )
    file = prepared.folder / "images.npy"
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-2560] + bytes(2560))  # ten images are black
        done = wddm(root, "run", "params/damaged.yaml")
    finally:
        file.write_bytes(before)
    assert done.returncode == 1 and "the sha256 of images.npy is not the one in the manifest" in done.stdout


@pytest.mark.slow
def test_restoration_agrees_with_what_is_known_of_images_that_were_held_out(root, prepared) -> None:
    (root / "params/restored.yaml").write_text(
        "notebooks: [01_prepare, analysis/restoration]\nmodel_dir: runs/second/pipeline\nlimit: 200\nnum_samples: 18\n"
        "sampling_steps: 2\nsteps: [1, 2]\netas: [0.0]\nanswers: 2\nsampling_batch_size: 8\n"
    )
    save_pipeline(root / "runs/second/pipeline", 2)
    run(root, "run", "params/restored.yaml")
    report = root / "reports/restored"
    rows = {(row["task"], row["method"]): row for row in saved(report, "restoration")}
    tasks = {"enlarged 2x", "enlarged 4x", "left half", "all but the centre", "blocks"}
    assert rows.keys() == {("true images", "true images"), *itertools.product(tasks, ("plain", "restored"))}
    for task in tasks:
        plain, restored = rows[task, "plain"], rows[task, "restored"]
        assert restored["psnr"] < plain["psnr"] and restored["network"] == 16  # it has learned nothing
        true = rows["true images", "true images"]["fwd"]
        if plain["fwd"] > true:
            assert restored["fwd_excess"] == pytest.approx((restored["fwd"] - true) / (plain["fwd"] - true))
        else:  # nothing to be better than
            assert restored["fwd_excess"] is None
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["held_out_copies"] == 200  # the training set itself, found again by content
    assert [row["evaluations"] for row in saved(report, "price")] == [8, 16]
    figures = {path.stem for path in (report / "figures").glob("*.png")}
    assert {"enlarged-2x", "enlarged-4x", "left-half", "blocks", "answers-left-half", "price-fwd"} <= figures
    assert (
        is_clean(report / "restoration.html")
        and "restored with ddim, 2 steps" in (report / "restoration.html").read_text()
    )
    done = wddm(root, "run", "params/restored.yaml", "--force", num_samples=900)
    assert done.returncode == 1 and "held-out images, wanted 1800" in done.stdout


@pytest.mark.slow
def test_restoration_refuses_a_model_of_another_set_wherever_it_lies(root, prepared) -> None:
    """From home, too: it may have been trained on the images that are said to be held out."""
    save_pipeline(root / "elsewhere", 1)
    write_json(root / "elsewhere/training.json", {"data_sha256": "of another set"})
    text = "notebooks: [01_prepare, analysis/restoration]\nmodel_dir: ~/elsewhere\nlimit: 200\nnum_samples: 18\n"
    (root / "params/from-home.yaml").write_text(text + "sampling_steps: 1\nsteps: [1]\nanswers: 1\n")
    done = as_process("wddm", "run", "params/from-home.yaml", root=root, HOME=str(root))
    assert done.returncode == 1 and "got ~/elsewhere, trained on another set than that of 01_prepare" in done.stdout
