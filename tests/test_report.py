"""Reports: what is printed, a page and an index that show what there is, whatever is in it."""

import base64
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import ROOT, dead_links
from matplotlib.figure import Figure
from nbconvert.filters.markdown_mistune import markdown2html_mistune as markdown2html
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from wddm import workbook
from wddm.files import write_json
from wddm.workbook import report
from wddm.workbook.parameters import Parameter
from wddm.workbook.report import WIDGET

SCHEMA = 'run: str = "quickstart"\nname: str = "a"  # <b>help</b>\nlevels: list[int] = [1]\nfile: str | None = None\n'
HOSTILE = "`<script>alert(1)</script>` *a* [b](c) $d$"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workbook with a run `x` whose notebook was executed with a hostile parameter."""
    prose = "# T\n\n`data/{name}/a.npy`, {name}, `{file}`, `{levels}`, `{other}`\n\n**Outputs:** `runs/{run}/b`"
    cells = [new_markdown_cell(prose), new_code_cell(SCHEMA, metadata={"tags": ["parameters"]})]
    notebook = new_notebook(cells=cells, metadata={"papermill": {"parameters": {"run": "x=1", "name": HOSTILE}}})
    folder = tmp_path / "reports" / "x"
    for path in (tmp_path / "notebooks" / "01_work.ipynb", folder / "01_work.ipynb"):
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)
    status = {"01_work": {"state": "ok", "seconds": 1.0, "error": None, "started": "2026-01-02T03:04"}}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "params.yaml").write_text(yaml.safe_dump({"run": "x", "name": HOSTILE, "levels": [1]}))
    return tmp_path


def test_a_value_is_text_whatever_it_holds(root):
    page = report.render(root / "reports/x", "01_work").read_text()
    text = "`&lt;script&gt;alert(1)&lt;/script&gt;` *a* [b](c) $d$"
    assert f"<td><code>&#39;{text}&#39;</code> <small>default &#39;a&#39;" in page.replace("'", "&#39;")
    filled = "data/ script alert(1) /script *a* [b](c) d /a.npy"  # in code spans, without what could end one
    assert f"<p><code>{filled}</code>, {{name}}, <code>1</code>, <code>{{other}}</code></p>" in page  # file is None
    assert "<strong>Outputs:</strong> <code>runs/x=1/b</code>" in page
    assert "<td>&lt;b&gt;help&lt;/b&gt;</td>" in page
    index = report.write_index(root).read_text()
    assert f"<code>name={text}</code>" in index and "levels=" not in index
    assert "<script" not in page + index.replace("<script>// Filters", "") and "<b>help" not in page


def test_the_title_cell_says_what_this_run_took_and_how_it_is_run(root):
    data, short = {"data": {"by": "01", "path": "data/d-1/manifest.json", "parameters": {}, "from": {}}}, ["a", "b"]
    (root / "runs/x").mkdir(parents=True)
    (root / "runs/x/record.json").write_text(json.dumps(data))
    prose = "# T\n\n**Inputs:** `{data}/a`, `{file}`\n**Run it:** `wddm run params/quickstart.yaml --only work`"
    prose += ", `wddm run params/full.yaml`\n[w](tutorials/w.ipynb)"
    notebook = nbformat.read(path := root / "reports/x/01_work.ipynb", as_version=4)
    notebook.cells[0].source = prose
    nbformat.write(notebook, path)
    notebook, parameters = report.read_page(root / "reports/x", "01_work")
    own = "**Inputs:** `data/d-1/a`\n**Run it:** `wddm run reports/x/params.yaml --only work`"
    own += ", `wddm run params/full.yaml`\n[w](../../notebooks/tutorials/w.ipynb)"
    assert notebook.cells[0].source == f"# T\n\n{own}" and [value for _, value in parameters] == [
        "x=1",
        HOSTILE,
        [1],
        None,
    ]
    assert report.fill("`{runs}/m`", {"runs": short}) == "`*/m`"
    assert report.fill("`{runs}/m`", {"runs": short[:1]}) == "`a/m`"
    assert report.fill("`a` or `{file}`, `{no}`", {"file": None}) == "`a`, `{no}`"


def test_a_lesson_is_a_page_for_readers_of_pages(root):
    """Its page shows the committed outputs; the page of one that was executed as a run is left as it is."""
    folder, lessons = root / "reports/x", root / "notebooks/tutorials"
    said = new_code_cell("1", outputs=[new_output("stream", text="what it said")])
    cells = [new_markdown_cell("# L\n`wddm run params/l.yaml`"), said]
    lessons.mkdir()
    for name in ("made", "ran"):
        nbformat.write(new_notebook(cells=cells), lessons / f"{name}.ipynb")
    (root / "reports/tutorials").mkdir()
    (root / "reports/tutorials/ran.html").write_text("as it ran")
    write_json(root / "reports/tutorials/status.json", {"ran": {"state": "ok", "seconds": 1.0}})
    links = new_markdown_cell("# T\n[a](tutorials/made.ipynb) [b](tutorials/ran.ipynb) [c](tutorials/gone.ipynb)")
    nbformat.write(new_notebook(cells=[links]), folder / "01_work.ipynb")
    page = BeautifulSoup(report.render(folder, "01_work").read_text(), "html.parser")
    here, there = "../tutorials/made.html", "../../notebooks/tutorials/gone.ipynb"
    assert [link["href"] for link in page.main.find_all("a")] == [here, "../tutorials/ran.html", there]
    report.write_index(root)
    assert dead_links(folder / "01_work.html") == [there] and dead_links(folder / here) == []
    made = BeautifulSoup((folder / here).read_text(), "html.parser")
    assert made.code.get_text() == "wddm run params/l.yaml"  # there is no reports/tutorials/params.yaml
    assert "what it said" in made.main.get_text() and not made.select(".badge")  # it was not run here
    assert [dot.parent.get_text(strip=True) for dot in made.select(".dot")] == ["ran"]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# New")]), lessons / "made.ipynb")
    report.render(folder, "01_work")
    assert "New" in (folder / here).read_text()
    assert (root / "reports/tutorials/ran.html").read_text() == "as it ran"


def test_a_page_is_drawn_where_nbconvert_is_of_another_environment(root, monkeypatch):
    """As in a venv with the packages of the system: nbconvert looks for its own templates below sys.prefix alone."""
    monkeypatch.setattr("jupyter_core.paths.ENV_JUPYTER_PATH", [])
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Found")]), root / "reports/x/01_work.ipynb")
    assert "Found" in report.render(root / "reports/x", "01_work").read_text()


def test_a_long_page_has_a_list_of_its_contents(root):
    cells = [new_markdown_cell("# T"), *(new_markdown_cell(f"## {title}\n\nText.") for title in ("A", "`b` <i>", "C"))]
    for count in (3, 4):
        nbformat.write(new_notebook(cells=cells[:count]), root / "reports/x/01_work.ipynb")
        page = report.render(root / "reports/x", "01_work").read_text()
        assert ("<nav" in page.partition("<main>")[2]) is (count == 4)
    links = re.findall(r'<a href="#([^"]+)">(.*)</a>', page)
    assert [title for _, title in links] == ["A", "b &lt;i&gt;", "C"]
    assert all(f'<section class="prose" id="{place}">' in page for place, _ in links)


PUBLISH = runpy.run_path(str(ROOT / "notebooks/publish.py"))


@pytest.mark.parametrize("text", [HOSTILE, "a_b_ *c* \\ ~~d~~ [e] | <f> &amp; # 1", "- a", "$x$ and $y$", "1. b"])
def test_any_text_is_shown_as_it_is_in_a_published_page(text):
    page = markdown2html(PUBLISH["table"]([PUBLISH["plain"](text)], []) + "\n\n*" + PUBLISH["plain"](text) + "*")
    soup = BeautifulSoup(page, "html.parser")
    assert [soup.th.get_text(), soup.em.get_text()] == [text, text]


def test_a_long_value_is_folded_in_a_published_page():
    runs = Parameter("runs", "list[str]", ["*=*"], "names")
    for count in (9, 99):
        text = PUBLISH["described"]([(runs, value := [f"a_{k}" for k in range(count)])])
        page = BeautifulSoup(markdown2html(text), "html.parser")
        assert repr(value) in page.find_all("td")[1].get_text()
        folded = [one.get_text() for one in page.select("td summary")]
        assert folded == ([repr(value)[:60] + " …"] if count == 99 else [])


def test_a_published_page_has_figures_tables_and_links_as_markdown(root, monkeypatch):
    folder, outputs = root / "reports/x", []
    monkeypatch.setattr(
        workbook,
        "_display",
        lambda data, metadata=None: outputs.append(new_output("display_data", data, metadata=metadata or {})),
    )
    book = workbook.Run("x", root, root / "runs/x", folder, "")
    book.show(Figure(figsize=(1, 1)), "two-points", "Two *points*.")
    book.table([{"a_b": "x|y", "n": 1200}, {"a_b": "2 (1 to 3)", "n": None}], "Cap.")
    book.keep([{"a": 1}], "rows_1")
    pixels = {"image/png": outputs[0].data["image/png"], "text/plain": "<Figure>"}
    outputs += [new_output("stream", text=f"in {root}/runs/x"), new_output("execute_result", {"text/plain": "7"})]
    outputs += [new_output("display_data", pixels), new_output("error", ename="E", evalue="no", traceback=["no"])]
    notebook = nbformat.read(folder / "01_work.ipynb", as_version=4)
    notebook.cells += [new_code_cell("secret()", outputs=outputs, id="c")]
    nbformat.write(notebook, folder / "01_work.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# U")]), folder / "02_more.ipynb")

    first, second = PUBLISH["publish"](folder)
    text = first.read_text()
    bar = "[All results](../README.md) · run `x` · [02_more](02_more.md) · [params.yaml](params.yaml)"
    assert text.startswith(f"# T\n\n{bar}\n\n`data/")
    assert "| `levels` | \\[1\\] |  |" in text and "| `name` | '\\`&lt;script&gt;" in text
    assert "![two points](figures/two-points.png)\n\n*Two \\*points\\*.*\n\n*Cap.*\n\n" in text
    assert "| a\\_b | n |\n| --- | --: |\n| x\\|y | 1,200 |\n| 2 (1\xa0to\xa03) | – |\n\n" in text
    assert "All of it: [rows\\_1.csv](rows_1.csv)\n" in text
    assert "    in runs/x\n" in text and "```text\n7\n```" in text and "![01_work c 6](figures/01_work-c-6.png)" in text
    assert "secret" not in text
    assert all((folder / place).is_file() for place in re.findall(r"\]\((\w+[./][^)]*)\)", text))
    assert second.read_text() == "# U\n\n" + bar.replace("02_more", "01_work") + "\n\n"
    before = [page.read_text() for page in (first, second)]
    (folder / "figures/two-points.png").write_bytes(b"of another execution")
    assert [page.read_text() for page in PUBLISH["publish"](folder)] == before  # the same again: no diffs
    assert (folder / "figures/two-points.png").read_bytes() == base64.b64decode(pixels["image/png"])
    with pytest.raises(ValueError, match="wanted reports/<run>: run it first"):
        PUBLISH["publish"](root / "reports")


class Called(BaseHTTPRequestHandler):
    """Notes which paths a script asked for."""

    seen: ClassVar[list[str]] = []

    def do_GET(self):
        self.seen.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def page_of_attacks(root: Path, call: str, monkeypatch) -> list[Path]:
    """A page and an index in which everything that a parameter, a file or a class can name asks for `call`."""
    img = f"<img src=x onerror={call}>"
    attack = f"`{img}` \"><script>{call}</script> ' onload={call} </style></title></header></pre>{img} [a](javascript:)"
    outputs, folder = [], root / "reports" / f"{img}"

    def shown(data, metadata=None):
        outputs.append(new_output("display_data", data=data, metadata=metadata or {}))

    monkeypatch.setattr(workbook, "_display", shown)
    book = workbook.Run("r", root, root, folder, "")
    book.show(Figure(figsize=(1, 1)), "samples", attack)
    book.table([{attack: attack, "n": 1}, {attack: None}], attack)
    book.keep([{"a": attack}], img)
    outputs += [new_output("stream", name=name, text=f"{attack}\n\x1b[31m{attack}") for name in ("stdout", "stderr")]
    outputs += [new_output("execute_result", data={"text/plain": attack})]
    outputs += [new_output("error", ename=attack, evalue=attack, traceback=[attack])]
    schema = f"name: str = 'a'  # {attack}\nnames: list[str] = ['b']\n"
    cells = [new_markdown_cell("# T\n\n`{name}` {name}"), new_code_cell(schema, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(f"# {attack}", outputs=outputs)]
    given = {"name": attack, "names": [attack]}
    nbformat.write(new_notebook(cells=cells, metadata={"papermill": {"parameters": given}}), folder / "01_work.ipynb")
    status = {"01_work": {"state": "failed", "seconds": 1.0, "error": attack, "started": attack},
              img: {"state": attack, "seconds": None, "error": None}}  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "params.yaml").write_text(yaml.safe_dump(given | {img: img}))
    (folder / "metrics.json").write_text(json.dumps({attack: attack, "fwd": 1}))
    (folder / "environment.json").write_text(json.dumps({"commit": "<script"}))
    return [report.render(folder, "01_work"), report.write_index(root)]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_no_script_runs_in_a_page(root, tmp_path, monkeypatch):
    """By escaping alone, with the page's policy against scripts removed; and by that policy alone."""
    monkeypatch.setattr(Called, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Called) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def call(path: str) -> str:  # no quote, slash or space, so that any name can hold it
            codes = map(str, f"http://127.0.0.1:{server.server_port}/{path}".encode())
            return f"fetch(String.fromCharCode({','.join(codes)}))"

        pages = [path.read_text() for path in page_of_attacks(root, call("hostile"), monkeypatch)]
        policies = [re.findall("<meta [^>]*Content-Security-Policy[^>]*>", page) for page in pages]
        assert [len(found) for found in policies] == [1, 1]
        files = [page.replace(policy[0], "") for page, policy in zip(pages, policies, strict=True)]
        for name, policy in (("open", ""), ("page", policies[0][0]), ("index", policies[1][0])):
            files.append(f"<html><head>{policy}</head><script>{call(name)}</script></html>")
        for number, text in enumerate(files):
            (tmp_path / f"{number}.html").write_text(text)
        (tmp_path / "all.html").write_text("".join(f"<iframe src={n}.html></iframe>" for n in range(len(files))))
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chromium"]
        command += ["--virtual-time-budget=4000", "--dump-dom", (tmp_path / "all.html").as_uri()]
        subprocess.run(command, capture_output=True, check=True, timeout=60)
        server.shutdown()
    assert Called.seen == ["/open"]  # what is meant to run did: the others could have been seen


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("status.json", "[" * 100_000, False),
        ("status.json", '{"01_work": {"state": "ok", "seconds": Infinity}}', True),
        ("status.json", '{"01_work": {"state": ["ok"]}}', True),
        ("status.json", '{"01_work": {"state": "ok", "started": 5, "error": {"a": 1}}}', False),
        ("status.json", '{"01_work": {"state": "ok", "seconds": "long"}}', True),
        ("metrics.json", '{"fwd": [1], "fid": NaN, "kid": Infinity, "n": {"a": null}}', False),
        ("status.json", '{"01_work": {"state": "ok", "commit": 5}}', True),
        ("params.yaml", "a: &a [1]\nb: *a", False),
        ("status.json", "[1]", False),
        ("status.json", '{"01_work": {"seconds": 1}}', True),
        ("status.json", "{", False),
        ("metrics.json", "[0.5]", False),
        ("params.yaml", "a: [1", False),
        ("params.yaml", "- 1", False),
        ("params.yaml", b"\xff\xfe\xfa", False),
    ],
)
def test_a_damaged_file_does_not_stop_the_index(root, name, content, said):
    folder = root / "reports" / "<i>bad"
    folder.mkdir()
    status = (root / "reports/x/status.json").read_text()
    for path, text in ((folder / "status.json", status), (folder / name, content)):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    index = report.write_index(root).read_text()
    assert '<a href="x/01_work.html">' not in index and '<span class="name">x</span>' in index
    assert '<span class="name">&lt;i&gt;bad</span>' in index and ("its files cannot be read" in index) is said


def test_the_index_shows_kid_as_pages_do(root):
    numbers = {"fwd": 0.0123, "kid_efficientnet": 0.4573, "kid_efficientnet_low": -0.002, "kid_efficientnet_high": 0.5}
    write_json(root / "reports/x/metrics.json", numbers)
    index = BeautifulSoup(report.write_index(root).read_text(), "html.parser")
    assert [button.text for button in index.thead.find_all("button")][3:5] == ["kid efficientnet x 1000", "fwd"]
    kid, fwd = index.find_all("td", "number")
    assert kid.get_text(" ", strip=True) == "457.3 -2 to 500" and fwd.get_text(strip=True) == "0.0123"


def test_rendering_is_imported_when_it_is_used():
    heavy = {"pandas", "numpy", "nbconvert", "nbformat", "jinja2", "pygments"}
    code = f"import sys, wddm.workbook; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_rows_are_kept_with_every_digit(tmp_path, monkeypatch):
    import numpy as np

    shown = []
    monkeypatch.setattr(workbook, "_display", lambda forms: shown.append(forms))
    rows = [{"a": 0.1 + 0.2, "n": 3}, {"a": np.float64("inf"), "n": None, "b": "x,y"}, {"a": float("nan"), "b": [1]}]
    workbook.Run("r", tmp_path, tmp_path, tmp_path, "").keep(rows, "rows<i>")
    assert (tmp_path / "rows<i>.csv").read_text() == 'a,n,b\n0.30000000000000004,3,\ninf,,"x,y"\n,,[1]\n'
    link = '<p>All of it: <a href="rows&lt;i&gt;.csv">rows&lt;i&gt;.csv</a></p>'
    assert shown == [{"text/html": link, "text/plain": "All of it: rows<i>.csv"}]


def test_a_widget_leaves_its_picture_in_a_page_and_else_nothing():
    bar = {WIDGET: {"model_id": "a"}, "text/plain": "Loading: 0%| | 0/3 [00:00<?, ?it/s]"}  # tqdm's, in a notebook
    figure = {WIDGET: {"model_id": "b"}, "text/plain": "[figure]", "image/png": "pixels"}
    words = {"text/plain": "said"}
    outputs = [new_output("display_data", data=data) for data in (bar, figure, words)]
    cell = report._tidy(new_code_cell("", outputs=outputs))
    assert [output.data for output in cell.outputs] == [{"text/plain": "[figure]", "image/png": "pixels"}, words]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.01235"),
        (26194435, "26,194,435"),
        (3.14159e-5, "3.142e-05"),
        (123456.7, "123,457"),
        (None, "–"),
        (float("nan"), "–"),
        ("x", "x"),
        (True, "True"),
        (1.0, "1"),
        (1358.2, "1,358"),
    ],
)
def test_numbers_are_readable(value, text):
    assert report.format_number(value) == text


def test_tables_take_frames_and_rows():
    import pandas as pd

    as_html, as_text = report.format_table([{"a": "<x>", "b": 1}, {"b": 22}], "Cap")
    assert '<td style="text-align: left">&lt;x&gt;</td>' in as_html and ">Cap</caption>" in as_html
    assert as_text == "Cap\na     b\n<x>   1\n–    22"
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbook, "_display", lambda forms: shown.append(forms["text/plain"]))
        book = workbook.Run("r", Path(), None, Path(), Path())
        book.table(pd.DataFrame({"fwd": [0.5]}, index=["ours"]), "T")
        book.table(pd.DataFrame({"fwd": [0.5]}), "T")
    assert shown == ["T\n      fwd\nours  0.5", "T\nfwd\n0.5"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234, "1.2 s"),
        (245, "0:04:05"),
        (7800, "2:10:00"),
    ],
)
def test_times_are_readable(seconds, text):
    assert report.format_seconds(seconds) == text


@pytest.fixture
def reports(root) -> Path:
    """reports/ with an index of x, a sweep of three with its summary, a sweep without one, and a published run."""
    runs = {"s-level=0": 3.0, "s-level=1": 1.0, "s-level=2": None, "s": None, "t-seed=0": 2.0, "t-seed=1": 4.0}
    for day, (name, fwd) in enumerate(runs.items(), 1):
        folder = root / "reports" / name
        folder.mkdir()
        status = {"01_work": {"state": "ok" if fwd else "failed", "seconds": 1.0, "started": f"2026-02-0{day}"}}
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "01_work.html").touch()
        numbers = {"fwd": fwd, "fwd_low": 0.5, "fwd_high": 9.5, "fwd_floor": 0.1, "a": 1} if fwd else {"a": 2}
        (folder / "metrics.json").write_text(json.dumps(numbers))
        (folder / "params.yaml").write_text(yaml.safe_dump({"run": name, "levels": [day], "name": "a" * 200}))
    (root / "reports/kept/figures").mkdir(parents=True)
    (root / "reports/kept/02_train.md").touch()
    (root / "reports/kept/figures/samples.png").touch()
    report.render(root / "reports/x", "01_work")
    return report.write_index(root).parent


def test_the_index_groups_the_runs_of_a_sweep_and_links_what_is_published(reports):
    page = BeautifulSoup((reports / "index.html").read_text(), "html.parser")
    groups = [[name.get_text() for name in body.select(".name")] for body in page.find_all("tbody")]
    assert groups == [["t", "t-seed=1", "t-seed=0"], ["s", "s-level=2", "s-level=1", "s-level=0"], ["x"], ["kept"]]
    assert [button.get_text() for button in page.select("tbody button")] == ["2 runs", "3 runs"]
    links = [tag.get("href") or tag["src"] for tag in page.select("a, img")]
    assert "kept/02_train.md" in links and [one for one in links if not (reports / unquote(one)).exists()] == []
    row = next(row for row in page.find_all("tr") if row.find(string="s-level=0"))
    assert row.select_one(".number").get_text(" ", strip=True) == "3 0.5 to 9.5"  # what was measured, low to high
    changes = [code.get_text() for code in row.select(".changes code")]
    assert changes == [f"name={'a' * 79}…"]  # levels is [1] in 01_work, too
    assert row.select_one(".badge").get_text() == "ok" and "published" in page.find_all("tbody")[-1].get_text()
    assert [header.get_text(strip=True) for header in page.select("thead th")][3:] == ["fwd", "parameters"]


def test_the_policy_of_the_index_lets_its_own_script_run(reports):
    """The policy names a digest of the script: when index.js changes, it has to change in index.html.j2."""
    page = BeautifulSoup((reports / "index.html").read_text(), "html.parser")
    digest = base64.b64encode(hashlib.sha256(page.script.string.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in page.select_one("meta[http-equiv]")["content"]


def browse(tmp_path: Path, page: Path, script: str, *scripts: str) -> Any:
    """The value of the expression `script` in Chromium, passed as JSON; `page` in it is the page, 400 pixels wide."""
    if not shutil.which("chromium"):
        pytest.skip("needs Chromium")
    text = re.sub("<meta [^>]*Content-Security-Policy[^>]*>", "", page.read_text())
    inside = page.with_name("inside.html")
    inside.write_text(text + "".join(f"<script>{one}</script>" for one in scripts))
    outside = tmp_path / "outside.html"
    frame = f"<iframe src='{inside.as_uri()}' style='width: 400px; height: 3000px; border: 0'></iframe><pre></pre>"
    then = "const page = document.querySelector('iframe').contentWindow, out = document.querySelector('pre');"
    outside.write_text(
        f"{frame}<script>onload = async () => {{ {then} out.textContent = JSON.stringify(await ({script})); }}</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chromium"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=10000", "--dump-dom", outside.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(BeautifulSoup(done.stdout, "html.parser").pre.get_text())


def test_the_index_is_sorted_filtered_and_unfolded_and_fits_a_phone(reports, tmp_path):
    seen = browse(tmp_path, reports / "index.html", """(() => {
        const all = selector => [...page.document.querySelectorAll(selector)], seen = {};
        const look = name => seen[name] = all("tbody tr").filter(row => row.getClientRects().length)
            .map(row => row.querySelector(".name").textContent).join(" ");
        const type = (where, text) => {
            const field = page.document.querySelector(where);
            field.value = text;
            field.dispatchEvent(new page.Event("input"));
        };
        look("start");
        all("thead button")[3].click(), look("up");
        all("thead button")[3].click(), look("down");
        all("tbody button").at(-1).click(), look("unfolded");
        type("#words", "LEVEL=1"), look("words");
        type("#words", ""), type("#state", "failed"), look("failed");
        type("#state", ""), look("reset");
        return {...seen, width: page.document.documentElement.scrollWidth};
    })()""")  # fmt: skip
    assert seen == {
        "start": "t s x kept",
        "up": "s t x kept",
        "down": "t s x kept",
        "unfolded": "t s s-level=0 s-level=1 s-level=2 x kept",  # what has no value comes last
        "words": "s s-level=1",
        "failed": "s s-level=2",
        "reset": "t s x kept",
        "width": 400,
    }


def test_captions_are_as_wide_as_their_cell(root, tmp_path):
    folder, caption = root / "reports/x", "A caption that is far longer than its table is wide. " * 3
    table = report.format_table([{"a": 1}], caption)[0]
    outputs = [
        new_output("display_data", {"text/html": each}) for each in (table, f"<figcaption>{caption}</figcaption>")
    ]
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=outputs)]), folder / "01_work.ipynb")
    wide = "[...page.document.querySelectorAll('.html, .html caption, figcaption, td')].map(one => one.clientWidth)"
    cell, of_table, number, also, of_figure = browse(tmp_path, report.render(folder, "01_work"), wide)
    assert cell == of_table == also == of_figure > 300 and number < 100


def test_a_folded_value_is_printed(root, tmp_path):
    notebook = nbformat.read(path := root / "reports/x/01_work.ipynb", as_version=4)
    notebook.metadata["papermill"] = {"parameters": {"levels": list(range(99))}}
    nbformat.write(notebook, path)
    page = report.render(path.parent, path.stem)
    page.write_text(page.read_text().replace("@media print", "@media all"))
    assert browse(tmp_path, page, "page.document.querySelector('.parameters summary').clientHeight") > 0


@pytest.mark.slow  # npm fetches axe-core
def test_pages_and_index_are_accessible_in_light_and_dark(reports, tmp_path, monkeypatch):
    if not shutil.which("npm") or not shutil.which("chromium"):
        pytest.skip("needs Chromium and npm")
    fetch = ["npm", "install", "--no-audit", "--no-fund", f"--prefix={tmp_path}", "axe-core@4"]
    if subprocess.run(fetch, capture_output=True, timeout=120).returncode:
        pytest.skip("npm cannot fetch axe-core")
    axe = (tmp_path / "node_modules/axe-core/axe.min.js").read_text()
    notebook = nbformat.read(path := reports / "x/01_work.ipynb", as_version=4)
    wide = {f"column {k}": "a word or two" for k in range(12)}
    link = new_markdown_cell("[A link](https://arxiv.org) in a sentence. `Code`.\n\n> Quoted.")
    tables = {"text/html": report.format_table([wide], "Cap.")[0]}
    headings = [new_markdown_cell(f"## {title}") for title in "ABC"]
    notebook.cells += [link, new_code_cell("1", outputs=[new_output("display_data", tables)]), *headings]
    nbformat.write(notebook, path)
    run = "page.axe.run(page.document).then(found => found.violations.map(one => [one.id, one.nodes.map(n => n.html)]))"
    failed, index = page_of_attacks(reports.parent, "void(0)", monkeypatch)  # with every kind of output
    for page in (failed, index, report.render(reports / "x", "01_work")):
        light = page.read_text()
        dark = light.replace("prefers-color-scheme: dark", "min-width: 1px")
        for text in (light, dark):
            (page.parent / "looked-at.html").write_text(text)
            assert browse(tmp_path, page.parent / "looked-at.html", run, axe) == []
