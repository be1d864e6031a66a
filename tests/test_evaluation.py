"""features.py, scores.py, evaluation.py: images from elsewhere, alone and over processes; what distances notice."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import launcher

from wddm import data, metrics
from wddm.__main__ import main
from wddm.metrics import diagnostics, evaluation, features, scores
from wddm.sampling import write_images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workbook's folder with digits prepared in it."""
    folder = tmp_path_factory.mktemp("workbook")
    for name in ("notebooks", "params"):
        (folder / name).mkdir()
    data.prepare("digits", 16, folder / "data/digits-16", limit=600, progress=False)
    return folder


@pytest.fixture(scope="module")
def digits(root):
    return data.load(root / "data/digits-16")


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


# --------------------------------------------------------------------------------------------------- features


@pytest.mark.slow
def test_the_classifier_knows_its_classes_and_is_the_same_again(digits, tmp_path) -> None:
    network = features.fit_features(digits.images, digits.labels, seed=0)
    assert network.held_out == 150 and network.accuracy > 0.95
    before = torch.get_rng_state()
    again = features.fit_features(digits.images, digits.labels, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    features.save(network, tmp_path / "network.safetensors")
    loaded = features.load(tmp_path / "network.safetensors")
    assert (loaded.accuracy, loaded.held_out) == (network.accuracy, 150)
    batch = next(diagnostics.unit_batches(digits.images, 64)).float()
    for other in (again, loaded):
        assert torch.equal(network(batch), other(batch))
    assert network(batch).shape == (64, 32)
    with pytest.raises(ValueError, match="got 600 images and 599 labels"):
        features.fit_features(digits.images, digits.labels[:-1])


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (96, 3)])
def test_the_network_takes_any_size(side, channels) -> None:
    network = features.FeatureNet(channels, min(features.SIDE, side), 5).eval()
    assert network(torch.rand(2, channels, side, side)).shape == (2, 32)


# ----------------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
def test_distances_grow_with_blur_noise_and_missing_classes(digits) -> None:
    network = scores.classifier(np.array(digits.images), digits).detail
    found = evaluation.responses(digits, 2, network)
    assert list(found) == ["blur", "noise", "missing classes"]
    for kind, (amounts, curves) in found.items():
        assert amounts[0] == 0 and len(curves) == 2
        for name, curve in curves.items():
            values, low, high = curve.T
            seen = slice(None) if name.startswith("FWD") else slice(2, None)  # classes survive a little blur and noise
            assert (np.diff(values[seen]) > 0).all() and values[-1] > 3 * values[0], (kind, name, values)
            assert (low < values).all() and (values < high).all()


def test_missing_classes_are_missing_and_images_as_many(digits, monkeypatch) -> None:
    seen = []
    distance = metrics.frechet_wavelet_distance
    monkeypatch.setattr(
        metrics, "frechet_wavelet_distance", lambda r, i, *a, **k: seen.append(i) or distance(r, i, *a, **k)
    )
    evaluation.responses(digits, 2)
    rows = {image.tobytes(): label for image, label in zip(digits.images, digits.labels, strict=True)}
    left = [{rows[image.tobytes()] for image in one} for one in seen[10:]]
    assert [len(one) for one in left] == [10, 8, 6, 4, 2] and len({len(one) for one in seen[10:]}) == 1
    blurred, noisy = seen[3], seen[9]
    assert np.abs(np.diff(blurred.astype(int), axis=1)).mean() < np.abs(np.diff(seen[0].astype(int), axis=1)).mean()
    amid = (seen[0] > 110) & (seen[0] < 145)  # where neither end of the range is near
    assert np.std((noisy.astype(int) - seen[0])[amid]) / 255 == pytest.approx(0.2, rel=0.1)


def test_what_depends_on_the_reference_is_kept_under_its_hash(digits, monkeypatch) -> None:
    samples = np.array(digits.images[:100])
    first = scores.wavelet(samples, digits, 2)
    name = digits.manifest["sha256"]["images"][:16]
    assert {path.name for path in (digits.folder / "statistics").glob("*fwd-level2*")} == {
        f"{name}-fwd-level2.npz", f"{name}-fwd-level2-split-100-0-{scores.RESAMPLES}.npz",
    }  # fmt: skip
    monkeypatch.setattr(metrics, "packet_moments", lambda *a, **k: pytest.fail("measured the reference again"))
    monkeypatch.setattr(metrics, "split_floor", lambda *a, **k: pytest.fail("measured the floor again"))
    again = scores.wavelet(samples, digits, 2)
    assert (again.record(), again.row()) == (first.record(), first.row())
    other = data.Dataset(digits.images, None, None, {"sha256": {"images": "f" * 64}}, digits.folder)
    with pytest.raises(pytest.fail.Exception, match="reference again"):
        scores.wavelet(samples, other, 2)


def test_scores_are_the_metrics_with_their_floor(digits) -> None:
    samples = np.array(digits.images[:100]) // 2
    score = scores.wavelet(samples, digits, 2, seed=3)
    expected = metrics.frechet_wavelet_distance(digits.images, samples, 2, resamples=scores.RESAMPLES, seed=3)
    assert score.value == pytest.approx(expected.value, rel=1e-12)
    assert (score.low, score.high) == pytest.approx((expected.interval.low, expected.interval.high), rel=1e-9)
    floor = metrics.split_floor(digits.images, 2, count=100, resamples=scores.RESAMPLES, seed=3)
    assert score.floor == pytest.approx((floor.value, floor.interval.low, floor.interval.high), rel=1e-12)
    assert score.record() == {
        "fwd": score.value, "fwd_low": score.low, "fwd_high": score.high,
        "fwd_floor": score.floor[0], "fwd_floor_low": score.floor[1], "fwd_floor_high": score.floor[2],
    }  # fmt: skip
    assert (score.count, score.count_real) == (100, 600) and "seed 3" in score.protocol
    assert scores.caveat(samples).startswith("Fewer than 10,000") and scores.caveat(range(10_000)) == ""
    said = "100 samples against 600 real images; floors: 100 real images against the 500 others"  # (6/600) / (6/500)
    assert said in scores.fairness(samples, digits) and "about 0.97 times" in scores.fairness(samples, digits)
    assert "300 real images against the 300 others" in scores.fairness(range(900), digits)


def test_copies_are_told_from_strangers(digits) -> None:
    real = np.array(digits.images)
    noise = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 1), dtype=np.uint8)
    for samples, share in ((real[:50], 1.0), (noise, 0.0)):
        nearest, copied, memorised = scores.copies(samples, digits)
        assert copied.value == memorised.value == share
        assert nearest.detail["distances"].shape == (50, 3) and nearest.detail["apart"].shape == (256, 2)
        assert nearest.low <= nearest.value <= nearest.high and 0 < nearest.floor[1] < nearest.floor[0]
    assert (
        memorised.floor[0] < 0.05 and memorised.floor[2] > 0 and copied.high > 0.04
    )  # of none in fifty, the truth may be one in twenty


# ----------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_images_from_elsewhere_are_scored(root, samples, digits, monkeypatch, no_weights, capsys) -> None:
    monkeypatch.chdir(root)
    assert evaluate(samples, "--reference", "digits", "--seed", 1) == 0
    printed = capsys.readouterr().out
    assert "not computed: no Inception weights" in printed and "\ncurl -L" in printed
    assert "Fewer than 10,000 images" in printed and "FD, digits-16-classifier (not FID)" in printed
    written = json.loads((samples / "metrics.json").read_text())
    found = {score["key"]: score for score in written["scores"]}
    images = evaluation.read_images(samples)
    assert found["fwd"]["value"] == scores.wavelet(images, digits, 2, seed=1).value
    assert written["reference"]["sha256"] == digits.manifest["sha256"]["images"]
    assert found["fid"]["value"] is None and found["copies_share"]["value"] == pytest.approx(0.5, abs=0.1)
    np.save(samples / "samples.npy", images)
    assert evaluate(samples, "--reference", root / "data/digits-16", "--seed", 1) == 0
    assert json.loads((samples / "metrics.json").read_text())["scores"] == written["scores"]


@pytest.mark.slow
def test_two_processes_find_what_one_does(root, samples) -> None:
    flags = f"evaluate --images {samples} --reference digits --output".split()
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = []
    for name, start in (("two", launcher()), ("one", [])):
        for path in (root / "data/digits-16/statistics").glob("*"):
            path.unlink()
        command = [sys.executable, "-m", *start, "wddm", *flags, str(samples / name)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("FWD, level 2") == 1
        found.append(json.loads((samples / name).read_text())["scores"])
    for two, one in zip(*found, strict=True):
        numbers = {name: value for name, value in one.items() if isinstance(value, float)}
        assert {name: two[name] for name in numbers} == pytest.approx(numbers, rel=1e-9)
        assert {**two, **numbers} == one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "digit"], "wanted a folder or one prepared set (digits-16): run 01_prepare"),
        (["--reference", "digits", "--resolution", "32"], "run 01_prepare"),
        (["--reference", "digits", "--fwd-level", "5"], "wanted a multiple of 32"),
        (["--reference", "digits", "--fwd-level", "1"], "wanted 64 images or more"),
        (["--reference", "digits", "--inception-weights", "absent.pth"], "wanted torch-fidelity's: curl"),
        (["--reference", "digits", "--images", "absent"], "wanted a folder of PNGs"),
    ],
)
def test_mistakes_are_one_line(root, digits, tmp_path, monkeypatch, no_weights, capsys, options, message) -> None:
    monkeypatch.chdir(root)
    write_images(tmp_path, digits.images[:40])
    assert evaluate(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "metrics.json").exists()


def test_images_of_other_sizes_are_refused(root, digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    write_images(tmp_path, np.repeat(digits.images[:3], 3, axis=3))
    assert evaluate(tmp_path, "--reference", "digits") == 2
    assert "got uint8 images (16, 16, 3) and a reference of (16, 16, 1)" in capsys.readouterr().err
    write_images(tmp_path, digits.images[:1, :8], start=5)
    with pytest.raises(ValueError, match=r"00005.png of uint8 \(8, 16, 1\) beside \(16, 16, 3\)"):
        evaluation.read_images(tmp_path)
