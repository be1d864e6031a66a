from itertools import islice

import numpy as np
import pytest
import torch
from local_data import pictures as noise

from wddm.batches import batches, fits


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return noise()


def numbered(count: int) -> np.ndarray:
    """Image i holds the value i everywhere, but for a left column that is 255."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 4 * 6).reshape(count, 4, 6, 1)
    images[:, :, 0] = 255
    return images


def take(count: int, *args, **settings) -> torch.Tensor:
    return torch.cat(list(islice(batches(*args, **settings), count)))


def rows(batch: torch.Tensor) -> list[int]:
    return ((batch[:, 0, 0, 2] + 1) * 127.5).round().int().tolist()


def test_batches_are_one_permutation_per_epoch_end_to_end():
    stream = take(10, numbered(23), 7, seed=0)
    assert stream.dtype == torch.float32 and stream.shape == (70, 1, 4, 6)
    epochs = [rows(stream[start : start + 23]) for start in (0, 23, 46)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(23))
    assert epochs[0] != rows(take(10, numbered(23), 7, seed=1)[:23])


def test_batches_cover_the_range_exactly_and_keep_the_pixels(pictures):
    extremes = np.zeros((2, 2, 2, 3), np.uint8)
    extremes[1] = 255
    assert sorted(take(1, extremes, 2, seed=0).unique().tolist()) == [-1.0, 1.0]
    batch = take(1, pictures, 23, seed=4)
    assert batch.is_contiguous()
    found = ((batch + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert sorted(map(bytes, found)) == sorted(map(bytes, pictures))


@pytest.mark.parametrize("seen", [0, 7, 21, 23, 30, 116])
@pytest.mark.parametrize("batch_size", [7, 50])
def test_resumed_stream_is_the_stream(pictures, seen, batch_size):
    whole = take(seen + 3 * batch_size, pictures, 1, seed=2, flip=True)
    resumed = take(3, pictures, batch_size, seed=2, flip=True, start=seen)
    torch.testing.assert_close(resumed, whole[seen:], rtol=0, atol=0)


def test_ranks_take_contiguous_slices_of_the_global_batch(pictures):
    whole = take(5, pictures, 12, seed=2, flip=True)
    ranks = [take(5, pictures, 12, seed=2, flip=True, rank=r, world_size=3).view(5, 4, 3, 16, 16) for r in range(3)]
    torch.testing.assert_close(torch.cat(ranks, 1).flatten(0, 1), whole, rtol=0, atol=0)


def test_flips_mirror_half_of_the_images_and_change_with_the_epoch():
    stream = take(1, numbered(200), 400, seed=0, flip=True)
    mirrored = stream[:, 0, 0, -1] == 1
    assert torch.equal(mirrored, stream[:, 0, 0, 0] != 1)
    first, second = mirrored[:200], mirrored[200:]
    assert 70 < first.sum() < 130 and not torch.equal(first, second)
    assert rows(stream[:, :, :, 1:]) == rows(take(1, numbered(200), 400, seed=0)[:, :, :, 1:])


def test_resident_set_gives_the_same_batches(pictures):
    settings = {"seed": 3, "flip": True, "start": 5}
    host = take(6, pictures, 9, **settings)
    torch.testing.assert_close(take(6, pictures, 9, on_device=True, **settings), host, rtol=0, atol=0)
    if torch.cuda.is_available():
        for on_device in (True, False):
            other = take(6, pictures, 9, device="cuda", on_device=on_device, **settings)
            torch.testing.assert_close(other.cpu(), host, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"world_size": 3}, {"rank": 1}, {"start": -1}])
def test_impossible_batches_are_refused_at_the_call(pictures, settings):
    with pytest.raises(ValueError, match=r"wanted a batch size that world_size divides"):
        batches(pictures, **{"batch_size": 8, "seed": 0, **settings})
    with pytest.raises(ValueError, match="wanted uint8"):
        batches(pictures / 255, 8, seed=0)


def test_the_set_is_kept_on_an_accelerator_where_it_fits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * 2**30, 80 * 2**30))
    cuda, other = torch.device("cuda"), torch.device("mps")
    assert fits(2**31 - 1, cuda) and not fits(2**31, cuda) and fits(2**30 - 1, other) and not fits(2**30, other)
    seen = []
    monkeypatch.setattr("wddm.batches.fits", lambda nbytes, device: seen.append((nbytes, device.type)))
    (
        batches(noise(4), 2, seed=0, device="meta"),
        batches(noise(4), 2, seed=0),
        batches(noise(4), 2, seed=0, device="meta", on_device=True),
    )
    assert seen == [(4 * 16 * 16 * 3, "meta")]


def test_every_batch_has_memory_of_its_own(pictures):
    first, second = islice(batches(pictures, 5, seed=0), 2)
    kept = first.clone()
    second.zero_()
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
