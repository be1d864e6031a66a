"""diagnostics: what samples look like beside real images: spectra, bands, nearest neighbours, classes.

Images are uint8 (N, H, W, C) or float (N, C, H, W) in [0, 1] everywhere; what is computed from them is
streamed in float64, so that a memory map of any length will do.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wddm.wavelets import WaveletCodec

Images = np.ndarray | Tensor


@dataclass(frozen=True)
class BandStatistics:
    """Per Haar packet, arrays (4^L,): energy (mean square), std, excess kurtosis (Gaussian: 0)."""

    bands: list[str]
    energy: np.ndarray
    std: np.ndarray
    kurtosis: np.ndarray
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


def unit_batches(images: Images, batch_size: int = 512, rows: np.ndarray | None = None) -> Iterator[Tensor]:
    """Batches (B, C, H, W), float64 in [0, 1] on the CPU, of all images or of the given rows.

    Raises:
        ValueError: neither uint8 (N, H, W, C) nor float (N, C, H, W), or floats outside [0, 1].
    """
    layout = "NHWC" if images.dtype in (np.uint8, torch.uint8) else "NCHW"
    if images.ndim != 4 or not len(images) or images.shape[layout.index("C")] not in (1, 2, 3, 4):
        raise ValueError(
            f"got {images.dtype} images {tuple(images.shape)}, wanted uint8 (N, H, W, C) or float "
            "(N, C, H, W) of 1 to 4 channels: transpose them"
        )
    for start in range(0, len(images) if rows is None else len(rows), batch_size):
        part = slice(start, start + batch_size)
        batch = images[part if rows is None else rows[part]]
        batch = batch.detach().cpu() if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))
        if layout == "NHWC":
            yield batch.permute(0, 3, 1, 2).double().div_(255)
        elif batch.is_floating_point() and batch.min() >= 0 and batch.max() <= 1:
            yield batch.double()
        else:
            raise ValueError(
                f"got {batch.dtype} images from {batch.min().item():g} to {batch.max().item():g}, wanted "
                "floats in [0, 1]: rescale or clamp them, or give uint8"
            )


def packets(images: Images, level: int, batch_size: int = 512, rows: np.ndarray | None = None) -> Iterator[Tensor]:
    """Orthonormal Haar packets (B, 4^L, C H W / 4^L), float64, by batches; bands as in `WaveletCodec`."""
    codec = WaveletCodec("haar", level=level, scaling="none").double()
    for batch in unit_batches(images, batch_size, rows):
        yield codec.encode(batch).reshape(len(batch), 4**level, -1)


def radial_power_spectrum(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Frequency (cycles/pixel, to 1/2) and power, averaged over rings, colours and images less their means.

    Normalised so that white noise of variance v has power v at every frequency.
    """
    total, count, ring = 0.0, 0, None
    for batch in unit_batches(images):
        if ring is None:
            side = min(batch.shape[-2:])
            y, x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in batch.shape[-2:])
            ring = (torch.hypot(y[:, None], x) * side).round().long().flatten()
        power = torch.fft.fft2(batch - batch.mean((-2, -1), keepdim=True), norm="ortho").abs().square()
        total = total + power.mean(1).sum(0).flatten()
        count += len(batch)
    rings = torch.arange(1, side // 2 + 1)
    power = torch.bincount(ring, total) / torch.bincount(ring) / count
    return (rings / side).double().numpy(), power[rings].numpy()


def band_statistics(images: Images, level: int = 3) -> BandStatistics:
    """Energy, spread and tails of the Haar packets; those of details in photographs are heavy-tailed."""
    total, values = 0.0, 0
    for batch in packets(images, level):
        total = total + torch.stack([(batch**power).sum((0, 2)) for power in (1, 2, 3, 4)]).numpy()
        values += batch[:, 0].numel()
    m1, m2, m3, m4 = total / values
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    with np.errstate(invalid="ignore", divide="ignore"):  # a band without any detail has no kurtosis: nan
        kurtosis = fourth / variance**2 - 3
    return BandStatistics(WaveletCodec("haar", level=level).bands(), m2, np.sqrt(variance), kurtosis, len(images))


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
