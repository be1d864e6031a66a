import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
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


def palette(**options) -> bytes:
    image = Image.fromarray(GREY // 128, "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encoded(image, **options)


def animated() -> bytes:
    frames = [Image.fromarray(frame) for frame in (GREY, 255 - GREY)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


CMYK = Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)]), "CMYK")
WIDE_COLOURS = np.dstack([WIDE, WIDE[::-1], WIDE.T])
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
    for processes in (None, 2, 0):
        with decoding.decoded(iter(chunks(20)), (8, 8, 3), processes=processes) as results:
            for got, wanted in zip(results, expected, strict=True):
                np.testing.assert_array_equal(got[0], wanted[0])
                assert got[1:] == wanted[1:]


def test_a_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    monkeypatch.setattr(decoding, "SERVE", "sys.exit(3)")
    with (
        decoding.decoded(chunks(4), (8, 8, 3)) as results,
        pytest.raises(RuntimeError, match="code 3 at or after image 0"),
    ):
        list(results)


def test_processes_need_no_torch_and_end_with_a_killed_parent():
    code = "import sys, wddm.decoding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = (
        "import itertools; from wddm import decoding; decoding.cores = lambda: 2; "
        "context = decoding.decoded(itertools.repeat([(b'', None, '')]), (8, 8, 3)); results = context.__enter__(); "
        "next(results); print('decoding', flush=True); [None for _ in results]"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "decoding\n"
    time.sleep(0.2)
    parent.kill()
    assert parent.communicate(timeout=20) == ("", "")  # returns when the last one that could write has gone
