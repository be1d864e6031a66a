"""What a run leaves to read in reports/: its JSON files, an HTML page per notebook, the index of all runs.

Pages need nothing but themselves: no script, no font, no address outside. Files are written whole or not.
"""

import ast
import html
import json
import math
import os
import re
from numbers import Number
from pathlib import Path
from typing import Any

from wddm.workbook.experiments import pipeline_notebooks
from wddm.workbook.parameters import parse_parameters, read_schema, tagged

TEMPLATES = Path(__file__).parent / "templates"
WORST_FIRST = ("running", "failed", "killed", "pending", "ok")
HEADLINES = ("fwd", "fid", "kid", "inception_score", "precision", "recall")  # numbers that a card shows first
PROGRESS_LINE = re.compile(r"\[(\d+:)?\d\d:\d\d[<,]")  # tqdm's [elapsed<remaining, rate]
HEADER = re.compile(r"<header>.*?</header>", re.DOTALL)


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> dict:
    """The content of a JSON file; {} when there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def collect(root: Path, pattern: str) -> list[dict]:
    """A row per run of reports/<pattern>: its name, what a sweep chose (from the name), metrics and timings."""
    rows = []
    for folder in sorted((root / "reports").glob(pattern)):
        if metrics := read_json(folder / "metrics.json"):
            chosen = dict(re.findall(r"(?<=-)(\w+)=(.*?)(?=-\w+=|$)", folder.name))
            rows.append({"run": folder.name, **chosen, **metrics, **read_json(folder / "timings.json")})
    if not rows:
        raise ValueError(f"got no finished runs like reports/{pattern}, wanted some: run the sweep first")
    return rows


def read_status(folder: Path) -> dict[str, dict]:
    """status.json of a run; what is said to run but has no living process was killed."""
    status = read_json(folder / "status.json")
    for entry in status.values():
        if entry["state"] == "running" and not _is_alive(entry.get("pid")):
            entry.update(state="killed", error="the process is gone")
    return status


def _is_alive(pid: int | None) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError):
        return False
    except PermissionError:
        pass  # someone else's
    return True


# ---------------------------------------------------------------------------------------------------- numbers


def format_number(value: Any) -> str:
    """Four significant digits, or whole with thousands: 0.012345 -> 0.01235, 26194435 -> 26,194,435."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, Number):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_seconds(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_table(rows: list[dict[str, Any]], caption: str) -> tuple[str, str]:
    """Rows as an HTML table with a caption, and the same as plain text; numbers are set to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_number(row.get(column)) for column in columns] for row in rows]
    numeric = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    titles = ["" if column == "index" else str(column) for column in columns]  # pandas' name for no name

    def line(tag: str, texts: list[str]) -> str:
        return (
            "<tr>"
            + "".join(
                f'<{tag} style="text-align: {"right" if right else "left"}">{html.escape(text)}</{tag}>'
                for text, right in zip(texts, numeric, strict=True)
            )
            + "</tr>"
        )

    body = "\n".join(line("td", texts) for texts in cells)
    as_html = (
        f"<table>\n<caption>{html.escape(caption)}</caption>\n<thead>{line('th', titles)}</thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )
    widths = [max(map(len, texts)) for texts in zip(titles, *cells, strict=True)]
    as_text = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ).rstrip()
        for texts in (titles, *cells)
    ]
    return as_html, "\n".join((caption, *as_text))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Number) and not isinstance(value, bool))


# ------------------------------------------------------------------------------------------------- a notebook


def render(folder: Path, name: str) -> Path:
    """reports/<run>/<name>.ipynb -> .html, and new headers for the run's other pages."""
    import nbformat
    from nbconvert import HTMLExporter
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
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)])
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
        _environment()
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


def _tidy(cell: Any) -> Any:
    """Drop progress bars and carriage-return debris from the streams of a cell."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
            output.text = "\n".join(line for line in lines if not PROGRESS_LINE.search(line)).strip("\n")
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if output.get("text", "-").strip()]
    return cell


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=format_number, seconds=format_seconds)
    return environment


# -------------------------------------------------------------------------------------------------- the index


def write_index(root: Path) -> Path:
    """reports/index.html: every run as a card, the latest first."""
    defaults = _defaults(root)
    runs = [_card(path.parent, defaults) for path in (root / "reports").glob("*/status.json")]
    runs.sort(key=lambda run: (run["started"], run["name"]), reverse=True)
    page = root / "reports" / "index.html"
    write_text(page, _environment().get_template("index.html.j2").render(runs=runs))
    return page


def _card(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    import yaml

    status = read_status(folder)
    states = {entry["state"] for entry in status.values()}
    pages = [name for name in sorted(status) if (folder / f"{name}.html").exists()]
    metrics, timings = read_json(folder / "metrics.json"), read_json(folder / "timings.json")
    metrics = {key: metrics[key] for key in sorted(metrics, key=_headline)[:6]}
    try:
        parameters = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        parameters = {}
    return {
        "name": folder.name,
        "state": next((state for state in WORST_FIRST if state in states), "pending"),
        "error": next((entry["error"] for entry in status.values() if entry.get("error")), None),
        "started": max((entry.get("started") or "" for entry in status.values()), default=""),
        "seconds": sum(entry.get("seconds") or 0 for entry in status.values()),
        "thumbnail": _thumbnail(folder),
        "metrics": metrics,
        "timings": dict(list(timings.items())[:3]),
        "changed": {
            key: value
            for key, value in parameters.items()
            if key not in ("run", "notebooks") and (key not in defaults or value != defaults[key])
        },
        "commit": (read_json(folder / "environment.json").get("commit") or "")[:7],
        "page": f"{folder.name}/{pages[-1]}.html" if pages else None,
        "notebooks": [{"name": name, "page": name in pages, **status[name]} for name in sorted(status)],
    }


def _headline(key: str) -> tuple[int, str]:
    """Sort key of a metric: those of HEADLINES first."""
    return next((rank for rank, name in enumerate(HEADLINES) if key.startswith(name)), len(HEADLINES)), key


def _thumbnail(folder: Path) -> str | None:
    """Path, relative to reports/, of the picture that stands for a run."""
    figures = sorted((folder / "figures").glob("*.png"), key=lambda path: (path.stem != "samples", path.name))
    return figures[0].relative_to(folder.parent).as_posix() if figures else None


def _defaults(root: Path) -> dict[str, Any]:
    """name -> default over all notebooks; one that cannot be read does not stand in the way of the index."""
    defaults = {}
    for path in (*pipeline_notebooks(root), *sorted((root / "notebooks" / "analysis").glob("*.ipynb"))):
        try:
            defaults.update({name: parameter.default for name, parameter in read_schema(path).items()})
        except ValueError:
            continue
    return defaults
