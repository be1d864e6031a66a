from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from local_data import encoded, pictures, write_shard

from wddm.streams import stream

COUNTS = (10, 12, 9, 11)
ALL = list(range(sum(COUNTS)))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """`datasets` sleeps for five seconds at the end of every epoch, as a precaution."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Four shards of different sizes; image i holds the value i everywhere, but for a left column that is 255."""
    folder, first = tmp_path_factory.mktemp("a pattern [1]"), 0
    for number, count in enumerate(COUNTS):
        images = np.repeat(np.arange(first, first + count, dtype=np.uint8), 6 * 6 * 3).reshape(count, 6, 6, 3)
        images[:, :, 0] = 255
        cells = [encoded(image) for image in images]
        write_shard(folder / f"data/train-0000{number}-of-00004.parquet", cells, [0] * count, column="image")
        first += count
    write_shard(folder / "data/test-00000-of-00001.parquet", [encoded(pictures(1, 6)[0])], column="image")
    return folder


def take(count: int, *args, **settings) -> torch.Tensor:
    return torch.cat(list(islice(stream(*args, **{"seed": 0, "buffer": 8, **settings}), count)))


def values(batch: torch.Tensor) -> list[int]:
    return ((batch[:, 0, 0, 2] + 1) * 127.5).round().int().tolist()


def test_an_epoch_is_every_image_once_in_another_order(shards):
    got = take(3, shards, 6, 42)
    assert got.shape == (126, 3, 6, 6) and got.dtype == torch.float32 and got.is_contiguous()
    epochs = [values(got[start : start + 42]) for start in (0, 42, 84)]
    assert all(sorted(epoch) == ALL for epoch in epochs) and epochs[0] != epochs[1] != epochs[2] != ALL
    assert values(take(1, shards, 6, 42)) == epochs[0] != values(take(1, shards, 6, 42, seed=1))
    assert got.unique().min() == -1 and got.unique().max() == 1


@pytest.mark.parametrize(("world_size", "sizes"), [(2, [19, 20, 21, 22, 23]), (3, [14]), (4, COUNTS)])
def test_processes_share_an_epoch(shards, world_size, sizes):
    """By shards where these can be divided, so that shares differ in size; else by images."""
    ranks = [values(take(23, shards, 6, world_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    first_epochs = (
        [value for rank, length in zip(ranks, lengths, strict=True) for value in rank[:length]]
        for lengths in product(sizes, repeat=world_size)
    )
    assert any(sorted(epoch) == ALL for epoch in first_epochs)


@pytest.mark.parametrize("start", [0, 4, 40, 84])
def test_resumed_stream_is_the_stream(shards, start):
    for rank in range(2):
        settings = {"flip": True, "seed": 3, "rank": rank, "world_size": 2}
        whole = take(30, shards, 6, 4, **settings)
        torch.testing.assert_close(
            take(5, shards, 6, 4, start=start, **settings), whole[start // 2 :][:10], rtol=0, atol=0
        )


def test_flips_mirror_half_of_the_images(shards):
    plain, flipped = take(2, shards, 6, 42), take(2, shards, 6, 42, flip=True)
    mirrored = flipped[:, 0, 0, -1] == 1
    torch.testing.assert_close(
        torch.where(mirrored.view(-1, 1, 1, 1), flipped.flip(-1), flipped), plain, rtol=0, atol=0
    )
    assert 25 < mirrored.sum() < 60 and not torch.equal(mirrored[:42], mirrored[42:])


def test_what_is_wrong_is_refused(shards, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"got 0 Parquet files of split 'valid'"):
        stream(shards, 6, 4, seed=0, split="valid")
    with pytest.raises(ValueError, match="wanted a batch size that world_size divides"):
        stream(shards, 6, 4, seed=0, world_size=3)
    with pytest.raises(ValueError, match="got no images for this process"):
        take(1, shards, 6, 2, split="test", rank=1, world_size=2)
    write_shard(tmp_path / "train.parquet", [encoded(pictures(1, 6)[0]), b"broken"], column="image")
    with pytest.raises(ValueError, match=r"image \d of epoch 0, which does not decode"):
        take(1, tmp_path, 6, 2)
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(ConnectionError, match=r"nothing from the Hugging Face Hub for owner/name"):
        stream("owner/name@main", 6, 2, seed=0)
