"""benchmarks: ours against baselines, two at a time: how many times as fast, with an interval, in how much memory.

A row of a duel holds speeds in units a second with quartiles, the median ratio of paired rounds with its 90 %
interval, and the peak memory of each contender in a process of its own; or why there are none.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from wddm import data
from wddm.backbones import PRESETS, build_backbone
from wddm.contenders import bare_training, commands, decoded_batches, prepared_batches, spline_layer, training
from wddm.profiling import Maker, alone, contest, forward_flops, race, speed, times_as_fast

Row = dict[str, Any]


def duel(ours: Maker, theirs: Maker, *, units: float = 1, rounds: int, max_seconds: float, least: float = 0.0) -> Row:
    """Two contenders in one race; a step of theirs, as of ours, is so many units."""
    makers = {"ours": ours, "theirs": theirs}
    found = contest(makers, rounds=rounds, max_seconds=max_seconds, least=dict.fromkeys(makers, least))
    row: Row = {}
    for name, one in found.items():
        fast = (None,) * 3 if one.seconds is None else speed(one.seconds, units)
        row |= dict(zip((f"{name}_per_s", f"{name}_per_s_q1", f"{name}_per_s_q3"), fast, strict=True))
        row[f"{name}_gib"] = one.memory_gib
    both = [one.seconds for one in found.values() if one.seconds is not None]
    ratio = times_as_fast(*both) if len(both) == 2 else (None,) * 3
    row |= dict(zip(("times_as_fast", "low", "high"), ratio, strict=True))
    return row | {"not_run": next((one.reason for one in found.values() if one.reason), None)}


def loops(
    datasets: Sequence[str],
    levels: Sequence[int],
    kinds: Sequence[str],
    *,
    rate: float,
    batch_size: int,
    precision: str = "auto",
    compiled: bool = False,
    **limits: float,
) -> list[Row]:
    """Our training loop against the same network in a bare one; with `compiled`, a second time, both compiled.

    `rate`: FLOP/s that the machine reaches at most; the share of it that our loop reaches counts three forward passes
    a step, as a backward pass is two.
    """
    rows = []
    for dataset, level in ((dataset, level) for dataset in datasets for level in levels if (dataset, level) in PRESETS):
        for kind in kinds:
            network = {"kind": kind, "dataset": dataset, "level": level}
            with torch.device("meta"):
                flops = forward_flops(build_backbone(**network))
            for compile in (False, True) if compiled else (False,):
                options = {"batch_size": batch_size, "precision": precision, "compile": compile}
                makers = (partial(maker, network, **options) for maker in (training, bare_training))
                row = duel(*makers, units=batch_size, least=3 * flops * batch_size / rate, **limits)
                share = row["ours_per_s"] and 3 * flops * row["ours_per_s"] / rate
                rows.append(network | {"compiled": compile, "gflop": flops / 1e9} | row | {"share_of_rate": share})
    return rows


def splines(networks: Sequence[Mapping], *, batch_size: int, precision: str = "auto", **limits: float) -> list[Row]:
    """The widest spline layer of U-KANs, alone, and whole training steps, against bases by recursion."""
    rows = []
    for network in networks:
        with torch.device("meta"):
            config = build_backbone(**network).config
        deepest = config.block_out_channels[-1]
        side = config.sample_size // 2 ** len(config.block_out_channels)
        layer = {"width": 3 * deepest // 2, "tokens": batch_size * side**2}  # of its first KAN block
        name = "{dataset}, level {level}".format(**network)
        step = {"batch_size": batch_size, "precision": precision}
        for what, maker in (
            ("layer of {width}, {tokens:,} tokens".format(**layer), partial(spline_layer, **layer)),
            (f"U-KAN step, batch {batch_size}", partial(bare_training, network, **step)),
        ):
            row = duel(maker, partial(maker, recursion=True), **limits)
            rows.append({"preset": name, "what": what} | row)
    return rows


def data_path(images: np.ndarray, *, batch_size: int, **limits: float) -> Row:
    """Batches of prepared images against those of a DataLoader that decodes PNGs, in images a second."""
    makers = (partial(maker, images, batch_size=batch_size) for maker in (prepared_batches, decoded_batches))
    return duel(*makers, units=batch_size, **limits)


def fixed_costs(dataset: str, resolution: int, dataset_path: str | None, limit: int | None, rounds: int) -> list[Row]:
    """Seconds, with quartiles, of what is paid once: starting, running an empty notebook, preparing a data set."""
    with TemporaryDirectory() as folder:
        number = iter(range(10**6))

        def prepare() -> None:
            place = Path(folder) / f"{dataset}-{next(number)}"
            data.prepare(dataset, resolution, place, dataset_path=dataset_path, limit=limit, progress=False)

        things = commands(Path(folder)) | {f"prepare {dataset}, {limit or 'all'} images": prepare}
        seconds = race(things, rounds=rounds, least_seconds=0)
    quartiles = {name: np.quantile(values, [0.5, 0.25, 0.75]).tolist() for name, values in seconds.items()}
    return [{"what": name} | dict(zip(("seconds", "q1", "q3"), q, strict=True)) for name, q in quartiles.items()]


def largest_batch(network: Mapping, *, limit_gib: float | None, precision: str = "auto", most: int = 4096) -> Row:
    """The largest power of two, up to `most`, whose training step fits, and what it takes; 0 where 1 does not.

    `limit_gib`: memory that it may take; None is all that there is, which only a GPU refuses gracefully.
    """
    fitting, taken = 0, None
    while 2 * fitting <= most:
        batch_size = max(1, 2 * fitting)
        found = alone(partial(training, network, batch_size=batch_size, precision=precision))
        if found.memory_gib is None or (limit_gib is not None and found.memory_gib > limit_gib):
            break
        fitting, taken = batch_size, found.memory_gib
    return dict(network) | {"batch_size": fitting, "memory_gib": taken, "limit_gib": limit_gib}


def claim(what: str, rows: Sequence[Row], wanted: float, of: str = "time") -> Row:
    """Whether the least of the duels' ratios is at least what is wanted: yes, no, or open if that is in its interval.

    `of`: "time", how many times as fast ours is, or "memory", how many times as small.
    """
    if of == "time":
        ratios = [(row["times_as_fast"], row["low"], row["high"]) for row in rows if row["times_as_fast"] is not None]
    else:
        ratios = [(row["theirs_gib"] / row["ours_gib"],) * 3 for row in rows if row["ours_gib"] and row["theirs_gib"]]
    if not ratios:
        return {"claim": what, "wanted": wanted, "measured": None, "low": None, "high": None, "met": "not run"}
    ratio, low, high = min(ratios)
    met = "yes" if low >= wanted else "no" if high < wanted else "open"
    return {"claim": what, "wanted": wanted, "measured": ratio, "low": low, "high": high, "met": met}
