"""Where a result comes from: the fingerprint of all that a notebook depends on, and the machine it ran on.

A notebook's first markdown cell declares what it reads and writes, relative to the root, up to the next bold word:

    **Inputs:** `data/{dataset}-{resolution}/manifest.json`, `{dataset_path}`
    **Outputs:** `runs/{run}/pipeline/`

A list stands for each of its items, and `*` for all that is there: `reports/{runs}/metrics.json`.
"""

import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any

from wddm.files import sha256
from wddm.workbook.experiments import Experiment
from wddm.workbook.parameters import read_notebook, read_schema

PACKAGES = (
    "wddm",
    "torch",
    "diffusers",
    "accelerate",
    "pytorch-wavelets",
    "torch-fidelity",
    "datasets",
    "numpy",
    "scipy",
    "papermill",
)
HASHED_WHOLE = 64 * 2**20  # bytes; a larger input is told from another by its size and time


def fingerprint(experiment: Experiment, notebook: Path) -> str:
    """sha256 of the notebook's code, the parameters that it names, the package's source and its inputs."""
    cells = read_notebook(notebook)["cells"]
    return _sha256(
        json.dumps(
            {
                "code": [cell["source"] for cell in cells if cell["cell_type"] == "code"],
                "parameters": {name: experiment.parameters[name] for name in read_schema(notebook)},
                "source": _source_hash(),
                "inputs": {str(path): _hash_path(path) for path in declared_paths(experiment, notebook, "Inputs")},
            },
            sort_keys=True,
        ).encode()
    )


def declared_paths(experiment: Experiment, notebook: Path, kind: str) -> list[Path]:
    """The "Inputs" or "Outputs" that a notebook declares; one whose parameter is None is left out."""
    cells = read_notebook(notebook)["cells"]
    first = next((cell["source"] for cell in cells if cell["cell_type"] == "markdown"), "")
    line = re.search(rf"\*\*{kind}:\*\*(.*?)(?=\n\n|\*\*|\Z)", first, re.DOTALL)
    paths = []
    for template in re.findall(r"`([^`]+)`", line[1] if line else ""):
        names = list(dict.fromkeys(re.findall(r"{(\w+)}", template)))
        if unknown := [name for name in names if name not in experiment.parameters]:
            raise ValueError(f"{notebook.name}: {kind}: `{template}` names {unknown[0]!r}, no parameter")
        values = [experiment.parameters[name] for name in names]
        for chosen in itertools.product(*(each if isinstance(each, list) else [each] for each in values)):
            if None not in chosen:
                paths += _matching(str(experiment.root / template.format(**dict(zip(names, chosen, strict=True)))))
    return paths


def _matching(path: str) -> list[Path]:
    """The path or, of one with a `*`, all that are there."""
    return [Path(found) for found in sorted(glob(path))] if "*" in path else [Path(path)]


def environment(root: Path, seed: int | None) -> dict[str, Any]:
    """The commit, versions and machine of a run; None where they are unknown."""
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":!reports")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(changes),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "cpu",
        "seed": seed,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def _source_hash() -> str:
    return _sha256("".join(_hash_path(path) for path in sorted(Path(__file__).parents[1].rglob("*.py"))).encode())


def _hash_path(path: Path) -> str:
    """Hash of a file's content, or of all files below a folder; "absent" when there is nothing."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _sha256("".join(f"{file.relative_to(path)} {_hash_path(file)}\n" for file in files).encode())
    if not path.exists():
        return "absent"
    return _hash_file(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.cache
def _hash_file(path: Path, size: int, modified: int) -> str:
    if size >= HASHED_WHOLE:
        return f"{size} bytes, {modified}"
    return sha256(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
