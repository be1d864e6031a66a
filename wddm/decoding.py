"""decoding: encoded images of any kind -> an .npy file of uint8 pixels of one size, on every core.

The rule, in this order:
- the first frame of a file, turned upright as its EXIF orientation says;
- of 16 bits a channel the high byte, so that 0 to 65,535 becomes 0 to 255. 32-bit integers count as 16 bits where
  they fit, and do not decode otherwise; nor do floats: nothing says which number is white;
- transparency is laid on white, as a viewer or a paper shows it;
- black and white, grey, palettes, YCbCr and CMYK become RGB (where one channel is wanted, grey) by PIL's formulas;
  colour profiles are ignored;
- the shorter side is made the resolution with PIL's antialiased Lanczos filter, and the centre is cut out. An image
  that has the size already passes untouched.

No torch here: processes that decode import this module alone.
"""

import io
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO, BinaryIO, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

RULE = 1  # part of the keys of prepared sets: to be raised when the rule above gives any image other pixels
IMAGES_PER_PROCESS = 1024  # fewer do not pay for its start
SERVE = "from wddm.decoding import _serve; _serve()"

Item = tuple[bytes | Path | np.ndarray | None, int | None, str]  # image, label, where it is from
Shape = tuple[int, int, int]  # height, width, channels
Decoded = tuple[np.ndarray, list[int | None], list[tuple[str, str]]]


def decode(chunk: list[Item], shape: Shape) -> Decoded:
    """uint8 (n, H, W, C) and labels of the items that decode; where the others are from, and why they do not."""
    pixels = np.empty((len(chunk), *shape), np.uint8)
    labels: list[int | None] = []
    failed: list[tuple[str, str]] = []
    for image, label, where in chunk:
        try:
            pixels[len(labels)] = _pixels(image, shape)
        except MemoryError:
            raise
        except UnidentifiedImageError:  # whose text is an address in memory
            failed.append((where, "of no known format"))
        except Exception as error:  # PIL's decoders raise nearly everything
            failed.append((where, " ".join(str(error).split())))
        else:
            labels.append(label)
    return pixels[: len(labels)], labels, failed


def _pixels(image: bytes | Path | np.ndarray | None, shape: Shape) -> np.ndarray:
    """uint8 (H, W, C) of one image, by the rule above."""
    if image is None:
        raise ValueError("there is nothing in its place")
    if isinstance(image, np.ndarray):
        picture = Image.fromarray(image)
    else:
        picture = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode[0] == "I":  # which `convert` would clip at 255
        wide = np.asarray(picture)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("32-bit integers beyond 16 bits")
        picture = Image.fromarray((wide >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floats, of unknown range")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB" if shape[2] == 3 else "L")
    if picture.size != shape[:2]:
        picture = ImageOps.fit(picture, shape[:2], Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(shape)


def write_images(
    chunks: Iterable[list[Item]], count: int, shape: Shape, to: Path, on_error: str, progress: bool
) -> tuple[list[int | None], list[str]]:
    """Decode `count` images into the file `to`, a few chunks at a time; their labels, and where skipped ones are from.

    Raises:
        ValueError: an image does not decode, where `on_error` is not "skip".
    """
    labels: list[int | None] = []
    skipped: list[str] = []
    bar = tqdm(total=count, desc="decoding", unit="image", file=sys.stdout, disable=not progress)
    decoding = decoded(chunks, shape, processes=count // IMAGES_PER_PROCESS)
    with to.open("wb") as file, bar, decoding as results:
        _write_header(file, (count, *shape))
        for pixels, chunk_labels, failed in results:
            if failed and on_error != "skip":
                where, why = failed[0]
                raise ValueError(f"got {where}, which does not decode ({why}): repair or remove it, or on_error=skip")
            pixels.tofile(file)
            labels += chunk_labels
            skipped += [where for where, _ in failed]
            bar.update(len(pixels) + len(failed))
        file.seek(0)
        _write_header(file, (len(labels), *shape))
    return labels, skipped


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Of an .npy file, uint8; as long for any number of images, so that it can be written over."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


@contextmanager
def decoded(chunks: Iterable[list[Item]], shape: Shape, *, processes: int | None = None) -> Iterator[Iterator[Decoded]]:
    """`decode` of every chunk, in order and a few chunks ahead, in a process per core or at most so many.

    PIL holds the interpreter's lock for most of the time that a small image takes: on two cores, two threads decode
    CIFAR-10 at half the speed of one, two processes at 1.6 times. A process ends when its input does, so none is left
    behind by a parent that was killed, as those of a ProcessPoolExecutor are; nor do they import the caller's script.
    They take a fifth of a second to start, so with fewer than two there are none, but threads.
    """
    number = cores() if processes is None else min(cores(), processes)
    with ExitStack() as stack:
        idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for _ in range(number) if number > 1 else ():
            command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {SERVE}"]
            idle.put(process := subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            stack.callback(_end, process)
        function: Callable[..., Decoded] = decode if idle.empty() else partial(_decode_elsewhere, idle)
        threads = cores() if idle.empty() else number
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        yield ahead(pool, partial(function, shape=shape), chunks, depth=threads + 2)


def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """`map(function, items)`, in order, with at most `depth` results computed before they are asked for."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_elsewhere(idle: SimpleQueue[subprocess.Popen], chunk: list[Item], shape: Shape) -> Decoded:
    """`decode`, in one of the idle processes."""
    process = idle.get()
    to, back = _pipes(process)
    try:
        pickle.dump((chunk, shape), to, pickle.HIGHEST_PROTOCOL)
        to.flush()
        return pickle.load(back)
    except (EOFError, OSError, pickle.UnpicklingError):
        near = chunk[0][2] if chunk else "nothing"
        raise RuntimeError(f"a decoding process died with code {process.wait()} at or after {near}") from None
    finally:
        idle.put(process)


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    """Its standard input and output."""
    return cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)


def _end(process: subprocess.Popen) -> None:
    to, back = _pipes(process)
    back.close()  # first, in case it is writing
    with suppress(OSError):  # of what it did not read, being dead
        to.close()
    process.wait()


def _serve() -> None:
    """Decode what comes in at standard input, until it ends: what the processes of `decoded` run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent has gone, or was killed
        while True:
            results = decode(*pickle.load(sys.stdin.buffer))
            pickle.dump(results, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
