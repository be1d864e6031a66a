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
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

RULE = 1  # part of the keys of prepared sets: to be raised when the rule above gives any image other pixels
IMAGES_PER_PROCESS = 1024  # fewer do not pay for its start
SERVE = "from wddm.decoding import _serve; _serve()"

Item = tuple[bytes | Path | np.ndarray | None, int | None, str]  # image, label, where it is from
Shape = tuple[int, int, int]  # height, width, channels
Result = TypeVar("Result")
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
    """Decode `count` images into the .npy file `to`; their labels, and where skipped ones are from.

    An image that does not decode is a ValueError, where `on_error` is not "skip".
    """
    labels: list[int | None] = []
    skipped: list[str] = []
    bar = tqdm(total=count, desc="decoding", unit="image", file=sys.stdout, disable=not progress)
    decoding = decoded(chunks, shape, processes=count // IMAGES_PER_PROCESS)
    with to.open("wb") as file, bar, decoding as results:
        header = partial(np.lib.format.write_array_header_1_0, file)  # as long for any number of images
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


@contextmanager
def decoded(chunks: Iterable[list[Item]], shape: Shape, *, processes: int | None = None) -> Iterator[Iterator[Decoded]]:
    """`decode` of every chunk, in order and a few chunks ahead, in a process per core or at most so many.

    PIL holds the interpreter's lock for most of the time that a small image takes: on two cores, two threads decode
    CIFAR-10 at half the speed of one, two processes at 1.6 times. They take a fifth of a second to start, so with fewer
    than two there are none, but threads.
    """
    number = cores() if processes is None else min(cores(), processes)
    with ExitStack() as stack:
        idle: SimpleQueue[Callable[..., Decoded]] = SimpleQueue()
        for _ in range(number) if number > 1 else ():
            idle.put(stack.enter_context(worker()))

        def elsewhere(chunk: list[Item]) -> Decoded:
            there = idle.get()
            try:
                return there(chunk, shape)
            finally:
                idle.put(there)

        function, threads = (elsewhere, number) if number > 1 else (partial(decode, shape=shape), cores())
        yield stack.enter_context(closing(ahead(function, chunks, threads)))


@contextmanager
def worker() -> Iterator[Callable[[list[Item], Shape], Decoded]]:
    """`decode`, in a process that ends when its socket is closed.

    So none is left behind by a parent that was killed, as those of a ProcessPoolExecutor are; nor does it import the
    caller's script.
    """
    ours, theirs = Pipe()
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {SERVE}", str(theirs.fileno())]

    def there(chunk: list[Item], shape: Shape) -> Decoded:
        try:
            ours.send((chunk, shape))
            return ours.recv()
        except (EOFError, OSError):
            code, near = process.wait(), chunk[0][2]
            raise RuntimeError(f"a decoding process died with code {code} at or after {near}") from None

    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process, ours:
        theirs.close()
        yield there


def _serve() -> None:
    """What the process of a `worker` runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, ConnectionError):  # the parent has gone, or was killed
        while True:
            connection.send(decode(*connection.recv()))


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
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
