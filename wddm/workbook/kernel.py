"""Executes a notebook by papermill, in a kernel of this interpreter that Ctrl-C stops gently.

A first SIGINT, SIGTERM or SIGHUP interrupts the running cell, so that its `except` and `finally` can save a checkpoint;
a second one, or PATIENCE seconds, kills the kernel. Either way the notebook is saved as far as it came.
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
from typing import Any

PATIENCE = 15.0  # seconds that an interrupted cell has to save its work; Slurm kills after 30
ECHO = 1.0  # seconds in which a repeated signal counts as the same one (launchers like to forward it)
STOPPED = "killed", "KeyboardInterrupt: stopped"


class Stop:
    """Whether the user asked to stop. Each `listener(kill)` is called with False to stop gently, then True to kill."""

    def __init__(self) -> None:
        self.requested, self.began = False, 0.0
        self.listeners: set[Callable[[bool], None]] = set()
        self.timer = threading.Timer(PATIENCE, self.tell, [True])
        self.timer.daemon = True

    def __call__(self, signum: int = 0, frame: Any = None) -> None:
        """The signal handler."""
        if not self.requested:
            self.requested, self.began = True, time.monotonic()
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping: the running cell may save its work (once more to kill it)\n")
            self.timer.start()
            self.tell(False)
        elif time.monotonic() - self.began > ECHO:
            self.tell(True)

    def tell(self, kill: bool) -> None:
        for listener in tuple(self.listeners):
            listener(kill)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A `Stop` that handles the signals for the length of a `with` block, if that is in the main thread."""
    stop, before = Stop(), {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, stop)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        stop.timer.cancel()


def execute(
    source: Path, target: Path, parameters: dict[str, Any], stop: Stop, first: str = "", held: tuple[int, ...] = ()
) -> tuple[str, str | None]:
    """Run a notebook in the current folder, the root; returns "ok", "failed" or "killed", and the error in one line.

    `first`: code that the kernel runs first. `held`: descriptors of locks, which it holds for as long as it lives.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, engines, execute_notebook

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    engines.papermill_engines.register("wddm", _engine(stop, first, held))
    options = {"engine_name": "wddm", "kernel_name": "python3", "language": "python", "progress_bar": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            execute_notebook(str(source), str(target), parameters, **options)
    except KeyboardInterrupt:
        return STOPPED
    except PapermillExecutionError as error:
        if not stop.requested:
            return "failed", f"{error.ename}: {error.evalue}".split("\n")[0].strip().removesuffix(":")
    except (DeadKernelError, RuntimeError) as error:
        reason = "stopped, and killed" if stop.requested else "out of memory?"
        return "killed", f"{type(error).__name__}: the kernel died ({reason})"
    return STOPPED if stop.requested else ("ok", None)


def _engine(stop: Stop, first: str, held: tuple[int, ...]) -> type:
    """A papermill engine that starts kernels of this interpreter and obeys `stop`."""
    from jupyter_client import AsyncKernelManager, kernelspec
    from papermill import clientwrap, engines

    class Client(clientwrap.PapermillNotebookClient):
        def create_kernel_manager(self) -> AsyncKernelManager:
            specs = kernelspec.KernelSpecManager(kernel_dirs=[])  # none to search: what is left is this interpreter's
            self.km = AsyncKernelManager(kernel_spec_manager=specs)
            return self.km

        def execute(self) -> Any:
            stop.listeners.add(self.hear)
            try:
                return super().execute(pass_fds=held)
            finally:
                stop.listeners.discard(self.hear)

        def hear(self, kill: bool) -> None:
            group = self.km and getattr(self.km.provisioner, "pgid", None)
            if group:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL if kill else signal.SIGINT)  # an idle kernel ignores SIGINT

        def execute_cell(self, cell: Any, cell_index: int) -> Any:
            self.km.cleanup_connection_file()  # the kernel has read it; now no kill can leave it behind
            if stop.requested:
                raise KeyboardInterrupt
            return super().execute_cell(cell, cell_index)

    class Engine(engines.NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, *_: Any, **options: Any) -> None:
            begin = [f"--IPKernelApp.exec_lines={first}"] if first else []
            streams = {"stdout_file": sys.stdout, "stderr_file": sys.stdout, "coalesce_streams": True}
            Client(nb_man, timeout=None, extra_arguments=["--log-level=CRITICAL", *begin], **streams).execute()

    return Engine
