"""From a checkpoint, ours or published, to a folder of images: `wddm sample`.

Settings that the checkpoint stores need not be given; one that is given and contradicts it is an error.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid, numpy_to_pil
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from wddm.backbones import backbone_name
from wddm.checkpoints import public
from wddm.conditions import numbered
from wddm.files import refusing
from wddm.loading import fetched
from wddm.objective import build_solver, default_solver
from wddm.pipeline import WaveletPipeline, image_generators, visible


def open_pipeline(
    path: str | Path, *, model_type: str | None = None, level: int | None = None, resolution: int | None = None,
    prediction_type: str | None = None, scheduler: str | None = None, spacing: str | None = None,
) -> WaveletPipeline:  # fmt: skip
    """A pipeline folder of ours, or a published checkpoint (folder or Hub repository), with the solver asked for.

    ValueError if it has another model type, level, resolution (height) or prediction type than given; a published one
    does not store its prediction type, and takes the one given. `scheduler` is by default "ddim", for a flow "euler";
    `spacing`, of the solver's steps, is by default "trailing", for published checkpoints "leading".
    """
    model_type, prediction_type, spacing = (name and name.lower() for name in (model_type, prediction_type, spacing))
    folder = fetched(path, {})
    if (folder / WaveletPipeline.config_name).is_file():
        pipeline = WaveletPipeline.from_pretrained(folder)
        stored = pipeline.scheduler.config.prediction_type
        scheduler = scheduler or default_solver(stored)
        pipeline.scheduler = build_solver(scheduler, stored, spacing=spacing, codec=pipeline.codec)
    else:
        solving: dict[str, Any] = {"solver": scheduler or "ddim", "spacing": spacing or "leading"}
        pipeline = WaveletPipeline.from_published(folder, level=None, prediction_type=prediction_type, **solving)
    for name, wanted, found in (
        ("model_type", model_type, backbone_name(type(pipeline.backbone).__name__)),
        ("wavelet_level", level, pipeline.codec.config.level),
        ("resolution", resolution, int(np.ravel(pipeline.image_size)[0])),
        ("prediction_type", prediction_type, pipeline.scheduler.config.prediction_type),
    ):
        if wanted not in (None, found):
            raise ValueError(f"got {name}={wanted!r}, but {path} holds {found!r}: leave {name} out, or give another")
    return pipeline


def draw(
    pipeline: WaveletPipeline, folder: Path, count: int, *, batch_size: int = 64, seed: int = 0,
    labels: Sequence[int | str] | None = None, **solving: Any,
) -> None:  # fmt: skip
    """Draw `count` images into a new folder: 00000.png ..., grid.png and samples.json; see `write_summary`.

    Under `accelerate launch` each process draws its share of the batches; the files are the same as from one process.
    """
    processes = PartialState()
    rank, world_size = processes.process_index, processes.num_processes
    folder = new_folder(folder)
    processes.wait_for_everyone()  # all have checked the folder before any of them writes
    starts = range(0, count, images_per_call(pipeline, batch_size))[rank::world_size]
    share = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
    labels = labels_in_turn(pipeline, labels)
    batches = sample_images(pipeline, count, **share, labels=labels, **solving)
    bar = tqdm(batches, "sampling", len(starts), unit="batch", file=sys.stdout, disable=not processes.is_main_process)
    for start, batch in zip(starts, bar, strict=True):
        write_images(folder, batch, start)
    processes.wait_for_everyone()
    if processes.is_main_process:
        write_summary(folder, pipeline, count, seed, {"labels": labels, **solving})
    processes.wait_for_everyone()


def sample_images(
    pipeline: WaveletPipeline, count: int, *, batch_size: int = 64, seed: int = 0, rank: int = 0, world_size: int = 1,
    labels: Sequence[int | str] | None = None, known: Mapping[str, Tensor] | None = None, **solving: Any,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Draw `count` images batch by batch, uint8 (b, H, W, C), image k seeded `seed + k`; the last batch is shorter.

    Image k has label k of `labels_in_turn` and row k of each tensor in `known`, over and over: low_resolution, or known
    and mask, of the pipeline's call. With `known` alone, labels are those in it, if any. Process `rank` draws every
    `world_size`-th batch. `solving`: other arguments of the pipeline's call, which refuses unknown ones.
    """
    size = images_per_call(pipeline, batch_size)
    turn = labels_in_turn(pipeline, labels) if labels or not known else None
    for start in range(rank * size, count, world_size * size):
        stop = start + size if pipeline.device.type == "cpu" else min(start + size, count)
        asked = [turn[k % len(turn)] for k in range(start, stop)] if turn else None
        given = {name: x[torch.arange(start, stop) % len(x)] for name, x in (known or {}).items()}
        options: dict[str, Any] = {"output_type": "np", "return_dict": False, "labels": asked, **given, **solving}
        (images,) = pipeline(stop - start, image_generators(range(seed + start, seed + stop)), **options)
        yield (images[: count - start] * 255).round().astype(np.uint8)


def labels_in_turn(pipeline: WaveletPipeline, labels: Sequence[int | str] | None = None) -> list[int] | None:
    """Class numbers that images are drawn with in turn: those of `labels`, else all classes; None if there are none."""
    known = getattr(pipeline.backbone.config, "num_class_embeds", None) or 1  # the last is "no label"
    return numbered(labels or range(known - 1), pipeline.config.get("class_names")) or None


def images_per_call(pipeline: WaveletPipeline, batch_size: int) -> int:
    """How many images are drawn at a time: `batch_size` on a GPU, on the CPU a number set by the network's map size.

    Sums round differently in batches of another size; with a fixed one, image k is the same to the last bit, as fast.
    """
    height, width = pipeline.map_size
    return max(1, 2048 // (height * width)) if pipeline.device.type == "cpu" else batch_size


def check_device(name: str) -> None:
    """Raise a ValueError if nothing can be computed on a device of this name, "cuda:1" for example."""
    found = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    with refusing(f"device {name!r}", " or ".join(found), "choose one of them"):
        torch.zeros(1, device=name).item()


def new_folder(name: str | Path) -> Path:
    """Make a folder, or take an empty one; ValueError if it is not empty, or cannot be made."""
    folder = Path(name).expanduser()
    with refusing(folder, "a new folder", "give another"):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"got {folder}, which is not empty, wanted a new folder: nothing is overwritten, give another")
    return folder


def write_images(folder: str | Path, images: np.ndarray, start: int = 0) -> None:
    """Write the `visible` channels of images uint8 (N, H, W, C) as PNGs, numbered from `start`."""
    for number, picture in enumerate(numpy_to_pil(visible(images) / 255), start):
        picture.save(Path(folder, f"{number:05d}.png"))


def write_summary(folder: Path, pipeline: WaveletPipeline, count: int, seed: int, solving: Mapping[str, Any]) -> None:
    """Write samples.json, which says how the images were made, and grid.png of the first 64 in the folder."""
    about = {"images": count, "seeds": [seed, seed + count - 1], "resolution": pipeline.image_size, **solving}
    about |= {"class_names": pipeline.config.get("class_names")}
    about |= {"prediction_type": pipeline.scheduler.config.prediction_type, "solver": type(pipeline.scheduler).__name__}
    about |= {name: public(part.config) for name, part in pipeline.components.items()}
    about["versions"] = {name: version(name) for name in ("wddm", "torch", "diffusers")}
    Path(folder, "samples.json").write_text(json.dumps(about, indent=2) + "\n")
    opened = (Image.open(Path(folder, f"{number:05d}.png")) for number in range(min(count, 64)))
    first = [ImageOps.expand(image, (0, 0, 1, 1), "white") for image in opened]
    first += [Image.new("L", first[0].size, "white")] * (-len(first) % (columns := round(len(first) ** 0.5)))
    make_image_grid(first, len(first) // columns, columns).save(Path(folder, "grid.png"))


def read_images(path: Path) -> np.ndarray:
    """Images uint8 (N, H, W, C) of a samples.npy, or of a folder with one or with PNGs that `wddm sample` wrote."""
    array = path / "samples.npy" if path.is_dir() else path
    is_array = array.suffix == ".npy" and array.is_file()
    pictures = {*path.glob("*.png")} - {path / "grid.png"}  # an overview by `wddm sample`
    files = [array] if is_array else sorted(pictures, key=lambda file: (len(file.name), file))  # 99999 before 100000
    if not files:
        raise ValueError(f"got {path}, wanted a folder of PNGs, or samples.npy: give what wddm sample wrote")
    found: list[np.ndarray] = []
    for file in files:
        with refusing(f"{file}, which cannot be read", "images", "write it anew"):
            found.append(np.load(file, mmap_mode="r") if is_array else np.atleast_3d(np.asarray(Image.open(file))))
        first, read = found[0], found[-1]
        if read.dtype != np.uint8 or read.ndim != 3 + is_array or not read.size or read.shape != first.shape:
            got = f"got {file} of {read.dtype} {read.shape}" + f" beside {first.shape}" * (read is not first)
            raise ValueError(f"{got}, wanted uint8 images of one size, an array as (N, H, W, C): convert them")
    return found[0] if is_array else np.stack(found)
