"""batches: prepared uint8 images -> an endless, exactly resumable stream of float batches on a device."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from wddm.decoding import ahead


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
        on_device: keep the whole set on the device; by default on an accelerator where it `fits`. Otherwise a
            thread prepares the next batches while the caller computes. The batches are the same.

    Raises:
        ValueError: images of another form, or a batch size that world_size does not divide.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"got {images.dtype} images {images.shape}, wanted uint8 (N, H, W, C): give load(folder).images"
        )
    check_share(batch_size, start, rank, world_size)
    device = torch.device(device)
    if on_device is None:
        on_device = device.type != "cpu" and fits(images.nbytes, device)
    share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
    order = _order(len(images), batch_size, seed, start)
    order = ((rows[share], mirrored[share] & flip) for rows, mirrored in order)
    return _from_device(images, order, device) if on_device else _from_host(images, order, device)


def check_share(batch_size: int, start: int, rank: int, world_size: int) -> None:
    """ValueError unless every process has an equal share of a batch."""
    if batch_size < 1 or start < 0 or not 0 <= rank < world_size or batch_size % world_size:
        raise ValueError(
            f"got batch_size={batch_size}, start={start}, rank={rank}, world_size={world_size}, wanted a "
            "batch size that world_size divides, start >= 0 and 0 <= rank < world_size: change batch_size"
        )


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether a set takes under a quarter of the free memory of a CUDA device, or under 1 GiB on another one."""
    return nbytes < (torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30)


def to_batch(pixels: np.ndarray, mirrored: np.ndarray, device: torch.device) -> Tensor:
    """float32 (B, C, H, W) in [-1, 1] on the device of uint8 (B, H, W, C), some of them mirrored left to right."""
    if device.type == "cpu":  # in numpy, image by image: in cache, and without threads that would compete with training
        count, height, width, channels = pixels.shape
        batch = np.empty((count, channels, height, width), np.float32)
        for out, image, mirror in zip(batch, pixels, mirrored, strict=True):
            out[:] = (image[:, ::-1] if mirror else image).transpose(2, 0, 1)
            out /= np.float32(127.5)
            out -= np.float32(1)
        return torch.from_numpy(batch)
    x = torch.from_numpy(pixels)
    x = (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
    return _finish(x.permute(0, 3, 1, 2), mirrored)


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


def _finish(x: Tensor, mirrored: np.ndarray) -> Tensor:
    """Mirrored, float32 and contiguous, of uint8 (B, C, H, W) on a device."""
    mirrored = torch.from_numpy(mirrored).to(x.device).view(-1, 1, 1, 1)
    x = torch.where(mirrored, x.flip(-1), x)
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def _from_device(images: np.ndarray, order: Iterator, device: torch.device) -> Iterator[Tensor]:
    resident = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).contiguous()
    for rows, mirrored in order:
        yield _finish(resident[torch.from_numpy(rows).to(device)], mirrored)


def _from_host(images: np.ndarray, order: Iterator, device: torch.device) -> Iterator[Tensor]:
    def gather(drawn: tuple[np.ndarray, np.ndarray]) -> Tensor:
        rows, mirrored = drawn
        return to_batch(images[rows], mirrored, device)

    with ThreadPoolExecutor(1) as pool:
        yield from ahead(pool, gather, order, depth=2)
