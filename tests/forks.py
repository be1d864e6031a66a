"""Commands and their kernels as forks of one process that has imported torch and diffusers: importing costs seconds of
CPU, a fork none. All else is as in a process of its own: folder, environment, streams, signals, exit code.

`python tests/forks.py` reads a request a line, as JSON, and answers each with the pid of the command and, when that has
ended, its exit code.
"""

import asyncio
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any

IMPORTED = (  # by commands and notebooks
    "wddm.experiment", "wddm.sampling", "wddm.cli", "wddm.plots.charts", "wddm.metrics.scores",
    "wddm.metrics.inception", "wddm.studies.sampling", "papermill.execute", "papermill.cli", "nbclient", "nbconvert",
    "ipykernel.kernelapp", "ipykernel.zmqshell", "ipywidgets", "pandas", "seaborn", "sklearn.datasets",
    "sklearn.neighbors", "sklearn.linear_model", "scipy.stats",
)  # fmt: skip
KEPT: list[Any] = []  # objects of the parent that a child must not close


def kernel_of(command: list[str], **options: Any) -> subprocess.Popen:
    """Like jupyter_client's launch_kernel, but the kernel is a fork of this process and not a new interpreter."""
    words = command[command.index("ipykernel_launcher") + 1 :]
    sys.stdout.flush()
    sys.stderr.flush()
    ready, started = os.pipe()
    if not (child := os.fork()):
        try:
            os.setsid()
            os.close(started)
            KEPT.extend((asyncio.events._get_running_loop(), asyncio.get_event_loop_policy()))
            asyncio.events._set_running_loop(None)
            asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
            _as_if_new(options.get("cwd"), options.get("env") or {})
            if matplotlib := sys.modules.get("matplotlib"):  # else it reads what the kernel sets in the environment
                matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
            sys.argv = ["ipykernel_launcher", *words]
            importlib.import_module("ipykernel.kernelapp").launch_new_instance(words)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(started)
    os.read(ready, 1)  # returns when the kernel leads a process group: signals go to the group
    os.close(ready)
    process = subprocess.Popen.__new__(subprocess.Popen)
    process.args, process.pid, process.returncode, process._child_created = command, child, None, True
    process._waitpid_lock = threading.Lock()
    process.stdin = process.stdout = process.stderr = None
    return process


def _as_if_new(folder: str | None, environment: dict[str, str]) -> None:
    """Set signal handlers, environment and folder as in a process that was just started."""
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    if folder:
        os.chdir(folder)


def _become(module: str, words: list[str], folder: str, environment: dict[str, str], streams: list[str]) -> int:
    """Run as `python -m module words...`, or `python path words...` if `module` is a path; returns the exit code."""
    _as_if_new(folder, environment)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from jupyter_client.provisioning import local_provisioner

    local_provisioner.launch_kernel = kernel_of
    sys.argv = [module, *words]
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code: Any = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    return code if isinstance(code, int) else 1


def serve() -> None:
    sys.path[:] = [path for path in sys.path if path not in ("", os.path.dirname(os.path.abspath(__file__)))]
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # forks need not search what they share for garbage
    for line in sys.stdin:
        if not (child := os.fork()):
            code = 1
            try:
                code = _become(**json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
