"""Where a result comes from: the fingerprint of all that a notebook depends on, and the machine it ran on.

A notebook's first markdown cell declares the paths that it reads and writes, relative to the root:

    **Inputs:** `{data}/manifest.json`, `{dataset_path}`
    **Outputs:** `runs/{run}/pipeline/`

A parameter that is a list (`reports/{runs}/metrics.json`) stands for each of its items, `*` for whatever matches, and
`{data}` for this run's prepared set. Other files that a notebook reads are noted by its kernel (`watch`) and count too.
"""

import atexit
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any

from wddm.files import digest, digest_of
from wddm.workbook.experiments import Experiment
from wddm.workbook.parameters import expand, read_notebook
from wddm.workbook.records import prepared_set

PACKAGES = (
    "torch", "diffusers", "accelerate", "pytorch-wavelets", "torch-fidelity", "datasets", "numpy", "scipy", "papermill",
)  # fmt: skip
SHARED = ("metrics.json", "timings.json", "figures")  # several notebooks of a run write into them


def fingerprint(experiment: Experiment, notebook: Path) -> str:
    """sha256 of the notebook's code, its parameters, the package's source and the inputs that it declares."""
    parts = {
        "code": [cell["source"] for cell in read_notebook(notebook)["cells"] if cell["cell_type"] == "code"],
        "parameters": experiment.values(notebook), "source": source_hash(),
        "inputs": hashes(experiment.root, declared_paths(experiment, notebook, "Inputs")),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def outputs(experiment: Experiment, notebook: Path) -> list[Path]:
    """Paths that this notebook alone writes: its executed copy, and its declared outputs without those in SHARED."""
    executed = experiment.root / "reports" / experiment.run / f"{notebook.stem}.ipynb"
    return [executed, *(path for path in declared_paths(experiment, notebook, "Outputs") if path.name not in SHARED)]


def hashes(root: Path, paths: list[Path]) -> dict[str, str]:
    """path -> hash of its content; a path below the root is made relative to it."""
    return {str(path.relative_to(root) if path.is_relative_to(root) else path): digest(path) for path in paths}


def declared_paths(experiment: Experiment, notebook: Path, kind: str) -> list[Path]:
    """Paths that a notebook declares as its "Inputs" or "Outputs" (`kind`), without those whose parameter is None."""
    first = next((cell["source"] for cell in read_notebook(notebook)["cells"] if cell["cell_type"] == "markdown"), "")
    line = re.search(rf"\*\*{kind}:\*\*(.*?)(?=\n\n|\*\*|\Z)", first, re.DOTALL)
    known = prepared_set(experiment.root, experiment.run) | experiment.parameters
    known["data"] = known["data"] or "data/none"  # a path that does not exist: the set counts as missing
    paths: list[Path] = []
    for template in re.findall(r"`([^`]+)`", line[1] if line else ""):
        if unknown := set(re.findall(r"{(\w+)}", template)) - known.keys():
            raise ValueError(f"{notebook.name}: {kind}: `{template}` names {min(unknown)!r}, no parameter")
        for path in expand(template, known):
            pattern = experiment.root / Path(path).expanduser()
            paths += map(Path, sorted(glob(str(pattern)))) if "*" in path else [pattern]
    return paths


def watch(log: str, root: str, run: str) -> None:
    """In a notebook's kernel: write to `log`, a line each, the files below the root that are opened for reading.

    Left out are the run's own files, and what is not data: notebooks, the package, environments, hidden files.
    """
    from ipykernel.kernelapp import IPKernelApp

    descriptor, seen = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), set()
    own = tuple(f"{root}/{name}/" for name in (f"runs/{run}", f"reports/{run}", "notebooks"))
    packages = sys.prefix, os.path.dirname(os.path.dirname(__file__))

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        try:
            path, reads = os.path.join(os.getcwd(), arguments[0]), arguments[2] & os.O_ACCMODE == os.O_RDONLY
            below = path.startswith(f"{root}/") and "/." not in path[len(root) :]
            if reads and below and path not in seen and not path.startswith((*own, *packages)):
                seen.add(path)
                os.write(descriptor, f"{path}\n".encode(errors="surrogateescape"))
        except (AttributeError, OSError, TypeError):
            return  # not a path, or the interpreter is shutting down: the file must open all the same

    sys.addaudithook(note)
    if control := IPKernelApp.initialized() and IPKernelApp.instance().control_thread:
        atexit.register(control.join, 5.0)  # else ipykernel closes sockets that this thread still uses: a traceback


def opened(log: Path) -> list[Path]:
    """The files that `watch` has noted and that still exist; the log is removed."""
    lines = log.read_text(errors="surrogateescape").splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted({Path(os.path.normpath(line)) for line in lines if os.path.isfile(line)})


def environment(root: Path, seed: int | None) -> dict[str, Any]:
    """The commit, versions and machine of a run; None where they are unknown."""
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":!reports")
    device = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "cpu"
    return {
        "commit": commit, "dirty": None if commit is None else bool(changes), "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES}, "platform": platform.platform(),
        "cpus": os.cpu_count(), "device": device, "seed": seed,
    }  # fmt: skip


def source_hash() -> str:
    """Hash of the package's source as it is now, which is what a kernel imports."""
    return digest_of(package := Path(__file__).parents[1], sorted(package.rglob("*.py")))


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
