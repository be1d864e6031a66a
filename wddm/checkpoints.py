"""Checkpoints that survive a crash: folders of safetensors and one JSON, written aside, synced, renamed, checksummed.

    <folder>/step-00001000/{weights,ema,optimizer,unread}.safetensors + state.json (with the sha256 of the others)

Nothing pickled is written or read. The last two are kept, and best/, the one with the lowest held-out loss.
"""

import itertools
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from accelerate import PartialState
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wddm.files import digest_of, sha256, written_aside

KEEP = 2
LAYOUT = 3  # version of what a checkpoint holds; it is part of the settings, so that other versions are refused
# modules that work before or after training: a change in them does not change what is learned
ELSEWHERE = {"__init__", "__main__", "cli", "experiment", "sources", "local", "decoding"}
ELSEWHERE |= {"pipeline", "bandrate", "loading", "cards", "sampling", "conditions"}

Tensors = dict[str, dict[str, Tensor]]


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], name: str | None = None) -> None:
    """Write the checkpoint of `step`: a safetensors file per entry of `tensors`, and `state` as JSON.

    A checkpoint with a `name` stays; of the others the last two are kept. OSError: this one was not written.
    """
    try:
        with written_aside(folder / (name or f"step-{step:08d}")) as aside:
            checksums = {}
            for group, members in tensors.items():
                file = aside / f"{group}.safetensors"
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in members.items()}, file)
                checksums[file.name] = sha256(file)
            state = {"step": step, "code": code(), **state, "sha256": checksums}
            (aside / "state.json").write_text(json.dumps(state, indent=1))
    except (OSError, SafetensorError) as error:
        kept, got = listed(folder), f"got {error} while writing the checkpoint of step {step} to {folder}"
        left = f"{kept[-1].name} is kept" if kept else "there is none before it"
        raise OSError(f"{got}, wanted room for it: free some and start again; {left}") from error
    for old in [path for path in listed(folder) if path.name <= f"step-{step:08d}"][:-KEEP]:  # later ones are damaged
        shutil.rmtree(old)


def load_latest(folder: Path, notes: list[str]) -> tuple[Tensors, dict[str, Any]] | None:
    """(tensors, state) of the newest intact checkpoint, or None; damaged ones are skipped, and named in `notes`."""
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
    """`load_latest` of <run>/checkpoints, if a run of these settings can go on with it; None if the run begins anew.

    A finished run of other code or, with `restart`, of other settings is set aside, and the run begins anew. With
    `extend`, train_kimg may grow. ValueError: the checkpoint is of other settings, and may not be set aside.
    """
    folder = run / "checkpoints"
    if (found := load_latest(folder, notes)) is None:
        return None
    state, before = found[1], found[1]["settings"]
    finished = state["step"] * before["batch_size"] >= before["train_kimg"] * 1000
    longer = extend and before["train_kimg"] < settings["train_kimg"]
    if not (before.get("measured") and settings["measured"]):  # one of them measured no distances
        before["measured"] = settings["measured"]
    changed = difference(before | ({"train_kimg": settings["train_kimg"]} if longer else {}), settings)
    if changed and not (finished and restart):
        remedy = "set them back, give the run another name, or, for more train_kimg alone, --extend it"
        raise ValueError(f"got other settings than {run} began with ({changed}), wanted the same: {remedy}")
    same_code = state["code"] == code()
    if changed := changed or "the code" * (finished and not longer and not same_code):
        PartialState().wait_for_everyone()  # until all have read it
        if PartialState().is_main_process:
            places = (run / f"checkpoints-{number}" for number in itertools.count(1))
            aside = folder.rename(next(place for place in places if not place.exists()))  # nothing is lost
            place = f"{run.name}/{aside.name}"
            notes.append(f"changed since the earlier run: {changed}; starting anew, that run is in {place}")
        return None
    history = state.setdefault("history", [])
    history += [f"the code changed at step {state['step']}"] * (not same_code)
    history += [f"extended from {before['train_kimg']:g} to {settings['train_kimg']:g} kimg"] * longer
    total = -(-settings["train_kimg"] * 1000 // settings["batch_size"])
    notes += [f"resumed at step {state['step']} of {total:.0f}", *history]
    return found


def listed(folder: Path) -> list[Path]:
    """Folders of finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def public(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config without its private entries, whose order differs from process to process."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What changed between two settings, as `name old -> new`, comma separated."""
    names = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in names)


def code() -> str:
    """A checksum of the source that decides what is learned: the package without subpackages and `ELSEWHERE`."""
    folder = Path(__file__).parent
    return digest_of(folder, (path for path in sorted(folder.glob("*.py")) if path.stem not in ELSEWHERE))


def reserved(folder: Path) -> AcquireReturnProxy:
    """Lock `folder` for this process until the context, or the process, ends; ValueError if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".training.lock", timeout=0, thread_local=False, is_singleton=True).acquire()
    except Timeout:
        got = f"got {folder}, where another process trains"
        raise ValueError(f"{got}, wanted one at a time: wait, stop it, or name another run") from None


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal. One line says which checkpoint is kept; notebooks show only that line."""

    def __init__(self, run: Path, step: int, total: int) -> None:
        kept = f"{run / 'checkpoints' / f'step-{step:08d}'} is kept: start it again to go on from there"
        super().__init__(f"training was stopped at step {step} of {total}; {kept}")

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Stop(threading.Event):
    """Within a `with` block Ctrl-C and SIGTERM set this event; they raise only in `cuttable`, so that nothing is left
    half changed. With several processes (not `alone`) only Ctrl-C sets it, without raising. Other threads hear neither.
    """

    raises = False

    def __init__(self, alone: bool = True) -> None:
        super().__init__()
        self.alone = alone

    def __enter__(self) -> Self:
        self.clear()  # of an earlier block
        signals = (signal.SIGINT, signal.SIGTERM) if self.alone else (signal.SIGINT,)
        here = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self._hear) for number in signals if here}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        self.set()
        if self.raises:
            raise KeyboardInterrupt

    @contextmanager
    def cuttable(self) -> Iterator[None]:
        """Within this context a signal raises KeyboardInterrupt at once; an earlier one raises it at the start."""
        self.raises = self.alone
        try:
            if self.raises and self.is_set():
                raise KeyboardInterrupt
            yield
        finally:
            self.raises = False
