import json
import time

import numpy as np
import pytest
import pywt
import torch
from local_data import pictures, prepare

from wddm import contents
from wddm.wavelets import WaveletCodec


def save(folder, images: np.ndarray):
    np.save(folder / "images.npy", images)
    return folder / "images.npy"


def haar(x: np.ndarray) -> np.ndarray:
    """Dyadic Haar packets (N, h/2, w/2, 4K) of (N, h, w, K), in nothing but sums."""
    a, b, c, d = x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]
    return np.concatenate([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], -1) / 4


def check(written: dict, images: np.ndarray) -> None:
    """The statistics of all levels, against those of all coefficients."""
    moments = [0] * len(written)
    for part in np.array_split(images, -(-images.size // 2**21)):
        z = part / 127.5 - 1
        for level in range(len(written)):
            z = haar(z) if level else z
            moments[level] += np.stack([z.sum((0, 1, 2)), np.square(z).sum((0, 1, 2))])
    for level, total in enumerate(moments):
        mean, square = total * 4**level / (images.size / images.shape[-1])
        np.testing.assert_allclose(written[str(level)]["mean"], mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(written[str(level)]["std"], np.sqrt(square - mean**2), rtol=0, atol=1e-6)


def test_statistics_are_those_of_the_packets(tmp_path):
    prepared = prepare("patches", 32, tmp_path / "out", limit=300)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == prepared.manifest and list(manifest["bands"]) == ["1", "2", "3"]
    assert manifest["count"] == 300 and "time" not in " ".join(manifest)
    check({"0": manifest["pixels"], **manifest["bands"]}, prepared.images)
    images = torch.from_numpy(np.array(prepared.images)).permute(0, 3, 1, 2).double() / 127.5 - 1
    a, (h, v, d) = pywt.dwt2(images.numpy(), "haar")
    level1 = np.concatenate([a, h, v, d], axis=1) / 2
    np.testing.assert_allclose(manifest["bands"]["1"]["mean"], level1.mean((0, 2, 3)), rtol=0, atol=1e-6)
    for level in (2, 3):
        z = WaveletCodec(level=level, scaling="dyadic").double().encode(images).numpy()
        np.testing.assert_allclose(manifest["bands"][str(level)]["std"], z.std((0, 2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "levels"), [(10, 2), (12, 3), (24, 4), (6, 2)])
def test_statistics_of_any_size_and_number_of_blocks(tmp_path, monkeypatch, side, levels):
    monkeypatch.setattr(contents, "BLOCK_BYTES", 5 * side**2 * 3)
    images = pictures(13, side)
    images[..., 1] //= 7  # colours that differ
    written = contents.statistics(save(tmp_path, images))
    assert list(written) == [str(level) for level in range(levels)]
    check(written, images)
    assert [len(block) for block in contents.blocks(tmp_path / "images.npy")] == [5, 5, 3]


@pytest.mark.slow
def test_cifar10_is_prepared_in_time_and_its_statistics_are_right(tmp_path, cifar10):
    start = time.perf_counter()
    prepared = prepare("cifar10", 32, tmp_path / "out", dataset_path=cifar10)
    assert time.perf_counter() - start < 30
    assert prepared.images.shape == (50_000, 32, 32, 3)
    assert prepared.manifest["class_counts"] == dict.fromkeys(prepared.class_names, 5000)
    check({"0": prepared.manifest["pixels"], **prepared.manifest["bands"]}, prepared.images)


def test_duplicates_are_grouped(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "BLOCK_BYTES", 16 * 16 * 3 * 4)
    images = pictures(20)
    path = save(tmp_path, images)
    assert contents.duplicates(path) == []
    images[[3, 19]], images[[7, 11, 12]] = images[0], images[5]
    images[2], images[17] = images[1], images[16]
    images[2, 15, 15, 2] ^= 1  # all but the same
    assert contents.duplicates(save(tmp_path, images)) == [[5, 7, 11, 12], [0, 3, 19], [16, 17]]
