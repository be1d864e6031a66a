"""files: written whole or not at all, durably where it matters, and told apart by their content; rows of JSON."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `final` in one step: a reader never sees half of it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{os.getpid()}.{final.name}")
    try:
        yield aside
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(final: Path, suffix: str = "partial") -> Iterator[Path]:
    """A new folder to write to, which takes the place of `final` once it is whole, on the disk too."""
    aside, old = (final.with_name(f".{final.name}.{end}") for end in (suffix, "old"))
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier attempt that died
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """A JSON object a line; a last line cut short by a crash is left out, and there may be no file."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add a line to what `read_rows` reads, in the place of one that was cut short."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as rows:
        rows.seek(0)
        rows.truncate(rows.read().rfind(b"\n") + 1)
        rows.write((json.dumps(row) + "\n").encode())
