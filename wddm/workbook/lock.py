"""A lock on a run, so that two commands never work on one run at a time.

It is `flock` on runs/.locks/<run>: held by whoever has the file open, which the processes that a command starts
inherit, and released by the system when the last of them dies. So neither a reused pid nor a reboot blocks a run.
"""

import fcntl
import os
import time
from pathlib import Path

PATIENCE = 1.0, 20.0  # seconds to wait for the lock; and where its command is dead, for what that has started to end


def acquire(root: Path, run: str) -> int:
    """The lock as a file descriptor: to close it, or to die, releases it. ValueError where it does not get free."""
    path = root / "runs" / ".locks" / run
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, began = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), time.monotonic()
    while not _try(descriptor, fcntl.LOCK_EX):
        holder = path.read_text()
        if time.monotonic() - began > PATIENCE[not _is_alive(holder)]:
            os.close(descriptor)
            remedy = "wait for it to end, or choose another name with -p run=..."
            raise ValueError(f"run {run!r} is under way (process {holder or 'unknown'}): {remedy}")
        time.sleep(0.05)
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def is_held(root: Path, run: str) -> bool:
    """Whether a command works on this run, or something that one has started."""
    try:
        with (root / "runs" / ".locks" / run).open() as file:
            return not _try(file.fileno(), fcntl.LOCK_SH)
    except OSError:
        return False


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, OSError) as error:
        return isinstance(error, PermissionError)  # someone else's
    return True
