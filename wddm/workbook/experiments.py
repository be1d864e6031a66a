"""Experiments: what a YAML asks for, checked against what the notebooks declare before anything runs.

An experiment is one flat YAML of parameters, plus `notebooks:` (those to run; by default the numbered ones), `recipe:`
(a file of params/recipes/, overridden by the experiment's own values; if given by -p, by those of -p and the sweep
alone), `sweep:` (lists of values, one run for every combination, or a list of such) and `summary:` (notebooks that
compare the runs of the sweep, as one more run after them). Every mistake is reported, one line each.
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from wddm.workbook.parameters import Parameter, merge_schemas, parse, read_schema, read_yaml

RUN_NAME = re.compile(r"(?!.*\.(html|md)$)[A-Za-z0-9_][A-Za-z0-9._=+-]{0,199}")  # files of reports/ end in these
SETTINGS = ("notebooks", "sweep", "summary")  # keys of a YAML that are not parameters
MOST = 1000  # runs of a sweep, at most


@dataclass(frozen=True)
class Experiment:
    """One run: its notebooks, in order, and the value of every parameter that they name."""

    run: str
    source: Path  # the YAML
    root: Path
    notebooks: tuple[Path, ...]
    parameters: dict[str, Any]
    is_summary: bool = False  # it runs after the other runs of its YAML, and compares them

    def values(self, notebook: Path) -> dict[str, Any]:
        """name -> value of every parameter that this notebook declares."""
        return {name: self.parameters.get(name, one.default) for name, one in read_schema(notebook).items()}

    def as_yaml(self) -> str:
        """All parameters, as a YAML that `wddm run` accepts."""
        content = dict(self.parameters)
        if self.notebooks != pipeline_notebooks(self.root):
            names = {notebook: name for name, notebook in known_notebooks(self.root).items()}
            content["notebooks"] = [names[notebook] for notebook in self.notebooks]  # in the order given
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def until(self, last: Path) -> "Experiment":
        """The same experiment with the notebooks up to `last` and their parameters alone."""
        notebooks = self.notebooks[: self.notebooks.index(last) + 1]
        parameters = {name: self.parameters[name] for name in merge_schemas(notebooks)}
        return replace(self, notebooks=notebooks, parameters=parameters)


def pipeline_notebooks(root: Path) -> tuple[Path, ...]:
    """The numbered notebooks, in order."""
    return tuple(sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")))


def known_notebooks(root: Path) -> dict[str, Path]:
    """Every notebook, by its name below notebooks/: "02_train", "analysis/compare"."""
    folder = root / "notebooks"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.ipynb"))}


def load_experiments(path: Path, root: Path, overrides: Iterable[str] = ()) -> list[Experiment]:
    """Read and check one YAML: an Experiment, or one per combination of its sweep and, last, its summary.

    `overrides` are `key=value` texts whose values are read as YAML, as if they stood in the file.
    ValueError holds one line for every mistake.
    """
    values = {key: (str(path), value) for key, value in read_yaml(path).items()}
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ValueError(f"-p {' '.join(text.split())}: wanted key=value")
        values[key] = "-p", parse(value, f"-p {' '.join(key.split())}")
    settings = {key: values.pop(key)[1] for key in SETTINGS if key in values}
    if "summary" in settings and not settings.get("sweep"):
        raise ValueError(f"{path}: summary: got one without a sweep, wanted both: it looks at the runs of the sweep")
    values = {"run": (str(path), path.stem)} | values
    notebooks = _find_notebooks("notebooks", settings, root, path) or pipeline_notebooks(root)
    summary = _find_notebooks("summary", settings, root, path)
    schema, of_summary = merge_schemas(notebooks), merge_schemas(summary)
    problems, experiments = list[str](), list[Experiment]()
    for swept in _combinations(settings.get("sweep"), values, path):
        wanted = values | {key: (str(path), value) for key, value in swept.items()}
        if "recipe" in wanted:
            where, name = wanted.pop("recipe")
            named = {key: x for key, x in wanted.items() if where != "-p" or x[0] == where or key in swept}
            wanted |= _recipe(where, name, root, schema) | named
        known = list(schema | {name: one for name, one in of_summary.items() if name not in swept})
        parameters = _resolve(schema, wanted, known, swept, problems)
        experiments.append(Experiment(parameters["run"], path, root, notebooks, parameters))
    if summary:
        runs = {"runs": (str(path), [experiment.run for experiment in experiments])}
        wanted = {name: value for name, value in (runs | values).items() if name != "recipe"}
        parameters = _resolve(of_summary, wanted, list(schema | of_summary | runs), {}, problems)
        experiments.append(Experiment(parameters["run"], path, root, summary, parameters, is_summary=True))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return experiments


def _recipe(where: str, name: Any, root: Path, schema: dict[str, Parameter]) -> dict[str, tuple[str, Any]]:
    """name -> (path of the recipe, value), for those of its parameters that the chosen notebooks declare."""
    known = {path.stem: path for path in sorted((root / "params" / "recipes").glob("*.yaml"))}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{where}: recipe: there is no {name!r:.100}{_suggest(str(name), known)}")
    return {key: (str(known[name]), value) for key, value in read_yaml(known[name]).items() if key in schema}


def _find_notebooks(key: str, settings: dict[str, Any], root: Path, where: Path) -> tuple[Path, ...]:
    """Paths of the notebooks that a YAML lists under `key`, by their names below notebooks/; () without that key."""
    if (names := settings.get(key)) is None:
        return ()
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: {key}: got {names!r:.100}, wanted a list, e.g. [analysis/compare]")
    known, names = known_notebooks(root), [name.removesuffix(".ipynb") for name in names]
    if missing := [name for name in names if name not in known]:
        raise ValueError("\n".join(f"{where}: {key}: there is no {name!r}{_suggest(name, known)}" for name in missing))
    return tuple(known[name] for name in dict.fromkeys(names))


def _combinations(sweep: Any, fixed: dict, where: Path) -> list[dict[str, Any]]:
    """A dict {key: value} for every run of a sweep, or of a list of sweeps in turn; without a sweep, one empty dict."""
    if not sweep:
        return [{}]
    if isinstance(sweep, list):
        return [combination for part in sweep for combination in _combinations(part, fixed, where)]
    if not isinstance(sweep, dict) or not all(each and isinstance(each, list) for each in sweep.values()):
        raise ValueError(f"{where}: sweep: wanted lists of values, e.g. sweep: {{level: [0, 1, 2]}}")
    if both := sorted({"run", *fixed} & set(sweep)):
        raise ValueError(f"{where}: sweep: got {', '.join(both)} swept and fixed at once, wanted one: remove the other")
    if (runs := math.prod(map(len, sweep.values()))) > MOST:
        raise ValueError(f"{where}: sweep: got {runs} combinations, wanted {MOST} at most: give fewer values")
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _resolve(
    schema: dict[str, Parameter], wanted: dict[str, tuple[str, Any]], known: list[str], swept: dict[str, Any],
    problems: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The schema's defaults, overlaid with `wanted` {name: (where, value)}; every mistake adds a line to `problems`.

    A name that the schema lacks must be `known`: another notebook has it. What was `swept` is added to the run's name.
    """
    parameters = {name: parameter.default for name, parameter in schema.items()}
    for name, (where, value) in wanted.items():
        try:
            if name not in known:
                raise ValueError(f"unknown parameter {name!r:.100}{_suggest(name, known)}")
            if name in schema:
                parameters[name] = schema[name].convert(value)
            if name == "run":
                parts = [re.sub(r"[^A-Za-z0-9._=+-]+", "_", f"{key}={value}") for key, value in swept.items()]
                parameters["run"] = check_run_name("-".join([parameters["run"], *parts]))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return parameters


def check_run_name(run: str) -> str:
    """`run` itself, if it can name a folder below runs/ and reports/; else ValueError."""
    if not RUN_NAME.fullmatch(run):
        wanted = "a plain folder name of letters, digits and . _ = + -"
        raise ValueError(f"run: got {run!r:.100}, wanted {wanted}" + ", 200 at most" * (len(run) > 200))
    return run


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
