"""What a Trainer leaves and finds: its checkpoints, whether they are of the same run, and the pipeline in the end."""

import json
import math
import zlib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from wddm import checkpoints
from wddm.files import written_aside
from wddm.objective import build_solver
from wddm.pipeline import WaveletPipeline
from wddm.steps import cut_log

if TYPE_CHECKING:
    from wddm.training import Trainer

# what may change from one start of a run to the next: no weight depends on it
FREE = {"cpu", "extend", "restart", "checkpoint_kimg", "preview_kimg", "tensorboard", "gradient_checkpointing"}
FREE |= {"fwd_kimg", "fwd_images", "fwd_level"}
# modules that decide what is learned
CODE = ("wavelets", "kan", "ukan", "objective", "batches", "devices", "update", "training")


def save(trainer: "Trainer", name: str | None = None) -> None:
    """Write the checkpoint of the step that the trainer is at; OSError, in one line, where that fails."""
    moments = trainer.optimizer.state_dict()["state"]
    tensors = {
        "weights": trainer.model.state_dict(),
        "ema": dict(zip(dict(trainer.model.named_parameters()), trainer.ema.shadow_params, strict=True)),
        "optimizer": {f"{i}.{key}": value for i, state in moments.items() for key, value in state.items()},
        "meter": trainer.meter.state(),
    }
    state = {"schedule": trainer.lr.state_dict(), "settings": settings(trainer), "code": code(), "best": trainer.best}
    folder = trainer.folder / "checkpoints"
    try:
        checkpoints.save(folder, trainer.step, tensors, state, name)
    except (OSError, SafetensorError) as error:
        kept = checkpoints.listed(folder)
        raise OSError(
            f"got {error} while writing the checkpoint of step {trainer.step} to {folder}, wanted room for it: free "
            f"some and start again; {f'{kept[-1].name} is kept' if kept else 'there is none before it'}"
        ) from error


def take_up(trainer: "Trainer") -> None:
    """Go on from the newest checkpoint, or begin; refuse one of other settings, as `extend` and `restart` allow.

    A finished run of other code is set aside; an unfinished one goes on, and a note says so.
    """
    folder = trainer.folder / "checkpoints"
    if found := checkpoints.load_latest(folder, trainer.notes):
        state = found[1]
        before, now = state["settings"], settings(trainer)
        finished = state["step"] >= math.ceil(before["train_kimg"] * 1000 / before["batch_size"])
        longer = trainer.extend and before["train_kimg"] < now["train_kimg"]
        changed = checkpoints.difference(before | ({"train_kimg": now["train_kimg"]} if longer else {}), now)
        other_code = state["code"] != code()
        if changed and not (finished and trainer.restart):
            raise ValueError(
                f"got other settings than {trainer.folder} began with ({changed}), wanted the same: set them back, "
                "give the run another name, or, for more train_kimg alone, --extend it"
            )
        if changed or (other_code and finished and not longer):
            trainer.accelerator.wait_for_everyone()
            if trainer.accelerator.is_main_process:
                kept, why = checkpoints.set_aside(folder).name, changed or "the code"
                trainer.notes.append(f"changed since the earlier run: {why}; starting anew, that run is in {kept}")
        else:
            load(trainer, *found)
            aside = ", with code that has changed" if other_code else ""
            trainer.notes.append(f"resumed at step {trainer.step} of {trainer.total_steps}{aside}")
            if longer:
                trainer.notes.append(
                    f"extended from {before['train_kimg']:g} to {trainer.train_kimg:g} kimg: from here on the schedule "
                    "is that of the longer run, so the learning rate goes from "
                    f"{state['schedule']['_last_lr'][0]:.3g} to {trainer.lr.get_last_lr()[0]:.3g} at this step"
                )
    if trainer.accelerator.is_main_process:
        trainer.folder.mkdir(parents=True, exist_ok=True)
        cut_log(trainer.folder, trainer.step)
        for picture in (trainer.folder / "previews").glob("*.png"):
            if int(picture.stem) > trainer.images_seen:
                picture.unlink()


def load(trainer: "Trainer", tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Put what `save` wrote back in its place."""
    trainer.step, trainer.best = state["step"], state["best"]
    trainer.model.load_state_dict(tensors["weights"])
    for shadow, (name, _) in zip(trainer.ema.shadow_params, trainer.model.named_parameters(), strict=True):
        shadow.copy_(tensors["ema"][name])
    trainer.ema.optimization_step = trainer.step
    trainer.meter.load(tensors["meter"], trainer.accelerator.device)
    optimizer = trainer.optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors["optimizer"].items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = value
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
    schedule = trainer.lr
    schedule.load_state_dict(state["schedule"])
    schedule._last_lr = [  # at this run's length, which `extend` may have changed
        base * rule(trainer.step) for base, rule in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(trainer.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def settings(trainer: "Trainer") -> dict:
    """Everything that the outcome depends on, as JSON would read it back."""
    described = {f.name: getattr(trainer, f.name) for f in fields(trainer)[4:] if f.init and f.name not in FREE}
    described |= {"network": {"class": type(trainer.model).__name__, **checkpoints.public(trainer.model.config)}}
    described |= {
        "codec": checkpoints.public(trainer.codec.config),
        "images": [*trainer.images.shape, images_crc(trainer.images)],
    }
    return json.loads(json.dumps(described))


def images_crc(images: np.ndarray) -> int:
    """A checksum of up to 256 of the images, to notice other data of the same shape."""
    return zlib.crc32(np.ascontiguousarray(images[:: max(1, len(images) // 256)]))


def code() -> int:
    """A checksum of the source that decides what is learned."""
    return zlib.crc32(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in CODE))


def save_pipeline(trainer: "Trainer") -> None:
    """The averaged weights as a pipeline folder, written aside and renamed."""
    averaged = type(trainer.model).from_config(trainer.model.config).to(trainer.accelerator.device)
    trainer.ema.copy_to(averaged.parameters())
    solver = build_solver("ddim", trainer.prediction_type, spacing="trailing", codec=trainer.codec)
    with written_aside(trainer.folder / "pipeline") as aside:
        WaveletPipeline(averaged.eval(), solver, trainer.codec).save_pretrained(aside)
