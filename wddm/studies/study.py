"""study: settings of the sampler, each measured once on one checkpoint.

A setting is {name: value} of SETTING; a cell is a setting and the images that it is measured on; a row is a cell and
what was found for it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wddm.checkpoints import public
from wddm.data import Dataset
from wddm.files import append_row, read_rows
from wddm.metrics import scores
from wddm.objective import build_solver, check_options, default_spacing
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images

SETTING = ("scheduler", "steps", "eta", "spacing", "detail_steps")


def settings(
    schedulers: Sequence[str],
    steps: Sequence[int],
    *,
    etas: Sequence[float] = (0.0,),
    spacings: Sequence[str | None] = (None,),
    detail_steps: Sequence[int | None] = (None,),
) -> list[dict[str, Any]]:
    """Every combination; etas are ddim's alone, and detail steps that equal the steps are none of their own.

    A spacing of None is the solver's default.
    """
    found = [
        (name, count, eta, spacing or default_spacing(name), None if details == count else details)
        for name in schedulers
        for spacing in spacings
        for eta in (etas if name == "ddim" else (0.0,))
        for count in steps
        for details in detail_steps
    ]
    return [dict(zip(SETTING, each, strict=True)) for each in found]


def setting_of(row: Mapping[str, Any]) -> tuple:
    """The values of SETTING in a row."""
    return tuple(row[name] for name in SETTING)


def cells(settings: Iterable[dict[str, Any]], sets: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Each setting once for every one of `sets` sets of `count` images; the settings in turn, as time is taken too."""
    unique = {setting_of(setting): setting for setting in settings}.values()
    return [setting | {"first": seed + k * count, "count": count} for k in range(sets) for setting in unique]


def about(pipeline: WaveletPipeline, reference: Dataset, **also: Any) -> dict[str, Any]:
    """What the numbers of a study depend on beside the setting: checkpoint, real images, device, versions, and more."""
    device = pipeline.device
    return {
        "checkpoint": checkpoint_hash(pipeline),
        "reference": reference.manifest["sha256"]["images"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: version(name) for name in ("wddm", "torch", "diffusers")},
        **also,
    }


def checkpoint_hash(pipeline: WaveletPipeline) -> str:
    """sha256 of the weights and the configuration of network and codec, and of what the network predicts."""
    digest = hashlib.sha256(pipeline.scheduler.config.prediction_type.encode())
    for part in (pipeline.backbone, pipeline.codec):
        digest.update(json.dumps(public(part.config), sort_keys=True, default=str).encode())
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def measured(
    file: Path, cells: Iterable[dict[str, Any]], about: dict[str, Any], measure: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every cell with what `measure(**cell)` finds, in order.

    Each is a line of `file` as soon as it is measured, and is read from there from then on, so that a grid goes on
    where it was stopped. `about` says what else the numbers depend on: lines about something else are not taken.
    """
    key = lambda cell: json.dumps([about, cell], sort_keys=True)  # noqa: E731
    known = {json.dumps([row["about"], row["cell"]], sort_keys=True): row["found"] for row in read_rows(file)}
    for cell in cells:
        if key(cell) not in known:
            known[key(cell)] = measure(**cell)
            append_row(file, {"about": about, "cell": cell, "found": known[key(cell)]})
        yield cell | known[key(cell)]


def with_solver(pipeline: WaveletPipeline, scheduler: str, spacing: str) -> WaveletPipeline:
    """The same network and codec with another solver."""
    kind, codec = pipeline.scheduler.config.prediction_type, pipeline.codec
    other = WaveletPipeline(pipeline.backbone, build_solver(scheduler, kind, spacing=spacing, codec=codec), codec)
    other.set_progress_bar_config(disable=True)
    return other


def draw(pipeline: WaveletPipeline, count: int, **options: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Images uint8 (N, H, W, C) as `sample_images` draws them, and what an image took: network evaluations, seconds."""
    sizes, started = [], time.perf_counter()
    hook = pipeline.backbone.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
    try:
        batches = list(sample_images(pipeline, count, **options))
    finally:
        hook.remove()
    seconds, evaluations = time.perf_counter() - started, len(sizes) / len(batches)
    drawn = sum(sizes) / evaluations  # on the CPU a last batch is drawn whole
    return np.concatenate(batches), {"evaluations": evaluations, "seconds_per_image": seconds / drawn}


def quality(
    pipeline: WaveletPipeline,
    reference: Dataset,
    *,
    scheduler: str,
    steps: int,
    eta: float,
    spacing: str,
    detail_steps: int | None,
    first: int,
    count: int,
    level: int,
    batch_size: int,
    **how: Any,
) -> dict[str, Any]:
    """A cell of a sampling study: cost and distances, `fwd` and, where the set is labelled, `fd` of the classifier.

    Args:
        first, count: images are drawn from the seeds `first` to `first + count - 1`.
        level: of the FWD.
        how: seed and device, for the distances.

    A setting that a solver cannot do, or that ends in coefficients which are not finite, gives its `error` instead.
    """
    try:
        check_options(scheduler, eta=eta, detail_steps=detail_steps)
        options = {"num_inference_steps": steps, "eta": eta, "detail_steps": detail_steps}
        solver = with_solver(pipeline, scheduler, spacing)
        samples, cost = draw(solver, count, batch_size=batch_size, seed=first, **options)
    except (ValueError, IndexError) as error:  # diffusers' own limits are among them
        return {"error": str(error).splitlines()[0]}
    options = scores.Options(level=level, **how)
    (fwd,), (fd,) = scores.wavelet(samples, reference, options), scores.classifier(samples, reference, options)
    return cost | fwd.record() | replace(fd, key="fd").record()
