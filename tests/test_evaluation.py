"""scores.py: the metrics of METRICS are those of the other modules, kept by content; images from elsewhere."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from wddm import data
from wddm.cli import main
from wddm.metrics import diagnostics, frechet, scores
from wddm.metrics.scores import Options
from wddm.sampling import read_images, write_images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workbook's folder with digits prepared in it."""
    folder = tmp_path_factory.mktemp("workbook")
    for name in ("notebooks", "params"):
        (folder / name).mkdir()
    prepared = data.prepare("digits", 16, folder / "elsewhere", limit=600, progress=False)
    shutil.copytree(prepared.folder, folder / "data/digits-16-0123abcd")
    return folder


@pytest.fixture(scope="module")
def digits(root):
    return data.load(root / "data/digits-16-0123abcd")


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.fixture
def samples(digits, tmp_path):
    """A folder of 150 PNGs, half of them turned round."""
    images = np.array(digits.images[:150])
    images[::2] = images[::2, ::-1]
    write_images(tmp_path, images)
    (tmp_path / "grid.png").write_bytes(b"not one of them")
    return tmp_path


def evaluate(folder, *options) -> int:
    return main(["evaluate", "--images", str(folder), "--output", str(folder / "metrics.json"), *map(str, options)])


# ----------------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
def test_large_images_are_compared_at_a_level_of_their_own(digits, monkeypatch) -> None:
    """A packet of 256 x 256 pixels has 64 values at level 5; at level 2 it has 4,096, and FWD needs more images."""
    monkeypatch.setattr(scores, "RESAMPLES", 0)
    images = np.random.default_rng(0).integers(0, 256, (70, 256, 256, 1), np.uint8)
    large = replace(digits, images=images, labels=None)
    with pytest.raises(ValueError, match="got 63 images for packets of 64 values"):
        scores.evaluate(images[:63], large)
    (score,) = scores.wavelet(np.minimum(images, 254), large, Options())
    assert score.name == "FWD, level 5" and score.detail.per_packet.shape == (1024,) and 0 < score.value < 1


def test_what_depends_on_the_reference_is_kept_under_its_hash(digits, monkeypatch) -> None:
    samples = np.array(digits.images[:100])
    (first,) = scores.wavelet(samples, digits, Options(2))
    name = digits.manifest["sha256"]["images"][:16]
    assert {path.name for path in (digits.folder / ".statistics").glob("*fwd-level2*")} == {
        f"{name}-fwd-level2-moments-{scores.CODE}.npz", f"{name}-fwd-level2-floors-100-0-{scores.CODE}.npz",
    }  # fmt: skip
    monkeypatch.setattr(frechet, "moments", lambda *a, **k: pytest.fail("measured the reference again"))
    monkeypatch.setattr(frechet, "split_floor", lambda *a, **k: pytest.fail("measured the floor again"))
    (again,) = scores.wavelet(samples, digits, Options(2))
    assert (again.record(), again.row()) == (first.record(), first.row())
    other = data.Dataset(digits.images, None, None, {"sha256": {"images": "f" * 64}}, digits.folder)
    with pytest.raises(pytest.fail.Exception, match="reference again"):
        scores.wavelet(samples, other, Options(2))
    monkeypatch.setattr(scores, "CODE", "other")  # an edited metric beside a floor of before would be no comparison
    with pytest.raises(pytest.fail.Exception, match="reference again"):
        scores.wavelet(samples, digits, Options(2))


def test_the_share_of_samples_of_which_a_classifier_is_sure(digits) -> None:
    real = np.array(digits.images)
    noise = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 1), dtype=np.uint8)
    (sure,), (doubtful,) = (scores.classifier(samples, digits, Options(seed=1)) for samples in (real[:100], noise))
    vectors = diagnostics.pixels(real, 16)
    verdict = diagnostics.judge(vectors[:100], vectors, digits.labels, seed=1)
    assert sure.key == "confident_share" and sure.value == np.mean(verdict.confidence >= verdict.threshold) > 0.8
    assert doubtful.value < 0.1 and doubtful.floor.value == pytest.approx(0.9, abs=0.02)
    assert sum(sure.detail.class_counts.values()) == 100 and sure.detail.classes_seen == 10
    assert f"classifier of pixels, right on {verdict.accuracy.value:.1%} of 150 held-out images" in sure.protocol
    cycle = list(range(9, -1, -1))
    real = np.stack([real[np.flatnonzero(digits.labels == label)[n]] for n in range(5) for label in cycle])
    for labels, right in ((cycle, 0.9), (np.roll(cycle, 1).tolist(), 0.0)):  # found always, or never
        asked = scores.classifier(real, digits, Options(seed=1, labels=labels))[1]
        assert asked.key == "asked_share" and abs(asked.value - right) <= 0.1 and asked.floor == verdict.accuracy
    (unlabelled,) = scores.classifier(noise, replace(digits, labels=None), Options())
    assert unlabelled.record() == {} and "no labels" in unlabelled.protocol


def test_every_metric_is_evaluated_and_a_new_one_is_an_entry(digits, monkeypatch, no_weights) -> None:
    made = scores.Score("share_black", "share of black images", None, None, 100, 600, "")
    monkeypatch.setitem(scores.METRICS, "black", lambda samples, reference, options: [made])
    found = scores.evaluate(np.array(digits.images[:100]), digits, Options(2, seed=5))
    names = ["perceptual", "wavelet", "classifier", "inception", "copies", "black"]
    assert list(found) == names and found["black"] == [made]
    assert [score.key for score in found["copies"]][:3] == ["nearest_distance", "copies_share", "memorised_share"]
    assert found["inception"][0].value is None


def test_scores_are_the_metrics_with_their_floor(digits) -> None:
    samples = np.array(digits.images[:100]) // 2
    (score,) = scores.wavelet(samples, digits, Options(2, seed=3))
    expected = frechet.frechet_wavelet_distance(digits.images, samples, 2, resamples=scores.RESAMPLES, seed=3)
    assert score.value == pytest.approx(expected.value, rel=1e-12)
    assert score.estimate == pytest.approx(expected.distance, rel=1e-9)
    floor = frechet.split_floor(digits.images, 2, 100, resamples=scores.RESAMPLES, seed=3)
    assert score.floor == pytest.approx(floor.distance, rel=1e-12)
    assert score.record() == {
        "fwd": score.value, "fwd_low": score.estimate.low, "fwd_high": score.estimate.high,
        "fwd_floor": score.floor.value, "fwd_floor_low": score.floor.low, "fwd_floor_high": score.floor.high,
    }  # fmt: skip
    assert (score.count, score.count_real) == (100, 600) and "seed 3" in score.protocol
    assert scores.fairness(100, digits).startswith("Fewer than 10,000")
    assert scores.fairness(10_000, digits).startswith("Scores: 10,000 samples")
    said = "100 samples against 600 real images; floors: 100 real images against the 500 others"  # (6/600) / (6/500)
    assert said in scores.fairness(100, digits) and "about 0.97 times" in scores.fairness(100, digits)
    assert "300 real images against the 300 others" in scores.fairness(900, digits)


def test_copies_are_told_from_strangers(digits) -> None:
    real = np.array(digits.images)
    noise = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 1), dtype=np.uint8)
    for samples, share in ((real[:50], 1.0), (noise, 0.0)):
        nearest, copied, memorised = scores.copies(samples, digits, Options())[:3]
        assert copied.value == memorised.value == share
        assert nearest.detail["distances"].shape == (50, 3) and nearest.detail["apart"].shape == (256, 2)
        assert nearest.estimate.low <= nearest.value <= nearest.estimate.high
        assert 0 < nearest.floor.low < nearest.floor.value
    assert memorised.floor.value < 0.05 and memorised.floor.high > 0
    assert copied.estimate.high > 0.04  # of none in fifty, the truth may be one in twenty


def test_what_has_no_floor_says_why(digits, tmp_path) -> None:
    few = replace(digits, images=np.array(digits.images[:30]), labels=None, folder=tmp_path)
    (score,) = scores.wavelet(np.array(digits.images[:20]), few, Options(2))
    assert score.value > 0 and score.floor is None and score.row()["floor"] == ""
    assert "no floor: got 15 images for packets of 16 values, wanted 16 images or more" in score.protocol


def test_intervals_have_three_digits_and_no_exponents() -> None:
    kid, floor = scores.Estimate(2.3667, 2.2571, 2.4712), scores.Estimate(-0.000596, -0.00877, 0.00758)
    row = scores.Score("kid", "KID (x 1000)", kid, floor, 200, 600, "").row()
    assert (row["90 % interval"], row["floor"]) == ("2260 to 2470", "-0.596 (-8.77 to 7.58)")


def test_equal_images_are_scored(digits, tmp_path, no_weights) -> None:
    same = np.repeat(digits.images[:1], 40, axis=0)
    equal = replace(digits, images=same, labels=np.arange(40) % 2, folder=tmp_path)
    for reference in (digits, equal):
        found = [score for group in scores.evaluate(same, reference, Options(2)).values() for score in group]
        values = {score.key: score.value for score in found if score.value is not None}
        assert np.isfinite(list(values.values())).all() and values["memorised_share"] == 1
    assert values["fwd"] == pytest.approx(0, abs=1e-12) and values["nearest_distance"] == 0


# ----------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_images_from_elsewhere_are_scored(root, samples, digits, monkeypatch, no_weights, capsys) -> None:
    monkeypatch.chdir(root)
    assert evaluate(samples, "--reference", "digits", "--seed", 1) == 0
    printed = capsys.readouterr().out
    assert "not computed: no Inception weights" in printed and "\ncurl -L" in printed
    assert "Fewer than 10,000 images" in printed and "share as sure as 90 % of real images" in printed
    written = json.loads((samples / "metrics.json").read_text())
    found = {score["key"]: score for score in written["scores"]}
    images = read_images(samples)
    assert found["fwd"]["value"] == scores.wavelet(images, digits, Options(2, seed=1))[0].value
    assert written["reference"]["sha256"] == digits.manifest["sha256"]["images"]
    assert found["fid"]["value"] is None and found["copies_share"]["value"] == pytest.approx(0.5, abs=0.1)
    np.save(samples / "samples.npy", images)
    assert evaluate(samples, "--reference", digits.folder, "--seed", 1) == 0
    assert json.loads((samples / "metrics.json").read_text())["scores"] == written["scores"]


def test_images_of_which_some_were_taken_out_are_not_held_against_labels_of_others(
    root, digits, tmp_path, monkeypatch, no_weights
) -> None:
    monkeypatch.chdir(root)
    rows = [np.flatnonzero(digits.labels == label)[n] for n in range(10) for label in range(10)]
    write_images(tmp_path, digits.images[rows])
    (tmp_path / "samples.json").write_text(json.dumps({"images": 100, "labels": list(range(10))}))

    def asked() -> list[float]:
        assert evaluate(tmp_path, "--reference", digits.folder, "--fwd-level", 1) == 0
        scores = json.loads((tmp_path / "metrics.json").read_text())["scores"]
        return [score["value"] for score in scores if score["key"] == "asked_share"]

    assert asked()[0] > 0.8
    made = {"images": 100, "labels": list(range(10)), "class_names": [f"{9 - k}" for k in range(10)]}
    (tmp_path / "samples.json").write_text(json.dumps(made))
    assert asked() == []  # the network that drew them numbers its classes otherwise
    (tmp_path / "samples.json").write_text(json.dumps(made | {"class_names": digits.class_names}))
    assert asked()[0] > 0.8
    (tmp_path / "00000.png").unlink()
    assert asked() == []  # each of the others would be compared with the label before its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "digit"], "wanted a folder or one prepared set (digits-16-0123abcd): run 01_prepare"),
        (["--reference", "digits", "--resolution", "32"], "run 01_prepare"),
        (["--reference", "digits", "--fwd-level", "5"], "wanted a multiple of 32"),
        (["--reference", "digits", "--fwd-level", "1"], "wanted 64 images or more"),
        (["--reference", "digits", "--inception-weights", "absent.pth"], "wanted torch-fidelity's: curl"),
        (["--reference", "digits", "--images", "absent"], "wanted a folder of PNGs"),
        (["--reference", "digits", "--output", "{0}/00000.png/metrics.json"], "wanted a file in a folder"),
        (["--reference", "digits", "--output", "{0}"], "wanted a file that can be written"),
        (["--reference", "digits", "--device", "bogus"], "got device 'bogus', wanted cpu"),
        (["--reference", "digits", "--device", "cuda:77"], "got device 'cuda:77', wanted cpu"),
        (["--reference", "digits", "--seed", "-1"], "got -1 for '--seed', wanted 0"),
        (["--reference", "digits", "--images", "{0}/empty.npy"], "empty.npy, which cannot be read"),
        (["--reference", "digits", "--images", "{0}/none.npy"], "none.npy of uint8 (0, 16, 16, 1), wanted uint8"),
        (["--reference", "digits", "--images", "{0}/floats.npy"], "floats.npy of float64 (40, 16, 16, 1), wanted"),
        (["--reference", "digits", "--images", "{0}/flat.npy"], "flat.npy of uint8 (40, 256), wanted uint8"),
        (["--reference", "digits", "--images", "{0}/pickled.npy"], "pickled.npy, which cannot be read"),
        (["--reference", "digits", "--images", "{0}/bad"], "00001.png, which cannot be read"),
    ],
)
def test_mistakes_are_one_line(root, digits, tmp_path, monkeypatch, no_weights, capsys, options, message) -> None:
    monkeypatch.chdir(root)
    images = np.array(digits.images[:40])
    for folder in (tmp_path, tmp_path / "bad"):
        folder.mkdir(exist_ok=True)
        write_images(folder, images)
    (tmp_path / "bad/00001.png").write_bytes((tmp_path / "00001.png").read_bytes()[:60])
    (tmp_path / "empty.npy").touch()
    arrays = {"none": images[:0], "floats": images / 255, "flat": images.reshape(40, -1)}
    for name, array in (arrays | {"pickled": np.array([{}])}).items():
        np.save(tmp_path / f"{name}.npy", array)
    monkeypatch.setattr(scores, "_kept", lambda *a: pytest.fail("computed something"))
    assert evaluate(tmp_path, *(str(option).format(tmp_path) for option in options)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "metrics.json").exists()


def test_images_of_other_sizes_are_refused(root, digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    write_images(tmp_path, np.repeat(digits.images[:3], 3, axis=3))
    assert evaluate(tmp_path, "--reference", "digits") == 2
    assert "got uint8 images (16, 16, 3) and a reference of (16, 16, 1)" in capsys.readouterr().err
    write_images(tmp_path, digits.images[:1, :8], start=5)
    with pytest.raises(ValueError, match=r"00005.png of uint8 \(8, 16, 1\) beside \(16, 16, 3\)"):
        read_images(tmp_path)


def test_a_reference_is_found_by_name_and_size_and_several_are_named(root, digits, tmp_path) -> None:
    for wanted in ("digits", "digits-16", "digits-16-0123abcd", str(digits.folder)):
        assert scores.find_reference(wanted, root).folder == digits.folder
    for name in ("digits-16-0123abcd", "digits-16-4567cdef", "digits-32-0123abcd", ".digits-32-89ab.preparing"):
        shutil.copytree(digits.folder, tmp_path / "data" / name)
    assert scores.find_reference("digits-32", tmp_path).folder.name == "digits-32-0123abcd"
    with pytest.raises(ValueError, match=r"one prepared set \(digits-16-0123abcd, digits-16-4567cdef\): give the name"):
        scores.find_reference("digits-16", tmp_path)
    with pytest.raises(ValueError, match=r"prepared set \(nothing\): run 01_prepare"):
        scores.find_reference("digits", tmp_path / "data")
