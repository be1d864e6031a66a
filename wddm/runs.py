"""From an experiment's parameters to its codec, network and Trainer; training with a bar, in one process or several."""

import socket
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin

from wddm import data, metrics
from wddm.backbones import IMAGES, build_backbone
from wddm.solvers import build_solver, check_options
from wddm.training import Step, Trainer
from wddm.wavelets import WaveletCodec
from wddm.workbook import progress

DATA = ("dataset", "resolution", "dataset_path", "limit", "seed", "on_error")
CODEC = ("wavelet", "level", "transform", "scaling")
NETWORK = ("dataset", "level", "widths", "attention_levels", "layers_per_block", "attention_head_dim", "dropout")
TRAINING = tuple(option.name for option in fields(Trainer) if option.init)


def given(parameters: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the named parameters that are there."""
    return {name: parameters[name] for name in names if name in parameters}


def make_codec(parameters: dict[str, Any]) -> WaveletCodec:
    return WaveletCodec(**given(parameters, CODEC))


def make_network(parameters: dict[str, Any], channels: int | None = None) -> ModelMixin:
    """The denoiser for images of `channels`, those of the data set if None; initial weights drawn from `seed`."""
    channels = channels or IMAGES.get(parameters["dataset"], (0, 3))[1]
    torch.manual_seed(parameters.get("seed", 0))
    size = {"image_size": parameters["resolution"], "image_channels": channels}
    return build_backbone(parameters["backbone"], **size, **given(parameters, NETWORK))


def make_trainer(parameters: dict[str, Any], images: np.ndarray, folder: Path, **options: Any) -> Trainer:
    """The Trainer of an experiment on prepared images uint8 (N, H, W, C); `options` are further ones of its own."""
    codec = make_codec(parameters).fit(images)
    network = make_network(parameters, images.shape[-1])
    settings = given(parameters, TRAINING) | options
    if settings.get("fwd_kimg"):
        level = parameters.get("fwd_level", 2)
        real = metrics.packet_moments(images, level)
        settings["measure"] = lambda samples: metrics.frechet_wavelet_distance(real, samples, level).value
    return Trainer(model=network, codec=codec, images=images, folder=folder, **settings)


def check(parameters: dict[str, Any]) -> None:
    """Refuse what the notebooks would only find out later: sizes that do not divide, a data set that is not there.

    Builds codec, network and solver from the parameters that are there, without memory and without weights.

    Raises:
        ValueError: as the part that refuses says it.
    """
    has = parameters.keys().__ge__
    if has({"dataset", "resolution"}):
        data.check_source(**given(parameters, DATA))
    with torch.device("meta"):
        if has({"wavelet", "resolution"}):
            make_codec(parameters).check_size(parameters["resolution"], parameters["resolution"])
        if has({"backbone", "dataset", "resolution"}):
            make_network(parameters)
    if has({"scheduler"}):
        build_solver(parameters["scheduler"], **given(parameters, ("prediction_type", "spacing")))
        check_options(parameters["scheduler"], **given(parameters, ("eta", "detail_steps")))


def train(
    make: Callable[[], Trainer], *, num_processes: int = 1, show: Callable[[Step], None] = lambda step: None
) -> None:
    """Train to the end with a progress bar.

    Args:
        make: makes the Trainer, in every process.
        num_processes: more than one starts them from here, as a notebook has to; under `accelerate launch` leave it 1.
        show: called for every `Step`, in one process alone.

    Raises:
        ValueError, FloatingPointError, OSError, KeyboardInterrupt: as the Trainer does.
    """
    if num_processes == 1:
        return _train(make, show)
    from accelerate import notebook_launcher

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    notebook_launcher(_train, (make, show, True), num_processes=num_processes, use_port=port)


def _train(make: Callable[[], Trainer], show: Callable[[Step], None], forked: bool = False) -> None:
    if forked and not torch.cuda.is_available():
        torch.set_num_threads(1)  # the processes share the cores; OpenMP's threads do not survive a fork
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
    trainer = make()
    if not trainer.accelerator.is_main_process:
        return _exhaust(trainer)
    print(*trainer.notes, sep="\n", end="\n" * bool(trainer.notes))
    with progress(total=trainer.total_images, initial=trainer.images_seen, desc="training", unit="img") as bar:
        for step in trainer.steps():
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            bar.update(step.images_seen - bar.n)
            show(step)


def _exhaust(trainer: Trainer) -> None:
    for _ in trainer.steps():
        pass
