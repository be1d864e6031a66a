"""reports/index.html: every run as a card, with its state, picture, main numbers and what was changed."""

from pathlib import Path
from typing import Any

from wddm.workbook.experiments import pipeline_notebooks
from wddm.workbook.pages import environment
from wddm.workbook.parameters import read_schema
from wddm.workbook.records import read_json, read_status, write_text

WORST_FIRST = ("running", "failed", "killed", "pending", "ok")
HEADLINES = ("fwd", "fid", "kid", "inception_score", "precision", "recall")  # numbers that a card shows first


def write_index(root: Path) -> Path:
    """reports/index.html: every run as a card, the latest first."""
    defaults = _defaults(root)
    runs = [_card(path.parent, defaults) for path in (root / "reports").glob("*/status.json")]
    runs.sort(key=lambda run: (run["started"], run["name"]), reverse=True)
    page = root / "reports" / "index.html"
    write_text(page, environment().get_template("index.html.j2").render(runs=runs))
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
