"""sampling: settings of the sampler on one checkpoint: what each costs, how good it is, what may be said of it.

A setting has a value for every name in SETTING; a cell is a setting and the images that it is measured on: `count` of
them, whose seeds begin at `first`. A `table` is what `pooled` makes: a row per setting.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from wddm.checkpoints import public
from wddm.conditions import labelled
from wddm.data import Dataset, to_batch
from wddm.files import append_row, read_rows
from wddm.metrics import frechet, inception, scores
from wddm.metrics.intervals import Estimate
from wddm.objective import build_solver, check_options, clean_estimate, factors, noised
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images

SETTING, ENDS = ("scheduler", "steps", "eta", "spacing", "detail_steps"), ("", "_low", "_high")
Row = dict[str, Any]


def settings(
    schedulers: Sequence[str], steps: Sequence[int], *, etas: Sequence[float] = (0.0,),
    spacings: Sequence[str | None] = (None,), detail_steps: Sequence[int | None] = (None,),
) -> list[Row]:  # fmt: skip
    """All combinations. Only ddim takes `etas`; spacing None is "trailing"; `detail_steps` equal to steps are None."""
    return [
        dict(zip(SETTING, (name, count, eta, spacing or "trailing", details), strict=True))
        for name, spacing in itertools.product(schedulers, spacings)
        for eta, count in itertools.product(etas if name.lower() == "ddim" else (0.0,), steps)
        for details in (None if details == count else details for details in detail_steps)
    ]


def cells(settings: Sequence[Row], sets: int, count: int, seed: int = 0) -> list[Row]:
    """A cell for each setting on each of `sets` sets of `count` images; settings take turns, as they are timed, too."""
    unique = [setting for k, setting in enumerate(settings) if setting not in settings[:k]]
    return [setting | {"first": seed + k * count, "count": count} for k in range(sets) for setting in unique]


def context(pipeline: WaveletPipeline, reference: Dataset, **also: Any) -> Row:
    """What the numbers depend on beside the setting: checkpoint, real images, device, versions, and `also`."""
    digest = hashlib.sha256(pipeline.scheduler.config.prediction_type.encode())
    for part in (pipeline.backbone, pipeline.codec):
        digest.update(json.dumps(public(part.config), sort_keys=True, default=str).encode())
        digest.update(safetensors.torch.save({name: x.contiguous() for name, x in part.state_dict().items()}))
    where = torch.cuda.get_device_name(pipeline.device) if pipeline.device.type == "cuda" else pipeline.device.type
    known = {"checkpoint": digest.hexdigest(), "reference": reference.sha256, "device": where}
    return also | known | {"versions": {name: version(name) for name in ("wddm", "torch", "diffusers")}}


def measured(file: Path, cells: Iterable[Row], context: Row, measure: Callable[[Row], Row]) -> Iterator[Row]:
    """Every cell with what `measure(cell)` finds; cells that `file` has in the same context are not measured again."""
    key = partial(json.dumps, sort_keys=True)
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
    """Images uint8 (N, H, W, C) of `sample_images`; `evaluations` (network calls for an image), `seconds_per_image`."""
    sizes, started = list[int](), time.perf_counter()
    with pipeline.backbone.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0]))):
        batches = list(sample_images(pipeline, count, **options))
    seconds, evaluations = time.perf_counter() - started, len(sizes) / len(batches)
    drawn = sum(sizes) / evaluations  # on the CPU a last batch is drawn whole
    return np.concatenate(batches), {"evaluations": evaluations, "seconds_per_image": seconds / drawn}


def quality(
    pipeline: WaveletPipeline, reference: Dataset, cell: Row, *, metric: str, batch_size: int, measuring: scores.Options
) -> Row:
    """What a cell cost, and its distance by `metric` (`scores.distances`); or the `error` if it cannot be sampled."""
    options = {"eta": cell["eta"], "detail_steps": cell["detail_steps"]}
    try:
        check_options(cell["scheduler"], **options)
        solver = with_solver(pipeline, cell["scheduler"], cell["spacing"])
        options |= {"num_inference_steps": cell["steps"], "seed": cell["first"], "batch_size": batch_size}
        samples, cost = timed_samples(solver, cell["count"], **options)
    except (ValueError, IndexError) as error:  # diffusers' own refusals are among them
        return {"error": str(error).splitlines()[0]}
    return cost | scores.distances([metric], samples, reference, measuring)[0].record()


def scored(
    pipeline: WaveletPipeline, reference: Dataset, cell: Row, *, count: int, metrics: Sequence[str],
    measuring: scores.Options, **solving: Any,
) -> Row:  # fmt: skip
    """What it cost to draw `count` images with a cell's options, and their scores by `metrics`, keys of METRICS."""
    samples, cost = timed_samples(pipeline, count, **cell, **solving)
    found = [score for name in metrics for score in scores.METRICS[name](samples, reference, measuring)]
    return cost | {key: value for score in found for key, value in score.record().items()}


def distances(
    images: np.ndarray, real: frechet.Moments, features: np.ndarray | None, level: int, *, seed: int, device: Any
) -> Row:
    """FWD of images to real ones by their moments; KID x 1000 by EfficientNet's features of the real ones, if given."""
    measured: dict[str, Any] = {"resamples": 20, "seed": seed, "device": device}
    fwd = frechet.frechet_wavelet_distance(real, images, level, **measured).distance
    row = {f"fwd{end}": value for end, value in zip(ENDS, fwd, strict=True)}
    if features is not None:
        from wddm.metrics import perceptual

        own = inception.features(images, perceptual.build(device))[perceptual.LAYER]
        kid = inception.by_kernel(own, features)["kid"]
        row |= {f"kid{end}": 1000 * value for end, value in zip(ENDS, kid, strict=True)}
    return row


def pooled(rows: Sequence[Row], metric: str) -> pd.DataFrame:
    """A row per setting, over its cells without an error: mean distance with its interval, median seconds per image."""
    if all("error" in row for row in rows):
        raise ValueError(f"got no setting that could be sampled, wanted one ({rows[0]['error']}): change them")
    done, found = pd.DataFrame([row for row in rows if "error" not in row]), []
    for _, sets in done.groupby(list(SETTING), sort=False, dropna=False):
        row = sets.iloc[0].reindex([*SETTING, "count", "evaluations", f"{metric}_floor"]).to_dict()
        row |= {"sets": len(sets), "seconds_per_image": sets.seconds_per_image.median()}
        row["solver"] = row["scheduler"] + f", eta {row['eta']:g}" * bool(row["eta"])
        ends = mean_interval(*(sets[metric + end] for end in ENDS))
        found.append(row | dict(zip([metric + end for end in ENDS], ends, strict=True)))
    return pd.DataFrame(found).astype({"detail_steps": float})


def mean_interval(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Estimate[float]:
    """The mean of independent estimates; its interval is from theirs, whose half-widths add up in squares."""
    mean, count = float(np.mean(values)), len(values)
    below, above = (float(np.linalg.norm(np.subtract(values, end))) / count for end in (low, high))
    return Estimate(mean, mean - below, mean + above)


def picked(table: pd.DataFrame, settings: Sequence[Row]) -> pd.DataFrame:
    """The rows of these settings, in their order, as far as they were measured."""
    return pd.DataFrame(settings, columns=list(SETTING)).astype({"detail_steps": float}).merge(table, on=list(SETTING))


def fewest_steps(table: pd.DataFrame, reference: Row | pd.Series, metric: str) -> list[Row]:
    """By solver: the fewest steps from which on its interval is not above the reference's, and what they save."""
    found = []
    for solver, group in table.groupby("solver", sort=False):
        group = group.sort_values("steps", ascending=False)
        within = group[group[f"{metric}_low"].le(reference[f"{metric}_high"]).cummin()]
        row: Row = {"solver": solver, "fewest steps": int(within.steps.iloc[-1]) if len(within) else None}
        for cost, title in (("evaluations", "evaluations saved"), ("seconds_per_image", "time saved")):
            row[title] = f"{reference[cost] / within[cost].iloc[-1]:.3g}-fold" if len(within) else "–"
        found.append(row)
    return found


def columns(table: pd.DataFrame, metric: str, name: str) -> pd.DataFrame:
    """The columns of a table that a report shows; with the steps of the detail bands, if any setting has its own."""
    own = {"detail steps": table.detail_steps.fillna(table.steps)} if table.detail_steps.notna().any() else {}
    shown = own | {"network": table.evaluations, "ms per image": 1000 * table.seconds_per_image, name: table[metric]}
    found = table[["solver", "steps"]].assign(**shown, low=table[f"{metric}_low"], high=table[f"{metric}_high"])
    return found.reset_index(drop=True)


def by_band(coefficients: Tensor, bands: int) -> np.ndarray:
    """Root mean square (bands,) of each band in (B, bands * C, h, w), over images, colours and positions."""
    return coefficients.unflatten(1, (bands, -1)).square().mean((0, 2, 3, 4)).sqrt().double().cpu().numpy()


@torch.no_grad()
def along_trajectory(pipeline: WaveletPipeline, count: int, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What the network sees at its S evaluations while `count` images are drawn: `times` (S,), and root mean squares of
    each band (S, bands): `signal` and `noise` by its own estimate, and the `change` to come, relative to the result.
    """
    bands, seen = len(pipeline.codec.bands()), []
    with pipeline.backbone.register_forward_hook(lambda network, inputs, out: seen.append((*inputs[:2], out.sample))):
        pipeline(count, output_type="pt", num_inference_steps=steps, seed=seed)
    times = [torch.as_tensor(t).view(-1)[:1].to(noisy.device) for noisy, t, _ in seen]
    clean = [clean_estimate(pipeline.scheduler, z, out, t) for (z, _, out), t in zip(seen, times, strict=True)]
    signal = [factors(pipeline.scheduler, t)[0] * z for z, t in zip(clean, times, strict=True)]
    noise = [noisy - z for (noisy, _, _), z in zip(seen, signal, strict=True)]
    found = {"signal": signal, "noise": noise, "change": [z - clean[-1] for z in clean]}
    by_name = {name: np.stack([by_band(z, bands) for z in values]) for name, values in found.items()}
    by_name["change"] /= by_band(clean[-1], bands)
    return by_name | {"times": np.array([int(t) for t in times])}


@torch.no_grad()
def denoising_error(pipeline: WaveletPipeline, images: np.ndarray, times: Sequence[int], seed: int = 0) -> np.ndarray:
    """RMS error (T, bands) of estimates of images uint8 (N, H, W, C) noised to `times` (T,), over the band's spread."""
    bands, device = len(pipeline.codec.bands()), pipeline.device
    clean = pipeline.codec.encode(to_batch(np.asarray(images), np.zeros(len(images), bool), device))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    errors, answer = [], labelled(pipeline.backbone, len(clean), None, [1.0])
    for time_step in times:
        t = torch.full((len(clean),), time_step, device=device)
        noisy = noised(pipeline.scheduler, clean, noise, t)
        errors.append(by_band(clean_estimate(pipeline.scheduler, noisy, answer(noisy, t), t) - clean, bands))
    return np.stack(errors) / by_band(clean - clean.mean(0), bands)
