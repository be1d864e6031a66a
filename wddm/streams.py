"""streams: batches straight from Parquet shards, on the Hub or on a disk, for sets beyond one disk.

By `datasets` streaming: nothing is prepared, nothing is kept. Against `batches` of a prepared set, what is not exact:
- the order: shards are shuffled and images drawn from a buffer, so those of a shard stay near each other in time; it
  depends on the shards, the buffer and the number of processes as well as on (seed, epoch);
- the epochs: a process begins the next one when its own share ends, so where shards differ in size some are ahead;
- resuming: from `start` on the stream is the same, but what comes before is read again instead of passed over;
- what is known beforehand: there is no manifest, so neither the number of images nor the statistics of bands.
"""

import glob
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wddm.batches import check_share, to_batch
from wddm.decoding import Item, decoded
from wddm.sources import commit, shards


def stream(
    source: str | Path,
    resolution: int,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    device: str | torch.device = "cpu",
    flip: bool = False,
    rank: int = 0,
    world_size: int = 1,
    split: str = "train",
    buffer: int = 10_000,
) -> Iterator[Tensor]:
    """Endless float32 batches (batch_size / world_size, 3, H, W) in [-1, 1], as `batches` gives them.

    Args:
        source: a folder of Parquet shards in the Hub's layout, or "owner/name@revision" on the Hub.
        resolution: side of the square images in pixels.
        batch_size, seed, start, device, flip, rank, world_size: as of `batches`. A process reads shards of its own
            where world_size divides their number; otherwise all of them, and keeps every world_size-th image.
        split: which images, "train+validation" for two splits.
        buffer: encoded images in memory, of which the next one is drawn.

    Raises:
        ValueError: shards that are missing, an image that does not decode, a batch size that world_size does not
            divide. ConnectionError: neither a folder nor a data set that the Hub can be asked for.
    """
    from datasets.distributed import split_dataset_by_node

    check_share(batch_size, start, rank, world_size)
    images = _open(source, split).shuffle(seed=seed, buffer_size=buffer)
    items = islice(_items(split_dataset_by_node(images, rank, world_size), source), start // world_size, None)
    coins = np.random.default_rng([seed, rank])
    coins.bit_generator.advance(start // world_size)  # one for every image
    share, shape, device = batch_size // world_size, (resolution, resolution, 3), torch.device(device)

    def batches() -> Iterator[Tensor]:
        with decoded(iter(lambda: list(islice(items, share)), []), shape) as results:
            for pixels, _, failed in results:
                for where, why in failed:
                    raise ValueError(f"got {where}, which does not decode ({why}): repair or remove it")
                yield to_batch(pixels, (coins.random(share) < 0.5) & flip, device)

    return batches()


def _open(source: str | Path, split: str):
    """An `IterableDataset` of one column of encoded images: local shards, or those on the Hub."""
    from datasets import Image, load_dataset

    if Path(source).exists():
        files = [glob.escape(str(file)) for file in shards(source, split)]
        opened = load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)
    else:
        repo, _, revision = str(source).partition("@")
        opened = load_dataset(repo, revision=commit(repo, revision or None), split=split, streaming=True)
    held = [
        name
        for name, kind in opened.features.items()
        if isinstance(kind, Image) or (isinstance(kind, dict) and "bytes" in kind)
    ]
    if not held:
        raise ValueError(f"got columns {list(opened.features)} in {source}, wanted one of images: give other shards")
    return opened.select_columns(held[:1]).cast_column(held[0], Image(decode=False))


def _items(images, source: str | Path) -> Iterator[Item]:
    """What `decode` takes, one epoch after another."""
    for epoch in count():
        images.set_epoch(epoch)
        number = 0
        for number, row in enumerate(images, 1):
            (cell,) = row.values()
            yield cell["bytes"], None, f"{source}, image {number} of epoch {epoch} {cell['path'] or ''}".rstrip()
        if not number:
            raise ValueError(f"got no images for this process in {source}, wanted some: use fewer processes")
