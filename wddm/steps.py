"""What training reports: `Step`, the meter it is read from, and log.jsonl, one `Step` a line."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from wddm.files import append_row, read_rows, whole
from wddm.objective import Loss

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
    fwd: float | None = None  # of samples against the training images, where it was measured at this step

    def curves(self) -> dict[str, float]:
        """What is drawn over `images_seen`, by name, as TensorBoard takes it."""
        row = asdict(self)
        bands = row.pop("band_loss")
        values = row | {f"band/{name}": loss for name, loss in bands.items()}
        return {name: value for name, value in values.items() if value is not None}


class Meter:
    """Sums of losses and gradient norms, kept on the device, and the time, since the last reading."""

    def __init__(self) -> None:
        self.count, self.timed, self.started = 0, 0, time.perf_counter()
        self.sums: tuple[Tensor, ...] = ()
        self._bad: tuple[Tensor, Tensor] | None = None  # the first step that was not finite, or -1, and its norms

    def add(self, step: int, loss: Loss, norm: Tensor, norms: Tensor) -> None:
        """Losses, gradient norm and its parts (P,), one for every parameter, of a step; read back only when asked."""
        values = (loss.total, loss.per_channel, norm)
        self.sums = tuple(a + b for a, b in zip(self.sums, values, strict=True)) if self.sums else values
        self.count, self.timed = self.count + 1, self.timed + 1
        here = torch.where(loss.total.isfinite() & norm.isfinite(), -1, step)
        if self._bad is None:
            self._bad = (here, norms)
        else:
            fine_so_far = self._bad[0] < 0
            self._bad = torch.where(fine_so_far, here, self._bad[0]), torch.where(fine_so_far, norms, self._bad[1])

    def means(self) -> tuple[Tensor, ...]:
        return tuple(value / self.count for value in self.sums)

    def first_bad(self) -> tuple[int, int | None] | None:
        """The first step whose loss or gradient was not finite, and the first parameter whose gradient was not."""
        if self._bad is None or (step := int(self._bad[0])) < 0:
            return None
        parameters = (~self._bad[1].isfinite()).nonzero()
        return step, int(parameters[0]) if len(parameters) else None

    def resume(self) -> None:
        """Begin to count time: what the caller did since the last reading is not training."""
        self.timed, self.started = 0, time.perf_counter()

    def rate(self) -> float:
        """Steps a second in this process."""
        return self.timed / (time.perf_counter() - self.started)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, so that the next `Step` is what it would have been."""
        return {"count": torch.tensor(self.count)} | {str(i): value for i, value in enumerate(self.sums)}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.count = int(state["count"])
        self.sums = tuple(state[str(i)].to(device) for i in range(len(state) - 1))


def peak_memory_gb(device: torch.device) -> float:
    """Of a CUDA device since the start, in GiB; of this process where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def append_log(folder: Path, row: Step) -> None:
    append_row(Path(folder) / "log.jsonl", asdict(row))


def cut_log(folder: Path, last_step: int) -> None:
    """Forget what came after `last_step`, where a run is taken up again."""
    rows = [row for row in read_log(folder) if row["step"] <= last_step]
    with whole(Path(folder) / "log.jsonl") as log:
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_log(folder: Path) -> list[dict]:
    """Rows of a run's log.jsonl, one per `Step`; a last line cut short by a crash is left out."""
    return read_rows(Path(folder) / "log.jsonl")
