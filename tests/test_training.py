"""Oracles: resumed equals uninterrupted byte for byte; AdamW and the schedule in closed form; what a crash leaves."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, VARYING
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from wddm import checkpoints, cli
from wddm.backbones import build_backbone
from wddm.checkpoints import Interrupted, Stop, difference
from wddm.metrics import frechet_wavelet_distance
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images
from wddm.steps import advice, average, averaged_weights, derived_seed, read_log, resolve_precision
from wddm.training import Trainer
from wddm.wavelets import WaveletCodec

RAMPS = np.linspace(0, 255, 8)[None, :] * np.random.default_rng(0).uniform(0.2, 1, (40, 1))  # (40, 8)
IMAGES = np.broadcast_to(RAMPS[:, None, :, None], (40, 8, 8, 1)).astype(np.uint8)  # brighter to the right


def make(folder, dropout: float = 0.1, kind: str = "unet", **settings) -> Trainer:
    torch.manual_seed(settings.get("seed", 0))
    network = settings.pop("model", None) or build_backbone(
        kind, level=1, image_size=8, image_channels=1, widths=(8, 16), dropout=dropout
    )
    codec = WaveletCodec(scaling="band").fit(IMAGES)
    defaults = {
        "train_kimg": 0.064,
        "batch_size": 16,
        "warmup_kimg": 0.032,
        "log_every": 1,
        "checkpoint_kimg": 0.016,
        "preview_kimg": 0.0,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "weighting": "none",
    }
    defaults |= {"flip": True, "cpu": True, "ema_half_life_kimg": 0.02}
    return Trainer(**{"model": network, "codec": codec, "images": IMAGES, "folder": folder, **defaults, **settings})


def mean(samples: np.ndarray) -> dict[str, float]:
    return {"mean": samples.mean()}


def bytes_below(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


FLOWING = {"prediction_type": "flow_prediction", "time_sampling": "logit_normal"}


AVERAGED = FLOWING | {"validation_kimg": 0.032, "validation_images": 8, "averages_kimg": 0.032}


@pytest.mark.parametrize("settings", [{}, AVERAGED])
def test_four_steps_are_two_and_resume_and_two(tmp_path, settings: dict) -> None:
    list(make(tmp_path / "whole", **settings).steps())
    steps = make(tmp_path / "halves", **settings).steps()
    assert [next(steps).step for _ in range(2)] == [1, 2]
    steps.close()
    trainer = make(tmp_path / "halves", **settings)
    assert trainer.notes == ["resumed at step 2 of 4"]
    assert [step.step for step in trainer.steps()] == [3, 4]
    whole, halves = (bytes_below(tmp_path / name) for name in ("whole", "halves"))
    timeless = [
        [{k: v for k, v in row.items() if k not in VARYING} for row in read_log(tmp_path / name)]
        for name in ("whole", "halves")
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 4
    assert whole.keys() == halves.keys()
    assert [name for name in whole if whole[name] != halves[name] and name != "log.jsonl"] == []


def test_the_same_twice_and_another_seed_differs(tmp_path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        list(make(tmp_path / name, seed=seed).steps())
    weights = [(tmp_path / n / "pipeline/backbone/diffusion_pytorch_model.safetensors").read_bytes() for n in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_schedule_warms_up_and_ends_at_zero(tmp_path) -> None:
    rates = [step.lr for step in make(tmp_path, train_kimg=0.16, learning_rate=0.5).steps()]
    assert_close(rates[:2], [0.25, 0.5])
    cosine = [0.25 * (1 + np.cos(np.pi * k / 8)) for k in range(1, 9)]
    assert_close(rates[2:], cosine, atol=1e-6, rtol=0)
    assert abs(rates[-1]) < 1e-12


def test_average_has_its_half_life(tmp_path) -> None:
    """Against the recursion in closed form, with diffusers' ramp (1 + n) / (10 + n) at the start."""
    trainer = make(tmp_path, ema_half_life_kimg=0.032)  # 2 steps: decay sqrt(1/2) once the ramp has passed it
    name = "conv_in.weight"
    wanted = trainer.model.get_parameter(name).detach().clone()
    for n, _ in enumerate(trainer.steps()):
        decay = min(0.5**0.5, (1 + n) / (10 + n)) if n else 0.0
        wanted = decay * wanted + (1 - decay) * trainer.model.get_parameter(name).detach()
    saved = load_file(tmp_path / "pipeline" / "backbone" / "diffusion_pytorch_model.safetensors")
    assert_close(saved[name], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_average_is_diffusers_own_up_to_rounding(decay: float) -> None:
    weights = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4), requires_grad=False)]
    ours = {str(i): weight.detach().clone() for i, weight in enumerate(weights)}
    theirs = EMAModel(weights, decay=decay, foreach=True)
    for step in range(20):
        weights[0].data.normal_()
        average([ours], weights, step, decay), theirs.step(weights)
        assert_close([*ours.values()], theirs.shadow_params)


def test_an_average_of_any_half_life_is_put_together_afterwards(tmp_path) -> None:
    """Against the average of the weights after every step, by their shares in closed form."""
    trainer = make(tmp_path, train_kimg=1.6, averages_kimg=0.08, checkpoint_kimg=0, learning_rate=3e-3)
    name, each = "conv_in.weight", []
    for _ in trainer.steps():
        each.append(trainer.model.get_parameter(name).detach().double())
    after = torch.arange(len(each), 0, -1).double() - 1  # steps from there to the end
    for half_life in (5, 10, 20):
        shares = 0.5 ** (after / half_life)
        wanted = torch.tensordot(shares / shares.sum(), torch.stack(each), 1)
        found = averaged_weights(tmp_path, half_life * 0.016)[name]
        assert (found - wanted).norm() < 0.1 * (each[-1] - wanted).norm(), half_life
    found = averaged_weights(tmp_path, 0.16)
    assert set(found) == {key for key, _ in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"half-life of 0.001 kimg, \d+% off with 20 kept averages, wanted 10 %"):
        averaged_weights(tmp_path, 0.001)
    for none in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"half-life of {none} kimg, \d+% off with 20 kept averages, wanted 10 %"):
            averaged_weights(str(tmp_path), none)


def test_averages_of_a_network_with_channels_last_are_kept(tmp_path) -> None:
    """As `tune` lays them out on a GPU; safetensors takes contiguous tensors alone."""
    trainer = make(tmp_path, averages_kimg=0.032)
    for tensors in (dict(trainer.model.named_parameters()), *trainer.averages):
        for tensor in tensors.values():
            tensor.data = tensor.data.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.data
    list(trainer.steps())
    assert len(load_file(tmp_path / "checkpoints/averages/000000064.safetensors")) == 2 * len(trainer.averages[0])


def test_averages_that_nothing_kept_are_refused(tmp_path) -> None:
    next(steps := make(tmp_path).steps()), steps.close()
    with pytest.raises(ValueError, match=r"without kept averages, wanted some: train it with averages_kimg"):
        averaged_weights(tmp_path, 1.0)
    with pytest.raises(ValueError, match=r"got averages_kimg for a run that began without, wanted 0"):
        make(tmp_path, averages_kimg=0.016)


def test_averages_of_a_run_that_died_before_its_first_checkpoint_are_not_mixed_into_another(
    tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as dead:
        dead.setattr(checkpoints, "save", Mock())
        list(make(tmp_path, averages_kimg=0.016).steps())
    list(make(tmp_path, averages_kimg=0.032, seed=1).steps())
    kept = (tmp_path / "checkpoints/averages").iterdir()
    assert {file.name for file in kept} == {"000000032.safetensors", "000000064.safetensors"}


@pytest.mark.parametrize("settings", [{}, FLOWING])
def test_loss_goes_down(tmp_path, settings: dict) -> None:
    trainer = make(tmp_path, train_kimg=3.2, learning_rate=3e-3, log_every=20, checkpoint_kimg=0, **settings)
    losses = [step.loss for step in trainer.steps()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_weighting_that_is_not_for_a_flow_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"got weighting='min_snr' for flow_prediction, .* recipe to flow"):
        make(tmp_path / "new", weighting="min_snr", **FLOWING)
    assert not (tmp_path / "new").exists()


def test_micro_batches_give_the_same_step(tmp_path) -> None:
    trained = []
    for n in (1, 4):
        trainer = make(tmp_path / str(n), accumulation=n, dropout=0.0)
        trained.append([(step.loss, step.grad_norm) for step in trainer.steps()])
    assert_close(trained[0], trained[1], atol=0, rtol=1e-4)


def test_another_trainer_of_the_process_does_not_change_the_accumulation(tmp_path) -> None:
    alone = [(row.loss, row.grad_norm) for row in make(tmp_path / "alone", accumulation=2).steps()]
    trainer = make(tmp_path / "beside", accumulation=2)
    others = make(tmp_path / "other", accumulation=8).steps(), make(tmp_path / "third", accumulation=1).steps()
    found = []
    for row in trainer.steps():
        found.append((row.loss, row.grad_norm))
        [next(other) for other in others]
    assert found == alone


def test_a_process_keeps_to_one_precision(tmp_path) -> None:
    make(tmp_path / "first")
    with pytest.raises(ValueError, match=r"^got precision='bf16' after 'no', wanted one in a process: restart the k"):
        make(tmp_path / "second", precision="bf16")


def test_pipeline_holds_the_average_and_samples(tmp_path) -> None:
    trainer = make(tmp_path)
    list(trainer.steps())
    pipeline = WaveletPipeline.from_pretrained(tmp_path / "pipeline")
    for name, parameter in pipeline.backbone.named_parameters():
        assert torch.equal(parameter, trainer.averages[0][name])
    assert pipeline.scheduler.config.prediction_type == "sample"
    assert_close(pipeline.scheduler.config.clip_sample_range, trainer.codec.clip_value.item())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_other_settings_start_anew_and_lose_nothing(tmp_path) -> None:
    list(make(tmp_path).steps())
    before = bytes_below(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"began with \(learning_rate 0.001 -> 0.01\), wanted the same"):
        make(tmp_path, learning_rate=0.01)
    assert bytes_below(tmp_path / "checkpoints") == before
    trainer = make(tmp_path, learning_rate=0.01, restart=True)
    assert trainer.step == 0
    assert "learning_rate 0.001 -> 0.01" in trainer.notes[0] and "checkpoints-1" in trainer.notes[0]
    assert bytes_below(tmp_path / "checkpoints-1") == before
    assert read_log(tmp_path) == []


def test_a_finished_run_of_other_code_is_not_taken_for_one_of_this(tmp_path, monkeypatch) -> None:
    list(make(tmp_path / "finished").steps())
    steps = make(tmp_path / "unfinished").steps()
    next(steps), steps.close()
    assert make(tmp_path / "finished").notes == ["resumed at step 4 of 4"]
    monkeypatch.setattr("wddm.checkpoints.code", lambda: 1)
    assert "the code; starting anew" in make(tmp_path / "finished").notes[0]
    changed = ["resumed at step 1 of 4", "the code changed at step 1"]
    assert make(tmp_path / "unfinished").notes == changed
    list(make(tmp_path / "unfinished").steps())
    assert make(tmp_path / "unfinished").notes == ["resumed at step 4 of 4", changed[1]]  # for good
    assert json.loads((tmp_path / "unfinished/pipeline/training.json").read_text())["history"] == changed[1:]


def test_a_log_holds_distances_of_one_kind(tmp_path) -> None:
    """Earlier distances of another kind would be shown as those that are asked for now."""
    watched = {"metric_kimg": 0.032, "metric_images": 4, "measure": mean}
    steps = make(tmp_path, **watched, measured="level 3").steps()
    next(steps), steps.close()
    with pytest.raises(ValueError, match="measured level 3 -> level 2"):
        make(tmp_path, **watched, measured="level 2")
    assert make(tmp_path).step == 1  # without any
    list(make(tmp_path, **watched, measured="level 3").steps())
    assert "measured level 3 -> level 2" in make(tmp_path, **watched, measured="level 2", restart=True).notes[0]
    assert read_log(tmp_path) == [] and read_log(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train_kimg": 0}, "got train_kimg=0, wanted more than 0"),
        ({"learning_rate": -1e-3}, "got learning_rate=-0.001, wanted more than 0"),
        ({"log_every": 0}, "got log_every=0, wanted more than 0"),
        ({"metric_images": 0, "metric_kimg": 1, "measure": mean}, "got metric_images=0, wanted more than 0"),
        ({"train_kimg": float("nan")}, "got train_kimg=nan, wanted more than 0"),
        ({"ema_half_life_kimg": -1}, "got ema_half_life_kimg=-1, wanted 0 or more"),
        ({"validation_kimg": -1.0}, "got validation_kimg=-1.0, wanted 0 or more"),
        ({"weight_decay": -0.1}, "got weight_decay=-0.1, wanted 0 or more"),
        ({"seed": -1}, "got seed=-1, wanted 0 or more"),
        ({"label_dropout": 1.0, "labels": [0] * 40}, "got label_dropout=1.0, wanted 0 or more, below 1"),
        ({"label_dropout": float("nan")}, "got label_dropout=nan, wanted 0 or more"),
        ({"images": torch.zeros(40, 8, 8, 1)}, "got images of Tensor of torch.float32, wanted uint8"),
        ({"images": np.zeros((40, 8, 8, 1))}, "got images of ndarray of float64, wanted uint8"),
        ({"images": np.zeros((40, 16, 16, 1), np.uint8)}, r"got a network for \(4, 4, 4\), wanted \(4, 8, 8\)"),
        ({"images": np.zeros((40, 8, 8, 3), np.uint8)}, r"got a network for \(4, 4, 4\), wanted \(12, 4, 4\)"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **setting)
    assert not list(tmp_path.iterdir())


def test_what_numpy_gives_is_taken_and_a_home_folder_is_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    measure = lambda samples: {"mean": np.float32(samples.mean())}  # noqa: E731
    numbers = {"batch_size": np.int64(16), "train_kimg": np.float32(0.032), "seed": np.int64(10**15)}
    list(make("~/run", measure=measure, metric_kimg=0.016, metric_images=4, **numbers).steps())
    assert (tmp_path / "run/pipeline").is_dir() and read_log(tmp_path / "run")[-1]["mean"] > 0


def test_a_training_that_ends_within_its_warm_up_is_noted(tmp_path) -> None:
    (note,) = make(tmp_path, warmup_kimg=5).notes
    assert note == "the training ends within its warm-up: take a smaller warmup_kimg"


def test_a_pipeline_says_what_it_was_trained_on(tmp_path) -> None:
    trainer = make(tmp_path, data_sha256="5eed")
    list(trainer.steps())
    origin = json.loads((tmp_path / "pipeline/training.json").read_text())
    assert origin == {"settings": trainer.settings(), "images_seen": 64, "data_sha256": "5eed", "history": []}
    assert origin["settings"]["images"] == [40, 8, 8, 1, "5eed"] and origin["settings"]["learning_rate"] == 1e-3
    assert origin["settings"] == checkpoints.load_latest(tmp_path / "checkpoints", [])[1]["settings"]
    with pytest.raises(ValueError, match=r"images \[40, 8, 8, 1, '5eed'\] -> \[40, 8, 8, 1, '0dd'\]"):
        make(tmp_path, data_sha256="0dd")


def test_two_processes_do_not_train_in_one_folder(tmp_path) -> None:
    """The lock goes with the process that holds it, however that ends, and with the end of training.

    Settings are the same in every process: Python orders sets of strings anew in each, but by PYTHONHASHSEED.
    """
    code = (
        "import sys, json, pathlib; sys.path.insert(0, sys.argv[1]); from test_training import make; "
        "trainer = make(pathlib.Path(sys.argv[2])); print(json.dumps(trainer.settings(), sort_keys=True), flush=True); "
        "sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env={**os.environ, "PYTHONHASHSEED": "1"}, **pipes) as other:
        told = other.stdout.readline()
        assert "block_out_channels" in told
        with pytest.raises(ValueError, match=r"got .*, where another process trains, wanted one at a time") as refused:
            make(tmp_path)
        assert "\n" not in str(refused.value)
        other.kill()
    trainer = make(tmp_path)
    assert json.dumps(trainer.settings(), sort_keys=True) + "\n" == told
    lock = FileLock(tmp_path / ".training.lock", timeout=0)
    with pytest.raises(Timeout):
        lock.acquire()
    list(trainer.steps())
    lock.acquire()


def test_a_refused_trainer_leaves_the_folder_to_others(tmp_path) -> None:
    list(make(tmp_path).steps())
    with pytest.raises(ValueError, match="wanted the same") as refused:
        make(tmp_path, learning_rate=0.01)
    assert refused.tb is not None  # which keeps that Trainer
    FileLock(tmp_path / ".training.lock", timeout=0).acquire()


def test_checkpoints_of_an_older_layout_are_said_and_kept(tmp_path) -> None:
    """They are set aside only if the run was finished and `restart` allows it."""
    steps = make(tmp_path).steps()
    next(steps), steps.close()
    rewrite_state(tmp_path / "checkpoints/step-00000001", lambda state: state["settings"].pop("layout"))
    before = bytes_below(tmp_path / "checkpoints")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"^got other settings.*\(layout None -> 3\).*give[^\n]*$"):
            make(tmp_path, restart=restart)
    assert bytes_below(tmp_path / "checkpoints") == before
    list(make(tmp_path / "finished").steps())
    for folder in checkpoints.listed(tmp_path / "finished/checkpoints"):
        rewrite_state(folder, lambda state: state["settings"].pop("layout"))
    before = bytes_below(tmp_path / "finished/checkpoints")
    with pytest.raises(ValueError, match="layout"):
        make(tmp_path / "finished")
    assert "layout None -> 3; starting anew" in make(tmp_path / "finished", restart=True).notes[0]
    assert bytes_below(tmp_path / "finished/checkpoints-1") == before


def rewrite_state(folder: Path, change) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))


def test_the_code_is_that_which_decides_what_is_learned(tmp_path, monkeypatch) -> None:
    for name in ("checkpoints", "kan", "cli", "metrics/scores"):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("1")
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "checkpoints.py"))
    before = checkpoints.code()
    for name, matters in (("cli", False), ("metrics/scores", False), ("kan", True), ("a_new_network", True)):
        (tmp_path / f"{name}.py").write_text("2")
        assert (checkpoints.code() != before) == matters
        before = checkpoints.code()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "got schedule='linear', wanted one of constant_with_warmup, cosine"),
        ({"weighting": "mean_snr"}, "got weighting='mean_snr', wanted one of none, min_snr"),
        ({"metric_kimg": 1.0}, "got metric_kimg=1 without measure, wanted both: give both"),
        ({"batch_size": 0}, r"got batch_size=0, wanted a multiple of 1 \(accumulation\) times 1"),
        ({"accumulation": 0}, r"got batch_size=16, wanted a multiple of 0 \(accumulation\) times 1"),
        ({"accumulation": 3}, r"got batch_size=16, wanted a multiple of 3 \(accumulation\) times 1"),
        ({"validation_kimg": 1.0, "validation_images": 40}, "got validation_images=40 of 40 images, wanted 1"),
        ({"validation_kimg": 1.0, "validation_images": 0}, "got validation_images=0 of 40 images, wanted 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_is_written(tmp_path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_those_of_the_modern_recipe() -> None:
    recipe = yaml.safe_load((ROOT / "params/recipes/modern.yaml").read_text())
    defaults = {f.name: f.default for f in fields(Trainer)}
    ours = {name: type(defaults[name])(value) for name, value in recipe.items() if name in defaults}
    assert len(ours) == 9 and ours == {name: defaults[name] for name in ours}


def test_other_images_are_other_settings(tmp_path) -> None:
    list(make(str(tmp_path)).steps())  # a folder may be given by its name
    trainer = make(tmp_path)
    list(trainer.steps())
    trainer.images = IMAGES[::-1]
    assert "images" in difference(
        checkpoints.load_latest(tmp_path / "checkpoints", [])[1]["settings"], trainer.settings()
    )


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path) -> None:
    trainer = make(tmp_path)
    steps = trainer.steps()
    next(steps), next(steps)
    with torch.no_grad():
        trainer.model.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"loss or gradient that are not finite at step 3, wanted numbers: lower learning_rate"
    ):
        next(steps)
    tensors, state = checkpoints.load_latest(tmp_path / "checkpoints", [])
    assert state["step"] == 2 and all(v.isfinite().all() for v in tensors["weights"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_of_the_last_whole_step_and_says_where(tmp_path, number: int) -> None:
    trainer = make(tmp_path, train_kimg=1.6, checkpoint_kimg=100.0)
    with pytest.raises(KeyboardInterrupt) as stopped:
        for step in trainer.steps():
            if step.step == 3:
                os.kill(os.getpid(), number)
    kept = tmp_path / "checkpoints/step-00000003"
    line = f"training was stopped at step 3 of 100; {kept} is kept: start it again to go on from there"
    assert stopped.type is Interrupted and str(stopped.value) == line
    assert checkpoints.load_latest(tmp_path / "checkpoints", [])[1]["step"] == 3
    assert not (tmp_path / "pipeline").exists()
    assert make(tmp_path, train_kimg=1.6, checkpoint_kimg=100.0).step == 3


def test_what_an_interrupt_cut_short_is_made_up_for_and_nothing_differs(tmp_path) -> None:
    """An interrupt ends `measure`, which takes a minute, at once; the rest of what was due is done on resuming."""

    def slow(samples: np.ndarray) -> dict[str, float]:
        if asked := not measured:
            measured.append(1)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)
        return {"mean": samples.mean() + 60 * asked}

    watches = {"preview_kimg": 0.032, "metric_kimg": 0.032, "metric_images": 8, "validation_kimg": 0.032}
    watches |= {"validation_images": 8, "log_every": 3}
    list(make(tmp_path / "whole", measure=mean, **watches).steps())
    measured, began = [], time.monotonic()
    with pytest.raises(Interrupted, match="stopped at step 2 of 4"):
        list(make(tmp_path / "cut", measure=slow, **watches).steps())
    assert time.monotonic() - began < 20
    list(make(tmp_path / "cut", measure=slow, **watches).steps())
    whole, cut = (bytes_below(tmp_path / name) for name in ("whole", "cut"))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut") and len(timeless(tmp_path / "cut")) == 4
    assert whole.keys() == cut.keys() and [name for name in whole if whole[name] != cut[name]] == ["log.jsonl"]


def cut_short(trainer: Trainer, after: int) -> Trainer:
    """The trainer, which gets a SIGINT in its backward pass number `after`."""
    inner, calls = trainer.accelerator.backward, itertools.count(1)

    def backward(loss: torch.Tensor) -> None:
        inner(loss)
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.accelerator.backward = backward
    return trainer


def test_a_step_that_is_cut_in_half_is_done_again_whole(tmp_path) -> None:
    list(make(tmp_path / "whole").steps())
    trainer = cut_short(make(tmp_path / "cut"), after=3)
    with pytest.raises(Interrupted, match="stopped at step 2 of 4"):
        list(trainer.steps())
    list(make(tmp_path / "cut", model=trainer.model).steps())  # the same object, as when a cell is run again
    whole, cut = (bytes_below(tmp_path / name / "checkpoints") for name in ("whole", "cut"))
    assert whole == cut


def test_the_same_trainer_goes_on_after_an_interrupt(tmp_path) -> None:
    """As when a cell is run again that has only the loop; here stopped between two micro-batches."""
    list(make(tmp_path / "whole", accumulation=2).steps())
    trainer = cut_short(make(tmp_path / "cut", accumulation=2), after=5)
    with pytest.raises(Interrupted, match="stopped at step 2 of 4"):
        list(trainer.steps())
    assert [row.step for row in trainer.steps()] == [3, 4]
    whole, cut = (bytes_below(tmp_path / name / "checkpoints") for name in ("whole", "cut"))
    assert whole == cut


def test_a_notebook_and_a_terminal_show_the_line_of_an_interrupt_alone(capsys, monkeypatch) -> None:
    shell = InteractiveShell()
    line = "training was stopped at step 3 of 9; runs/x/checkpoints/step-00000003 is kept: "
    line += "start it again to go on from there"
    shell.run_cell("from wddm.checkpoints import *\nraise Interrupted(Path('runs/x'), 3, 9)")
    out = capsys.readouterr().out
    assert out.strip() == line
    monkeypatch.setattr(cli, "experiments_of", Mock(side_effect=Interrupted(Path("runs/x"), 3, 9)))
    assert cli.main(["train", "x.yaml"]) == 130
    assert capsys.readouterr().err.strip() == f"wddm: {line}"


def test_interrupts_are_python_s_own_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt), asked.cuttable():
            raise AssertionError
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_keep_two_and_pass_over_a_damaged_one(tmp_path) -> None:
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"weights": {"w": torch.full((3,), float(step))}}, {"settings": {}})
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["step-00000002", "step-00000003"]
    assert checkpoints.load_latest(tmp_path, [])[0]["weights"]["w"].tolist() == [3, 3, 3]
    file = tmp_path / "step-00000003" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    notes = []
    tensors, state = checkpoints.load_latest(tmp_path, notes)
    assert state["step"] == 2 and tensors["weights"]["w"].tolist() == [2, 2, 2]
    assert len(notes) == 1 and "weights.safetensors damaged, going back" in notes[0]
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    assert checkpoints.load_latest(tmp_path, notes) is None and len(notes) == 3
    checkpoints.save(tmp_path, 1, {"weights": {"w": torch.ones(3)}}, {"settings": {}})  # begun anew, after two damaged
    assert checkpoints.load_latest(tmp_path, notes)[1]["step"] == 1


def test_a_checkpoint_being_written_is_not_a_checkpoint(tmp_path) -> None:
    checkpoints.save(tmp_path, 1, {"weights": {"w": torch.ones(1)}}, {})
    partial = tmp_path / ".step-00000002.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.load_latest(tmp_path, [])[1]["step"] == 1


def timeless(folder) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in VARYING} for row in read_log(folder)]


def test_a_checkpoint_between_two_rows_of_the_log_keeps_the_half_read_meter(tmp_path) -> None:
    sizes = {"train_kimg": 0.16, "log_every": 4, "checkpoint_kimg": 0.048}  # rows: 1, 2, 4, 8, 10; checkpoints: 3, 6, 9
    list(make(tmp_path / "whole", **sizes).steps())
    steps = make(tmp_path / "cut", **sizes).steps()
    assert [next(steps).step for _ in range(4)] == [1, 2, 4, 8]
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000003", ignore_errors=True)  # died at 8: the last one is of 6
    trainer = make(tmp_path / "cut", **sizes)
    assert trainer.step == 6 and [row["step"] for row in read_log(tmp_path / "cut")] == [1, 2, 4]
    list(trainer.steps())
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert [row["step"] for row in timeless(tmp_path / "whole")] == [1, 2, 4, 8, 10]


def test_a_rate_at_which_wide_networks_stop_learning_is_told() -> None:
    """A network of 256 channels stopped learning at 2e-3, but not at 5e-4; those of up to 64 channels learn at 2e-3."""
    wide, slim = (build_backbone("unet", dataset="digits", level=1, widths=[width]) for width in (256, 64))
    assert advice(wide, 2e-3) == [
        "learning_rate 0.002 is much for 256 channels: if the loss stops falling, take 0.0005"
    ]
    assert advice(wide, 5e-4) == advice(slim, 2e-3) == []


def test_every_step_is_told_at_once(tmp_path) -> None:
    told = []
    steps = make(tmp_path, train_kimg=0.16, log_every=4, on_step=told.append).steps()
    next(steps), next(steps), next(steps)
    assert told == [16, 32, 48, 64]


def test_a_full_disk_is_said_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch) -> None:
    steps = make(tmp_path).steps()
    next(steps)
    before = bytes_below(tmp_path / "checkpoints")

    def full(tensors, file) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*checkpoint of step 2.*free some.*step-00000001 is kept"):
        next(steps)
    monkeypatch.undo()
    assert {name: data for name, data in bytes_below(tmp_path / "checkpoints").items() if name[0] != "."} == before
    assert make(tmp_path).step == 1


def test_extend_goes_on_with_the_schedule_of_the_longer_run(tmp_path) -> None:
    list(make(tmp_path).steps())
    with pytest.raises(ValueError, match=r"train_kimg 0.064 -> 0.128\), wanted the same.*--extend"):
        make(tmp_path, train_kimg=0.128)
    trainer = make(tmp_path, train_kimg=0.128, extend=True)
    assert trainer.step == 4 and trainer.total_steps == 8
    assert trainer.notes[1] == "extended from 0.064 to 0.128 kimg"
    whole = [row.lr for row in make(tmp_path / "whole", train_kimg=0.128).steps()]
    assert_close([row.lr for row in trainer.steps()], whole[4:])
    with pytest.raises(ValueError, match="learning_rate"):
        make(tmp_path, train_kimg=0.2, learning_rate=1.0, extend=True)
    with pytest.raises(ValueError, match="train_kimg"):
        make(tmp_path, train_kimg=0.064, extend=True)


def test_held_out_loss_is_the_same_every_time_and_least_at_the_best(tmp_path) -> None:
    trainer = make(tmp_path, train_kimg=0.8, validation_kimg=0.16, validation_images=10)
    assert len(trainer.trained) == 30 and len(trainer.held_out) == 10
    assert sorted([*trainer.trained, *trainer.held_out]) == list(range(40))
    rows = [row for row in trainer.steps() if row.validation_loss is not None]
    assert [row.step for row in rows] == [10, 20, 30, 40, 50]
    assert rows[-1].validation_loss == trainer.validate()  # with dropout it would differ
    assert len({row.validation_loss for row in rows}) == 5
    assert trainer.model.training
    best = json.loads((tmp_path / "checkpoints/best/state.json").read_text())
    assert best["best"] == min(row.validation_loss for row in rows)


def test_watching_changes_nothing(tmp_path) -> None:
    list(make(tmp_path / "alone").steps())
    watches = {"preview_kimg": 0.016, "metric_kimg": 0.016, "metric_images": 8, "measure": mean}
    list(make(tmp_path / "watched", **watches).steps())
    alone, watched = (bytes_below(tmp_path / name / "pipeline") for name in ("alone", "watched"))
    assert alone == watched
    previews = sorted((tmp_path / "watched/previews").glob("*.png"))
    assert [path.name for path in previews] == [f"{n:09d}.png" for n in (16, 32, 48, 64)]
    assert Image.open(previews[0]).size == (16 * 8, 2 * 8)


def test_distance_in_the_log_is_that_of_the_averaged_weights(tmp_path) -> None:
    def fwd(samples: np.ndarray) -> dict[str, float]:
        assert samples.shape == (12, 8, 8, 1) and samples.dtype == np.uint8
        return {"fwd": frechet_wavelet_distance(IMAGES, samples, 2).value}

    rows = list(make(tmp_path, metric_kimg=0.032, metric_images=12, measure=fwd).steps())
    assert [list(row.distances) for row in rows] == [[], ["fwd"]] * 2
    assert [row.get("fwd") for row in read_log(tmp_path)] == [row.distances.get("fwd") for row in rows]
    pipeline = WaveletPipeline.from_pretrained(tmp_path / "pipeline")
    samples = pipeline(12, num_inference_steps=25, output_type="np").images
    samples = (samples * 255).round().astype(np.uint8)
    assert_close(rows[-1].distances["fwd"], frechet_wavelet_distance(IMAGES, samples, 2).value)


@pytest.mark.parametrize("kind", ["unet", "ukan"])
def test_gradient_checkpointing_gives_the_same_bytes(tmp_path, kind: str) -> None:
    for name, again in (("kept", False), ("again", True)):
        list(make(tmp_path / name, kind=kind, gradient_checkpointing=again).steps())
    kept, again = (bytes_below(tmp_path / name / "pipeline") for name in ("kept", "again"))
    assert kept == again


def test_log_survives_a_line_cut_short(tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1}]


def test_seeds_of_different_keys_differ() -> None:
    assert len({derived_seed(s, step, rank) for s in range(5) for step in range(50) for rank in range(3)}) == 750


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="got precision='bf8', wanted one of auto, no, fp16, bf16"):
        resolve_precision("bf8")
    with pytest.raises(ValueError, match="got precision='fp16' on a CPU, which would train in fp32, wanted bf16"):
        resolve_precision("fp16", cpu=True)  # accelerate says nothing


# ---------------------------------------------------------------------------------------------------- labels


def told(folder, labels: np.ndarray | None, **settings) -> Trainer:
    """A Trainer of a UNet with embeddings of three classes and of no label."""
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    network, codec = UNet2DModel(**sizes, **blocks, num_class_embeds=4), WaveletCodec().fit(IMAGES)
    defaults: dict = {"train_kimg": 0.064, "batch_size": 16, "log_every": 1, "checkpoint_kimg": 0.016, "cpu": True}
    defaults |= {"preview_kimg": 0, "warmup_kimg": 0, "flip": True}
    parts = {"model": network, "codec": codec, "images": IMAGES, "labels": labels, "folder": folder}
    return Trainer(**parts, **(defaults | settings))


LABELS = np.arange(40) % 4 - 1  # 10 of them unlabelled


def test_training_with_labels_is_resumed_exactly_and_shows_its_share_of_them(tmp_path, monkeypatch) -> None:
    shown, inner = [], UNet2DModel.forward

    def forward(self, sample, timestep, class_labels=None):
        shown.append((self.training, class_labels.tolist()))
        return inner(self, sample, timestep, class_labels)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    list(told(tmp_path / "whole", LABELS, class_names=["cat", "dog", "frog"]).steps())
    assert WaveletPipeline.from_pretrained(tmp_path / "whole/pipeline").config.class_names == ["cat", "dog", "frog"]
    before = [labels for _, labels in shown]
    steps = told(tmp_path / "halves", LABELS).steps()
    next(steps), next(steps), steps.close()
    list(told(tmp_path / "halves", LABELS, class_names=["cat", "dog", "frog"]).steps())
    assert [labels for _, labels in shown[4:]] == before
    whole, halves = (bytes_below(tmp_path / name) for name in ("whole", "halves"))
    assert [name for name in whole if whole[name] != halves[name]] == ["log.jsonl"] and whole.keys() == halves.keys()
    assert "labels" in json.loads((tmp_path / "whole/pipeline/training.json").read_text())["settings"]

    shown.clear()
    sizes = {"train_kimg": 1.6, "checkpoint_kimg": 0, "validation_kimg": 1.6, "validation_images": 20}
    list(told(tmp_path / "long", LABELS, label_dropout=0.25, **sizes).steps())
    training = np.concatenate([labels for training, labels in shown if training])
    assert abs((training == 3).mean() - (0.25 + 0.75 * 0.25)) < 0.03 and set(training) == {0, 1, 2, 3}
    held_out = np.concatenate([labels for training, labels in shown if not training])
    rows = np.linspace(0, 39, 20).round().astype(int)
    assert held_out.tolist() == np.where(LABELS[rows] < 0, 3, LABELS[rows]).tolist()
    with pytest.raises(ValueError, match="labels"):
        told(tmp_path / "halves", (LABELS + 2) % 4 - 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"got labels \(none\), wanted 40 below 3"), (LABELS[1:], r"got labels \(39 up to 2\), wanted 40"),
        (LABELS + 1, r"got labels \(40 up to 3\), wanted 40 below 3"), (np.full(40, -1), "got labels"),
    ],
)  # fmt: skip
def test_labels_that_the_network_was_not_built_for_are_refused(tmp_path, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        told(tmp_path / "run", labels)
    with pytest.raises(ValueError, match=r"wanted none for this network.*num_class_embeds"):
        make(tmp_path / "run", labels=LABELS)
    assert not (tmp_path / "run").exists()


def test_previews_are_of_one_label_after_the_other(tmp_path) -> None:
    trainer = told(tmp_path, LABELS)
    asked = trainer.samples(9)
    pipeline = trainer.averaged()
    pipeline.set_progress_bar_config(disable=True)
    (wanted,) = sample_images(pipeline, 9, num_inference_steps=25, labels=[0, 1, 2])
    assert asked.shape == (9, 8, 8, 1) and (asked == wanted).all()
