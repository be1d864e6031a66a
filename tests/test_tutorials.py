"""The tutorials: what they print is what they say they print, by strict nbval, and it would notice if it were not."""

import json
import os
import re
import shutil
import time
from copy import deepcopy
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


def nbval(root: Path, name: str) -> dict[str, str]:
    """{cell: outcome, "failed" with nbval's reason} of a strict run."""
    cells = code_cells(nbformat.read(root / f"notebooks/tutorials/{name}.ipynb", as_version=4))
    assert all(cell.execution_count for cell in cells)  # what was never executed would pass, whatever it prints
    report = root / f"{name}.xml"
    words = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "--color=no", "--rootdir", str(root)]
    words += ["-c", "/dev/null", f"--junitxml={report}", f"notebooks/tutorials/{name}.ipynb"]
    done = as_process("pytest", *words, root=root)
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


def misprinted(cells: list) -> dict[int, nbformat.NotebookNode]:
    """{number: a copy of that cell with one character changed}: in what it prints, in a table, in a caption."""
    found = {}
    for kind in ("text", "<table", "<figcaption"):
        key, at = ("text", r"[a-z](?=[^<>]*$)") if kind == "text" else ("text/html", r"[a-z](?=[^<>]*</)")
        for number, cell in enumerate(deepcopy(cells)):
            hit = [o if kind == "text" else o.get("data", {}) for o in cell.outputs]
            hit = [holder for holder in hit if key in holder and (kind == "text" or kind in holder[key])]
            if hit and number not in found:
                start = re.search(at, hit[0][key]).start()
                hit[0][key] = hit[0][key][:start] + "#" + hit[0][key][start + 1 :]
                cell.id, found[number] = f"{cell.id}-again", cell
                break
    assert len(found) == 3
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_strict_nbval(root, name: str) -> None:
    """Every code cell is run, and every one that prints is compared; then whatever can be moved moves its figure.

    In one of them three cells come once more, with one character changed: these fail, alone.
    """
    path = root / f"notebooks/tutorials/{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    wrong = sorted((misprinted(cells) if name == "wavelets" else {}).items())
    for number, copy in reversed(wrong):
        notebook.cells.insert(notebook.cells.index(cells[number]) + 1, copy)
    notebook.cells.append(nbformat.v4.new_code_cell(MOVED, execution_count=99))
    nbformat.write(notebook, path)
    began = time.monotonic()
    found = nbval(root, name)
    seconds = time.monotonic() - began
    failed = {cell: outcome for cell, outcome in found.items() if outcome != "passed"}
    assert failed.keys() == {f"Cell {number + 1 + before}" for before, (number, _) in enumerate(wrong)}, failed
    assert all("Cell outputs differ" in outcome for outcome in failed.values())
    assert len(found) == len(cells) + len(wrong) + 1
    assert seconds < SECONDS * max(1, os.getloadavg()[0] / os.cpu_count())  # on a machine that does nothing else


WRONG = """\
import inspect
from wddm import wavelets
source = inspect.getsource(wavelets)
for line in ("return torch.cat((a, *self._ordered(h, v, d))", "x = a.new_empty("):
    assert source.count(line) == 1
    source = source.replace(line, f"h = -h; {line}")
exec(source, vars(wavelets))
"""  # H upside down, in both directions, so that it still reconstructs perfectly


@pytest.mark.slow
def test_a_codec_with_a_wrong_sign_is_noticed(root) -> None:
    """By the cell that says what the codec does by hand; what comes after it is left out."""
    path = root / "notebooks/tutorials/wavelets.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (by_hand,) = (k for k, cell in enumerate(notebook.cells) if '"by hand:"' in cell.source)
    notebook.cells = [nbformat.v4.new_code_cell(WRONG, execution_count=99), *notebook.cells[: by_hand + 1]]
    nbformat.write(notebook, path)
    *passed, last = nbval(root, "wavelets").values()
    assert {*passed} == {"passed"} and "Cell outputs differ" in last and "by hand" in last


@pytest.mark.slow
def test_they_are_a_report_too(root) -> None:
    """Those with parameters that make them short are executed; the others show the outputs that nbval compares."""
    executed = "from_scratch", "diffusion_in_wavelet_space"
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
    """For cells that print, that show a figure, and that let it be moved."""
    path = root / "notebooks/tutorials/wavelets.ipynb"
    notebook = nbformat.read(path, as_version=4)
    kept = [cell for cell in code_cells(notebook) if cell.execution_count <= 4 or "book.explore(" in cell.source]
    assert len(kept) == 5
    notebook.cells, written = kept, []
    for cell in kept:
        cell.outputs = []
    nbformat.write(notebook, path)
    for _ in range(2):
        done = as_process(str(ROOT / "notebooks/refresh.py"), path.relative_to(root), root=root)
        assert done.returncode == 0, done.stderr
        written.append(path.read_bytes())
    assert written[0] == written[1] and b"image/png" in written[0] and WIDGET.encode() not in written[0]
