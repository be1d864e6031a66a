"""Checkpoints that survive a crash: folders of safetensors and one JSON, written aside, synced, renamed, checksummed.

    <folder>/step-00001000/{weights,ema,optimizer,meter}.safetensors + state.json (with the sha256 of the others)

Nothing pickled is written or read. The last two are kept, and best/, where the held-out loss was lowest.
"""

import hashlib
import itertools
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wddm.files import sha256, written_aside

KEEP = 2
LAYOUT = 2  # of what a checkpoint holds; those of another layout are refused
# what comes before or after training, so that a change there does not change what is learned
ELSEWHERE = {"__init__", "__main__", "cli", "experiment", "sources", "decoding"}
ELSEWHERE |= {"pipeline", "bandrate", "conditions", "loading", "cards", "sampling"}

Tensors = dict[str, dict[str, Tensor]]


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], name: str | None = None) -> None:
    """Write the checkpoint of `step`: a safetensors file per entry of `tensors`, and `state` as JSON.

    One with a `name` is kept apart from those of the steps, of which the last two stay.

    Raises:
        OSError: it could not be written, for want of room perhaps; the earlier ones stay.
    """
    try:
        with written_aside(folder / (name or f"step-{step:08d}")) as aside:
            checksums = {}
            for group, members in tensors.items():
                file = aside / f"{group}.safetensors"
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in members.items()}, file)
                checksums[file.name] = sha256(file)
            state = {"step": step, "layout": LAYOUT, "code": code(), **state, "sha256": checksums}
            (aside / "state.json").write_text(json.dumps(state, indent=1))
    except (OSError, SafetensorError) as error:
        kept = listed(folder)
        raise OSError(
            f"got {error} while writing the checkpoint of step {step} to {folder}, wanted room for it: free some and "
            f"start again; {f'{kept[-1].name} is kept' if kept else 'there is none before it'}"
        ) from error
    for old in listed(folder)[:-KEEP]:
        shutil.rmtree(old)


def load_latest(folder: Path, notes: list[str]) -> tuple[Tensors, dict[str, Any]] | None:
    """(tensors, state) of the newest intact checkpoint, or None; a damaged one is passed over, and noted."""
    for path in reversed(listed(folder)):
        try:
            state = json.loads((path / "state.json").read_text())
            damaged = [name for name, digest in state["sha256"].items() if sha256(path / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            damaged = [f"state.json ({error})"]
        if not damaged:
            return {Path(name).stem: load_file(path / name) for name in state["sha256"]}, state
        notes.append(f"{path}: {', '.join(damaged)} damaged, going back to the checkpoint before")
    return None


def take_up(
    run: Path, settings: dict[str, Any], notes: list[str], extend: bool, restart: bool
) -> tuple[Tensors, dict[str, Any]] | None:
    """`load_latest` of <run>/checkpoints, if a run of these settings can go on with it; None if it begins anew.

    That is after a finished run of other code or, to `restart`, of other settings: it is set aside. To `extend`, a
    larger train_kimg is no other setting.

    Raises:
        ValueError: the checkpoint is of other settings, or of an older layout, and may not be left behind.
    """
    folder = run / "checkpoints"
    if (found := load_latest(folder, notes)) is None:
        return None
    state, before = found[1], found[1]["settings"]
    finished = state["step"] * before["batch_size"] >= before["train_kimg"] * 1000
    longer = extend and before["train_kimg"] < settings["train_kimg"]
    changed = difference(before | ({"train_kimg": settings["train_kimg"]} if longer else {}), settings)
    refusal = (
        f"got other settings than {run} began with ({changed}), wanted the same: set them back, give the run "
        "another name, or, for more train_kimg alone, --extend it"
    )
    if state.get("layout") != LAYOUT:
        changed = "the layout of checkpoints"
        refusal = (
            f"got checkpoints of an older layout in {folder}, wanted those of this version: rename {folder.name}/, "
            "give the run another name, or finish it with the version that began it"
        )
    if changed and not (finished and restart):
        raise ValueError(refusal)
    if not changed and finished and not longer and state["code"] != code():
        changed = "the code"
    if not changed:
        return found
    PartialState().wait_for_everyone()  # to have read it
    if PartialState().is_main_process:
        notes.append(f"changed since the earlier run: {changed}; starting anew, that run is in {set_aside(folder)}")
    return None


def listed(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def public(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config without its private entries, whose order differs from process to process."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What changed between two settings, as `name old -> new`, comma separated."""
    names = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in names)


def changes(state: dict[str, Any], train_kimg: float, total_steps: int, lr: float) -> list[str]:
    """What to tell of a run that goes on from `state` to a length of `train_kimg`, at the learning rate `lr`."""
    aside = "" if state["code"] == code() else ", with code that has changed"
    notes = [f"resumed at step {state['step']} of {total_steps}{aside}"]
    if (before := state["settings"]["train_kimg"]) != train_kimg:
        notes.append(
            f"extended from {before:g} to {train_kimg:g} kimg, whose schedule takes the learning rate from "
            f"{state['lr']:.3g} to {lr:.3g} at this step"
        )
    return notes


def code() -> str:
    """A checksum of the source that decides what is learned: the package without its folders and `ELSEWHERE`."""
    modules = (path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in ELSEWHERE)
    return hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free `<folder>-1`, `-2`, ...: nothing is lost."""
    places = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
    return folder.rename(next(place for place in places if not place.exists()))


def reserved(folder: Path) -> AcquireReturnProxy:
    """A context: until it ends, or the process does, `folder` is this process's own; ValueError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".training.lock", timeout=0, thread_local=False, is_singleton=True).acquire()
    except Timeout:
        raise ValueError(
            f"got {folder}, where another process trains, wanted one at a time: wait, stop it, or name another run"
        ) from None


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within it, Ctrl-C only sets the event, so that a step is never cut in half. Main thread only, else no effect."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
