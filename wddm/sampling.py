"""From a checkpoint, ours or published, to a folder of images: `wddm sample`.

What the checkpoint says need not be given; what is given and contradicts it is an error.
"""

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DModel
from PIL import Image

from wddm.mosaics import compose
from wddm.pipeline import WaveletPipeline, build_solver, sample_images
from wddm.ukan import UKANModel

GRID = 64  # images in the grid picture


def open_pipeline(
    path: str | Path,
    *,
    model_type: str | None = None,
    level: int | None = None,
    resolution: int | None = None,
    prediction_type: str | None = None,
    scheduler: str = "ddim",
    spacing: str | None = None,
) -> WaveletPipeline:
    """A pipeline folder of ours, or a published checkpoint (folder or Hub repository), with the solver asked for.

    Args:
        model_type, level, resolution, prediction_type: what the checkpoint is expected to be. A published one does not
            store its prediction type: "epsilon" unless given.
        spacing: of the solver's steps; "trailing" for ours, "leading" for published ones unless given.

    Raises:
        ValueError: an expectation that the checkpoint contradicts.
    """
    ours = (Path(path) / "model_index.json").is_file()
    if ours:
        pipeline = WaveletPipeline.from_pretrained(path)
        stored = pipeline.scheduler.config.prediction_type
        prediction_type = expect("prediction_type", prediction_type, stored, path)
        limit, spacing = pipeline.codec.limit.item(), spacing or "trailing"
        pipeline.scheduler = build_solver(scheduler, prediction_type, spacing=spacing, clip=limit)
    else:
        try:
            channels = UKANModel.load_config(path).get("in_channels", 3)
        except OSError as error:
            raise ValueError(
                f"got {path}, wanted a folder with model_index.json (ours) or config.json (published), or a Hub name: "
                f"{str(error).splitlines()[0]}"
            ) from error
        pipeline = WaveletPipeline.from_published(
            path,
            level=expect("wavelet_level", level, round(log(max(channels, 3) / 3, 4)), path),
            prediction_type=prediction_type or "epsilon",
            solver=scheduler,
            spacing=spacing or "leading",
        )
    kind = {UNet2DModel: "unet", UKANModel: "ukan"}[type(pipeline.backbone)]
    expect("model_type", model_type, kind, path)
    expect("wavelet_level", level, pipeline.codec.config.level, path)
    expect("resolution", resolution, pipeline.image_size, path)
    return pipeline


def expect(name: str, wanted: Any, found: Any, path: str | Path) -> Any:
    """What the checkpoint holds, if that is what was asked for or nothing was."""
    if wanted not in (None, found):
        raise ValueError(f"got {name}={wanted!r}, but {path} holds {found!r}: leave {name} out, or give another folder")
    return found


def draw(
    pipeline: WaveletPipeline,
    folder: Path,
    count: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    **options: Any,
) -> None:
    """Write images 00000.png ..., grid.png of the first 64, and samples.json that says how they were made.

    Args:
        folder: made, or empty.
        progress: wraps the iterator of batches, to show a bar.
        options: num_inference_steps, eta.

    Raises:
        ValueError: the folder is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(
            f"got {folder}, which is not empty, wanted a new folder: nothing is overwritten, choose another"
        )
    first: list[np.ndarray] = []
    number = 0
    for batch in progress(sample_images(pipeline, count, batch_size=batch_size, seed=seed, **options)):
        for image in batch:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{number:05d}.png")
            number += 1
        first.extend(batch[: GRID - len(first)])
    columns = max(1, round(len(first) ** 0.5))
    Image.fromarray(compose(np.stack(first), columns)).save(folder / "grid.png")
    description = {
        "images": count,
        "seeds": [seed, seed + count - 1],
        "backbone": type(pipeline.backbone).__name__,
        "parameters": pipeline.backbone.num_parameters(),
        "codec": {key: value for key, value in pipeline.codec.config.items() if key[0] != "_"},
        "solver": type(pipeline.scheduler).__name__,
        "prediction_type": pipeline.scheduler.config.prediction_type,
        "spacing": pipeline.scheduler.config.get("timestep_spacing"),
        **options,
        "resolution": pipeline.image_size,
        "versions": {name: version(name) for name in ("wddm", "torch", "diffusers")},
    }
    (folder / "samples.json").write_text(json.dumps(description, indent=2) + "\n")
