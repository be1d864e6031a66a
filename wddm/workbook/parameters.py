"""Parameters, as the notebooks declare them; there is no other schema.

The cell tagged `parameters` of a notebook is its schema, one line per parameter:

    level: int = 1                  # how many times the images are split
    widths: list[int] | None = None # None takes the preset

Types are str, int, float, bool, list[T] and `T | None`. A comment explains, it decides nothing: which values are
allowed is up to the code that takes them.
"""

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TYPES = {"str": str, "int": int, "float": float, "bool": bool}
EXAMPLES = {"str": "name", "int": 1, "float": 0.1, "bool": True}
TYPE = re.compile(r"(?P<list>list\[)?(?P<item>str|int|float|bool)(?(list)\])(?P<none> \| None)?")
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # YAML 1.1 reads 1e-3 as a string


@dataclass(frozen=True)
class Parameter:
    """One line of a `parameters` cell."""

    name: str
    type: str  # as written: "int", "float | None", "list[int]"
    default: Any
    help: str = ""

    def convert(self, value: Any) -> Any:
        """`value`, as read from YAML, in this parameter's type. ValueError says what was wanted."""
        kind = _kind(self.type)
        if value is None and kind["none"]:
            return None
        if kind["list"] and isinstance(value, list | tuple):
            return [self._item(item, kind["item"], value) for item in value]
        if kind["list"]:
            raise self._refusal(value)
        return self._item(value, kind["item"], value)

    def _item(self, item: Any, kind: str, value: Any) -> Any:
        if kind == "float" and isinstance(item, str) and EXPONENT.fullmatch(item):
            item = float(item)
        if kind == "float" and isinstance(item, int) and not isinstance(item, bool):
            item = float(item)
        if type(item) is not TYPES[kind] or (kind == "float" and not math.isfinite(item)):
            raise self._refusal(value)
        return item

    def _refusal(self, value: Any) -> ValueError:
        kind = _kind(self.type)
        example = EXAMPLES[kind["item"]] if self.default is None else self.default
        example = [example] if kind["list"] and not isinstance(example, list) else example
        shown = example if isinstance(example, str) else json.dumps(example)
        return ValueError(
            f"{self.name}: got {value!r} ({type(value).__name__}), wanted {self.type}, e.g. {self.name}: {shown}"
        )


def _kind(type: str) -> re.Match[str]:
    if (match := TYPE.fullmatch(type)) is None:
        raise ValueError(f"got the type {type}, wanted str, int, float, bool, list[T] or T | None: take one of them")
    return match


def tagged(notebook: Any, tag: str) -> Any:
    """The first cell of a notebook (parsed JSON) that carries `tag`, or None."""
    return next((cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])), None)


def read_notebook(path: Path) -> dict:
    """A notebook as plain JSON, its sources as one string each; ValueError if it is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: cannot be read as a notebook ({error})") from None
    return notebook


def read_schema(path: Path) -> dict[str, Parameter]:
    """name -> Parameter of one notebook.

    Raises:
        ValueError: there is no such cell; or a parameter that no other cell of a notebook that reports on a run uses,
            so that its page would show a value that changed nothing. (`experiment` refuses what it does not take.)
    """
    notebook = read_notebook(path)
    cell = tagged(notebook, "parameters")
    if cell is None:
        raise ValueError(f"{path.name}: has no cell tagged 'parameters'; add one, with `name: type = default` lines")
    schema = parse_parameters(cell["source"], path.name)
    code = [other["source"] for other in notebook["cells"] if other["cell_type"] == "code" and other is not cell]
    used = set(re.findall(r"\w+", "\n".join(code)))
    unused = [name for name in schema if name not in used | {"run", "seed"}]
    if unused and "open_run" in used and "experiment" not in used:
        raise ValueError(f"{path.name}: nothing takes the parameter {unused[0]!r}: use it in a cell, or remove it")
    return schema


def checked(path: Path, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """name -> value of every parameter of a notebook, as the namespace of its kernel has them, in their types."""
    return {name: one.convert(namespace.get(name, one.default)) for name, one in read_schema(path).items()}


def parse_parameters(source: str, where: str) -> dict[str, Parameter]:
    """name -> Parameter of the source of a `parameters` cell; `where` begins the error messages."""
    try:
        statements = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{where}: parameters cell: {error}") from None
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip() for token in tokens if token.type == tokenize.COMMENT
    }
    schema = {}
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        parameter = _parse_line(statement, comments.get(statement.end_lineno or 0, ""), where)
        schema[parameter.name] = parameter
    return schema


def _parse_line(statement: ast.stmt, help: str, where: str) -> Parameter:
    wanted = f"{where}: parameters cell: got `{ast.unparse(statement)}`, wanted `name: type = default`"
    if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
        raise ValueError(wanted)
    kind = ast.unparse(statement.annotation)
    if not TYPE.fullmatch(kind):
        raise ValueError(f"{wanted} with a type of str, int, float, bool, list[T] or T | None")
    try:
        default = ast.literal_eval(statement.value)
    except ValueError:
        raise ValueError(f"{wanted} with a literal default") from None
    parameter = Parameter(statement.target.id, kind, default, help)
    try:
        return replace(parameter, default=parameter.convert(default))
    except ValueError as error:
        raise ValueError(f"{where}: parameters cell: {error}") from None


def merge_schemas(notebooks: tuple[Path, ...]) -> dict[str, Parameter]:
    """The schemas of notebooks that run together as one: a name belongs to the first that declares it.

    A later one may declare it too, the same, or as `T | None = None`: "as the first one has it". But for `run`, whose
    default an experiment never takes.
    """
    merged: dict[str, Parameter] = {}
    owner: dict[str, str] = {}
    for path in notebooks:
        for name, parameter in read_schema(path).items():
            first = merged.setdefault(name, parameter)
            owner.setdefault(name, path.name)
            follows = parameter.default is None and parameter.type.removesuffix(" | None") == first.type
            if name != "run" and not follows and (first.type, first.default) != (parameter.type, parameter.default):
                raise ValueError(
                    f"{name} is `{first.type} = {first.default!r}` in {owner[name]} but "
                    f"`{parameter.type} = {parameter.default!r}` in {path.name}; make them one"
                )
    return merged
