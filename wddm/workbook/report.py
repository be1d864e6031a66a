"""Reports: numbers and tables as they are printed, an executed notebook as a page of its own, the index of all runs.

A page needs nothing but itself: no script, no font, no address outside. What comes from parameters and file names is
escaped. Importing this module imports none of what renders.
"""

import html
import math
import re
from collections import ChainMap
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from wddm.workbook.experiments import pipeline_notebooks
from wddm.workbook.parameters import parse_parameters, read_schema, tagged
from wddm.workbook.provenance import data_folder
from wddm.workbook.records import read_json, read_status, write_json, write_text

TEMPLATES = Path(__file__).parent / "templates"
PROGRESS_LINE = re.compile(r"\[(\d+:)?\d\d:\d\d[<,]")  # tqdm's [elapsed<remaining, rate]
WIDGET = "application/vnd.jupyter.widget-view+json"  # what lives in JupyterLab alone, beside a picture of itself
MARKUP = re.compile(r"[&<>\"'`*\[\]$\\~|{}\n]")  # what HTML or Markdown could take for more than a character
WORST_FIRST = ("running", "failed", "killed", "pending", "ok")
HEADLINES = ("fwd", "fid", "kid", "inception_score", "precision", "recall")  # numbers that a card shows first


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def format_number(value: Any) -> str:
    """Four significant digits, or whole with thousands: 0.012345 -> 0.01235, 26194435 -> 26,194,435."""
    if not _is_number(value):
        return str(value)
    if value is None or math.isnan(value):
        return "–"
    if isinstance(value, Integral) or (math.isfinite(value) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_seconds(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_table(rows: list[dict[str, Any]], caption: str) -> tuple[str, str]:
    """Rows as an HTML table with a caption, and the same as plain text; numbers are set to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    titles = ["" if column == "index" else str(column) for column in columns]  # pandas' name for no name
    cells = [[format_number(row.get(column)) for column in columns] for row in rows]
    sides = ["right" if all(_is_number(row.get(column)) for row in rows) else "left" for column in columns]
    as_html = _template("table").render(caption=caption, titles=titles, cells=cells, sides=sides)
    texts = []
    for side, column in zip(sides, zip(titles, *cells, strict=True), strict=True):
        width = max(map(len, column))
        texts.append([text.rjust(width) if side == "right" else text.ljust(width) for text in column])
    return as_html, "\n".join([caption, *("  ".join(line).rstrip() for line in zip(*texts, strict=True))])


def write_rows(rows: list[dict[str, Any]], as_csv: Path, as_json: Path) -> None:
    """Rows as CSV, a column per key, and as JSON; what is absent, or not a finite number, is empty and null."""
    import pandas as pd

    table = pd.DataFrame([{key: _plain(value) for key, value in row.items()} for row in rows], dtype=object)
    table = table.where(table.notna(), None)
    write_text(as_csv, table.to_csv(index=False, lineterminator="\n"))
    write_json(as_json, table.to_dict("records"))


def _plain(value: Any) -> Any:
    """For JSON: NumPy's scalars and arrays as Python's, and None for what is no finite number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(folder: Path, name: str) -> Path:
    """reports/<run>/<name>.ipynb -> .html, and new headers for the run's other pages."""
    import nbformat
    from pygments.formatters import HtmlFormatter

    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    declared = tagged(notebook, "parameters")
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    schema = parse_parameters(declared.source, "") if declared else {}
    values = {key: given.get(key, parameter.default) for key, parameter in schema.items()}
    if prose := next((cell for cell in notebook.cells if cell.cell_type == "markdown"), None):
        prose.source = _fill_in(prose.source, {"data": data_folder(folder.absolute().parents[1], folder.name)} | values)
    hidden = {"injected-parameters", "papermill-error-cell-tag"}
    notebook.cells = [_tidy(cell) for cell in notebook.cells if not hidden & set(cell.metadata.get("tags", []))]
    resources = {
        "title": f"{name} · {folder.name}",
        "page_header": _header(folder, name),
        "parameters": [(parameter, values[key]) for key, parameter in schema.items()],
        "css": (TEMPLATES / "style.css").read_text(encoding="utf-8"),
        "code_css": HtmlFormatter(style="default").get_style_defs(".highlight"),
        "dark_code_css": HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    }
    page = folder / f"{name}.html"
    write_text(page, _exporter().from_notebook_node(notebook, resources)[0])
    for other in read_status(folder).keys() - {name}:
        if (path := folder / f"{other}.html").exists():
            before, _, after = path.read_text(encoding="utf-8").partition("<header>")
            write_text(path, before + _header(folder, other) + after.partition("</header>")[2])
    return page


def _header(folder: Path, name: str) -> str:
    """The bar of a page: run, notebook, state, and the way to the others."""
    written = {path.stem for path in folder.glob("*.ipynb")}
    return _template("header").render(run=folder.name, name=name, status=read_status(folder), written=written)


def _fill_in(source: str, values: dict[str, Any]) -> str:
    """Markdown with the values of its {parameters}, as text whatever they hold; a list stands for itself."""
    known = {f"{{{name}}}": value for name, value in values.items() if not isinstance(value, list)}

    def fill(match: re.Match[str]) -> str:
        inside = match[0].strip("`")
        text = re.sub(r"\{\w+\}", lambda found: str(known.get(found[0], found[0])), inside)
        if text == inside:
            return match[0]
        if known.get(inside, "") is None:
            return "none"
        text = MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
        return f"<code>{text}</code>" if match[0].startswith("`") else text

    return re.sub(r"`[^`\n]+`|\{\w+\}", fill, source)


def _exporter() -> Any:
    """nbconvert's exporter to HTML, with formulas as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str, display: str = "inline") -> str:
            try:
                return convert(body, display=display)
            except Exception:  # its errors have no common name; the formula stays as it was typed
                return f"<code>{html.escape(body)}</code>"

        def block_math(self, body: str) -> str:
            return self.inline_math(body, "block")

    class Exporter(HTMLExporter):
        def markdown2html(self, source: str) -> str:
            return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)

    return Exporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)])


def _tidy(cell: Any) -> Any:
    """Drop progress bars and carriage-return debris from a cell's streams, and widgets, which are dead in a page.

    A widget with a picture of itself leaves that; one with words alone (another library's progress bar) nothing.
    """
    kept = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
            output.text = "\n".join(line for line in lines if not PROGRESS_LINE.search(line)).strip("\n")
        was_widget = output.get("data", {}).pop(WIDGET, None) is not None
        if output.get("text", "-").strip() and not (was_widget and output.data.keys() <= {"text/plain"}):
            kept.append(output)
    if cell.cell_type == "code":
        cell.outputs = kept
    return cell


def _template(name: str) -> Any:
    """One of templates/, which escapes what is put into it."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=format_number, seconds=format_seconds)
    return environment.get_template(f"{name}.html.j2")


def write_index(root: Path) -> Path:
    """reports/index.html: every run as a card, the latest first: its state, picture, main numbers, what was changed."""
    defaults: dict[str, dict[str, Any]] = {}  # by notebook
    runs: list[dict[str, Any]] = []
    for path in (*pipeline_notebooks(root), *sorted(root.glob("notebooks/analysis/*.ipynb"))):
        with suppress(ValueError):  # a notebook that cannot be read does not stand in the way
            defaults[path.stem] = {name: parameter.default for name, parameter in read_schema(path).items()}
    for folder in sorted(path.parent for path in (root / "reports").glob("*/status.json")):
        try:
            runs.append(_card(folder, defaults))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"its files cannot be read: {type(error).__name__}: {error}"
            runs.append({"name": folder.name, "state": "failed", "error": problem, "started": ""})
    runs.sort(key=lambda run: (run["started"], run["name"]), reverse=True)
    page = root / "reports" / "index.html"
    write_text(page, _template("index").render(runs=runs))
    return page


def _card(folder: Path, defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the index shows of a run; a parameter's default is that of the first of its notebooks that declares it."""
    status = read_status(folder)
    own = ChainMap(*(defaults.get(name, {}) for name in sorted(status)))
    entries, states = status.values(), {entry["state"] for entry in status.values()}
    metrics, timings, made_by = (read_json(folder / f"{name}.json") for name in ("metrics", "timings", "environment"))
    figures = sorted(folder.glob("figures/*.png"), key=lambda path: (path.stem != "samples", path.name))
    first = sorted(metrics, key=lambda key: ([not key.startswith(name) for name in HEADLINES], key))
    return {
        "name": folder.name,
        "status": status,
        "pages": [name for name in sorted(status) if (folder / f"{name}.html").exists()],
        "state": next((state for state in WORST_FIRST if state in states), "pending"),
        "error": next((entry["error"] for entry in entries if entry.get("error")), None),
        "started": max((entry.get("started") or "" for entry in entries), default=""),
        "seconds": sum(entry.get("seconds") or 0 for entry in entries),
        "thumbnail": figures[0].relative_to(folder.parent).as_posix() if figures else None,
        "metrics": {key: metrics[key] for key in first[:6]},
        "timings": dict(list(timings.items())[:3]),
        "changed": {key: value for key, value in _read_parameters(folder).items() if value != own.get(key, ...)},
        "commit": (made_by.get("commit") or "")[:7],
    }


def _read_parameters(folder: Path) -> dict[str, Any]:
    """The resolved parameters of a run but for its name; {} where they are missing or damaged."""
    import yaml

    with suppress(AttributeError, OSError, ValueError, yaml.YAMLError):
        content = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        return {key: value for key, value in content.items() if key not in ("run", "notebooks")}
    return {}
