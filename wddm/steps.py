"""What training reports: `Step`, the meter it is read from, and log.jsonl, one `Step` a line."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from wddm.objective import Loss


@dataclass(frozen=True)
class Step:
    """Where training is. Losses and norms are means since the last `Step`; the rate leaves out the caller's time."""

    step: int
    images_seen: int
    loss: float
    lr: float
    grad_norm: float
    images_per_s: float
    band_loss: dict[str, float]  # squared error of the prediction in each band, unweighted


class Meter:
    """Sums of what `_optimise` returns, kept on the device, and the time since the last reading."""

    def __init__(self) -> None:
        self.count, self.started = 0, time.perf_counter()
        self.sums: tuple[Tensor, ...] = ()

    def add(self, loss: Loss, grad_norm: Tensor) -> None:
        values = (loss.total, loss.per_channel, grad_norm)
        self.sums = tuple(a + b for a, b in zip(self.sums, values, strict=True)) if self.sums else values
        self.count += 1

    def means(self) -> tuple[Tensor, ...]:
        return tuple(value / self.count for value in self.sums)

    def seconds(self) -> float:
        return time.perf_counter() - self.started


def append_log(folder: Path, row: Step) -> None:
    with open(Path(folder) / "log.jsonl", "a") as log:
        log.write(json.dumps(asdict(row)) + "\n")


def cut_log(folder: Path, last_step: int) -> None:
    """Forget what came after `last_step`, where a run is taken up again."""
    rows = [row for row in read_log(folder) if row["step"] <= last_step]
    (Path(folder) / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_log(folder: Path) -> list[dict]:
    """Rows of a run's log.jsonl, one per `Step`; a last line cut short by a crash is left out."""
    file = Path(folder) / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
