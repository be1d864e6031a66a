"""A network that learns to denoise: one optimiser step on a batch, and what the average of its weights can do.

All randomness is a function of (seed, step): noise, timesteps, dropout. Validation and samples draw from none of it.
accelerate gives devices, precision and processes, diffusers the average. Lengths are counted in images (kimg:
thousands), batches are global: N processes share one batch.
"""

import math
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from wddm.objective import WEIGHTINGS, Loss, build_solver, diffusion_loss, noise_scheduler
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images
from wddm.wavelets import WaveletCodec

# name -> share of the learning rate, of the share of the steps after the warm-up that are done, 0 to 1
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant_with_warmup": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


@dataclass(kw_only=True)
class Learner:
    """A network, the average of its weights and their optimiser, after `step` steps.

    Raises:
        ValueError: an option is not known, or the batch does not divide among processes and micro-batches.
    """

    model: ModelMixin
    codec: WaveletCodec
    train_kimg: float = 160.0  # length of the training
    batch_size: int = 96  # images per optimiser step, over all processes and micro-batches
    accumulation: int = 1  # micro-batches per optimiser step
    prediction_type: str = "v_prediction"  # this and the next two: see objective.py
    weighting: str = "min_snr"
    reconstruction: float = 0.0
    learning_rate: float = 2e-3  # of AdamW, after the warm-up
    schedule: str = "constant_with_warmup"  # a key of SCHEDULES; cosine ends at zero
    warmup_kimg: float = 5.0
    weight_decay: float = 0.01
    ema_half_life_kimg: float = 10.0  # after which a weight's share in the average has halved; 0: no averaging
    seed: int = 0
    precision: str = "auto"  # "no", "fp16", "bf16", or "auto": bf16 where a GPU has it, else "no"
    compile: bool = False
    gradient_checkpointing: bool = False  # compute activations again in the backward pass, where memory is short
    cpu: bool = False  # stay off a GPU that is there

    def __post_init__(self) -> None:
        for name, table in (("schedule", SCHEDULES), ("weighting", WEIGHTINGS)):
            if (got := getattr(self, name)) not in table:
                raise ValueError(f"got {name}={got!r}, wanted one of {', '.join(table)}: choose one of them")
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(self.precision, self.cpu),
            gradient_accumulation_steps=self.accumulation,
            cpu=self.cpu or not torch.accelerator.is_available(),
        )
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.batch_size % (self.accumulation * self.world_size):
            raise ValueError(
                f"got batch_size={self.batch_size}, wanted a multiple of {self.accumulation} (accumulation) times "
                f"{self.world_size} (processes): change one of them"
            )
        tune(self.model, self.device)
        if self.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        self.codec.to(self.device)
        self.noise_scheduler = noise_scheduler(self.prediction_type)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        plain = torch.optim.AdamW(
            self.parameters.values(), self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        network = torch.compile(self.model) if self.compile else self.model
        self.network, prepared = self.accelerator.prepare(network, plain)
        self.optimizer = plain if self.accelerator.scaler is None else prepared  # fp16 alone needs accelerate's
        half_life_steps = self.ema_half_life_kimg * 1000 / self.batch_size
        decay = 0.5 ** (1 / half_life_steps) if half_life_steps else 0.0
        self.weights: list[Tensor] = list(self.model.parameters())  # once: small networks feel a walk through them
        self.ema = EMAModel(self.weights, decay=decay, foreach=True)
        self.step = 0

    def optimise(self, images: Tensor) -> tuple[Tensor, ...]:
        """One optimiser step on this process's share (b, C, H, W) of a batch.

        Returns its loss, that of every channel (4^L C,), the norm of the gradients and of every parameter's (P,), all
        left on the device: to read them would be to wait for it.
        """
        noise, t = self.draw_noise(images)
        seed_device(self.device, derived_seed(self.seed, self.step, 1 + self.rank))  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        losses = []
        for part in zip(*(x.chunk(self.accumulation) for x in (images, noise, t)), strict=True):
            with self.accelerator.accumulate(self.network):
                loss = self._loss(self.network, *part)
                self.accelerator.backward(loss.total)
                if self.accelerator.sync_gradients:
                    norm, norms = self._clip()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            losses.append(loss)
        average(self.ema, self.weights)
        total, per_channel, _ = (torch.stack(values).mean(0).detach() for values in zip(*losses, strict=True))
        return total, per_channel, norm, norms

    def draw_noise(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (b, 4^L C, h, w) and timesteps (b,) of this process's share, cut from those of the whole batch."""
        generator = torch.Generator(self.device).manual_seed(derived_seed(self.seed, self.step))
        shape, steps = self.codec.shape(*images.shape[1:]), len(self.noise_scheduler.alphas_cumprod)
        noise = torch.randn(self.batch_size, *shape, generator=generator, device=self.device)
        t = torch.randint(steps, (self.batch_size,), generator=generator, device=self.device)
        share = slice(self.rank * len(images), (self.rank + 1) * len(images))
        return noise[share], t[share]

    def _loss(self, network: nn.Module, images: Tensor, noise: Tensor, t: Tensor) -> Loss:
        return diffusion_loss(
            network, self.codec, self.noise_scheduler, images, noise, t,
            weighting=self.weighting, reconstruction=self.reconstruction,
        )  # fmt: skip

    def _clip(self) -> tuple[Tensor, Tensor]:
        """Scale the gradients down to norm 1; their norm before, all together and of every parameter (P,)."""
        self.accelerator.unscale_gradients()
        norms = torch.stack(torch._foreach_norm([cast(Tensor, p.grad) for p in self.parameters.values()]))
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), 1.0, norm)
        if self.accelerator.scaler is not None:  # fp16: a step whose gradients overflow is left out, not wrong
            norm, norms = norm.nan_to_num(0, 0, 0), norms.nan_to_num(0, 0, 0)
        return norm, norms

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        warmup = math.ceil(self.warmup_kimg * 1000 / self.batch_size)
        if self.step < warmup:
            return self.learning_rate * self.step / warmup
        done = (self.step - warmup) / max(1, self.total_steps - warmup)
        return self.learning_rate * SCHEDULES[self.schedule](done)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.train_kimg * 1000 / self.batch_size)

    @property
    def total_images(self) -> int:
        return self.total_steps * self.batch_size

    @property
    def images_seen(self) -> int:
        return self.step * self.batch_size

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """The model with the averaged weights, in eval mode, for the length of a `with` block."""
        self.ema.store(self.weights)
        self.ema.copy_to(self.weights)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.ema.restore(self.weights)
            self.model.train()

    @torch.no_grad()
    def validation_loss(self, images: np.ndarray) -> float:
        """Mean loss of the averaged weights on uint8 images (N, H, W, C), of which every process takes its share.

        Noise and timestep are a function of the image's number alone, so the same every time.
        """
        total, share = 0.0, range(self.rank, len(images), self.world_size)
        steps = len(self.noise_scheduler.alphas_cumprod)
        with self.averaged() as model:
            for start in range(0, len(share), self.batch_size):
                rows = list(share[start : start + self.batch_size])
                part = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
                generators = [torch.Generator().manual_seed(row) for row in rows]
                noise = torch.stack([torch.randn(self.codec.shape(*part.shape[1:]), generator=g) for g in generators])
                t = torch.cat([torch.randint(steps, (1,), generator=g) for g in generators])
                loss = self._loss(model, part.to(self.device), noise.to(self.device), t.to(self.device))
                total += loss.total.item() * len(rows)
        sums = torch.tensor([total, len(share)], dtype=torch.float64, device=self.device)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return total / count

    def samples(self, count: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """Batches uint8 (b, H, W, C) of this process's share of `count` samples of the averaged weights.

        Drawn by DDIM in 25 steps, from the same seeds every time.
        """
        with self.averaged() as model:
            pipeline = self.pipeline(model)
            pipeline.set_progress_bar_config(disable=True)
            return list(sample_images(pipeline, count, rank=rank, world_size=world_size, num_inference_steps=25))

    def pipeline(self, model: ModelMixin) -> WaveletPipeline:
        """What samples from `model`: DDIM, unless the caller sets another solver."""
        solver = build_solver("ddim", self.prediction_type, spacing="trailing", codec=self.codec)
        return WaveletPipeline(model, solver, self.codec)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights, their average and the optimiser's moments, as `load_tensors` takes them back."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "weights": self.model.state_dict(),
            "ema": dict(zip(dict(self.model.named_parameters()), self.ema.shadow_params, strict=True)),
            "optimizer": {f"{i}.{key}": value for i, state in moments.items() for key, value in state.items()},
        }

    def load_tensors(self, step: int, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Be as a learner was after `step` steps."""
        self.step = self.ema.optimization_step = step
        self.model.load_state_dict(tensors["weights"])
        for shadow, (name, _) in zip(self.ema.shadow_params, self.model.named_parameters(), strict=True):
            shadow.copy_(tensors["ema"][name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors["optimizer"].items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


@torch.no_grad()
def average(ema: EMAModel, weights: list[Tensor]) -> None:
    """`ema.step(weights)`, up to rounding, in one pass over the weights: small networks feel the three of that."""
    ema.optimization_step += 1
    torch._foreach_lerp_(ema.shadow_params, weights, 1 - ema.get_decay(ema.optimization_step))


def derived_seed(*key: int) -> int:
    """An independent seed for every key, such as (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])


def seed_device(device: torch.device, seed: int) -> None:
    """Seed this device alone: `torch.manual_seed` asks after every kind of device, a third of a millisecond."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def resolve_precision(precision: str, cpu: bool = False) -> str:
    """accelerate's name of the precision; "auto" is bf16 where a GPU has it, else "no"."""
    wanted = ("auto", "no", "fp16", "bf16")
    if precision not in wanted:
        raise ValueError(f"got precision={precision!r}, wanted one of {', '.join(wanted)}: choose one of them")
    if precision != "auto":
        return precision
    return "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def tune(model: nn.Module, device: torch.device) -> None:
    """On a GPU, TF32 in matrix products and channels last in the model; nothing on the CPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        model.to(memory_format=torch.channels_last)


def peak_memory_gb(device: torch.device) -> float:
    """Of a CUDA device since the start, in GiB; of this process where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
