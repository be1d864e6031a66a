"""benchmarks: ours against baselines, two at a time: how many times as fast, with an interval, in how much memory.

A row of a duel holds speeds in units a second with quartiles, the median ratio of paired rounds with its 90 %
interval, and the peak memory of each contender in a process of its own; or why there are none.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from wddm import data
from wddm.backbones import PRESETS, build_backbone
from wddm.profiling import (
    Maker,
    Measured,
    alone,
    batch_contest,
    contest,
    fitting_batch,
    forward_flops,
    race,
    speed,
    spread,
    times_as_fast,
)
from wddm.studies.contenders import bare_training, commands, decoded_batches, prepared_batches, spline_layer, training

Row = dict[str, Any]


def presets(datasets: Sequence[str], levels: Sequence[int], kinds: Sequence[str], attention_head_dim: int) -> list[Row]:
    """What `build_backbone` takes, for those that there are."""
    return [
        {"kind": kind, "dataset": dataset, "level": level, "attention_head_dim": attention_head_dim}
        for dataset, level, kind in product(datasets, levels, kinds)
        if (dataset, level) in PRESETS
    ]


def duel(ours: Maker, theirs: Maker, *, units: float = 1, **limits: float) -> Row:
    """Two contenders in one race; a step of theirs, as of ours, is so many units. Limits as for `contest`."""
    return _outcome(contest({"ours": ours, "theirs": theirs}, **limits), units)


def training_duel(ours: Maker, theirs: Maker, *, flops: float, rate: float, batch_size: int, **limits: float) -> Row:
    """A duel of training steps of so many images, or half of that, ..., as both have memory for; units are images.

    `flops` are those of an image, `rate` the FLOP/s that the machine reaches at most.
    """
    makers = {"ours": ours, "theirs": theirs}
    least = dict.fromkeys(makers, flops / rate)
    batch_size, found = batch_contest(makers, batch_size=batch_size, least=least, **limits)
    return {"of": f"{batch_size} images"} | _outcome(found, batch_size)


def _outcome(found: Mapping[str, Measured], units: float) -> Row:
    """The row of a duel."""
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
    networks: Iterable[Row], *, rate: float, batch_size: int, precision: str, compiled: bool = False, **limits: float
) -> list[Row]:
    """Our training loop against the same network in a bare one; with `compiled`, a second time, both compiled.

    `rate`: FLOP/s that the machine reaches at most; for the share of it that our loop reaches, a backward pass counts
    as two forward ones.
    """
    rows = []
    for network, compile in ((network, c) for network in networks for c in (False, True)[: 1 + compiled]):
        makers = (partial(make, network, precision=precision, compile=compile) for make in (training, bare_training))
        flops = 3 * _flops(network)
        row = training_duel(*makers, flops=flops, rate=rate, batch_size=batch_size, **limits)
        share = row["ours_per_s"] and flops * row["ours_per_s"] / rate
        rows.append(network | {"compiled": compile} | row | {"share_of_rate": share})
    return rows


def splines(networks: Iterable[Row], *, rate: float, batch_size: int, precision: str, **limits: float) -> list[Row]:
    """The first spline layer of every U-KAN that has one, alone, and a training step of it, against recursion."""
    rows = []
    for network in (network for network in networks if network["kind"] == "ukan"):
        with torch.device("meta"):
            model = build_backbone(**network)
        if model.bottleneck is None:
            continue
        side = model.config.sample_size // 2 ** len(model.config.block_out_channels)
        layer = {"width": model.bottleneck.kan1.norm.normalized_shape[0], "tokens": batch_size * side**2}
        of = {"dataset": network["dataset"], "level": network["level"]}
        maker = partial(spline_layer, **layer)
        row = duel(maker, partial(maker, recursion=True), **limits)
        rows.append(of | {"what": "layer", "of": "{width} wide, {tokens} tokens".format(**layer)} | row)
        maker = partial(bare_training, network, precision=precision)
        cost = {"flops": 3 * _flops(network), "rate": rate, "batch_size": batch_size}
        row = training_duel(maker, partial(maker, recursion=True), **cost, **limits)
        rows.append(of | {"what": "step"} | row)
    return rows


def heads(networks: Iterable[Row], *, rate: float, batch_size: int, precision: str, **limits: float) -> list[Row]:
    """A training step of every UNet with its attention heads, against one with heads of 8 channels, as published."""
    rows = []
    for network in (network for network in networks if network["kind"] == "unet"):
        flops = 3 * _flops(network)
        images = fitting_batch(2 * flops, rate, batch_size, limits["max_seconds"])  # narrow heads take twice as long
        makers = (partial(training, one, precision=precision) for one in (network, network | {"attention_head_dim": 8}))
        row = training_duel(*makers, flops=flops, rate=rate, batch_size=images, **limits)
        rows.append({"dataset": network["dataset"], "level": network["level"], "what": "step"} | row)
    return rows


def data_path(size: int, batch_size: int, **limits: float) -> list[Row]:
    """Batches of prepared images in colour, against those of a DataLoader that decodes PNGs, in images a second.

    The images are crops of photographs, of which a PNG takes as long to decode as of others.
    """
    with TemporaryDirectory() as folder:
        images = np.array(data.prepare("patches", size, Path(folder) / "patches", limit=1000, progress=False).images)
    makers = (partial(maker, images, batch_size=batch_size) for maker in (prepared_batches, decoded_batches))
    of = f"{size} x {size}, {batch_size} at a time"
    return [{"what": "batches", "of": of} | duel(*makers, units=batch_size, **limits)]


def fixed_costs(dataset: str, resolution: int, dataset_path: str | None, limit: int | None, rounds: int) -> list[Row]:
    """Seconds, with quartiles, of what is paid once: starting, running an empty notebook, preparing a data set."""
    with TemporaryDirectory() as folder:
        places = (Path(folder) / f"{dataset}-{k}" for k in count())

        def prepare() -> None:
            data.prepare(dataset, resolution, next(places), dataset_path=dataset_path, limit=limit, progress=False)

        things = commands(Path(folder)) | {f"prepare {dataset}, {limit or 'all'} images": prepare}
        seconds = race(things, rounds=rounds, least_seconds=0)
    quartiles = {name: np.quantile(values, [0.5, 0.25, 0.75]).tolist() for name, values in seconds.items()}
    return [{"what": name} | dict(zip(("seconds", "q1", "q3"), q, strict=True)) for name, q in quartiles.items()]


def largest_batch(network: Row, *, limit_gib: float | None, precision: str = "auto", most: int = 4096) -> Row:
    """The largest power of two, up to `most`, whose training step fits, and what it takes; 0 where 1 does not.

    `limit_gib`: memory that it may take; None is all that there is, which only a GPU refuses gracefully.
    """
    if limit_gib is None and not torch.cuda.is_available():
        raise ValueError("got no capacity_gib and no GPU, wanted one of them: say how much memory a step may take")
    fitting, taken = 0, None
    while 2 * fitting <= most:
        batch_size = max(1, 2 * fitting)
        found = alone(partial(training, network, batch_size=batch_size, precision=precision))
        if found.memory_gib is None or (limit_gib is not None and found.memory_gib > limit_gib):
            break
        fitting, taken = batch_size, found.memory_gib
    return network | {"largest batch": fitting, "memory (GiB)": taken, "limit (GiB)": limit_gib}


def claim(text: str, rows: Sequence[Row], wanted: float, *, what: str | None = None, of: str = "time") -> Row:
    """Whether the least of the duels' ratios (of those of that `what`) is as much as wanted: yes, no, open if its
    interval holds both.

    `of`: "time", how many times as fast ours is, or "memory", how many times as small.
    """
    rows = [row for row in rows if row["times_as_fast"] is not None and what in (None, row.get("what"))]
    if of == "time":
        ratios = [(row["times_as_fast"], row["low"], row["high"]) for row in rows]
    else:
        ratios = [(row["theirs_gib"] / row["ours_gib"],) * 3 for row in rows]
    ratio, low, high = min(ratios, default=(None, None, None))
    met = "not run" if ratio is None else "yes" if low >= wanted else "no" if high < wanted else "open"
    return {"claim": text, "wanted": wanted, "measured": ratio, "low": low, "high": high, "met": met}


def duel_table(rows: Sequence[Row]) -> list[Row]:
    """Duels, as a report shows them."""
    return [
        ({"preset": "{dataset} {level}".format(**row)} if "dataset" in row else {})
        | {
            "what": row["what"],
            "of": row["of"],
            "ours (1/s)": row["ours_per_s"],
            "theirs (1/s)": row["theirs_per_s"],
            "times as fast": _times_as_fast(row),
            "ours (GiB)": row["ours_gib"],
            "theirs (GiB)": row["theirs_gib"],
        }
        for row in rows
    ]


def loop_table(rows: Sequence[Row]) -> list[Row]:
    """Loops, as a report shows them: the network, images a second, what ours costs, memory."""
    shown = []
    for row in rows:
        percent = [100 * (1 / row[end] - 1) for end in ("times_as_fast", "high", "low") if row[end] is not None]
        name = "{dataset} {level} {kind}".format(**row) + " compiled" * row["compiled"]
        columns = {"preset": name, "of": row["of"]}
        columns |= {"ours (images/s)": row["ours_per_s"], "bare (images/s)": row["theirs_per_s"]}
        columns["cost (%)"] = f"not run: {row['not_run']}" if row["not_run"] else spread(*percent)
        columns["share (%)"] = row["share_of_rate"] and 100 * row["share_of_rate"]
        shown.append(columns | {"ours (GiB)": row["ours_gib"], "bare (GiB)": row["theirs_gib"]})
    return shown


def _times_as_fast(row: Row) -> str:
    if row["not_run"]:
        return f"not run: {row['not_run']}"
    return spread(row["times_as_fast"], row["low"], row["high"])


def _flops(network: Mapping) -> int:
    with torch.device("meta"):
        return forward_flops(build_backbone(**network))
