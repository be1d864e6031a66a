"""diagnostics: what samples look like beside real images: spectra, bands, nearest neighbours, classes.

Images are uint8 (N, H, W, C) or float (N, C, H, W) in [0, 1] everywhere; what is computed from them is
streamed in float64, so that a memory map of any length will do.
"""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wddm.intervals import resampled
from wddm.wavelets import WaveletCodec

Images = np.ndarray | Tensor
VALUES = 2**22  # in a batch at most: 32 MiB of float64


@dataclass(frozen=True)
class Spectrum:
    """Power (F,) at spatial frequencies (F,) in cycles/pixel, and its 90 % intervals (2, F) over images."""

    frequency: np.ndarray
    power: np.ndarray
    interval: np.ndarray
    count: int


@dataclass(frozen=True)
class BandStatistics:
    """Per Haar packet, arrays (4^L,): energy (mean square), std, excess kurtosis (Gaussian: 0); intervals (2, 4^L)."""

    bands: list[str]
    energy: np.ndarray
    std: np.ndarray
    kurtosis: np.ndarray
    energy_interval: np.ndarray
    kurtosis_interval: np.ndarray
    count: int


@dataclass(frozen=True)
class Classifier:
    """A classifier of real images, with what it achieves on real images that it was not fitted on.

    `held_out_confidence` is the top probability (held_out,) of each of them, `confidence_p10` its 10th percentile.
    """

    model: object
    held_out: int
    held_out_accuracy: float
    held_out_confidence: np.ndarray
    confidence_p10: float

    def predict_proba(self, images: Images) -> np.ndarray:
        """Class probabilities (N, classes)."""
        return self.model.predict_proba(_flat(images))


def unit_batches(
    images: Images, batch_size: int = 512, rows: np.ndarray | None = None, device: str | torch.device = "cpu"
) -> Iterator[Tensor]:
    """Batches (B, C, H, W), float64 in [0, 1] on the device, of all images or of the given rows; B may be smaller.

    Apple's GPUs ("mps") have no float64: the CPU takes their place.

    Raises:
        ValueError: neither uint8 (N, H, W, C) nor float (N, C, H, W), or floats outside [0, 1].
    """
    layout = "NHWC" if images.dtype in (np.uint8, torch.uint8) else "NCHW"
    if images.ndim != 4 or not len(images) or images.shape[layout.index("C")] not in (1, 2, 3, 4):
        raise ValueError(
            f"got {images.dtype} images {tuple(images.shape)}, wanted uint8 (N, H, W, C) or float "
            "(N, C, H, W) of 1 to 4 channels: transpose them"
        )
    device = "cpu" if torch.device(device).type == "mps" else device
    batch_size = fitting(images, batch_size)
    for start in range(0, len(images) if rows is None else len(rows), batch_size):
        part = slice(start, start + batch_size)
        batch = images[part if rows is None else rows[part]]
        batch = (batch.detach() if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))).to(device)
        if isinstance(images, np.memmap) and images.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
            images._mmap.madvise(mmap.MADV_DONTNEED)  # what was read stays in the system's cache, and not in our memory
        if layout == "NHWC":
            yield batch.permute(0, 3, 1, 2).double().div_(255)
        elif batch.is_floating_point() and batch.min() >= 0 and batch.max() <= 1:
            yield batch.double()
        else:
            raise ValueError(
                f"got {batch.dtype} images from {batch.min().item():g} to {batch.max().item():g}, wanted "
                "floats in [0, 1]: rescale or clamp them, or give uint8"
            )


def fitting(images: Images, batch_size: int) -> int:
    """`batch_size`, or as many images as make VALUES."""
    return max(1, min(batch_size, VALUES // int(np.prod(images.shape[1:]))))


def haar_packets(level: int) -> Callable[..., Tensor]:
    """Function of float64 images (B, C, H, W) and a slice of the 4^L orthonormal packets that gives these packets.

    They come as (P, B, C H W / 4^L), in the order of `WaveletCodec`: one product of its matrix for cells of 2^L x 2^L
    pixels with all cells, several times faster than splitting again and again, and for some packets as for all.
    """
    side, codec = 2**level, WaveletCodec("haar", level=level, scaling="none").double()
    matrix = codec.encode(torch.eye(4**level, dtype=torch.float64).view(-1, 1, side, side)).flatten(1).T

    def packets(batch: Tensor, part: slice = slice(None)) -> Tensor:
        codec.check_size(*batch.shape[-2:])
        cells = batch.unflatten(-2, (-1, side)).unflatten(-1, (-1, side))  # (B, C, h, side, w, side)
        cells = cells.permute(3, 5, 0, 1, 2, 4).reshape(4**level, -1)
        return (matrix[part].to(batch.device) @ cells).view(-1, len(batch), batch[0].numel() // 4**level)

    return packets


def radial_power_spectrum(images: Images) -> Spectrum:
    """Power to 1/2 cycle/pixel, averaged over rings, colours and images less their means.

    Normalised so that white noise of variance v has power v at every frequency.
    """
    height, width = next(unit_batches(images, 1)).shape[-2:]
    side, found = min(height, width), []
    y, x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    ring = (torch.hypot(y[:, None], x) * side).round().long().flatten()  # (H W,)
    rings = torch.arange(1, side // 2 + 1)
    for batch in unit_batches(images):
        power = torch.fft.fft2(batch - batch.mean((-2, -1), keepdim=True), norm="ortho").abs().square().mean(1)
        sums = power.new_zeros(len(batch), int(ring.max()) + 1).index_add_(1, ring, power.flatten(1))
        found.append((sums / torch.bincount(ring))[:, rings].numpy())
    per_image = np.concatenate(found)  # (N, F)
    return Spectrum((rings / side).double().numpy(), per_image.mean(0), resampled(per_image), len(per_image))


def band_statistics(images: Images, level: int = 3) -> BandStatistics:
    """Energy, spread and tails of the Haar packets; those of details in photographs are heavy-tailed."""
    packets = map(haar_packets(level), unit_batches(images))
    sums = [torch.stack([(values**power).mean(2).T for power in (1, 2, 3, 4)], 1) for values in packets]
    per_image = torch.cat(sums).numpy()  # (N, 4, 4^L)
    mean, energy, *_ = per_image.mean(0)
    return BandStatistics(
        WaveletCodec("haar", level=level).bands(),
        energy,
        np.sqrt(energy - mean**2),
        _kurtosis(per_image.mean(0)),
        resampled(per_image[:, 1]),
        resampled(per_image, _kurtosis),
        len(per_image),
    )


def _kurtosis(moments: np.ndarray) -> np.ndarray:
    """Excess kurtosis (..., P) of raw moments one to four (..., 4, P); nan for a band without any detail."""
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
    queries = torch.cat([batch.float().flatten(1) for batch in unit_batches(generated)]) - 0.5
    wanted = min(k + 8, len(real))
    best, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    first = 0
    for batch in unit_batches(real, batch_size):
        keys = batch.float().flatten(1) - 0.5
        squares = keys.square().sum(1) - 2 * queries @ keys.T  # + |query|^2, the same for all keys
        found = torch.arange(first, first + len(keys)).expand_as(squares)
        best, order = torch.cat([best, squares], 1).topk(min(wanted, first + len(keys)), largest=False)
        rows = torch.cat([rows, found], 1).gather(1, order)
        first += len(keys)
    distances = np.empty(rows.shape)
    for i, query in enumerate(unit_batches(generated, 1)):
        (candidates,) = unit_batches(real, wanted, rows[i].numpy())
        distances[i] = (candidates - query).square().mean((1, 2, 3)).sqrt().numpy()
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows.numpy(), order, 1), np.take_along_axis(distances, order, 1)


def memorised(distances: np.ndarray, ratio: float = 1 / 3) -> np.ndarray:
    """Which samples (n,) are copies, by their sorted distances (n, k >= 2) to the nearest training images.

    A copy is so near to one image that the second nearest is at over 1 / `ratio` times the distance (Yoon et al.
    2023); a sample among several equal training images counts as one too.
    """
    if distances.ndim != 2 or distances.shape[1] < 2:
        raise ValueError(f"got distances {distances.shape}, wanted (n, 2 or more): ask for k=2 neighbours or more")
    return distances[:, 0] <= ratio * distances[:, 1]


def fit_classifier(images: Images, labels: np.ndarray, seed: int = 0) -> Classifier:
    """Fit randomised trees to three quarters of labelled real images, and measure them on the rest.

    Trees (Geurts et al. 2006) because their votes scatter on what resembles no class, where margins
    extrapolate.
    """
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.model_selection import train_test_split

    labels = np.asarray(labels)
    if len(images) != len(labels) or len(np.unique(labels)) < 2:
        raise ValueError(
            f"got {len(images)} images and {len(labels)} labels of {len(np.unique(labels))} classes, wanted "
            "one label each of 2 classes or more: give the labels of these images"
        )
    fitted, held_out = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=seed, stratify=labels)
    model = ExtraTreesClassifier(300, random_state=seed, n_jobs=2)
    model.fit(_flat(images, np.sort(fitted)), labels[np.sort(fitted)])
    probability = model.predict_proba(_flat(images, held_out))
    accuracy = float(np.mean(model.classes_[probability.argmax(1)] == labels[held_out]))
    confidence = probability.max(1)
    return Classifier(model, len(held_out), accuracy, confidence, float(np.quantile(confidence, 0.1)))


def judge(classifier: Classifier, generated: Images) -> dict:
    """What a classifier of real images makes of generated ones.

    Returns:
        `count`; `class_counts` {class: images whose top class it is}; `classes_seen`; `confident_share`, the
        share whose top probability is at least `confidence_p10`: 0.9 for real images by construction.
    """
    probability = classifier.predict_proba(generated)
    top = np.bincount(probability.argmax(1), minlength=probability.shape[1]).tolist()
    return {
        "count": len(generated),
        "class_counts": dict(zip(classifier.model.classes_.tolist(), top, strict=True)),
        "classes_seen": int(np.count_nonzero(top)),
        "confident_share": float(np.mean(probability.max(1) >= classifier.confidence_p10)),
    }


def _flat(images: Images, rows: np.ndarray | None = None) -> np.ndarray:
    return torch.cat([batch.float().flatten(1) for batch in unit_batches(images, rows=rows)]).numpy()
