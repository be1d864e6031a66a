"""batches: prepared uint8 images -> an endless, exactly resumable stream of float batches on a device."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

ON_DEVICE_BYTES = 2**30  # a set smaller than this is kept whole on an accelerator


def batches(
    images: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    device: str | torch.device = "cpu",
    flip: bool = False,
    rank: int = 0,
    world_size: int = 1,
    on_device: bool | None = None,
) -> Iterator[Tensor]:
    """Endless float32 batches (batch_size / world_size, C, H, W) in [-1, 1], contiguous, on the device.

    The stream is one permutation of the images per epoch, drawn from (seed, epoch), end to end: batches
    straddle epochs, and the batch that begins after `start` images is the same however one got there.

    Args:
        images: uint8 (N, H, W, C), a memory map for instance.
        batch_size: images in a batch over all processes.
        start: images seen before, by all processes.
        flip: mirror every image left to right with probability 1/2, drawn from (seed, epoch) too.
        rank, world_size: this process takes the rank-th contiguous slice of every batch.
        on_device: keep the whole set on the device; by default on an accelerator if it is smaller than 1 GiB.
            Otherwise a thread prepares the next batches while the caller computes.

    Raises:
        ValueError: images of another form, or a batch size that world_size does not divide.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"got {images.dtype} images {images.shape}, wanted uint8 (N, H, W, C): give load(folder).images"
        )
    if batch_size < 1 or start < 0 or not 0 <= rank < world_size or batch_size % world_size:
        raise ValueError(
            f"got batch_size={batch_size}, start={start}, rank={rank}, world_size={world_size}, wanted a "
            "batch size that world_size divides, start >= 0 and 0 <= rank < world_size: change batch_size"
        )
    device = torch.device(device)
    if on_device is None:
        on_device = device.type != "cpu" and images.nbytes < ON_DEVICE_BYTES
    share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
    order = _order(len(images), batch_size, seed, start)
    order = ((rows[share], mirrored[share] & flip) for rows, mirrored in order)
    return _from_device(images, order, device) if on_device else _from_host(images, order, device)


def to_unit(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """`map(function, items)`, in order, with at most `depth` results computed before they are asked for."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _order(count: int, batch_size: int, seed: int, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers and coin flips (batch_size,) of the batches that follow `start` images."""
    epoch, offset = divmod(start, count)
    rows, coins = (drawn[offset:] for drawn in _epoch(count, seed, epoch))
    while True:
        while len(rows) < batch_size:
            epoch += 1
            more = _epoch(count, seed, epoch)
            rows, coins = np.concatenate([rows, more[0]]), np.concatenate([coins, more[1]])
        yield rows[:batch_size], coins[:batch_size]
        rows, coins = rows[batch_size:], coins[batch_size:]


def _epoch(count: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(count), rng.random(count) < 0.5


def _from_device(images: np.ndarray, order: Iterator, device: torch.device) -> Iterator[Tensor]:
    resident = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).contiguous()
    for rows, mirrored in order:
        x = resident[torch.from_numpy(rows).to(device)]
        mirrored = torch.from_numpy(mirrored).to(device).view(-1, 1, 1, 1)
        yield to_unit(torch.where(mirrored, x.flip(-1), x))


def _from_host(images: np.ndarray, order: Iterator, device: torch.device) -> Iterator[Tensor]:
    def gather(drawn: tuple[np.ndarray, np.ndarray]) -> Tensor:
        rows, mirrored = drawn
        x = images[rows]  # (b, H, W, C)
        x[mirrored] = x[mirrored, :, ::-1]
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        if device.type == "cpu":  # in numpy: torch's threads would compete with those of the training step
            return torch.from_numpy(np.subtract(np.divide(x, np.float32(127.5), dtype=np.float32), np.float32(1)))
        x = torch.from_numpy(x)
        return to_unit((x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True))

    with ThreadPoolExecutor(1) as pool:
        yield from ahead(pool, gather, order, depth=2)
