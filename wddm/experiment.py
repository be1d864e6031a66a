"""experiment: from the parameters of a run to its prepared set, codec, network and Trainer. There is no other assembly.

A parameter in a notebook's cell goes to every function below that has an argument of its name; one that none of them
has is an error.
"""

import inspect
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin

from wddm import data
from wddm.backbones import BACKBONES, IMAGES, build_backbone
from wddm.data import Dataset
from wddm.learner import SCHEDULES, resolve_precision
from wddm.metrics.frechet import frechet_wavelet_distance, haar_packets, moments
from wddm.objective import PREDICTION_TYPES, WEIGHTINGS, build_solver, check_options
from wddm.training import Step, Trainer
from wddm.wavelets import WaveletCodec, check_choice
from wddm.workbook import Run, progress
from wddm.workbook.experiments import Experiment

Parameters = Mapping[str, Any]


def prepare(book: Run, show: bool = True) -> Dataset:
    """What notebook 01 makes: the prepared set that the run's parameters ask for, recorded as the run's own."""
    refuse_untaken(book.parameters, [data.prepare])
    prepared = data.prepare(root=book.root / "data", progress=show, **share(data.prepare, book.parameters))
    book.made("data", prepared.folder / "manifest.json")
    return prepared


def build(parameters: Parameters, prepared: Dataset) -> tuple[WaveletCodec, ModelMixin]:
    """The codec, fitted to the images, and the network with initial weights drawn from `seed`.

    Raises:
        ValueError: a parameter that neither codec, network, training nor measuring takes; what they refuse themselves.
    """
    refuse_untaken(parameters, [WaveletCodec, build_backbone, Trainer, distance_to, _launch])
    codec = WaveletCodec(**share(WaveletCodec, parameters)).fit(prepared.images)
    facts = prepared.manifest
    return codec, _network(parameters, facts["dataset"], facts["resolution"], prepared.images.shape[-1])


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
        options: `extend`, `restart` and `cpu` of the Trainer.

    Raises:
        ValueError, FloatingPointError, OSError, KeyboardInterrupt: as the Trainer does.
    """
    settings = share(Trainer, book.parameters) | options

    def make() -> Trainer:
        measure = partial(distance_to, prepared.images, **share(distance_to, book.parameters))
        return Trainer(
            model=network,
            codec=codec,
            images=prepared.images,
            data_sha256=prepared.manifest["sha256"]["images"],
            folder=book.folder,
            measure=measure() if settings.get("fwd_kimg") else None,
            **settings,
        )

    _launch(partial(_train, make, book, show), **share(_launch, book.parameters))


def distance_to(images: np.ndarray, train_fwd_level: int = 2) -> Callable[[np.ndarray], float]:
    """What measures samples while training goes on: their Frechet wavelet distance to uint8 images (N, H, W, C)."""
    real = moments(images, haar_packets(train_fwd_level))
    return lambda samples: frechet_wavelet_distance(real, samples, train_fwd_level).value


def _launch(function: Callable[[bool], None], num_processes: int = 1) -> None:
    """Call function(forked) here, or in as many processes, as a notebook has to start them."""
    if num_processes == 1:
        return function(False)
    from accelerate import notebook_launcher

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    notebook_launcher(function, (True,), num_processes=num_processes, use_port=port)
    return None


def _train(make: Callable[[], Trainer], book: Run, show: Callable[[Step], None], forked: bool) -> None:
    if forked and not torch.cuda.is_available():
        torch.set_num_threads(1)  # the processes share the cores; OpenMP's threads do not survive a fork
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
    trainer = make()
    if not trainer.accelerator.is_main_process:
        for _ in trainer.steps():
            pass
        return
    book.begin("pipeline")
    print(*trainer.notes, sep="\n", end="\n" * bool(trainer.notes))
    bar = progress(total=trainer.total_images, initial=trainer.images_seen, desc="training", unit="img")
    with bar, closing(trainer.steps()) as steps:
        for step in steps:
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            bar.update(step.images_seen - bar.n)
            show(step)
    book.made("pipeline", book.folder / "pipeline", images_seen=trainer.images_seen)


def check(experiment: Experiment) -> None:
    """Refuse what the notebooks would only find out later: sizes that do not divide, a data set that is not there.

    Builds codec, network and solver from the parameters that are there, without memory and without weights.

    Raises:
        ValueError: as the part that refuses says it.
    """
    parameters = experiment.parameters
    tables: dict[str, Iterable[str]] = {
        "weighting": WEIGHTINGS, "schedule": SCHEDULES, "prediction_type": PREDICTION_TYPES, "backbone": BACKBONES,
    }  # fmt: skip
    for name, table in tables.items():
        if parameters.get(name) is not None:
            check_choice(name, parameters[name], table)
    if "precision" in parameters:
        resolve_precision(parameters["precision"])
    if {"dataset", "resolution"} <= parameters.keys():
        data.check_source(**share(data.check_source, parameters))
    for notebook in experiment.notebooks:
        if notebook.stem == "01_prepare":
            refuse_untaken(experiment.values(notebook), [data.prepare])
        if notebook.stem == "02_train":
            refuse_untaken(experiment.values(notebook), [WaveletCodec, build_backbone, Trainer, distance_to, _launch])
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
    if untaken := [name for name in parameters if name != "run" and name not in known]:
        raise ValueError(
            f"got a parameter {untaken[0]!r} that nothing takes, wanted each to be used: give it to what should take "
            "it, or remove it from the notebook's cell"
        )


def _network(parameters: Parameters, dataset: str, size: int, channels: int) -> ModelMixin:
    torch.manual_seed(parameters.get("seed", 0))
    given = share(build_backbone, parameters) | {"dataset": dataset, "image_size": size, "image_channels": channels}
    return build_backbone(**given)

