"""What `make lab` adds to JupyterLab: git sees no change in a pipeline notebook that was only run and saved.

.gitattributes names the notebooks and their filters, which are set up here; tutorials keep their outputs. What the user
types into cells is a change. JupyterLab's own settings are in labconfig/, so that it does not ask about news.
"""

import subprocess
import warnings
from pathlib import Path

CLEAN = (
    ".venv/bin/jupyter nbconvert --stdin --stdout --to notebook --log-level ERROR"
    " --ClearMetadataPreprocessor.enabled=True"
    """ --ClearMetadataPreprocessor.preserve_cell_metadata_mask='["tags", "jupyter"]'"""
    """ --ClearMetadataPreprocessor.preserve_nb_metadata_mask='[("kernelspec",), ("language_info", "name")]'"""
)
FILTERS = {"notebook": f"{CLEAN} --ClearOutputPreprocessor.enabled=True", "tutorial": CLEAN}


def git(*words: str, folder: Path) -> bool:
    """Run a git command; returns whether it succeeded."""
    return subprocess.run(["git", *words], cwd=folder, capture_output=True).returncode == 0


def settle(model: dict, os_path: str, contents_manager: object) -> None:
    """After a save that left the content unchanged: update git's index, or `git status` lists the file for its size."""
    path = Path(os_path)
    if model["type"] == "notebook" and git("diff", "--quiet", "--", path.name, folder=path.parent):
        git("add", "--update", "--", path.name, folder=path.parent)


for name, command in FILTERS.items():
    git("config", f"filter.{name}.clean", command, folder=Path(__file__).parent)
warnings.filterwarnings("ignore", "Overriding existing post_save_hook")  # the server takes its configuration twice
c.FileContentsManager.post_save_hook = settle  # type: ignore[name-defined]  # noqa: F821
