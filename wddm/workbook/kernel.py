"""One notebook, executed by papermill in a kernel of this interpreter, which Ctrl-C stops gently.

A first SIGINT or SIGTERM interrupts the running cell, so that its `except` and `finally` can save a
checkpoint; a second one, or half a minute, kills the kernel. Either way the notebook is saved as far as it
came.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

PATIENCE = 30.0  # seconds that an interrupted cell has to save its work
ECHO = 1.0  # seconds in which a repeated signal counts as the same one (launchers like to forward it)


class Stop:
    """Whether the user asked to stop. Listeners are told: `listener(kill)`, gently first, then to kill."""

    def __init__(self) -> None:
        self.requested_at: float | None = None
        self.listeners: set[Callable[[bool], None]] = set()
        self.timer = threading.Timer(PATIENCE, self.tell, [True])
        self.timer.daemon = True

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    def __call__(self, signum: int, frame: Any) -> None:
        """The signal handler."""
        if self.requested_at is None:
            self.requested_at = time.monotonic()
            os.write(2, b"\nstopping: the running cell may save its work (once more to kill it)\n")
            self.timer.start()
            self.tell(False)
        elif time.monotonic() - self.requested_at > ECHO:
            self.tell(True)

    def tell(self, kill: bool) -> None:
        for listener in tuple(self.listeners):
            listener(kill)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A `Stop` that SIGINT and SIGTERM set for the length of a `with` block."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        stop.timer.cancel()


class Terminal:
    """Shows a notebook's streams. In a file, a line that was redrawn by \\r appears once, as it ended."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.live, self.line = out, out.isatty(), ""

    def write(self, text: str) -> None:
        if self.live:
            self.line = text.rpartition("\n")[2]
            self.out.write(text)
            return
        *lines, self.line = (self.line + text).replace("\r\n", "\n").split("\n")
        for line in lines:
            self.out.write(_last_drawn(line) + "\n")
        self.line = self.line[self.line.rstrip("\r").rfind("\r") + 1 :]

    def flush(self) -> None:
        self.out.flush()

    def end_line(self) -> None:
        """Finish a line that the notebook left open."""
        if self.line:
            self.out.write("\n" if self.live else _last_drawn(self.line) + "\n")
        self.line = ""
        self.flush()


def _last_drawn(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


def execute(source: Path, target: Path, parameters: dict[str, Any], stop: Stop) -> tuple[str, str | None]:
    """Run notebook `source` into `target` (both relative to the current folder, where the kernel works too).

    Returns the state it ended in, "ok", "failed" or "killed", and the error as one line or None.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    terminal = Terminal(sys.stdout)
    try:
        _papermill(source, target, parameters, stop, terminal)
        return ("killed", "KeyboardInterrupt: stopped") if stop.requested else ("ok", None)
    except KeyboardInterrupt:
        return "killed", "KeyboardInterrupt: stopped"
    except PapermillExecutionError as error:
        if stop.requested:
            return "killed", "KeyboardInterrupt: stopped"
        return "failed", f"{error.ename}: {error.evalue}".split("\n")[0].strip().removesuffix(":")
    except (DeadKernelError, RuntimeError) as error:
        reason = "stopped, and killed" if stop.requested else "out of memory?"
        return "killed", f"{type(error).__name__}: the kernel died ({reason})"
    finally:
        terminal.end_line()


def _papermill(source: Path, target: Path, parameters: dict[str, Any], stop: Stop, terminal: Terminal):
    from papermill.engines import papermill_engines
    from papermill.execute import execute_notebook

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    papermill_engines.register("wddm", _engine(stop))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        execute_notebook(
            str(source),
            str(target),
            parameters,
            engine_name="wddm",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            stdout_file=terminal,
            stderr_file=terminal,
            coalesce_streams=True,
        )


def _client(stop: Stop) -> type:
    """A notebook client whose kernel is this interpreter and which heeds `stop`."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from papermill.clientwrap import PapermillNotebookClient

    class Client(PapermillNotebookClient):
        cell_runs = False  # an idle kernel ignores an interrupt

        def create_kernel_manager(self):
            # No folders to search: what remains is the native kernel, that of sys.executable.
            self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
            return self.km

        def execute(self):
            stop.listeners.add(self.hear)
            try:
                return super().execute()
            finally:
                stop.listeners.discard(self.hear)

        def hear(self, kill):
            group = self.km and self.km.provisioner and self.km.provisioner.pgid
            if group and (kill or self.cell_runs):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL if kill else signal.SIGINT)

        def execute_cell(self, cell, cell_index):
            if stop.requested:
                raise KeyboardInterrupt
            self.cell_runs = False
            return super().execute_cell(cell, cell_index)

        def process_message(self, message, cell, cell_index):
            if message["msg_type"] == "execute_input":
                self.cell_runs = True
                if stop.requested:  # while the cell was on its way
                    self.hear(False)
            return super().process_message(message, cell, cell_index)

    return Client


def _engine(stop: Stop) -> type:
    """A papermill engine that executes by `_client`."""
    from papermill.engines import NBClientEngine

    client = _client(stop)

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(
            cls,
            nb_man,
            kernel_name,
            log_output=False,
            stdout_file=None,
            stderr_file=None,
            start_timeout=60,
            input_path=None,
            **options,
        ):
            client(
                nb_man,
                timeout=None,
                startup_timeout=start_timeout,
                log=logging.getLogger("papermill"),
                extra_arguments=["--log-level=CRITICAL"],
                stdout_file=stdout_file,
                stderr_file=stderr_file,
                **options,
            ).execute()

    return Engine
