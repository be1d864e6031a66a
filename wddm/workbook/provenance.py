"""Where a result comes from: the fingerprint of all that a notebook depends on, and the machine it ran on.

A notebook's first markdown cell declares what it reads and writes, relative to the root, up to the next bold word:

    **Inputs:** `{data}/manifest.json`, `{dataset_path}`
    **Outputs:** `runs/{run}/pipeline/`

A list stands for each of its items, `*` for all that is there (`reports/{runs}/metrics.json`), and `{data}` for the
prepared set of this run. What a notebook opens without declaring it is noted by its kernel (`watch`) and counts too.
"""

import atexit
import functools
import hashlib
import itertools
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

from wddm.files import Digests
from wddm.workbook.experiments import Experiment
from wddm.workbook.parameters import read_notebook
from wddm.workbook.records import read_record

PACKAGES = (
    "torch", "diffusers", "accelerate", "pytorch-wavelets", "torch-fidelity", "datasets", "numpy", "scipy", "papermill",
)  # fmt: skip
SHARED = ("metrics.json", "timings.json")  # several notebooks of a run write into them


def fingerprint(experiment: Experiment, notebook: Path, known: Digests) -> str:
    """sha256 of the notebook's code, its parameters, the package's source and the inputs that it declares."""
    parts = {
        "code": [cell["source"] for cell in read_notebook(notebook)["cells"] if cell["cell_type"] == "code"],
        "parameters": experiment.values(notebook),
        "source": _source_hash(),
        "inputs": hashes(experiment.root, declared_paths(experiment, notebook, "Inputs"), known),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def outputs(experiment: Experiment, notebook: Path, known: Digests) -> dict[str, str]:
    """Content of what a notebook declares to write, and of itself as executed; of a shared file, that it is there."""
    executed = experiment.root / "reports" / experiment.run / f"{notebook.stem}.ipynb"
    found = hashes(experiment.root, [*declared_paths(experiment, notebook, "Outputs"), executed], known)
    shared = {path: "there" for path in found if Path(path).name in SHARED and found[path] != "absent"}
    return found | shared


def hashes(root: Path, paths: list[Path], known: Digests) -> dict[str, str]:
    """path, relative to the root if below it -> hash of its content."""
    return {str(path.relative_to(root) if path.is_relative_to(root) else path): known.of(path) for path in paths}


def declared_paths(experiment: Experiment, notebook: Path, kind: str) -> list[Path]:
    """The "Inputs" or "Outputs" that a notebook declares; one whose parameter is None is left out."""
    cells = read_notebook(notebook)["cells"]
    first = next((cell["source"] for cell in cells if cell["cell_type"] == "markdown"), "")
    line = re.search(rf"\*\*{kind}:\*\*(.*?)(?=\n\n|\*\*|\Z)", first, re.DOTALL)
    data = read_record(experiment.root, experiment.run).get("data")
    known = {"data": str(Path(data["path"]).parent) if data else None} | experiment.parameters
    paths = []
    for template in re.findall(r"`([^`]+)`", line[1] if line else ""):
        names = list(dict.fromkeys(re.findall(r"{(\w+)}", template)))
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{notebook.name}: {kind}: `{template}` names {unknown[0]!r}, no parameter")
        values = [known[name] for name in names]
        for chosen in itertools.product(*(each if isinstance(each, list) else [each] for each in values)):
            if None not in chosen:
                path = Path(template.format(**dict(zip(names, chosen, strict=True)))).expanduser()
                pattern = str(experiment.root / path)
                paths += [Path(found) for found in (sorted(glob(pattern)) if "*" in pattern else [pattern])]
    return paths


def watch(log: str, root: str, run: str) -> None:
    """In a notebook's kernel: write to `log`, a line each, the files below the root that are opened for reading.

    But for what this run writes itself, and what is no data: notebooks, code, environments.
    """
    from ipykernel.kernelapp import IPKernelApp

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    own = tuple(os.path.join(root, *parts, "") for parts in (("runs", run), ("reports", run), ("notebooks",)))
    packages, seen = tuple({sys.prefix, os.path.dirname(os.path.dirname(__file__))}), set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str):
            return
        try:
            path, reads = os.path.join(os.getcwd(), arguments[0]), arguments[2] & os.O_ACCMODE == os.O_RDONLY
            if not reads or path in seen or not path.startswith(os.path.join(root, "")):
                return
            seen.add(path)
            hidden = any(part[:1] == "." for part in path[len(root) :].split(os.sep))
            if not hidden and not path.startswith((*own, *packages)):
                os.write(descriptor, f"{path}\n".encode(errors="surrogateescape"))
        except (AttributeError, OSError, TypeError):
            return  # the folder is gone, or the interpreter is on its way out: what is opened must open all the same

    sys.addaudithook(note)
    control = IPKernelApp.instance().control_thread if IPKernelApp.initialized() else None
    if control:  # ipykernel closes its sockets while this thread still answers to the request to end: a traceback
        atexit.register(control.join, 5.0)


def opened(log: Path) -> list[Path]:
    """What `watch` has noted and is still there; the log is removed."""
    lines = log.read_text(errors="surrogateescape").splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted({Path(os.path.normpath(line)) for line in lines if os.path.isfile(line)})


def environment(root: Path, seed: int | None) -> dict[str, Any]:
    """The commit, versions and machine of a run; None where they are unknown."""
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":!reports")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(changes),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "cpu",
        "seed": seed,
    }


@functools.cache
def _source_hash() -> str:
    source = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in source)).hexdigest()


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
