"""The pipeline as a user runs it: four notebooks by `wddm run` on a tiny experiment, by papermill, and interrupted."""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import local_data
import nbformat
import numpy as np
import pytest
from conftest import ROOT, as_process, dead_links, wddm
from PIL import Image

from wddm.metrics.intervals import Estimate
from wddm.steps import read_log

NAMES = ("01_prepare", "02_train", "03_sample", "04_evaluate")
TINY = {
    "train_kimg": 3.2, "warmup_kimg": 0.1, "widths": "[8, 16]", "checkpoint_kimg": 64, "batch_size": 16,
    "num_samples": 40, "sampling_steps": 3, "preview_kimg": 1.6, "limit": 200,
    "averages_kimg": 0.4, "half_lives_kimg": "[0.01, 0.3, 0.6]", "metric_images": 40,
    "metric_kimg": 1.6, "train_metrics": "['kid_efficientnet', 'fwd']", "train_fwd_level": 3,
}  # fmt: skip


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


@pytest.fixture(scope="module")
def tiny(root) -> Path:
    """reports/tiny of a finished tiny run."""
    done = wddm(root, "run", "params/quickstart.yaml", run="tiny", **TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "reports" / "tiny"


COMMITTED = [path for path in sorted(ROOT.glob("notebooks/**/*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_notebooks_are_clean_and_say_what_they_do(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any("\n## " in cell.source for cell in notebook.cells if cell.cell_type == "markdown")  # one for each
    if path.parent.name == "tutorials":
        assert all(cell.execution_count for cell in code) and any(cell.outputs for cell in code)
        return
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    first = notebook.cells[0].source
    assert first.startswith("# ")
    assert all(re.search(rf"\*\*{word}:\*\*", first) for word in ("Inputs", "Outputs", "Run it"))
    assert not any(re.search(r"^\s*(def|class) ", cell.source, re.M) for cell in code)
    links = re.findall(r"\]\((?!https:)([^)]*)\)", first)
    assert all((path.parent / link).is_file() for link in links) and (links or path.parent.name == "analysis")
    assert not code[0].metadata.get("jupyter")  # the parameters are in sight


def test_the_counts_that_a_class_could_have_begin_at_zero() -> None:
    cells = nbformat.read(ROOT / "notebooks/04_evaluate.ipynb", as_version=4).cells
    drawn: list[Estimate] = []
    plots = SimpleNamespace(beside=lambda _, grey, *rest: drawn.append(grey), distributions=lambda *_: None)
    known = {
        "plots": plots, "np": np, "Estimate": Estimate, "book": SimpleNamespace(show=lambda *_: None),
        "prepared": SimpleNamespace(class_names=None, labels=np.array([0] * 9 + [1])),
        "verdict": SimpleNamespace(class_counts={0: 3, 1: 1}, held_out=[], confidence=[], threshold=0.5),
    }  # fmt: skip
    exec(next(cell.source for cell in cells if "class_counts.items()" in cell.source), known)
    assert drawn[0].value.tolist() == pytest.approx([3.6, 0.4]) and drawn[0].low.min() == 0


def is_clean(page: str) -> None:
    assert "<details" in page and "Traceback (most" not in page and "Warning:" not in page
    assert not re.search(r"""(src|href)=["']https?://(?!arxiv)""", page)
    assert "it/s]" not in page and "img/s" not in page.replace("images/s", "")


@pytest.mark.slow
def test_a_run_leaves_everything_that_is_promised(root, tiny) -> None:
    assert {name: entry["state"] for name, entry in status(tiny).items()} == dict.fromkeys(NAMES, "ok")
    for name in NAMES:
        is_clean((tiny / f"{name}.html").read_text())
        assert (tiny / f"{name}.ipynb").exists()
    metrics = json.loads((tiny / "metrics.json").read_text())
    assert {"fwd", "fwd_floor", "classes_seen", "confident_share", "asked_share", "train_loss"} <= metrics.keys()
    assert metrics["fwd"] > metrics["fwd_floor"] > 0  # a tiny network has learned next to nothing
    log = read_log(root / "runs/tiny")
    for key in ("fwd", "kid_efficientnet"):
        measured = [row for row in log if key in row]
        assert [row["images_seen"] for row in measured] == [1600, 3200]
        for end in ("", "_low", "_high", "_floor"):
            assert metrics[f"train_{key}{end}"] == measured[-1][key + end]
        assert metrics[f"train_{key}_low"] < metrics[f"train_{key}"] < metrics[f"train_{key}_high"]
    timings = json.loads((tiny / "timings.json").read_text())
    assert timings["train_images_per_s"] > 0 and timings["sample_images_per_s"] > 0
    environment = json.loads((tiny / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["versions"]["torch"]
    samples = np.load(root / "runs/tiny/samples.npy")
    assert samples.shape == (40, 16, 16, 1) and samples.dtype == np.uint8
    assert {p.stem for p in (tiny / "figures").glob("*.png")} >= {
        "samples",
        "training",
        "trajectory",
        "spectra",
        "half-lives-fwd",
        "half-lives-kid_efficientnet",
    }
    pages = [*tiny.parent.glob("*.html"), *tiny.glob("*.html"), *tiny.parent.glob("tutorials/*.html")]
    assert len(pages) == 1 + 4 + 6 and [link for page in pages for link in dead_links(page)] == []
    assert ".ipynb" not in "".join(page.read_text().partition("<h2")[0] for page in pages)  # lessons are pages, too
    assert "got a half-life of 0.01 kimg, " in (tiny / "02_train.html").read_text()  # which is left out, and said
    assert "tiny" in (root / "reports/index.html").read_text()


@pytest.mark.slow
def test_a_flow_from_noise_to_a_report_and_from_the_command_line(root, tiny) -> None:
    """The recipe, given by -p, overrides the quickstart's values; solver and eta are not given: their defaults hold."""
    options = {"run": "flow", "recipe": "flow", "scheduler": "null", "eta": "null"} | TINY
    options |= {"half_lives_kimg": "[0.01]", "output_dir": "drawn"}  # half-lives of which none can be put together
    options |= {"num_samples": 170}  # 17 of a class, which is enough for its FWD; half of its real images is not
    done = wddm(root, "run", "params/quickstart.yaml", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((root / "runs/flow/pipeline/scheduler/scheduler_config.json").read_text())
    assert (config["_class_name"], config["prediction_type"]) == ("FlowMatchEulerDiscreteScheduler", "flow_prediction")
    for name in NAMES:
        is_clean((root / f"reports/flow/{name}.html").read_text())
    page = (root / "reports/flow/03_sample.html").read_text()
    assert "euler, 3 steps" in page and "Top: the estimate of the clean image" in page
    page = (root / "reports/flow/04_evaluate.html").read_text()
    assert "of the samples of a class" in page and "Without a floor" in page and "wanted 16 images" not in page
    (root / "drawn/mine.txt").touch()
    done = wddm(root, "run", "params/quickstart.yaml", "--only", "sample", **options | {"scheduler": "unipc"})
    assert "which is not empty" in done.stdout and (root / "drawn/00000.png").exists()  # not the run's alone
    (root / "drawn/mine.txt").unlink()
    drawn = (root / "drawn/00000.png").read_bytes()
    (root / "drawn/00000.png").write_bytes(b"of another hand")
    done = wddm(root, "run", "params/quickstart.yaml", "--only", "sample", **options | {"scheduler": "unipc"})
    assert "which is not empty" in done.stdout and (root / "drawn/00000.png").read_bytes() == b"of another hand"
    (root / "drawn/00000.png").write_bytes(drawn)
    done = wddm(root, "run", "params/quickstart.yaml", "--only", "sample", **options | {"scheduler": "unipc"})
    assert done.returncode == 0, done.stdout + done.stderr  # its own images there are replaced
    assert json.loads((root / "drawn/samples.json").read_text())["solver"] == "UniPCMultistepScheduler"
    assert "Top: the noisy image" in (root / "reports/flow/03_sample.html").read_text()
    for solver in ([], ["--scheduler", "unipc"]):
        words = ["--num-samples", 2, "--sampling-steps", 2, "--output-dir", f"flow{len(solver)}", *solver]
        done = as_process("wddm", "sample", "--model-dir", "runs/flow/pipeline", *words, root=root)
        assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    made = json.loads((root / "flow0/samples.json").read_text())
    assert (made["solver"], made["prediction_type"]) == ("FlowMatchEulerDiscreteScheduler", "flow_prediction")


@pytest.mark.slow
def test_in_jupyterlab_curves_and_previews_are_shown_while_training_goes_on(root) -> None:
    """Notebook 02 in a kernel that a JupyterLab has started: what it says first, and what is redrawn in its place."""
    values = TINY | {"preview_kimg": 0.32}
    assert wddm(root, "run", "params/quickstart.yaml", "--only", "prepare", run="live", **values).returncode == 0
    words = ["notebooks/02_train.ipynb", "run = 'live'", *(f"{name} = {value}" for name, value in values.items())]
    done = as_process(str(ROOT / "tests/watch.py"), *words, root=root, JPY_SESSION_NAME="02_train.ipynb")
    assert done.returncode == 0, done.stderr
    shown = [json.loads(line) for line in done.stdout.splitlines() if re.match(r"\[\d", line)]
    updates = [one for one in shown if one[1] == "update_display_data"]
    (cell,) = {one[0] for one in updates}
    assert (
        min(number for number, kind, *_ in shown if kind == "display_data") == 2
    )  # what it will do, before it does it
    begun = [one[3] for one in shown if one[:2] == [cell, "display_data"]]
    assert len(begun) == 3 and "application/vnd.jupyter.widget-view+json" in begun[0]  # the bar; a place for each
    places = {one[2]: sum(other[2] == one[2] for other in updates) for one in updates}
    assert len(places) == 2 and all(one[3][0] == "image/png" for one in updates)
    assert max(places.values()) > 1


@pytest.mark.slow
def test_a_second_run_skips_everything(root, tiny) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.glob("*.html")}
    began = time.monotonic()
    done = wddm(root, "run", "params/quickstart.yaml", run="tiny", **TINY)
    assert done.returncode == 0 and done.stdout.count("unchanged, skipped") == 4
    assert time.monotonic() - began < 15
    assert {path: path.stat().st_mtime_ns for path in tiny.glob("*.html")} == before


@pytest.mark.slow
def test_interrupted_and_gone_on_in_another_folder_it_gives_the_same_bytes(root, tiny) -> None:
    """Ctrl-C: exit code 130, state killed, a rendered page, a checkpoint; the next run goes on from there."""
    options = [word for name, value in {**TINY, "run": "again"}.items() for word in ("-p", f"{name}={value}")]
    command = ["wddm", "run", "params/quickstart.yaml", *options]
    log = root / "runs/again/log.jsonl"

    def interrupt(command: int) -> None:
        deadline = time.monotonic() + 600
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(command, signal.SIGINT)

    done = as_process(*command, root=root, watch=interrupt)
    assert done.returncode == 130, done.stdout + done.stderr
    report = root / "reports/again"
    assert status(report)["02_train"]["state"] == "killed" and (report / "02_train.html").exists()
    (checkpoint,) = (root / "runs/again/checkpoints").glob("step-*")
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert 0 < step < 200
    done = as_process(*command, root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        is_clean((report / f"{name}.html").read_text())
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] > step
    assert not (root / "runs/again/checkpoints-1").exists()  # what a run that began anew would have set aside
    assert f"resumed at step {step} of 200" in (report / "02_train.html").read_text()
    same = ["samples.npy", "pipeline/backbone/diffusion_pytorch_model.safetensors"]
    same += ["pipeline/codec/diffusion_pytorch_model.safetensors", "pipeline/model_index.json"]
    for name in same:
        assert (root / "runs/again" / name).read_bytes() == (root / "runs/tiny" / name).read_bytes(), name
    assert (root / "reports/again/metrics.json").read_bytes() == (tiny / "metrics.json").read_bytes()


@pytest.mark.slow
def test_plain_papermill_works_too(root, tiny) -> None:
    parameters = root / "params/papermill.yaml"
    parameters.write_text("run: tiny\nnum_samples: 8\nsampling_steps: 2\n")
    words = ["notebooks/03_sample.ipynb", "out.ipynb", "-f", parameters, "-k", "python3"]
    done = as_process("papermill", *words, root=root)
    assert done.returncode == 0, done.stderr
    assert len(np.load(root / "runs/tiny/samples.npy")) == 8


@pytest.mark.slow
def test_an_error_inside_a_notebook_is_one_line_and_a_rendered_report(root) -> None:
    (root / "pictures").mkdir(exist_ok=True)
    for number, pixels in enumerate(local_data.pictures()):  # so many that there is nothing else to refuse
        Image.fromarray(pixels).save(root / f"pictures/{number:02}.png")
    (root / "pictures/broken.png").write_bytes(b"not a picture")
    values = {"run": "broken", "dataset": "folder", "dataset_path": "pictures", "fwd_level": 3}
    done = wddm(root, "run", "params/quickstart.yaml", **values, widths="[8]")
    assert done.returncode == 1, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "01_prepare failed" in line)
    assert "broken.png" in line and "reports/broken/01_prepare.html" in line
    assert status(root / "reports/broken")["01_prepare"]["state"] == "failed"
    assert status(root / "reports/broken")["02_train"]["state"] == "pending"
    assert "broken.png" in (root / "reports/broken/01_prepare.html").read_text()
