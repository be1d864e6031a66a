import io
import struct
import subprocess
import sys
import time
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from local_data import encoded, pictures
from PIL import Image

from wddm import decoding

RGB = pictures(1, 8)[0]
GREY = RGB[..., 0]
GREYS = np.repeat(GREY[..., None], 3, -1)
ALPHA = pictures(1, 8, seed=1)[0, ..., :1]
WIDE = np.arange(0, 65536, 1024, np.uint16).reshape(8, 8)  # 16 bits
ON_WHITE = (RGB.astype(float) * (ALPHA / 255) + 255 * (1 - ALPHA / 255)).round()


def decode_one(image, size: int = 8, channels: int = 3) -> np.ndarray:
    pixels, labels, failed = decoding.decode([(image, 7, "it")], (size, size, channels))
    assert not failed and labels == [7] and pixels.shape == (1, size, size, channels) and pixels.dtype == np.uint8
    return pixels[0]


def png_rgb16(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which PIL reads but does not write."""

    def block(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + block(b"IDAT", zlib.compress(lines)) + block(b"IEND", b"")


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def palette(**options) -> bytes:
    image = Image.fromarray(GREY // 128, "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encoded(image, **options)


def animated() -> bytes:
    frames = [Image.fromarray(frame) for frame in (GREY, 255 - GREY)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


CMYK = Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)]), "CMYK")
WIDE_COLOURS = np.dstack([WIDE, WIDE[::-1], WIDE.T])
CONTIG = {"photometric": "minisblack", "planarconfig": "contig"}
PREMULTIPLIED = np.dstack([np.round(GREY * (ALPHA[..., 0] / 255)).astype(np.uint8), ALPHA])
GREY_ON_WHITE = np.round(GREY * (ALPHA[..., 0] / 255) + 255 - ALPHA[..., 0].astype(float))
WHITE = np.full_like(RGB, 255)
CORNER = RGB.copy()
CORNER[0, 0] = 255
COLOURS = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)[GREY // 128]
KEYED = np.where(GREY[..., None] < 128, 255, COLOURS)  # the first colour of the palette is transparent


@pytest.mark.parametrize(
    ("image", "expected", "within"),
    [
        pytest.param(encoded(RGB), RGB, 0, id="RGB"),
        pytest.param(encoded(RGB, "WEBP", lossless=True), RGB, 0, id="WebP"),
        pytest.param(encoded(GREYS, "JPEG", quality=100), GREYS, 2, id="JPEG"),
        pytest.param(encoded(GREY), GREYS, 0, id="grey"),
        pytest.param(encoded(Image.fromarray(GREY > 99)), 255 * (GREYS > 99), 0, id="black and white"),
        pytest.param(palette(), COLOURS, 0, id="palette"),
        pytest.param(palette(transparency=0), KEYED, 0, id="palette, a colour transparent"),
        pytest.param(palette(transparency=bytes([0, 255])), KEYED, 0, id="palette with alpha"),
        pytest.param(encoded(np.dstack([RGB, ALPHA])), ON_WHITE, 1, id="alpha"),
        pytest.param(encoded(np.dstack([RGB, 0 * ALPHA])), np.full_like(RGB, 255), 0, id="invisible"),
        pytest.param(encoded(RGB, transparency=tuple(map(int, RGB[0, 0]))), CORNER, 0, id="a colour transparent"),
        pytest.param(encoded(CMYK, "TIFF"), 255 - RGB, 0, id="CMYK"),
        pytest.param(encoded(CMYK, "JPEG", quality=100, subsampling=0), 255 - RGB, 8, id="CMYK JPEG"),
        pytest.param(encoded(WIDE), WIDE >> 8, 0, id="16 bits, PNG"),
        pytest.param(encoded(WIDE, "TIFF"), WIDE >> 8, 0, id="16 bits, TIFF"),
        pytest.param(encoded(WIDE, "PPM"), WIDE >> 8, 0, id="16 bits, PGM"),
        pytest.param(encoded(WIDE.astype(np.int32), "TIFF"), WIDE >> 8, 0, id="16 bits in 32"),
        pytest.param(tiff(WIDE.astype(np.uint32), byteorder=">"), WIDE >> 8, 0, id="16 bits in 32, big-endian"),
        pytest.param(tiff((WIDE // 2).astype(np.int16)), WIDE >> 8, 0, id="16 bits, signed"),
        pytest.param(tiff(WIDE_COLOURS, photometric="rgb", byteorder=">"), WIDE_COLOURS >> 8, 0, id="16 bits, RGB"),
        pytest.param(tiff(PREMULTIPLIED, extrasamples=["assocalpha"], **CONTIG), GREY_ON_WHITE, 2, id="premultiplied"),
        pytest.param(encoded(GREY, "GIF", transparency=int(GREY[0, 0])), np.where(GREY[0, 0] == GREY, 255, GREY), 0,
                     id="GIF, a grey transparent"),
        pytest.param(encoded(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"), WHITE, 1, id="Lab"),
        pytest.param(png_rgb16(WIDE_COLOURS), WIDE_COLOURS >> 8, 0, id="16 bits, colour"),
        pytest.param(animated(), GREYS, 0, id="the first frame"),
        pytest.param(GREY, GREYS, 0, id="pixels"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb_by_the_rule(image, expected, within):
    expected = np.broadcast_to(expected[..., None] if expected.ndim == 2 else expected, (8, 8, 3)).astype(int)
    np.testing.assert_allclose(decode_one(image).astype(int), expected, rtol=0, atol=within)


def test_one_channel_is_grey():
    np.testing.assert_array_equal(decode_one(encoded(GREY), channels=1)[..., 0], GREY)
    np.testing.assert_array_equal(decode_one(encoded(WIDE), channels=1)[..., 0], WIDE >> 8)


TURNS = [
    lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1], lambda x: x.swapaxes(0, 1),
    lambda x: np.rot90(x, -1), lambda x: x[::-1, ::-1].swapaxes(0, 1), np.rot90,
]  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_one(encoded(RGB, exif=exif)), TURNS[orientation - 1](RGB))


def test_the_shorter_side_is_fitted_and_the_centre_cut_out():
    broad = pictures(1, 32)[0][:16]  # (16, 32, 3)
    oracle = np.asarray(Image.fromarray(broad).resize((16, 8), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(decode_one(encoded(broad)).astype(int), oracle[:, 4:12].astype(int), rtol=0, atol=1)
    np.testing.assert_array_equal(decode_one(encoded(np.ascontiguousarray(broad[4:12, 12:20]))), broad[4:12, 12:20])


def test_a_cut_keeps_the_pixels_and_other_sizes_are_scaled_to_cover():
    """For every parity of the difference; an odd one leaves the extra column or row at the end."""
    for height, width in ((8, 9), (9, 8), (8, 11), (13, 8)):
        image = pictures(1, 16)[0][:height, :width]
        top, left = (height - 8) // 2, (width - 8) // 2
        cut = image[top : top + 8, left : left + 8]
        np.testing.assert_array_equal(decode_one(encoded(np.ascontiguousarray(image))), cut)
    image = pictures(1, 64, seed=2)[0][:40, :51]
    pixels, _, _ = decoding.decode([(image, None, "")], (20, 12, 3))
    oracle = np.asarray(Image.fromarray(image).resize((26, 20), Image.Resampling.LANCZOS))[:, 7:19]
    np.testing.assert_allclose(pixels[0].astype(int), oracle.astype(int), rtol=0, atol=1)


def png_keyed(pixels: np.ndarray, bits: int, key: tuple[int, ...]) -> bytes:
    """A PNG of 2, 4, 8 or 16 bits whose colour `key` is transparent, by the specification: PIL does not write all."""
    colours = 3 if pixels.ndim == 3 else 1
    samples = pixels.reshape(len(pixels), -1).astype(">u2")
    bit = np.unpackbits(samples.view(np.uint8).reshape(*samples.shape, 2), axis=-1)[..., 16 - bits :]
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in bit.reshape(len(pixels), -1))

    def block(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", *pixels.shape[1::-1], bits, 2 if colours == 3 else 0, 0, 0, 0)
    blocks = {b"IHDR": head, b"tRNS": struct.pack(f">{colours}H", *key), b"IDAT": zlib.compress(lines), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(block(*one) for one in blocks.items())


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colours", [1, 3])
def test_a_transparent_colour_is_white_at_any_depth(bits, colours):
    """As OpenCV decodes it, which gives the key an alpha of 0; the colour next to it stays."""
    if colours == 3 and bits < 8:
        return
    rng, top = np.random.default_rng(bits), 2**bits - 1
    samples = rng.integers(0, top + 1, (8, 8, colours))
    key = tuple(samples[2, 2])
    samples[3, 3], samples[4, 4] = samples[2, 2], samples[2, 2]
    samples[4, 4, -1] ^= 1  # in 16 bits, a colour that is the same in 8
    content = png_keyed(samples[..., 0] if colours == 1 else samples, bits, key)
    shown = (samples >> 8 if bits == 16 else samples * 255 // top).repeat(3 // colours, -1)
    transparent = (samples == key).all(-1)
    oracle = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if oracle.ndim == 3 and oracle.shape[2] == 4:
        np.testing.assert_array_equal(oracle[..., 3] == 0, transparent)
    np.testing.assert_array_equal(decode_one(content), np.where(transparent[..., None], 255, shown))
    assert transparent.sum() >= 2 and not transparent[4, 4]


@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}, {"compression": "zlib"}])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bits", [1, 8, 12, 16])
def test_tiffs_of_every_depth_whichever_end_is_white(bits, photometric, options):
    samples = np.linspace(0, 2**bits - 1, 64).round().astype(int).reshape(8, 8)
    kind = {1: bool, 8: np.uint8}.get(bits, np.uint16)
    if bits == 12 and options:
        return  # which PIL does not read, and says so
    content = tiff(samples.astype(kind), photometric=photometric, bitspersample=bits if bits == 12 else None, **options)
    shown = samples * 255 if bits == 1 else samples >> (bits - 8)
    shown = 255 - shown if photometric == "miniswhite" else shown
    np.testing.assert_array_equal(decode_one(content, channels=1)[..., 0], shown)


def test_a_colour_profile_becomes_srgb():
    """As LittleCMS does it for imagecodecs; a profile of sRGB leaves the pixels, an unreadable profile is ignored."""
    wide = imagecodecs.cms_profile("rgb", whitepoint=(0.3127, 0.3290, 1.0), gamma=1.8,
                                   primaries=[0.68, 0.32, 1.0, 0.265, 0.69, 1.0, 0.15, 0.06, 1.0])  # fmt: skip
    srgb = imagecodecs.cms_profile("srgb")
    oracle = imagecodecs.cms_transform(RGB, wide, srgb, colorspace="rgb", outcolorspace="rgb").astype(int)
    assert np.abs(oracle - RGB).max() > 20
    for kind in ({"kind": "PNG"}, {"kind": "TIFF"}, {"kind": "WEBP", "lossless": True}):
        decoded = decode_one(encoded(RGB, icc_profile=wide, **kind))
        np.testing.assert_allclose(decoded.astype(int), oracle, rtol=0, atol=2)
        for harmless in (srgb, b"no profile"):
            np.testing.assert_array_equal(decode_one(encoded(RGB, icc_profile=harmless, **kind)), RGB)
    alpha = decode_one(encoded(np.dstack([RGB, 255 * (ALPHA > 99)]).astype(np.uint8), icc_profile=wide))
    np.testing.assert_allclose(alpha.astype(int), np.where(ALPHA > 99, oracle, 255), rtol=0, atol=2)
    grey = imagecodecs.cms_profile("gray", gamma=1.0)
    oracle = imagecodecs.cms_transform(GREY, grey, srgb, colorspace="gray", outcolorspace="rgb")
    np.testing.assert_allclose(decode_one(encoded(GREY, icc_profile=grey)).astype(int), oracle.astype(int), atol=2)


def test_arrays_of_any_channels_are_scaled_band_by_band():
    wide = np.random.default_rng(0).integers(0, 65536, (8, 8, 5), dtype=np.uint16)
    np.testing.assert_array_equal(decode_one(wide, channels=5), wide >> 8)
    np.testing.assert_array_equal(decode_one((wide >> 8) / np.float32(255), channels=5), wide >> 8)
    for channels in (1, 2, 4, 5):
        bands = np.repeat(pictures(1, 16), 2, -1)[0, ..., :channels]
        oracle = [np.asarray(Image.fromarray(bands[..., i]).resize((8, 8), 1)) for i in range(channels)]
        np.testing.assert_array_equal(decode_one(bands, channels=channels), np.dstack(oracle))
    np.testing.assert_array_equal(decode_one(RGB / 255), RGB)
    _, _, failed = decoding.decode([(wide / 1e4, None, "a"), (wide * np.nan, None, "b"), (wide, None, "c")], (8, 8, 5))
    assert [why for _, why in failed] == ["floats beyond [0, 1]: scale them"] * 2
    assert decoding.decode([(wide, None, "c")], (8, 8, 3))[2] == [("c", "5 channels, wanted 3")]


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "of no known format"),
        (b"not an image", "of no known format"),
        (encoded(RGB)[:100], "."),
        (None, "."),
        (encoded(WIDE.astype(np.float32), "TIFF"), "floats, of unknown range"),
        (encoded(WIDE.astype(np.int32) * 2, "TIFF"), "32-bit integers beyond 16 bits"),
        (encoded(-WIDE.astype(np.int32), "TIFF"), "32-bit integers beyond 16 bits"),
        (encoded(WIDE // 16, "TIFF"), "16-bit values in the lowest quarter of the range"),
        (encoded(WIDE.astype(np.int32) // 256, "TIFF"), "32-bit values in the lowest quarter of the range"),
        (tiff(WIDE_COLOURS // 16, photometric="rgb"), "16-bit values in the lowest quarter of the range"),
        (tiff(np.int8(GREY - 128)), "signed 8-bit integers"),
        (tiff(WIDE / 65535), "a TIFF of samples that PIL does not read: save it as PNG"),
        (tiff(np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig"), "a TIFF of samples"),
        (encoded(RGB, "EPS"), "of no known format"),
        (encoded(RGB, "PCX"), "of no known format"),
    ],
)
def test_what_does_not_decode_is_said_and_the_rest_kept(image, why):
    pixels, labels, failed = decoding.decode([(encoded(RGB), 1, "a"), (image, 2, "b"), (GREY, 3, "c")], (8, 8, 3))
    np.testing.assert_array_equal(pixels, [RGB, GREYS])
    assert labels == [1, 3] and [where for where, _ in failed] == ["b"] and why in failed[0][1] + "."
    assert "\n" not in failed[0][1] and "0x" not in failed[0][1]


# ------------------------------------------------------------------------------------------------- processes


def chunks(count: int) -> list[list[decoding.Item]]:
    images = [encoded(image) for image in pictures(3 * count, 8)]
    cells = [b"broken" if i % 7 == 5 else image for i, image in enumerate(images)]
    return [[(cells[i], i, f"image {i}") for i in range(3 * k, 3 * k + 3)] for k in range(count)]


def test_processes_give_what_decode_gives_in_order(monkeypatch):
    monkeypatch.setattr(decoding, "cores", lambda: 3)
    expected = [decoding.decode(chunk, (8, 8, 3)) for chunk in chunks(20)]
    for processes in (9, 2, 0):
        results = decoding.decoded(iter(chunks(20)), (8, 8, 3), processes)
        for got, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(got[0], wanted[0])
            assert got[1:] == wanted[1:]


def test_a_process_that_prints_hangs_or_dies_is_survived_and_its_image_named(monkeypatch):
    """At an image that starts with x the process ends; at one that starts with y it hangs until its alarm rings."""
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    monkeypatch.setattr(decoding, "SECONDS", -1)  # for one image 1 second, for three 5
    spoilt = """
import os, sys, time
from wddm import decoding
def pixels(image, shape, decode=decoding._pixels):
    print("decoding"), os.write(1, b"decoding"), os.write(2, b"decoding")
    os._exit(3) if image[:1] == b"x" else time.sleep(99) if image[:1] == b"y" else None
    return decode(image, shape)
decoding._pixels = pixels
decoding._serve()
"""
    monkeypatch.setattr(decoding, "SERVE", f"exec({spoilt!r})")
    some = chunks(6)
    some[1][0], some[3][2] = (b"x", 3, "the one"), (b"y", 11, "the other")
    got = list(decoding.decoded(iter(some), (8, 8, 3), 2))
    expected = [decoding.decode(chunk, (8, 8, 3)) for chunk in some]
    for i, (one, wanted) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(one[0], wanted[0])
        assert one[1] == wanted[1] and [where for where, _ in one[2]] == [where for where, _ in wanted[2]], i
    assert got[1][2][0] == ("the one", "its decoding process died with code 3")
    assert "its decoding process took over" in dict(got[3][2])["the other"]


def test_processes_need_no_torch_and_end_with_a_killed_parent():
    code = "import sys, wddm.decoding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = (
        "import itertools; from wddm import decoding; decoding.cores = lambda: 2; "
        "results = decoding.decoded(itertools.repeat([(b'', None, '')]), (8, 8, 3), 2); "
        "next(results); print('decoding', flush=True); [None for _ in results]"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "decoding\n"
    time.sleep(0.2)
    parent.kill()
    assert parent.communicate(timeout=20) == ("", "")  # returns when the last one that could write has gone


WIDE_RGB = np.dstack([WIDE, WIDE.T, WIDE[::-1]])
JPEG2000 = {"level": 0, "codecformat": "jp2", "reversible": True}


def thumbnail() -> bytes:
    """The first page of a camera's raw file is a smaller version of the second."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as pages:
        pages.write(RGB[::2, ::2], subfiletype=1, photometric="rgb")
        pages.write(RGB, photometric="rgb")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        imagecodecs.jpeg2k_encode(WIDE_RGB, **JPEG2000),  # white would be black
        imagecodecs.jpeg2k_encode(WIDE_RGB >> 4, bitspersample=12, **JPEG2000),
        tiff(np.moveaxis(WIDE_RGB, -1, 0).copy(), photometric="rgb", planarconfig="separate"),
        tiff(np.stack([GREY, 255 - GREY]), photometric="minisblack", planarconfig="separate", extrasamples=[2],
             compression="lzw"),
        tiff(GREY, photometric="palette", colormap=np.arange(768, dtype=np.uint16).reshape(3, 256) // 3),
        tiff(WIDE.astype(np.int32) << 8, byteorder=">", compression="lzw"),
        thumbnail(),
    ],
)  # fmt: skip
def test_what_pil_decodes_to_wrong_pixels_is_refused(content: bytes) -> None:
    pixels, labels, failed = decoding.decode([(content, 7, "it")], (8, 8, 3))
    assert len(pixels) == 0 and labels == [] and failed[0][0] == "it"
    assert "PIL does not read right: save it as PNG" in failed[0][1]


def test_the_same_in_forms_that_pil_reads_is_taken() -> None:
    colours = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 9)])
    for content, oracle in (
        (b"P5 8 8 4095\n" + (WIDE >> 4).astype(">u2").tobytes(), np.repeat((WIDE >> 8)[..., None], 3, -1)),
        (tiff(RGB, photometric="rgb", subfiletype=1), RGB),
        (imagecodecs.jpeg2k_encode(RGB, **JPEG2000), RGB),
        (tiff(np.moveaxis(RGB, -1, 0).copy(), photometric="rgb", planarconfig="separate"), RGB),
        (tiff(WIDE_RGB, photometric="rgb"), WIDE_RGB >> 8),
        (tiff(GREY, photometric="palette", colormap=(257 * colours).astype(np.uint16)), colours.T[GREY]),
    ):
        np.testing.assert_array_equal(decode_one(content), oracle)
