"""experiment: from the parameters of a run to its prepared set, codec, network and Trainer. There is no other assembly.

A parameter in a notebook's cell goes to every function below that has an argument of its name; one that none of them
has is an error.
"""

import inspect
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any

import accelerate
import numpy as np
import torch
from diffusers import ModelMixin

from wddm import data
from wddm.backbones import BACKBONES, IMAGES, build_backbone
from wddm.data import Dataset
from wddm.metrics.frechet import frechet_wavelet_distance, moments
from wddm.objective import PREDICTION_TYPES, WEIGHTINGS, build_solver, check_options
from wddm.steps import SCHEDULES, resolve_precision
from wddm.training import Step, Trainer
from wddm.wavelets import WaveletCodec, check_choice
from wddm.workbook import Run, progress
from wddm.workbook.experiments import Experiment

Parameters = Mapping[str, Any]


def prepare(book: Run, show: bool = True) -> Dataset:
    """What notebook 01 makes: the prepared set that the run's parameters ask for, recorded as the run's own."""
    refuse_untaken(book.parameters, TAKEN_BY["01_prepare"])
    prepared = data.prepare(root=book.root / "data", progress=show, **share(data.prepare, book.parameters))
    book.made("data", prepared.folder / "manifest.json")
    return prepared


def build(parameters: Parameters, prepared: Dataset) -> tuple[WaveletCodec, ModelMixin]:
    """The codec, fitted to the images, and the network with initial weights drawn from `seed`.

    Raises:
        ValueError: a parameter that notebook 02 declares and nothing takes; what codec and network refuse.
    """
    refuse_untaken(parameters, TAKEN_BY["02_train"])
    codec = WaveletCodec(**share(WaveletCodec, parameters)).fit(prepared.images)
    about = prepared.manifest
    return codec, _network(parameters, about["dataset"], about["resolution"], prepared.images.shape[-1])


def train(
    book: Run,
    prepared: Dataset,
    codec: WaveletCodec,
    network: ModelMixin,
    *,
    show: Callable[[Step], None] = lambda step: None,
    **options: bool,
) -> None:
    """Train the run's pipeline to the end with a progress bar, in `num_processes` processes, and record it.

    Args:
        show: called for every `Step`, in the main process alone.
        options: `extend`, `restart` and `cpu` of the Trainer, whose errors this function raises.
    """
    settings = share(Trainer, book.parameters) | options

    def work(forked: bool) -> None:
        if forked and not torch.cuda.is_available():
            torch.set_num_threads(1)  # the processes share the cores; OpenMP's threads do not survive a fork
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
        measure, sha256 = None, prepared.manifest["sha256"]["images"]
        if settings.get("fwd_kimg"):
            measure = distance_to(prepared.images, **share(distance_to, book.parameters))
        parts = {"model": network, "codec": codec, "images": prepared.images, "folder": book.folder}
        trainer = Trainer(**parts, data_sha256=sha256, measure=measure, **settings)
        if trainer.accelerator.is_main_process:
            _watch(trainer, book, show)
        else:
            for _ in trainer.steps():
                pass

    _launch(work, **share(_launch, book.parameters))


def distance_to(images: np.ndarray, train_fwd_level: int = 2) -> Callable[[np.ndarray], float]:
    """What measures samples while training goes on: their Frechet wavelet distance to uint8 images (N, H, W, C)."""
    real = moments(images, train_fwd_level)
    return lambda samples: frechet_wavelet_distance(real, samples, train_fwd_level).value


def _launch(function: Callable[[bool], None], num_processes: int = 1) -> None:
    """Call function(forked) here, or, as a notebook has to, in as many forks of this process."""
    if num_processes == 1:
        function(False)
    else:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        accelerate.notebook_launcher(function, (True,), num_processes=num_processes, use_port=port)


def _watch(trainer: Trainer, book: Run, show: Callable[[Step], None]) -> None:
    """Train to the end in the main process: with a progress bar, and recorded."""
    book.begin("pipeline")
    print(*trainer.notes, sep="\n", end="\n" * bool(trainer.notes))
    bar = progress(total=trainer.total_images, initial=trainer.images_seen, desc="training", unit="img")
    steps: Any = trainer.steps()
    with bar, closing(steps):
        for step in steps:
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            bar.update(step.images_seen - bar.n)
            show(step)
    book.made("pipeline", book.folder / "pipeline", images_seen=trainer.images_seen)


CHOICES: dict[str, Iterable[str]] = {
    "weighting": WEIGHTINGS, "schedule": SCHEDULES, "prediction_type": PREDICTION_TYPES, "backbone": BACKBONES,
}  # fmt: skip
TAKEN_BY: dict[str, list[Callable]] = {  # notebook: what takes its parameters
    "01_prepare": [data.prepare],
    "02_train": [WaveletCodec, build_backbone, Trainer, distance_to, _launch],
}


def check(experiment: Experiment) -> None:
    """Refuse what the notebooks would only find out later: sizes that do not divide, a data set that is not there.

    Builds codec, network and solver from the parameters that are there, without memory and without weights.
    ValueError: as the part that refuses says it.
    """
    parameters = experiment.parameters
    for name, table in CHOICES.items():
        if parameters.get(name) is not None:
            check_choice(name, parameters[name], table)
    for notebook in experiment.notebooks:
        if notebook.stem in TAKEN_BY:
            refuse_untaken(experiment.values(notebook), TAKEN_BY[notebook.stem])
    if "precision" in parameters:
        resolve_precision(parameters["precision"])
    if {"dataset", "resolution"} <= parameters.keys():
        data.check_source(**share(data.check_source, parameters))
    with torch.device("meta"):
        if {"wavelet", "resolution"} <= parameters.keys():
            WaveletCodec(**share(WaveletCodec, parameters)).check_size(*[parameters["resolution"]] * 2)
        if {"backbone", "dataset", "resolution"} <= parameters.keys():
            channels = IMAGES.get(parameters["dataset"], (0, 3))[1]
            _network(parameters, parameters["dataset"], parameters["resolution"], channels)
    for name in parameters.get("solvers", []) + parameters.get("spacing_solvers", []):
        build_solver(name, spacing=parameters.get("spacing"))
    if "scheduler" in parameters:
        predicts = parameters.get("prediction_type") or "epsilon"
        build_solver(parameters["scheduler"], predicts, spacing=parameters.get("spacing"))
        check_options(parameters["scheduler"], **share(check_options, parameters))


def share(function: Callable, parameters: Parameters) -> dict[str, Any]:
    """Those of the parameters that a function has an argument for."""
    return {name: parameters[name] for name in inspect.signature(function).parameters if name in parameters}


def refuse_untaken(parameters: Parameters, functions: Iterable[Callable]) -> None:
    """ValueError that names a parameter which none of the functions has an argument for, if there is one."""
    known = {name for function in functions for name in inspect.signature(function).parameters}
    if untaken := parameters.keys() - known - {"run"}:
        raise ValueError(f"got a parameter {min(untaken)!r} that nothing takes: remove it from the notebook's cell")


def _network(parameters: Parameters, dataset: str, size: int, channels: int) -> ModelMixin:
    torch.manual_seed(parameters.get("seed", 0))
    given = share(build_backbone, parameters) | {"dataset": dataset, "image_size": size, "image_channels": channels}
    return build_backbone(**given)
