"""Checkpoints that survive a crash: folders of safetensors and one JSON, written aside, synced, renamed, checksummed.

    <folder>/step-00001000/{weights,ema,optimizer}.safetensors + state.json (with the sha256 of the others)

Nothing pickled is written or read. The last two are kept, and best/, where the held-out loss was least.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from wddm.files import sha256, written_aside

KEEP = 2


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, name: str | None = None) -> Path:
    """Write the checkpoint of `step`: a safetensors file per entry of `tensors`, and `state` as JSON.

    One with a `name` is kept apart from those of the steps, of which the last two stay.
    """
    final = folder / (name or f"step-{step:08d}")
    with written_aside(final) as aside:
        checksums = {}
        for group, members in tensors.items():
            file = aside / f"{group}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in members.items()}, file)
            checksums[file.name] = sha256(file)
        (aside / "state.json").write_text(json.dumps({"step": step, **state, "sha256": checksums}, indent=1))
    for old in listed(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def load_latest(folder: Path, notes: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
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


def listed(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def public(config: dict) -> dict:
    """A diffusers config without its private entries, whose order differs from process to process."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def difference(before: dict, after: dict) -> str:
    """What changed between two settings, as `name old -> new`, comma separated."""
    names = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in names)


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free `<folder>-1`, `-2`, ...: nothing is lost."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    os.replace(folder, kept)
    return kept


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
