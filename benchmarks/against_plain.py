"""against_plain: ours against plain code, two at a time: how many times as fast, with an interval, in how much memory.

A row holds the speeds of both, in images (or layers) a second, with quartiles, the median ratio of paired rounds with
its 90 % interval, and the peak memory of each in a process of its own; or why there are none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import profiling, workloads
from benchmarks.profiling import Maker, fitting_batch, speed, spread, times_as_fast
from benchmarks.workloads import Network, Row, bare_training, on_paper, spline_layer, training
from wddm import data
from wddm.backbones import PASSES, PRESETS, forward_flops


def presets(datasets: Sequence[str], levels: Sequence[int], kinds: Sequence[str], attention_head_dim: int) -> list[Row]:
    """The networks of the presets that exist for these data sets, levels and kinds."""
    return [
        {"backbone": kind, "dataset": dataset, "level": level, "attention_head_dim": attention_head_dim}
        for dataset, level, kind in product(datasets, levels, kinds)
        if (dataset, level) in PRESETS
    ]


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """What our code costs and gains, every comparison under the same limits.

    Args:
        rate: FLOP/s that the machine reaches at most.
        batch_size: images of a training step; halved for both as long as one of the two runs out of memory.
        precision: of training.
        rounds, seconds: rounds in which both are timed, or more, until they have lasted so many seconds.
        max_seconds: a training step that takes longer is not timed.
    """

    rate: float
    batch_size: int = 16
    precision: str = "auto"
    rounds: int = 5
    seconds: float = 0.0
    max_seconds: float = 10.0

    def compared(self, ours: Maker, theirs: Maker, *, batch_size: int | None = None, flops: float = 0.0) -> Row:
        """The row of two makers that compute the same; `flops`: the operations that an image takes at least."""
        found = profiling.compare(
            {"ours": ours, "theirs": theirs},
            batch_size=batch_size or self.batch_size,
            bounds=dict.fromkeys(("ours", "theirs"), flops / self.rate),
            rounds=self.rounds,
            seconds=self.seconds,
            max_seconds=self.max_seconds,
        )
        row: Row = {"of": f"{found['ours'].batch_size} images"}
        for name, one in found.items():
            row |= dict(zip((f"{name}_per_s", f"{name}_per_s_q1", f"{name}_per_s_q3"), speed(one), strict=True))
            row[f"{name}_gib"] = one.memory_gib
        row |= dict(zip(("times_as_fast", "low", "high"), times_as_fast(found["ours"], found["theirs"]), strict=True))
        return row | {"not_run": next((one.reason for one in found.values() if one.reason), None)}

    def loops(self, networks: Iterable[Network], *, compiled: bool = False) -> list[Row]:
        """Our training loop against a bare one with the same network; with `compiled`, a second time, both compiled.

        The share of the machine's FLOP/s that our loop reaches counts a backward pass as two forward ones.
        """
        rows = []
        for network, compile in ((network, c) for network in networks for c in (False, True)[: 1 + compiled]):
            both, flops = (training, bare_training), training_flops(network)
            makers = (partial(make, network, precision=self.precision, compile=compile) for make in both)
            row = self.compared(*makers, flops=flops)
            share = row["ours_per_s"] and flops * row["ours_per_s"] / self.rate
            rows.append({**network, "compiled": compile, **row, "share_of_rate": share})
        return rows

    def splines(self, networks: Iterable[Network]) -> list[Row]:
        """The first spline layer of every U-KAN that has one, and a training step of the network, against recursion."""
        rows = []
        for network in (network for network in networks if network["backbone"] == "ukan"):
            model = on_paper(network)
            if model.bottleneck is None:
                continue
            side = model.config.sample_size // 2 ** len(model.config.block_out_channels)
            width, tokens = model.bottleneck.kan1.norm.normalized_shape[0], self.batch_size * side**2
            layer = partial(spline_layer, width=width, tokens=tokens)
            step = partial(bare_training, network, precision=self.precision)
            preset = {"dataset": network["dataset"], "level": network["level"]}
            row = self.compared(layer, partial(layer, recursion=True), batch_size=1)
            rows.append({**preset, "what": "layer", **row, "of": f"{width} wide, {tokens} tokens"})
            row = self.compared(step, partial(step, recursion=True), flops=training_flops(network))
            rows.append({**preset, "what": "step", **row})
        return rows

    def heads(self, networks: Iterable[Network]) -> list[Row]:
        """A training step of every UNet with its attention heads, against the published heads of 8 channels."""
        rows = []
        for network in (network for network in networks if network["backbone"] == "unet"):
            flops, both = training_flops(network), (network, {**network, "attention_head_dim": 8})
            images = fitting_batch(2 * flops, self.rate, self.batch_size, self.max_seconds)  # narrow ones take double
            makers = (partial(training, one, precision=self.precision) for one in both)
            row = self.compared(*makers, batch_size=images, flops=flops)
            rows.append({"dataset": network["dataset"], "level": network["level"], "what": "step", **row})
        return rows

    def batches(self, size: int, batch_size: int) -> list[Row]:
        """Batches of prepared images in colour, against those of a DataLoader that decodes PNGs.

        The images are crops of photographs, whose PNGs take as long to decode as those of other images.
        """
        with TemporaryDirectory() as folder:
            images = np.array(data.prepare("patches", size, Path(folder) / "data", limit=1000, progress=False).images)
        makers = (partial(make, images) for make in (workloads.prepared_batches, workloads.decoded_batches))
        row = self.compared(*makers, batch_size=batch_size)
        return [{"what": "batches", **row, "of": f"{size} x {size}, {batch_size} at a time"}]


def training_flops(network: Network) -> int:
    """Floating-point operations of a training step on one image."""
    return PASSES * forward_flops(on_paper(network))


def fixed_costs(dataset: str, resolution: int, dataset_path: str | None, limit: int | None, rounds: int) -> list[Row]:
    """Median seconds and quartiles of what is paid once: starting, running an empty notebook, preparing a data set."""
    with TemporaryDirectory() as folder:
        places = (Path(folder) / f"data-{k}" for k in count())

        def prepare() -> None:
            data.prepare(dataset, resolution, next(places), dataset_path=dataset_path, limit=limit, progress=False)

        things = workloads.commands(Path(folder)) | {f"prepare {dataset}, {limit or 'all'} images": prepare}
        seconds = profiling.time_in_turn(things, rounds=rounds, min_seconds=0)
    quartiles = {name: np.quantile(values, [0.5, 0.25, 0.75]).tolist() for name, values in seconds.items()}
    return [{"what": name} | dict(zip(("seconds", "q1", "q3"), q, strict=True)) for name, q in quartiles.items()]


def largest_batch(network: Network, *, limit_gib: float | None, precision: str = "auto", maximum: int = 4096) -> Row:
    """The largest batch, a power of two up to `maximum`, whose training step fits, and its memory; 0 if 1 does not fit.

    `limit_gib`: memory that a step may take. None, only with a GPU, whose allocator refuses gracefully: all there is.
    """
    if limit_gib is None and not torch.cuda.is_available():
        raise ValueError("got no capacity_gib and no GPU, wanted one of them: say how much memory a step may take")
    fitting, taken = 0, None
    while 2 * fitting <= maximum:
        batch_size = max(1, 2 * fitting)
        found = profiling.measure_alone(partial(training, network, batch_size=batch_size, precision=precision))
        if found.memory_gib is None or (limit_gib is not None and found.memory_gib > limit_gib):
            break
        fitting, taken = batch_size, found.memory_gib
    return {**network, "largest batch": fitting, "memory (GiB)": taken, "limit (GiB)": limit_gib}


def claim(text: str, rows: Sequence[Row], wanted: float, *, what: str | None = None, of: str = "time") -> Row:
    """Whether the smallest ratio of the rows (of those with this `what`, if given) is at least `wanted`: yes, no, or
    open, if its interval allows both.

    `of`: "time", how many times as fast ours is, or "memory", how many times as small.
    """
    rows = [row for row in rows if row["times_as_fast"] is not None and what in (None, row.get("what"))]
    if of == "time":
        ratios = [(row["times_as_fast"], row["low"], row["high"]) for row in rows]
    else:
        ratios = [(row["theirs_gib"] / row["ours_gib"],) * 3 for row in rows]
    if not ratios:
        return {"claim": text, "wanted": wanted, "measured": None, "low": None, "high": None, "met": "not run"}
    ratio, low, high = min(ratios)
    met = "yes" if low >= wanted else "no" if high < wanted else "open"
    return {"claim": text, "wanted": wanted, "measured": ratio, "low": low, "high": high, "met": met}


def comparison_table(rows: Sequence[Row]) -> list[Row]:
    """Comparisons, as a report shows them."""
    return [
        ({"preset": "{dataset} {level}".format(**row)} if "dataset" in row else {})
        | {"what": row["what"], "of": row["of"]}
        | {"ours (1/s)": row["ours_per_s"], "theirs (1/s)": row["theirs_per_s"]}
        | {"times as fast": shown(row, row["times_as_fast"], row["low"], row["high"])}
        | {"ours (GiB)": row["ours_gib"], "theirs (GiB)": row["theirs_gib"]}
        for row in rows
    ]


def loop_table(rows: Sequence[Row]) -> list[Row]:
    """Loops, as a report shows them: the network, images a second, what ours costs, memory."""
    table = []
    for row in rows:
        percent = [100 * (1 / row[end] - 1) for end in ("times_as_fast", "high", "low") if row[end] is not None]
        preset = "{dataset} {level} {backbone}".format(**row) + " compiled" * row["compiled"]
        columns = {"preset": preset, "of": row["of"]}
        columns |= {"ours (images/s)": row["ours_per_s"], "bare (images/s)": row["theirs_per_s"]}
        columns |= {"cost (%)": shown(row, *percent), "share (%)": row["share_of_rate"] and 100 * row["share_of_rate"]}
        table.append(columns | {"ours (GiB)": row["ours_gib"], "bare (GiB)": row["theirs_gib"]})
    return table


def shown(row: Row, *ends: float) -> str:
    """A number of a row with its ends, or why there is none."""
    return f"not run: {row['not_run']}" if row["not_run"] else spread(*ends)
