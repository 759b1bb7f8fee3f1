"""Read YAML into plain data that remembers where each key was written, as ``file:line``, for errors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str, ...]  # ("train", "epochs") stands for train.epochs
COMMAND_LINE = "command line"  # the place of a setting that no file holds
# What PyYAML raises; the last three for a tag that does not fit its value, such as !!bool foo.
NOT_YAML = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError)


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem found, a line each."""


@dataclass(frozen=True)
class Layer:
    """Nested plain data, where each key was written (``places[()]``: the whole), and what is wrong."""

    data: dict[str, Any]
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


def read_yaml(text: str) -> Any:
    """Return the data in ``text``, by the rules of recipes.

    Raises:
        ValueError: The text is no YAML, or has a key twice.
    """
    try:
        layer = _parse(text, (), "line {}".format)
    except NOT_YAML as error:
        raise ValueError(f"got {text[:60]!r}; expected YAML ({_reason(error)}).") from error
    if layer.problems:
        raise RecipeError("; ".join(layer.problems))
    return layer.data


def to_yaml_text(data: Mapping[str, Any]) -> str:
    """Return ``data`` as YAML in the given order; reading the text gives equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_override(override: str) -> Layer:
    """Read one setting such as ``"train.epochs=3"``; one that cannot be read is a problem."""
    name, equals, text = override.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        text = f"command line: got {override!r}; expected section.key=value. Write seed=3."
        return Layer({}, problems=[text])
    try:
        layer = _parse(text, key, lambda line: COMMAND_LINE)
    except NOT_YAML as error:
        rule = f"a YAML value ({_reason(error)}). Put quotes around it."
        return Layer({}, problems=[f"command line: {name}: got {text!r}; expected {rule}"])
    value: Any = layer.data
    for part in reversed(key):
        value = {part: value}
    around = {key[:end]: COMMAND_LINE for end in range(1, len(key) + 1)}
    return Layer(value, around | layer.places, layer.problems)


def read_file(path: Path, asked_by: str = "") -> Layer:
    """Read one file; ``asked_by`` opens the error when there is no such file.

    Raises:
        RecipeError: It is missing, unreadable or not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = f"'{path}' ({getattr(error, 'strerror', None) or 'not UTF-8 text'})"
        raise RecipeError(f"{asked_by}got {got}; expected a readable YAML file. Check the path.") from error
    try:
        layer = _parse(text, (), f"{path}:{{}}".format)
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        got = f"got text that is not YAML ({_reason(error)})"
        raise RecipeError(f"{place}: {got}; expected key: value lines. Correct that line.") from error
    if not isinstance(layer.data, dict | None):
        got = f"got a {type(layer.data).__name__}"
        raise RecipeError(f"{path}: {got}; expected sections such as train: {{epochs: 3}}.")
    return Layer(layer.data or {}, {(): str(path)} | layer.places, layer.problems)


def _parse(text: str, key: Key, place: Callable[[int], str]) -> Layer:
    """Return the data in ``text``, with the place of every key below ``key``; duplicates are problems."""
    places: dict[Key, str] = {}
    problems: list[str] = []

    def walk(node: yaml.Node, key: Key, around: tuple[yaml.Node, ...]) -> None:
        if any(node is outer for outer in around):
            raise ValueError("an anchor that contains itself")
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
            walk(item, child, (*around, node))

    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Layer(None)  # type: ignore[arg-type]
        walk(node, key, ())
        return Layer(loader.construct_document(node), places, problems)
    finally:
        loader.dispose()


def _reason(error: Exception) -> str:
    """Return what the YAML reader complained about, in one line."""
    return str(getattr(error, "problem", None) or error).splitlines()[0]
