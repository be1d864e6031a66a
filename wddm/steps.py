"""What a step of training takes, beside the Trainer: precision, seeds, noise, clipping, the average; and its log."""

import json
import math
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid, numpy_to_pil
from PIL.Image import Image
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from wddm.files import read_rows, whole
from wddm.objective import NOISE
from wddm.wavelets import check_choice

# name -> share of the learning rate, of the share of the steps after the warm-up that are done, 0 to 1
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant_with_warmup": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
VARYING = ("images_per_s", "memory_gb")  # of a Step; all else is the same whenever the settings are


@dataclass(frozen=True)
class Step:
    """Where training is. Losses and norms are means since the last `Step`; the rate leaves out the caller's time."""

    step: int
    images_seen: int
    loss: float
    lr: float
    grad_norm: float
    images_per_s: float
    memory_gb: float  # peak, of the GPU, or of the process where there is none
    band_loss: dict[str, float]  # squared error of the prediction in each band, unweighted
    validation_loss: float | None = None  # on held-out images, where it was measured at this step
    fwd: float | None = None  # what `measure` says of samples, where it was asked at this step


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's log.jsonl, one per `Step`; a last line cut short by a crash is left out."""
    return read_rows(Path(folder) / "log.jsonl")


def forget_after(folder: Path, step: int, images_seen: int) -> None:
    """Cut a run's log and previews to the step that it is taken up at."""
    rows = [row for row in read_log(folder) if row["step"] <= step]
    with whole(folder / "log.jsonl") as log:
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for picture in (folder / "previews").glob("*.png"):
        if int(picture.stem) > images_seen:
            picture.unlink()


def scheduled(learning_rate: float, schedule: str, step: int, warmup: int, total: int) -> float:
    """Learning rate after `step` steps of `total`, of which `warmup` are the warm-up."""
    if step < warmup:
        return learning_rate * step / warmup
    return learning_rate * SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))


def resolve_precision(precision: str, cpu: bool = False) -> str:
    """accelerate's name of the precision; "auto" is bf16 where a GPU has it, else "no"."""
    check_choice("precision", precision, ("auto", "no", "fp16", "bf16"))
    if precision != "auto":
        return precision
    return "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def check_batch(batch_size: int, accumulation: int, processes: int) -> None:
    """ValueError if a batch does not divide among processes and micro-batches."""
    if batch_size % (accumulation * processes):
        raise ValueError(
            f"got batch_size={batch_size}, wanted a multiple of {accumulation} (accumulation) times {processes} "
            "(processes): change one of them"
        )


def tune(model: nn.Module, device: torch.device) -> None:
    """On a GPU, TF32 in matrix products and channels last in the model; nothing on the CPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        model.to(memory_format=torch.channels_last)


def peak_memory_gb(device: torch.device) -> float:
    """Of a CUDA device since the start, in GiB; of this process where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def derived_seed(*key: int) -> int:
    """An independent seed for every key, such as (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])


def seed_device(device: torch.device, seed: int) -> None:
    """Seed this device alone: `torch.manual_seed` asks after every kind of device, a third of a millisecond."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def clip(accelerator: Accelerator, parameters: Collection[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Scale the gradients down to norm 1; their norm before, all together and of every parameter (P,)."""
    accelerator.unscale_gradients()
    norms = torch.stack(torch._foreach_norm([cast(Tensor, p.grad) for p in parameters]))
    norm = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    if accelerator.scaler is not None:  # fp16: a step whose gradients overflow is left out, not wrong
        norm, norms = norm.nan_to_num(0, 0, 0), norms.nan_to_num(0, 0, 0)
    return norm, norms


def check(unread: list[tuple[Tensor, ...]], parameters: list[str], step: int, learning_rate: float) -> None:
    """Raise FloatingPointError if a loss or gradient, as `Trainer.optimise` gives them, was not finite until `step`."""
    loss, _, norm, norms = (torch.stack(values) for values in zip(*unread, strict=True))
    finite = (loss.isfinite() & norm.isfinite()).tolist()
    if not all(finite):
        first = finite.index(False)
        bad = [name for name, norm in zip(parameters, norms[first].tolist(), strict=True) if not math.isfinite(norm)]
        raise FloatingPointError(
            f"got numbers that are not finite in {f'the gradient of {bad[0]}' if bad else 'the loss'} at step "
            f"{step - len(unread) + 1 + first}, wanted finite ones: lower learning_rate (now {learning_rate:g}); the "
            "last good checkpoint is kept"
        )


def draw_noise(
    generators: list[Generator], each: int, shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Noise (N, *shape) and timesteps (N,), of which every generator gives `each` so many."""
    noise = [torch.randn(each, *shape, generator=one, device=one.device) for one in generators]
    t = [torch.randint(NOISE["num_train_timesteps"], (each,), generator=one, device=one.device) for one in generators]
    return torch.cat(noise).to(device), torch.cat(t).to(device)


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    """What an optimiser keeps of every parameter, as `<number of the parameter>.<name>`."""
    kept = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, state in kept.items() for name, value in state.items()}


def load_moments(optimizer: Optimizer, flat: dict[str, Tensor]) -> None:
    """Put back what `moments` gave."""
    kept: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in flat.items():
        index, name = key.split(".")
        kept[int(index)][name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})


def picture(samples: np.ndarray, columns: int) -> Image:
    """Samples uint8 (N, H, W, C) side by side, so many in a row, which divides N; without colour, the first channel."""
    colors = samples[..., : 3 if samples.shape[-1] >= 3 else 1]
    return make_image_grid(numpy_to_pil(colors / 255), len(samples) // columns, columns)


@torch.no_grad()
def average(ema: EMAModel, weights: list[Tensor]) -> None:
    """`ema.step(weights)`, up to rounding, in one pass over the weights: small networks feel the three of that."""
    ema.optimization_step += 1
    torch._foreach_lerp_(ema.shadow_params, weights, 1 - ema.get_decay(ema.optimization_step))


class Rows:
    """Some rows of images (N, H, W, C), not copied: as much of an array as `batches` asks for."""

    def __init__(self, images: np.ndarray, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows
        self.dtype, self.ndim, self.shape, self.nbytes = images.dtype, images.ndim, images.shape, images.nbytes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray | int) -> np.ndarray:
        return self.images[self.rows[index]]


def hold_out(images: np.ndarray, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(images to train on, `count` others spread evenly over the set); None holds nothing out."""
    if count is None:
        return images, images[:0]
    if not 0 < count < len(images):
        raise ValueError(f"got validation_images={count} of {len(images)} images, wanted 1 or more, and fewer than all")
    held = np.linspace(0, len(images) - 1, count).round().astype(int)
    rest = Rows(images, np.delete(np.arange(len(images)), held))
    return cast(np.ndarray, rest), images[held]  # for `batches`, that is
