"""Oracles: PyWavelets for the coefficients, the published reference, then exact inversion over everything."""

from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from wddm.loading import load_strictly
from wddm.wavelets import WaveletCodec

SHIPPED = sorted((Path(__file__).parents[1] / "notebooks" / "models").glob("*/codec"))
WAVELETS = ("haar", "db2", "db4", "sym4", "coif1", "bior2.2", "bior4.4", "rbio1.3")


def pywt_packets(image: np.ndarray, wavelet: str, level: int, order: str = "AHVD") -> list[np.ndarray]:
    """Packets of one map, the last split the most significant."""
    maps = [image]
    for _ in range(level):
        split = [dict(zip("AHVD", (a, *d), strict=True))
                 for a, d in (pywt.dwt2(m, wavelet, mode="periodization") for m in maps)]  # fmt: skip
        maps = [parts[band] for band in order for parts in split]
    return maps


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("order", ["AHVD", "AVHD"])
@pytest.mark.parametrize("level", [1, 2])
def test_packets_are_those_of_pywavelets(wavelet: str, order: str, level: int) -> None:
    images = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    codec = WaveletCodec(wavelet, level, "packet", "none", order).double()
    coefficients = codec.encode(images).unflatten(1, (4**level, 3))
    for n in range(2):
        for colour in range(3):
            wanted = np.stack(pywt_packets(images[n, colour].numpy(), wavelet, level, order))
            assert_close(coefficients[n, :, colour], torch.from_numpy(wanted), atol=2e-6, rtol=0)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_pyramid_is_pywavelets_wavedec_folded(wavelet: str) -> None:
    image = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    codec = WaveletCodec(wavelet, 3, "pyramid", "none").double()
    coefficients = dict(zip(codec.bands(), codec.encode(image)[0], strict=True))
    approximation, coarse, middle, fine = pywt.wavedec2(image[0, 0].numpy(), wavelet, "periodization", level=3)
    assert_close(coefficients["A"], torch.from_numpy(approximation), atol=2e-6, rtol=0)
    for i, band in enumerate("HVD"):
        assert_close(coefficients[band], torch.from_numpy(coarse[i]), atol=2e-6, rtol=0)
        for name, details, cell in ((f"{band}2", middle, 2), (f"{band}1", fine, 4)):
            for position in range(cell**2):
                y, x = divmod(position, cell)
                wanted = torch.from_numpy(details[i][y::cell, x::cell].copy())
                assert_close(coefficients[f"{name}.{position}"], wanted, atol=2e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    wavelet=st.sampled_from(WAVELETS),
    level=st.integers(0, 3),
    transform=st.sampled_from(["packet", "pyramid"]),
    scaling=st.sampled_from(["dyadic", "none"]),
    order=st.sampled_from(["AHVD", "AVHD"]),
    rows=st.integers(5, 8),
    columns=st.integers(5, 8),
    colours=st.sampled_from([1, 3, 5]),
)
def test_decode_inverts_encode(wavelet, level, transform, scaling, order, rows, columns, colours) -> None:
    side = 8 if wavelet in ("bior4.4", "db4", "sym4") else 4
    images = torch.rand(2, colours, side * rows, side * columns, dtype=torch.float64) * 2 - 1
    if level == 3:
        images = torch.nn.functional.interpolate(images, scale_factor=8 // side * 2)
    codec = WaveletCodec(wavelet, level, transform, scaling, order).double()
    coefficients = codec.encode(images)
    height, width = images.shape[2] // 2**level, images.shape[3] // 2**level
    assert coefficients.shape == (2, 4**level * colours, height, width)
    assert_close(codec.decode(coefficients), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym4"])
@pytest.mark.parametrize("transform", ["packet", "pyramid"])
def test_orthogonal_wavelets_keep_energy(wavelet: str, transform: str) -> None:
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    coefficients = WaveletCodec(wavelet, 2, transform, "none").double().encode(images)
    assert_close(coefficients.square().sum(), images.square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wavelet", [name for name in pywt.wavelist(kind="discrete") if name != "dmey"])
def test_every_family_that_is_accepted_reconstructs(wavelet: str) -> None:
    for level in (1, 2, 3):
        codec = WaveletCodec(wavelet, level, scaling="none").double()
        side = 2 ** (level - 1) * (codec.filter_length + codec.filter_length % 2)
        images = torch.rand(1, 1, side, side + 2**level, dtype=torch.float64) * 2 - 1
        assert_close(codec.decode(codec.encode(images)), images, atol=1e-5, rtol=0)


def test_calling_a_codec_encodes_and_so_do_its_exports() -> None:
    for wavelet in ("haar", "db2"):
        codec, images = WaveletCodec(wavelet, 2, scaling="dyadic"), torch.rand(2, 3, 16, 16)
        assert torch.equal(codec(images), codec.encode(images))
        assert_close(torch.export.export(codec, (images,)).module()(images), codec.encode(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_it_works_in_half_the_bits(wavelet: str, dtype: torch.dtype, recwarn, caplog) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    codec, batch = WaveletCodec(wavelet, 2), torch.rand(2, 3, 16, 16)
    wanted = codec.fit(images).encode(batch)
    half = WaveletCodec(wavelet, 2).to(dtype).fit(images)
    coefficients = half(batch.to(dtype))
    assert coefficients.dtype == half.decode(coefficients).dtype == half.clip_value.dtype == dtype
    assert_close(coefficients.float(), wanted, atol=0.1, rtol=0.05)
    assert_close(half.decode(coefficients).float(), batch, atol=0.04, rtol=0)
    assert not recwarn.list and not caplog.records


def test_dyadic_haar_stays_in_range_and_reaches_it() -> None:
    codec = WaveletCodec("haar", 2, scaling="dyadic")
    corners = torch.randint(0, 2, (64, 3, 16, 16)).float() * 2 - 1
    assert codec.encode(corners).abs().max() <= 1
    assert_close(codec.encode(torch.ones(1, 1, 4, 4))[0, 0], torch.ones(1, 1))


def test_level_0_is_the_identity() -> None:
    images = torch.randn(2, 3, 7, 9)
    codec = WaveletCodec("db4", 0, scaling="dyadic")
    assert torch.equal(codec.encode(images), images) and torch.equal(codec.decode(images), images)
    assert codec.bands() == ["pixels"]


def test_band_scaling_is_zero_mean_unit_variance_and_inverts() -> None:
    images = np.random.default_rng(0).integers(90, 256, (300, 16, 16, 3), dtype=np.uint8)  # of a mean that is not 0
    codec = WaveletCodec("haar", 2, scaling="band").fit(images, batch_size=77)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    coefficients = codec.encode(batch)
    assert_close(coefficients.mean((0, 2, 3)), torch.zeros(48), atol=1e-4, rtol=0)
    assert_close(coefficients.std((0, 2, 3)), torch.ones(48), atol=1e-3, rtol=0)
    assert_close(codec.clip_value, coefficients.abs().max())
    assert_close(codec.decode(coefficients), batch, atol=1e-5, rtol=0)


def test_band_scaling_without_statistics_decodes_nothing() -> None:
    with pytest.raises(ValueError, match="got images of 3 channels and no statistics"):
        WaveletCodec().decode(torch.zeros(1, 12, 4, 4))
    fitted = WaveletCodec().fit(np.zeros((2, 8, 8, 1), np.uint8))
    assert WaveletCodec(channels=1).encode(torch.zeros(1, 1, 8, 8)).isnan().all()  # and not as if its spread were 1
    with pytest.raises(ValueError, match="got images of 3 channels and statistics for 1"):
        fitted.decode(torch.zeros(1, 12, 4, 4))


def test_saved_codec_is_the_same(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 1), dtype=np.uint8)
    batch = torch.rand(2, 1, 16, 16) * 2 - 1
    for codec in (WaveletCodec("haar", 1).fit(images), WaveletCodec("db2", 2, "pyramid", "dyadic")):
        codec.save_pretrained(tmp_path / "codec")
        again = WaveletCodec.from_pretrained(tmp_path / "codec")
        assert torch.equal(again.encode(batch), codec.encode(batch))
        assert torch.equal(again.clip_value, codec.clip_value)


@pytest.mark.parametrize("scaling", ["none", "dyadic"])
def test_white_fits_below_the_clip_value_of_a_codec_without_statistics(scaling: str) -> None:
    codec = WaveletCodec("haar", 2, scaling=scaling)
    assert codec.clip_value == codec.encode(torch.ones(1, 1, 16, 16)).abs().max()


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.parent.name)
def test_the_codecs_that_ship_load(folder: Path) -> None:
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    codec = load_strictly(WaveletCodec.from_pretrained, folder)
    assert torch.equal(codec.clip_value, tensors["clip_value"]) and codec.clip_value > 1


def test_published_coefficients(published) -> None:
    reference = load_file(published / "reference.safetensors")
    codec = WaveletCodec(scaling="dyadic", band_order="AVHD")
    assert_close(codec.encode(reference["image"]), reference["coefficients"], atol=1e-4, rtol=0)
    assert_close(codec.decode(reference["coefficients"]), reference["image"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"level": 2}, (1, 3, 30, 32), "height 30, wanted a multiple of 4"),
        ({"level": 2}, (1, 3, 32, 34), "width 34, wanted a multiple of 4"),
        ({"wavelet": "db4", "level": 2}, (1, 3, 8, 16), "height 8, which is 4 at level 2, wanted at least 8"),
        ({"scaling": "band"}, (1, 3, 8, 8), "no statistics"),
        ({"wavelet": "daubechies"}, None, "wanted an orthogonal or biorthogonal"),
        ({"wavelet": "mexh"}, None, "wanted an orthogonal or biorthogonal"),
        ({"wavelet": "dmey"}, None, "got wavelet='dmey', wanted an .* one that reconstructs perfectly"),
        ({"transform": "packets"}, None, "wanted one of packet, pyramid"),
        ({"level": -1}, None, "wanted 0 or more"),
        ({"scaling": "Band"}, None, "got scaling='Band', wanted one of band"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(options: dict, shape: tuple | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveletCodec(**options).encode(torch.zeros(shape))


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize(
    "x", [torch.zeros(4, 32, 32), torch.zeros(1, 4, 32, 32, dtype=torch.uint8)], ids=["3d", "uint8"]
)
def test_one_image_alone_and_bytes_are_no_batch(wavelet: str, x: torch.Tensor) -> None:
    codec = WaveletCodec(wavelet, scaling="none")
    for function in (codec.encode, codec.decode):
        with pytest.raises(ValueError, match=r"got torch\..* 32\), wanted floats \(B, C, H, W\)"):
            function(x)


@pytest.mark.parametrize(
    "images", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3), np.float32)]
)
def test_statistics_are_of_bytes(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^got .* images \(.*, wanted uint8 \(N, H, W, C\)"):
        WaveletCodec().fit(images)


def test_a_filter_as_long_as_the_side_is_still_right() -> None:
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    got = WaveletCodec("db4", 1, scaling="none").double().encode(image)[0]
    assert_close(got, torch.from_numpy(np.stack(pywt_packets(image[0, 0].numpy(), "db4", 1))), atol=2e-6, rtol=0)
