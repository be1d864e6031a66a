"""efficiency: networks at every wavelet level against networks on pixels, counted and measured side by side.

found = efficiency.measure("cifar10", "unet", [0, 1, 2], rate=matmul_rate())
efficiency.costs(found)        a row per network: parameters, FLOPs, images a second, memory
efficiency.speedups(found)     a row per wavelet network, pixel network and kind of work
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from wddm.backbones import PRESETS, build_backbone, preset_sizes
from wddm.profiling import Measured, batch_contest, fitting_batch, forward_flops, speed, spread, times_as_fast
from wddm.studies.contenders import sampling, training

PRESET, SAME, MATCHED = "pixels, preset", "pixels, same network", "pixels, equal parameters"
WAVELETS = "wavelets"


@dataclass
class Entry:
    """A network, what it costs on paper, and what it took for every kind of work, in seconds per image."""

    name: str
    level: int
    network: dict[str, Any]
    parameters: int
    flops: int  # of a forward pass, batch 1
    measured: dict[str, Measured] = field(default_factory=dict)
    batch_size: dict[str, int] = field(default_factory=dict)


def entries(kind: str, dataset: str, levels: Sequence[int], attention_head_dim: int) -> list[Entry]:
    """The presets at those of the levels that have one, and for each above 0 its two equals on pixels.

    "Same network": the same widths and attention, shown pixels; it differs in its first and last convolution alone.
    "Equal parameters": the pixel preset, its widths scaled by one factor.
    """
    networks = {}
    for level in [level for level in levels if (dataset, level) in PRESETS]:
        network = {"kind": kind, "dataset": dataset, "level": level, "attention_head_dim": attention_head_dim}
        if level == 0:
            networks[PRESET, 0] = network
            continue
        sizes = preset_sizes(kind, dataset, level)
        widths, attention = sizes["block_out_channels"], sizes.get("attention_levels")
        networks[WAVELETS, level] = network
        networks[SAME, level] = network | {"level": 0, "widths": widths, "attention_levels": attention}
        with torch.device("meta"):
            matched = build_backbone(**network, matched=True).config.block_out_channels
        attention = preset_sizes(kind, dataset, 0).get("attention_levels")
        networks[MATCHED, level] = network | {"level": 0, "widths": matched, "attention_levels": attention}
    found = []
    for (name, level), network in networks.items():
        with torch.device("meta"):
            model = build_backbone(**network)
        found.append(Entry(name, level, network, model.num_parameters(), forward_flops(model)))
    return found


def measure(
    dataset: str,
    kind: str,
    levels: Sequence[int],
    *,
    rate: float,
    attention_head_dim: int = 64,
    batch_size: int = 16,
    sampling_steps: int = 10,
    rounds: int = 5,
    max_seconds: float = 10.0,
    precision: str = "auto",
    compile: bool = False,
) -> list[Entry]:
    """Train and sample with every network that fits, all of them in turn.

    Args:
        rate: FLOP/s that the machine reaches at most: what would take over `max_seconds` even then is not run.
        batch_size: images a step; fewer, the same for all of them, where that takes too long or too much memory.
        max_seconds: the longest training step, or batch of samples, that is measured.
    """
    found = entries(kind, dataset, levels, attention_head_dim)
    heaviest = max((entry.flops for entry in found), default=0)
    batch_size = fitting_batch(3 * heaviest, rate, batch_size, max_seconds)
    options = {"precision": precision, "compile": compile}
    works = {  # with the forward passes that an image takes; a backward pass counts as two
        "training": (partial(training, **options), 3),
        "sampling": (partial(sampling, sampling_steps=sampling_steps, **options), sampling_steps),
    }
    for work, (make, passes) in works.items():
        batch_size, measured = batch_contest(
            {str(k): partial(make, entry.network) for k, entry in enumerate(found)},
            batch_size=batch_size,
            rounds=rounds,
            max_seconds=max_seconds,
            least={str(k): passes * entry.flops / rate for k, entry in enumerate(found)},
        )
        for entry, one in zip(found, measured.values(), strict=True):
            seconds = None if one.seconds is None else one.seconds / batch_size
            entry.measured[work], entry.batch_size[work] = one._replace(seconds=seconds), batch_size
    return found


def costs(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row per network: what it is, counted and measured; None, and the reason, where it was not run."""
    rows = []
    for entry in found:
        row = {name: entry.network[name] for name in ("dataset", "kind")}
        row |= {"level": entry.level, "network": entry.name}
        row |= {"parameters": entry.parameters, "forward_gflop": entry.flops / 1e9}
        for work, one in entry.measured.items():
            fast = None if one.seconds is None else speed(one.seconds)
            names = (f"{work}_images_per_s", f"{work}_images_per_s_q1", f"{work}_images_per_s_q3")
            row |= dict(zip(names, fast or (None,) * 3, strict=True))
            row[f"{work}_memory_gib"], row[f"{work}_not_run"] = one.memory_gib, one.reason
            row[f"{work}_batch_size"] = entry.batch_size.get(work)
        rows.append(row)
    return rows


def speedups(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row per wavelet network, pixel network that it is compared with, and kind of work, both measured.

    The FLOP ratio is what the speed-up would be if every operation took as long.
    """
    rows = []
    for entry in (entry for entry in found if entry.name == WAVELETS):
        for other in (other for other in found if other.name == PRESET or other.level == entry.level):
            if other is entry:
                continue
            for work, one in entry.measured.items():
                row = {name: entry.network[name] for name in ("dataset", "kind", "level")}
                row |= {"over": other.name, "work": work, "flop_ratio": other.flops / entry.flops}
                row |= {"speedup": None, "low": None, "high": None}
                if one.seconds is not None and (reference := other.measured[work].seconds) is not None:
                    row["speedup"], row["low"], row["high"] = times_as_fast(one.seconds, reference)
                rows.append(row)
    return rows


def cost_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `costs`, as a report shows them."""

    def cell(row: dict[str, Any], work: str) -> str:
        if reason := row[f"{work}_not_run"]:
            return f"not run: {reason}"
        return spread(*(row[f"{work}_images_per_s{end}"] for end in ("", "_q1", "_q3")))

    return [
        {
            "level": row["level"],
            "network": row["network"],
            "params (M)": row["parameters"] / 1e6,
            "GFLOP": row["forward_gflop"],
            "training (images/s)": cell(row, "training"),
            "sampling (images/s)": cell(row, "sampling"),
            "GiB": row["training_memory_gib"],
        }
        for row in rows
    ]


def speedup_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `speedups` that were measured, as a report shows them."""
    return [
        {
            "level": row["level"],
            "over": row["over"],
            "work": row["work"],
            "FLOP ratio": row["flop_ratio"],
            "times as fast (90 % interval)": spread(row["speedup"], row["low"], row["high"]),
        }
        for row in rows
        if row["speedup"] is not None
    ]


def any_speed(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether any network of `costs` was measured."""
    return any(row["training_images_per_s"] or row["sampling_images_per_s"] for row in rows)


def claim_table(rows: Sequence[dict[str, Any]], level: int, wanted: float) -> list[dict[str, Any]]:
    """Training speed-ups at a level over each pixel network, over all data sets and kinds that were measured.

    "Reached": in how many of them what is wanted is not above the interval.
    """
    table = []
    for over in (PRESET, SAME, MATCHED):
        asked = [row for row in rows if (row["level"], row["over"], row["work"]) == (level, over, "training")]
        found = [row for row in asked if row["speedup"] is not None]
        table.append(
            {
                "over": over,
                "presets measured": f"{len(found)} of {len(asked)}",
                "times as fast": _range(row["speedup"] for row in found),
                "FLOP ratios": _range(row["flop_ratio"] for row in found),
                f"{wanted:g} reached": f"{sum(row['high'] >= wanted for row in found)} of {len(found)}",
            }
        )
    return table


def _range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.3g} to {max(values):.3g}" if values else "not run"
