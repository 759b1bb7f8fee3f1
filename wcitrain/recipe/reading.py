"""Read YAML into plain data that remembers where each key was written, as ``file:line``, for errors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str, ...]  # ("train", "epochs") stands for train.epochs
# What PyYAML raises; the last ones for an anchor inside itself and a tag that does not fit: !!bool foo.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, IndexError, AttributeError)


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem found, a line each."""


@dataclass(frozen=True)
class Layer:
    """Nested plain data, where each key was written (``places[()]``: the whole), and what is wrong."""

    data: Any
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Return where ``key`` was written, or the nearest mapping around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, "recipe")


class _Loader(yaml.SafeLoader):
    """``yaml.SafeLoader`` with the plain scalars of YAML 1.2's core schema, where PyYAML has those of 1.1.

    1e-4 is a number; 010 is ten; 1:30, 1_000, 2024-01-01, yes and off are texts.
    """


class _Dumper(yaml.SafeDumper):
    """``yaml.SafeDumper`` that quotes the texts which YAML 1.1 or 1.2 would read as something else."""


_SCALARS = {  # the core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.nan|\.NaN|\.NAN",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
_Loader.yaml_implicit_resolvers = {}
for _class in (_Loader, _Dumper):
    for _name, (_pattern, _first) in _SCALARS.items():
        _starts = ["" if letter == "\0" else letter for letter in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _starts)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Escape the line breaks that PyYAML would fold into spaces."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(str, _represent_text)


def to_yaml_text(data: Mapping[str, Any]) -> str:
    """Return ``data`` as YAML in the given order; reading the text gives equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> Any:
    """Return the data in ``text``, by the rules of recipes.

    Raises:
        RecipeError: The text is no YAML, or has a key twice.
    """
    layer = parse(text, "line {}".format)
    if layer.problems:
        raise RecipeError("; ".join(layer.problems))
    return layer.data


def read_file(path: Path) -> Layer:
    """Return what a file says.

    Raises:
        RecipeError: It is missing, unreadable or not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: got {error}; expected a readable YAML file. Check the path.") from error
    layer = parse(text, f"{path}:{{}}".format)
    if not isinstance(layer.data, dict | None):
        got = f"got a {type(layer.data).__name__}"
        raise RecipeError(f"{path}: {got}; expected sections such as train: {{epochs: 3}}.")
    return Layer(layer.data or {}, {(): str(path)} | layer.places, layer.problems)


def parse(text: str, place: Callable[[int], str], key: Key = ()) -> Layer:
    """Return the data in ``text``, the value of ``key``; ``place`` says where a line is.

    Raises:
        RecipeError: The text is no YAML. A key that is there twice is a problem of the layer.
    """
    places: dict[Key, str] = {}
    problems: list[str] = []

    def walk(node: yaml.Node | None, key: Key) -> None:
        items: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.SequenceNode):
            items = [(str(number), item, item) for number, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):  # the constructor complains of a list as a key
            items = [(k.value, k, item) for k, item in node.value if isinstance(k, yaml.ScalarNode)]
        first: dict[str, str] = {}
        for name, written, item in items:
            child, here = (*key, name), place(written.start_mark.line + 1)
            if name in first:
                got = f"{'.'.join(child)}: got the key a second time (first: {first[name]})"
                problems.append(f"{here}: {got}; expected each key once. Delete one of the two.")
            first.setdefault(name, here)
            places[child] = here
            walk(item, child)

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        walk(node, key)
        data = None if node is None else loader.construct_document(node)
    except NOT_YAML as error:
        mark, name = getattr(error, "problem_mark", None), f"{'.'.join(key)}: " if key else ""
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        where = f"{place(mark.line + 1 if mark else 1)}: {name}"
        raise RecipeError(f"{where}got text that is not YAML ({reason}); expected YAML. Quote it?") from error
    return Layer(data, places, problems)
