"""contents: what is in a prepared `images.npy`, uint8 (N, H, W, C), a block at a time: band statistics, duplicates."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from wddm.wavelets import WaveletCodec

BLOCK_BYTES = 2**22


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Of an .npy file, uint8; as long for any number of images, so that it can be written over."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def blocks(path: str | Path) -> Iterator[np.ndarray]:
    """Copies uint8 (n, H, W, C) of consecutive images; mapped anew for each, so that what was read does not stay."""
    count, *shape = np.load(path, mmap_mode="r").shape
    step = max(1, BLOCK_BYTES // int(np.prod(shape)))
    for start in range(0, count, step):
        yield np.array(np.load(path, mmap_mode="r")[start : start + step])


def statistics(path: str | Path) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation per channel of images in [-1, 1] ("0") and of their dyadic Haar packets.

    Levels 1 to 3, as far as they divide the size; channels in the order of `WaveletCodec`. Every
    coefficient up to level 3 is a weighted sum of the p = 64 pixels of one 8x8 cell in one colour, so the mean (C, p)
    and the second moment (C, p, p) of cells tell those of all bands, and one pass over the images is enough.
    """
    count, height, width, channels = np.load(path, mmap_mode="r").shape
    side = next(side for side in (8, 4, 2, 1) if height % side == 0 and width % side == 0)
    mean, moment = np.zeros((channels, side**2)), np.zeros((channels, side**2, side**2))
    for block in blocks(path):
        cells = block.reshape(-1, height // side, side, width // side, side, channels).transpose(5, 0, 1, 3, 2, 4)
        for i, x in enumerate(cells.reshape(channels, -1, side**2) / 127.5 - 1):  # (n, p)
            mean[i], moment[i] = mean[i] + x.sum(0), moment[i] + x.T @ x
    cells_per_channel = count * height * width / side**2
    mean, moment = mean / cells_per_channel, moment / cells_per_channel
    found = {}
    for level in range(side.bit_length()):
        impulses = torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)
        codec = WaveletCodec("haar", level, scaling="dyadic").double()
        weights = codec.encode(impulses).flatten(2).numpy()  # (p, 4^L, positions)
        first = np.einsum("pbk,cp->bc", weights, mean) / weights.shape[2]
        second = np.einsum("pbk,cpq,qbk->bc", weights, moment, weights, optimize=True) / weights.shape[2]
        spread = np.sqrt((second - first**2).clip(0))
        found[str(level)] = {"mean": first.ravel().round(6).tolist(), "std": spread.ravel().round(6).tolist()}
    return found


def duplicates(path: str | Path) -> list[list[int]]:
    """Groups of rows whose images are the same in every pixel, the largest first; found by their hashes."""
    hashes = [hashlib.blake2b(image, digest_size=16).hexdigest() for block in blocks(path) for image in block]
    _, which, counts = np.unique(np.array(hashes, "S32"), return_inverse=True, return_counts=True)
    groups = defaultdict(list)
    for row in np.flatnonzero(counts[which] > 1).tolist():
        groups[which[row]].append(row)
    return sorted(groups.values(), key=lambda rows: (-len(rows), rows[0]))
