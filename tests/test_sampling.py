"""Ten images whatever the batch size, from our pipelines and published checkpoints; contradictions are refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, launcher
from PIL import Image

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
    """A network of random numbers in the published format's place: it makes much of every rounding."""
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
def test_two_processes_write_the_files_of_one(chaotic, tmp_path) -> None:
    flags = f"sample --model-dir {chaotic} --num-samples 20 --sampling-steps 12 --eta 1 --output-dir".split()
    alone = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for name, start in (("one", []), ("two", launcher())):
        command = [sys.executable, "-m", *start, "wddm", *flags, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("20 images") == 1
        assert f"/{3 // (2 if start else 1) + bool(start)} [" in done.stdout  # batches of 8: 3, or 2 and 1
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_a_published_checkpoint_with_the_flags_of_the_paper(published, tmp_path) -> None:
    flags = "--model-type ukan --num-samples 2 --batch-size 2 --scheduler ddim --sampling-steps 2 --eta 0.0"
    flags += " --prediction-type epsilon --wavelet-level 1 --resolution 32 --seed 0"
    assert sample(published / "checkpoint", tmp_path / "given", *flags.split()) == 0
    assert sample(published / "checkpoint", tmp_path / "read", "--num-samples", 2, "--sampling-steps", 2) == 0
    assert pixels(tmp_path / "given").shape == (2, 32, 32, 3)
    assert np.array_equal(pixels(tmp_path / "given"), pixels(tmp_path / "read"))


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
        (["--num-samples", "0"], "0 is not in the range x>=1"),
        (["--scheduler", "pndm", "--eta", "0.5"], "eta=0.5 for pndm"),
        (["--scheduler", "lms", "--detail-steps", "9"], "detail_steps for lms"),
    ],
)
def test_contradictions_are_refused_in_one_line(ours, tmp_path, capsys, options: list[str], message: str) -> None:
    try:
        code = sample(ours, tmp_path / "out", *options)
    except SystemExit as stopped:  # argparse's own way
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.png"))


def test_nothing_is_overwritten(ours, tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert sample(ours, tmp_path) == 2 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_without_a_checkpoint_is_said(tmp_path, capsys) -> None:
    assert sample(ROOT / "params", tmp_path / "out") == 2
    assert "config.json" in capsys.readouterr().err
