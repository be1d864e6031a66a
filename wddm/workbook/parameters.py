"""Parameters, as the notebooks declare them; there is no other schema.

The cell tagged `parameters` of a notebook is its schema, one line per parameter:

    level: int = 1                  # how many times the images are split
    widths: list[int] | None = None # None takes the preset

Types are str, int, float, bool, `int | str`, list[T] and `T | None`. A comment explains, it decides nothing: which
values are allowed is up to the code that takes them.

Values come from YAML, read strictly: YAML 1.1 takes 010 for 8, 1:30 for 90 and 2024-01-01 for a date, keeps the
last of two equal keys, and lets a few lines stand for gigabytes. All that is refused.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wddm.files import refusing

EXAMPLES: dict[str, Any] = {"str": "name", "int": 1, "float": 0.1, "bool": True, "int | str": 1}
TYPE = re.compile(r"(?P<list>list\[)?(?P<item>int \| str|str|int|float|bool)(?(list)\])(?P<none> \| None)?")
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # 1e-3, which PyYAML reads as a string
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,18}|[0-9]*\.[0-9]*([eE][-+][0-9]+)?|\.(?i:inf|nan))")
MOST_BYTES = 100_000  # of a YAML file


@dataclass(frozen=True)
class Parameter:
    """One line of a `parameters` cell."""

    name: str
    type: str  # as written: "int", "float | None", "list[int]"
    default: Any
    help: str = ""

    def convert(self, value: Any) -> Any:
        """`value`, as read from YAML, in this parameter's type. ValueError says what was wanted."""
        if (kind := TYPE.fullmatch(self.type)) is None:
            raise ValueError(f"got the type {self.type}, wanted str, int, float, bool, list[T] or T | None: take one")
        if value is None and kind["none"]:
            return None
        items = value if kind["list"] else [value]
        if not isinstance(items, list | tuple):
            raise self._refusal(value, kind)
        if kind["item"] == "float":
            items = [float(item) if type(item) is int or EXPONENT.fullmatch(str(item)) else item for item in items]
        for item in items:
            if type(item).__name__ not in kind["item"].split(" | ") or item in (math.inf, -math.inf) or item != item:
                raise self._refusal(value, kind)
        return list(items) if kind["list"] else items[0]

    def _refusal(self, value: Any, kind: re.Match[str]) -> ValueError:
        example = EXAMPLES[kind["item"]] if self.default is None else self.default
        example = [example] if kind["list"] and self.default is None else example
        shown = example if isinstance(example, str) else json.dumps(example)
        got = f"{self.name}: got {value!r:.100} ({type(value).__name__})"
        message = f"{got}, wanted {self.type}, e.g. {self.name}: {shown}"
        if kind["item"] == "str" and isinstance(value, bool | int | float):
            text = ("no", "yes")[value] if isinstance(value, bool) else value
            message += f'; if it is a text, quote it: "{text}", or after -p \'"{text}"\''
        return ValueError(message)


def tagged(notebook: Any, tag: str) -> Any:
    """The first cell of a notebook (parsed JSON) that carries `tag`, or None."""
    return next((cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])), None)


def read_notebook(path: Path) -> dict:
    """A notebook as parsed JSON, the source of each cell in one string; ValueError if the file is not a notebook."""
    with refusing(f"{path.name}, which cannot be read", "a notebook", "give another"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
        return notebook


def read_schema(path: Path) -> dict[str, Parameter]:
    """name -> Parameter of one notebook; ValueError if it reports on a run and no cell uses one of them.

    A page would then show a value that changed nothing. (Notebooks that use `experiment` are checked there.)
    """
    notebook = read_notebook(path)
    if (cell := tagged(notebook, "parameters")) is None:
        raise ValueError(f"{path.name}: has no cell tagged 'parameters'; add one, with `name: type = default` lines")
    schema = parse_parameters(cell["source"], path.name)
    code = [other["source"] for other in notebook["cells"] if other["cell_type"] == "code" and other is not cell]
    used = set(re.findall(r"\w+", "\n".join(code)))
    unused = [name for name in schema if name not in used | {"run", "seed"}]
    if unused and "open_run" in used and "experiment" not in used:
        raise ValueError(f"{path.name}: nothing takes the parameter {unused[0]!r}: use it in a cell, or remove it")
    return schema


def expand(template: str, values: Mapping[str, Any]) -> list[str]:
    """`runs/{run}` with values in place of the names in `values`: a text for every item of a list, none for None."""
    texts = [template]
    for name in dict.fromkeys(re.findall(r"{(\w+)}", template)):
        items = values.get(name, f"{{{name}}}")
        items = [str(item) for item in (items if isinstance(items, list) else [items]) if item is not None]
        texts = [text.replace(f"{{{name}}}", item) for text in texts for item in items]
    return texts


def parse_parameters(source: str, where: str) -> dict[str, Parameter]:
    """name -> Parameter of the source of a `parameters` cell; `where` begins the error messages."""
    try:
        statements = ast.parse(source).body
        parsed = [_parse_line(one, source) for one in statements if ast.unparse(one)[0] not in "'\""]  # a docstring
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: parameters cell: {error}") from None
    return {parameter.name: parameter for parameter in parsed}


def _parse_line(line: Any, source: str) -> Parameter:
    try:
        name, kind, default = line.target.id, ast.unparse(line.annotation), ast.literal_eval(line.value)
    except (AttributeError, ValueError):
        raise ValueError(f"got `{ast.unparse(line)}`, wanted `name: type = default`, a literal: write it so") from None
    comment = source.splitlines()[line.end_lineno - 1].encode()[line.end_col_offset :].decode().strip("# ")
    return Parameter(name, kind, Parameter(name, kind, default).convert(default), comment)


def merge_schemas(notebooks: tuple[Path, ...]) -> dict[str, Parameter]:
    """The schemas of notebooks that run together, as one: a parameter belongs to the first that declares it.

    A later one may declare it with the same type and default, or as `T | None = None`, "as the first one has it"; else
    ValueError. `run` may have any default, because an experiment never takes it.
    """
    merged: dict[str, tuple[Parameter, str]] = {}
    for path in notebooks:
        for name, one in read_schema(path).items():
            first, owner = merged.setdefault(name, (one, path.name))
            follows = one.default is None and one.type.removesuffix(" | None") == first.type
            if name != "run" and not follows and (first.type, first.default) != (one.type, one.default):
                shown = f"{name} is `{first.type} = {first.default!r}` in {owner} but `{one.type} = {one.default!r}`"
                raise ValueError(f"{shown} in {path.name}; make them one")
    return {"run": Parameter("run", "str", "")} | {name: one for name, (one, _) in merged.items()}


class Loader(yaml.SafeLoader):
    """A SafeLoader that refuses anchors, aliases, tags, keys given twice and numbers that can be misread."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if event.anchor or getattr(event, "tag", None):
            _refuse("got an anchor (&), alias (*) or tag (!), wanted the value: write it out, or quote it", event)
        node: Any = super().compose_node(parent, index)
        seen = set[str]()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == "<<":
                _refuse("got a merge key (<<), wanted its keys: write them out", key)
            if str(key.value) in seen:
                _refuse(f"got {key.value!r:.60} twice, wanted it once: remove one of them", key)
            seen.add(str(key.value))
        if node.tag.endswith((":int", ":float", ":timestamp")) and not DECIMAL.fullmatch(node.value):
            wanted = "wanted plain decimal digits, 19 at most, if it is a number: else quote it"
            _refuse(f"got {node.value:.60}, {wanted}", node)
        return node


def _refuse(problem: str, place: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; ValueError, one line that begins with `where`, if it is not valid."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        problem += "" if "wanted" in problem else ", wanted one `key: value` per line"
        raise ValueError(f"{where}: is not valid YAML ({f'line {mark.line + 1}: ' if mark else ''}{problem})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """name -> value of a YAML file of parameters; ValueError, one line, for anything else."""
    try:
        with path.open("rb") as file:  # not all of it: a device may have no end
            content = file.read(MOST_BYTES + 1)
        text = content[:MOST_BYTES].decode()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is no UTF-8 text"
        wanted = "wanted a YAML of parameters: give another"
        raise ValueError(f"{path}: got a file that cannot be read ({problem}), {wanted}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: got more than {MOST_BYTES:,} bytes, wanted one `key: value` per line: shorten it")
    values = {} if (values := parse(text, str(path))) is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, wanted one `key: value` per line")
    return {str(key): value for key, value in values.items()}
