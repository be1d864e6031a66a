"""The runner and what notebooks use of it, on tiny workbooks that the tests write themselves."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, as_process

from wddm import cli, workbook
from wddm.cli import main
from wddm.files import digest, write_json
from wddm.workbook import cluster, kernel, provenance, records, runner
from wddm.workbook.experiments import load_experiments
from wddm.workbook.parameters import parse_parameters, read_yaml
from wddm.workbook.report import WIDGET

FIRST = """\
run: str = "quickstart"           # name of the run
seed: int = 0                     # of everything random
count: int | None = None          # images
learning_rate: float = 2e-4       # peak
backbone: str = "unet"            # unet or ukan; the denoiser
flip: bool = False
levels: list[int] = [1, 2]
labels: list[int | str] | None = None
"""
PREPARE = 'run: str = "quickstart"\nseed: int = 0\nlimit: int | None = None   # that the pipeline takes too\n'
SECOND = 'run: str = "quickstart"\nseed: int = 0\nlevel: int = 1   # depth\n'


def write_notebook(path: Path, parameters: str | None, *cells: str, prose: str = "# Title") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = [
        ("markdown", prose, []),
        *([("code", parameters, ["parameters"])] if parameters else []),
        *(("code", source, []) for source in cells),
    ]
    content = [
        {"cell_type": kind, "id": f"c{number}", "metadata": {"tags": tags}, "source": source}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for number, (kind, source, tags) in enumerate(sources)
    ]
    path.write_text(json.dumps({"cells": content, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A workbook of two notebooks, the second of which reads what the first writes; the current folder."""
    write_notebook(
        tmp_path / "notebooks/01_prepare.ipynb",
        FIRST,
        "1 + 1",
        prose="# Prepare\n\n**Inputs:** `input.txt`\n\n**Outputs:** `runs/{run}/data.txt`",
    )
    write_notebook(tmp_path / "notebooks/02_train.ipynb", SECOND, "2 + 2", prose="**Inputs:** `runs/{run}/data.txt`")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/x.yaml").write_text("level: 2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(root: Path, text: str, *overrides: str) -> list:
    (root / "params/x.yaml").write_text(text)
    return load_experiments(Path("params/x.yaml"), root, list(overrides))


def status(root: Path, run: str = "x") -> dict:
    return json.loads((root / "reports" / run / "status.json").read_text())


def states(root: Path, run: str = "x") -> list[str]:
    return [entry["state"] for _, entry in sorted(status(root, run).items())]


# ------------------------------------------------------------------------------------------------- parameters


def test_schema_is_read_from_the_cell():
    schema = parse_parameters(FIRST, "01")
    assert list(schema) == ["run", "seed", "count", "learning_rate", "backbone", "flip", "levels", "labels"]
    assert schema["learning_rate"].default == 2e-4 and schema["learning_rate"].help == "peak"
    assert schema["count"].type == "int | None" and schema["flip"].help == ""


def test_a_parameter_that_nothing_takes_is_refused(root):
    """In a notebook that reports on a run; those that every run has (run, seed) are recorded anyway."""
    opens, more = "from wddm import workbook\nbook = workbook.open_run(run)", "extra: list[int] = [1]\n"
    for cells, refused in ((["1 + 1"], False), ([opens], True), ([opens, "print(level, extra)"], False),
                           ([f"{opens}\nexperiment.prepare(book)"], False)):  # fmt: skip
        write_notebook(root / "notebooks/02_train.ipynb", SECOND + more, *cells)
        if refused:
            with pytest.raises(ValueError, match=r"^02_train.ipynb: nothing takes the parameter 'level': use it"):
                load(root, "")
        else:
            assert load(root, "")


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "x: int",
        "x: dict = {}",
        "x: int = 2 ** 3",
        "import os",
        "x: int = 'a'",
        "x: int = (",
    ],
)
def test_a_bad_parameters_cell_names_its_notebook(source):
    with pytest.raises(ValueError, match=r"^01_a\.ipynb: parameters cell: ") as caught:
        parse_parameters(source, "01_a.ipynb")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("count: null", "count", None),
        ("count: 5", "count", 5),
        ("flip: yes", "flip", True),
        ("levels: [3]", "levels", [3]),
        ("labels: [3, cat]", "labels", [3, "cat"]),
        ("backbone: ukan", "backbone", "ukan"),
        ("", "seed", 0),
    ],
)
def test_values_are_converted(root, text, name, value):
    result = load(root, text)[0].parameters[name]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("level: two", "level: got 'two' (str), wanted int, e.g. level: 1"),
        ("level: true", "level: got True (bool), wanted int, e.g. level: 1"),
        ("level: 2.0", "level: got 2.0 (float), wanted int, e.g. level: 1"),
        ("level: null", "level: got None (NoneType), wanted int, e.g. level: 1"),
        ("flip: 'true'", "flip: got 'true' (str), wanted bool, e.g. flip: false"),
        ("learning_rate: fast", "learning_rate: got 'fast' (str), wanted float, e.g. learning_rate: 0.0002"),
        ("learning_rate: true", "learning_rate: got True (bool), wanted float, e.g. learning_rate: 0.0002"),
        ("learning_rate: .nan", "learning_rate: got nan (float), wanted float, e.g. learning_rate: 0.0002"),
        ("levels: 3", "levels: got 3 (int), wanted list[int], e.g. levels: [1, 2]"),
        ("levels: [1, a]", "levels: got [1, 'a'] (list), wanted list[int], e.g. levels: [1, 2]"),
        ("labels: [true]", "labels: got [True] (list), wanted list[int | str] | None, e.g. labels: [1]"),
        ("count: x", "count: got 'x' (str), wanted int | None, e.g. count: 1"),
        ("lerning_rate: 1", "unknown parameter 'lerning_rate', did you mean 'learning_rate'?"),
        ("run: ../x", "run: got '../x', wanted a plain folder name of letters, digits and . _ = + -"),
        ("run: ..", "run: got '..', wanted a plain folder name of letters, digits and . _ = + -"),
        ("- 1", "got a list, wanted one `key: value` per line"),
        ("sweep: [1]", "sweep: wanted lists of values, e.g. sweep: {level: [0, 1, 2]}"),
        ("level: 1\nsweep: {level: [1]}", "sweep: got level swept and fixed at once, wanted one: remove the other"),
        ("notebooks: [zzz]", "notebooks: there is no 'zzz'; known: 01_prepare, 02_train"),
        ("notebooks: [02_tran]", "notebooks: there is no '02_tran', did you mean '02_train'?"),
        (
            "sweep: {level: [1]}\nsummary: [02_tran]",
            "summary: there is no '02_tran', did you mean '02_train'?",
        ),
        ("sweep: {level: [1]}\nsummary: 02_train", "summary: got '02_train', wanted a list, e.g. [analysis/compare]"),
        (
            "summary: [02_train]",
            "summary: got one without a sweep, wanted both: it looks at the runs of the sweep",
        ),
    ],
)
def test_bad_yaml_is_refused(root, text, message):
    with pytest.raises(ValueError) as caught:
        load(root, text)
    assert str(caught.value) == f"params/x.yaml: {message}"


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
BAD_YAML = [  # what the file holds, and what the one line says of it
    ("level: 1\nlevel: 2", "line 2: got 'level' twice"),
    ("'level': 1\nlevel: 2", "line 2: got 'level' twice"),
    ("sweep: {level: [1], level: [2]}", "line 1: got 'level' twice"),
    (BOMB, "line 1: got an anchor (&), alias (*) or tag (!)"),
    ("level: *a", "alias (*)"),
    ("level: !!python/object/apply:os.system [ls]", "tag (!)"),
    ("level: !!int x", "tag (!)"),
    ("<<: {level: 2}\nlvel: 2", "got a merge key (<<), wanted its keys: write them out"),
    *((f"seed: {text}", f"line 1: got {text}, wanted plain decimal digits")
      for text in ("010", "0x10", "0b1", "1_000", "1:30", "12:30:45", "2024-01-01", "-017")),
    ("learning_rate: 1_0.5", "line 1: got 1_0.5, wanted plain decimal digits"),
    ("learning_rate: 1:30.5", "line 1: got 1:30.5, wanted plain decimal digits"),
    ("backbone: 2024-01-01 10:00:00", "else quote it"),
    ("levels: [1, 010]", "line 1: got 010, wanted plain decimal digits"),
    ("seed: " + "1" * 400, "19 at most"),
    ("seed: " + "1" * 5000, "19 at most"),
    ("learning_rate: " + "1" * 400 + ".0", "learning_rate: got inf (float), wanted float"),
    ("learning_rate: 1e400", "learning_rate: got '1e400' (str)"),
    ("learning_rate: .inf", "learning_rate: got inf (float)"),
    ("learning_rate: -.inf", "learning_rate: got -inf (float)"),
    ("level: 0o7", "level: got '0o7' (str), wanted int"),
    ("level: 1e3", "level: got '1e3' (str), wanted int"),
    ("backbone: no", "backbone: got False (bool), wanted str, e.g. backbone: unet; if it is a text, quote it: \"no\""),
    ("backbone: On", "quote it: \"yes\""),
    ("backbone: 010.5", "backbone: got 10.5 (float), wanted str"),
    ("backbone: 12", "quote it: \"12\""),
    ("backbone: [a]", "backbone: got ['a'] (list), wanted str"),
    ("backbone: {a: {b: c}}", "backbone: got {'a': {'b': 'c'}} (dict), wanted str"),
    ("levels: [[1]]", "levels: got [[1]] (list), wanted list[int]"),
    ("level: " + "x" * 5000, "level: got 'xxxxx"),
    ("recipe: [a]", "recipe: there is no ['a']"),
    ("recipe: {a: b}", "recipe: there is no {'a': 'b'}"),
    ("recipe: null", "recipe: there is no None"),
    ("\tlevel: 1", "line 1: found character '\\t' that cannot start any token"),
    ("level: `a`", "line 1: found character '`'"),
    ("level: 1\n seed: 2", "line 2: mapping values are not allowed here"),
    ("level: 'a", "found unexpected end of stream"),
    ("? [a]\n: 1", "line 1: found unhashable key"),
    ("level: 1\n---\nseed: 1", "line 2: but found another document"),
    ("[" * 5000, "is not valid YAML"),
    ("level", "got a str, wanted one `key: value` per line"),
    ("12", "got a int, wanted one `key: value` per line"),
    ("=: 1", "unknown parameter '='"),
    ("<<: {level: 2}", "got a merge key (<<), wanted its keys: write them out"),
    ("null: 1", "unknown parameter 'None'"),
    ("1: 1", "unknown parameter '1'"),
    ("x" * 5000 + ": 1", "mapping values are not allowed here"),
    (b"\xff\xfe\x00", "cannot be read (it is no UTF-8 text)"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be read (it is no UTF-8 text)"),
    (b"level: 1\x00", "is not valid YAML"),
    (b"# " + b"x" * 200_000, "got more than 100,000 bytes"),
    ("sweep: 3", "sweep: wanted lists of values"),
    ("sweep: {level: 3}", "sweep: wanted lists of values"),
    ("sweep: {level: []}", "sweep: wanted lists of values"),
    ("sweep: {run: [a, b]}", "sweep: got run swept and fixed at once, wanted one"),
    ("sweep: {level: [1, a]}", "level: got 'a' (str), wanted int"),
    (f"sweep: {{level: {[*range(99)]}, seed: {[*range(99)]}}}", "got 9801 combinations, wanted 1000 at most"),
    ("sweep: {levels: [" + ", ".join(f"{[*range(k)]}" for k in (1, 200)) + "]}", "200 at most"),
    ("notebooks: 01_prepare", "notebooks: got '01_prepare', wanted a list"),
    ("notebooks: []", "notebooks: got [], wanted a list"),
    ("notebooks: [[a]]", "notebooks: got [['a']], wanted a list"),
    ("summary: [01_prepare]", "summary: got one without a sweep"),
    *((f"run: {name!r}", f"run: got {name!r:.100}, wanted a plain folder name")
      for name in ("", ".", "..", ".hidden", "-x", "a/b", "/a", "a b", "a ", " a", "index.html", "README.md",
                   "é", "a;b", "`a`", "<script>", "x" * 201, "x" * 300)),
    ("run: 7", "run: got 7 (int), wanted str"),
    ("run: null", "run: got None"),
]  # fmt: skip


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without an end")
def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="/dev/zero: got more than 100,000 bytes"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize(("content", "message"), BAD_YAML)
def test_a_bad_file_is_refused_in_one_line_that_says_what_to_do(root, capsys, content, message):
    (root / "params/x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    assert main(["run", "params/x.yaml"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and message in error and error.startswith("wddm: params/x.yaml: ")
    assert len(error) < 500 and time.monotonic() - began < 5
    assert not (root / "reports").exists() and not (root / "runs").exists()


BAD_OPTIONS = [
    (["params/none.yaml"], "cannot be read (No such file or directory)"),
    (["params"], "cannot be read (Is a directory)"),
    (["params/x.yaml/y.yaml"], "cannot be read (Not a directory)"),
    (["x" * 300 + ".yaml"], "cannot be read (File name too long)"),
    ([], "Missing argument"),
    (["params/x.yaml", "--jobs", "0"], "--jobs"),
    (["params/x.yaml", "--jobs", "two"], "--jobs"),
    (["params/x.yaml", "--bogus"], "--bogus"),
    (["params/x.yaml", "--only", "nine"], "there is no notebook 'nine' in this run; known: 01_prepare, 02_train"),
    (["params/x.yaml", "--only", "prepare", "--from", "train"], "which leave no notebook to run"),
    (["params/x.yaml", "params/x.yaml"], "two experiments are called 'x'"),
    *((["params/x.yaml", "-p", text], message) for text, message in (
        ("level", "-p level: wanted key=value"), ("=1", "-p =1: wanted key=value"), ("level=[", "-p level: is not"),
        ("level=010", "-p level: is not valid YAML (line 1: got 010"), ("level=&a 1", "anchor"), ("level=", "got None"),
        ("level={a: 1}", "level: got {'a': 1} (dict)"), ("level=a: b: c", "mapping values"), ("levl=1", "did you mean"),
        ("level=1:30", "plain decimal digits"), ("run=..", "wanted a plain folder name"), ("recipe=[a]", "recipe:"),
        ("run=" + "x" * 300, "200 at most"), ("backbone=no", "quote it"), ("notebooks=x", "wanted a list"),
        ("sweep={seed: [1, 1]}", "two experiments are called"), ("le\nvel", "-p le vel: wanted key=value"),
        ("level=\0", "-p level: is not valid YAML"),
        ("level=" + "9" * 400, "19 at most"), ("level=1\nseed: [", "-p level: is not valid YAML"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS)
def test_bad_arguments_are_refused_in_one_line(root, capsys, arguments, message):
    assert main(["run", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and message in error and error.startswith("wddm: "), error
    assert not (root / "reports").exists() and not (root / "runs").exists()


def test_outside_of_a_workbook_the_line_says_where_to_go(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["run", "params/x.yaml"], ["index"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "is not inside a workbook" in error
        assert "cd into a clone of it, or give the path of a YAML in one: wddm run path/to" in error


def test_every_mistake_gets_a_line(root):
    with pytest.raises(ValueError) as caught:
        load(root, "level: a\nlevl: 1", "seed=b")
    assert str(caught.value).splitlines() == [
        "params/x.yaml: level: got 'a' (str), wanted int, e.g. level: 1",
        "params/x.yaml: unknown parameter 'levl', did you mean 'level'?",
        "-p: seed: got 'b' (str), wanted int, e.g. seed: 0",
    ]


def test_overrides_are_checked_like_the_file(root):
    experiment = load(root, "level: 2", "level=3", "learning_rate=1e-3", "run=other")[0]
    assert (experiment.run, experiment.parameters["level"]) == ("other", 3)
    assert experiment.parameters["learning_rate"] == 1e-3
    with pytest.raises(ValueError, match=r"^-p: level: got 'two'"):
        load(root, "", "level=two")
    with pytest.raises(ValueError, match=r"^-p level: wanted key=value$"):
        load(root, "", "level")


def test_a_sweep_makes_a_run_of_every_combination(root):
    experiments = load(root, "sweep: {level: [0, 1], backbone: [unet, ukan]}", "seed=7")
    names = [experiment.run for experiment in experiments]
    assert names == [
        "x-level=0-backbone=unet",
        "x-level=0-backbone=ukan",
        "x-level=1-backbone=unet",
        "x-level=1-backbone=ukan",
    ]
    assert [experiment.parameters["run"] for experiment in experiments] == names
    assert {experiment.parameters["seed"] for experiment in experiments} == {7}
    assert load(root, "sweep: {levels: [[1, 2]]}")[0].run == "x-levels=_1_2_"


def test_notebooks_must_agree(root):
    write_notebook(root / "notebooks/03_more.ipynb", "seed: int = 1")
    with pytest.raises(ValueError, match=r"^seed is `int = 0` in 01_prepare.ipynb but `int = 1` in 03_more"):
        load(root, "")
    write_notebook(root / "notebooks/03_more.ipynb", "seed: int | None = None\ncount: int = 3")
    with pytest.raises(ValueError, match=r"^count is `int \| None = None` in 01_prepare.ipynb but `int = 3`"):
        load(root, "")
    write_notebook(root / "notebooks/03_more.ipynb", "seed: int | None = None")
    experiment = load(root, "seed: 7")[0]
    assert experiment.values(root / "notebooks/03_more.ipynb") == {"seed": 7}  # as the first one has it
    write_notebook(root / "notebooks/03_more.ipynb", None)
    with pytest.raises(ValueError, match=r"^03_more.ipynb: has no cell tagged 'parameters'"):
        load(root, "")


def test_saved_parameters_repeat_the_run(root):
    write_notebook(root / "notebooks/analysis/depth.ipynb", "depth: float = 1.0\nrun: str = 'quickstart'")
    experiment = load(root, "notebooks: [analysis/depth]\ndepth: 1e-5\nrun: deep")[0]
    (root / "params/again.yaml").write_text(experiment.as_yaml())
    again = load_experiments(root / "params/again.yaml", root)[0]
    assert (again.run, again.notebooks) == ("deep", experiment.notebooks)
    assert again.parameters == experiment.parameters == {"depth": 1e-5, "run": "deep"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "params/none.yaml"],
            "wddm: params/none.yaml: got a file that cannot be read (No such file or directory), wanted a YAML of "
            "parameters: give another\n",
        ),
        (
            ["run", "params/x.yaml", "-p", "levl=1"],
            "wddm: -p: unknown parameter 'levl', did you mean 'level'?\n",
        ),
        (
            ["run", "params/x.yaml", "--only", "nine"],
            "wddm: there is no notebook 'nine' in this run; known: 01_prepare, 02_train\n",
        ),
        (
            ["run", "params/x.yaml", "params/x.yaml"],
            "wddm: run: two experiments are called 'x'; give each its own name, no combination twice\n",
        ),
    ],
)
def test_command_line_refuses_in_one_line(root, capsys, arguments, message):
    assert main(arguments) == 2
    assert capsys.readouterr().err == message
    assert not (root / "reports").exists()


def test_invalid_yaml_is_one_line(root, capsys):
    (root / "params/x.yaml").write_text("a: [1\nb: 2")
    assert main(["run", "params/x.yaml"]) == 2
    assert re.fullmatch(r"wddm: params/x\.yaml: is not valid YAML .*\n", capsys.readouterr().err)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, wddm.workbook, wddm.cli;"
        "heavy = {'torch', 'numpy', 'papermill', 'nbconvert', 'pandas', 'matplotlib', 'IPython'};"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -------------------------------------------------------------------------- what runs, with a stand-in kernel


@pytest.fixture
def launched(root, monkeypatch) -> list[str]:
    """Replaces the kernel: lists the notebooks launched, writes outputs, fails where a file fail-<notebook> exists."""
    names = []

    def execute(source, target, parameters, *_):
        names.append(source.stem)
        entry = records.read_json(target.parent / "status.json")[source.stem]
        assert records.is_locked(root, parameters["run"])
        assert entry["state"] == "running" and entry["pid"] == os.getpid()
        target.write_text(source.read_text())
        place = Path("runs") / parameters["run"]
        place.mkdir(parents=True, exist_ok=True)
        if source.stem == "01_prepare":
            (place / "data.txt").write_text(str(parameters["seed"]))
        workbook.Run(parameters["run"], root, place, target.parent, source.stem).record(**{f"m{source.stem}": 1})
        return ("failed", "ValueError: no") if (root / f"fail-{source.stem}").exists() else ("ok", None)

    def render(folder, name):
        (folder / f"{name}.html").touch()
        return folder / f"{name}.html"

    monkeypatch.setattr(kernel, "execute", execute)
    monkeypatch.setattr(runner, "render", render)
    monkeypatch.setattr(cli, "preflight", lambda experiment: None)  # it knows the parameters of the real notebooks
    return names


def test_what_is_unchanged_is_skipped(root, launched, capsys):
    assert main(["run", "params/x.yaml"]) == 0 and launched == ["01_prepare", "02_train"]
    assert main(["run", "params/x.yaml"]) == 0 and len(launched) == 2
    assert "[1/2] 01_prepare unchanged, skipped" in capsys.readouterr().out
    assert states(root) == ["ok", "ok"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: (root / "input.txt").write_text("new"), ["01_prepare"]),  # its output stays the same
        (lambda root: (root / "runs/x/data.txt").write_text("new"), ["01_prepare"]),  # not what it left
        (lambda root: (root / "runs/x/data.txt").unlink(), ["01_prepare"]),
        (lambda root: (root / "reports/x/02_train.html").unlink(), ["02_train"]),
        (lambda root: (root / "reports/x/02_train.ipynb").write_text("{}"), ["02_train"]),
        (lambda root: (root / "reports/x/metrics.json").write_text('{"m01_prepare": 2}'), ["01_prepare", "02_train"]),
        (lambda root: (root / "params/x.yaml").write_text("level: 3"), ["02_train"]),
        (lambda root: (root / "params/x.yaml").write_text("level: 2\nflip: true"), ["01_prepare"]),
        (lambda root: (root / "params/x.yaml").write_text("level: 2\nseed: 5"), ["01_prepare", "02_train"]),
        (lambda root: write_notebook(root / "notebooks/02_train.ipynb", SECOND, "3 + 3"), ["02_train"]),
        (
            lambda root: write_notebook(
                root / "notebooks/02_train.ipynb",
                SECOND,
                "2 + 2",
                prose="# Other prose\n\n**Inputs:** `runs/{run}/data.txt`",
            ),
            [],
        ),
    ],
)
def test_what_changed_runs_again(root, launched, change, expected):
    main(["run", "params/x.yaml"])
    launched.clear()
    change(root)
    assert main(["run", "params/x.yaml"]) == 0 and launched == expected
    assert states(root) == ["ok", "ok"]


def test_the_package_source_counts(root, launched, monkeypatch):
    main(["run", "params/x.yaml"])
    monkeypatch.setattr(provenance, "source_hash", lambda: "other")
    main(["run", "params/x.yaml"])
    assert launched == ["01_prepare", "02_train"] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--only", "train"], ["02_train"]),
        (["--only", "01_prepare"], ["01_prepare"]),
        (["--from", "02_train"], ["02_train"]),
        (["--force"], ["01_prepare", "02_train"]),
        (["--force", "--only", "prepare"], ["01_prepare"]),
    ],
)
def test_options_choose_notebooks(root, launched, options, expected):
    if "--force" in options:
        main(["run", "params/x.yaml"])
        launched.clear()
    assert main(["run", "params/x.yaml", *options]) == 0 and launched == expected


def test_what_described_a_result_that_one_notebook_replaced_is_due_again(root, launched):
    """Else its numbers would stand beside other parameters than their own."""
    main(["run", "params/x.yaml"])
    assert main(["run", "params/x.yaml", "--only", "prepare", "-p", "seed=3"]) == 0
    assert states(root) == ["ok", "pending"]
    assert json.loads((root / "reports/x/metrics.json").read_text()) == {"m01_prepare": 1}
    launched.clear()
    assert main(["run", "params/x.yaml", "-p", "seed=3"]) == 0 and launched == ["02_train"]


def test_what_the_record_says_is_not_what_it_was_is_due_again_whoever_made_it(root, launched):
    """The samples are still there, so that 04 sees no change; but the network that drew them was replaced."""
    main(["run", "params/x.yaml"])
    made = {"by": "", "parameters": {}, "from": {}, "path": "params/x.yaml", "sha256": None}
    write_json(root / "runs/x/record.json", {"data": made, "pipeline": {**made, "from": {"data": "another"}}})
    (root / "params/y.yaml").write_text("run: x\nnotebooks: [01_prepare]\nseed: 5\n")  # another YAML of the same run
    launched.clear()
    assert main(["run", "params/y.yaml"]) == 0 and launched == ["01_prepare"]
    assert states(root) == ["ok", "pending"]
    assert json.loads((root / "reports/x/metrics.json").read_text()) == {"m01_prepare": 1}


def test_what_is_not_there_just_now_takes_no_numbers(root, launched):
    """If a disk is not mounted, that does not change a result."""
    main(["run", "params/x.yaml"])
    entry = {"by": "", "parameters": {}, "from": {}, "path": "data/set/manifest.json", "sha256": "5eed"}
    write_json(root / "runs/x/record.json", {"data": entry, "pipeline": {**entry, "from": {"data": "5eed"}}})
    (root / "params/y.yaml").write_text("run: x\nnotebooks: [01_prepare]\n")
    numbers = (root / "reports/x/metrics.json").read_text()
    assert main(["run", "params/y.yaml", "--force"]) == 0 and states(root) == ["ok", "ok"]
    assert (root / "reports/x/metrics.json").read_text() == numbers


def test_numbers_that_nobody_has_recorded_yet_are_no_file(root, launched, monkeypatch):
    monkeypatch.setattr(kernel, "execute", lambda *_: ("failed", "ValueError: no"))
    assert main(["run", "params/x.yaml"]) == 1
    assert not list((root / "reports/x").glob("[mt]*.json"))


def test_what_another_command_ends_while_its_lock_is_waited_for_is_not_done_again(root, launched, monkeypatch):
    main(["run", "params/x.yaml"])
    ended, take = (file := root / "reports/x/status.json").read_text(), records.lock
    write_json(file, json.loads(ended) | {"02_train": {"state": "running", "seconds": None, "error": None}})
    monkeypatch.setattr(runner, "lock", lambda *run: (file.write_text(ended), take(*run))[1])
    assert main(["run", "params/x.yaml"]) == 0 and launched == ["01_prepare", "02_train"]
    assert json.loads(file.read_text()) == json.loads(ended)


@pytest.mark.parametrize("change", [{"level": 7}, {}])
def test_what_was_begun_or_made_again_in_jupyterlab_runs_again_when_it_is_told_to(root, launched, capsys, change):
    """--only sends the user to the whole YAML, which then must not skip it, even if no file of it has changed."""
    write_notebook(root / "notebooks/03_sample.ipynb", PREPARE, "3 + 3")
    main(["run", "params/x.yaml"])
    parameters = {"run": "x", "seed": 0, "level": 2, **change}
    book = workbook.Run("x", root, root / "runs/x", root / "reports/x", "02_train", parameters)
    book.made("pipeline", root / "params/x.yaml") if change else book.begin("pipeline")
    launched.clear()
    assert main(["run", "params/x.yaml", "--only", "sample"]) == 2
    assert "02_train " in (error := capsys.readouterr().err) and "let it run too" in error
    assert main(["run", "params/x.yaml"]) == 0 and launched == ["02_train"]


def test_a_report_keeps_no_figure_or_table_of_an_earlier_run(root, launched, monkeypatch):
    """Which would be of other parameters: the run may not draw it again, or may fail before it does."""
    from matplotlib.figure import Figure

    def drawn(notebook: str, *names: str) -> set[str]:
        book = workbook.Run("x", root, root / "runs/x", root / "reports/x", notebook)
        monkeypatch.setattr(workbook, "_display", lambda *_: None)
        for name in names:
            book.show(Figure(), f"{notebook}-{name}", "A figure.")
            book.keep([{"a": 1}], f"{notebook}-{name}")
        assert {path.stem for path in book.report.glob("*.csv")} == left()
        return left()

    def left() -> set[str]:
        return {path.stem for path in (root / "reports/x/figures").glob("*.png")}

    main(["run", "params/x.yaml"])
    drawn("01_prepare", "a")
    assert drawn("02_train", "a", "b") == {"01_prepare-a", "02_train-a", "02_train-b"}
    assert drawn("02_train", "b") == {"01_prepare-a", "02_train-b"}  # as in JupyterLab
    (root / "reports/x/mine.csv").touch()
    (root / "fail-02_train").touch()
    assert main(["run", "params/x.yaml", "-p", "level=3"]) == 1 and left() == {"01_prepare-a"}
    assert {path.name for path in (root / "reports/x").glob("*.csv")} == {"01_prepare-a.csv", "mine.csv"}


def test_a_sweep_holds_more_locks_than_a_process_may_have_files_by_default(root, launched):
    """1,024 on most systems, where a sweep may have 1,000 runs; kernels need some, too."""
    (soft, hard), free = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(free)
    (root / "params/x.yaml").write_text(f"sweep: {{seed: {[*range(70)]}}}\nnotebooks: [01_prepare]\n")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 40, hard))
        assert main(["run", "params/x.yaml"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(launched) == 70


def test_two_notebooks_may_record_one_key(root, launched):
    """The number is that of the last; the first does not run again because of it."""
    main(["run", "params/x.yaml"])
    for notebook, value in (("01_prepare", 1), ("02_train", 2)):
        book = workbook.Run("x", root, root / "runs/x", root / "reports/x", notebook)
        book.record(n=value, **{f"m{notebook}": 1})
        status = records.read_status(root / "reports/x")
        status[notebook]["recorded"]["metrics"]["n"] = value
        write_json(root / "reports/x/status.json", status)
    assert main(["run", "params/x.yaml"]) == 0 and launched == ["01_prepare", "02_train"]


def test_numbers_of_a_run_without_its_folder_go_as_well(root, launched):
    main(["run", "params/x.yaml"])
    shutil.rmtree(root / "runs/x")
    (root / "fail-02_train").touch()
    assert main(["run", "params/x.yaml", "-p", "seed=3"]) == 1
    assert json.loads((root / "reports/x/metrics.json").read_text()) == {"m01_prepare": 1, "m02_train": 1}
    (root / "fail-01_prepare").touch()
    shutil.rmtree(root / "runs/x")
    assert main(["run", "params/x.yaml", "-p", "seed=4"]) == 1
    assert json.loads((root / "reports/x/metrics.json").read_text()) == {"m01_prepare": 1}


def test_a_page_of_another_hand_stops_nothing(root, launched):
    main(["run", "params/x.yaml"])
    for name, content in (("notes", "caf\xe9".encode("latin-1")), ("mine", b"<p>no header</p>")):
        (root / f"reports/x/{name}.ipynb").write_text("{}")
        (root / f"reports/x/{name}.html").write_bytes(content)
    assert main(["run", "params/x.yaml", "-p", "seed=3"]) == 0
    assert (root / "reports/x/mine.html").read_bytes() == b"<p>no header</p>"


def test_pages_say_the_states_that_they_are_in_now(root, monkeypatch):
    folder = root / "reports/x"
    monkeypatch.setattr(cli, "preflight", lambda experiment: None)
    (root / "input.txt").touch()
    assert main(["run", "params/x.yaml"]) == 0
    page = (folder / "02_train.html").read_text()
    assert main(["run", "params/x.yaml", "--only", "prepare", "-p", "seed=3"]) == 0
    after = (folder / "02_train.html").read_text()
    bars = [re.search("<header>.*</header>", text, re.DOTALL)[0] for text in (page, after)]
    assert "pending" not in bars[0] and "pending" in bars[1] and page.replace(*bars) == after


def test_a_kernel_imports_the_package_that_the_fingerprint_is_of(root, capsys, monkeypatch):
    """A kernel starts in the folder of the clone, whose package may be another than the installed one."""
    monkeypatch.setattr(cli, "preflight", lambda experiment: None)
    (root / "wddm").mkdir()
    (root / "wddm/__init__.py").write_text("raise ImportError('not that of the command')")
    write_notebook(root / "notebooks/01_prepare.ipynb", FIRST, "import wddm; print('from', wddm.__file__)")
    assert main(["run", "params/x.yaml", "--only", "prepare"]) == 0
    assert f"from {ROOT / 'wddm/__init__.py'}" in capsys.readouterr().out


def test_a_page_that_cannot_be_drawn_is_said_and_is_not_that_of_an_earlier_run(root, launched, monkeypatch, capsys):
    main(["run", "params/x.yaml"])
    with monkeypatch.context() as patch:
        patch.setattr("wddm.workbook.runner.render", lambda *_: 1 / 0)
        assert main(["run", "params/x.yaml", "-p", "seed=3"]) == 0
    assert not (root / "reports/x/01_prepare.html").exists()
    assert re.search(r"ok in .* s  \(report: none, ZeroDivisionError", capsys.readouterr().out)
    launched.clear()
    assert main(["run", "params/x.yaml", "-p", "seed=3"]) == 0 and launched == ["01_prepare", "02_train"]


def test_a_failure_stops_the_run_and_takes_back_old_numbers(root, launched, capsys):
    main(["run", "params/x.yaml"])
    metrics = root / "reports/x/metrics.json"
    assert json.loads(metrics.read_text()) == {"m01_prepare": 1, "m02_train": 1}
    (root / "fail-01_prepare").touch()
    assert main(["run", "params/x.yaml", "-p", "seed=3"]) == 1
    assert states(root) == ["failed", "pending"]
    assert json.loads(metrics.read_text()) == {"m01_prepare": 1}
    shown = capsys.readouterr().out
    assert "01_prepare failed: ValueError: no  (report: reports/x/01_prepare.html)\n" in shown
    (root / "fail-01_prepare").unlink()
    assert main(["run", "params/x.yaml", "-p", "seed=3"]) == 0 and states(root) == ["ok", "ok"]


def test_numbers_of_other_parameters_go_before_these_are_written_down(root, launched, monkeypatch):
    """A run that is killed in its first notebook leaves no number of other parameters than its params.yaml has."""

    def left() -> tuple:
        parameters = read_yaml(root / "reports/x/params.yaml")
        return parameters["level"], states(root), json.loads((root / "reports/x/metrics.json").read_text())

    def die(*_):
        raise SystemExit("as by kill -9")

    main(["run", "params/x.yaml"])
    monkeypatch.setattr(kernel, "execute", die)
    with pytest.raises(SystemExit):
        main(["run", "params/x.yaml", "--force", "-p", "level=3"])
    assert left() == (3, ["running", "pending"], {})


def test_one_notebook_alone_takes_back_what_was_run_before_it_with_other_parameters(root, launched):
    """A notebook that makes nothing for later ones does not have to run before them."""
    write_notebook(root / "notebooks/analysis/a.ipynb", SECOND, "1")
    write_notebook(root / "notebooks/analysis/b.ipynb", SECOND, "2")
    (root / "params/x.yaml").write_text("notebooks: [analysis/a, analysis/b]\n")
    main(["run", "params/x.yaml"])
    assert main(["run", "params/x.yaml", "--only", "b", "-p", "level=3"]) == 0
    assert states(root) == ["pending", "ok"]
    assert json.loads((root / "reports/x/metrics.json").read_text()) == {"mb": 1}
    launched.clear()
    (root / "params/y.yaml").write_text("run: x\nnotebooks: [analysis/a]\nlevel: 3\n")
    assert main(["run", "params/y.yaml"]) == main(["run", "params/y.yaml", "-p", "level=1", "--only", "a"]) == 0
    launched.clear()
    assert main(["run", "params/x.yaml", "-p", "level=3", "--only", "b"]) == 0 and launched == []


def test_numbers_of_a_published_page_are_not_taken_for_those_of_a_run(root, launched):
    metrics = root / "reports/x/metrics.json"
    write_json(metrics, {"fwd_best": 0.1})
    assert main(["run", "params/x.yaml", "--only", "01_prepare"]) == 0  # in JupyterLab nobody writes a status
    assert json.loads(metrics.read_text()) == {"fwd_best": 0.1, "m01_prepare": 1}
    (root / "reports/x/status.json").unlink()
    (root / "reports/x/04_evaluate.md").touch()
    assert main(["run", "params/x.yaml"]) == 0
    assert json.loads(metrics.read_text()) == {"m01_prepare": 1, "m02_train": 1}


def test_numbers_of_jupyterlab_go_when_what_they_are_of_does(root, launched):
    """The lab writes no status: its numbers are known by the notebook that recorded them."""

    def in_lab(notebook: str, **numbers: float) -> None:
        (root / "runs/x").mkdir(parents=True, exist_ok=True)
        workbook.Run("x", root, root / "runs/x", root / "reports/x", notebook).record(**numbers)

    def left(*options: str) -> dict[str, float]:
        assert main(["run", "params/x.yaml", *options]) == 0
        return json.loads((root / "reports/x/metrics.json").read_text())

    in_lab("01_prepare", images=7)
    in_lab("02_train", fid=9)
    assert left("--only", "prepare") == {"m01_prepare": 1, "fid": 9}  # nothing says that it is of something else
    (root / "reports/x/status.json").unlink()
    in_lab("01_prepare", images=7, m01_prepare=1)
    assert left("--only", "train") == {"images": 7, "m01_prepare": 1, "m02_train": 1}  # what came before is what it was
    assert left() == {"m01_prepare": 1, "m02_train": 1}
    in_lab("02_train", fid=9, m02_train=2)
    assert left("--only", "prepare", "-p", "seed=3") == {"m01_prepare": 1}


def test_numbers_that_jupyterlab_has_replaced_are_not_those_of_a_run_that_ended_ok(root, launched):
    """They may be of other parameters: the index says that the notebook is due again, as `wddm run` has it."""
    main(["run", "params/x.yaml"])
    workbook.Run("x", root, root / "runs/x", root / "reports/x", "02_train").record(m02_train=2)
    assert main(["index"]) == 0 and "pending" in (root / "reports/index.html").read_text().partition("<tbody>")[2]
    assert [one["state"] for one in records.read_status(root / "reports/x").values()] == ["ok", "pending"]
    assert main(["run", "params/x.yaml"]) == 0 and launched[2:] == ["02_train"] and states(root) == ["ok", "ok"]


def test_a_notebook_that_is_run_again_leaves_no_number_of_the_run_before(root):
    """In JupyterLab, too, where no runner removes them: a network that was not measured must not show another's."""

    def opened(notebook: str) -> workbook.Run:
        return workbook.Run("x", root, root / "runs/x", root / "reports/x", notebook)

    opened("01_prepare").record(images=9)
    for numbers in ({"train_fwd": 1.5, "train_images": 320}, {"train_images": 160}):
        book = opened("02_train")
        book.record_timing(train_images_per_s=3.0)
        for key, number in numbers.items():
            book.record(**{key: number})
    found = json.loads((root / "reports/x/metrics.json").read_text())
    assert found == {"images": 9, "train_images": 160}
    assert json.loads((root / "reports/x/timings.json").read_text()) == {"train_images_per_s": 3.0}


def test_every_notebook_keeps_where_it_ran(root, launched, monkeypatch):
    """A training on a GPU, evaluated on a laptop after an update, is not of the laptop."""
    made = {"commit": "1" * 40, "device": "H200", "seed": 0}
    monkeypatch.setattr(provenance, "environment", lambda *_: made)
    main(["run", "params/x.yaml"])
    made = {"commit": "2" * 40, "device": "cpu", "seed": 0, "dirty": True}  # of code that no commit has
    assert main(["run", "params/x.yaml", "-p", "level=4"]) == 0 and launched[2:] == ["02_train"]
    status = records.read_status(root / "reports/x")
    assert [(one["commit"][0], one["device"]) for one in status.values()] == [("1", "H200"), ("2", "cpu")]
    assert "<code>1111111, 2222222-dirty</code>" in (root / "reports/index.html").read_text()


def test_from_leaves_out_experiments_that_do_not_have_it(root, launched):
    """The notebooks of two YAMLs are two lists: what comes later in the one says nothing of the other."""
    write_notebook(root / "notebooks/analysis/compare.ipynb", SUMMARY, "3 + 3")
    (root / "params/y.yaml").write_text("notebooks: [01_prepare, analysis/compare]\n")
    both = ["run", "params/y.yaml", "params/x.yaml"]
    assert main([*both, "--from", "compare"]) == 0 and launched == ["compare"]
    assert main([*both, "--from", "train"]) == 0 and launched == ["compare", "02_train"]


def test_one_failing_run_does_not_stop_the_others(root, launched):
    write_notebook(root / "notebooks/01_prepare.ipynb", FIRST, "0")
    (root / "params/x.yaml").write_text("sweep: {level: [0, 1]}")
    (root / "fail-02_train").touch()
    assert main(["run", "params/x.yaml"]) == 1
    assert launched == ["01_prepare", "02_train"] * 2
    assert states(root, "x-level=1") == ["ok", "failed"]


SUMMARY = 'run: str = "compare"\nruns: list[str] = ["quickstart"]\nmetric: str = "fwd"\nlevel: int = 1\n'


@pytest.fixture
def summed_up(root) -> Path:
    """The workbook with a third notebook, which looks at runs, and a sweep that ends with it."""
    prose = "# Compare\n\n**Inputs:** `reports/{runs}/metrics.json`"
    write_notebook(root / "notebooks/analysis/compare.ipynb", SUMMARY, "3 + 3", prose=prose)
    (root / "params/x.yaml").write_text("sweep: {level: [0, 1]}\nsummary: [analysis/compare]\nmetric: loss\n")
    return root


def test_a_summary_is_one_more_run_of_its_own_notebooks(summed_up):
    text = (summed_up / "params/x.yaml").read_text()
    *members, summary = load(summed_up, text, "seed=7")
    assert [member.run for member in members] == ["x-level=0", "x-level=1"]
    assert all("metric" not in member.parameters and member.parameters["seed"] == 7 for member in members)
    runs = [member.run for member in members]
    assert summary.parameters == {"run": "x", "runs": runs, "metric": "loss", "level": 1}
    assert load(summed_up, text, "runs=[y-*]")[-1].parameters["runs"] == ["y-*"]
    assert load(summed_up, text, "run=z")[-1].parameters["runs"] == ["z-level=0", "z-level=1"]
    recipes = summed_up / "params/recipes"
    recipes.mkdir()
    (recipes / "modern.yaml").write_text("seed: 9\nmetric: none\n")
    member, _, summary = load(summed_up, text, "recipe=modern")
    assert (member.parameters["seed"], summary.parameters["metric"]) == (9, "loss")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metrik=1", "-p: unknown parameter 'metrik', did you mean 'metric'?"),
        (
            "metric=1",  # a shell takes one pair of quotes off
            "-p: metric: got 1 (int), wanted str, e.g. metric: fwd; if it is a text, quote it: "
            "\"1\", or after -p '\"1\"'",
        ),
        ("runs=x", "-p: runs: got 'x' (str), wanted list[str], e.g. runs: [\"quickstart\"]"),
        ("sweep={metric: [a, b]}", "params/x.yaml: unknown parameter 'metric'; known: run, seed, count, learning_rate, "
         "backbone, flip, levels, labels, level, runs"),
    ],
)  # fmt: skip
def test_a_key_must_be_known_to_the_sweep_or_its_summary(summed_up, override, message):
    with pytest.raises(ValueError) as caught:
        load(summed_up, "sweep: {level: [0, 1]}\nsummary: [analysis/compare]\n", override)
    assert str(caught.value) == message


def test_the_summary_runs_last_and_again_when_a_result_has_changed(summed_up, launched):
    assert main(["run", "params/x.yaml"]) == 0
    assert launched == ["01_prepare", "02_train"] * 2 + ["compare"]
    assert main(["run", "params/x.yaml"]) == 0 and len(launched) == 5
    assert yaml.safe_load((summed_up / "reports/x/params.yaml").read_text())["notebooks"] == ["analysis/compare"]
    write_json(summed_up / "reports/x-level=1/metrics.json", {"fwd": 2})
    assert main(["run", "params/x.yaml"]) == 0
    assert launched[5:] == ["01_prepare", "02_train", "compare"]  # whose numbers are not those that they recorded


def test_a_failed_member_stops_neither_the_others_nor_the_summary(summed_up, launched):
    (summed_up / "fail-02_train").touch()
    assert main(["run", "params/x.yaml"]) == 1
    assert launched == ["01_prepare", "02_train"] * 2 + ["compare"]
    assert states(summed_up, "x-level=0") == ["ok", "failed"] and states(summed_up) == ["ok"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--only", "train"], ["02_train"] * 2),
        (["--only", "compare"], ["compare"]),
        (["--from", "train"], ["02_train", "02_train", "compare"]),
        (["--from", "compare"], ["compare"]),
    ],
)
def test_the_summary_comes_after_the_notebooks_of_the_sweep(summed_up, launched, options, expected):
    assert main(["run", "params/x.yaml", *options]) == 0 and launched == expected


def test_a_sweep_that_was_stopped_goes_on_where_it_stopped(summed_up, launched, monkeypatch):
    execute = kernel.execute

    def stopped(source, target, parameters, *more):
        if parameters["run"] == "x-level=1" and source.stem == "02_train":
            os.kill(os.getpid(), signal.SIGINT)
            return "killed", "KeyboardInterrupt: stopped"
        return execute(source, target, parameters, *more)

    monkeypatch.setattr(kernel, "execute", stopped)
    assert main(["run", "params/x.yaml"]) == 130
    assert launched == ["01_prepare", "02_train", "01_prepare"]  # and no summary
    assert states(summed_up, "x-level=1") == ["ok", "killed"] and not (summed_up / "reports/x").exists()
    monkeypatch.setattr(kernel, "execute", execute)
    launched.clear()
    assert main(["run", "params/x.yaml"]) == 0 and launched == ["02_train", "compare"]


def test_preflight_sees_what_is_going_to_run(root, launched):
    seen = []
    experiments = load(root, "level: 2")
    assert workbook.run(experiments, preflight=seen.append) == 0
    assert workbook.run(experiments, preflight=seen.append) == 0
    assert seen == [experiments[0]]

    def refuse(experiment):
        raise ValueError("level: too deep")

    launched.clear()
    with pytest.raises(ValueError, match=r"^params/x.yaml: level: too deep$"):
        workbook.run(experiments, force=True, preflight=refuse)
    assert launched == [] and states(root) == ["ok", "ok"]


def test_where_nothing_can_be_written_one_line_says_so(root, launched, capsys, monkeypatch):
    (root / "reports").write_text("in the way")
    assert main(["run", "params/x.yaml"]) == 2 and launched == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"got {root}/reports" in error and "cannot be written" in error
    (root / "reports").unlink()
    assert main(["run", "params/x.yaml"]) == 0
    full = OSError(errno.ENOSPC, "No space left on device", "reports/x/01_prepare.ipynb")
    monkeypatch.setattr(kernel, "execute", lambda *job: (_ for _ in ()).throw(full))
    assert main(["run", "params/x.yaml", "--force"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "01_prepare.ipynb, which cannot be written (No space left on device): " in error
    assert records.read_status(root / "reports/x")["01_prepare"]["state"] == "killed"


@pytest.mark.parametrize("name", ["reports/x/status.json", "reports/x/metrics.json", "runs/x/record.json"])
def test_a_damaged_record_is_as_none(root, launched, name):
    assert main(["run", "params/x.yaml"]) == 0
    for content in ("{", '{"01_prepare": {"state": "ok"}, "data": 1}', "[" * 100_000):
        (root / name).write_text(content)
        assert main(["run", "params/x.yaml"]) == 0, content


def test_a_run_under_way_is_left_alone(root, launched, capsys):
    """Whatever status.json says: the lock counts, which dies with its process; no reused pid blocks a run."""
    code = f"from pathlib import Path; from wddm.workbook.records import lock; lock(Path({str(root)!r}), 'x'); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        wait_for(lambda: records.is_locked(root, "x"), seconds=20)
        entry = {"02_train": {"state": "running", "pid": 1, "seconds": None, "error": None}}
        write_json(root / "reports/x/status.json", entry)
        for options in ([], ["--force"]):
            assert main(["run", "params/x.yaml", *options]) == 2 and launched == []
            error = capsys.readouterr().err
            holder = f"process {other.pid} on {socket.gethostname()}"
            assert f"run 'x' is under way ({holder}): wait for it" in error and error.count("\n") == 1
    finally:
        other.kill()
        other.communicate()
    assert main(["index"]) == 0  # pid 1 is alive, and runs nothing of ours
    assert '<span class="badge killed">' in (root / "reports/index.html").read_text()
    assert main(["run", "params/x.yaml"]) == 0


def test_inputs_that_are_none_are_left_out_and_others_must_be_parameters(root):
    write_notebook(
        root / "notebooks/01_prepare.ipynb",
        FIRST,
        prose="**Inputs:** `a/{count}`,\n`b-{seed}`  \n**Outputs:** `d`\n\n`c`",
    )
    experiment = load(root, "")[0]
    assert provenance.declared_paths(experiment, experiment.notebooks[0], "Inputs") == [root / "b-0"]
    prose = "**Inputs:** `r/{levels}/{seed}`, `{levels}-*`"
    write_notebook(root / "notebooks/01_prepare.ipynb", FIRST, prose=prose)
    for name in ("2-b", "2-a", "3-a"):
        (root / name).touch()
    found = provenance.declared_paths(experiment, experiment.notebooks[0], "Inputs")
    assert found == [root / name for name in ("r/1/0", "r/2/0", "2-a", "2-b")]
    write_notebook(root / "notebooks/01_prepare.ipynb", FIRST, prose="**Inputs:** `{sead}`")
    with pytest.raises(ValueError, match=r"^01_prepare.ipynb: Inputs: `\{sead\}` names 'sead'"):
        provenance.declared_paths(experiment, experiment.notebooks[0], "Inputs")


def test_every_file_of_an_input_folder_counts(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("1")
    before = digest(tmp_path / "a")
    (tmp_path / "a/b/c").write_text("2")
    after = digest(tmp_path / "a")
    (tmp_path / "a/b/c").rename(tmp_path / "a/b/d")
    renamed, absent = (digest(tmp_path / name) for name in ("a", "none"))
    assert len({before, after, renamed, absent}) == 4


# --------------------------------------------------------------------------------------- with real notebooks

WORK = """\
import sys, numpy as np, matplotlib.pyplot as plt
from wddm import workbook
book = workbook.open_run(run)
for _ in workbook.progress(range(3), desc="reading", unit="img"):
    pass
print("prepared", seed, level, sys.executable)
"""
SHOW = """\
figure, axis = plt.subplots()
axis.plot([1, 2])
book.show(figure, "samples", "Two <points>.")
book.table([{"name": "a", "loss": 0.123456}], "Losses.")
book.record(fwd=np.float32(0.5), parameters=7)
book.record_timing(images_per_s=3.25)
assert not plt.get_fignums()
"""
EXPLORE = """\
import ipywidgets
def draw(level):
    figure, axis = plt.subplots()
    axis.plot(range(level + 2))
    return figure
slider = ipywidgets.IntSlider(1, 0, 3)
book.explore(draw, "explorer", "Turn it.", level=slider)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workbook after a real `wddm run` that fails in its second notebook; and what the terminal showed."""
    root = tmp_path_factory.mktemp("workbook")
    prose = "# Title\n\nWith $\\sqrt{a_t}$, $$z = \\frac{1}{2}$$ and $\\frac$."
    write_notebook(root / "notebooks/01_work.ipynb", SECOND, WORK, SHOW, EXPLORE, prose=prose)
    write_notebook(
        root / "notebooks/02_fail.ipynb",
        SECOND,
        "def f():\n    raise ValueError('got 4\\nwanted 5')\n",
        "f()",
    )
    (root / "params").mkdir()
    (root / "params/x.yaml").write_text("level: 2\n")
    spec = root / "jupyter/kernels/python3/kernel.json"  # a python3 kernel of some other environment
    write_json(spec, {"argv": ["/no/such/python"], "display_name": "other", "language": "python"})
    environment = {"JUPYTER_PATH": str(root / "jupyter"), "JUPYTER_PREFER_ENV_PATH": "0"}
    return root, as_process("wddm", "run", "params/x.yaml", root=root, **environment)


def test_the_terminal_shows_the_run_and_no_noise(finished):
    _, done = finished
    assert done.returncode == 1
    assert done.stderr == ""
    lines = [re.sub(r"[\d.]+ s$", "N s", line) for line in done.stdout.splitlines()]
    assert any("reading: 100%|" in line for line in lines)
    assert [line for line in lines if line and "reading:" not in line] == [
        "params/x.yaml -> reports/x/",
        "[1/2] 01_work ...",
        f"prepared 0 2 {sys.executable}",
        "ok in N s",
        "[2/2] 02_fail ...",
        "02_fail failed: ValueError: got 4  (report: reports/x/02_fail.html)",
    ]


def test_the_run_leaves_its_files(finished):
    folder = finished[0] / "reports/x"
    assert sorted(path.name for path in folder.iterdir()) == [
        "01_work.html",
        "01_work.ipynb",
        "02_fail.html",
        "02_fail.ipynb",
        "environment.json",
        "figures",
        "metrics.json",
        "params.yaml",
        "status.json",
        "timings.json",
    ]
    assert (folder / "metrics.json").read_text() == '{\n  "fwd": 0.5,\n  "parameters": 7\n}\n'
    assert records.read_json(folder / "timings.json") == {"images_per_s": 3.25}
    assert yaml.safe_load((folder / "params.yaml").read_text()) == {"run": "x", "seed": 0, "level": 2}
    entries = records.read_json(folder / "status.json")
    assert entries["01_work"]["state"] == "ok" and entries["01_work"]["error"] is None
    assert entries["02_fail"]["state"] == "failed" and entries["02_fail"]["error"] == "ValueError: got 4"
    assert entries["01_work"]["seconds"] > 0
    environment = records.read_json(folder / "environment.json")
    assert environment["commit"] is None and environment["versions"]["papermill"] and environment["seed"] == 0
    notebook = json.loads((folder / "01_work.ipynb").read_text())
    assert str(finished[0]) not in json.dumps(notebook["metadata"])
    streams = [output for cell in notebook["cells"] for output in cell.get("outputs", []) if "name" in output]
    assert len(streams) == 1 and "\r" not in "".join(streams[0]["text"])


def test_the_page_reads_without_a_network(finished):
    page = (finished[0] / "reports/x/01_work.html").read_text()
    assert not re.search(r"<(script|link|iframe)|(src|href)=\"?(http|//)|@import|url\(", page)
    assert "<title>01_work · x</title>" in page and "In&nbsp;[" not in page
    assert "<summary>Code</summary>" in page and "<figcaption>Two &lt;points&gt;.</figcaption>" in page
    assert 'src="data:image/png;base64,iVBOR' in page
    assert "Losses.</caption>" in page and ">0.1235</td>" in page
    assert "prepared 0 2" in page and "reading:" not in page and "# Parameters" not in page
    assert re.search(r'"changed"><th scope="row"><code>level</code></th>\s*<td><code>2</code> <small>default 1', page)
    assert '<a href="02_fail.html"><i class="dot failed"></i>02_fail</a>' in page  # though it ran later
    assert 'href="../index.html"' in page and '<span class="badge ok">ok</span>' in page


def test_formulas_of_a_page_are_mathml(finished):
    page = (finished[0] / "reports/x/01_work.html").read_text()
    assert re.search(r'<math display="inline"[^>]*><mrow><msqrt>.*<msub><mi>a</mi><mi>t</mi></msub>', page)
    assert re.search(r'<math display="block"[^>]*>.*<mfrac>.*</math>', page)
    assert "<code>\\frac</code>" in page  # what it cannot read stays as it was typed


def test_a_page_shows_the_first_picture_of_a_figure_with_controls(finished):
    page = (finished[0] / "reports/x/01_work.html").read_text()
    assert re.search(r'<img alt="Turn it." [^>]*width="768"', page) and "widget-view" not in page
    assert (finished[0] / "reports/x/figures/explorer.png").exists()


def test_a_figure_follows_its_controls(root, monkeypatch):
    from ipywidgets import IntSlider
    from ipywidgets.widgets.widget import _instances

    shown, drawn = [], []
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # it closes real figures only
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data))
    monkeypatch.setattr(workbook, "_pixels", lambda figure: b"picture %d" % figure.level)
    figures = [SimpleNamespace(level=level, get_figwidth=lambda: 6.0) for level in range(4)]
    slider = IntSlider(1, 0, 3)

    workbook.open_run("r").explore(lambda level: drawn.append(level) or figures[level], "f", "c", level=slider)
    assert drawn == [1] and (root / "reports/r/figures/f.png").read_bytes() == b"picture 1"
    box = _instances[shown[0][WIDGET]["model_id"]]
    assert box.children[-1].value == b"picture 1"
    slider.value = 3
    assert drawn == [1, 3] and box.children[-1].value == b"picture 3"
    assert shown[1]["text/plain"] == "c" and "image/png" not in shown[1]  # the words, apart from the pixels


def test_the_page_of_a_failure_says_what_went_wrong(finished):
    page = (finished[0] / "reports/x/02_fail.html").read_text()
    assert '<span class="badge failed">failed</span>' in page
    assert '<p class="error">ValueError: got 4</p>' in page and "<summary>Traceback</summary>" in page
    assert "papermill" not in page and "An Exception was encountered" not in page


def test_the_index_shows_the_run(finished):
    page = (finished[0] / "reports/index.html").read_text()
    assert 'src="x/figures/samples.png"' in page and 'href="x/01_work.html"' in page
    assert "<code>level=2</code>" in page and re.search(r'class="number">0\.5\s', page)
    assert '<p class="error">ValueError: got 4</p>' in page
    assert not re.search(r"<(script src|link)|(src|href)=\"(http|/)", page)


LOOP = """\
import os, pathlib, signal, time
from wddm import workbook
book = workbook.open_run(run)
if limit == 5:
    os.kill(os.getpid(), signal.SIGKILL)
if limit == 4:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
(book.folder / "kernel").write_text(str(os.getpid()))
try:
    while True:
        time.sleep(0.02)
except KeyboardInterrupt:
    time.sleep(0.3)
    (book.folder / "checkpoint").write_text("saved")
"""


def assert_stopped(root: Path, code: int) -> None:
    assert code == 130
    assert (root / "runs/x/checkpoint").read_text() == "saved"
    assert states(root) == ["killed", "pending"]
    assert status(root)["01_prepare"]["error"] == "KeyboardInterrupt: stopped"
    assert "not reached" not in (root / "reports/x/01_prepare.html").read_text()
    assert '<span class="badge killed">' in (root / "reports/index.html").read_text()
    wait_for(lambda: not Path("/proc", (root / "runs/x/kernel").read_text()).exists(), seconds=10)


def begun(root: Path) -> bool:
    noted = root / "runs/x/kernel"
    return noted.exists() and noted.read_text() != ""


def test_a_kernel_that_dies_is_told_apart(root, monkeypatch):
    """Its error differs from that of an interrupted kernel, whose cell saves its work when it gets the signal."""
    monkeypatch.setattr(tempfile, "tempdir", str(root / "runs"))
    write_notebook(root / "notebooks/01_prepare.ipynb", PREPARE, LOOP, "print('not', 'reached')")
    assert main(["run", "params/x.yaml", "-p", "limit=5"]) == 1
    assert states(root) == ["killed", "pending"]
    assert status(root)["01_prepare"]["error"] == "DeadKernelError: the kernel died (out of memory?)"
    assert (root / "reports/x/01_prepare.html").exists()

    seen = []

    def interrupt():
        wait_for(lambda: begun(root), seconds=240)
        opened = Path("/proc", (root / "runs/x/kernel").read_text(), "fd").glob("*")
        seen.extend(path.resolve() for path in opened if path.resolve() == root / "runs/.locks/x")
        seen.extend((root / "runs").glob("*.json"))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert_stopped(root, main(["run", "params/x.yaml"]))
    thread.join()
    assert seen == [root / "runs/.locks/x"]  # the kernel holds the lock; its connection file is gone

    (root / "runs/x/kernel").unlink()
    monkeypatch.setattr(kernel, "PATIENCE", 0.5)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["run", "params/x.yaml", "-p", "limit=4"]) == 130  # which does not heed it
    assert status(root)["01_prepare"]["error"] == "DeadKernelError: the kernel died (stopped, and killed)"
    thread.join()


def test_ctrl_c_in_a_terminal_reaches_the_whole_group(root):
    """No later cell runs; though its cell does not raise the interrupt again, the notebook is not ok."""
    write_notebook(root / "notebooks/01_prepare.ipynb", PREPARE, LOOP, "print('not', 'reached')")
    command = [sys.executable, "-m", "wddm", "run", "params/x.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(lambda: begun(root), seconds=240)
    os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=240)[0].decode()
    assert shown.count("stopping: the running cell may save its work") == 1
    assert "01_prepare killed: KeyboardInterrupt: stopped" in shown and "not reached" not in shown
    assert_stopped(root, process.returncode)


@pytest.mark.slow
def test_a_sweep_runs_beside_itself_and_is_summed_up(summed_up):
    write_notebook(summed_up / "notebooks/01_prepare.ipynb", PREPARE, "if limit == 2: raise ValueError('two')")
    write_notebook(summed_up / "notebooks/analysis/compare.ipynb", SUMMARY, "print(runs)")
    (summed_up / "params/x.yaml").write_text(
        "sweep: {limit: [2, 1]}\nnotebooks: [01_prepare]\nsummary: [analysis/compare]"
    )
    done = as_process("wddm", "run", "params/x.yaml", "--jobs", "2", root=summed_up)
    assert done.returncode == 1
    assert states(summed_up, "x-limit=2") == ["failed"] and states(summed_up, "x-limit=1") == ["ok"]
    assert "x-limit=2 | 01_prepare failed: ValueError: two" in done.stdout
    assert re.search(r"\['x-limit=2', 'x-limit=1'\]\nok in", done.stdout) and states(summed_up) == ["ok"]


def test_a_member_that_never_began_has_not_changed_what_its_report_says(root, launched, monkeypatch):
    """As by Ctrl-C while it imports: the report keeps its parameters and numbers, whatever was asked for."""
    (root / "params/x.yaml").write_text("sweep: {level: [1, 2]}")
    assert main(["run", "params/x.yaml"]) == 0
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert main(["run", "params/x.yaml", "--jobs", "2", "-p", "seed=7"]) == 1
    finished, _ = records.collect(root, ["x-*"])
    assert [(run.parameters["seed"], run.metrics["m02_train"]) for run in finished] == [(0, 1)] * 2


def wait_for(condition, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------- small parts


def test_root_is_found_from_below(root, monkeypatch):
    (root / "notebooks/analysis").mkdir()
    monkeypatch.chdir(root / "notebooks/analysis")
    book = workbook.open_run("r")
    assert (book.root, book.report) == (root, root / "reports/r")
    assert book.folder == root / "runs/r" and book.folder.is_dir() and not book.report.exists()
    with pytest.raises(ValueError, match="run: got 'a/b'"):
        workbook.open_run("a/b")
    with pytest.raises(ValueError, match="is not inside a workbook"):
        monkeypatch.chdir(root.parent)
        workbook.find_root(root.parent)


def test_records_are_finite_numbers_and_merge(root):
    book = workbook.open_run("r")
    book.record(b=1, a=None)
    book.record(b=2.5)
    assert (book.report / "metrics.json").read_text() == '{\n  "a": null,\n  "b": 2.5\n}\n'
    for value in (float("nan"), "1", [1]):
        with pytest.raises(ValueError, match=r"^c: got .* wanted a finite number"):
            book.record(c=value)


def test_members_of_a_sweep_take_a_gpu_each_and_hand_it_on(monkeypatch, tmp_path):
    class Process:
        stdout, returncode, seen = (), 0, []

        def __init__(self, command, env, **options):
            self.seen.append(env["CUDA_VISIBLE_DEVICES"])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def member(**parameters):
        experiment = SimpleNamespace(run="a", parameters=parameters, root=tmp_path, as_yaml=lambda: "")
        return cluster.Member(experiment, [], 0)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(cluster.subprocess, "Popen", Process)
    stop, free = SimpleNamespace(requested=False, listeners=set()), cluster.SimpleQueue()
    for name in cluster.gpus():
        free.put(name)
    assert [cluster.run_on_gpu(task, stop, free) for task in (member(), member(), member())] == [0, 0, 0]
    assert cluster.run_on_gpu(member(num_processes=2), stop, free) == 0
    assert Process.seen == ["3", "5", "3", "3,5"]
    monkeypatch.setattr(Process, "returncode", -signal.SIGKILL)
    assert cluster.run_on_gpu(member(), stop, free) == 1
    monkeypatch.setattr(Process, "__init__", lambda *_, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cluster.run_on_gpu(member(), stop, free)
    assert free.qsize() == 2


def test_progress_of_a_member_is_a_line_a_minute(monkeypatch, tmp_path, capsys):
    bar = "training:  {0}%|##   | {0}/100 [00:10<00:20, 5.00img/s]"

    class Process(SimpleNamespace):
        stdout = "[2/4] 02_train ...\n", *(f"{bar.format(share)}\n" for share in (10, 20, 30)), "said\n", "ok in 9 s\n"
        returncode = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(cluster.subprocess, "Popen", lambda *_, **options: Process())
    experiment = SimpleNamespace(run="x=1", parameters={}, root=tmp_path, as_yaml=lambda: "")
    stop = SimpleNamespace(requested=False, listeners=set())
    assert cluster.run_beside([cluster.Member(experiment, [], 0)], 1, stop) == [0]

    kept = ["[2/4] 02_train ...", bar.format(10), "said", "ok in 9 s"]
    assert (tmp_path / "reports/x=1/log.txt").read_text().splitlines() == kept
    assert capsys.readouterr().out.splitlines() == [f"x=1 | {line}" for line in kept]


def test_what_has_no_parameters_is_not_checked_which_would_import_torch():
    code = "import sys, types, wddm.cli as cli; cli.preflight(types.SimpleNamespace(parameters={'run': 'x'}))"
    command = [sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, check=False).returncode == 0
