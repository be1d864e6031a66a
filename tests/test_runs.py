"""`wddm train` as it is used: killed at any moment, over two processes, a rank dead; oracle: the run left alone."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, VARYING, as_process, launcher
from torch.testing import assert_close

from wddm.cli import main
from wddm.steps import read_log

TINY = {
    "dataset": "digits", "resolution": 8, "limit": 64, "widths": [8, 16], "dropout": 0.1, "train_kimg": 3.2,
    "batch_size": 16, "warmup_kimg": 0.1, "ema_half_life_kimg": 0.1, "checkpoint_kimg": 0.24, "flip": True,
    "preview_kimg": 0, "validation_kimg": 0.8, "validation_images": 8, "metric_kimg": 0.8, "metric_images": 140,
    "averages_kimg": 0.8,
}  # fmt: skip


@pytest.fixture
def root(tmp_path) -> Path:
    """A workbook of its own with the notebooks of this one."""
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def train(root: Path, run: str, *options: str) -> list[str]:
    return ["train", str(root / "params" / "tiny.yaml"), "-p", f"run={run}", *options]


def left(folder: Path) -> dict:
    """The bytes of the checkpoints and the pipeline, and the log without what varies."""
    files = [
        path for part in ("checkpoints", "pipeline") for path in sorted((folder / part).rglob("*")) if path.is_file()
    ]
    rows = [{key: value for key, value in row.items() if key not in VARYING} for row in read_log(folder)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files} | {"log": rows}


@pytest.mark.slow
def test_killed_13_times_it_ends_with_the_bytes_of_a_run_left_alone(root) -> None:
    assert as_process("wddm", *train(root, "alone"), root=root).returncode == 0
    wanted = left(root / "runs" / "alone")
    assert len(wanted["log"]) == 16 and {"checkpoints/best/state.json", "pipeline/model_index.json"} <= wanted.keys()
    dice, kills, moments = random.Random(0), 0, set()
    checkpoints = root / "runs" / "killed" / "checkpoints"

    def kill(child: int) -> None:
        """Kill it: every other time while it writes a checkpoint, else a moment after the first new one."""
        while kills < 13 and Path("/proc", str(child)).exists():
            if list(checkpoints.glob(".*.partial")) if kills % 2 else sorted(checkpoints.glob("step-*")) != before:
                time.sleep(dice.random() * (0.004 if kills % 2 else 0.1))
                moments.add("writing" if list(checkpoints.glob(".*.partial")) else "training")
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.0005)

    for _ in range(200):
        before = sorted(checkpoints.glob("step-*"))
        status = as_process("wddm", *train(root, "killed"), root=root, watch=kill).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        kept = [int(path.name[5:]) for path in checkpoints.glob("step-*")]
        assert not before or max(kept) >= int(before[-1].name[5:])  # nothing is lost
    assert status == 0 and kills == 13 and moments == {"writing", "training"}
    assert left(root / "runs" / "killed") == wanted


WATCHED = """
import gc, sys
import torch
from wddm.cli import main

destroy = torch.distributed.destroy_process_group


def watched(group=None):
    left = [one for one in gc.get_objects() if type(one) is torch.nn.parallel.DistributedDataParallel]
    print(len(left), "reducers are left", flush=True)
    destroy(group)


torch.distributed.destroy_process_group = watched
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_lose_what_one_loses(root) -> None:
    """At equal total batch; were the gradients of the two not averaged, they would drift apart within a few steps."""
    options = ("-p", "dropout=0", "-p", "train_kimg=0.64")
    assert main(train(root, "one", *options)) == 0
    (root / "watched.py").write_text(WATCHED)
    files = [root / "params" / f"{name}.yaml" for name in ("tiny", "two", "next")]
    files[1].write_text(files[0].read_text())
    files[2].write_text("sweep: {seed: [1]}\n" + files[0].read_text())
    done = as_process(*launcher()[:-1], root / "watched.py", "train", *files[1:], *options, root=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0 reducers are left") == 2  # else one may wait for ever: see `Trainer.steps`
    assert done.stdout.count("is trained") == 2 and done.stdout.count("| 0/640") == 2  # one after the other
    one, two = (read_log(root / "runs" / name) for name in ("one", "two"))
    assert len(one) == len(two) > 1 and [row.get("fwd") is None for row in one] == [
        row.get("fwd") is None for row in two
    ]
    for name in ("step", "loss", "grad_norm", "band_loss", "validation_loss", "fwd"):
        for a, b in zip(one, two, strict=True):
            if a.get(name) is not None:
                assert_close(b[name], a[name], atol=1e-5, rtol=1e-5) if name != "band_loss" else [
                    assert_close(b[name][band], a[name][band], atol=1e-5, rtol=1e-5) for band in a[name]
                ]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(root) -> None:
    log, began = root / "runs" / "dies" / "log.jsonl", 0.0

    def kill(launched: int) -> None:
        nonlocal began
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text()):
            assert Path("/proc", str(launched)).exists() and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = subprocess.run(["pgrep", "-P", str(launched)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        began = time.monotonic()

    words = train(root, "dies", "-p", "train_kimg=1000")
    done = as_process(*launcher(), "wddm", *words, root=root, timeout=60, watch=kill)
    assert done.returncode != 0 and time.monotonic() - began < 60 and "SIGKILL" in done.stderr


def test_train_refuses_other_settings_and_extends(root, capsys, monkeypatch) -> None:
    yaml_file = str(root / "params" / "tiny.yaml")
    small = ["train", yaml_file, "-p", "train_kimg=0.16", "-p", "widths=[8]"]
    assert main(small) == 0
    assert main([*small, "-p", "learning_rate=0.5"]) == 2
    error = capsys.readouterr().err
    assert "(learning_rate 0.002 -> 0.5), wanted the same" in error and error.count("\n") == 1
    longer = [*small, "-p", "train_kimg=0.32"]
    assert main(longer) == 2 and "--extend" in capsys.readouterr().err
    assert main([*longer, "--extend"]) == 0
    assert "extended from 0.16 to 0.32 kimg" in capsys.readouterr().out
    assert json.loads((root / "runs/tiny/log.jsonl").read_text().splitlines()[-1])["images_seen"] == 320


def test_divergence_is_one_line(root, capsys) -> None:
    """Each step multiplies the weights by -99."""
    far = [word for value in ("learning_rate=10", "weight_decay=10", "train_kimg=0.64") for word in ("-p", value)]
    assert main(["train", str(root / "params" / "tiny.yaml"), *far]) == 1
    assert "not finite" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_transformer_goes_the_same_way(root, capsys) -> None:
    """`backbone: dit` in the YAML: trained, taken up again, drawn from and evaluated as any other."""
    words = [
        "train", str(root / "params" / "tiny.yaml"), "-p", "run=dit", "-p", "backbone=dit", "-p", "widths=[16, 16]",
        "-p", "train_kimg=0.32", "-p", "metric_kimg=0", "-p", "class_conditional=true",
    ]  # fmt: skip
    assert main(words) == 0
    assert main([*words, "-p", "train_kimg=0.64", "--extend"]) == 0
    assert "resumed at step 20 of 40" in capsys.readouterr().out
    config = json.loads((root / "runs/dit/pipeline/backbone/config.json").read_text())
    assert (config["_class_name"], config["block_out_channels"], config["sample_size"]) == ("DiTModel", [16, 16], 4)
    drawn = str(root / "drawn")
    pipeline = str(root / "runs/dit/pipeline")
    options = ["--num-samples", "20", "--sampling-steps", "2", "--model-type", "DiT"]
    assert main(["sample", "--model-dir", pipeline, "--output-dir", drawn, *options]) == 0
    (folder,) = (root / "data").glob("digits-8-*")
    options = ["--reference", str(folder), "--fwd-level", "3", "--output", str(root / "metrics.json")]
    assert main(["evaluate", "--images", drawn, *options]) == 0
    assert "asked_share" in {score["key"] for score in json.loads((root / "metrics.json").read_text())["scores"]}
    assert main([*words[:-4], "-p", "attention_levels=[0]"]) == 2
    assert "attention_levels for a dit, which does not have it" in capsys.readouterr().err
