"""inception.py: the numbers are those of torch-fidelity's own command line on the same PNGs, with the same weights."""

import json
import re
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from wddm import data
from wddm.metrics import inception, scores
from wddm.metrics.frechet import frechet_distance, split
from wddm.metrics.scores import Options
from wddm.sampling import write_images


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random numbers in the format of torch-fidelity's Inception weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with (
        patch.object(module, "load_state_dict_from_url", lambda *a, **k: None),
        patch.object(torch.nn.Module, "load_state_dict", lambda *a, **k: None),
    ):
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return data.prepare("digits", 16, tmp_path_factory.mktemp("data") / "digits-16", limit=30, progress=False)


@pytest.mark.slow
def test_scores_are_those_of_torch_fidelitys_command_line(weights, reference, tmp_path, monkeypatch) -> None:
    """By its layer of 64 features, as the eigenvalues of 2,048 take a minute; its own defaults are our layers."""
    default = FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"]
    layers = [default.get_default_feature_layer_for_metric(metric) for metric in ("fid", "kid", "prc", "isc")]
    assert layers == [inception.POOLED] * 3 + [inception.LOGITS]
    monkeypatch.setattr(inception, "POOLED", "64")
    samples, options = 255 - np.array(reference.images[:20]), Options(inception_weights=weights)
    found = {score.key: score for score in scores.by_inception(samples, reference, options)}
    for name, images in (("samples", samples), ("real", reference.images)):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, images)
    flags = "--cpu --json --silent --isc --fid --kid --prc --kid-subset-size 10 --no-cache --save-cpu-ram"
    flags += f" --feature-extractor inception-v3-compat --feature-extractor-weights-path {weights}"
    flags += "".join(f" --feature-layer-{metric} 64" for metric in ("fid", "kid", "prc"))
    command = [sys.executable, "-m", "torch_fidelity.fidelity", *flags.split(), "--input1", tmp_path / "samples"]
    done = subprocess.run([*command, "--input2", tmp_path / "real"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(re.search(r"\{.*\}", done.stdout, re.DOTALL)[0])
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    names |= {"inception_score": "inception_score_mean", "precision": "precision", "recall": "recall"}
    for key, name in names.items():
        assert found[key].value == pytest.approx(theirs[name], rel=1e-6), key
        assert found[key].estimate.low <= found[key].value <= found[key].estimate.high
        assert (found[key].count, found[key].count_real) == (20, 30)
    spread = 1.6449 * theirs["kernel_inception_distance_std"] * 1.01**0.5  # of subsets of half, and of the mean of 100
    assert found["kid"].estimate.high - found["kid"].value == pytest.approx(spread, rel=1e-6)
    assert found["fid"].floor.value < found["fid"].value
    chosen, others = split(30, 15)
    half = inception.features(np.array(reference.images), inception.build(weights))
    half = [{name: values[rows] for name, values in half.items()} for rows in (chosen, others)]
    for key, ends in inception.scores(*half, resamples=scores.RESAMPLES).items():
        assert found[key].floor == pytest.approx(ends, rel=1e-4), key
        assert ends.low <= ends.value <= ends.high
    with patch.object(inception, "build", wraps=inception.build), patch.object(inception, "features") as extract:
        extract.side_effect = lambda images, *a, **k: pytest.fail("again") if images is reference.images else {}
        with pytest.raises(KeyError):  # from the empty features of the samples: those of the reference were kept
            scores.by_inception(samples, reference, options)
    extract.assert_called_once()


def test_features_are_those_of_batches_of_three_channels_in_order() -> None:
    class Network(torch.nn.Linear):
        features_list = inception.POOLED, inception.LOGITS

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
            return images[:, 2, 0].float(), images[:, 0, :, 0].float()

    images = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 1), dtype=np.uint8)  # batches of 64, 64 and 22
    seen = []
    found = inception.features(images, Network(1, 1), lambda batches: seen.extend(batches) or batches)
    assert seen == [0, 64, 128]
    np.testing.assert_array_equal(found["2048"], images[:, 0, :, 0])
    np.testing.assert_array_equal(found["logits_unbiased"], images[:, :, 0, 0])


@pytest.mark.parametrize("count", [200, 40])  # more and fewer images than features
def test_the_interval_of_a_fid_is_the_distance_of_resampled_features(count) -> None:
    rng = np.random.default_rng(0)
    real = {"2048": rng.normal(size=(300, 50)) @ rng.normal(size=(50, 50))}
    generated = {"2048": real["2048"][:count] + rng.normal(size=(count, 50)) + 1}

    def fid(rows) -> float:
        one, other = generated["2048"][rows], real["2048"]
        return frechet_distance(one.mean(0), np.cov(one.T), other.mean(0), np.cov(other.T))

    weights = np.random.default_rng(3).multinomial(count, np.full(count, 1 / count), size=9)
    drawn = np.array([fid(np.repeat(np.arange(count), times)) for times in weights])
    expected = fid(np.arange(count)) + np.array([0, *np.quantile(drawn - drawn.mean(), [0.05, 0.95], method="weibull")])
    found = inception.fid_interval(fid(np.arange(count)), generated, real, resamples=9, seed=3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_weights_it_is_said_and_nothing_is_computed(monkeypatch, reference, tmp_path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (score,) = scores.by_inception(np.array(reference.images), reference, Options())
    assert score.value is None and score.protocol == "not computed: no Inception weights" and score.record() == {}
    target = re.fullmatch(r"curl -L --create-dirs -o (\S+) https://\S+\.pth", inception.remedy())[1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / target.rsplit("/", 1)[1]).touch()
    assert str(inception.find_weights()) == target  # where that command puts them, they are found


def test_files_that_are_no_weights_are_refused(tmp_path) -> None:
    class Malicious:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save(Malicious(), tmp_path / "code.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("code.pth", "other.pth", "absent.pth"):
        with pytest.raises(ValueError, match=rf"^got inception_weights='.*{name}'[^\n]*wanted torch-fidelity's: curl"):
            inception.find_weights(tmp_path / name)
