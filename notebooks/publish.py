"""Reports as Markdown, `python notebooks/publish.py reports/mine`: pages that a repository's host shows as they are.

Each executed notebook of a run becomes a .md beside it: prose, the parameters, figures as links to figures/, tables as
tables, but no code: that is in the notebook. A line for the run in .gitignore lets git take the page and its CSVs.
"""

import base64
import html
import re
import sys
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from nbconvert import MarkdownExporter

from wddm.files import read_json, write_text
from wddm.workbook.records import read_status
from wddm.workbook.report import read_page

LINK = re.compile(r"\[reports/[^]]*/(figures/[^]/]+\.png)\]")  # the text of a figure saved by `Run.show`


def publish(folder: Path) -> list[Path]:
    """reports/<run>/*.ipynb -> *.md; ValueError if nothing was executed, or a notebook did not end ok."""
    names = [path.stem for path in sorted(folder.glob("*.ipynb"))]
    if not names:
        raise ValueError(f"got {folder} without executed notebooks, wanted reports/<run>: run it first")
    status = read_status(folder)
    if bad := [name for name in names if status.get(name, {}).get("state", "ok") != "ok"]:
        raise ValueError(f"got {folder}, where {', '.join(bad)} did not end ok, wanted all to: run it again")
    return [write_page(folder, name, *read_page(folder, name)) for name in names]


def write_page(folder: Path, name: str, notebook: Any, parameters: list[tuple[Any, Any]]) -> Path:
    """Write <name>.md of a report from a notebook and parameters as `read_page` gives them; figures go to figures/."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.cell_type, cell.source = "markdown", described(parameters)
        elif cell.cell_type == "code":
            for number, output in enumerate(cell.outputs):
                if "data" in output:
                    output.data = {"text/markdown": as_markdown(output, folder, f"{name}-{cell.id}-{number}")}
    body = MarkdownExporter(exclude_input=True).from_notebook_node(notebook)[0]
    title, _, rest = body.strip().replace(f"{folder.absolute().parents[1]}/", "").partition("\n")
    text = re.sub(r"\n{3,}", "\n\n", f"{title}\n\n{bar(folder, name)}\n{rest}\n")
    write_text(page := folder / f"{name}.md", text)
    return page


def bar(folder: Path, name: str) -> str:
    """One line: the run, links to its other pages and files, and, if they are known, its commit and device."""
    pages = sorted({path.stem for end in ("ipynb", "md") for path in folder.glob(f"*.{end}")} - {name, "README"})
    files = ["params.yaml"] * (folder / "params.yaml").exists()
    files += [each for each in ("metrics.json", "timings.json") if read_json(folder / each)]
    links = [f"[{page}]({page}.md)" for page in pages] + [f"[{file}]({file})" for file in files]
    made = read_json(folder / "environment.json") | read_status(folder).get(name, {})
    commit = [f"commit {made['commit'][:7] + made['commit'][40:]}, {made['device']}"] if made.get("commit") else []
    return " · ".join(["[All results](../README.md)", f"run `{folder.name}`", *links, *commit])


def described(parameters: list[tuple[Any, Any]]) -> str:
    """A table of the parameters that differ from the notebook's defaults and, folded, one of the others."""
    columns = ["parameter", "value", "default", "meaning"]
    rows: dict[bool, list[list[str]]] = {True: [], False: []}
    for one, value in parameters:
        shown = [folded(repr(item)) for item in (value, one.default)]
        rows[value != one.default].append([f"`{one.name}`", *shown, plain(one.help)])
    changed, same = (
        table(columns, rows[True]),
        table(["parameter", "value", "meaning"], [[a, b, d] for a, b, _, d in rows[False]]),
    )
    unchanged = f"<details><summary>Parameters as the notebook has them</summary>\n\n{same}\n\n</details>"
    return "\n\n".join([changed] * bool(rows[True]) + [unchanged] * bool(rows[False]))


def as_markdown(output: Any, folder: Path, name: str) -> str:
    """An output as Markdown: a figure, a table, a caption, links to files; any other text as it was printed."""
    text = output.data.get("text/plain", "")
    if pixels := output.data.get("image/png"):
        kept = LINK.fullmatch(text)
        place = kept[1] if kept else f"figures/{name}.png"
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(base64.b64decode(pixels))
        return f"![{Path(place).stem.replace('-', ' ')}]({place})"  # its caption follows
    page = BeautifulSoup(output.data.get("text/html", ""), "html.parser")
    if page.table:
        caption = page.caption.extract().get_text() if page.caption else ""
        cells = [[plain(cell.get_text()) for cell in row.find_all(["th", "td"])] for row in page.find_all("tr")]
        right = ["right" in cell.get("style", "") for cell in page.find_all("th")]
        return f"*{plain(caption)}*\n\n{table(cells[0], cells[1:], right)}" if caption else table(cells[0], cells[1:])
    if page.figcaption:
        return f"*{plain(page.get_text())}*"
    if links := [link.get_text() for link in page.find_all("a")]:  # to files beside the page
        files = {plain(name): name for name in links}
        return re.sub("|".join(map(re.escape, files)), lambda x: f"[{x[0]}]({files[x[0]]})", plain(page.get_text()))
    return f"```text\n{text}\n```"


def table(titles: list[str], rows: list[list[str]], right: list[bool] | None = None) -> str:
    """A Markdown table; the cells are Markdown. `right`: which columns are aligned to the right."""
    rule = ["--:" if each else "---" for each in right or [False] * len(titles)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, rule, *rows])


def plain(text: str) -> str:
    """Text escaped for Markdown, in one line; non-breaking spaces, as in intervals, stay."""
    line = re.sub(r"\s+", " ", text.strip(), flags=re.ASCII)
    return re.sub(r"([\\`*_|\[\]$~])", r"\\\1", html.escape(line, quote=False))


def folded(text: str) -> str:
    """`plain` for the text of a value; one of more than 200 characters is folded."""
    if len(text) <= 200:
        return plain(text)
    return f"<details><summary>{plain(text[:60])} …</summary>{plain(text)}</details>"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(*publish(Path(argument)), sep="\n")
