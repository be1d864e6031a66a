"""decoding: images of any kind -> an .npy file of uint8 pixels of one size, on every core.

The rule, in this order:
- the first frame is read, from a file in one of FORMATS, whatever its name says;
- 16-bit channels keep their high byte, 12-bit ones their upper 8 bits; 32-bit integers count as 16-bit if they fit.
  White-is-zero TIFFs are inverted. Refused, since nothing says which number is white, are files of floats, and TIFFs of
  more than 8 bits whose values all lie in the lowest quarter of the range;
- palettes, YCbCr and CMYK become RGB, and images with a readable colour profile become sRGB;
- transparency of every kind is laid on white, and the image is turned upright as its EXIF orientation says;
- the image is scaled with PIL's antialiased Lanczos filter until it covers the size, and its centre is cut out on whole
  pixels, so that an image that needs no scaling keeps its pixels.
Arrays are uint8, uint16 (the high byte) or floats in [0, 1], of any number of channels.

No torch here: processes that decode import this module alone.
"""

import io
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import lru_cache, partial
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

RULE = 2  # part of the key of every prepared set: raise it when a new rule above gives any image other pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
IMAGES_PER_PROCESS = 1024  # with fewer, a process costs more than it saves
SECONDS = 60  # in which a process must decode an image; for a chunk, 2 more for each image
SERVE = "from wddm.decoding import _serve; _serve()"
TiffImagePlugin.OPEN_INFO |= {  # TIFFs that PIL decodes but does not list, most of them white-is-zero
    (b"MM", 1, (1,), 1, (32,), ()): ("I", "I;32B"),
    (b"MM", 0, (1,), 1, (16,), ()): ("I;16B", "I;16B"),
    (b"II", 0, (1,), 1, (12,), ()): ("I;16", "I;12"),
}
SUBFILE, BITS, PHOTOMETRIC, PLANES, COLOURS, SAMPLE_FORMAT = 254, 258, 262, 284, 320, 339  # tags of TIFF

Item = tuple[bytes | Path | np.ndarray | str | None, int, str]  # image, or why it has none; label, or -1; its origin
Shape = tuple[int, int, int]  # height, width, channels
Result = TypeVar("Result")
Decoded = tuple[np.ndarray, list[int], list[tuple[str, str]]]


def decode(chunk: list[Item], shape: Shape) -> Decoded:
    """Pixels uint8 (n, H, W, C) and labels of the items that decode; origin and error of each of the others."""
    pixels, labels, failed = np.empty((len(chunk), *shape), np.uint8), list[int](), list[tuple[str, str]]()
    for image, label, where in chunk:
        try:
            pixels[len(labels)] = _pixels(image, shape)
        except Exception as error:  # PIL's decoders raise nearly everything
            failed.append((where, " ".join(str(error).split()) or type(error).__name__))
        else:
            labels.append(label)
    return pixels[: len(labels)], labels, failed


def _pixels(image: bytes | Path | np.ndarray | str | None, shape: Shape) -> np.ndarray:
    """Pixels uint8 (H, W, C) of one image, by the rule at the top."""
    if image is None or isinstance(image, str):
        raise ValueError(image or "there is nothing in its place")
    bands = _of_array(image) if isinstance(image, np.ndarray) else [_of_file(image)]
    if len(bands) == 1 and shape[2] in (1, 3):
        bands = [bands[0].convert("RGB" if shape[2] == 3 else "L")]
    elif len(bands) != shape[2]:
        raise ValueError(f"{len(bands)} channels, wanted {shape[2]}")
    return np.dstack([np.asarray(_fitted(band, *shape[:2])) for band in bands])


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The picture scaled until it covers the size, and its centre cut out along whole pixels of the scaled one."""
    if picture.size == (width, height):
        return picture
    scale = max(height / picture.height, width / picture.width)
    full = round(picture.width * scale), round(picture.height * scale)
    left, top = (full[0] - width) // 2, (full[1] - height) // 2
    across, down = picture.width / full[0], picture.height / full[1]  # where these are 1, pixels stay what they are
    box = left * across, top * down, (left + width) * across, (top + height) * down
    return picture.resize((width, height), Image.Resampling.LANCZOS, tuple(np.minimum(box, 2 * picture.size)))


def _of_array(array: np.ndarray) -> list[Image.Image]:
    """An array (H, W) or (H, W, C) as 8-bit pictures: one in RGB if it has three channels, else one per channel."""
    if array.dtype.kind == "u" and array.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # true of NaN, too
            raise ValueError("floats beyond [0, 1]: scale them")
        array = np.round(array * 255.0).astype(np.uint8)
    if array.shape[2:] == (3,):
        return [Image.fromarray(array)]
    return [Image.fromarray(band) for band in np.moveaxis(np.atleast_3d(array), -1, 0)]


def opened(image: bytes | Path) -> Image.Image:
    """An image file in one of FORMATS, read no further than its header; ValueError if it is in none of them."""
    try:
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)
    except UnidentifiedImageError:  # whose text is an address in memory
        head = image[:4] if isinstance(image, bytes) else image.open("rb").read(4)
        if head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise ValueError("a TIFF of samples that PIL does not read: save it as PNG, or an array as .npy") from None
        raise ValueError(f"of no known format, which are {', '.join(FORMATS)}") from None


def is_grey(image: Any) -> bool:
    """Whether an image is grey by its header, or has no header to tell; a palette counts as colours."""
    with suppress(Exception), opened(image) as picture:  # decoding it says what is wrong
        return picture.mode != "LAB" and picture.mode[0] in "1LIF"
    return True


def _of_file(image: bytes | Path) -> Image.Image:
    """The picture in a file, in mode L, RGB or CMYK: 8 bits, upright, on white, in sRGB if it has a colour profile."""
    picture: Any = opened(image)
    _check(image, picture)
    raw = picture.tile[0].args if picture.tile else None  # how the file stores its pixels
    ImageOps.exif_transpose(picture, in_place=True)
    profile = picture.info.get("icc_profile")
    opaque = _opaque(image, picture, raw)
    picture = _eight_bits(picture.convert("LA") if picture.mode == "La" else picture)
    if opaque is None and picture.has_transparency_data:
        opaque = picture.convert("RGBA").getchannel("A")
    if picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("RGBA").convert("L" if picture.mode in ("1", "LA") else "RGB")
    picture.info.pop("transparency", None)
    transform = _to_srgb(profile, picture.mode) if profile else None
    if transform:
        picture = ImageCms.applyTransform(picture, transform) or picture
    if opaque:
        picture = Image.composite(picture, Image.new(picture.mode, picture.size, "white"), opaque)
    return picture


def _check(image: bytes | Path, picture: Any) -> None:
    """ValueError for files that PIL decodes to wrong pixels without an error."""
    wrong = False
    if picture.format == "JPEG2000" and picture.mode in ("RGB", "RGBA"):
        content = image if isinstance(image, bytes) else image.read_bytes()
        wrong = content[content.index(b"\xff\x4f\xff\x51") + 42] & 127 > 7  # over 8 bits: white turns black
    elif picture.format == "TIFF":
        tags, raw = picture.tag_v2, picture.tile[0][0] == "raw"
        wrong = (
            (tags.get(PLANES) == 2 and (picture.mode == "LA" or (raw and max(tags.get(BITS, (1,))) > 8)))
            or (tags.get(SUBFILE, 0) & 1 == 1 and picture.n_frames > 1)  # a thumbnail, as in a camera's raw file
            or (picture.mode == "P" and 0 < max(tags.get(COLOURS, (256,))) < 256)
            or (picture.mode == "I" and not raw and tags.prefix == b"MM")
        )
    if wrong:
        raise ValueError("colours, planes or pages that PIL does not read right: save it as PNG")


def _opaque(image: bytes | Path, picture: Image.Image, raw: Any) -> Image.Image | None:
    """Mask: 0 where a pixel has the transparent colour (PNG's tRNS, at the file's depth), else 255; or None."""
    key = picture.info.get("transparency")
    if key is None or picture.mode not in ("1", "L", "I;16", "RGB"):
        return None
    samples = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    if raw == "RGB;16B":  # PIL keeps the high bytes; in the other byte order it reads the low ones
        low: Any = opened(image)
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        samples = samples.astype(np.uint16) << 8 | np.asarray(ImageOps.exif_transpose(low))
    elif picture.mode != "I;16":
        key = np.bitwise_and(key, 255)
    differs = samples != np.multiply(key, {"L;2": 85, "L;4": 17}.get(raw, 1))
    return Image.fromarray((differs.any(-1) if differs.ndim == 3 else differs).astype(np.uint8) * 255)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture with the upper 8 bits of deeper samples; ValueError if nothing says which value is white."""
    tags = getattr(picture, "tag_v2", {})
    bits, signed, brightest = max(tags.get(BITS, (16,))), 2 in tags.get(SAMPLE_FORMAT, ()), 255
    if picture.mode == "F" or (signed and bits == 8):
        kind = "floats, of unknown range" if picture.mode == "F" else "signed 8-bit integers"
        raise ValueError(f"{kind}: scale them to 8 or 16 unsigned bits, or give .npy in [0, 1]")
    if picture.mode[0] == "I":  # which `convert` would clip at 255
        wide = np.asarray(picture).astype(np.int64)
        white = 2 ** (bits - signed if bits <= 16 else 16) - 1
        if wide.min() < 0 or wide.max() > white:
            raise ValueError("32-bit integers beyond 16 bits: scale them to 8 or 16, or give .npy in [0, 1]")
        brightest = wide.max() * 255 // white if wide.any() else 255
        wide = white - wide if tags.get(PHOTOMETRIC) == 0 else wide  # PIL inverts 8 bits only
        picture = Image.fromarray((wide >> (white.bit_length() - 8)).astype(np.uint8))
    elif tags and bits > 8 and picture.mode[:3] == "RGB":
        brightest = np.asarray(picture)[..., :3].max()
    if tags and brightest < 64:
        raise ValueError(f"{bits}-bit values in the lowest quarter of the range, nearly black: scale them to all of it")
    return picture


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform from an embedded profile to sRGB; None if it is unreadable, of another `mode`, or sRGB already."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    cube = Image.fromarray(51 * np.indices((6, 6, 6), np.uint8).reshape(3, 6, 36).transpose(1, 2, 0))
    if mode == "RGB" and np.abs(np.asarray(cube).astype(int) - ImageCms.applyTransform(cube, transform)).max() <= 2:
        return None
    return transform


def write_images(
    chunks: Iterable[list[Item]], count: int, shape: Shape, to: Path, on_error: str, progress: bool
) -> tuple[list[int], list[str]]:
    """Decode `count` images into the .npy file `to`, or raise ValueError; return labels, origins of skipped ones."""
    labels, skipped = [], []
    bar = tqdm(total=count, desc="decoding", unit="image", file=sys.stdout, disable=not progress)
    with to.open("wb") as file, bar, closing(decoded(chunks, shape, count // IMAGES_PER_PROCESS)) as results:
        header = partial(np.lib.format.write_array_header_1_0, file)  # its length is the same for any count
        header({"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
        for pixels, chunk_labels, failed in results:
            if failed and on_error != "skip":
                where, why = failed[0]
                raise ValueError(f"got {where}, which does not decode ({why}): repair or remove it, or on_error=skip")
            pixels.tofile(file)
            labels += chunk_labels
            skipped += [where for where, _ in failed]
            bar.update(len(pixels) + len(failed))
        file.seek(0)
        header({"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)})
    return labels, skipped


def decoded(chunks: Iterable[list[Item]], shape: Shape, processes: int) -> Generator[Decoded, None, None]:
    """`decode` every chunk, in order and a few chunks ahead, in a process per core, but at most `processes`.

    PIL holds the interpreter's lock while it decodes small images: on CIFAR-10 two threads are half as fast as one, two
    processes 1.6 times as fast. Where there would be one process or none, threads decode.
    """
    number = min(cores(), processes)
    with ExitStack() as stack:
        idle = [_worker(stack) for _ in range(number if number > 1 else 0)]

        def elsewhere(chunk: list[Item]) -> Decoded:
            connection, process = idle.pop()  # never empty: a process per thread
            try:
                connection.send((chunk, shape, SECONDS + 2 * len(chunk)))
                result = connection.recv()
            except (EOFError, OSError):
                idle.append(_worker(stack))
                if len(chunk) > 1:  # one by one, to find the image that it died of
                    pixels, labels, failed = zip(*(elsewhere([item]) for item in chunk), strict=True)
                    return np.concatenate(pixels), [*chain(*labels)], [*chain(*failed)]
                code = process.wait()
                how = f"took over {SECONDS} s" if code == -signal.SIGALRM else f"died with code {code}"
                return np.empty((0, *shape), np.uint8), [], [(chunk[0][2], f"its decoding process {how}")]
            idle.append((connection, process))
            return result

        function, threads = (elsewhere, number) if idle else (partial(decode, shape=shape), cores())
        yield from ahead(function, chunks, threads)


def _worker(stack: ExitStack) -> tuple[Connection, subprocess.Popen]:
    """The connection to a new process that runs `_serve`, and the process; closing the `stack` kills it.

    The process ends when the parent's end of the socket closes, so that a killed parent leaves none behind, as it would
    with a ProcessPoolExecutor; and it does not import the caller's script. What decoders print is thrown away.
    """
    ours, theirs = Pipe()
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {SERVE}", str(theirs.fileno())]
    none = subprocess.DEVNULL
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=none, stdout=none, stderr=none)
    stack.enter_context(process)
    stack.callback(process.kill)
    return stack.enter_context(ours), process


def _serve() -> None:
    """What a process of `_worker` runs. An alarm ends it when a decoder hangs, even if the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, ConnectionError):  # the parent has gone, or was killed
        while True:
            chunk, shape, seconds = connection.recv()
            signal.alarm(seconds)
            result = decode(chunk, shape)
            signal.alarm(0)
            connection.send(result)


def ahead(function: Callable[[Any], Result], items: Iterable, threads: int) -> Generator[Result, None, None]:
    """`map(function, items)`, in order, with a few results computed in threads before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
