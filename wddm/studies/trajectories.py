"""trajectories: what each band does while images are drawn, and how well real ones are made out under noise.

Bands are those of the codec; quantities of a band are root mean squares over images, colours and positions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wddm.data import to_batch
from wddm.objective import clean_estimate, signal_power
from wddm.pipeline import WaveletPipeline


def by_band(coefficients: Tensor, bands: int) -> np.ndarray:
    """Root mean square of each band (bands,) of stacked coefficients (B, bands * C, h, w)."""
    return coefficients.unflatten(1, (bands, -1)).square().mean((0, 2, 3, 4)).sqrt().double().cpu().numpy()


@torch.no_grad()
def along_trajectory(pipeline: WaveletPipeline, count: int, **options: Any) -> dict[str, np.ndarray]:
    """What the network sees and estimates at each of its S evaluations while `count` images are drawn.

    `times` (S,); by band (S, bands): `signal` and `noise`, which the estimate says are in what the network sees, and
    `change`, how far the estimate is from the result, relative to the result. `options` go to the pipeline's call.
    """
    bands, seen, found = len(pipeline.codec.bands()), [], {"signal": [], "noise": [], "change": []}
    hook = pipeline.backbone.register_forward_hook(lambda network, inputs, out: seen.append((*inputs[:2], out.sample)))
    try:
        pipeline(count, output_type="pt", **options)
    finally:
        hook.remove()
    times = [torch.as_tensor(t).round().long().view(-1)[:1].to(noisy.device) for noisy, t, _ in seen]
    clean = [clean_estimate(pipeline.scheduler, z, out, t) for (z, _, out), t in zip(seen, times, strict=True)]
    for (noisy, _, _), estimate, t in zip(seen, clean, times, strict=True):
        signal = signal_power(pipeline.scheduler, t).sqrt() * estimate
        found["signal"].append(by_band(signal, bands))
        found["noise"].append(by_band(noisy - signal, bands))
        found["change"].append(by_band(estimate - clean[-1], bands) / by_band(clean[-1], bands))
    return {"times": np.array([int(t) for t in times])} | {name: np.stack(rows) for name, rows in found.items()}


@torch.no_grad()
def denoising_error(
    pipeline: WaveletPipeline, images: np.ndarray, times: Sequence[int], *, seed: int = 0
) -> np.ndarray:
    """Error of the clean estimate of real images (N, H, W, C) noised to each of the times (T,), by band (T, bands).

    Relative to the spread of the band: 1 is what the mean of all images would score.
    """
    bands, device = len(pipeline.codec.bands()), pipeline.device
    clean = pipeline.codec.encode(to_batch(np.asarray(images), np.zeros(len(images), bool), device))
    spread = by_band(clean - clean.mean(0), bands)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    errors = []
    for time_step in times:
        estimates = []
        for z, e in zip(clean.split(256), noise.split(256), strict=True):
            t = torch.full((len(z),), time_step, device=device)
            noisy = pipeline.scheduler.add_noise(z, e, t)
            estimates.append(clean_estimate(pipeline.scheduler, noisy, pipeline.backbone(noisy, t).sample, t))
        errors.append(by_band(torch.cat(estimates) - clean, bands) / spread)
    return np.stack(errors)
