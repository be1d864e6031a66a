"""Parameters, as the notebooks declare them; there is no other schema.

The cell tagged `parameters` of a notebook is its schema, one line per parameter:

    level: int = 1                  # depth of the wavelet transform
    backbone: str = "unet"          # one of: unet, ukan; the denoiser

Types are str, int, float, bool, list[T] and `T | None`; a help text that begins `one of:` lists the only
values allowed.
"""

import ast
import io
import json
import math
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = {"str": str, "int": int, "float": float, "bool": bool}
EXAMPLES = {"str": "name", "int": 1, "float": 0.1, "bool": True}
TYPE = re.compile(r"(?P<list>list\[)?(?P<item>str|int|float|bool)(?(list)\])(?P<none> \| None)?")
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # YAML 1.1 reads 1e-3 as a string
CHOICES = re.compile(r"one of:\s*(.*?)\s*(?:;|\.(?=\s|$)|$)")


@dataclass(frozen=True)
class Parameter:
    """One line of a `parameters` cell."""

    name: str
    type: str  # as written: "int", "float | None", "list[int]"
    default: Any
    help: str = ""

    @property
    def choices(self) -> list[str]:
        """The values that the help text allows, or [] for any."""
        match = CHOICES.match(self.help)
        return [choice.strip(" `'\"") for choice in match[1].split(",")] if match else []

    def convert(self, value: Any) -> Any:
        """`value`, as read from YAML, in this parameter's type. ValueError says what was wanted."""
        kind = TYPE.fullmatch(self.type)
        if value is None and kind["none"]:
            return None
        if kind["list"] and isinstance(value, list):
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
        if self.choices and str(item) not in self.choices:
            raise ValueError(f"{self.name}: got {item!r}, wanted one of: {', '.join(self.choices)}")
        return item

    def _refusal(self, value: Any) -> ValueError:
        kind = TYPE.fullmatch(self.type)
        example = EXAMPLES[kind["item"]] if self.default is None else self.default
        example = [example] if kind["list"] and not isinstance(example, list) else example
        shown = example if isinstance(example, str) else json.dumps(example)
        return ValueError(
            f"{self.name}: got {value!r} ({type(value).__name__}), wanted {self.type}, e.g. {self.name}: {shown}"
        )


def tagged(notebook: dict, tag: str) -> dict | None:
    """The first cell of `notebook` (parsed JSON) that carries `tag`."""
    return next((cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])), None)


def read_notebook(path: Path) -> dict:
    """A notebook as plain JSON, its sources as one string each."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: cannot be read as a notebook ({error})") from None
    return notebook


def read_schema(path: Path) -> dict[str, Parameter]:
    """name -> Parameter of one notebook."""
    cell = tagged(read_notebook(path), "parameters")
    if cell is None:
        raise ValueError(f"{path.name}: has no cell tagged 'parameters'; add one, with `name: type = default` lines")
    return parse_parameters(cell["source"], path.name)


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
        parameter = _parse_line(statement, comments.get(statement.end_lineno, ""), where)
        schema[parameter.name] = parameter
    return schema


def _parse_line(statement: ast.stmt, help: str, where: str) -> Parameter:
    wanted = f"{where}: parameters cell: got `{ast.unparse(statement)}`, wanted `name: type = default`"
    named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    if not named or statement.value is None:
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
        return Parameter(parameter.name, kind, parameter.convert(default), help)
    except ValueError as error:
        raise ValueError(f"{where}: parameters cell: {error}") from None


def merge_schemas(notebooks: tuple[Path, ...]) -> dict[str, Parameter]:
    """The schemas of several notebooks as one; the same name must mean the same in all of them.

    But for `run`, whose default an experiment never takes.
    """
    merged, owner = {}, {}
    for path in notebooks:
        for name, parameter in read_schema(path).items():
            first = merged.setdefault(name, parameter)
            owner.setdefault(name, path.name)
            if name != "run" and (first.type, first.default) != (parameter.type, parameter.default):
                raise ValueError(
                    f"{name} is `{first.type} = {first.default!r}` in {owner[name]} but "
                    f"`{parameter.type} = {parameter.default!r}` in {path.name}; make them one"
                )
    return merged
