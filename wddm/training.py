"""Training as a generator of `Step`: the run of a Learner in a folder, logged, watched, stopped and taken up again.

All randomness is a function of (seed, step): order and flips of the images here, all else in learner.py. A checkpoint
is therefore weights, their average, optimiser, what was not yet logged and the number of steps, and resuming is exact.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid, numpy_to_pil
from torch import Tensor

from wddm import checkpoints
from wddm.data import batches
from wddm.files import append_row, read_rows, whole, written_aside
from wddm.learner import Learner, peak_memory_gb

# what no weight depends on, or settings describe in another way: may change from one start of a run to the next
FREE = {"cpu", "extend", "restart", "checkpoint_kimg", "preview_kimg", "tensorboard", "gradient_checkpointing"}
FREE |= {"measure", "fwd_kimg", "fwd_images", "data_sha256", "model", "codec", "images", "folder", "notes"}
VARYING = ("images_per_s", "memory_gb")  # of a Step; all else is the same whenever the settings are
PREVIEWED, COLUMNS = 32, 16  # samples in a preview, and in a row of it


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

    def curves(self) -> dict[str, float]:
        """What is drawn over `images_seen`, by name, as TensorBoard takes it."""
        row = asdict(self)
        bands = row.pop("band_loss")
        values = row | {f"band/{name}": loss for name, loss in bands.items()}
        return {name: value for name, value in values.items() if value is not None}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's log.jsonl, one per `Step`; a last line cut short by a crash is left out."""
    return read_rows(Path(folder) / "log.jsonl")


@dataclass(kw_only=True)
class Trainer(Learner):
    """One training run in `folder`: checkpoints/, log.jsonl, previews/ and, in the end, pipeline/ with the averaged
    weights and training.json, which says what they were trained on, how, and for how many images.

    Made again with the same settings, it goes on where it was stopped, exactly; with others, it refuses and says what
    has changed. `notes` holds what the caller should be told.

    Raises:
        ValueError: checkpoints of other settings are there, another process trains there, or an option is not known.
    """

    images: np.ndarray  # uint8 (N, H, W, C)
    folder: Path
    flip: bool = False  # mirror half of the images, at random
    log_every: int = 20  # steps between two `Step`s
    checkpoint_kimg: float = 40.0  # thousand images between checkpoints; these here and below: 0 is never
    validation_kimg: float = 0.0  # between losses on held-out images; where it was lowest is checkpoints/best
    validation_images: int = 256  # how many are held out, where there is such a loss
    preview_kimg: float = 40.0  # between pictures of samples in previews/
    fwd_kimg: float = 0.0  # between calls of `measure`
    fwd_images: int = 512
    measure: Callable[[np.ndarray], float] | None = None  # of `fwd_images` samples, uint8 (N, H, W, C); logged as `fwd`
    tensorboard: bool = False  # write log and previews to folder/tensorboard, too
    data_sha256: str | None = None  # identifies the images, in place of a checksum of some of them
    extend: bool = False  # go on with a run of the same settings but for a smaller train_kimg
    restart: bool = False  # set the checkpoints of a finished run of other settings aside, and begin anew
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.fwd_kimg and self.measure is None:
            raise ValueError(f"got fwd_kimg={self.fwd_kimg:g} without measure, wanted a function of samples: give both")
        self.trained, self.held_out = self.images, self.images[:0]
        if self.validation_kimg:
            self.trained, self.held_out = hold_out(self.images, self.validation_images)
        super().__post_init__()
        self.unread: list[tuple[Tensor, ...]] = []  # what `optimise` gave in every step since the last `Step`
        self.best: float | None = None  # the lowest loss on the held-out images
        with ExitStack() as held:  # let go if something is refused
            if self.accelerator.is_main_process:
                held.enter_context(checkpoints.reserved(self.folder))
            self._take_up()
            self.held = held.pop_all()
        self.writer = None
        if self.tensorboard and self.accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds that few want to spend

            self.writer = SummaryWriter(self.folder / "tensorboard")

    def steps(self) -> Iterator[Step]:
        """Train to the end, a `Step` every `log_every` steps; then the pipeline is saved.

        Raises:
            FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
            OSError: a checkpoint could not be written; the last good one stays.
            KeyboardInterrupt: once the current step is finished and a checkpoint of it written.
        """
        stream = batches(
            self.trained, self.batch_size, seed=self.seed, start=self.images_seen, flip=self.flip,
            device=self.device, rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        with self.held:
            with checkpoints.deferred_interrupt() as interrupted:
                self._start_clock()
                while self.step < self.total_steps:
                    self.unread.append(self.optimise(next(stream)))
                    self.step += 1
                    done = self.step == self.total_steps
                    logging = self.step % self.log_every == 0 or done
                    stopping = done or self._agreed(interrupted.is_set(), logging)
                    saving = stopping or self._due(self.checkpoint_kimg)
                    validating, measuring = self._due(self.validation_kimg), self._due(self.fwd_kimg)
                    previewing = self._due(self.preview_kimg)
                    if logging or saving or validating or measuring or previewing:
                        self._check()
                    row = self._log(validating, measuring) if logging or validating or measuring else None
                    if saving:
                        self.save()
                    if previewing:
                        self._preview()
                    if row:
                        try:
                            yield row
                        except GeneratorExit:
                            self.save()
                            raise
                        self._start_clock()
                    if stopping and not done:
                        raise KeyboardInterrupt
            self._finish()

    def _start_clock(self) -> None:
        """Begin to measure speed: what the caller did since the last `Step` is no training."""
        self.clock = self.step, time.perf_counter()

    def _due(self, kimg: float) -> bool:
        """Whether something that happens every so many thousand images, and at the end, happens at this step."""
        every = max(1, round(kimg * 1000 / self.batch_size))
        return bool(kimg) and (self.step % every == 0 or self.step == self.total_steps)

    def _agreed(self, interrupted: bool, asking: bool) -> bool:
        """Whether any process was interrupted; several ask each other only now and then, and stop together."""
        if self.world_size == 1:
            return interrupted
        told = torch.tensor(float(interrupted), device=self.device)
        return asking and bool(self.accelerator.reduce(told, "sum"))

    def _check(self) -> None:
        """Raise FloatingPointError if a loss or gradient was not finite since the last `Step`."""
        total, _, norm, norms = (torch.stack(values) for values in zip(*self.unread, strict=True))
        bad = (~(total.isfinite() & norm.isfinite())).nonzero()
        if not len(bad):
            return
        first = int(bad[0])
        step, parameters = self.step - len(total) + 1 + first, (~norms[first].isfinite()).nonzero()
        where = f"the gradient of {list(self.parameters)[int(parameters[0])]}" if len(parameters) else "the loss"
        raise FloatingPointError(
            f"got numbers that are not finite in {where} at step {step}, wanted finite ones: lower learning_rate "
            f"(now {self.learning_rate:g}); the last good checkpoint is kept"
        )

    def _log(self, validating: bool, measuring: bool) -> Step:
        """What is unread, over all processes, and what else is due, as a `Step` and a row of log.jsonl."""
        first, started = self.clock
        steps_per_s = (self.step - first) / (time.perf_counter() - started)  # before what is no training
        total, per_channel, norm, _ = (torch.stack(values).mean(0) for values in zip(*self.unread, strict=True))
        loss, band_loss, grad_norm = (self.accelerator.reduce(x, "mean") for x in (total, per_channel, norm))
        self.unread = []
        names = self.codec.bands()
        row = Step(
            step=self.step,
            images_seen=self.images_seen,
            loss=loss.item(),
            lr=self.lr,
            grad_norm=grad_norm.item(),
            images_per_s=steps_per_s * self.batch_size,
            memory_gb=peak_memory_gb(self.device),
            band_loss=dict(zip(names, band_loss.view(len(names), -1).mean(1).tolist(), strict=True)),
            validation_loss=self._validate() if validating else None,
            fwd=self._measured() if measuring else None,
        )
        if self.accelerator.is_main_process:
            append_row(self.folder / "log.jsonl", asdict(row))
        if self.writer:
            for name, value in row.curves().items():
                self.writer.add_scalar(name, value, row.images_seen)
        return row

    def _validate(self) -> float:
        """Loss on the held-out images; the lowest so far is kept as checkpoints/best."""
        loss = self.validation_loss(self.held_out)
        if self.best is None or loss < self.best:
            self.best = loss
            self.save("best")
        return loss

    def _measured(self) -> float:
        """What `measure` says of samples, of which every process draws its share."""
        samples = gather_object(self.samples(self.fwd_images, self.rank, self.world_size))
        return cast(Callable, self.measure)(np.concatenate(samples))

    def _preview(self) -> None:
        """Draw previews/<images seen>.png, by the main process."""
        if self.accelerator.is_main_process:
            samples = np.concatenate(self.samples(PREVIEWED))
            colors = samples[..., : 3 if samples.shape[-1] >= 3 else 1]  # of more or of two channels, the first
            grid = make_image_grid(numpy_to_pil(colors / 255), PREVIEWED // COLUMNS, COLUMNS)
            (self.folder / "previews").mkdir(exist_ok=True)
            grid.save(self.folder / "previews" / f"{self.images_seen:09d}.png")
            if self.writer:
                self.writer.add_image("samples", np.asarray(grid), self.images_seen, dataformats="HWC")

    def _finish(self) -> None:
        """Write pipeline/ with the averaged weights, and in it training.json: where they come from."""
        if self.accelerator.is_main_process:
            with self.averaged() as model, written_aside(self.folder / "pipeline") as aside:
                self.pipeline(model).save_pretrained(aside)
                counts = {"images_seen": self.images_seen, "data_sha256": self.data_sha256}
                (aside / "training.json").write_text(json.dumps({"settings": self.settings(), **counts}, indent=1))
        if self.writer:
            self.writer.close()
        self.accelerator.end_training()

    def save(self, name: str | None = None) -> None:
        """Write the checkpoint of this step (or of another name), from the main process."""
        if self.accelerator.is_main_process:
            checkpoints.save(self.folder / "checkpoints", self.step, *self.state_dict(), name)

    def state_dict(self) -> tuple[checkpoints.Tensors, dict[str, Any]]:
        """What `load_state_dict` puts back: tensors, and the rest, which JSON can hold."""
        unread = {str(i): torch.stack(values) for i, values in enumerate(zip(*self.unread, strict=True))}
        state = {"best": self.best, "lr": self.lr, "settings": self.settings(), "code": checkpoints.code()}
        return self.tensors() | {"unread": unread}, state

    def load_state_dict(self, tensors: checkpoints.Tensors, state: dict[str, Any]) -> None:
        """Put what `state_dict` gave back in its place, and `state["step"]`, which a checkpoint adds."""
        self.load_tensors(state["step"], tensors)
        self.best = state["best"]
        columns = [tensors["unread"][str(i)].to(self.device) for i in range(len(tensors["unread"]))]
        self.unread = list(zip(*columns, strict=True))

    def settings(self) -> dict[str, Any]:
        """Everything that the outcome depends on, as JSON would read it back."""
        some = np.ascontiguousarray(self.images[:: max(1, len(self.images) // 256)])
        described = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE} | {
            "network": {"class": type(self.model).__name__, **checkpoints.public(self.model.config)},
            "codec": checkpoints.public(self.codec.config),
            "images": [*self.images.shape, self.data_sha256 or zlib.crc32(some)],
        }
        return json.loads(json.dumps(described))

    def _take_up(self) -> None:
        """Go on from the newest checkpoint, or begin; refuse one of other settings, as `extend` and `restart` allow."""
        folder, now = self.folder / "checkpoints", {"settings": self.settings(), "code": checkpoints.code()}
        if found := checkpoints.load_latest(folder, self.notes):
            tensors, state = found
            if why := checkpoints.outdated(folder, state, now, extend=self.extend, restart=self.restart):
                self.accelerator.wait_for_everyone()  # to have read it
                if self.accelerator.is_main_process:
                    kept = checkpoints.set_aside(folder).name
                    self.notes.append(f"changed since the earlier run: {why}; starting anew, that run is in {kept}")
            else:
                self.load_state_dict(tensors, state)
                aside = "" if state["code"] == now["code"] else ", with code that has changed"
                self.notes.append(f"resumed at step {self.step} of {self.total_steps}{aside}")
                if (before := state["settings"]["train_kimg"]) != self.train_kimg:
                    self.notes.append(
                        f"extended from {before:g} to {self.train_kimg:g} kimg: the schedule is now that of the longer "
                        f"run, so the learning rate goes from {state['lr']:.3g} to {self.lr:.3g} at this step"
                    )
        if self.accelerator.is_main_process:
            self._forget_what_came_after()

    def _forget_what_came_after(self) -> None:
        """Cut the log and the previews to the step that the run is taken up at."""
        rows = [row for row in read_log(self.folder) if row["step"] <= self.step]
        with whole(self.folder / "log.jsonl") as log:
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for picture in (self.folder / "previews").glob("*.png"):
            if int(picture.stem) > self.images_seen:
                picture.unlink()


class Rows:
    """Some rows of images (N, H, W, C), not copied: as much of an array as `batches` asks for."""

    def __init__(self, images: np.ndarray, rows: np.ndarray) -> None:
        self.images, self.rows, self.dtype, self.ndim = images, rows, images.dtype, images.ndim
        self.shape, self.nbytes = (len(rows), *images.shape[1:]), len(rows) * images[:1].nbytes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        return self.images[self.rows[index]]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:]


def hold_out(images: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(images to train on, `count` others spread evenly over the set)."""
    if not 0 < count < len(images):
        raise ValueError(f"got validation_images={count} of {len(images)} images, wanted 1 or more, and fewer than all")
    held = np.linspace(0, len(images) - 1, count).round().astype(int)
    rest = Rows(images, np.setdiff1d(np.arange(len(images)), held))
    return cast(np.ndarray, rest), images[held]  # for `batches`, that is
