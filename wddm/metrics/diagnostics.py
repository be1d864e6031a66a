"""Diagnostics compare samples with real images: spectra, wavelet bands, nearest neighbours and classes.

Images are uint8 (N, H, W, C) or float (N, C, H, W) in [0, 1]. They are read in batches of float64, so that a memory
map of any length will do.
"""

import itertools
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from wddm.metrics.intervals import Estimate, resampled, share
from wddm.wavelets import WaveletCodec

Images = np.ndarray | Tensor
Device = str | torch.device
Vectors = Callable[[Tensor, slice], Tensor]  # images (B, C, H, W) -> vectors (P, B, d) of some of the populations
BATCH_VALUES = 2**24  # in a batch at most: 128 MiB of float64
MOST, SIDE, FEATURES = 20_000, 64, 32  # of the classifier: real images at most, their largest side, features of one
STEPS, BATCH, UNCLEAR = 500, 72, 4  # steps of its training, images in each, of these with shuffled pixels or blended


class Spectrum(NamedTuple):
    frequency: np.ndarray  # (F,), in cycles/pixel
    power: Estimate[np.ndarray]  # (F,)


@dataclass(frozen=True)
class BandStatistics:
    """Of every Haar packet, arrays (4^L,), over `count` images."""

    bands: list[str]
    energy: Estimate[np.ndarray]  # mean square
    std: np.ndarray
    kurtosis: Estimate[np.ndarray]  # excess: 0 for a Gaussian; nan for a band without any detail
    count: int


@dataclass(frozen=True)
class UnitBatches:
    """Iterates over images, or those in `rows`, in batches (B, C, H, W) of float64 in [0, 1] on the device.

    Apple's GPUs ("mps") have no float64: the CPU takes their place.

    Raises:
        ValueError: neither uint8 (N, H, W, C) nor float (N, C, H, W), or floats outside [0, 1].
    """

    images: Images
    rows: np.ndarray | None = None
    batch_size: int = 512
    device: Device = "cpu"

    @property
    def count(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        images, layout = self.images, "NHWC" if self.images.dtype in (np.uint8, torch.uint8) else "NCHW"
        if images.ndim != 4 or not len(images) or images.shape[layout.index("C")] not in (1, 2, 3, 4):
            raise ValueError(
                f"got {images.dtype} images {tuple(images.shape)}, wanted uint8 (N, H, W, C) or float "
                "(N, C, H, W) of 1 to 4 channels: transpose them"
            )
        device = "cpu" if torch.device(self.device).type == "mps" else self.device
        size = max(1, min(self.batch_size, BATCH_VALUES // math.prod(images.shape[1:])))
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            batch = images[part if self.rows is None else self.rows[part]]
            batch = (batch.detach() if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))).to(device)
            if isinstance(images, np.memmap) and images.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
                pages: mmap.mmap = images._mmap  # type: ignore[attr-defined]
                pages.madvise(mmap.MADV_DONTNEED)  # what was read stays in the system's cache, not in our memory
            if layout == "NHWC":
                yield batch.permute(0, 3, 1, 2).double().div_(255)
            elif batch.is_floating_point() and batch.min() >= 0 and batch.max() <= 1:
                yield batch.double()
            else:
                raise ValueError(
                    f"got {batch.dtype} images from {batch.min().item():g} to {batch.max().item():g}, wanted "
                    "floats in [0, 1]: rescale or clamp them, or give uint8"
                )


def haar_packets(level: int) -> Vectors:
    """Function of float64 images (B, C, H, W) and a slice that gives these of their 4^L orthonormal Haar packets.

    They come as (P, B, C H W / 4^L), in the order of `WaveletCodec`. The codec's matrix for one cell of 2^L x 2^L
    pixels is applied to all cells at once: several times faster than splitting level by level.
    """
    side, codec = 2**level, WaveletCodec("haar", level=level, scaling="none").double()
    matrix = codec.encode(torch.eye(4**level, dtype=torch.float64).view(-1, 1, side, side)).flatten(1).T

    def packets(batch: Tensor, part: slice = slice(None)) -> Tensor:
        codec.check_size(*batch.shape[-2:])
        cells = batch.unflatten(-2, (-1, side)).unflatten(-1, (-1, side))  # (B, C, h, side, w, side)
        cells = cells.permute(3, 5, 0, 1, 2, 4).reshape(4**level, -1)
        return (matrix[part].to(batch.device) @ cells).view(-1, len(batch), batch[0].numel() // 4**level)

    return packets


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for small matrices and networks: several are up to ten times slower, and round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def radial_power_spectrum(images: Images) -> Spectrum:
    """Power to 1/2 cycle/pixel, averaged over rings, colours and images less their means.

    Normalised so that white noise of variance v has power v at every frequency.
    """
    height, width = next(iter(UnitBatches(images, batch_size=1))).shape[-2:]
    side, found = min(height, width), []
    y, x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    ring = (torch.hypot(y[:, None], x) * side).round().long().flatten()  # (H W,)
    rings = torch.arange(1, side // 2 + 1)
    for batch in UnitBatches(images):
        power = torch.fft.fft2(batch - batch.mean((-2, -1), keepdim=True), norm="ortho").abs().square().mean(1)
        sums = power.new_zeros(len(batch), int(ring.max()) + 1).index_add_(1, ring, power.flatten(1))
        found.append((sums / torch.bincount(ring))[:, rings])
    return Spectrum((rings / side).double().numpy(), resampled(torch.cat(found).numpy()))


def band_statistics(images: Images, level: int = 3) -> BandStatistics:
    """Energy, spread and tails of the Haar packets; those of details in photographs are heavy-tailed."""
    split = haar_packets(level)
    packets = (split(batch, slice(None)) for batch in UnitBatches(images))  # (4^L, B, d)
    powers = [torch.stack([(values**power).mean(2).T for power in (1, 2, 3, 4)], 1) for values in packets]
    per_image = torch.cat(powers).numpy()  # (N, 4, 4^L)
    energy, mean = resampled(per_image[:, 1]), per_image[:, 0].mean(0)
    bands, std = WaveletCodec("haar", level=level).bands(), np.sqrt(energy.value - mean**2)
    return BandStatistics(bands, energy, std, resampled(per_image, _kurtosis), len(per_image))


def _kurtosis(moments: np.ndarray) -> np.ndarray:
    m1, m2, m3, m4 = np.moveaxis(moments, -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / (m2 - m1**2) ** 2 - 3


def nearest_neighbours(
    generated: Images, real: Images, k: int = 1, batch_size: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """The k real images nearest to every generated one: rows (n, k) and RMS pixel distances (n, k), in order.

    Candidates are found by products in float32, a batch of real images at a time, and measured in float64, so
    that a copy has distance 0.
    """
    if not 1 <= k <= len(real):
        raise ValueError(f"got k={k} with {len(real)} real images, wanted 1 to {len(real)}: change k")
    queries = torch.cat([batch.float().flatten(1) for batch in UnitBatches(generated)]) - 0.5
    wanted, first = min(k + 8, len(real)), 0
    best, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for batch in UnitBatches(real, batch_size=batch_size):
        keys = batch.float().flatten(1) - 0.5
        squares = keys.square().sum(1) - 2 * queries @ keys.T  # + |query|^2, the same for all keys
        rows = torch.cat([rows, torch.arange(first, first + len(keys)).expand_as(squares)], 1)
        first += len(keys)
        best, order = torch.cat([best, squares], 1).topk(min(wanted, first), largest=False)
        rows = rows.gather(1, order)
    distances = np.empty(rows.shape)
    for i, query in enumerate(UnitBatches(generated, batch_size=1)):
        (candidates,) = UnitBatches(real, rows[i].numpy(), wanted)
        distances[i] = (candidates - query).square().mean((1, 2, 3)).sqrt().numpy()
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows.numpy(), nearest, 1), np.take_along_axis(distances, nearest, 1)


def memorised(distances: np.ndarray) -> np.ndarray:
    """Which samples (n,) are copies, by their sorted distances (n, k >= 2) to the nearest training images.

    A copy is at least three times as near to one image as to the next (Yoon et al. 2023); a sample among several equal
    training images counts as one too.
    """
    if distances.ndim != 2 or distances.shape[1] < 2:
        raise ValueError(f"got distances {distances.shape}, wanted (n, 2 or more): ask for k=2 neighbours or more")
    return distances[:, 0] <= distances[:, 1] / 3


class Verdict(NamedTuple):
    """What a classifier of real images makes of generated ones."""

    class_counts: dict[int, int]  # how many images have each class as their top one
    confidence: np.ndarray  # (N,), their top probabilities
    confident_share: Estimate[float]  # of images at or above the classifier's `threshold`; 0.9 for real ones

    @property
    def classes_seen(self) -> int:
        return sum(count > 0 for count in self.class_counts.values())


class Classifier(ModelMixin, ConfigMixin):
    """A small network for a labelled set, and what it achieves on images of the set that it was not trained on.

    Called with images (B, C, H, W) in [0, 1] it returns features, of which a Frechet distance can be taken;
    `probabilities` gives those of the classes. It knows what tells these classes apart and nothing else.
    """

    @register_to_config
    def __init__(self, channels: int, side: int, classes: list[int], held_out: int = 0) -> None:
        super().__init__()
        widths = [channels, *(32 * min(2**depth, 4) for depth in range(max(1, (side // 4).bit_length())))]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2 if k else 1, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for k, (a, b) in enumerate(itertools.pairwise(widths))
        ]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], FEATURES))
        self.side, self.classes = side, list(classes)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, len(classes)))
        self.register_buffer("right", torch.zeros(held_out))  # 1 where the class of a held-out image was found
        self.register_buffer("confidence", torch.zeros(held_out, dtype=torch.float64))  # its top probability

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 32) of float32 images (B, C, H, W) in [0, 1]; larger ones than `side` are averaged to it."""
        return self.body(nn.functional.adaptive_avg_pool2d(images, self.side) * 2 - 1)

    @property
    def accuracy(self) -> Estimate[float]:
        """The share of held-out images whose class was found."""
        return share(int(self.right.sum()), len(self.right))

    @property
    def threshold(self) -> float:
        """The 10th percentile of the top probability of held-out real images: 90 % of them pass."""
        return float(np.quantile(self.confidence.cpu().numpy(), 0.1))

    @torch.no_grad()
    def probabilities(self, images: Images, rows: np.ndarray | None = None) -> np.ndarray:
        """Class probabilities (N, classes), float64."""
        batches = UnitBatches(images, rows, device=self.device)
        return torch.cat([self.head(self(batch.float())).double().softmax(1) for batch in batches]).cpu().numpy()

    def judge(self, generated: Images) -> Verdict:
        """Classes of generated images, and how sure it is of them."""
        probability = self.probabilities(generated)
        confidence = probability.max(1)
        counts = np.bincount(probability.argmax(1), minlength=len(self.classes)).tolist()
        confident = share(int(np.sum(confidence >= self.threshold)), len(generated))
        return Verdict(dict(zip(self.classes, counts, strict=True)), confidence, confident)


def fit_classifier(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> Classifier:
    """Train on three quarters of uint8 images (N, H, W, C) with labels (N,), and measure on the rest; on the CPU.

    Images with a negative label have none, and are left out. The same seed gives the same network.
    """
    from sklearn.model_selection import train_test_split

    rows = np.flatnonzero(labels >= 0)
    classes = np.unique(labels[rows])
    if len(images) != len(labels) or len(classes) < 2:
        raise ValueError(
            f"got {len(images)} images and {len(labels)} labels of {len(classes)} classes, wanted one label each of 2 "
            "classes or more: give the labels of these images"
        )
    rows = np.random.default_rng(seed).permutation(rows)[:MOST]
    fitted, held_out = train_test_split(rows, test_size=0.25, random_state=seed, stratify=labels[rows])
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(images.shape[-1], min(SIDE, images.shape[1]), classes.tolist(), len(held_out))
        _train(network, images, np.searchsorted(classes, labels), fitted)
        probability = network.eval().probabilities(images, held_out)
    network.right.copy_(torch.from_numpy(classes[probability.argmax(1)] == labels[held_out]))
    network.confidence.copy_(torch.from_numpy(probability.max(1)))
    return network


def _train(network: Classifier, images: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> None:
    """AdamW on a one-cycle schedule, with images shifted by up to a sixteenth of their side.

    A few images of every batch have shuffled pixels and are to be of all classes alike, and a few are blended with
    others and are to be of both classes (Hendrycks et al. 2019): without them it is as sure of noise as of real images.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    classes, reach = len(network.classes), images.shape[1] // 16
    shuffled, blended, others = (slice(k * UNCLEAR, (k + 1) * UNCLEAR) for k in range(3))
    for _ in range(STEPS):
        chosen = rows[torch.randint(len(rows), (BATCH,)).numpy()]
        x = torch.cat(list(UnitBatches(images, chosen))).float()
        x = x.roll(torch.randint(-reach, reach + 1, (2,)).tolist(), (-2, -1))
        y = nn.functional.one_hot(torch.from_numpy(targets[chosen]), classes).float()
        x[shuffled] = x[shuffled].flatten(2)[..., torch.randperm(x[0, 0].numel())].view_as(x[shuffled])
        y[shuffled] = 1 / classes
        x[blended], y[blended] = (x[blended] + x[others]) / 2, (y[blended] + y[others]) / 2
        loss = nn.functional.cross_entropy(network.head(network(x)), y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
