"""Numbers and tables, as a report prints them and as files keep them."""

import csv
import html
import io
import math
from numbers import Number
from pathlib import Path
from typing import Any

from wddm.workbook.records import write_json, write_text


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


def write_rows(rows: list[dict[str, Any]], as_csv: Path, as_json: Path) -> None:
    """Rows as CSV, a column per key, and as JSON; what is absent, or not a finite number, is empty and null."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{column: _plain(row.get(column)) for column in columns} for row in rows]
    with io.StringIO(newline="") as text:
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(as_csv, text.getvalue())
    write_json(as_json, rows)


def _plain(value: Any) -> Any:
    """For JSON: NumPy's scalars and arrays as Python's, and None for what is no finite number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Number) and not isinstance(value, bool))
