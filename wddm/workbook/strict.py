"""YAML, strictly: every key once, plain values, nothing that is read as another value than it looks.

YAML 1.1 reads 010 as 8, 1:30 as 90 and 2024-01-01 as a date, and lets a few lines stand for gigabytes: all refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

MOST = 100_000  # bytes of a file
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,18}|[0-9]*\.[0-9]*([eE][-+][0-9]+)?|\.(?i:inf|nan))")


class Loader(yaml.SafeLoader):
    """SafeLoader without anchors, aliases, tags, keys given twice and numbers that can be misread."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if event.anchor or getattr(event, "tag", None):
            problem = "got an anchor (&), alias (*) or tag (!), wanted the value itself: write it out, or quote it"
            raise ConstructorError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"got {key.value!r:.60} twice, wanted it once: remove one of them"
                raise ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag.endswith((":int", ":float", ":timestamp")) and not DECIMAL.fullmatch(node.value):
            problem = "wanted plain decimal digits, 19 at most, if it is a number: else quote it"
            raise ConstructorError(None, None, f"got {node.value:.60}, {problem}", node.start_mark)
        return super().construct_object(node, deep=deep)


def parse(text: str, where: str) -> Any:
    """The value that a text holds; ValueError, one line that begins with `where`."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        problem += "" if "wanted" in problem else ", wanted one `key: value` per line"
        raise ValueError(f"{where}: is not valid YAML ({f'line {mark.line + 1}: ' if mark else ''}{problem})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of parameters; ValueError, one line, for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST + 1)
        text = content[:MOST].decode()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({problem})") from None
    if len(content) > MOST:
        raise ValueError(f"{path}: got more than {MOST:,} bytes, wanted one `key: value` per line: is it another file?")
    values = {} if (values := parse(text, str(path))) is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, wanted one `key: value` per line")
    return {str(key): value for key, value in values.items()}
