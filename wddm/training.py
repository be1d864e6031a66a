"""Training as a generator of `Step`: accelerate gives devices, precision and processes, diffusers EMA and schedules.

All randomness is a function of (seed, step): order and flips of the images, noise, timesteps, dropout. A checkpoint
is therefore weights, EMA, optimiser, schedule, the half-read meter and the number of steps, and resuming is exact.
Lengths are counted in images (kimg: thousands), batches are global: N processes share one batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from wddm import checkpoints, monitor, resume, update
from wddm.batches import batches
from wddm.devices import resolve_precision, tune
from wddm.metrics.frechet import packet_moments
from wddm.objective import noise_scheduler
from wddm.steps import Meter, Step, append_log, peak_memory_gb
from wddm.wavelets import WaveletCodec


@dataclass(kw_only=True)
class Trainer:
    """One training run in `folder`: checkpoints/, log.jsonl, previews/ and, at the end, pipeline/ with the averaged
    weights.

    Made again with the same settings, it goes on where it was stopped, exactly; with others, it refuses and says what
    has changed. `notes` holds what the caller should be told.

    Args:
        images: uint8 (N, H, W, C).
        batch_size: images per optimiser step, over all processes and `accumulation` micro-batches.
        prediction_type, weighting, reconstruction: see objective.py.
        schedule: "cosine" (to zero at the end) or "constant_with_warmup".
        ema_half_life_kimg: images after which a weight's share in the average has halved; 0 is no averaging.
        flip: mirror half of the images, at random.
        precision: "no", "fp16", "bf16", or "auto": bf16 where a GPU has it, else "no".
        compile: compile the network.
        gradient_checkpointing: compute activations again in the backward pass, where memory is short.
        log_every: steps between two `Step`s.
        validation_kimg: thousand images between two losses on `validation_images` held-out ones, with the averaged
            weights; 0 never. The checkpoint where it was least is kept as checkpoints/best.
        preview_kimg: thousand images between two pictures of samples in previews/; 0 never.
        fwd_kimg: thousand images between two Frechet wavelet distances, of `fwd_images` samples of the averaged
            weights to the training images, at `fwd_level`; 0 never.
        tensorboard: write the log and previews to folder/tensorboard too.
        extend: go on with an earlier run of the same settings but for a smaller train_kimg.
        restart: set the checkpoints of a finished run with other settings aside, and start anew.
        cpu: stay off a GPU that is there.

    Raises:
        ValueError: checkpoints of other settings are there.
    """

    model: ModelMixin
    codec: WaveletCodec
    images: np.ndarray
    folder: Path
    train_kimg: float
    batch_size: int = 64
    accumulation: int = 1
    prediction_type: str = "v_prediction"
    weighting: str = "none"
    reconstruction: float = 0.0
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_kimg: float = 5.0
    weight_decay: float = 1e-2
    ema_half_life_kimg: float = 10.0
    flip: bool = False
    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 20
    checkpoint_kimg: float = 50.0
    validation_kimg: float = 0.0
    validation_images: int = 256
    preview_kimg: float = 0.0
    fwd_kimg: float = 0.0
    fwd_images: int = 512
    fwd_level: int = 2
    tensorboard: bool = False
    extend: bool = False
    restart: bool = False
    cpu: bool = False
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.total_steps = math.ceil(self.train_kimg * 1000 / self.batch_size)
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(self.precision, self.cpu),
            gradient_accumulation_steps=self.accumulation,
            log_with="tensorboard" if self.tensorboard else None,
            project_dir=self.folder,
            cpu=self.cpu or not torch.accelerator.is_available(),
        )
        device = self.accelerator.device
        tune(self.model, device)
        if self.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.codec.to(device)
        self.noise = noise_scheduler(self.prediction_type)
        held_out = self.validation_images if self.validation_kimg else 0
        self.trained, self.held_out = monitor.hold_out(self.images, held_out)
        self.real = packet_moments(self.trained, self.fwd_level) if self.fwd_kimg else None
        self.model.train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            self.parameters.values(), self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        self.network, prepared = self.accelerator.prepare(
            torch.compile(self.model) if self.compile else self.model, optimizer
        )
        self.optimizer = prepared if self.accelerator.scaler is not None else optimizer  # fp16 alone needs accelerate's
        self.lr = get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=math.ceil(self.warmup_kimg * 1000 / self.batch_size),
            num_training_steps=self.total_steps,
        )
        half_life_steps = self.ema_half_life_kimg * 1000 / self.batch_size
        decay = 0.5 ** (1 / half_life_steps) if half_life_steps else 0.0
        self.weights = list(self.model.parameters())  # once: small networks feel a walk through them
        self.ema = EMAModel(self.weights, decay=decay, foreach=True)
        self.step, self.meter, self.best = 0, Meter(), None
        resume.take_up(self)
        if self.tensorboard:
            self.accelerator.init_trackers("tensorboard")

    def steps(self) -> Iterator[Step]:
        """Train to the end, a `Step` every `log_every` steps; then the pipeline is saved.

        Raises:
            FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
            OSError: a checkpoint could not be written; the last good one stays.
            KeyboardInterrupt: once the current step is finished and a checkpoint of it written.
        """
        stream = batches(
            self.trained, self.batch_size, seed=self.seed, start=self.images_seen, flip=self.flip,
            device=self.accelerator.device, rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )  # fmt: skip
        with checkpoints.deferred_interrupt() as interrupted:
            while self.step < self.total_steps:
                self.meter.add(self.step + 1, *update.optimise(self, next(stream)))
                self.step += 1
                done = self.step == self.total_steps
                logging = self.step % self.log_every == 0 or done
                stopping = done or self._agreed(interrupted.is_set(), logging)
                validating, measuring = self._due(self.validation_kimg), self._due(self.fwd_kimg)
                previewing, saving = self._due(self.preview_kimg), self._due(self.checkpoint_kimg) or stopping
                if logging or saving or validating or measuring or previewing:
                    self._check()
                row = None
                if logging or validating or measuring:
                    row = self._log(validating, measuring)
                if saving:
                    self.save()
                if previewing:
                    monitor.preview(self)
                if row:
                    try:
                        yield row
                    except GeneratorExit:
                        self.save()
                        raise
                    self.meter.resume()
                if stopping and not done:
                    raise KeyboardInterrupt
        if self.accelerator.is_main_process:
            resume.save_pipeline(self)
        self.accelerator.end_training()

    def _due(self, kimg: float) -> bool:
        """Whether something that happens every so many thousand images, and at the end, happens at this step."""
        every = max(1, round(kimg * 1000 / self.batch_size))
        return bool(kimg) and (self.step % every == 0 or self.step == self.total_steps)

    def _agreed(self, interrupted: bool, asking: bool) -> bool:
        """Whether any process was interrupted; several ask each other only now and then, and stop together."""
        if self.accelerator.num_processes == 1:
            return interrupted
        told = torch.tensor(float(interrupted), device=self.accelerator.device)
        return asking and bool(self.accelerator.reduce(told, "sum"))

    def _check(self) -> None:
        """Raise FloatingPointError if a loss or gradient was not finite since the last reading."""
        if bad := self.meter.first_bad():
            step, parameter = bad
            where = "the loss" if parameter is None else f"the gradient of {list(self.parameters)[parameter]}"
            raise FloatingPointError(
                f"got numbers that are not finite in {where} at step {step}, wanted finite ones: lower learning_rate "
                f"(now {self.learning_rate:g}); the last good checkpoint is kept"
            )

    def _log(self, validating: bool, measuring: bool) -> Step:
        """Read the meter (all processes) and begin a new one; append to log.jsonl, with what else is due."""
        steps_per_s = self.meter.rate()  # before what is no training
        measured = {"validation_loss": monitor.validate(self)} if validating else {}
        measured |= {"fwd": monitor.measure(self)} if measuring else {}
        loss, band_loss, norm = (self.accelerator.reduce(value, "mean") for value in self.meter.means())
        names = self.codec.bands()
        row = Step(
            step=self.step,
            images_seen=self.images_seen,
            loss=loss.item(),
            lr=self.lr.get_last_lr()[0],
            grad_norm=norm.item(),
            images_per_s=steps_per_s * self.batch_size,
            memory_gb=peak_memory_gb(self.accelerator.device),
            band_loss=dict(zip(names, band_loss.view(len(names), -1).mean(1).tolist(), strict=True)),
            **measured,
        )
        self.meter = Meter()
        if self.accelerator.is_main_process:
            append_log(self.folder, row)
        if self.tensorboard:
            self.accelerator.log(row.curves(), row.images_seen)
        return row

    def save(self, name: str | None = None) -> None:
        """Write the checkpoint of this step (or of another name), from the main process."""
        if self.accelerator.is_main_process:
            resume.save(self, name)

    @property
    def total_images(self) -> int:
        return self.total_steps * self.batch_size

    @property
    def images_seen(self) -> int:
        return self.step * self.batch_size
