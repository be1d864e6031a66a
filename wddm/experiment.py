"""experiment: from the parameters of a run to its prepared set, codec, network and Trainer. There is no other assembly.

A notebook's parameter goes to every function in `TAKEN_BY` that has an argument of its name; if none has, that is an
error. `BOUNDS` holds the smallest and largest allowed numbers; `check` refuses values that do not go together.
"""

import inspect
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any

import accelerate
import numpy as np
import torch
from diffusers import ModelMixin

from wddm import data, sampling
from wddm.backbones import BACKBONES, IMAGES, build_backbone
from wddm.conditions import numbered
from wddm.files import refusing
from wddm.loading import is_path
from wddm.metrics import frechet, inception, scores
from wddm.metrics.diagnostics import UnitBatches
from wddm.objective import build_solver, check_options, check_training, default_solver, set_steps
from wddm.pipeline import WaveletPipeline
from wddm.steps import PRECISIONS, SCHEDULES, averaged_weights, check_batch, held_out
from wddm.training import Step, Trainer
from wddm.wavelets import WaveletCodec, check_choice
from wddm.workbook import Run, progress, records
from wddm.workbook.experiments import Experiment

Parameters = Mapping[str, Any]

BOUNDS: dict[str, tuple[float, float]] = {  # parameter of any notebook: (minimum, maximum), of every value of a list
    name: ends
    for ends, names in {
        (0, 2**31 - 1): "seed seeds", (2, 4096): "resolution width sides", (1, 1024): "channels num_processes workers",
        (0, 8): "level levels wavelet_level fwd_level train_fwd_level", (0, 16): "attention_levels",
        (8, 1024): "hidden_channels", (1, 16): "layers_per_block", (1, 4096): "attention_head_dim", (1, 64): "answers",
        (0, 1): "eta etas", (0, 0.99): "dropout label_dropout", (0, 10**6): "reconstruction comparison_seconds labels",
        (0, 10): "weight_decay", (1e-9, 10): "learning_rate", (0.001, 10**7): "train_kimg kimg half_lives_kimg",
        (0, 10**7): "warmup_kimg ema_half_life_kimg averages_kimg checkpoint_kimg validation_kimg preview_kimg "
        "metric_kimg", (0, 100): "guidance guidance_details weights", (0.1, 10**6): "seconds", (5, 1000): "rounds",
        (1, 10**7): "limit batch_size accumulation validation_images metric_images num_samples sampling_batch_size "
        "images_per_step counts", (0.001, 10**6): "max_step_seconds max_seconds capacity_gib",
        (1, 1000): "sampling_steps detail_steps steps band_steps reference_steps sets threads", (8, 8192): "widths",
    }.items() for name in names.split()
}  # fmt: skip
OPTIONAL = ("attention_levels", "half_lives_kimg", "spacing_solvers", "band_steps")  # lists that may be empty
CHOICES: dict[str, Iterable[str]] = dict.fromkeys(("datasets", "capacity_dataset"), IMAGES)
CHOICES |= {"schedule": SCHEDULES, "precision": PRECISIONS, "backbones": BACKBONES, "train_metrics": scores.DISTANCES}
IMAGES_IN = {"digits": 1797, "patches": 10_000, "cifar10": 50_000, "stl10": 100_000, "celebahq": 30_000}


def prepare(book: Run, show: bool = True) -> data.Dataset:
    """Prepare the set that the run's parameters ask for, as notebook 01 does, and record it as the run's own."""
    refuse_impossible(book.parameters, "01_prepare")
    prepared = data.prepare(root=book.root / "data", progress=show, **share(data.prepare, book.parameters))
    book.made("data", prepared.folder / "manifest.json")
    return prepared


def build(parameters: Parameters, prepared: data.Dataset) -> tuple[WaveletCodec, ModelMixin]:
    """The codec, fitted to the images, and the network with initial weights drawn from `seed`.

    ValueError: a parameter of notebook 02 that is out of bounds or that nothing takes; what codec and network refuse.
    """
    refuse_impossible(parameters, "02_train")
    codec = WaveletCodec(**share(WaveletCodec, parameters)).fit(prepared.images)
    labels = labels_of(prepared, **share(labels_of, parameters))
    classes = 0 if labels is None else len(prepared.class_names or range(labels.max() + 1))
    return codec, _network(parameters, prepared.manifest["dataset"], prepared.images.shape[1:], classes)


def labels_of(prepared: data.Dataset, class_conditional: bool | None = None) -> np.ndarray | None:
    """Labels (N,) to train a network with, or None to train it without; ValueError if they are asked for and missing.

    None asks for them if every image has one and there are two classes or more, with ten images each on average.
    """
    labels = prepared.labels
    if class_conditional and labels is None:
        raise ValueError("got class_conditional=True for a set without labels, wanted some: set it to False")
    if class_conditional is None and labels is not None:
        class_conditional = labels.min() >= 0 and 1 < labels.max() + 1 <= len(labels) / 10
    return labels if class_conditional else None


def train(
    book: Run, prepared: data.Dataset, codec: WaveletCodec, network: ModelMixin, *,
    show: Callable[[Step], None] = lambda step: None, **options: bool,
) -> None:  # fmt: skip
    """Train the run's pipeline to the end with a progress bar, in `num_processes` processes, and record it.

    `show` is called for every `Step`, in the main process alone. `options` are `extend`, `restart` and `cpu` of the
    Trainer, whose errors this function raises.
    """
    settings = share(Trainer, book.parameters) | options

    def work(forked: bool) -> None:
        if forked and not torch.cuda.is_available():
            torch.set_num_threads(1)  # the processes share the cores; OpenMP's threads do not survive a fork
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
        if settings.get("metric_kimg"):
            settings["measure"] = distances_to(prepared, **share(distances_to, book.parameters))
            kind = {key: book.parameters[key] for key in ("train_metrics", "train_fwd_level", "metric_images")}
            settings["measured"] = str(kind)
        labels = labels_of(prepared, **share(labels_of, book.parameters))
        parts: dict[str, Any] = {"model": network, "codec": codec, "images": prepared.images, "labels": labels}
        parts |= {"data_sha256": prepared.sha256, "class_names": None if labels is None else prepared.class_names}
        trainer = Trainer(**parts, folder=book.folder, **settings)
        if not trainer.main:
            return [*trainer.steps()].clear()  # the main process shows and records
        book.begin("pipeline")
        print(*trainer.notes, sep="\n", end="\n" * bool(trainer.notes))
        total = trainer.total_steps * trainer.batch_size
        bar = progress(total=total, initial=trainer.images_seen, desc="training", unit="img")
        trainer.on_step = lambda images_seen: bar.update(images_seen - bar.n)
        with bar, closing(trainer.steps()) as steps:
            for step in steps:
                bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
                show(step)
        book.made("pipeline", book.folder / "pipeline", images_seen=trainer.images_seen)

    if (processes := book.parameters["num_processes"]) == 1:
        work(False)
    else:  # as a notebook has to, in forks of this process
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        accelerate.notebook_launcher(work, (True,), num_processes=processes, use_port=port)


def distances_to(
    prepared: data.Dataset, train_metrics: Sequence[str] = ("fwd",), train_fwd_level: int | None = None, seed: int = 0
) -> Callable[[np.ndarray], dict[str, float]]:
    """A function that measures samples, uint8 (N, H, W, C), in training: these distances, with intervals and floors."""
    options = scores.Options(train_fwd_level, seed, "cuda" if torch.cuda.is_available() else "cpu")
    measure = partial(scores.distances, train_metrics, reference=prepared, options=options)
    return lambda samples: {key: x for score in measure(samples) for key, x in score.record().items()}


def by_half_life(
    book: Run, prepared: data.Dataset, half_lives_kimg: Sequence[float], metric_images: int = 512
) -> list[dict[str, float]]:
    """For each half-life (thousand images): distances of samples drawn with the average of weights of that half-life,
    computed from the averages that `averages_kimg` kept. A half-life that they cannot give is printed and left out.
    """
    pipeline, rows = WaveletPipeline.from_pretrained(book.folder / "pipeline"), []
    pipeline.set_progress_bar_config(disable=True)
    measure = distances_to(prepared, **share(distances_to, book.parameters))
    for half_life in half_lives_kimg:
        try:
            pipeline.backbone.load_state_dict(averaged_weights(book.folder, half_life), strict=False)
        except ValueError as error:
            print(error)
            continue
        samples = np.concatenate(list(sampling.sample_images(pipeline, metric_images, num_inference_steps=25)))
        rows.append({"half_life_kimg": half_life} | measure(samples))
    return rows


TAKEN_BY: dict[str, list[Callable]] = {  # notebook: the functions that take its parameters
    "01_prepare": [data.prepare],
    "02_train": [WaveletCodec, build_backbone, Trainer, distances_to, check_batch, labels_of, by_half_life],
}


def check(experiment: Experiment) -> None:
    """ValueError, before anything runs, for what the notebooks would only find out later: a line for every fault."""
    check_bounds(experiment.parameters)  # the checks below expect numbers in bounds
    problems: list[str] = []
    for part in (_check_options, _check_images, _check_conditions, _check_folders):
        try:
            part(experiment, experiment.parameters)
        except ValueError as error:
            problems += str(error).splitlines()
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))


def check_bounds(parameters: Parameters) -> None:
    """ValueError, with a line for every value outside `BOUNDS` and for every empty list that is not OPTIONAL."""
    problems = [f"got {x}=[], wanted some: change {x}" for x in parameters if x not in OPTIONAL and parameters[x] == []]
    for name, (low, high) in BOUNDS.items():
        wrong = [v for v in _listed(parameters.get(name)) if not isinstance(v, str) and not low <= v <= high]
        problems += [f"got {name}={str(value)[:20]}, wanted {low:g} to {high:g}: change {name}" for value in wrong]
    if problems:
        raise ValueError("\n".join(problems))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _check_options(experiment: Experiment, given: Parameters) -> None:
    """Refuse names that no table has, parameters that nothing takes, indivisible batches, options a solver lacks."""
    for name, table in CHOICES.items():
        for value in _listed(given.get(name)):
            check_choice(name, value, table)
    for notebook in experiment.notebooks:
        refuse_impossible(experiment.values(notebook), notebook.stem)
    for function, name in ((check_batch, "accumulation"), (check_training, "weighting")):
        if name in given:
            function(**share(function, given))
    for name in given.get("solvers", []) + given.get("spacing_solvers", []):
        build_solver(name, spacing=given.get("spacing"))
    if "scheduler" in given:
        predicts = given.get("prediction_type") or "epsilon"
        solver = given["scheduler"] or default_solver(predicts)
        set_steps(build_solver(solver, predicts, spacing=given.get("spacing")), given.get("sampling_steps", 1))
        check_options(solver, **share(check_options, given))
    if experiment.is_summary:  # its runs take hours
        if (metric := given.get("metric", "").removeprefix("train_")) in scores.DISTANCES:
            scores.check(metric, 3)
        if given.get("reference") and "*" not in "".join(given["runs"]):
            check_choice("reference", given["reference"], dict.fromkeys(records.variants(given["runs"]).values()))


def _check_images(experiment: Experiment, given: Parameters) -> None:
    """Check source, codec and network (built without memory for weights), and what depends on the number of images."""
    name, height = given.get("dataset"), given.get("resolution")
    if name is None or height is None:
        return
    checked, labels = data.check_source(**share(data.check_source, given)), given.get("labels") or []
    asked = not given.get("model_dir") and (labels or given.get("guidance", 1) != 1)  # labels of the run's own network
    count, channels = IMAGES_IN.get(name, 10**9), IMAGES.get(name, (0, 3))[1]
    if given.get("dataset_path") or (asked and name in ("digits", "patches", "emoji")):  # at hand
        opened = data.opened(*checked)
        rows, names = np.arange(min(opened.count, 256)), opened.class_names
        count, channels = opened.count, data.channels_of(opened, rows)
        few = len(names or ()) > min(count, given.get("limit") or count) / 10  # as `labels_of` has it
        if asked and given.get("class_conditional") is None and (few or min(x for _, x, _ in opened.read(rows)) < 0):
            raise ValueError("got labels or guidance, wanted a set of labels, ten images to each: leave them out")
        if asked and names and max(numbered(labels, names), default=0) >= len(names):
            raise ValueError(f"got labels={labels}, wanted 0 to {len(names) - 1}, the set's: change labels")
        if other := given.get("held_out_split"):
            data.opened(*data.check_source(**share(data.check_source, dict(given, split=other))))
    count = min(count, given.get("limit") or count)
    shape = height, given.get("width") or height, given.get("channels") or channels
    with torch.device("meta"):
        if "wavelet" in given:
            WaveletCodec(**share(WaveletCodec, given)).check_size(*shape[:2])
        if "backbone" in given:
            _network(given, name, shape, given.get("class_conditional") or 0)
    if given.get("validation_kimg"):
        held_out(given["validation_images"], count)
    if {"fwd_level", "num_samples"} <= given.keys():
        _check_packets("fwd_level", "num_samples", given, shape, count)
    asked = [given["metric"]] if "solvers" in given else []
    if given.get("metric_kimg") or given.get("averages_kimg"):
        asked += given["train_metrics"]
        _check_packets("train_fwd_level", "metric_images", given, shape, count)
    for metric in asked:
        scores.check(metric, shape[2])


def _check_packets(level: str, samples: str, given: Parameters, shape: tuple[int, int, int], count: int) -> None:
    """ValueError if the Frechet wavelet distance at given[level] needs other sides, more samples or a larger set."""
    depth, size = frechet.packet_level(shape, given[level]), "x".join(map(str, shape))
    for images, remedy in ((given[samples], f"raise {samples}"), (count, "take more images (limit)")):
        with refusing(f"{level}={depth} for images of {size}", "enough of them", f"{remedy}, or change {level}"):
            frechet.check(UnitBatches(np.broadcast_to(np.uint8(0), (images, *shape))), depth)


def _check_conditions(experiment: Experiment, given: Parameters) -> None:
    """Refuse labels, guidance or detail steps that the run's own network lacks; other networks are checked later."""
    if given.get("model_dir") or not {"labels", "class_conditional"} <= given.keys():
        return
    labels, guidance, told = (given[name] for name in ("labels", "guidance", "class_conditional"))
    kind, level = given["model_type"] or given["backbone"], given["wavelet_level"]
    if told is None:  # assume labels, but for sets whose labels are not known before they are fetched
        told = given.get("dataset_path") or given.get("dataset") not in ("stl10", "celebahq")
    for wrong, got, remedy in (
        (not told and (labels or guidance != 1), "labels or guidance", "class_conditional=True: or leave them out"),
        (guidance != 1 and not given["label_dropout"], "guidance and label_dropout=0", "0.1: or leave guidance out"),
        (given["detail_steps"] and not given["level"], "detail_steps at level 0", "detail bands: leave it out"),
        (kind.lower() != given["backbone"].lower(), f"model_type={kind}", f"{given['backbone']}: leave model_type out"),
        (level not in (None, given["level"]), f"wavelet_level={level}", f"{given['level']}: leave wavelet_level out"),
    ):
        if wrong:
            raise ValueError(f"got {got}, wanted {remedy}")


def _check_folders(experiment: Experiment, given: Parameters) -> None:
    """Refuse a missing checkpoint that no YAML makes, weights that are not Inception's, a used `output_dir`."""
    model, output = (os.path.expanduser(given.get(name) or "") for name in ("model_dir", "output_dir"))
    root, run = experiment.root, re.match("runs/([^/]+)/", model)
    there, made = os.path.isdir(root / model), run and (root / "params" / f"{run[1]}.yaml").exists()
    holds = any(map(os.path.isfile, (root / model / "model_index.json", root / model / "config.json")))
    if model and not (made or holds or ("/" in model and not is_path(model))):  # a repository on the Hub
        got = f"got model_dir={model[:200]}, which {'holds no checkpoint' if there else 'is not there'}"
        raise ValueError(f"{got}, wanted a folder with one, from {root}: give another")
    if given.get("inception_weights") is not None:
        inception.find_weights(given["inception_weights"])
    before = records.read_record(root, experiment.run).get("samples", {}).get("parameters", {}).get("output_dir")
    with suppress(FileNotFoundError):
        full = os.path.isfile(root / output) or any(os.scandir(root / output))  # OSError: no folder can be made there
        if full and given.get("output_dir") not in (None, before):
            raise ValueError(f"got output_dir={output}, which is not empty, wanted a new folder: give another")


def share(function: Callable, parameters: Parameters) -> dict[str, Any]:
    """The parameters that a function has an argument for."""
    return {name: parameters[name] for name in inspect.signature(function).parameters if name in parameters}


def refuse_impossible(parameters: Parameters, notebook: str) -> None:
    """ValueError if a parameter is out of bounds, or none of the functions that the notebook calls takes it."""
    check_bounds(parameters)
    functions = TAKEN_BY.get(notebook, [])
    known = {name for function in functions for name in inspect.signature(function).parameters}
    if functions and (untaken := parameters.keys() - known - {"run"}):
        raise ValueError(f"got a parameter {min(untaken)!r} that nothing takes: remove it from the notebook's cell")


def _network(parameters: Parameters, dataset: str, shape: tuple[int, ...], classes: int) -> ModelMixin:
    """The network for images of this shape (H, W, C) and so many classes, with initial weights drawn from `seed`."""
    torch.manual_seed(parameters.get("seed", 0))
    given = share(build_backbone, parameters) | {"dataset": dataset}
    given |= {"image_size": shape[:2], "image_channels": shape[2]}
    return build_backbone(**given | ({"num_class_embeds": classes + 1} if classes else {}))
