import io
from pathlib import Path

import numpy as np
import pytest
import pywt
import scipy.linalg
import scipy.stats
import torch
from PIL import Image

from wddm import data
from wddm.metrics import diagnostics, frechet, intervals
from wddm.metrics.diagnostics import haar_packets
from wddm.metrics.frechet import frechet_distance, frechet_wavelet_distance
from wddm.wavelets import WaveletCodec

CIFAR_TEST = Path(__file__).parents[2] / "shared/data/cifar10/plain_text/test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> np.ndarray:
    """600 crops (32, 32, 3) of photographs, uint8."""
    folder = tmp_path_factory.mktemp("data") / "patches-32"
    return np.array(data.prepare("patches", 32, folder, limit=600, progress=False).images)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> data.Dataset:
    return data.prepare("digits", 16, tmp_path_factory.mktemp("data") / "digits-16", progress=False)


def as_float(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def covariance(rng: np.random.Generator, size: int, rank: int | None = None) -> np.ndarray:
    factor = rng.normal(size=(size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


# ---------------------------------------------------------------------------------------------------- moments


def measured(x: np.ndarray, cuts: list[int], weights: np.ndarray | None = None) -> list[frechet.Moments]:
    """Moments of populations x (P, N, d) that come in parts."""
    weights = np.ones((1, x.shape[1])) if weights is None else weights
    return frechet.accumulated(map(torch.from_numpy, np.split(x, cuts, axis=1)), weights)


def test_moments_are_those_of_numpy_in_any_batches():
    rng = np.random.default_rng(0)
    x = 1e6 + rng.normal(size=(1000, 5)) @ rng.normal(size=(5, 5))
    for cuts in ([], [1, 400, 401]):
        (moments,) = measured(x[None], cuts)
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean[0], x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance[0], np.cov(x.T), rtol=1e-7)


def test_moments_of_several_populations_and_with_repeats():
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(3, 50, 4)), rng.integers(0, 4, (2, 50))
    for moments, repeats in zip(measured(x, [20], weights), weights, strict=True):
        assert moments.count == repeats.sum()
        for i in range(3):
            np.testing.assert_allclose(moments.covariance[i], np.cov(x[i].T, fweights=repeats), rtol=1e-11)
            np.testing.assert_allclose(moments.mean[i], np.average(x[i], axis=0, weights=repeats), rtol=1e-11)


def test_moments_refuse_what_has_none():
    with pytest.raises(ValueError, match="got 1 images for packets of 1 values, wanted 2"):
        frechet.moments(np.zeros((1, 8, 8, 1), np.uint8), 3)
    with pytest.raises(ValueError, match=r"nan, wanted floats in \[0, 1\]"):
        frechet.moments(np.full((9, 1, 8, 8), np.nan), 3)


# ---------------------------------------------------------------------------------------------------- Frechet


def test_frechet_distance_of_commuting_gaussians_in_closed_form():
    rng = np.random.default_rng(2)
    mean1, mean2, std1, std2 = rng.normal(size=(2, 6)).tolist() + rng.uniform(0, 3, size=(2, 6)).tolist()
    basis = scipy.stats.ortho_group.rvs(6, random_state=0)
    cov1, cov2 = (basis @ np.diag(np.square(std)) @ basis.T for std in (std1, std2))
    expected = np.sum(np.subtract(mean1, mean2) ** 2) + np.sum(np.subtract(std1, std2) ** 2)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-12)
    assert isinstance(frechet_distance(mean1, cov1, mean2, cov2), float)


def test_frechet_distance_is_that_of_scipy_and_batched():
    rng = np.random.default_rng(3)
    means = rng.normal(size=(2, 4, 12))
    covs = np.array([[covariance(rng, 12) for _ in range(4)] for _ in range(2)])
    batched = frechet_distance(means[0], covs[0], means[1], covs[1])
    for i in range(4):
        root = scipy.linalg.sqrtm(covs[0, i] @ covs[1, i]).real
        expected = np.sum((means[0, i] - means[1, i]) ** 2) + np.trace(covs[0, i] + covs[1, i] - 2 * root)
        assert batched[i] == pytest.approx(expected, rel=1e-10)
        one = frechet_distance(means[0, i], covs[0, i], means[1, i], covs[1, i])
        assert one == pytest.approx(batched[i], rel=1e-12)


def test_frechet_distance_is_symmetric_and_zero_for_equals_even_if_singular():
    rng = np.random.default_rng(4)
    mean, flat, full = np.zeros(40), covariance(rng, 40, rank=3), covariance(rng, 40)
    assert abs(frechet_distance(mean, flat, mean, flat)) < 1e-12 * np.trace(flat)
    forth, back = (frechet_distance(mean, a, mean, b) for a, b in ((flat, full), (full, flat)))
    assert forth == pytest.approx(back, rel=1e-12) and forth > 0
    scaled = frechet_distance(mean, flat, mean, 4 * flat)  # tr C + 4 tr C - 2 * 2 tr C
    assert scaled == pytest.approx(np.trace(flat), rel=1e-10)
    with pytest.raises(ValueError, match="equal size"):
        frechet_distance(mean, flat, mean[:3], flat[:3, :3])


# -------------------------------------------------------------------------------------------------------- FWD


@pytest.mark.skipif(not CIFAR_TEST.exists(), reason="needs the copy of CIFAR-10 in ../shared/data")
def test_fwd_is_the_reference_between_cats_and_airplanes():
    import pyarrow.parquet as pq

    rows = pq.read_table(CIFAR_TEST).to_pydict()
    cats, airplanes = (
        np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
                  for cell, row_label in zip(rows["img"], rows["label"], strict=True) if row_label == label])
        for label in (3, 0)
    )  # fmt: skip
    for level, expected in ((3, 1.28209434), (2, 5.36527793)):
        result = frechet_wavelet_distance(cats, airplanes, level=level)
        assert result.value == pytest.approx(expected, rel=1e-6)
        assert result.per_packet.shape == (4**level,) and result.per_packet.mean() == result.value
    assert frechet_wavelet_distance(as_float(cats), airplanes).value == pytest.approx(1.28209434, rel=1e-5)


def test_fwd_is_the_definition_by_pywavelets_and_numpy(photographs):
    sets = [photographs[:250, :16, :16], photographs[250:550, :16, :16] // 2]
    moments = []
    for images in sets:
        a, (h, v, d) = pywt.dwt2(images.transpose(0, 3, 1, 2) / 255, "haar")
        bands = [band for one in (a, h, v, d) for band in (lambda z: (z[0], *z[1]))(pywt.dwt2(one, "haar"))]
        moments.append([(b.reshape(len(b), -1).mean(0), np.cov(b.reshape(len(b), -1).T)) for b in bands])
    distances = []
    for (mean1, cov1), (mean2, cov2) in zip(*moments, strict=True):
        difference = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2)
        eigenvalues = np.linalg.eigvals(cov1 @ cov2).real.clip(0)
        distances.append(difference - 2 * np.sqrt(eigenvalues).sum())
    result = frechet_wavelet_distance(*sets, level=2)
    np.testing.assert_allclose(sorted(result.per_packet), sorted(distances), rtol=1e-5)
    # channel order: A of A first, then the A of H, V and D
    np.testing.assert_allclose(result.per_packet[:4], np.array(distances)[[0, 4, 8, 12]], rtol=1e-5)


def test_fwd_of_a_brightness_step_is_in_the_first_packet_only(photographs):
    images = as_float(photographs) * 0.8
    result = frechet_wavelet_distance(images, images + 0.1, level=3)
    np.testing.assert_allclose(result.per_packet[0], 48 * (0.1 * 2**3) ** 2, rtol=1e-5)
    np.testing.assert_allclose(result.per_packet[1:], 0, atol=1e-6)


def test_fwd_streams_and_takes_either_layout(photographs):
    real, generated = photographs[:300], photographs[300:]
    expected = frechet_wavelet_distance(real, generated).value
    assert [len(batch) for batch in diagnostics.UnitBatches(real, batch_values=37 * 32 * 32 * 3)] == 8 * [37] + [4]
    batches = [diagnostics.UnitBatches(images, batch_size=37) for images in (real, generated)]
    assert frechet_wavelet_distance(*batches).value == pytest.approx(expected, rel=1e-9)
    assert frechet_wavelet_distance(as_float(real), generated).value == pytest.approx(expected, rel=1e-4)
    cached = frechet.moments(real, 3)
    assert frechet_wavelet_distance(cached, generated).value == expected
    assert frechet_wavelet_distance(real, real).value == pytest.approx(0, abs=1e-10)


def test_fwd_refuses_too_few_images_and_other_ranges(photographs):
    with pytest.raises(ValueError, match=r"got 191 images for packets of 192 values, wanted 192.*num_samples.*deeper"):
        frechet_wavelet_distance(photographs, photographs[:191], level=2)
    assert frechet_wavelet_distance(photographs, photographs[:192], level=2).value > 0
    for bad in (as_float(photographs) * 2 - 1, as_float(photographs) * 255, as_float(photographs) / 0):
        with pytest.raises(ValueError, match=r"wanted floats in \[0, 1\]"):
            frechet_wavelet_distance(photographs, bad)
    for bad in (photographs[0], photographs.transpose(0, 3, 1, 2), as_float(photographs).permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"uint8 \(N, H, W, C\) or float"):
            frechet_wavelet_distance(bad, photographs)
    with pytest.raises(ValueError, match="compare vectors of equal size"):
        frechet_wavelet_distance(frechet.moments(photographs, 2), photographs, level=3)
    for shape in ((16, 64, 3), (64, 16, 3), (16, 32, 6)):  # packets of as many values
        with pytest.raises(ValueError, match=r"got images \(C, H, W\) of .*, wanted one shape"):
            frechet_wavelet_distance(photographs, np.zeros((800, *shape), np.uint8), level=2)


LEVELS = {  # (H, W, C): the level that no one gave
    (16, 16, 1): 2, (32, 32, 3): 2, (64, 64, 1): 3, (64, 64, 3): 3, (128, 128, 1): 4, (128, 128, 3): 4,
    (256, 256, 1): 5, (256, 256, 3): 5, (64, 128, 3): 4, (96, 96, 3): 4, (48, 80, 3): 3, (8, 8, 1): 2,
    (1024, 1024, 3): 7,
    (18, 18, 3): 1, (15, 15, 3): 0, (100, 100, 3): 2, (255, 255, 3): 0, (2304, 2304, 3): 8,  # none fits these
}  # fmt: skip


@pytest.mark.parametrize(("shape", "level"), LEVELS.items(), ids=str)
def test_level_without_being_told(shape, level):
    assert frechet.packet_level(shape) == level
    assert frechet.packet_level(shape, 7) == 7
    if 2 < level < 8:  # no smaller one would do
        assert np.prod(shape) / 4**level <= 192 < np.prod(shape) / 4 ** (level - 1)


def test_floor_is_the_distance_of_some_to_all_others(photographs):
    floor = frechet.split_floor(photographs, 3, seed=1)
    assert floor.value == frechet.split_floor(photographs, 3, seed=1).value
    assert floor.value != frechet.split_floor(photographs, 3, seed=2).value
    fewer = frechet.split_floor(photographs, 3, seed=1, count=100)
    assert 0 < floor.value < fewer.value
    chosen, others = frechet.split(600, 100, 1)
    expected = frechet_wavelet_distance(photographs[others], photographs[chosen]).value
    assert fewer.value == pytest.approx(expected, rel=1e-9)
    pair = np.repeat(np.arange(2, dtype=np.uint8), 64).reshape(2, 8, 8, 1)
    many = np.concatenate([pair[:1]] * 40)  # equal images: any split is at distance 0, unless rows are lost
    assert frechet.split_floor(many, 3).value == pytest.approx(0, abs=1e-20)
    with pytest.raises(ValueError, match="wanted 1 to 300"):
        frechet.split_floor(photographs, 3, count=301)


def test_a_split_is_disjoint_and_covers_the_set(monkeypatch, photographs):
    seen, original = [], frechet._moments
    monkeypatch.setattr(frechet, "_moments", lambda side, *a: seen.append(side.rows) or original(side, *a))
    frechet.split_floor(photographs, 3, count=200)
    assert sorted(np.concatenate(seen)) == list(range(600))


@pytest.mark.parametrize(("mean", "most"), [(0.52, 2), (0.5, 3)])
def test_bootstrap_interval_is_as_wide_as_the_spread_of_repeated_draws(mean: float, most: int):
    """If there is a distance. If not, it is a sum of squares of chance alone, and the interval about twice as wide."""
    rng = np.random.default_rng(5)

    def draw(count: int, mean: float = mean) -> torch.Tensor:
        return torch.from_numpy(rng.normal(mean, 0.1, (count, 1, 8, 8)).clip(0, 1))

    real = frechet.moments(draw(4000, 0.5), 2)
    values = [frechet_wavelet_distance(real, draw(300), 2).value for _ in range(40)]
    interval = frechet_wavelet_distance(real, draw(300), 2, resamples=40).distance
    assert 0.5 < (interval.high - interval.low) / np.subtract(*np.quantile(values, [0.95, 0.05])) < most
    shorter = frechet_wavelet_distance(real, draw(3000), 2, resamples=40).distance
    assert shorter.high - shorter.low < (interval.high - interval.low) / 2


def test_a_perfect_generator_scores_as_far_below_the_floor_as_is_said():
    rng = np.random.default_rng(6)

    def draw(count: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0.5, 0.1, (count, 1, 8, 8)).clip(0, 1))

    real, count = draw(800), 400
    perfect = np.mean([frechet_wavelet_distance(real, draw(count), 1).value for _ in range(30)])
    floor = np.mean([frechet.split_floor(real, 1, count=count, seed=seed).value for seed in range(30)])
    assert perfect / floor == pytest.approx((1 / 400 + 1 / 800) / (1 / 400 + 1 / 400), rel=0.1)


def test_bootstrap_interval_holds_the_value_and_is_seeded(photographs):
    def measured(seed: int) -> frechet.Frechet:
        return frechet_wavelet_distance(photographs[:300], photographs[300:], seed=seed, resamples=8)

    first, again = measured(1), measured(1)
    assert 0 <= first.distance.low < first.value < first.distance.high
    assert first.distance == again.distance
    assert first.value == measured(2).value and first.distance.low != measured(2).distance.low
    _, low, high = first.packets
    assert (low < first.per_packet).all() and (first.per_packet < high).all()
    floor = frechet.split_floor(photographs, 3, resamples=8).distance
    assert 0 < floor.low < floor.value < floor.high
    without = frechet_wavelet_distance(photographs[:300], photographs[300:])
    assert without.value == first.value and np.isnan(without.distance[1:]).all() and np.isnan(without.packets[1:]).all()
    for generated, resamples in ((photographs, 1), (frechet.moments(photographs, 3), 8)):
        with pytest.raises(ValueError, match=f"got resamples={resamples}, wanted 0, or 2 and more, of images"):
            frechet_wavelet_distance(photographs, generated, resamples=resamples)


def test_packets_a_group_at_a_time_are_packets_at_once(monkeypatch, photographs):
    real, generated = photographs[:300], photographs[300:]
    expected = frechet_wavelet_distance(real, generated, 2, resamples=3)
    monkeypatch.setattr(frechet, "GROUP_BYTES", 8 * 192**2 * 5 * 3)  # three packets of real, generated and 3 resampled
    found = frechet_wavelet_distance(real, generated, 2, resamples=3)
    np.testing.assert_allclose(found.per_packet, expected.per_packet, rtol=1e-9)
    np.testing.assert_allclose(found.packets, expected.packets, rtol=1e-9)


def test_packets_are_those_of_the_codec(photographs):
    images = as_float(photographs[:5]).double()
    images = images.repeat_interleave(2, 3)  # not square
    for level in (0, 1, 3, 4, 5):
        expected = WaveletCodec("haar", level=level, scaling="none").double().encode(images)
        found = haar_packets(images, level, slice(2, None))
        torch.testing.assert_close(found, expected.reshape(5, 4**level, -1).transpose(0, 1)[2:])
    with pytest.raises(ValueError, match="got height 24, wanted a multiple of 16"):
        haar_packets(images[:, :, :24], 4)
    large = torch.rand(2, 1, 256, 256, dtype=torch.float64)  # as much as is transformed at a time, each
    for level in (2, 8):
        expected = WaveletCodec("haar", level=level, scaling="none").double().encode(large)
        torch.testing.assert_close(haar_packets(large, level), expected.reshape(2, 4**level, -1).transpose(0, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fwd_on_a_gpu_is_that_on_the_cpu(photographs):
    expected = frechet_wavelet_distance(photographs[:300], photographs[300:])
    found = frechet_wavelet_distance(photographs[:300], photographs[300:], device="cuda")
    np.testing.assert_allclose(found.per_packet, expected.per_packet, rtol=1e-9)


def test_fwd_keeps_no_page_of_a_memory_map_and_reads_what_is_there(tmp_path, photographs):
    np.save(tmp_path / "images.npy", photographs)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert frechet_wavelet_distance(mapped, mapped[:300]).value == pytest.approx(
        frechet_wavelet_distance(photographs, photographs[:300]).value, rel=1e-12
    )
    private = np.load(tmp_path / "images.npy", mmap_mode="c")
    private[:] = 7  # held in memory alone: may not be dropped
    frechet.moments(private, 3)
    assert (private == 7).all()


# -------------------------------------------------------------------------------------------------- intervals


def test_intervals_cover_nine_times_of_ten():
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(300, 60))
    means = np.array([intervals.resampled(row, seed=k)[1:] for k, row in enumerate(draws)])
    medians = np.array([intervals.median(row)[1:] for row in draws])
    shares = np.array([intervals.share((row < 1).sum(), 60)[1:] for row in draws])
    for (low, high), truth in ((means.T, 1.0), (medians.T, np.log(2)), (shares.T, 1 - np.exp(-1))):
        assert 0.83 < np.mean((low <= truth) & (truth <= high)) < 0.96
    assert intervals.median(draws[0]).value == np.median(draws[0]) and intervals.share(3, 12).value == 0.25
    assert intervals.resampled(draws[0]).value == pytest.approx(draws[0].mean())


def test_the_band_of_a_curve_holds_all_of_it_nine_times_of_ten():
    draws = np.sort(np.random.default_rng(0).uniform(size=(1000, 80)), axis=1)
    above, below = np.arange(1, 81) / 80 - draws, draws - np.arange(80) / 80
    assert 0.88 < np.mean(np.maximum(above, below).max(1) <= intervals.band(draws[0])) < 0.94
    assert intervals.band(draws[0], 0.95) == pytest.approx(1.3581 / np.sqrt(80), rel=1e-4)  # Smirnov's table


# ---------------------------------------------------------------------------------------------------- spectra


def test_white_noise_has_a_flat_spectrum_at_its_variance():
    noise = torch.from_numpy(np.random.default_rng(6).uniform(0, 1, (400, 2, 32, 32)))
    found = diagnostics.radial_power_spectrum(noise)
    np.testing.assert_allclose(found.frequency, np.arange(1, 17) / 32)
    np.testing.assert_allclose(found.power.value, 1 / 12, rtol=0.05)
    spread = found.power.high - found.power.low  # one value of exponential power per cell of a ring, half of them free
    cells = np.bincount(np.hypot(*np.meshgrid(*2 * [32 * np.fft.fftfreq(32)])).round().astype(int).ravel())[1:17]
    np.testing.assert_allclose(spread, 2 * 1.645 / 12 / np.sqrt(400 * 2 * cells / 2), rtol=0.25)


@pytest.mark.parametrize("cycles", [3, 8, 16])
def test_a_wave_has_its_power_at_its_frequency(cycles):
    x = np.arange(32)
    wave = 0.5 + 0.4 * np.cos(2 * np.pi * cycles * x / 32)
    images = torch.from_numpy(np.broadcast_to(wave, (5, 1, 32, 32)).copy())
    for oriented in (images, images.mT):
        found = diagnostics.radial_power_spectrum(oriented)
        assert found.frequency[found.power.value.argmax()] == cycles / 32
        assert found.power.value.max() > 1e6 * np.sort(found.power.value)[-2]


def test_rings_are_rounded_to_the_nearest_frequency():
    y, x = np.mgrid[:32, :32]
    wave = 0.5 + 0.4 * np.cos(2 * np.pi * (4 * x + 4 * y) / 32)  # sqrt(32) = 5.66 cycles per 32 pixels
    found = diagnostics.radial_power_spectrum(torch.from_numpy(wave)[None, None])
    assert found.frequency[found.power.value.argmax()] == 6 / 32


def test_band_statistics_are_those_of_scipy(photographs):
    found = diagnostics.band_statistics(photographs, level=1)
    a, (h, v, d) = pywt.dwt2(photographs.transpose(0, 3, 1, 2) / 255, "haar")
    bands = [band.ravel() for band in (a, h, v, d)]
    assert found.bands == ["A", "H", "V", "D"]
    np.testing.assert_allclose(found.energy.value, [np.mean(b**2) for b in bands], rtol=1e-9)
    np.testing.assert_allclose(found.std, [np.std(b) for b in bands], rtol=1e-9)
    np.testing.assert_allclose(found.kurtosis.value, [scipy.stats.kurtosis(b) for b in bands], rtol=1e-6)
    value, low, high = found.kurtosis
    assert (low < value).all() and (value < high).all()
    per_image = [np.mean(b.reshape(600, -1) ** 2, 1) for b in bands]
    spread = 2 * 1.645 * np.std(per_image, axis=1) / np.sqrt(600)
    np.testing.assert_allclose(found.energy.high - found.energy.low, spread, rtol=0.25)
    assert np.isclose(
        diagnostics.band_statistics(photographs, level=3).energy.value.sum() / 64, found.energy.value.sum() / 4
    )


# ---------------------------------------------------------------------------------------- neighbours, classes


def test_neighbours_are_those_of_scikit_learn(photographs):
    from sklearn.neighbors import NearestNeighbors

    generated, real = photographs[:40], photographs[40:]
    rows, distances = diagnostics.nearest_neighbours(generated, real, k=3)
    flat = [images.reshape(len(images), -1) / 255 for images in (real, generated)]
    expected, expected_rows = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(flat[0]).kneighbors(flat[1])
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(distances, expected / np.sqrt(32 * 32 * 3), rtol=1e-9)


def test_a_copy_is_found_at_distance_zero_and_an_offset_at_its_size(photographs):
    real = photographs // 2
    rows, distances = diagnostics.nearest_neighbours(real[[500, 7]], real)
    assert rows.tolist() == [[500], [7]] and distances.tolist() == [[0.0], [0.0]]
    shifted = as_float(real[[500, 7]]).double() + 0.002
    rows, distances = diagnostics.nearest_neighbours(shifted, real)
    assert rows.tolist() == [[500], [7]]
    np.testing.assert_allclose(distances, 0.002, rtol=1e-4)
    with pytest.raises(ValueError, match="got k=601 with 600"):
        diagnostics.nearest_neighbours(real, real, k=601)


def test_memorised_are_those_much_nearer_to_one_image_than_to_the_next():
    rng = np.random.default_rng(0)
    real, others = (rng.integers(0, 250, (count, 8, 8, 1), dtype=np.uint8) for count in (300, 20))
    queries = np.concatenate([real[:20] + rng.integers(0, 5, real[:20].shape, dtype=np.uint8), others])
    found = diagnostics.memorised(diagnostics.nearest_neighbours(queries, real, k=2)[1])
    assert found[:20].all() and not found[20:].any()
    assert diagnostics.memorised(np.array([[1.0, 3.0], [1.01, 3.0], [0.0, 0.0]])).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="ask for k=2"):
        diagnostics.memorised(np.ones((4, 1)))


def test_neighbours_that_float32_confuses_are_told_apart():
    rng = np.random.default_rng(8)
    bases = rng.choice(np.array([0, 254], np.uint8), (20, 32, 32, 3))
    near = np.repeat(bases, 9, axis=0)
    near[np.arange(180) % 9 != 4, 0, 0, 0] += 1  # all but the fifth of nine differ in one grey level
    rows, distances = diagnostics.nearest_neighbours(bases, near)
    assert rows[:, 0].tolist() == list(range(4, 180, 9)) and not distances.any()


def vectors(images: np.ndarray) -> np.ndarray:
    return diagnostics.pixels(images, 16)


def test_the_classifier_knows_digits_and_doubts_what_is_none(digits):
    rng, real, labels = np.random.default_rng(7), np.array(digits.images), digits.labels
    one, other = rng.integers(len(real), size=(2, 400))
    differ = labels[one] != labels[other]
    blends = ((real[one[differ]].astype(int) + real[other[differ]]) // 2).astype(np.uint8)
    noise = rng.integers(0, 256, (400, 16, 16, 1), dtype=np.uint8)
    all_real, doubtful, mixed, ones = (
        diagnostics.judge(vectors(images), vectors(real), labels) for images in (real, noise, blends, real[labels == 1])
    )
    sure = [np.mean(verdict.confidence >= verdict.threshold) for verdict in (all_real, doubtful, mixed)]
    assert all_real.accuracy.value >= 0.98 and len(all_real.held_out) == 450
    assert sure[0] >= 0.9 and all_real.classes_seen == 10 and all_real.confidence.shape == (1797,)
    assert sure[1] < 0.05 and sure[2] < 0.4
    assert sum(doubtful.class_counts.values()) == 400
    assert ones.class_counts[1] > 175 and ones.classes_seen < 4


def test_the_classifier_is_the_same_for_the_same_seed_and_measured_on_images_held_out(digits):
    real, labels = vectors(digits.images[:400]), digits.labels[:400]
    first, again, other = (diagnostics.judge(real, real, labels, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.confidence, again.confidence)
    assert first.threshold == again.threshold != other.threshold
    assert np.mean(first.held_out >= first.threshold) == pytest.approx(0.9, abs=0.02)
    chance = diagnostics.judge(real, real, np.random.default_rng(0).permutation(labels))
    assert chance.accuracy.value < 0.3  # labels without meaning cannot be predicted


def test_images_without_a_label_are_left_out_and_missing_labels_refused(digits):
    real, labels = vectors(digits.images[:400]), np.where(digits.labels[:400] > 4, -1, digits.labels[:400])
    verdict = diagnostics.judge(real, real, labels)
    assert list(verdict.class_counts) == [0, 1, 2, 3, 4] and len(verdict.held_out) == -(-np.sum(labels >= 0) // 4)
    alone = labels.copy()
    alone[np.flatnonzero(labels < 0)[0]] = 9
    with pytest.raises(ValueError, match=r"labels of 6 classes, of one 1, wanted .* 2 images of each"):
        diagnostics.judge(real, real, alone)
    with pytest.raises(ValueError, match=r"got 12 images and 12 labels of 4 classes, .* wanted .* 4 on average"):
        diagnostics.judge(real[:12], real[:12], np.arange(12) // 3)
    with pytest.raises(ValueError, match="got 400 images and 399 labels"):
        diagnostics.judge(real, real, labels[:399])
    with pytest.raises(ValueError, match="labels of 1 classes"):
        diagnostics.judge(real, real, np.zeros(400, int))


@pytest.mark.parametrize(("shape", "values"), [((8, 8, 1), 64), ((32, 24, 3), 768), ((12, 96, 5), 960)])
def test_the_classifier_takes_any_size(shape, values):
    assert vectors(np.zeros((2, *shape), np.uint8)).shape == (2, values)


def test_a_list_of_pil_images_is_measured_as_the_array_that_it_holds() -> None:
    rng = np.random.default_rng(0)
    for shape, level in (((80, 8, 8, 3), 2), ((20, 8, 8, 1), 2)):
        real, array = (rng.integers(0, 256, shape, np.uint8) for _ in range(2))
        images = [Image.fromarray(image if shape[3] == 3 else image[..., 0]) for image in array]
        expected = frechet_wavelet_distance(real, array, level)
        assert frechet_wavelet_distance(real, images, level).value == expected.value
        assert frechet_wavelet_distance(images, images, level).value < 1e-6
        rows, apart = diagnostics.nearest_neighbours(images, array)
        assert (rows[:, 0] == np.arange(len(array))).all() and not apart.any()
        assert frechet_wavelet_distance(real, tuple(images), level).value == expected.value
    other, palette, tensor = Image.new("L", (4, 4)), Image.new("P", (8, 8)), torch.zeros(8, 8)
    for wrong in ([], [images[0], other], [palette] * 20, [array[0]] * 20, [tensor, tensor + 1]):
        with pytest.raises(ValueError, match="wanted PIL images of one size, all L or all RGB"):
            diagnostics.UnitBatches(wrong)


@pytest.mark.parametrize(
    "convert", [">f4", "uint16", "int64", "bool", "complex64", "object", "longdouble", Path("a"), None]
)
def test_what_are_no_images_is_said_in_one_line(photographs, convert) -> None:
    """Of types that torch does not take, or has no minimum of, or that are no arrays, as a path or a Dataset."""
    images = np.zeros((len(photographs), 3, 32, 32))
    wrong = images.astype(convert) if isinstance(convert, str) else convert
    for measure in (lambda: frechet_wavelet_distance(photographs, wrong), lambda: frechet.split_floor(wrong)):
        with pytest.raises(
            ValueError, match=r"^got \S+ images \(.*\), wanted one or more, uint8 .* a Dataset's \.images$"
        ):
            measure()
