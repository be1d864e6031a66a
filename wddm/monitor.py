"""What is looked at while training goes on, with the averaged weights in eval mode: held-out loss, samples.

Nothing here draws from the training's own randomness, so a run that is watched ends with the same bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import ModelMixin, SchedulerMixin
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor

from wddm.metrics import frechet_wavelet_distance
from wddm.objective import diffusion_loss
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images
from wddm.solvers import build_solver
from wddm.wavelets import WaveletCodec

if TYPE_CHECKING:
    from wddm.training import Trainer

SOLVER = {"num_inference_steps": 25, "eta": 0.0}  # how samples are drawn, with DDIM; of the same seeds at all times
PREVIEWED = 32  # samples in a picture


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


def validate(trainer: "Trainer") -> float:
    """Loss of the averaged weights on the held-out images; the least so far is kept as checkpoints/best."""
    share = {"rank": trainer.accelerator.process_index, "world_size": trainer.accelerator.num_processes}
    options = {"weighting": trainer.weighting, "reconstruction": trainer.reconstruction}
    with averaged(trainer.model, trainer.ema) as model:
        sums = validation_loss(
            model, trainer.codec, trainer.noise, trainer.held_out, batch_size=trainer.batch_size, **share, **options
        )
    total, count = trainer.accelerator.reduce(sums, "sum").tolist()
    if trainer.best is None or total / count < trainer.best:
        trainer.best = total / count
        trainer.save("best")
    return total / count


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


def measure(trainer: "Trainer") -> float:
    """FWD of samples, of which every process draws its share, to the training images."""
    processes = trainer.accelerator
    share = {"rank": processes.process_index, "world_size": processes.num_processes}
    with sampler(trainer) as pipeline:
        samples = list(sample_images(pipeline, trainer.fwd_images, **share, **SOLVER))
    if processes.num_processes > 1:
        samples = gather_object(samples)
    return frechet_wavelet_distance(trainer.real, np.concatenate(samples), trainer.fwd_level).value


def preview(trainer: "Trainer") -> None:
    """Draw previews/<images seen>.png, by the main process."""
    from wddm.plots.images import compose  # and seaborn, seconds that the command line can do without

    if not trainer.accelerator.is_main_process:
        return
    with sampler(trainer) as pipeline:
        images = pipeline(PREVIEWED, output_type="np", **SOLVER).images
    mosaic = compose((images * 255).round().astype(np.uint8), 16)
    folder = trainer.folder / "previews"
    folder.mkdir(exist_ok=True)
    Image.fromarray(mosaic).save(folder / f"{trainer.images_seen:09d}.png")
    if trainer.tensorboard:
        tracker = trainer.accelerator.get_tracker("tensorboard")
        tracker.log_images({"samples": mosaic[None]}, step=trainer.images_seen, dataformats="NHWC")


@contextmanager
def sampler(trainer: "Trainer") -> Iterator[WaveletPipeline]:
    """A silent pipeline of the averaged weights, for the length of a `with` block."""
    solver = build_solver("ddim", trainer.prediction_type, spacing="trailing", clip=trainer.codec.limit.item())
    with averaged(trainer.model, trainer.ema) as model:
        pipeline = WaveletPipeline(model, solver, trainer.codec)
        pipeline.set_progress_bar_config(disable=True)
        yield pipeline
