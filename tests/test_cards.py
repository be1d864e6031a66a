"""The card says what the run recorded, and only that; what is uploaded loads again."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from test_conditions import conditional_pipeline

from wddm.backbones import build_backbone
from wddm.cards import model_card
from wddm.objective import build_solver
from wddm.pipeline import WaveletPipeline, is_path
from wddm.wavelets import WaveletCodec

PARAMETERS = {"run": "mine", "dataset": "digits", "resolution": 16, "limit": None, "level": 1, "learning_rate": 0.002}
PARAMETERS |= {
    "prediction_type": "v_prediction",
    "num_samples": 512,
    "scheduler": "heun",
    "sampling_steps": 7,
    "seed": 3,
}
MANIFEST = {"source": "me/digits@abc", "revision": "abc", "split": "train", "count": 1797}


@pytest.fixture
def pipeline(tmp_path) -> WaveletPipeline:
    """A pipeline loaded from runs/mine/pipeline of a workbook that recorded its run."""
    backbone = build_backbone("unet", dataset="digits", level=1, widths=(16, 32)).eval()
    folder = tmp_path / "runs" / "mine" / "pipeline"
    codec = WaveletCodec(scaling="dyadic")
    WaveletPipeline(backbone, build_solver("ddim", "v_prediction"), codec).save_pretrained(folder)
    report, data = tmp_path / "reports" / "mine", tmp_path / "data" / "digits-16-0a1b2c"
    report.mkdir(parents=True), data.mkdir(parents=True)
    (report / "params.yaml").write_text(yaml.safe_dump(PARAMETERS))
    (report / "metrics.json").write_text(json.dumps({"fwd": 0.0155, "images": 1797}))
    (report / "environment.json").write_text(json.dumps({"commit": "abc123", "versions": {"torch": "2.14.1"}}))
    (folder.parent / "record.json").write_text(json.dumps({"data": {"path": "data/digits-16-0a1b2c/manifest.json"}}))
    (data / "manifest.json").write_text(json.dumps(MANIFEST))
    return WaveletPipeline.from_pretrained(folder)


def test_the_card_says_what_the_run_recorded(pipeline, tmp_path) -> None:
    card = ModelCard(model_card(pipeline, "me/digits-model", tmp_path / "reports" / "mine"))
    assert card.data.library_name == "diffusers" and card.data.datasets == ["me/digits"]
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("fwd", 0.0155)]
    count = f"{pipeline.backbone.num_parameters():,}"
    rows = ["dataset | digits", "split | train", f"parameters | {count}", "learning_rate | 0.002", "fwd | 0.0155"]
    rows += ["num_samples | 512", "scheduler | heun", "seed | 3", "commit | abc123", "torch | 2.14.1"]
    assert [row for row in rows if f"| {row} |" not in card.text] == []
    assert 'from_pretrained("me/digits-model")' in card.text and "num_inference_steps=7" in card.text
    assert "--scheduler heun --sampling-steps 7" in card.text


def test_the_card_of_a_network_that_was_trained_again_has_no_numbers_of_the_one_before(pipeline, tmp_path) -> None:
    """JupyterLab and `wddm train` leave the report as it is. Nor has it numbers of samples from another network."""
    file, report = tmp_path / "runs/mine/record.json", tmp_path / "reports/mine"
    record = json.loads(file.read_text()) | {
        "pipeline": {"parameters": {"learning_rate": 0.002}, "from": {}, "sha256": "first"},
        "samples": {"parameters": {"sampling_steps": 7}, "from": {"pipeline": "first"}, "sha256": "s"},
    }
    file.write_text(json.dumps(record))
    assert "| fwd | 0.0155 |" in model_card(pipeline, "me/model", report)
    record["pipeline"] |= {"parameters": {"learning_rate": 0.01}, "sha256": "second"}
    file.write_text(json.dumps(record))
    card = model_card(pipeline, "me/model", report)
    assert "| learning_rate | 0.01 |" in card and "0.0155" not in card


def test_the_card_names_the_solver_that_was_taken_where_none_was_named(pipeline, tmp_path) -> None:
    report = tmp_path / "reports" / "mine"
    (report / "params.yaml").write_text(yaml.safe_dump(PARAMETERS | {"scheduler": None, "eta": None}))
    assert "--scheduler ddim --sampling-steps 7 --eta 1.0" in model_card(pipeline, "me/model", report)
    pipeline.scheduler = build_solver("euler", "flow_prediction")
    card = model_card(pipeline, "me/model", report)
    assert "--scheduler euler --sampling-steps 7 --eta 0.0" in card and "| predicts | flow_prediction |" in card


def test_the_card_says_which_labels_there_are(pipeline) -> None:
    card = model_card(conditional_pipeline(), "me/model", None)
    assert "| labels | 0 to 2 |" in card and ", labels=0, eta" in card
    assert "| labels | 0 to 2: a, b, c |" in model_card(conditional_pipeline(["a", "b", "c"]), "me/model", None)
    assert "| labels | none |" in model_card(pipeline, "me/model", None)


def test_a_folder_of_images_is_no_data_set_of_the_hub_and_its_place_stays_private(pipeline, tmp_path) -> None:
    file = tmp_path / "data/digits-16-0a1b2c/manifest.json"
    for place in ("ann/photographs", "/home/ann/photographs"):
        file.write_text(json.dumps(MANIFEST | {"source": place, "revision": None}))
        card = ModelCard(model_card(pipeline, "me/model", tmp_path / "reports" / "mine"))
        assert card.data.datasets is None and card.data.eval_results[0].dataset_name == "photographs"
        assert "| source | photographs |" in card.text and "ann" not in card.text


def test_the_commands_of_the_card_run_as_they_stand(pipeline, tmp_path) -> None:
    """In a folder with a space in its name, with the guidance of the run; a class name leaves its table whole."""
    report = tmp_path / "reports" / "mine"
    assert "guidance" not in model_card(pipeline, "me/model", report)
    (report / "params.yaml").write_text(yaml.safe_dump(PARAMETERS | {"guidance": 1.5}))
    card = model_card(conditional_pipeline(["a", "b|c", "d"]), "my models/one", report)
    assert "--model-dir 'my models/one' --output-dir" in card and "--guidance 1.5\n```" in card
    assert ", guidance=1.5).images" in card and "| labels | 0 to 2: a, b\\|c, d |" in card


def test_what_is_not_recorded_is_said(pipeline) -> None:
    card = model_card(pipeline, "me/model", None)
    assert card.count("Not recorded.") == 4 and "model-index" not in card
    assert f"{pipeline.backbone.num_parameters():,}" in card


def test_push_writes_weights_and_card_to_a_folder(pipeline, tmp_path) -> None:
    (tmp_path / "hub").mkdir()
    pipeline.push_to_hub(str(tmp_path / "hub"))
    assert "| fwd | 0.0155 |" in (tmp_path / "hub" / "README.md").read_text()  # its report was found
    assert WaveletPipeline.from_pretrained(tmp_path / "hub").image_size == 16


def test_push_to_a_folder_of_the_home_folder(pipeline, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    pipeline.push_to_hub("~/model")
    assert WaveletPipeline.from_pretrained("~/model").image_size == 16 and not (tmp_path / "~").exists()


def test_a_folder_is_told_from_a_repository_by_its_name(pipeline, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("./new", "mine/new", "a/deep/folder", str(tmp_path / "a" / "b")):
        assert pipeline.push_to_hub(name) == name
        assert (Path(name) / "README.md").is_file()
        texts = [file.read_text() for file in Path(name).rglob("*.json")]
        assert len(texts) == 4 and str(tmp_path) not in "".join(texts)  # where it was loaded from is nobody's business
        assert all(isinstance(json.loads(text), dict) for text in texts)
    assert [is_path(name) for name in ("me/new", "other", "reports/other", "mine")] == [False, False, True, True]


def test_a_model_that_ships_keeps_its_card(tmp_path) -> None:
    folder = ROOT / "notebooks" / "models" / "digits"
    shipped = WaveletPipeline.from_pretrained(folder)
    shipped.push_to_hub(str(tmp_path / "hub"))
    assert (tmp_path / "hub" / "README.md").read_text() == (folder / "README.md").read_text()
    assert "Not recorded." not in (tmp_path / "hub" / "README.md").read_text()


def test_push_uploads_the_same_to_the_hub(pipeline, tmp_path, monkeypatch) -> None:
    class Hub:
        def __init__(self, token=None) -> None:
            pass

        def create_repo(self, name, *, private, exist_ok):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("wddm.pipeline.HfApi", Hub)
    assert pipeline.push_to_hub("digits").endswith("me/digits")
    assert 'from_pretrained("me/digits")' in (tmp_path / "me/digits/README.md").read_text()
    assert WaveletPipeline.from_pretrained(tmp_path / "me/digits").image_size == 16


def test_a_report_that_is_none_is_refused(pipeline, tmp_path) -> None:
    (tmp_path / "hub").mkdir()
    with pytest.raises(ValueError, match=r"has no params\.yaml, wanted reports"):
        pipeline.push_to_hub(str(tmp_path / "hub"), report=tmp_path)
    assert list((tmp_path / "hub").iterdir()) == []
