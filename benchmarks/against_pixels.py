"""against_pixels: networks at every wavelet level against networks on pixels, counted and measured side by side.

`entries` lists the networks, `measure` adds what they took; `costs` has a row per network, `speedups` a row per network
on wavelets, network on pixels, and kind of work.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks import profiling
from benchmarks.matched import matched
from benchmarks.profiling import Maker, Measurement
from benchmarks.workloads import Network, Row, on_paper, sampling, training
from wddm.backbones import PASSES, PRESETS, forward_flops, preset_sizes

WAVELETS, PRESET = "wavelets", "pixels, preset"
SAME, MATCHED = "pixels, same network", "pixels, equal parameters"


class Entry(NamedTuple):
    """A network, what it costs on paper, and what every kind of work took."""

    name: str
    level: int
    network: Network
    parameters: int
    flops: int  # of a forward pass, batch 1
    measured: dict[str, Measurement]


def entries(kind: str, dataset: str, levels: Sequence[int], attention_head_dim: int) -> list[Entry]:
    """The presets of a data set at `levels`, where there are any, and for each above level 0 its two equals on pixels.

    "Same network": the same widths and attention on pixels; it differs in its first and last convolution alone.
    "Equal parameters": the preset on pixels, its widths scaled by one factor.
    """
    networks: dict[tuple[str, int], Network] = {}
    for level in (level for level in levels if (dataset, level) in PRESETS):
        network = {"backbone": kind, "dataset": dataset, "level": level, "attention_head_dim": attention_head_dim}
        if level == 0:
            networks[PRESET, 0] = network
            continue
        same = preset_sizes(kind, dataset, level)
        same["widths"] = same.pop("block_out_channels")
        networks[WAVELETS, level] = network
        networks[SAME, level], networks[MATCHED, level] = network | {"level": 0} | same, matched(network)
    models = {key: on_paper(network) for key, network in networks.items()}
    counted = {key: (model.num_parameters(), forward_flops(model)) for key, model in models.items()}
    return [Entry(*key, network, *counted[key], {}) for key, network in networks.items()]


def measure(
    found: Sequence[Entry],
    *,
    rate: float,
    batch_size: int,
    sampling_steps: int = 10,
    precision: str = "auto",
    compile: bool = False,
    rounds: int = 5,
    max_seconds: float = 10.0,
) -> list[Entry]:
    """The entries with measurements of training steps and of batches of samples, each kind of all entries in turn.

    Args:
        rate: FLOP/s that the machine reaches at most; what would take over `max_seconds` even at this rate is not run.
        batch_size: images a step; halved for all entries as long as that takes too long or too much memory.
        max_seconds: the longest training step, or batch of samples, that is measured.
    """
    train = partial(training, precision=precision, compile=compile)
    sample = partial(sampling, sampling_steps=sampling_steps, precision=precision, compile=compile)
    works: dict[str, tuple[Maker, int]] = {"training": (train, PASSES), "sampling": (sample, sampling_steps)}
    largest = max((entry.flops for entry in found), default=0)
    batch_size = profiling.fitting_batch(PASSES * largest, rate, batch_size, max_seconds)
    for work, (make, passes) in works.items():
        makers = {k: partial(make, entry.network) for k, entry in enumerate(found)}
        bounds = {k: passes * entry.flops / rate for k, entry in enumerate(found)}
        taken = profiling.compare(makers, batch_size=batch_size, bounds=bounds, rounds=rounds, max_seconds=max_seconds)
        found = [entry._replace(measured=entry.measured | {work: taken[k]}) for k, entry in enumerate(found)]
        batch_size = min((one.batch_size for one in taken.values()), default=batch_size)
    return list(found)


def costs(found: Iterable[Entry]) -> list[Row]:
    """A row per network: what it is, counted and measured; None, and the reason, where it was not run."""
    rows = []
    for entry in found:
        row = {"dataset": entry.network["dataset"], "kind": entry.network["backbone"], "level": entry.level}
        row |= {"network": entry.name, "parameters": entry.parameters, "forward_gflop": entry.flops / 1e9}
        for work, one in entry.measured.items():
            rate = f"{work}_images_per_s"
            row |= dict(zip((rate, f"{rate}_q1", f"{rate}_q3"), profiling.speed(one), strict=True))
            row |= {f"{work}_memory_gib": one.memory_gib, f"{work}_not_run": one.reason}
            row[f"{work}_batch_size"] = one.batch_size
        rows.append(row)
    return rows


def speedups(found: Sequence[Entry]) -> list[Row]:
    """A row per network on wavelets, network on pixels that it is compared with, and kind of work.

    The FLOP ratio is what the speed-up would be if every operation took as long.
    """
    return [
        {"dataset": entry.network["dataset"], "kind": entry.network["backbone"], "level": entry.level}
        | {"over": other.name, "work": work, "flop_ratio": other.flops / entry.flops}
        | dict(zip(("speedup", "low", "high"), profiling.times_as_fast(one, other.measured[work]), strict=True))
        for entry in found
        if entry.name == WAVELETS
        for other in found
        if other.name == PRESET or (other.name != WAVELETS and other.level == entry.level)
        for work, one in entry.measured.items()
    ]


def cost_table(rows: Sequence[Row]) -> list[Row]:
    """The rows of `costs`, as a report shows them."""
    table = []
    for row in rows:
        shown = {"level": row["level"], "network": row["network"]}
        shown |= {"params (M)": row["parameters"] / 1e6, "GFLOP": row["forward_gflop"]}
        for work in ("training", "sampling"):
            reason, rate = row[f"{work}_not_run"], f"{work}_images_per_s"
            speed = profiling.spread(row[rate], row[f"{rate}_q1"], row[f"{rate}_q3"])
            shown[f"{work} (images/s)"] = f"not run: {reason}" if reason else speed
        table.append(shown | {"GiB": row["training_memory_gib"]})
    return table


def speedup_table(rows: Sequence[Row]) -> list[Row]:
    """The rows of `speedups` that were measured, as a report shows them."""
    return [
        {"level": row["level"], "over": row["over"], "work": row["work"], "FLOP ratio": row["flop_ratio"]}
        | {"times as fast (90 % interval)": profiling.spread(row["speedup"], row["low"], row["high"])}
        for row in rows
        if row["speedup"] is not None
    ]


def claim_table(rows: Sequence[Row], level: int, wanted: float) -> list[Row]:
    """A row per pixel network: the range of training speed-ups over it at a level, of all data sets and kinds measured.

    "Not ruled out": how many of their intervals reach the speed-up `wanted`.
    """
    table = []
    for over in (PRESET, SAME, MATCHED):
        asked = [row for row in rows if (row["level"], row["over"], row["work"]) == (level, over, "training")]
        found = [row for row in asked if row["speedup"] is not None]
        row = {"over": over, "presets measured": f"{len(found)} of {len(asked)}"}
        for title, name in (("times as fast", "speedup"), ("FLOP ratios", "flop_ratio")):
            numbers = [one[name] for one in found]
            row[title] = f"{min(numbers):.3g} to {max(numbers):.3g}" if numbers else "not run"
        possible = sum(one["high"] >= wanted for one in found)
        table.append(row | {f"{wanted:g}-fold not ruled out": f"{possible} of {len(found)}"})
    return table
