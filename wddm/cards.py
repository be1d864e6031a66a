"""cards: the README.md of a published pipeline, from what its run left in reports/<run>/ and data/.

What is not known is said to be not recorded; no number is put in its place.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCardData

PROTOCOL = ("num_samples", "scheduler", "sampling_steps", "detail_steps", "eta", "spacing", "seed", "fwd_level")
PLACES = ("run", "dataset", "resolution", "dataset_path", "model_dir", "output_dir", "checkpoint_kimg")
SIZES = ("parameters", "images", "image_bytes", "samples", "sampling_steps")  # of metrics.json, that stand elsewhere

LOAD = """```python
from wddm.pipeline import WaveletPipeline

pipe = WaveletPipeline.from_pretrained("{name}")
images = pipe(batch_size=16, num_inference_steps={sampling_steps}, eta={eta}).images
```

```bash
wddm sample --model-dir {name} --output-dir samples {flags}
```"""


def find_report(folder: str | Path) -> Path | None:
    """reports/<run> of a pipeline in runs/<run>/pipeline, if it is there."""
    run = Path(folder).resolve().parent
    report = run.parents[1] / "reports" / run.name if run.parent.name == "runs" else run
    return report if (report / "params.yaml").is_file() else None


def model_card(pipeline: DiffusionPipeline, name: str, report: Path | None, license: str = "apache-2.0") -> str:
    """The card, Markdown under YAML metadata.

    Args:
        pipeline: a `WaveletPipeline`.
        name: of the Hub repository or folder that it will be loaded from.
        report: reports/<run> with params.yaml, metrics.json and environment.json, of which any may be absent.

    Raises:
        ValueError: `report` is given and has no params.yaml.
    """
    if report is not None and not (report / "params.yaml").is_file():
        raise ValueError(f"got report={report}, which has no params.yaml, wanted reports/<run>: give a run's report")
    parameters, metrics, data, environment = _records(report)
    network, codec = pipeline.backbone, pipeline.codec
    given = {key: value for key, value in parameters.items() if value is not None}
    recipe = {key: value for key, value in given.items() if key not in (*PROTOCOL, *PLACES)}
    model = {
        "backbone": type(network).__name__,
        "parameters": f"{network.num_parameters():,}",
        "widths": ", ".join(map(str, network.config.block_out_channels)),
        "images": f"{pipeline.image_size} x {pipeline.image_size} pixels",
        "coefficients": f"{network.config.in_channels} channels, side {network.config.sample_size}",
        "codec": ", ".join(f"{k} {codec.config[k]}" for k in ("wavelet", "level", "transform", "scaling")),
        "predicts": pipeline.scheduler.config.prediction_type,
    }
    load = {"name": name, "sampling_steps": given.get("sampling_steps", 50), "eta": given.get("eta", 0.0)}
    flags = {key: given[key] for key in ("scheduler", "sampling_steps", "eta", "spacing") if key in given}
    load["flags"] = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in flags.items())
    parts = (
        f"---\n{_metadata(name, data, metrics, license).to_yaml()}\n---\n\n# {name.split('/')[-1]}",
        "Unconditional diffusion on wavelet coefficients, made with wddm.",
        "## How to load\n\n" + LOAD.format(**load),
        "## Data\n\n" + _table(data),
        "## Model\n\n" + _table(model),
        "## Recipe\n\n" + _table(recipe),
        "## Metrics\n\n" + _table({key: value for key, value in metrics.items() if key not in SIZES}),
        "Numbers compare with others only at the same protocol; Fréchet distances depend on the number of images.",
        "## Protocol\n\n" + _table({key: given[key] for key in PROTOCOL if key in given} | environment),
    )
    return "\n\n".join(parts) + "\n"


def _records(report: Path | None) -> tuple[dict, dict, dict, dict]:
    """Parameters, metrics, data set and environment of a run, empty where nothing is recorded."""
    if report is None:
        return {}, {}, {}, {}
    parameters = yaml.safe_load((report / "params.yaml").read_text())
    metrics, environment = (_read(report / f"{name}.json") for name in ("metrics", "environment"))
    data = {key: parameters[key] for key in ("dataset", "resolution") if key in parameters}
    if len(data) == 2:
        manifest = _read(
            report.resolve().parents[1] / "data" / "{dataset}-{resolution}".format(**data) / "manifest.json"
        )
        data |= {key: manifest[key] for key in ("source", "revision", "split", "count") if manifest.get(key)}
    made = {key: environment[key] for key in ("commit", "device") if environment.get(key)}
    versions = environment.get("versions", {})
    made |= {key: versions[key] for key in ("wddm", "torch", "diffusers") if versions.get(key)}
    return parameters, metrics, data, made


def _metadata(name: str, data: dict, metrics: dict, license: str) -> ModelCardData:
    dataset = str(data.get("source", data.get("dataset", "unknown")))
    results = [
        EvalResult("unconditional-image-generation", "image", dataset, metric, metrics[metric])
        for metric in ("fid", "kid", "fwd")
        if metrics.get(metric) is not None
    ]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["wavelets", "wddm"],
        datasets=[dataset.split("@")[0]] if dataset.count("/") == 1 else None,
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}


def _table(values: dict[str, Any]) -> str:
    if not values:
        return "Not recorded."
    rows = (f"| {key} | {f'{value:.5g}' if isinstance(value, float) else value} |" for key, value in values.items())
    return "\n".join(("| | |", "|---|---|", *rows))
