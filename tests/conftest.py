"""Shared fixtures: reference outputs and real images where they are at hand, else the tests that need them skip."""

import gc
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers and their kernels share the cores; threads on top only wait
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and where two are asked for, they sleep while they wait

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script: tests interrupt what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

import local_data
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
VARYING = ("images_per_s", "memory_gb")  # fields of a `Step`; all others depend on the settings alone


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def launcher() -> list[str]:
    """What to put between `python -m` and a module of ours to run it in two processes on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = str(ROOT / "params" / "accelerate" / "cpu.yaml")
    return ["accelerate.commands.launch", "--config_file", config, "--main_process_port", port, "-m"]


SERVERS: list[subprocess.Popen] = []


def as_process(
    module: str, *words: object, root: Path, timeout: float = 900,
    watch: Callable[[int], object] = lambda child: None, **environment: str,
) -> subprocess.CompletedProcess:  # fmt: skip
    """`python -m module words...` in a folder, as a fork: see forks.py. `watch` is called with its pid meanwhile."""
    if not SERVERS:
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        alone |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # threads do not live in forks
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}  # select sees only unread bytes
        SERVERS.append(subprocess.Popen([sys.executable, str(ROOT / "tests/forks.py")], env=alone, **pipes))
    (server,) = SERVERS
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {"module": module, "words": [*map(str, words)], "folder": str(root), "environment": environment}
        server.stdin.write(json.dumps(request | {"streams": [*map(str, streams)]}).encode() + b"\n")
        try:
            watch(int(server.stdout.readline()))
            if not select.select([server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired([module, *words], timeout)
        except BaseException:  # a late answer would be taken for that to the next request
            SERVERS.remove(server)
            server.kill()
            raise
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([module, *words], code, *(path.read_text() for path in streams))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported is not searched again, and the rest rarely: of three files, 6 % less CPU
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish() -> None:
    for server in SERVERS:
        server.communicate()


def wddm(root: Path, *arguments: str, **parameters: object) -> subprocess.CompletedProcess:
    """`wddm` in a workbook, parameters given with -p."""
    options = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    return as_process("wddm", *arguments, *options, root=root)


def dead_links(page: Path) -> list[str]:
    """The links of a page that lead neither to the web nor to a file."""
    links = re.findall(r"""<[^>]* (?:href|src)=["'](?!https?:|mailto:|data:)([^"']+)""", page.read_text())
    return [link for link in links if not (page.parent / unquote(link.partition("#")[0])).exists()]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A workbook with nothing run in it."""
    folder = tmp_path_factory.mktemp("workbook")
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Noise, uint8 (23, 16, 16, 3)."""
    return local_data.pictures()


@pytest.fixture
def hub_copy(tmp_path: Path, pictures: np.ndarray) -> Path:
    """The pictures in the Hub's Parquet layout."""
    return local_data.hub_copy(tmp_path / "copy", pictures)


@pytest.fixture(scope="session")
def published() -> Path:
    """Folder of a checkpoint in the published format, with reference outputs of the published system."""
    folder = SHARED / "fixtures" / "published-ukan-l1"
    if not folder.is_dir():
        pytest.skip("needs ../shared/fixtures/published-ukan-l1, which is not here")
    return folder


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """Local copy of CIFAR-10 in the Hub's Parquet layout."""
    folder = SHARED / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/cifar10, which is not here")
    return folder
