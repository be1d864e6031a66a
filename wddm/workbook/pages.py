"""An executed notebook as an HTML page that needs nothing but itself: no script, no font, no address outside."""

import ast
import html
import re
from pathlib import Path
from typing import Any

from wddm.workbook.parameters import parse_parameters, tagged
from wddm.workbook.records import read_status, write_text
from wddm.workbook.tables import format_number, format_seconds

TEMPLATES = Path(__file__).parent / "templates"
PROGRESS_LINE = re.compile(r"\[(\d+:)?\d\d:\d\d[<,]")  # tqdm's [elapsed<remaining, rate]
WIDGET = "application/vnd.jupyter.widget-view+json"  # what lives in JupyterLab alone, beside a picture of itself
HEADER = re.compile(r"<header>.*?</header>", re.DOTALL)


def render(folder: Path, name: str) -> Path:
    """reports/<run>/<name>.ipynb -> .html, and new headers for the run's other pages."""
    import nbformat
    from pygments.formatters import HtmlFormatter

    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    parameters = _take_parameters(notebook)
    _fill_in(notebook, parameters)
    resources = {
        "title": f"{name} · {folder.name}",
        "page_header": _header(folder, name),
        "parameters": parameters,
        "css": (TEMPLATES / "style.css").read_text(encoding="utf-8"),
        "code_css": HtmlFormatter(style="default").get_style_defs(".highlight"),
        "dark_code_css": HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    }
    notebook.cells = [
        _tidy(cell) for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    exporter = _exporter()(template_name="report", extra_template_basedirs=[str(TEMPLATES)])
    page = folder / f"{name}.html"
    write_text(page, exporter.from_notebook_node(notebook, resources)[0])
    for other in read_status(folder):
        path = folder / f"{other}.html"
        if other != name and path.exists():
            header = _header(folder, other)
            write_text(path, HEADER.sub(lambda _, new=header: new, path.read_text(encoding="utf-8"), count=1))
    return page


def _header(folder: Path, name: str) -> str:
    """The bar of a page: run, notebook, state, and the way to the others."""
    status = read_status(folder)
    notebooks = [
        {"name": other, "state": status[other]["state"], "written": (folder / f"{other}.ipynb").exists()}
        for other in sorted(status)
    ]
    return (
        environment()
        .get_template("header.html.j2")
        .render(run=folder.name, name=name, entry=status[name], notebooks=notebooks)
    )


def _take_parameters(notebook: Any) -> list[dict[str, Any]]:
    """Rows of the parameter table; the injected cell is merged into them and removed from the notebook."""
    declared, injected = tagged(notebook, "parameters"), tagged(notebook, "injected-parameters")
    if declared is None:
        return []
    notebook.cells = [cell for cell in notebook.cells if cell is not injected]
    values = notebook.metadata.get("papermill", {}).get("parameters", {})
    rows = []
    for parameter in parse_parameters(declared.source, "").values():
        value = values.get(parameter.name, parameter.default)
        rows.append(
            {
                "name": parameter.name,
                "value": repr(value),
                "help": parameter.help,
                "default": repr(parameter.default),
                "changed": value != parameter.default,
            }
        )
    return rows


def _fill_in(notebook: Any, parameters: list[dict[str, Any]]) -> None:
    """Put values for the {parameters} of the paths that the first markdown cell declares."""
    first = next((cell for cell in notebook.cells if cell.cell_type == "markdown"), None)
    for row in parameters if first else ():
        value = ast.literal_eval(row["value"])
        first.source = first.source.replace(f"`{{{row['name']}}}`", "none" if value is None else f"`{value}`")
        first.source = first.source.replace(f"{{{row['name']}}}", str(value))


def _exporter() -> type:
    """nbconvert's exporter to HTML, with formulas as MathML, which browsers draw without a script."""
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body):
            return _mathml(body, "inline")

        def block_math(self, body):
            return _mathml(body, "block")

    class Exporter(HTMLExporter):
        def markdown2html(self, source):
            return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)

    return Exporter


def _mathml(formula: str, display: str) -> str:
    """A formula in LaTeX as MathML; one that cannot be read stays as it was typed."""
    from latex2mathml.converter import convert

    try:
        return convert(formula, display=display)
    except Exception:  # its errors have no common name
        return f"<code>{html.escape(formula)}</code>"


def _tidy(cell: Any) -> Any:
    """Drop progress bars and carriage-return debris from a cell's streams, and widgets, which are dead in a page."""
    for output in cell.get("outputs", []):
        output.get("data", {}).pop(WIDGET, None)
        if output.output_type == "stream":
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
            output.text = "\n".join(line for line in lines if not PROGRESS_LINE.search(line)).strip("\n")
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if output.get("text", "-").strip()]
    return cell


def environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=format_number, seconds=format_seconds)
    return environment
