"""Reports: what is printed, a page and an index that show what there is, whatever is in it."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import nbformat
import pytest
import yaml
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from wddm import workbook
from wddm.workbook import report
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
    assert "<code>data/{name}/a.npy</code>, {name}, <code>{file}</code>" in page  # the prose stays as it was written
    assert "<td>&lt;b&gt;help&lt;/b&gt;</td>" in page
    index = report.write_index(root).read_text()
    assert f"<code>name={text}</code>" in index and "levels=" not in index
    assert "<script" not in page + index and "<b>help" not in page


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
    """By escaping alone, the page's policy against scripts being taken out, and by this policy alone."""
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
        ("environment.json", '{"commit": 5}', True),
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
    assert '<a href="x/01_work.html">' not in index and "<h2>x <span" in index
    assert "<h2>&lt;i&gt;bad <span" in index and ("its files cannot be read" in index) is said


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
    workbook.Run("r", tmp_path, None, tmp_path, "").keep(rows, "rows<i>")
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
    ],
)
def test_numbers_are_readable(value, text):
    assert report.format_number(value) == text


def test_tables_take_frames_and_rows():
    import pandas as pd

    as_html, as_text = report.format_table([{"a": "<x>", "b": 1}, {"b": 22}], "Cap")
    assert '<td style="text-align: left">&lt;x&gt;</td>' in as_html and "<caption>Cap</caption>" in as_html
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


def test_a_card_shows_what_was_measured_without_its_interval(tmp_path: Path):
    """Distances first, the perceptual one before the others; bounds and floors are read on the run's page."""
    numbers = {"asked_share": 0.9, "fwd": 0.1, "fwd_low": 0, "fwd_high": 1, "fwd_floor": 0, "kid_efficientnet": 3}
    (tmp_path / "metrics.json").write_text(json.dumps(numbers))
    assert list(report._card(tmp_path, {})["metrics"]) == ["kid_efficientnet", "fwd", "asked_share"]
