"""files: written whole or not at all, durably where it matters, and told apart by their content; rows of JSON."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SETTLED = 2.0  # seconds after a change until a file's times tell the next change from it


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """sha256 of files by content, remembered in a JSON file for as long as size, times and inode stay the same.

    So that a large file is read once, and one that was replaced by another of the same name and size is noticed. To
    lose the file costs reading everything again, nothing else.
    """

    def __init__(self, memory: Path) -> None:
        self.memory, self._changed = memory, False
        try:
            self._known: dict[str, list] = json.loads(memory.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        """Of a file, or of all files below a folder with their names; "absent" where there is nothing."""
        if path.is_dir():
            return self.of_files(path, sorted(file for file in path.rglob("*") if file.is_file()))
        return self._of_file(path) if path.exists() else "absent"

    def of_files(self, root: Path, files: Iterable[Path]) -> str:
        """Of these files below a folder, with their names."""
        lines = (f"{self._of_file(file)} {file.relative_to(root)}\n" for file in files)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

    def save(self) -> None:
        """Keep what was found, where that is allowed."""
        if self._changed:
            with suppress(OSError), whole(self.memory) as aside:
                aside.write_text(json.dumps(self._known))

    def _of_file(self, path: Path) -> str:
        stat, name = path.stat(), str(path.absolute())
        now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        *before, digest = self._known.get(name, [None])
        if before != now:
            digest = sha256(path)
            if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
                self._known[name], self._changed = [*now, digest], True
        return digest


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `final` in one step: a reader never sees half of it.

    Of a link, the file that it leads to is replaced.
    """
    final = Path(os.path.realpath(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{os.getpid()}.{final.name}")
    try:
        yield aside
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(final: Path, suffix: str = "partial") -> Iterator[Path]:
    """A new folder to write to, which takes the place of `final` once it is whole, on the disk too.

    Of a link (to a bigger disk, say), the folder that it leads to is replaced; the link stays.
    """
    final = Path(os.path.realpath(final))
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
        if end := rows.seek(0, os.SEEK_END):
            rows.seek(end - 1)
            if rows.read(1) != b"\n":
                rows.seek(0)
                rows.truncate(rows.read().rfind(b"\n") + 1)
        rows.write((json.dumps(row) + "\n").encode())
