"""Training as a generator of `Step`: a network, the average of its weights and its optimiser, in the run's own folder.

All randomness is a function of (seed, step), which validation, previews and measures leave alone: resuming is exact.
Lengths are counted in images (kimg: thousands). Batches are global: N processes share one batch.
"""

import atexit
import json
import math
import time
import zlib
from collections.abc import Callable, Generator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch import Tensor

from wddm import checkpoints, steps
from wddm.data import batches, to_batch
from wddm.files import append_row, written_aside
from wddm.objective import build_solver, check_training, default_solver, diffusion_loss, noise_scheduler
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images
from wddm.steps import LABELS, POWERS, Step
from wddm.wavelets import WaveletCodec

# settings that may change between starts of a run: no weight depends on them, or `settings` describes them otherwise
FREE = {
    "cpu", "extend", "restart", "checkpoint_kimg", "preview_kimg", "gradient_checkpointing", "measure", "metric_kimg",
    "metric_images", "data_sha256", "model", "codec", "images", "folder", "labels", "label_dropout", "class_names",
    "on_step", "averages_kimg",
}  # fmt: skip


@dataclass(kw_only=True)
class Trainer:
    """One training run in `folder`: checkpoints/, log.jsonl, previews/ and, in the end, pipeline/ with the averaged
    weights and training.json, which says what they were trained on, how, and for how many images.

    Constructed again with the same settings, it goes on exactly where it was stopped; with other settings, or while
    another process trains there, it raises a ValueError. `notes` are lines that the user should see.
    """

    model: ModelMixin
    codec: WaveletCodec
    images: np.ndarray  # uint8 (N, H, W, C)
    folder: Path  # or a string
    labels: np.ndarray | None = None  # (N,), for a network with class embeddings, the last of which is "no label"
    class_names: list[str] | None = None  # of the labels, stored in the pipeline
    label_dropout: float = 0.1  # share of labels replaced by "no label"
    data_sha256: str | None = None  # identifies the images; None: a checksum of some of them does
    train_kimg: float = 72.0  # length of the training
    batch_size: int = 96  # images per optimiser step, over all processes and micro-batches
    accumulation: int = 1  # micro-batches per optimiser step
    flip: bool = False  # mirror half of the images, at random
    prediction_type: str = "sample"  # this and the next three: see objective.py
    time_sampling: str = "uniform"
    weighting: str = "min_snr"
    reconstruction: float = 0.0
    learning_rate: float = 2e-3  # of AdamW, after the warm-up
    schedule: str = "constant_with_warmup"  # one of SCHEDULES; cosine ends at zero
    warmup_kimg: float = 5.0
    weight_decay: float = 0.01
    ema_half_life_kimg: float = 10.0  # of a weight's share in the average, 8 % of the images seen at most; 0: off
    averages_kimg: float = 0.0  # between averages that are kept for `steps.averaged_weights`; 0: none
    seed: int = 0
    precision: str = "auto"  # "no", "fp16", "bf16", or "auto": bf16 where a GPU has it, else "no"
    compile: bool = False
    gradient_checkpointing: bool = False  # compute activations again in the backward pass, where memory is short
    cpu: bool = False  # stay off a GPU that is there
    log_every: int = 20  # steps between two `Step`s, besides those after 1, 2, 4 and 8
    checkpoint_kimg: float = 40.0  # thousand images between checkpoints; here and below 0 is never
    validation_kimg: float = 0.0  # between losses on held-out images; checkpoints/best has the lowest
    validation_images: int = 256  # how many are held out, where there is such a loss
    preview_kimg: float = 20.0  # between pictures of samples in previews/
    metric_kimg: float = 0.0  # between calls of `measure`
    metric_images: int = 512  # samples that `measure` is given
    on_step: Callable[[int], object] = lambda images_seen: None  # called after every step
    measure: Callable[[np.ndarray], dict[str, float]] | None = None  # distances of samples, uint8 (N, H, W, C)
    measured: str = ""  # what `measure` computes; it stays the same in one log
    extend: bool = False  # go on with a run that differs only by a smaller train_kimg
    restart: bool = False  # set the checkpoints of a finished run of other settings aside, and begin anew

    def __post_init__(self) -> None:
        check_training(self.prediction_type, self.weighting, self.time_sampling)
        self.notes, self.history = steps.checked(**vars(self)), list[str]()  # changes of code, extensions
        self.held_out = steps.held_out(self.validation_images if self.validation_kimg else None, len(self.images))
        self.trained = np.delete(np.arange(len(self.images)), self.held_out)  # rows of `images`
        self.no_label = (self.model.config.get("num_class_embeds") or 0) - 1
        self.classes = steps.class_numbers(self.labels, self.no_label, len(self.images))
        self.accelerator = steps.accelerator(self.precision, self.cpu)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        atexit.register(self.accelerator.state.destroy_process_group)  # not before: another training may follow
        steps.check_batch(self.batch_size, self.accumulation, self.world_size)
        self.total_steps = math.ceil(self.train_kimg * 1000 / self.batch_size)
        steps.tune(self.model, self.device, self.gradient_checkpointing)
        self.codec.to(self.device)
        self.parameters = [p for p in self.model.train().parameters() if p.requires_grad]
        ours = torch.optim.AdamW(self.parameters, weight_decay=self.weight_decay, fused=True)
        warmup = {"num_warmup_steps": math.ceil(self.warmup_kimg * 1000 / self.batch_size)}
        (self.share,) = get_scheduler(self.schedule, ours, **warmup, num_training_steps=self.total_steps).lr_lambdas
        self.network, theirs = self.accelerator.prepare(torch.compile(self.model) if self.compile else self.model, ours)
        self.optimizer = ours if self.accelerator.scaler is None else theirs  # fp16 alone needs accelerate's
        self.decay = 0.5 ** (1 / (self.ema_half_life_kimg * 1000 / self.batch_size)) if self.ema_half_life_kimg else 0.0
        self.weights: list[Tensor] = list(self.model.parameters())  # listed once, as it takes time in small networks
        self.average = deepcopy(self.model).eval().requires_grad_(False)  # a network of the averaged weights
        copies = (deepcopy(self.average) for _ in POWERS if self.averages_kimg)
        self.averages = [dict(one.named_parameters()) for one in (self.average, *copies)]
        self.noise_scheduler = noise_scheduler(self.prediction_type)
        shape, times = self.codec.shape(*np.roll(self.images.shape[1:], 1).tolist()), self.noise_scheduler.timesteps
        self.drawn = partial(steps.draw_noise, times.flip(0).to(self.device), self.time_sampling, shape)
        self.loss = partial(diffusion_loss, weighting=self.weighting, reconstruction=self.reconstruction)
        self.step, self.watched = 0, True  # the last step, and whether all that is due after it is done
        self.best: float | None = None  # the lowest loss on the held-out images
        self.unread: list[tuple[Tensor, ...]] = []  # what `optimise` gave in every step since the last `Step`
        self.folder = Path(self.folder).expanduser()
        self.stop = checkpoints.Stop(alone=self.world_size == 1)
        with ExitStack() as held:  # the folder is released if something is refused
            if self.main:
                held.enter_context(checkpoints.reserved(self.folder))
            if found := checkpoints.take_up(self.folder, self.settings(), self.notes, self.extend, self.restart):
                self.load_state_dict(*found)
            if self.main:
                steps.forget_after(self.folder, self.step, self.images_seen)
            self.held = held.pop_all()

    def steps(self) -> Generator[Step]:
        """Train to the end, yielding a `Step` every `log_every` steps and some early ones; then write pipeline/.

        Ctrl-C or SIGTERM saves a checkpoint of the last whole step and raises `checkpoints.Interrupted`, at once; what
        else was due is done when the run goes on. FloatingPointError, OSError (disk full): the last checkpoint stays.
        """
        stream = batches(
            self.images, self.batch_size, seed=self.seed, start=self.images_seen, device=self.device, flip=self.flip,
            rank=self.rank, world_size=self.world_size, rows=self.trained, labels=self.classes,
        )  # fmt: skip
        with self.held, self.stop:
            self.model.zero_grad()  # left by a step that was stopped
            clock = self.step, time.perf_counter()
            try:
                while self.step < self.total_steps or not self.watched:
                    if self.watched:
                        batch = next(stream)
                        self.unread.append(self.optimise(*([batch] if self.classes is None else batch)))
                        self.step, self.watched = self.step + 1, False
                        self.on_step(self.images_seen)
                    if self.step % self.log_every == 0 and any(gather_object([self.stop.is_set()])):  # of all processes
                        raise KeyboardInterrupt
                    row = self._watch(clock)
                    self.watched = True
                    if self._due(self.checkpoint_kimg) or self.step == self.total_steps:
                        self.save()
                    if row:
                        yield row
                        clock = self.step, time.perf_counter()  # without the caller's time
                if self.main:
                    with self.stop.cuttable(), written_aside(self.folder / "pipeline") as aside:
                        self.averaged().save_pretrained(aside)
                        own = {name: getattr(self, name) for name in ("images_seen", "data_sha256", "history")}
                        (aside / "training.json").write_text(json.dumps(own | {"settings": self.settings()}, indent=1))
                self.network = self.model  # what averages gradients must not outlive the processes' group: it may hang
                self.accelerator.free_memory()
            except (GeneratorExit, KeyboardInterrupt) as error:
                self.save()
                if isinstance(error, GeneratorExit):
                    raise
                raise checkpoints.Interrupted(self.folder, self.step, self.total_steps) from None

    def _due(self, kimg: float) -> bool:
        """Whether what is done every `kimg` thousand images (0: never), and at the end, is due at this step."""
        every = max(1, round(kimg * 1000 / self.batch_size))
        return bool(kimg) and (self.step == self.total_steps or self.step % every == 0)

    def optimise(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """One optimiser step on this process's share of a batch, images (b, C, H, W) and labels (b,);
        weights change at its end. Returns loss, squared error per channel (4^L C,), gradient norm: reading them waits.
        """
        losses, parts = [], [images, *self.draw_noise()]
        if labels is not None:
            drawn = np.random.default_rng((self.seed, self.step, LABELS)).random((self.world_size, len(labels)))
            dropped = torch.from_numpy(drawn[self.rank] < self.label_dropout).to(self.device)
            parts.append(labels.masked_fill(dropped, self.no_label))
        dropout = torch.default_generator if self.device.type == "cpu" else torch.get_device_module(self.device)
        dropout.manual_seed(steps.derived_seed(self.seed, self.step, 1 + self.rank))  # torch's own takes 0.3 ms
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.accelerator.step, self.accelerator.gradient_accumulation_steps = 0, self.accumulation  # not another's
        with self.stop.cuttable():
            for x, eps, at, *classes in zip(*(part.chunk(self.accumulation) for part in parts), strict=True):
                network = steps.conditioned(self.network, *classes)
                with self.accelerator.accumulate(self.network):
                    losses.append(self.loss(network, self.codec, self.noise_scheduler, x, eps, at))
                    self.accelerator.backward(losses[-1].total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        if self.accelerator.scaler is not None:  # fp16: a step whose gradients overflow is left out, not wrong
            norm = norm.nan_to_num(0, 0, 0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        steps.average(self.averages, self.weights, self.step, self.decay)
        total, per_channel = (torch.stack(values).mean(0).detach() for values in zip(*losses, strict=True))
        return total, per_channel, norm

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.learning_rate * self.share(self.step)

    @property
    def images_seen(self) -> int:
        return int(self.step * self.batch_size)

    def draw_noise(self) -> tuple[Tensor, ...]:
        """Noise (b, 4^L C, h, w) and timesteps (b,) of this process's share, cut from those of the whole batch."""
        generator = torch.Generator(self.device).manual_seed(steps.derived_seed(self.seed, self.step))
        return tuple(x.chunk(self.world_size)[self.rank] for x in self.drawn([generator], self.batch_size))

    def averaged(self) -> WaveletPipeline:
        """A pipeline of the averaged weights, with the default solver for their prediction type."""
        solver = build_solver(default_solver(self.prediction_type), self.prediction_type, codec=self.codec)
        return WaveletPipeline(self.average, solver, self.codec, self.class_names)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the averaged weights on the held-out images, with the same noise each time; saves the best."""
        total = 0.0
        with self.stop.cuttable():
            for start in range(0, len(self.held_out), self.batch_size):
                rows = self.held_out[start : start + self.batch_size]
                images = to_batch(self.images[rows], np.zeros(len(rows), bool), self.device)
                classes = [] if self.classes is None else [torch.from_numpy(self.classes[rows]).to(self.device)]
                generators = [torch.Generator().manual_seed(start + k) for k in range(len(rows))]
                network, drawn = steps.conditioned(self.average, *classes), self.drawn(generators, 1)
                loss = self.loss(network, self.codec, self.noise_scheduler, images, *drawn)
                total += loss.total.item() * len(rows) / len(self.held_out)
        if self.best is None or total < self.best:
            self.best = total
            self.save("best")
        return total

    def samples(self, count: int) -> np.ndarray:
        """Samples of the averaged weights, uint8 (count, H, W, C): 25 solver steps, classes in turn, the same seeds."""
        pipeline = self.averaged()
        pipeline.set_progress_bar_config(disable=True)
        with self.stop.cuttable():
            return np.concatenate(list(sample_images(pipeline, count, num_inference_steps=25)))

    def _watch(self, clock: tuple[int, float]) -> Step | None:
        """Do what is due at this step but the checkpoint: preview, average, validation, measures; a `Step`, if due."""
        images_per_s = self.batch_size * (self.step - clock[0]) / (time.perf_counter() - clock[1])
        validating, measuring, previewing = map(self._due, (self.validation_kimg, self.metric_kimg, self.preview_kimg))
        logs = validating or measuring or self.step % self.log_every == 0 or self.step in (1, 2, 4, 8, self.total_steps)
        if logs or previewing:
            steps.check_finite(self.unread, self.step, self.learning_rate)
        if previewing and self.main:
            steps.write_preview(self.samples(32), self.folder / "previews" / f"{self.images_seen:09d}.png")
        if self._due(self.averages_kimg) and self.main:
            steps.keep_averages(self.folder, self.images_seen, self.averages[1:])
        if not logs:
            return None
        validation_loss, distances = self.validate() if validating and self.main else None, dict[str, float]()
        if measuring and self.main and self.measure:
            samples = self.samples(self.metric_images)
            with self.stop.cuttable():
                distances = {key: float(x) for key, x in self.measure(samples).items() if x is not None}
        means = (torch.stack(values).mean(0) for values in zip(*self.unread, strict=True))
        loss, errors, grad_norm = (self.accelerator.reduce(mean, "mean") for mean in means)
        by_band = dict(zip(self.codec.bands(), errors.view(-1, self.images.shape[-1]).mean(1).tolist(), strict=True))
        row = Step(
            self.step, self.images_seen, loss.item(), self.lr, grad_norm.item(), images_per_s,
            steps.peak_memory_gb(self.device), by_band, validation_loss, distances,
        )  # fmt: skip
        if self.main:
            append_row(self.folder / "log.jsonl", row.logged())
        self.unread = []
        return row

    def save(self, name: str | None = None) -> None:
        """Write the checkpoint of this step, under `name` if there is one, from the main process."""
        steps.check_finite(self.unread, self.step, self.learning_rate)
        if self.main:
            checkpoints.save(self.folder / "checkpoints", self.step, *self.state_dict(), name)

    def state_dict(self) -> tuple[checkpoints.Tensors, dict[str, Any]]:
        """What `load_state_dict` restores: tensors, and everything else as JSON values."""
        return {
            "weights": self.model.state_dict(),
            "ema": self.averages[0],
            "averages": steps.flattened(enumerate(self.averages[1:])),
            "optimizer": steps.flattened(self.optimizer.state_dict()["state"].items()),
            "unread": {str(i): torch.stack(values) for i, values in enumerate(zip(*self.unread, strict=True))},
        }, {"best": self.best, "watched": self.watched, "history": self.history, "settings": self.settings()}

    def load_state_dict(self, tensors: checkpoints.Tensors, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, and `state["step"]`, which a checkpoint adds."""
        self.step, self.best, self.watched, self.history = (state[x] for x in ("step", "best", "watched", "history"))
        self.model.load_state_dict(tensors["weights"])
        kept = [tensors["ema"], *steps.unflattened(tensors.get("averages", {})).values()]
        if len(kept) < len(self.averages):
            raise ValueError("got averages_kimg for a run that began without, wanted 0: set it back, or name a new run")
        for average, was in zip(self.averages, kept, strict=False):
            for name, tensor in average.items():
                tensor.copy_(was[name])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": steps.unflattened(tensors["optimizer"])})
        columns = [tensors["unread"][str(i)].to(self.device) for i in range(len(tensors["unread"]))]
        self.unread = list(zip(*columns, strict=True))

    def settings(self) -> dict[str, Any]:
        """Everything that the outcome depends on, in the form in which JSON reads it back."""
        some = self.images[:: max(1, len(self.images) // 256)]
        described = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE} | {
            "network": {"class": type(self.model).__name__, **checkpoints.public(self.model.config)},
            "codec": checkpoints.public(self.codec.config),
            "images": [*self.images.shape, self.data_sha256 or zlib.crc32(some.tobytes())],
            "layout": checkpoints.LAYOUT,
            "labels": None if self.classes is None else [self.label_dropout, zlib.crc32(self.classes.tobytes())],
        }
        return json.loads(json.dumps(described, default=lambda number: number.item()))
