"""The workbook, as notebooks see it: `run` executes experiments, `open_run` gives one its place.

    book = workbook.open_run(run, dataset=dataset, resolution=resolution)
    book.data, book.folder, book.report             data/<dataset>-<resolution>, runs/<run>, reports/<run>
    book.show(figure, "samples", "64 samples.")     a captioned figure, kept in the report
    book.table(rows, "Distances."); book.keep(rows, "distances")
    book.record(fwd=0.29); book.record_timing(train_images_per_s=812.0)
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wddm.workbook.experiments import check_run_name, load_experiments
from wddm.workbook.index import write_index
from wddm.workbook.records import collect, read_json, write_json, write_text
from wddm.workbook.runner import run
from wddm.workbook.tables import format_table

__all__ = ["Run", "collect", "find_root", "live", "load_experiments", "open_run", "progress", "run", "write_index"]


def find_root(start: Path | None = None) -> Path:
    """The nearest folder, from `start` (the current one) upwards, that holds notebooks/ and params/."""
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    raise ValueError(f"{start} is not inside a workbook: no folder above it holds notebooks/ and params/")


@dataclass(frozen=True)
class Run:
    """The place of one run, and what a notebook adds to its report."""

    name: str
    root: Path
    data: Path | None  # <root>/data/<dataset>-<resolution>
    folder: Path  # <root>/runs/<run>
    report: Path  # <root>/reports/<run>

    def show(self, figure: Any, name: str, caption: str) -> None:
        """Save a matplotlib figure as figures/<name>.png of the report and display it with its caption."""
        path = self.report / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        pixels = base64.b64encode(path.read_bytes()).decode()
        text = html.escape(caption)
        _display(
            f'<figure><img alt="{text}" width="{round(120 * figure.get_figwidth())}" '
            f'src="data:image/png;base64,{pixels}"><figcaption>{text}</figcaption></figure>',
            f"[{path.relative_to(self.root)}] {caption}",
        )
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(figure)

    def table(self, rows: Any, caption: str) -> None:
        """Display a DataFrame, or a list of dicts, as a table with its caption."""
        if hasattr(rows, "to_dict"):
            counted = type(rows.index).__name__ == "RangeIndex"
            rows = (rows if counted else rows.reset_index()).to_dict("records")
        _display(*format_table(list(rows), caption))

    def keep(self, rows: list[dict[str, Any]], name: str) -> None:
        """Write rows to <name>.csv and <name>.json of the report, as they are, and to <name>.txt, to be read."""
        import pandas as pd

        write_text(self.report / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False))
        write_json(self.report / f"{name}.json", rows)
        write_text(self.report / f"{name}.txt", format_table(rows, name)[1] + "\n")

    def record(self, **numbers: float | None) -> None:
        """Merge results into metrics.json: only what is the same whenever the parameters are."""
        self._merge("metrics", numbers)

    def record_timing(self, **numbers: float | None) -> None:
        """Merge speeds, seconds and memory, which vary from run to run, into timings.json."""
        self._merge("timings", numbers)

    def _merge(self, kind: str, numbers: dict[str, Any]) -> None:
        path = self.report / f"{kind}.json"
        write_json(path, read_json(path) | {key: _number(key, numbers[key]) for key in numbers})


def open_run(run: str, *, dataset: str | None = None, resolution: int | None = None) -> Run:
    """The run called `run` of the workbook around the current folder; runs/<run>/ exists afterwards."""
    root = find_root()
    book = Run(
        name=check_run_name(run),
        root=root,
        folder=root / "runs" / run,
        report=root / "reports" / run,
        data=root / "data" / f"{dataset}-{resolution}" if dataset else None,
    )
    book.folder.mkdir(parents=True, exist_ok=True)
    return book


def progress(
    iterable: Iterable | None = None, total: int | None = None, desc: str = "", unit: str = "it", initial: int = 0
) -> Any:
    """A text tqdm on sys.stdout; reports leave its lines out."""
    from tqdm import tqdm

    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        file=sys.stdout,
        ascii=True,
        mininterval=0.5,
        ncols=88,
        nrows=20,
    )  # given, because a kernel cannot measure the terminal


def live(draw: Callable[[], Any], every: float = 5.0) -> Callable[..., None]:
    """Something to call at every step: in JupyterLab it shows the figure that `draw` makes anew, every few seconds.

    Elsewhere (papermill, a script) it does nothing: the report shows the last figure.
    """
    if "JPY_SESSION_NAME" not in os.environ:
        return lambda *arguments: None
    from IPython.display import Image, display

    handle, shown = display(display_id=True), 0.0

    def update(*arguments: Any) -> None:
        nonlocal shown
        if time.monotonic() - shown > every:
            draw().savefig(pixels := io.BytesIO(), format="png")
            handle.update(Image(pixels.getvalue(), width=720))
            shown = time.monotonic()

    return update


def _number(key: str, value: Any) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value  # NumPy's and torch's scalars
    if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
        raise ValueError(f"{key}: got {value!r}, wanted a finite number, or None where there is none")
    return value


def _display(as_html: str, as_text: str) -> None:
    from IPython.display import display

    display({"text/html": as_html, "text/plain": as_text}, raw=True)
