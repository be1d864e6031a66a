"""Ten images whatever the batch size, from our pipelines and published checkpoints; contradictions are refused."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, as_process, launcher
from PIL import Image
from test_conditions import conditional_pipeline
from test_ukan import write_published

from wddm.backbones import build_backbone
from wddm.cli import main
from wddm.objective import build_solver
from wddm.pipeline import WaveletPipeline
from wddm.sampling import open_pipeline
from wddm.ukan import UKANModel
from wddm.wavelets import WaveletCodec


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A pipeline folder as training leaves it."""
    torch.manual_seed(0)
    backbone = build_backbone("unet", dataset="digits", level=1, widths=(16, 32)).eval()
    folder = tmp_path_factory.mktemp("pipeline")
    codec = WaveletCodec(scaling="dyadic")
    codec.clip_value.fill_(5.0)
    WaveletPipeline(backbone, build_solver("ddim", "v_prediction", codec=codec), codec).save_pretrained(folder)
    return folder


def sample(folder, out, *options: object) -> int:
    return main(["sample", "--model-dir", str(folder), "--output-dir", str(out), *map(str, options)])


def pixels(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


@pytest.fixture(scope="module")
def chaotic(tmp_path_factory):
    """A network of random numbers in place of the published one: it magnifies every rounding."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ukan")
    UKANModel(16, 12, 12, (32, 64)).save_pretrained(folder)
    return folder


def test_all_images_are_written_and_say_how_they_were_made(ours, tmp_path, capsys) -> None:
    assert sample(ours, tmp_path, "--num-samples", 10, "--batch-size", 4, "--sampling-steps", 3, "--seed", 5) == 0
    assert "100%" in capsys.readouterr().out
    drawn = pixels(tmp_path)
    assert drawn.shape == (10, 16, 16) and len(np.unique(drawn.reshape(10, -1), axis=0)) == 10
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (grid[:16, 17:33, 0] == drawn[1]).all()
    made = json.loads((tmp_path / "samples.json").read_text())
    assert made["seeds"] == [5, 14] and made["num_inference_steps"] == 3 and made["prediction_type"] == "v_prediction"


def same_files(one, other) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def test_the_files_are_the_same_bytes_whatever_the_batch_size(chaotic, tmp_path) -> None:
    for size in (1, 3, 10):
        out = tmp_path / str(size)
        assert sample(chaotic, out, "--num-samples", 10, "--batch-size", size, "--sampling-steps", 12) == 0
    assert same_files(tmp_path / "1", tmp_path / "3") and same_files(tmp_path / "1", tmp_path / "10")
    assert sample(chaotic, tmp_path / "fewer", "--num-samples", 7, "--sampling-steps", 12) == 0
    assert np.array_equal(pixels(tmp_path / "fewer"), pixels(tmp_path / "1")[:7])


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(chaotic, tmp_path, capsys) -> None:
    flags = ["--num-samples", "20", "--sampling-steps", "12", "--eta", "1"]
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as each of the two takes
    try:
        assert sample(chaotic, tmp_path / "one", *flags) == 0
    finally:
        torch.set_num_threads(threads)
    words = ["--model-dir", chaotic, "--output-dir", tmp_path / "two", *flags]
    done = as_process(*launcher(), "wddm", "sample", *words, root=ROOT)
    assert done.returncode == 0, done.stderr
    for shown, batches in ((capsys.readouterr().out, 3), (done.stdout, 2)):  # of 8 images: 3, or 2 and 1
        assert shown.count("20 images") == 1 and f"/{batches} [" in shown
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_a_published_checkpoint_with_the_flags_of_the_paper(published, tmp_path) -> None:
    flags = "--model-type ukan --num-samples 2 --batch-size 2 --scheduler ddim --sampling-steps 2 --eta 0.0"
    flags += " --prediction-type epsilon --wavelet-level 1 --resolution 32 --seed 0"
    assert sample(published / "checkpoint", tmp_path / "given", *flags.split()) == 0
    assert sample(published / "checkpoint", tmp_path / "read", "--num-samples", 2, "--sampling-steps", 2) == 0
    assert pixels(tmp_path / "given").shape == (2, 32, 32, 3)
    assert np.array_equal(pixels(tmp_path / "given"), pixels(tmp_path / "read"))


@pytest.fixture(scope="module")
def published_format(tmp_path_factory):
    """A checkpoint of random numbers as the published ones are laid out."""
    folder = tmp_path_factory.mktemp("published") / "checkpoint"
    write_published(folder, 12, T=1000, ch=32, ch_mult=[1], num_res_blocks=1, sample_size=8)
    return folder


def test_the_papers_own_commands_work_as_they_stand(published_format, tmp_path, monkeypatch) -> None:
    """With a few steps, in any case; and the exact words are understood."""
    monkeypatch.chdir(tmp_path)
    words = "sample --model-dir M --output-dir ./generated-images --model-type UKAN --num-samples 2 --scheduler"
    words += " {} --sampling-steps {} --prediction-type {}"
    shutil.copytree(published_format, "M")
    for solver, steps, prediction in (("ddpm", 3, "epsilon"), ("DDIM", 2, "Epsilon")):
        assert main(words.format(solver, steps, prediction).split()) == 0
        assert pixels(Path("generated-images")).shape == (2, 16, 16, 3)
        shutil.rmtree("generated-images")
    asked = []
    monkeypatch.setattr("wddm.sampling.draw", lambda pipeline, *_, **options: asked.append((pipeline, options)))
    for solver, steps in (("ddpm", 1000), ("ddim", 50)):
        assert main(words.format(solver, steps, "epsilon").split()) == 0
        pipeline, options = asked.pop()
        assert type(pipeline.scheduler).__name__ == f"{solver.upper()}Scheduler"
        assert options["num_inference_steps"] == steps and pipeline.scheduler.config.prediction_type == "epsilon"


HUGE, NESTED = int("9" * 400), [None, [None, {"a": [None]}]]
BACKBONE, CODEC, SOLVER = "backbone/config.json", "codec/config.json", "scheduler/scheduler_config.json"
HOSTILE = [  # file of a pipeline folder, entry, value
    *((BACKBONE, "_class_name", value) for value in ("os.system", "Popen", ["UNet2DModel"], None, 3, "AutoencoderKL")),
    *((BACKBONE, "sample_size", value) for value in ("8", 8.5, 0, -8, [], [8], [8, 8, 8], NESTED, HUGE, None, True)),
    *((BACKBONE, "block_out_channels", value) for value in (16, [], ["16", "32"], NESTED, [HUGE, 1], [16, -32], {})),
    *((BACKBONE, "layers_per_block", value) for value in (10**9, -1, "2", [2], None, 1e300)),
    *((BACKBONE, "in_channels", value) for value in ([4], HUGE, 0, "4", None, 16)),
    *((BACKBONE, "norm_num_groups", value) for value in (0, -1, 7, "all")),
    *((BACKBONE, "down_block_types", value) for value in ("DownBlock2D", ["os", "sys"], [NESTED], 5)),
    *((BACKBONE, name, NESTED) for name in ("dropout", "act_fn", "attention_head_dim", "freq_shift", "norm_eps")),
    *((BACKBONE, "dropout", value) for value in (float("nan"), float("inf"), "none")),
    *((CODEC, "level", value) for value in (-1, "1", 10**9, 12, 1.0, [1], NESTED, None)),
    *((CODEC, name, value) for name in ("wavelet", "transform", "scaling") for value in (None, 7, NESTED, "x" * 10**5)),
    *((SOLVER, "_class_name", value) for value in ("UNet2DModel", "os.system", None, ["DDIMScheduler"], "logging")),
    *((SOLVER, "prediction_type", value) for value in ("all", None, 5, NESTED)),
    *((SOLVER, "num_train_timesteps", value) for value in ("many", -5, 10**9, HUGE, [1000])),
    *((SOLVER, "trained_betas", value) for value in ("none", NESTED, {"a": 1})),
    *((SOLVER, "clip_sample_range", value) for value in ("wide", NESTED)),
]


@pytest.mark.parametrize(("file", "entry", "value"), HOSTILE, ids=lambda value: str(value)[:20])
def test_hostile_model_folders_are_one_line_and_no_code_runs(
    ours, tmp_path, capsys, monkeypatch, file: str, entry: str, value: object
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ours, folder)
    for module in ("hostile", "AutoencoderKL", "Popen"):
        (folder / f"{module}.py").write_text("raise SystemExit('code of the checkpoint ran')")
    config = json.loads((folder / file).read_text()) | {"auto_map": {"AutoModel": "hostile.Model"}, entry: value}
    (folder / file).write_text(json.dumps(config))
    monkeypatch.chdir(folder)
    refused = sample(folder, tmp_path / "out", "--num-samples", 1, "--sampling-steps", 1)
    error = capsys.readouterr().err
    assert refused == 2 and error.startswith("wddm: got ") and error.count("\n") == 1 and len(error) < 1000
    assert "wanted" in error and not (tmp_path / "out").exists() and "hostile" not in sys.modules


@pytest.mark.parametrize(
    "changed",
    [
        *({"ch": HUGE}, {"ch": 90_000}, {"T": 90_000}, {"T": None}, {"ch_mult": NESTED}, {"ch_mult": [10**6]}),
        *({"num_res_blocks": 10**9}, {"sample_size": "8"}, {"in_channels": [12]}, {"dropout": NESTED}, {"ch_mult": []}),
    ],
    ids=str,
)
def test_hostile_published_folders_are_one_line(published_format, tmp_path, capsys, changed: dict) -> None:
    shutil.copytree(published_format, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    assert sample(tmp_path / "model", tmp_path / "out", "--num-samples", 1) == 2
    error = capsys.readouterr().err
    assert error.startswith("wddm: got ") and error.count("\n") == 1 and "wanted" in error


def test_labels_are_drawn_in_turn_by_number_or_name(tmp_path, capsys) -> None:
    pipeline = conditional_pipeline(["cat", "dog", "frog"])
    pipeline.save_pretrained(tmp_path / "model")
    options = ["--num-samples", 3, "--sampling-steps", 2]
    assert sample(tmp_path / "model", tmp_path / "both", *options, "--labels", "frog, 0", "--guidance", 3) == 0
    assert sample(tmp_path / "model", tmp_path / "all", *options) == 0
    asked = [json.loads((tmp_path / name / "samples.json").read_text())["labels"] for name in ("both", "all")]
    assert asked == [[2, 0], [0, 1, 2]]
    for label, name in ((2, "one"), (0, "other")):
        assert sample(tmp_path / "model", tmp_path / name, *options, "--labels", label, "--guidance", 3) == 0
    both, one, other = (pixels(tmp_path / name) for name in ("both", "one", "other"))
    assert np.array_equal(both[::2], one[::2]) and np.array_equal(both[1], other[1])
    assert not np.array_equal(both[1], one[1])
    assert sample(tmp_path / "model", tmp_path / "beyond", *options, "--labels", 3) == 2
    said = "wddm: got labels [3], wanted 0 to 2, one or 32 of them: change them\n"  # once, not for each of 32 images
    assert capsys.readouterr().err == said
    assert sample(tmp_path / "model", tmp_path / "none", *options, "--labels", "dg") == 2
    assert capsys.readouterr().err == "wddm: got labels='dg', wanted one of cat, dog, frog: did you mean 'dog'?\n"
    file = tmp_path / "model/model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": "cat"}))
    with pytest.raises(ValueError, match=r"got class_names=cat .*, wanted"):
        open_pipeline(tmp_path / "model")


def test_a_class_whose_name_has_a_comma_is_drawn_by_its_name(tmp_path) -> None:
    conditional_pipeline(["cat", "dog, wet", 'a 3" nail']).save_pretrained(tmp_path / "model")
    asked = {'"dog, wet",cat': [1, 0], 'cat, "dog, wet"': [0, 1], 'a 3" nail,1': [2, 1], "cat\n1": [0, 1]}
    for number, (labels, wanted) in enumerate(asked.items()):
        folder = tmp_path / f"{number}"
        assert sample(tmp_path / "model", folder, "--num-samples", 1, "--sampling-steps", 1, "--labels", labels) == 0
        made = json.loads((folder / "samples.json").read_text())
        assert made["labels"] == wanted and made["class_names"] == ["cat", "dog, wet", 'a 3" nail']


def test_clip_and_prediction_are_those_of_the_checkpoint(ours) -> None:
    pipeline = open_pipeline(ours, scheduler="ddpm")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.scheduler.config.clip_sample_range == pipeline.codec.clip_value.item()
    assert open_pipeline(ours, scheduler="heun").scheduler.config.timestep_spacing == "trailing"


def test_the_kind_of_network_is_expected_by_its_name_in_any_case(ours, chaotic) -> None:
    assert open_pipeline(ours, model_type="UNet", level=1, resolution=16).image_size == 16
    assert open_pipeline(chaotic, model_type="UKAN", level=1, prediction_type="sample").image_size == 32
    with pytest.raises(ValueError, match=r"model_type='ukan', but .* holds 'unet'"):
        open_pipeline(ours, model_type="UKAN")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prediction-type", "epsilon"], "prediction_type='epsilon', but"),
        (["--wavelet-level", "2"], "wavelet_level=2, but"),
        (["--resolution", "32"], "resolution=32, but"),
        (["--model-type", "ukan"], "model_type='ukan', but"),
        (["--scheduler", "dimm"], "wanted one of ddpm"),
        (["--num-samples", "0"], "got 0 for '--num-samples', wanted 1 or more"),
        (["--scheduler", "pndm", "--eta", "0.5"], "eta=0.5 for pndm"),
        (["--scheduler", "lms", "--detail-steps", "9"], "detail_steps for lms"),
        (["--labels", "7"], "got labels for a network that was trained without"),
        (["--labels", "seven"], "got labels='seven', wanted one of 0, 1, 2, ... (the classes have no names)"),
        (["--guidance", "2"], "got guidance 2, of details 2, wanted labels"),
        (["--device", "bogus"], "got device 'bogus', wanted cpu"),
        (["--device", "cuda:77"], "got device 'cuda:77', wanted cpu"),
        (["--device", "meta"], "got device 'meta', wanted cpu"),
        (["--seed", str(10**30)], "for '--seed', wanted 0 to "),
    ],
)
def test_contradictions_are_refused_in_one_line(ours, tmp_path, capsys, options: list[str], message: str) -> None:
    code = sample(ours, tmp_path / "out", *options)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(("processes", "wanted"), [(1, "cuda:1"), (2, "cuda:3")])
def test_the_device_is_the_one_asked_for_or_of_the_process(ours, tmp_path, monkeypatch, processes, wanted) -> None:
    moved = []
    state = SimpleNamespace(num_processes=processes, device="cuda:3", is_main_process=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: state)
    monkeypatch.setattr("wddm.sampling.check_device", lambda name: moved.append(f"{name} is there"))
    monkeypatch.setattr("wddm.sampling.draw", lambda *_, **__: None)
    monkeypatch.setattr(WaveletPipeline, "to", lambda self, device: moved.append(device) or self)
    assert sample(ours, tmp_path / "out", "--device", "cuda:1") == 0
    assert moved == ["cuda:1 is there", wanted]


def test_nothing_is_overwritten(ours, tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert sample(ours, tmp_path) == 2 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made_is_said(ours, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert sample(ours, place, "--sampling-steps", 1) == 2
        error = capsys.readouterr().err
        assert f"got {place}, wanted a new folder" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_a_pipeline_that_is_not_trained_yet_is_said(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("runs/quickstart/pipeline", "./pipeline", str(tmp_path / "none"), "~/none"):
        assert sample(place, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "run 02_train first" in error and "network" not in error and error.count("\n") == 1


def test_a_folder_without_a_checkpoint_is_said(tmp_path, capsys) -> None:
    assert sample(ROOT / "params", tmp_path / "out") == 2
    assert "config.json" in capsys.readouterr().err
