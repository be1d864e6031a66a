"""From a checkpoint, ours or published, to a folder of images: `wddm sample`.

What the checkpoint says need not be given; what is given and contradicts it is an error.
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from wddm.backbones import backbone_name
from wddm.checkpoints import public
from wddm.loading import fetched
from wddm.objective import build_solver
from wddm.pipeline import WaveletPipeline, image_generators

GRID = 64  # images in the grid picture


class Solving(TypedDict, total=False):
    """How the solver runs: arguments of a `WaveletPipeline`'s call, and of the functions that draw by it."""

    num_inference_steps: int
    eta: float
    detail_steps: int | None


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
        model_type, level, resolution, prediction_type: what the checkpoint is expected to be, a ValueError if it is
            not. A published one does not store its prediction type: as `from_published` has it unless given.
        spacing: of the solver's steps; unless given "trailing" for ours, "leading" for published ones.
    """
    folder = fetched(path, {})
    if (folder / WaveletPipeline.config_name).is_file():
        pipeline = WaveletPipeline.from_pretrained(folder)
        stored = pipeline.scheduler.config.prediction_type
        pipeline.scheduler = build_solver(scheduler, stored, spacing=spacing, codec=pipeline.codec)
    else:
        pipeline = WaveletPipeline.from_published(
            folder, level=None, prediction_type=prediction_type, solver=scheduler, spacing=spacing or "leading"
        )
    for name, wanted, found in (
        ("model_type", model_type and model_type.lower(), backbone_name(type(pipeline.backbone).__name__)),
        ("wavelet_level", level, pipeline.codec.config.level),
        ("resolution", resolution, pipeline.image_size),
        ("prediction_type", prediction_type, pipeline.scheduler.config.prediction_type),
    ):
        if wanted not in (None, found):
            raise ValueError(f"got {name}={wanted!r}, but {path} holds {found!r}: leave {name} out, or give another")
    return pipeline


def draw(
    pipeline: WaveletPipeline,
    folder: Path,
    count: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    **solving: Unpack[Solving],
) -> None:
    """Write images 00000.png ..., grid.png of the first 64, and samples.json that says how they were made.

    Under `accelerate launch` each process draws its share of the batches, the main one with a progress bar; the files
    are those of one process. The folder is made, or a ValueError if it is not empty.
    """
    processes = PartialState()
    share = {"rank": processes.process_index, "world_size": processes.num_processes}
    new_folder(folder)
    processes.wait_for_everyone()  # to have looked, before anybody writes
    starts = range(0, count, images_per_call(pipeline, batch_size))[share["rank"] :: share["world_size"]]
    batches = sample_images(pipeline, count, batch_size=batch_size, seed=seed, **share, **solving)
    bar = tqdm(batches, "sampling", len(starts), unit="batch", file=sys.stdout, disable=not processes.is_main_process)
    for start, batch in zip(starts, bar, strict=True):
        write_images(folder, batch, start)
    processes.wait_for_everyone()
    if processes.is_main_process:
        write_summary(folder, pipeline, count, seed, solving)
    processes.wait_for_everyone()


def sample_images(
    pipeline: WaveletPipeline,
    count: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **solving: Unpack[Solving],
) -> Iterator[np.ndarray]:
    """Draw `count` images batch by batch, uint8 (b, H, W, C), image k seeded `seed + k`; the last batch is shorter.

    Of the batches, this process draws every `world_size`-th from the `rank`-th on.
    """
    size = images_per_call(pipeline, batch_size)
    for start in range(rank * size, count, world_size * size):
        stop = start + size if pipeline.device.type == "cpu" else min(start + size, count)
        generators = image_generators(range(seed + start, seed + stop))
        (images,) = pipeline(len(generators), generators, output_type="np", return_dict=False, **solving)
        yield (images[: count - start] * 255).round().astype(np.uint8)


def images_per_call(pipeline: WaveletPipeline, batch_size: int) -> int:
    """How many images are drawn at a time: `batch_size` on a GPU, a number of the network's own on the CPU.

    Sums round differently in batches of different size, and a network that is not trained to the end makes much of
    it. With one size, image k is the same to the last bit whatever the batch size; this one costs no speed.
    """
    return max(1, 2048 // pipeline.backbone.config.sample_size**2) if pipeline.device.type == "cpu" else batch_size


def new_folder(folder: str | Path) -> None:
    """Make a folder; ValueError if it is there and not empty."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if any(Path(folder).iterdir()):
        raise ValueError(f"got {folder}, which is not empty, wanted a new folder: nothing is overwritten, give another")


def write_images(folder: str | Path, images: np.ndarray, start: int = 0) -> None:
    """Write uint8 images (N, H, W, C) as PNGs, numbered from `start`."""
    for number, image in enumerate(images, start):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(Path(folder, f"{number:05d}.png"))


def write_summary(folder: str | Path, pipeline: WaveletPipeline, count: int, seed: int, solving: Solving) -> None:
    """Write samples.json, which says how the images were made, and grid.png of the first 64 in the folder."""
    description = {
        "images": count,
        "seeds": [seed, seed + count - 1],
        "backbone": type(pipeline.backbone).__name__,
        "parameters": pipeline.backbone.num_parameters(),
        "codec": public(pipeline.codec.config),
        "solver": type(pipeline.scheduler).__name__,
        "prediction_type": pipeline.scheduler.config.prediction_type,
        "spacing": pipeline.scheduler.config.get("timestep_spacing"),
        **solving,
        "resolution": pipeline.image_size,
        "versions": {name: version(name) for name in ("wddm", "torch", "diffusers")},
    }
    Path(folder, "samples.json").write_text(json.dumps(description, indent=2) + "\n")
    first = [Image.open(Path(folder, f"{number:05d}.png")) for number in range(min(count, GRID))]
    columns, (width, height) = max(1, round(len(first) ** 0.5)), first[0].size
    rows = -(-len(first) // columns)
    grid = Image.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")
    for k, image in enumerate(first):
        grid.paste(image, (k % columns * (width + 1), k // columns * (height + 1)))
    grid.save(Path(folder, "grid.png"))
