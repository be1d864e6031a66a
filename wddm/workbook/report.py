"""Reports: numbers and tables as they are printed, an executed notebook as a page of its own, the index of all runs.

A page is self-contained: no script, no font, no address outside. Text from parameters and file names is escaped. The
libraries that render are imported when they are first needed.
"""

import html
import math
import re
from collections import ChainMap
from contextlib import suppress
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from wddm.files import read_json, write_text
from wddm.workbook.experiments import pipeline_notebooks
from wddm.workbook.parameters import Parameter, expand, parse_parameters, read_schema, read_yaml, tagged
from wddm.workbook.records import prepared_set, read_status

TEMPLATES = Path(__file__).parent / "templates"
PROGRESS_LINE = re.compile(r"(?m)^.*\[(\d+:)?\d\d:\d\d[<,].*\n?")  # tqdm's: [elapsed<remaining, rate]
LESSON = re.compile(r'(?<=href=")\.\./\.\./(notebooks/tutorials/(\w+)\.ipynb)')
WIDGET = "application/vnd.jupyter.widget-view+json"  # a widget, for JupyterLab alone; a picture is beside it
WORST_FIRST = ("running", "failed", "killed", "pending", "ok")
HEADLINES = {"kid_efficientnet": 1000, "fwd": 1, "fid": 1, "kid": 1000}  # metric that the index shows -> factor


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def format_number(value: Any) -> str:
    """Four significant digits, or whole with thousands: 0.012345 -> 0.01235, 26194435 -> 26,194,435."""
    if not _is_number(value):
        return str(value)
    if value is None or math.isnan(value):
        return "–"
    whole = isinstance(value, Integral) or (math.isfinite(value) and abs(value) >= 10_000)
    return f"{value:,.0f}" if whole else f"{value:,.4g}"


def format_seconds(seconds: float) -> str:
    """Seconds as text: 12.3 s, 0:04:05, 2:10:00."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def format_table(rows: list[dict[str, Any]], caption: str) -> tuple[str, str]:
    """Rows as an HTML table with a caption, and the same as plain text; numbers are set to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    titles = ["" if column == "index" else str(column) for column in columns]  # pandas' name for an index without one
    cells = [[format_number(row.get(column)) for column in columns] for row in rows]
    sides = ["right" if all(_is_number(row.get(column)) for row in rows) else "left" for column in columns]
    as_html = _template("table").render(caption=caption, titles=titles, cells=cells, sides=sides)
    aligned = zip(sides, zip(titles, *cells, strict=True), strict=True)
    texts = [[getattr(text, f"{side[0]}just")(max(map(len, column))) for text in column] for side, column in aligned]
    return as_html, "\n".join([caption, *("  ".join(line).rstrip() for line in zip(*texts, strict=True))])


def read_page(folder: Path, name: str) -> tuple[Any, list[tuple[Parameter, Any]]]:
    """reports/<run>/<name>.ipynb as a page shows it, its title cell filled in; and its parameters with their values."""
    import nbformat

    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    schema = parse_parameters(getattr(tagged(notebook, "parameters"), "source", ""), "")
    values = {key: given.get(key, parameter.default) for key, parameter in schema.items()}
    hidden = {"injected-parameters", "papermill-error-cell-tag"}
    notebook.cells = [_tidy(cell) for cell in notebook.cells if not hidden & set(cell.metadata.get("tags", []))]
    known = values | prepared_set(folder.absolute().parents[1], folder.name)
    for cell in notebook.cells[:1]:
        cell.source = fill(cell.source, known).replace("](tutorials/", "](../../notebooks/tutorials/")
        if (folder / "params.yaml").exists():
            cell.source = re.sub(r"(?<=wddm run )params/[\w/-]+", f"reports/{folder.name}/params", cell.source, count=1)
    return notebook, [(parameter, values[key]) for key, parameter in schema.items()]


def fill(prose: str, values: dict[str, Any]) -> str:
    """Prose with values for the names in code spans like `runs/{run}`: `*` for several items, no span for None."""

    def spans(match: re.Match[str]) -> str:
        texts = expand(match[2], {k: "*" if isinstance(v, list) and v[1:] else v for k, v in values.items()})
        return match[1] + "`" + re.sub(r"[`$<>\s]+", " ", texts[0]) + "`" if texts else ""  # what would end the span

    return re.sub(r"(,\s| or |)`([^`\n]*{\w+}[^`\n]*)`", spans, prose)


def render(folder: Path, name: str) -> Path:
    """reports/<run>/<name>.ipynb -> .html, to which the run's other pages then link."""
    from pygments.formatters import HtmlFormatter

    notebook, parameters = read_page(folder, name)
    resources = {
        "title": f"{name} · {folder.name}", "page_header": _header(folder, name), "parameters": parameters,
        "code_css": lambda style: HtmlFormatter(style=style).get_style_defs(".highlight"),
    }  # fmt: skip
    text = _exporter().from_notebook_node(notebook, resources)[0]
    write_text(page := folder / f"{name}.html", LESSON.sub(lambda link: _lesson(folder, *link.group(1, 2)), text))
    renew_headers(folder)
    return page


def renew_headers(folder: Path) -> None:
    """Bring the headers of all pages of a run up to date: the states of its notebooks, the links to other pages."""
    for page in (path.with_suffix(".html") for path in folder.glob("*.ipynb")):
        with suppress(OSError, ValueError):  # no page, or none of ours
            before, _, rest = (text := page.read_text(encoding="utf-8")).partition("<header>")
            _, end, after = rest.partition("</header>")
            if end and (new := before + _header(folder, page.stem) + after) != text:
                write_text(page, new)


def _lesson(folder: Path, path: str, name: str) -> str:
    """The link from a run's page to a tutorial's, rendered with its committed outputs if it was not run here."""
    page, source = folder.parent / "tutorials" / f"{name}.html", folder.absolute().parents[1] / path
    copy, was_run = page.with_suffix(".ipynb"), name in read_status(page.parent)
    if source.exists() and not was_run and not (page.exists() and copy.read_bytes() == source.read_bytes()):
        write_text(copy, source.read_text(encoding="utf-8"))
        render(page.parent, name)
    return f"../tutorials/{page.name}" if page.exists() else f"../../{path}"


def _header(folder: Path, name: str) -> str:
    """The bar of a page: run, notebook, its state if it was run here, and links to the run's other pages."""
    written: dict[str, dict] = {path.stem: {} for path in folder.glob("*.ipynb")}
    return _template("header").render(run=folder.name, name=name, status=written | read_status(folder), written=written)


def _exporter() -> Any:
    """nbconvert's exporter to HTML, with formulas as MathML, which browsers draw without a script."""
    import nbconvert
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str, display: str = "inline") -> str:
            try:
                return convert(body, display=display)
            except Exception:  # its errors have no common name; the formula stays as it was typed
                return f"<code>{html.escape(body)}</code>"

        def block_math(self, body: str) -> str:
            return self.inline_math(body, "block")

    filters = {"markdown2html": MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render}
    # nbconvert's own templates, which it looks for below sys.prefix alone: it may be of another environment
    theirs = str(Path(nbconvert.__file__).parents[4] / "share/jupyter/nbconvert/templates")
    places = {"extra_template_basedirs": [str(TEMPLATES), theirs], "extra_template_paths": [theirs]}
    return nbconvert.HTMLExporter(template_name="report", filters=filters, **places)


def _tidy(cell: Any) -> Any:
    """A cell without progress bars and widgets, which do not work in a page; the picture of a widget stays."""
    kept = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            output.text = PROGRESS_LINE.sub("", output.text).strip("\n")
        was_widget = output.get("data", {}).pop(WIDGET, None) is not None
        if output.get("text", "-").strip() and not (was_widget and output.data.keys() <= {"text/plain"}):
            kept.append(output)
    if cell.cell_type == "code":
        cell.outputs = kept
    return cell


def _template(name: str) -> Any:
    """A template of templates/; it escapes the values that are put into it."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=format_number, seconds=format_seconds)
    return environment.get_template(f"{name}.html.j2")


def write_index(root: Path) -> Path:
    """Write reports/index.html, a table of all runs to sort and filter: the latest first, a sweep's runs below it."""
    defaults: dict[str, dict[str, Any]] = {}  # by notebook
    runs: list[dict[str, Any]] = []
    groups: dict[str, list[dict[str, Any]]] = {}  # by the run's name without what a sweep chose
    for path in (*pipeline_notebooks(root), *sorted(root.glob("notebooks/analysis/*.ipynb"))):
        with suppress(ValueError):  # a notebook that cannot be read does not stand in the way
            defaults[path.stem] = {name: parameter.default for name, parameter in read_schema(path).items()}
    for folder in sorted({path.parent for name in ("status.json", "*.md") for path in root.glob(f"reports/*/{name}")}):
        try:
            runs.append(_row(folder, defaults))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"its files cannot be read: {type(error).__name__}: {error}"
            runs.append({"name": folder.name, "state": "failed", "error": problem, "started": ""})
    for run in sorted(runs, key=lambda run: (run["started"], run["name"]), reverse=True):
        base = re.split(r"-(?=\w+=)", run["name"])[0]
        (members := groups.setdefault(base, [])).insert(0 if run["name"] == base else len(members), run)
    shown = {key: n for key, n in HEADLINES.items() if any(key in run.get("metrics", ()) for run in runs)}
    write_text(page := root / "reports/index.html", _template("index").render(runs=runs, groups=groups, metrics=shown))
    return page


def _row(folder: Path, defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the index shows of a run. A parameter's default is that of the first of its notebooks with it, or of any."""
    pages = {path.stem: path.name for end in ("md", "html") for path in sorted(folder.glob(f"*.{end}"))}
    status, parameters = read_status(folder), {}
    with suppress(ValueError):  # missing, or damaged
        parameters = read_yaml(folder / "params.yaml")
    own = ChainMap(*(defaults.get(name, {}) for name in sorted(status or pages)), *defaults.values())
    entries, states = status.values(), {entry["state"] for entry in status.values()}
    commits = [x for entry in entries if (x := entry.get("commit"))]
    commits = commits or [read_json(folder / "environment.json").get("commit") or ""]
    figures = sorted(folder.glob("figures/*.png"), key=lambda path: (path.stem != "samples", path.name))
    return {
        "name": folder.name, "pages": dict(sorted(pages.items())), "metrics": read_json(folder / "metrics.json"),
        "state": next((state for state in WORST_FIRST if state in states), "pending") if status else "published",
        "error": next((entry["error"] for entry in entries if entry.get("error")), None),
        "started": max((str(entry.get("started") or "") for entry in entries), default=""),
        "seconds": format_seconds(sum(entry.get("seconds") or 0 for entry in entries)) if status else "",
        "thumbnail": figures[0].relative_to(folder.parent).as_posix() if figures else None,
        "changed": {k: v for k, v in parameters.items() if v != own.get(k, ...) and k not in ("run", "notebooks")},
        "commit": ", ".join(dict.fromkeys(commit[:7] + commit[40:] for commit in commits)),
    }  # fmt: skip
