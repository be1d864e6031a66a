"""What a step of training takes, beside the Trainer: precision, seeds, noise, the average of weights; and its log."""

import json
import math
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Generator, Tensor, nn

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


def resolve_precision(precision: str, cpu: bool = False) -> str:
    """accelerate's name of the precision; "auto" is bf16 where a GPU has it, else "no"."""
    check_choice("precision", precision, ("auto", "no", "fp16", "bf16"))
    if precision != "auto":
        return precision
    return "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def check_batch(batch_size: int, accumulation: int = 1, num_processes: int = 1) -> None:
    """ValueError if a batch does not divide among processes and micro-batches."""
    if batch_size % (accumulation * num_processes):
        raise ValueError(
            f"got batch_size={batch_size}, wanted a multiple of {accumulation} (accumulation) times {num_processes} "
            "(processes): change one of them"
        )


def check_held_out(validation_images: int, count: int) -> None:
    """ValueError if so many of `count` images cannot be held out."""
    if not 0 < validation_images < count:
        got = f"got validation_images={validation_images} of {count} images"
        raise ValueError(f"{got}, wanted 1 or more, and fewer than all: change validation_images")


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


def draw_noise(
    generators: list[Generator], each: int, shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Noise (N, *shape) and timesteps (N,), of which every generator gives `each` so many."""
    noise = [torch.randn(each, *shape, generator=one, device=one.device) for one in generators]
    t = [torch.randint(NOISE["num_train_timesteps"], (each,), generator=one, device=one.device) for one in generators]
    return torch.cat(noise).to(device), torch.cat(t).to(device)


@torch.no_grad()
def average(ema: EMAModel, weights: list[Tensor]) -> None:
    """`ema.step(weights)`, up to rounding, in one pass over the weights: small networks feel the three of that."""
    ema.optimization_step += 1
    torch._foreach_lerp_(ema.shadow_params, weights, 1 - ema.get_decay(ema.optimization_step))
