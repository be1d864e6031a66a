"""sampling: settings of the sampler on one checkpoint: what each costs, how good it is, what may be said of it.

A setting is {name: value} of SETTING; a cell is a setting and the images that it is measured on: `count` of them, whose
seeds begin at `first`. `measured` measures every cell once, `pooled` makes of the cells a table with a row per
setting, which the functions after it read. The last part looks into the trajectory of one sampler.
"""

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from wddm.checkpoints import public
from wddm.data import Dataset, to_batch
from wddm.files import append_row, read_rows
from wddm.metrics import scores
from wddm.metrics.intervals import Estimate
from wddm.objective import alphas_cumprod, build_solver, check_options, clean_estimate
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images

SETTING = ("scheduler", "steps", "eta", "spacing", "detail_steps")
DISTANCES, ENDS = ("fwd", "fd"), ("", "_low", "_high")
Row = dict[str, Any]


def settings(
    schedulers: Sequence[str],
    steps: Sequence[int],
    *,
    etas: Sequence[float] = (0.0,),
    spacings: Sequence[str | None] = (None,),
    detail_steps: Sequence[int | None] = (None,),
) -> list[Row]:
    """Every combination. Only ddim takes the etas; detail steps that equal the steps are the plain sampler's, None.

    A spacing of None is trailing, the default.
    """
    return [
        dict(zip(SETTING, (name, count, eta, spacing or "trailing", details), strict=True))
        for name, spacing in itertools.product(schedulers, spacings)
        for eta, count in itertools.product(etas if name == "ddim" else (0.0,), steps)
        for details in (None if details == count else details for details in detail_steps)
    ]


def cells(settings: Sequence[Row], sets: int, count: int, seed: int = 0) -> list[Row]:
    """Each setting once for every one of `sets` sets of `count` images; the settings in turn, as time is taken too."""
    unique = [setting for k, setting in enumerate(settings) if setting not in settings[:k]]
    return [setting | {"first": seed + k * count, "count": count} for k in range(sets) for setting in unique]


def context(pipeline: WaveletPipeline, reference: Dataset, **also: Any) -> Row:
    """What the numbers depend on beside the setting: checkpoint, real images, device, versions, and what is given."""
    device, libraries = pipeline.device, ("wddm", "torch", "diffusers")
    return also | {
        "checkpoint": checkpoint_hash(pipeline),
        "reference": reference.sha256,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: version(name) for name in libraries},
    }


def checkpoint_hash(pipeline: WaveletPipeline) -> str:
    """sha256 of the weights and the configuration of network and codec, and of what the network predicts."""
    digest = hashlib.sha256(pipeline.scheduler.config.prediction_type.encode())
    for part in (pipeline.backbone, pipeline.codec):
        digest.update(json.dumps(public(part.config), sort_keys=True, default=str).encode())
        digest.update(safetensors.torch.save({name: x.contiguous() for name, x in part.state_dict().items()}))
    return digest.hexdigest()


def measured(file: Path, cells: Iterable[Row], context: Row, measure: Callable[[Row], Row]) -> Iterator[Row]:
    """Every cell together with what `measure(cell)` finds, in order.

    Each is a line of `file` as soon as it is measured, and is read from there from then on, so that a grid goes on
    where it was stopped. Lines of another context are not taken.
    """
    key = functools.partial(json.dumps, sort_keys=True)
    known = {key(row["cell"]): row["found"] for row in read_rows(file) if row.get("context") == context}
    for cell in cells:
        if key(cell) not in known:
            known[key(cell)] = measure(cell)
            append_row(file, {"context": context, "cell": cell, "found": known[key(cell)]})
        yield cell | known[key(cell)]


def with_solver(pipeline: WaveletPipeline, scheduler: str, spacing: str) -> WaveletPipeline:
    """The same network and codec with another solver, and no progress bar."""
    solver = build_solver(scheduler, pipeline.scheduler.config.prediction_type, spacing=spacing, codec=pipeline.codec)
    other = WaveletPipeline(pipeline.backbone, solver, pipeline.codec)
    other.set_progress_bar_config(disable=True)
    return other


def timed_samples(pipeline: WaveletPipeline, count: int, **options: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Images uint8 (N, H, W, C), and what one of them cost: network `evaluations`, and `seconds_per_image`.

    `options` are those of `sample_images`: batch_size, seed, num_inference_steps, eta, detail_steps.
    """
    sizes: list[int] = []
    started = time.perf_counter()
    with pipeline.backbone.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0]))):
        batches = list(sample_images(pipeline, count, **options))
    seconds, evaluations = time.perf_counter() - started, len(sizes) / len(batches)
    drawn = sum(sizes) / evaluations  # on the CPU a last batch is drawn whole
    return np.concatenate(batches), {"evaluations": evaluations, "seconds_per_image": seconds / drawn}


def quality(
    pipeline: WaveletPipeline, reference: Dataset, cell: Row, *, batch_size: int, measuring: scores.Options
) -> Row:
    """What a cell cost, and its distances: `fwd` and, where the set is labelled, the classifier's `fd`.

    A setting that a solver cannot do, or that ends in coefficients which are not finite, gives its `error` instead.
    """
    options = {"eta": cell["eta"], "detail_steps": cell["detail_steps"]}
    try:
        check_options(cell["scheduler"], **options)
        solver = with_solver(pipeline, cell["scheduler"], cell["spacing"])
        options |= {"num_inference_steps": cell["steps"], "seed": cell["first"], "batch_size": batch_size}
        samples, cost = timed_samples(solver, cell["count"], **options)
    except (ValueError, IndexError) as error:  # diffusers' own refusals are among them
        return {"error": str(error).splitlines()[0]}
    (fwd,), (fd,) = (metric(samples, reference, measuring) for metric in (scores.wavelet, scores.classifier))
    return cost | fwd.record() | replace(fd, key="fd").record()


def pooled(rows: Iterable[Row]) -> pd.DataFrame:
    """A row per setting of measured cells: mean distances with intervals, median seconds; cells with an error left out.

    Its `solver` is the scheduler's name with the eta, where that is not 0.
    """
    done = pd.DataFrame([row for row in rows if "error" not in row])
    groups = done.groupby(list(SETTING), sort=False, dropna=False) if len(done) else ()
    return _table([dict(zip(SETTING, setting, strict=True)) | _pool(sets) for setting, sets in groups])


def _table(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows with the columns of SETTING at least."""
    rows = list(rows)
    return pd.DataFrame(rows, columns=None if rows else list(SETTING)).astype({"detail_steps": float})


def _pool(sets: pd.DataFrame) -> Row:
    """What the cells of one setting say together."""
    first = sets.iloc[0]
    row = {"solver": first.scheduler + f", eta {first.eta:g}" * bool(first.eta), "sets": len(sets)}
    row |= {"count": int(first["count"]), "evaluations": first.evaluations}
    row |= {"seconds_per_image": sets.seconds_per_image.median()}
    for key in (key for key in DISTANCES if key in sets):
        ends = mean_interval(*(sets[key + end] for end in ENDS))
        row |= dict(zip([key + end for end in ENDS], ends, strict=True)) | {f"{key}_floor": first.get(f"{key}_floor")}
    return row


def mean_interval(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Estimate[float]:
    """The mean of independent estimates, and its interval from theirs: errors add up in squares."""
    mean, count = float(np.mean(values)), len(values)
    below, above = (float(np.linalg.norm(np.subtract(values, end))) / count for end in (low, high))
    return Estimate(mean, mean - below, mean + above)


def picked(table: pd.DataFrame, settings: Iterable[Row]) -> pd.DataFrame:
    """The rows of these settings, in their order, as far as they were measured."""
    return _table(settings).merge(table, on=list(SETTING))


def lines(table: pd.DataFrame, key: str, by: str = "solver") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By solver, or by another column: steps (K,), and distances with their intervals (K, 3)."""
    columns, groups = [key + end for end in ENDS], table.groupby(by, sort=False)
    return {str(name): (group.steps.to_numpy(), group[columns].to_numpy()) for name, group in groups}


def grid(table: pd.DataFrame, key: str, steps: Sequence[int]) -> np.ndarray:
    """A distance at every pair of these steps of the coarse band (rows) and of the details (columns); NaN: none."""
    pairs = table.set_index(["steps", table.detail_steps.fillna(table.steps)])[key].unstack()
    return pairs.reindex(index=steps, columns=steps).to_numpy()


def pareto_front(cost: Sequence[float], value: Sequence[float]) -> np.ndarray:
    """Which of N settings no other one beats, by being no more costly and no further off, and less in one of them."""
    points = np.stack([np.asarray(cost, float), np.asarray(value, float)], 1)
    no_worse, better = (points[:, None] <= points).all(-1), (points[:, None] < points).any(-1)  # [i, j]: i than j
    return np.logical_not((no_worse & better).any(0))


def fewest_within(steps: Sequence[int], low: Sequence[float], reference_high: float) -> int | None:
    """The fewest steps from which on the noise of the measurement explains what a setting is behind a reference by.

    That is, from which on the interval of the setting, whose lower end is `low`, reaches down to the reference's upper
    end; None where the most steps do not. Two 90 % intervals that just touch are of numbers that differ at about 2 %.
    """
    within = pd.Series(np.asarray(low), np.asarray(steps)).sort_index(ascending=False).le(reference_high).cummin()
    return int(within.index[within].min()) if within.any() else None


def fewest_steps(table: pd.DataFrame, reference: Row | pd.Series, distances: Sequence[str]) -> list[Row]:
    """A row per solver and distance: `fewest_within`, and how many times cheaper that is than the reference."""
    found = []
    for (solver, group), key in itertools.product(table.groupby("solver", sort=False), distances):
        fewest = fewest_within(group.steps, group[f"{key}_low"], reference[f"{key}_high"])
        row = {"solver": solver, "by": key.upper(), "fewest steps": fewest}
        for cost, title in (("evaluations", "evaluations saved"), ("seconds_per_image", "time saved")):
            row[title] = f"{reference[cost] / group.set_index('steps')[cost][fewest]:.3g}-fold" if fewest else "–"
        found.append(row)
    return found


def shown(table: pd.DataFrame, details: bool = False) -> pd.DataFrame:
    """The table as a report shows it; with the steps of the detail bands, if they are to be seen."""
    found = table[["solver", "steps"]].copy()
    if details:
        found["detail steps"] = table.detail_steps.fillna(table.steps)
    found["network"], found["ms per image"] = table.evaluations, 1000 * table.seconds_per_image
    for key in (key for key in DISTANCES if key in table):
        found[key.upper()] = table[key]
        ends = zip(table[f"{key}_low"], table[f"{key}_high"], strict=True)
        found[f"90 % of {key.upper()}"] = [f"{low:.3g} to {high:.3g}" for low, high in ends]
    return found


def failures(rows: Iterable[Row]) -> list[Row]:
    """A row per setting that could not be sampled, and why."""
    failed = [{name: row[name] for name in (*SETTING, "error")} for row in rows if "error" in row]
    return [row for k, row in enumerate(failed) if row not in failed[:k]]


def by_band(coefficients: Tensor, bands: int) -> np.ndarray:
    """Root mean square of each band (bands,), over images, colours and positions, of (B, bands * C, h, w)."""
    return coefficients.unflatten(1, (bands, -1)).square().mean((0, 2, 3, 4)).sqrt().double().cpu().numpy()


@torch.no_grad()
def along_trajectory(
    pipeline: WaveletPipeline, count: int, *, num_inference_steps: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """What the network sees and estimates at each of its S evaluations while `count` images are drawn.

    `times` (S,); by band of the codec, in root mean squares (S, bands): `signal` and `noise`, which the estimate says
    are in what the network sees, and `change`, how far the estimate is from the result, relative to the result.
    """
    bands, seen = len(pipeline.codec.bands()), []
    with pipeline.backbone.register_forward_hook(lambda network, inputs, out: seen.append((*inputs[:2], out.sample))):
        pipeline(count, output_type="pt", num_inference_steps=num_inference_steps, seed=seed)
    times = [torch.as_tensor(t).round().long().view(-1)[:1].to(noisy.device) for noisy, t, _ in seen]
    clean = [clean_estimate(pipeline.scheduler, z, out, t) for (z, _, out), t in zip(seen, times, strict=True)]
    signal = [alphas_cumprod(pipeline.scheduler, t).sqrt() * z for z, t in zip(clean, times, strict=True)]
    return {
        "times": np.array([int(t) for t in times]),
        "signal": np.stack([by_band(z, bands) for z in signal]),
        "noise": np.stack([by_band(noisy - z, bands) for (noisy, _, _), z in zip(seen, signal, strict=True)]),
        "change": np.stack([by_band(z - clean[-1], bands) / by_band(clean[-1], bands) for z in clean]),
    }


@torch.no_grad()
def denoising_error(
    pipeline: WaveletPipeline, images: np.ndarray, times: Sequence[int], *, seed: int = 0
) -> np.ndarray:
    """Error of the clean estimate of a batch of images (N, H, W, C) noised to each of the times (T,), (T, bands).

    Relative to the spread of the band: 1 is what the mean of all images would score.
    """
    bands, device = len(pipeline.codec.bands()), pipeline.device
    clean = pipeline.codec.encode(to_batch(np.asarray(images), np.zeros(len(images), bool), device))
    spread = by_band(clean - clean.mean(0), bands)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    errors = []
    for time_step in times:
        t = torch.full((len(clean),), time_step, device=device)
        noisy = pipeline.scheduler.add_noise(clean, noise, t)
        estimate = clean_estimate(pipeline.scheduler, noisy, pipeline.backbone(noisy, t).sample, t)
        errors.append(by_band(estimate - clean, bands) / spread)
    return np.stack(errors)
