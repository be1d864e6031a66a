"""Training as a generator of `Step`: accelerate gives devices, precision and processes, diffusers EMA and schedules.

All randomness is a function of (seed, step): order and flips of the images, noise, timesteps, dropout. A checkpoint
is therefore weights, EMA, optimiser, schedule and the number of steps, and resuming is exact. Lengths are counted in
images (kimg: thousands), batches are global: N processes share one batch.
"""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from wddm import checkpoints
from wddm.batches import batches
from wddm.objective import Loss, diffusion_loss, noise_scheduler
from wddm.pipeline import WaveletPipeline
from wddm.solvers import build_solver
from wddm.steps import Meter, Step, append_log, cut_log
from wddm.wavelets import WaveletCodec


@dataclass(kw_only=True)
class Trainer:
    """One training run in `folder`: checkpoints/, log.jsonl and, at the end, pipeline/ with the averaged weights.

    Made again with the same settings, it goes on where it was stopped, exactly. With other settings it starts anew
    and sets the earlier checkpoints aside; `notes` says so.

    Args:
        images: uint8 (N, H, W, C).
        batch_size: images per optimiser step, over all processes and `accumulation` micro-batches.
        prediction_type, weighting, reconstruction: see objective.py.
        schedule: "cosine" (to zero at the end) or "constant_with_warmup".
        ema_half_life_kimg: images after which a weight's share in the average has halved; 0 is no averaging.
        flip: mirror half of the images, at random.
        precision: "no", "fp16", "bf16", or "auto": bf16 where a GPU has it, else "no".
        compile: compile the network.
        log_every: steps between two `Step`s.
        cpu: stay off a GPU that is there.
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
    log_every: int = 20
    checkpoint_kimg: float = 50.0
    cpu: bool = False
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.total_steps = math.ceil(self.train_kimg * 1000 / self.batch_size)
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(self.precision, self.cpu),
            gradient_accumulation_steps=self.accumulation,
            cpu=self.cpu,
        )
        self.codec.to(self.accelerator.device)
        self.noise = noise_scheduler(self.prediction_type)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=self.weight_decay, fused=True)
        self.network, self.optimizer = self.accelerator.prepare(
            torch.compile(self.model) if self.compile else self.model, optimizer
        )
        warmup_steps = math.ceil(self.warmup_kimg * 1000 / self.batch_size)
        self.lr = get_scheduler(
            self.schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=self.total_steps
        )
        half_life_steps = self.ema_half_life_kimg * 1000 / self.batch_size
        decay = 0.5 ** (1 / half_life_steps) if half_life_steps else 0.0
        self.ema = EMAModel(self.model.parameters(), decay=decay, foreach=True)
        self.step = 0
        self._resume()

    def steps(self) -> Iterator[Step]:
        """Train to the end, a `Step` every `log_every` steps; then the pipeline is saved.

        Raises:
            FloatingPointError: the loss is no longer finite; the last good checkpoint stays.
            KeyboardInterrupt: once the current step is finished and a checkpoint of it written.
        """
        save_every = max(1, round(self.checkpoint_kimg * 1000 / self.batch_size))
        meter = Meter()
        stream = batches(
            self.images, self.batch_size, seed=self.seed, start=self.images_seen, flip=self.flip,
            device=self.accelerator.device, rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )  # fmt: skip
        with checkpoints.deferred_interrupt() as interrupted:
            while self.step < self.total_steps:
                meter.add(*self._optimise(next(stream)))
                done = self.step == self.total_steps
                stopping = done or interrupted.is_set()
                logging = self.step % self.log_every == 0 or stopping
                saving = self.step % save_every == 0 or stopping
                if logging or saving:
                    self._check(meter)
                if saving:
                    self.save()
                if logging:
                    try:
                        yield self._log(meter)
                    except GeneratorExit:
                        self.save()
                        raise
                    meter = Meter()
                if stopping and not done:
                    raise KeyboardInterrupt
        self._save_pipeline()

    def _optimise(self, images: Tensor) -> tuple[Loss, Tensor]:
        """One optimiser step on this process's share of the batch; its loss and gradient norm, left on the device."""
        noise, t = self._draw(images)
        torch.manual_seed(derived_seed(self.seed, self.step, 1 + self.accelerator.process_index))  # dropout
        losses = []
        for part in zip(*(x.chunk(self.accumulation) for x in (images, noise, t)), strict=True):
            with self.accelerator.accumulate(self.network):
                loss = diffusion_loss(
                    self.network, self.codec, self.noise, *part,
                    weighting=self.weighting, reconstruction=self.reconstruction,
                )  # fmt: skip
                self.accelerator.backward(loss.total)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss)
        self.lr.step()
        self.ema.step(self.model.parameters())
        self.step += 1
        return Loss(*(torch.stack(values).mean(0).detach() for values in zip(*losses, strict=True))), norm

    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (b, 4^L C, h, w) and timesteps (b,) of this process's share, cut from those of the whole batch."""
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(derived_seed(self.seed, self.step))
        noise = torch.randn(self.batch_size, *self.codec.shape(*images.shape[1:]), generator=generator, device=device)
        t = torch.randint(len(self.noise.alphas_cumprod), (self.batch_size,), generator=generator, device=device)
        first = self.accelerator.process_index * len(images)
        return noise[first : first + len(images)], t[first : first + len(images)]

    def _check(self, meter: Meter) -> None:
        """Raise FloatingPointError if the loss or the gradient was not finite since the last reading."""
        loss, _, norm = meter.means()
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(
                f"got loss {loss:.3g} and gradient norm {norm:.3g} by step {self.step}, wanted finite numbers: "
                f"lower learning_rate (now {self.learning_rate:g}); the last good checkpoint is kept"
            )

    def _log(self, meter: Meter) -> Step:
        """Read the meter (all processes), append to log.jsonl."""
        loss, band_loss, norm = (self.accelerator.reduce(value, "mean") for value in meter.means())
        names = self.codec.bands()
        row = Step(
            step=self.step,
            images_seen=self.images_seen,
            loss=loss.item(),
            lr=self.lr.get_last_lr()[0],
            grad_norm=norm.item(),
            images_per_s=meter.count * self.batch_size / meter.seconds(),
            band_loss=dict(zip(names, band_loss.view(len(names), -1).mean(1).tolist(), strict=True)),
        )
        if self.accelerator.is_main_process:
            append_log(self.folder, row)
        return row

    def save(self) -> None:
        """Write the checkpoint of this step, from the main process."""
        if not self.accelerator.is_main_process:
            return
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            "weights": self.model.state_dict(),
            "ema": dict(zip(dict(self.model.named_parameters()), self.ema.shadow_params, strict=True)),
            "optimizer": {f"{i}.{key}": value for i, state in moments.items() for key, value in state.items()},
        }
        state = {"schedule": self.lr.state_dict(), "settings": self.settings(), "code": self._code()}
        checkpoints.save(self.folder / "checkpoints", self.step, tensors, state)

    @property
    def total_images(self) -> int:
        return self.total_steps * self.batch_size

    @property
    def images_seen(self) -> int:
        return self.step * self.batch_size

    def settings(self) -> dict:
        """Everything that the outcome depends on, as JSON would read it back."""
        described = {f.name: getattr(self, f.name) for f in fields(self)[4:] if f.init and f.name != "cpu"}
        described |= {"network": {"class": type(self.model).__name__, **checkpoints.public(self.model.config)}}
        described |= {
            "codec": checkpoints.public(self.codec.config),
            "images": [*self.images.shape, self._images_crc()],
        }
        return json.loads(json.dumps(described))

    def _images_crc(self) -> int:
        """A checksum of up to 256 of the images, to notice other data of the same shape."""
        some = self.images[:: max(1, len(self.images) // 256)]
        return zlib.crc32(np.ascontiguousarray(some))

    def _code(self) -> int:
        """A checksum of the source that decides what is learned."""
        names = ("wavelets", "kan", "ukan", "objective", "batches", "training")
        return zlib.crc32(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in names))

    def _resume(self) -> None:
        """Take up the newest checkpoint if its settings are ours; else set it aside.

        A finished run of other code is set aside too; an unfinished one goes on, and a note says so.
        """
        folder = self.folder / "checkpoints"
        found = checkpoints.load_latest(folder)
        changed = checkpoints.difference(found[1]["settings"], self.settings()) if found else ""
        other_code = found is not None and found[1]["code"] != self._code()
        if changed or (other_code and found[1]["step"] == self.total_steps):
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                kept = checkpoints.set_aside(folder)
                self.notes.append(
                    f"changed since the earlier run: {changed or 'the code'}; starting anew, that run is in {kept.name}"
                )
        elif found:
            self._load(*found)
            self.notes.append(
                f"resumed at step {self.step} of {self.total_steps}" + ", with code that has changed" * other_code
            )
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            cut_log(self.folder, self.step)

    def _load(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        self.step = state["step"]
        self.model.load_state_dict(tensors["weights"])
        for shadow, (name, _) in zip(self.ema.shadow_params, self.model.named_parameters(), strict=True):
            shadow.copy_(tensors["ema"][name])
        self.ema.optimization_step = self.step
        optimizer = self.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors["optimizer"].items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
        self.lr.load_state_dict(state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.lr.get_last_lr(), strict=True):
            group["lr"] = rate

    def _save_pipeline(self) -> None:
        """The averaged weights as a pipeline folder, written aside and renamed."""
        if not self.accelerator.is_main_process:
            return
        averaged = type(self.model).from_config(self.model.config).to(self.accelerator.device)
        self.ema.copy_to(averaged.parameters())
        solver = build_solver("ddim", self.prediction_type, spacing="trailing", clip=self.codec.limit.item())
        with checkpoints.written_aside(self.folder / "pipeline") as aside:
            WaveletPipeline(averaged.eval(), solver, self.codec).save_pretrained(aside)


def resolve_precision(precision: str, cpu: bool = False) -> str:
    """accelerate's name of the precision; "auto" is bf16 where a GPU has it, else "no"."""
    wanted = ("auto", "no", "fp16", "bf16")
    if precision not in wanted:
        raise ValueError(f"got precision={precision!r}, wanted one of {', '.join(wanted)}: choose one of them")
    if precision != "auto":
        return precision
    return "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def derived_seed(*key: int) -> int:
    """An independent seed for every key, such as (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
