"""files: writing them whole or not at all, checksums, listing, fetching from the Hub; JSON and rows of JSON."""

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

SETTLED = 2.0  # seconds after a change before a file's times are sure to show the next one


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; a process reads it again only when size, times or inode change."""
    now = path.stat()
    settled = time.time() - max(now.st_mtime, now.st_ctime) > SETTLED
    read = _sha256 if settled else _sha256.__wrapped__  # the latter is not cached
    return read(path.absolute(), (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino))


@cache
def _sha256(path: Path, state: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all readable files below a folder with their names; "absent" if nothing is there."""
    if path.is_dir():
        return digest_of(path, [file for file, trouble in walk(path) if not trouble])
    return sha256(path) if path.exists() else "absent"


def digest_of(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 of these files below the folder `root`, with their names."""
    lines = (f"{sha256(file)} {file.relative_to(root)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


@contextmanager
def refusing(got: object, wanted: str, remedy: str) -> Iterator[None]:
    """Within this context, turn whatever a library raises into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:600] or type(error).__name__
        raise ValueError(f"got {got}, wanted {wanted} ({why}): {remedy}") from error


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A new file to write to; at the end it replaces `final`, or the file that `final` links to, in one step."""
    final = Path(os.path.realpath(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{os.urandom(4).hex()}.{final.name}")  # not the pid, which another machine may have too
    try:
        yield aside
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(final: Path, suffix: str = "partial") -> Iterator[Path]:
    """A new folder to write to; once it is on the disk, it replaces `final`, or the folder that `final` links to."""
    final = Path(os.path.realpath(final))
    aside, old = (final.with_name(f".{final.name}.{end}") for end in (suffix, "old"))
    shutil.rmtree(aside, ignore_errors=True)  # left by an earlier attempt that died
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step; a reader never sees half of it."""
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is absent, damaged or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; [] without a file. A last line cut short by a crash is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a file for `read_rows`; it replaces a last line that was cut short."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as rows:
        if end := rows.seek(0, os.SEEK_END):
            rows.seek(end - 1)
            if rows.read(1) != b"\n":
                rows.seek(0)
                rows.truncate(rows.read().rfind(b"\n") + 1)
        rows.write((json.dumps(row) + "\n").encode())


def plain(path: Path | str) -> str:
    """A path as text that prints on one line: unprintable characters are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))


def walk(root: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, str]]:
    """Every file below a folder, and "" or why it cannot be read; by name, following links, without hidden files."""
    try:
        mode = root.stat().st_mode
        inside = sorted(root.iterdir()) if stat.S_ISDIR(mode) else []
    except OSError as error:
        yield root, "a link that leads nowhere" if isinstance(error, FileNotFoundError) else str(error.strerror)
        return
    if not stat.S_ISDIR(mode):
        yield root, "no regular file" if not stat.S_ISREG(mode) else "no permission" * (not os.access(root, os.R_OK))
    elif (here := os.path.realpath(root)) in above:
        yield root, "a link that leads round"
    else:
        for path in inside:
            if path.name[0] != ".":
                yield from walk(path, (*above, here))


def snapshot(
    repo: str, patterns: list[str], *, repo_type: str = "dataset", revision: str | None = None, **hub: Any
) -> Path:
    """Folder, named after the commit, with a Hub repository's files that match `patterns`; with [] none is fetched.

    If the Hub cannot be reached, files come from the local cache. `hub`: cache_dir, token, local_files_only.
    """
    from huggingface_hub import HfApi, snapshot_download

    fetch = partial(snapshot_download, repo, repo_type=repo_type, revision=revision, allow_patterns=patterns)
    try:  # one request that is not retried, so that a machine without network says so at once
        about = HfApi(token=hub.get("token")).repo_info(repo, repo_type=repo_type, revision=revision, timeout=10)
        return Path(fetch(**hub) if patterns else str(about.sha))
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        with suppress(Exception):
            return Path(fetch(**hub | {"local_files_only": True}))
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    raise ConnectionError(
        f"got nothing from the Hugging Face Hub for {repo} ({reason}), wanted it or its cache: connect to the network, "
        f"give a copy (dataset_path, model_dir), or bring the cache of `hf download {repo} --repo-type {repo_type}`"
    )
