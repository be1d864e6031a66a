"""cards: the README.md of a published pipeline, from what its run recorded; it says what was not recorded."""

import shlex
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from wddm.files import read_json
from wddm.objective import default_eta, default_solver

TEMPLATE = Path(__file__).with_name("card.md.j2")


def card_of(pipeline: DiffusionPipeline, name: str, report: str | Path | None) -> str:
    """The card from `report`, or from the report of the run that the pipeline was loaded from, or else its own card."""
    folder = Path(pipeline.config.get("_name_or_path") or "nowhere")
    run = folder.resolve().parent
    beside = run.parents[1] / "reports" / run.name if run.parent.name == "runs" else run
    if report is None and (beside / "params.yaml").is_file():
        report = beside
    if report is None and (folder / "README.md").is_file():
        return (folder / "README.md").read_text(encoding="utf-8")
    return model_card(pipeline, name, Path(report) if report else None)


def model_card(pipeline: DiffusionPipeline, name: str, report: Path | None) -> str:
    """The card of a `WaveletPipeline`, Markdown under YAML metadata.

    `name`: the Hub repository or folder that it will be loaded from. `report`: a folder reports/<run>, in which only
    params.yaml must be present (ValueError); None: nothing was recorded.
    """
    if report and not (report / "params.yaml").is_file():
        raise ValueError(f"got report={report}, which has no params.yaml, wanted reports/<run>: give a run's report")
    run, metrics, data, made_with = recorded(report.resolve()) if report else ({}, {}, {}, {})
    network, codec, task = pipeline.backbone, pipeline.codec.config, "unconditional-image-generation"
    predicts = pipeline.scheduler.config.prediction_type
    if "sampling_steps" in run:  # with the defaults of notebook 03
        solver = run.get("scheduler") or default_solver(predicts)
        run = {"scheduler": solver, "eta": default_eta(solver)} | run
    classes = (network.config.get("num_class_embeds") or 1) - 1
    names = ", ".join(pipeline.config.get("class_names") or [])
    model = {
        "backbone": type(network).__name__, "parameters": f"{network.num_parameters():,}", "predicts": predicts,
        "coefficients": " x ".join(map(str, (network.config.in_channels, *pipeline.map_size))),
        "codec": ", ".join(f"{key} {codec[key]}" for key in ("wavelet", "level", "transform", "scaling")),
        "labels": f"0 to {classes - 1}" + f": {names}" * bool(names) if classes else "none",
    }  # fmt: skip
    source = str(data.get("source", data.get("dataset", "unknown")))
    results = [EvalResult(task, "image", source, *distance) for distance in known(metrics, "fid", "kid", "fwd").items()]
    about: dict[str, Any] = {"license": "apache-2.0", "library_name": "diffusers", "pipeline_tag": task}
    about |= {"model_name": name.split("/")[-1], "eval_results": results} if results else {}
    about |= {"datasets": [source.split("@")[0]]} if "revision" in data else {}  # on the Hub
    tables = {"Data": data, "Model": model, "Parameters": run, "Metrics": metrics, "Made with": made_with}
    card_data, template = ModelCardData(tags=["wavelets", "wddm"], **about), TEMPLATE.read_text(encoding="utf-8")
    filled: dict[str, Any] = {"name": name, "run": run, "tables": tables, "quoted": shlex.quote(name)}
    return str(ModelCard.from_template(card_data, template_str=template, **filled))


def recorded(report: Path) -> tuple[dict[str, Any], ...]:
    """What a run recorded: its parameters, its metrics, its data set, and what it was made with."""
    parameters = yaml.safe_load((report / "params.yaml").read_text(encoding="utf-8"))
    metrics, environment = read_json(report / "metrics.json"), read_json(report / "environment.json")
    record = read_json(report.parents[1] / "runs" / report.name / "record.json")
    for entry in record.values():  # the latest values, if a notebook was run again
        parameters |= {name: x for name, x in entry.get("parameters", {}).items() if name in parameters}
    drawn_by = record.get("samples", {}).get("from", {}).get("pipeline")
    metrics = metrics if drawn_by == record.get("pipeline", {}).get("sha256") else {}  # others are of another network
    manifest = read_json(report.parents[1] / record.get("data", {}).get("path", "nowhere"))
    data = known(parameters, "dataset", "resolution") | known(manifest, "source", "revision", "split", "count")
    data |= {} if "revision" in data or "source" not in data else {"source": Path(data["source"]).name}
    public = [name for name in parameters if not name.endswith(("_path", "_dir"))]  # paths are of one machine
    versions = known(environment.get("versions", {}), "wddm", "torch", "diffusers")
    trained = environment | read_json(report / "status.json").get("02_train", {})
    return known(parameters, *public), metrics, data, known(trained, "commit", "device") | versions


def known(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """The entries of `values` that have one of these names and are not None."""
    return {name: values[name] for name in names if values.get(name) is not None}
