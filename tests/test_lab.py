"""`make lab`: what JupyterLab saves of the pipeline's notebooks does not show in git, but for what the user typed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from nbformat.v4 import new_output

KINDS = ["01_prepare", "analysis/compare", "tutorials/wavelets"]


def git(folder: Path, words: str) -> str:
    return subprocess.run(["git", *words.split()], cwd=folder, capture_output=True, text=True, check=True).stdout


def config_folder() -> str:
    """The folder of Jupyter's settings that `make lab` names."""
    recipe = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.findall("JUPYTER_CONFIG_PATH=([^$ ]+)", recipe)[0]


def test_jupyterlab_does_not_ask_about_news(monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyterlab.commands import get_app_dir
    from jupyterlab_server.settings_utils import get_settings

    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(ROOT / config_folder()))
    folder, name = Path(get_app_dir()), "@jupyterlab/apputils-extension:notification"
    settings, _ = get_settings(str(folder / "settings"), str(folder / "schemas"), "", name)
    assert settings["schema"]["properties"]["fetchNews"]["default"] == "false"


@pytest.fixture
def workbook(tmp_path: Path) -> Path:
    """A repository with a notebook of each kind."""
    if not os.access(ROOT / ".venv" / "bin" / "jupyter", os.X_OK):
        pytest.skip("no .venv, whose nbconvert the filter calls")
    for name in (".gitattributes", "notebooks/lab", *(f"notebooks/{kind}.ipynb" for kind in KINDS)):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    git(tmp_path, "init -q")
    git(tmp_path, "add .gitattributes notebooks")
    git(tmp_path, "-c user.name=a -c user.email=a commit -qm start")
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_what_a_run_leaves_in_a_notebook_does_not_show_in_git(workbook: Path, name: str) -> None:
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    from traitlets.config.loader import PyFileConfigLoader

    config = PyFileConfigLoader("jupyter_server_config.py", str(workbook / config_folder())).load_config()
    contents = LargeFileManager(root_dir=str(workbook), config=config)

    model = contents.get(f"notebooks/{name}.ipynb")
    cells = [cell for cell in model["content"]["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        if not name.startswith("tutorials"):
            cell |= {"execution_count": number + 1, "outputs": [new_output("stream", text="ok")]}
        cell["metadata"] |= {"execution": {"iopub.status.idle": "2026-01-01T00:00:00Z"}, "scrolled": True}
    model["content"]["metadata"]["language_info"] |= {"version": "3.13.0", "file_extension": ".py"}
    contents.save(model, model["path"])
    assert '"scrolled"' in (workbook / model["path"]).read_text()
    assert git(workbook, "status --porcelain --untracked-files=no") == ""

    cells[0]["source"] += "  # typed"
    contents.save(model, model["path"])
    assert git(workbook, "status --porcelain --untracked-files=no") == f" M {model['path']}\n"
    changed = re.findall("^[+-](?![+-]).*", git(workbook, "diff --unified=0"), re.M)
    assert len(changed) == 2 and "# typed" in changed[1]
