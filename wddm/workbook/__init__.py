"""The workbook, as notebooks see it: `run` executes experiments, `open_run` opens the folders of a run.

    book = workbook.open_run(run, "02_train", globals())
    book.parameters, book.folder, book.report       this notebook's parameters, checked; runs/<run>; reports/<run>
    prepared = data.load(book.data_folder())        what 01_prepare of this run made, or a line that says to run it
    book.begin("pipeline"); book.made("pipeline", book.folder / "pipeline")   recorded: begun; finished
    book.show(figure, "samples", "64 samples.")     a captioned figure, kept in the report
    book.explore(draw, "bands", "Bands.", level=widgets.IntSlider(1, 0, 3))   redrawn when a control moves
    book.table(rows, "Distances."); book.record(fwd=0.29); book.record_timing(train_images_per_s=812.0)
    book.keep(rows, "distances")                    distances.csv in the report, with every digit
    for step in workbook.progress(steps): ...

The root is the nearest folder upwards that holds notebooks/ and params/.
"""

import base64
import html
import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from wddm.files import digest, read_json, write_json, write_text
from wddm.workbook import records
from wddm.workbook.experiments import check_run_name, load_experiments
from wddm.workbook.parameters import read_schema
from wddm.workbook.records import collect
from wddm.workbook.report import WIDGET, format_table
from wddm.workbook.report import write_index as write_index
from wddm.workbook.runner import run

__all__ = ["Run", "collect", "live", "load_experiments", "open_run", "progress", "run"]


def find_root(start: Path = Path()) -> Path:
    """The nearest folder with notebooks/ and params/, from `start` upwards, or else from the current folder upwards."""
    places = [place for one in (start, Path()) for place in (one.resolve(), *one.resolve().parents)]
    for folder in places:
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    remedy = "cd into a clone of it, or give the path of a YAML in one: wddm run path/to/clone/params/quickstart.yaml"
    raise ValueError(f"{places[0]} is not inside a workbook, a folder with notebooks/ and params/: {remedy}")


@dataclass(frozen=True)
class Run:
    """One run: its folders, its record of what was made, and what a notebook can add to its report."""

    name: str
    root: Path
    folder: Path  # <root>/runs/<run>
    report: Path  # <root>/reports/<run>
    notebook: str = ""  # the one that works on this run: "02_train"
    parameters: dict[str, Any] = field(default_factory=dict)  # of that notebook, checked
    sources: dict[str, str] = field(default_factory=dict, repr=False)  # name -> sha256 of what the notebook took
    recorded: set[str] = field(default_factory=set, repr=False)  # kinds written so far: "metrics", "timings", "files"

    def take(self, name: str) -> Path:
        """The path of what an earlier notebook of this run made: "data" (its manifest.json), "pipeline" or "samples".

        ValueError: it is missing, not finished, changed since, or made from something that has changed since.
        """
        entry = records.taken(self.root, self.name, name)
        self.sources[name] = entry["sha256"]
        return self.root / entry["path"]

    def data_folder(self) -> Path:
        """The folder of this run's prepared set; ValueError as in `take`."""
        return self.take("data").parent

    def begin(self, name: str, **facts: Any) -> None:
        """Record that this notebook begins to make `name`: until `made` is called, `take` refuses what was there."""
        entry = {"by": self.notebook, "parameters": self.parameters, "from": self.sources}
        write_json(self.folder / "record.json", records.read_record(self.root, self.name) | {name: entry | facts})

    def made(self, name: str, path: Path, *, shared: bool = False, **facts: Any) -> None:
        """Record what this notebook made, by sha256 (not if `shared`: others write to it, too), and from what."""
        place = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.begin(name, path=str(place), sha256=None if shared else digest(path), **facts)

    def show(self, figure: Any, name: str, caption: str, alive: dict[str, Any] | None = None) -> None:
        """Save a matplotlib figure as figures/<name>.png of the report and display it, its caption beneath.

        `alive`: its form as a widget, for JupyterLab. The caption is an output of its own, which strict nbval compares.
        """
        path = self._own(f"figures/{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pixels := _pixels(figure))
        forms = {"image/png": base64.b64encode(pixels).decode(), "text/plain": f"[{path.relative_to(self.root)}]"}
        _display(forms | (alive or {}), {"image/png": {"width": round(120 * figure.get_figwidth()), "alt": caption}})
        _display({"text/html": f"<figcaption>{html.escape(caption)}</figcaption>", "text/plain": caption})
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(figure)

    def explore(self, draw: Callable[..., Any], name: str, caption: str, **controls: Any) -> None:
        """Show the figure draw(**values) for the values of these widgets, the `controls`; moving one redraws it."""
        from ipywidgets import HBox, Image, VBox

        picture = Image()

        def redraw(change: Any = None) -> Any:
            figure = draw(**{key: control.value for key, control in controls.items()})
            picture.value, picture.width = _pixels(figure), round(120 * figure.get_figwidth())  # screen pixels
            return figure

        for control in controls.values():
            control.observe(redraw, "value")
        figure, box = redraw(), VBox([HBox(list(controls.values())), picture])
        self.show(figure, name, caption, {WIDGET: {"model_id": box.model_id, "version_major": 2, "version_minor": 0}})

    def table(self, rows: Any, caption: str) -> None:
        """Display a DataFrame, or a list of dicts, as a table with its caption."""
        if hasattr(rows, "to_dict"):
            rows = (rows if type(rows.index).__name__ == "RangeIndex" else rows.reset_index()).to_dict("records")
        as_html, as_text = format_table(list(rows), caption)
        _display({"text/html": as_html, "text/plain": as_text})

    def keep(self, rows: Any, name: str) -> None:
        """Keep a DataFrame, or a list of dicts, as <name>.csv in the report, and show a link to it."""
        import pandas as pd

        table = pd.DataFrame(rows if hasattr(rows, "to_dict") else list(rows), dtype=object)
        write_text(self._own(f"{name}.csv"), table.to_csv(index=False, lineterminator="\n"))
        link = f'<a href="{html.escape(name)}.csv">{html.escape(name)}.csv</a>'
        _display({"text/html": f"<p>All of it: {link}</p>", "text/plain": f"All of it: {name}.csv"})

    def record(self, **numbers: float | None) -> None:
        """Merge results, finite or None, into metrics.json: only those that the same parameters always give again."""
        self._merge("metrics", numbers)

    def record_timing(self, **numbers: float | None) -> None:
        """Merge speeds, seconds and memory, which vary from run to run, into timings.json."""
        self._merge("timings", numbers)

    def _merge(self, kind: str, numbers: dict[str, Any]) -> None:
        for key, value in numbers.items():
            value = value.item() if hasattr(value, "item") else value  # NumPy's and torch's scalars
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                raise ValueError(f"{key}: got {value!r}, wanted a finite number, or None where there is none")
            numbers[key] = value
        before, old = read_json(path := self.report / f"{kind}.json"), self._note(kind, *numbers)
        write_json(path, {key: x for key, x in before.items() if f"{kind}/{key}" not in old} | numbers)

    def _own(self, place: str) -> Path:
        """The path of a file of the report, to be written; the first time, those of the notebook's previous run go."""
        for old in self._note("files", place):
            (self.report / old.removeprefix("files/")).unlink(missing_ok=True)
        return self.report / place

    def _note(self, kind: str, *names: str) -> set[str]:
        """Note "<kind>/<name>" in numbers.json as this notebook's; returns, at first, what it noted in its last run."""
        whose, first = read_json(file := self.folder / "numbers.json"), self.notebook and kind not in self.recorded
        self.recorded.add(kind)
        write_json(file, whose | {f"{kind}/{name}": self.notebook for name in names})
        return {key for key, by in whose.items() if first and by == self.notebook and key.startswith(f"{kind}/")}


def open_run(run: str, notebook: str = "", namespace: Mapping[str, Any] | None = None) -> Run:
    """Open the run called `run` of the workbook that the current folder is in; runs/<run>/ is made if it is missing.

    notebook, namespace: the notebook that works on the run, e.g. "02_train" or "analysis/compare", and its `globals()`,
    which hold its parameters. The workbook's root becomes the current folder: relative paths in parameters start there.
    ValueError: a name that no folder can have, a parameter of a wrong type.
    """
    root, parameters = find_root(), {}
    if notebook and namespace is not None:
        schema = read_schema(root / "notebooks" / f"{notebook}.ipynb")
        parameters = {name: one.convert(namespace.get(name, one.default)) for name, one in schema.items()}
        os.chdir(root)
    folder = root / "runs" / check_run_name(run)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(run, root, folder, root / "reports" / run, Path(notebook).name, parameters)


def progress(iterable: Any = None, total: int | None = None, desc: str = "", unit: str = "it", initial: int = 0) -> Any:
    """A tqdm bar: in JupyterLab a widget, which stays above the figures of `live`; else text on sys.stdout, which
    reports leave out. The text has a fixed width, because a kernel has no terminal to measure.
    """
    in_lab, text = "JPY_SESSION_NAME" in os.environ, dict[str, Any](file=sys.stdout, ascii=True, ncols=88, nrows=20)
    kind, look = import_module("tqdm.notebook" if in_lab else "tqdm").tqdm, {} if in_lab else text
    return kind(iterable, total=total, desc=desc, unit=unit, initial=initial, mininterval=0.5, **look)


def live(*draws: Callable[[], Any], every: float = 2.0) -> Callable[..., None]:
    """A function to call at every step: in JupyterLab it redraws these figures; elsewhere it does nothing."""
    if "JPY_SESSION_NAME" not in os.environ:
        return lambda *arguments: None
    from IPython.display import Image, display

    handles, shown = list[Any](), 0.0

    def update(*arguments: Any) -> None:
        nonlocal shown
        if time.monotonic() - shown > every:
            handles.extend(display(display_id=True) for _ in draws[len(handles) :])
            for handle, draw in zip(handles, draws, strict=True):
                if figure := draw():
                    handle.update(Image(_pixels(figure), width=720))
            shown = time.monotonic()

    return update


def _pixels(figure: Any) -> bytes:
    figure.savefig(pixels := io.BytesIO(), dpi=150, format="png")
    return pixels.getvalue()


def _display(data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
    from IPython.display import display

    display(data, metadata=metadata, raw=True)
