"""The tutorials: what they print is what they say they print, by strict nbval, and it would notice if it were not."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, as_process, wddm

from wddm.workbook.report import WIDGET, render

TUTORIALS = sorted((ROOT / "notebooks" / "tutorials").glob("*.ipynb"))
NAMES = ("diffusion_in_wavelet_space", "from_scratch", "measuring", "sampling", "ukan", "wavelets")
SECONDS = 60  # that a tutorial may take on two cores
FOLDED = {"source_hidden": True, "outputs_hidden": True}
MOVED = """\
from ipywidgets import Image, VBox
from ipywidgets.widgets.widget import _instances
for box in [one for one in _instances.values() if isinstance(one, VBox) and isinstance(one.children[-1], Image)]:
    for control in box.children[0].children:
        before = box.children[-1].value
        control.value = control.options[-1] if hasattr(control, "options") else control.max
        assert box.children[-1].value != before, control.description
"""
IGNORED = 2  # cells in all whose output is not compared


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / "tutorials" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def is_compared(cell: nbformat.NotebookNode) -> bool:
    """Whether strict nbval has words of this cell to compare, and does."""
    words = [output.get("text") or output.get("data", {}).get("text/plain") for output in cell.outputs]
    return any(words) and "nbval-ignore-output" not in tags(cell)


@pytest.fixture
def root(tmp_path) -> Path:
    """A workbook of its own, to run tutorials in."""
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return tmp_path


def nbval(root: Path, name: str, package: Path = ROOT) -> dict[str, str]:
    """{cell: outcome, "failed" with nbval's reason} of a strict run, by the wddm that `package` holds."""
    cells = code_cells(nbformat.read(root / f"notebooks/tutorials/{name}.ipynb", as_version=4))
    assert all(cell.execution_count for cell in cells)  # what was never executed would pass, whatever it prints
    report = root / f"{name}.xml"
    words = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "--color=no", "--rootdir", str(root)]
    words += ["-c", "/dev/null", f"--junitxml={report}", f"notebooks/tutorials/{name}.ipynb"]
    if package == ROOT:
        done = as_process("pytest", *words, root=root)
    else:
        environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", *words]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert report.exists(), done.stdout + done.stderr
    return outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    from xml.etree import ElementTree

    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [child.text or "" for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.get("name")] = f"failed: {problems[0]}" if problems else "passed"
    return found


def test_there_are_six() -> None:
    assert tuple(path.stem for path in TUTORIALS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_one_clean_run(name: str) -> None:
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [output for output in outputs if WIDGET in output.get("data", {})]
    assert sum(map(is_compared, cells)) >= 8
    assert any("book.explore(" in cell.source for cell in cells)  # and that figure follows: see test_strict_nbval
    words = [output | {"data": {**output.get("data", {}), "image/png": ""}} for output in outputs]
    text = json.dumps(words) + json.dumps(read(name).metadata)
    assert not re.search(r"/home/|/root/|/tmp/|/Users/|Warning|widget-state", text)


def test_few_outputs_are_left_out_of_the_comparison() -> None:
    cells = [cell for name in NAMES for cell in code_cells(read(name))]
    assert sum("nbval-ignore-output" in tags(cell) for cell in cells) <= IGNORED
    sources = "\n".join(cell.source for cell in cells)
    assert not re.search(r"NBVAL_|PYTEST_VALIDATE|%%time|perf_counter", sources)
    assert not {"nbval-skip", "raises-exception"} & {tag for cell in cells for tag in tags(cell)}


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_ends_in_exercises_with_solutions(name: str) -> None:
    notebook = read(name)
    first, text = notebook.cells[0].source, "\n".join(cell.source for cell in notebook.cells)
    assert first.startswith("# ") and all(f"**{word}:**" in first for word in ("Inputs", "Outputs", "Run it"))
    exercises = text[text.index("## Exercises") :]
    numbers = re.findall(r"\*\*Exercise (\d)\.\*\*", exercises)
    assert numbers in (["1", "2", "3"], ["1", "2", "3", "4"])
    assert (
        exercises.count("<details><summary>Solution</summary>\n\n") == exercises.count("\n</details>") == len(numbers)
    )
    solved = [cell for cell in code_cells(notebook) if "solution" in tags(cell)]
    assert solved and all(cell.metadata.jupyter == FOLDED and is_compared(cell) for cell in solved)
    assert all("solution" in tags(cell) for cell in code_cells(notebook)[-len(solved) :])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_strict_nbval(root, name: str) -> None:
    """Every code cell is run, and every one that prints is compared; then whatever can be moved moves its figure."""
    path = root / f"notebooks/tutorials/{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(MOVED, execution_count=99))
    nbformat.write(notebook, path)
    began = time.monotonic()
    found = nbval(root, name)
    seconds = time.monotonic() - began
    assert {cell: outcome for cell, outcome in found.items() if outcome != "passed"} == {}
    assert len(found) == len(code_cells(read(name))) + 1
    assert seconds < SECONDS * max(1, os.getloadavg()[0] / os.cpu_count())  # on a machine that does nothing else


@pytest.mark.slow
def test_one_changed_character_is_noticed(root) -> None:
    """In what a cell prints, in a table, in a caption: one each, and these cells fail alone."""
    path = root / "notebooks/tutorials/wavelets.ipynb"
    notebook = nbformat.read(path, as_version=4)
    changed = set()
    kinds = {"text": lambda o: o, "<table": lambda o: o.get("data", {}), "<figcaption": lambda o: o.get("data", {})}
    for kind, part in kinds.items():
        for number, cell in enumerate(code_cells(notebook)):
            key = "text" if kind == "text" else "text/html"
            hit = [part(o) for o in cell.outputs if kind == "text" or kind in o.get("data", {}).get("text/html", "")]
            hit = [holder for holder in hit if key in holder]
            if hit and number not in changed:
                at = re.search(r"[a-z](?=[^<>]*$)" if kind == "text" else r"[a-z](?=[^<>]*</)", hit[0][key]).start()
                hit[0][key] = hit[0][key][:at] + "#" + hit[0][key][at + 1 :]
                changed.add(number)
                break
    assert len(changed) == 3
    nbformat.write(notebook, path)
    found = nbval(root, "wavelets")
    failed = {cell for cell, outcome in found.items() if "Cell outputs differ" in outcome}
    assert failed == {f"Cell {number}" for number in changed}


@pytest.mark.slow
def test_a_codec_with_a_wrong_sign_is_noticed(root) -> None:
    """H upside down, in both directions, so that it still reconstructs perfectly."""
    package = root / "package"
    shutil.copytree(ROOT / "wddm", package / "wddm", ignore=shutil.ignore_patterns("__pycache__"))
    file = package / "wddm/wavelets.py"
    source = file.read_text()
    for line in ("return torch.cat((a, *self._ordered(h, v, d))", "x = a.new_empty("):
        assert source.count(line) == 1
        source = source.replace(line, f"h = -h; {line}")
    file.write_text(source)
    found = nbval(root, "wavelets", package)
    assert any("Cell outputs differ" in outcome and "by hand" in outcome for outcome in found.values())


@pytest.mark.slow
def test_they_are_a_report_too(root) -> None:
    """Executed: those with parameters that make them short, and two more. The others: of their committed outputs."""
    executed = "from_scratch", "wavelets", "diffusion_in_wavelet_space", "sampling"
    for name in executed:
        done = wddm(root, "run", "params/tutorials.yaml", "--only", name, train_kimg=0.64, kimg=0.64)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in {*NAMES} - {*executed}:
        shutil.copy(root / f"notebooks/tutorials/{name}.ipynb", root / "reports/tutorials")
        render(root / "reports/tutorials", name)
    for name in NAMES:
        page = (root / "reports/tutorials" / f"{name}.html").read_text()
        assert "<details><summary>Solution</summary>" in page and "<figcaption>" in page and "<img" in page
        assert not re.search(r"<(script|link|iframe)|(src|href)=\"?(http|//)", page)
        prose = re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
        assert page.count("Code and output, folded") == sum("solution" in tags(cell) for cell in code_cells(read(name)))
        assert "$" not in prose and WIDGET not in page
        assert ("<math" in page) == ("$" in "".join(c.source for c in read(name).cells if c.cell_type == "markdown"))


@pytest.mark.slow
def test_refreshing_gives_the_same_bytes(root) -> None:
    refresh = runpy.run_path(str(ROOT / "notebooks/refresh.py"))["refresh"]
    path = root / "notebooks/tutorials/wavelets.ipynb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        refresh(path)
        once = path.read_bytes()
        refresh(path)
    assert path.read_bytes() == once
