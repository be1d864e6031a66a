"""What is looked at while training goes on, with the averaged weights in eval mode: held-out loss, previews.

Nothing here draws from the training's own randomness, so a run that is watched ends with the same bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor

from wddm.mosaics import compose
from wddm.objective import diffusion_loss
from wddm.pipeline import WaveletPipeline
from wddm.wavelets import WaveletCodec

PREVIEW = {"batch_size": 32, "num_inference_steps": 25, "eta": 0.0}  # how previews are drawn, with DDIM


class Rows:
    """Some rows of an array (N, ...), not copied: as much of an array as `batches` asks for."""

    def __init__(self, images: np.ndarray, rows: np.ndarray) -> None:
        self.images, self.rows, self.dtype, self.ndim = images, rows, images.dtype, images.ndim
        self.shape = (len(rows), *images.shape[1:])
        self.nbytes = len(rows) * images[:1].nbytes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        return self.images[self.rows[index]]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.images[self.rows]


def hold_out(images: np.ndarray, count: int) -> tuple[np.ndarray | Rows, np.ndarray | None]:
    """(images to train on, `count` others spread evenly over the set); all and None where `count` is 0."""
    if not count:
        return images, None
    if not 0 < count < len(images):
        raise ValueError(
            f"got {count} validation images of {len(images)}, wanted fewer, 0 or more: change their number"
        )
    held = np.linspace(0, len(images) - 1, count).round().astype(int)
    return Rows(images, np.setdiff1d(np.arange(len(images)), held)), images[held]


@contextmanager
def averaged(model: ModelMixin, ema: EMAModel) -> Iterator[ModelMixin]:
    """The model with the averaged weights, in eval mode, for the length of a `with` block."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield model
    finally:
        ema.restore(model.parameters())
        model.train()


@torch.no_grad()
def validation_loss(
    model: ModelMixin,
    codec: WaveletCodec,
    scheduler: SchedulerMixin,
    images: np.ndarray,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    **options,
) -> Tensor:
    """Sum of the loss over this process's share of held-out uint8 images (N, H, W, C), and its size: (2,), float64.

    Noise and timestep are a function of the image's number alone, so the same every time. `options` are those of the
    loss: weighting, reconstruction.
    """
    device, total, share = codec.limit.device, 0.0, range(rank, len(images), world_size)
    steps = len(scheduler.alphas_cumprod)
    for start in range(0, len(share), batch_size):
        rows = list(share[start : start + batch_size])
        part = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        noise = torch.stack([torch.randn(codec.shape(*part.shape[1:]), generator=g) for g in generators])
        t = torch.cat([torch.randint(steps, (1,), generator=g) for g in generators])
        loss = diffusion_loss(model, codec, scheduler, part.to(device), noise.to(device), t.to(device), **options)
        total += loss.total.item() * len(rows)
    return torch.tensor([total, len(share)], dtype=torch.float64, device=device)


def preview(pipeline: WaveletPipeline, folder: Path, images_seen: int) -> np.ndarray:
    """Draw <folder>/<images_seen>.png and return it, uint8 (H, W, C): the same seeds at all times."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(output_type="np", **PREVIEW).images
    mosaic = compose((images * 255).round().astype(np.uint8), 16)
    folder.mkdir(exist_ok=True)
    Image.fromarray(mosaic).save(folder / f"{images_seen:09d}.png")
    return mosaic
