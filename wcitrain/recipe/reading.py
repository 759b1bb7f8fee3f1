"""Read recipe files into plain data that remembers where each key was written.

A recipe is a stack of layers, lowest first: the files named by ``base``, the file itself, the command line. ``merge``
lays one on another; the result is data for the models in ``recipe.py`` and a place (``file:line``) per key for errors.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Key = tuple[str, ...]  # ("train", "epochs") stands for train.epochs


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem found, a line each."""


class Layer(NamedTuple):
    """Nested plain data and, for each key, where it was written; ``places[()]`` stands for the whole."""

    data: dict[str, Any]
    places: dict[Key, str]

    def place(self, key: Key) -> str:
        """Return where ``key`` was written, or the nearest mapping around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, "recipe")


class _Loader(yaml.SafeLoader):
    """``yaml.SafeLoader`` that also reads 1e-4 as a number, as YAML 1.2 does; PyYAML asks for 1.0e-4."""


class _Dumper(yaml.SafeDumper):
    """``yaml.SafeDumper`` that quotes the texts which ``_Loader`` would read as numbers."""


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def to_yaml_text(data: Mapping[str, Any]) -> str:
    """Return ``data`` as YAML in the given order; reading the text gives equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def yaml_value(text: str) -> Any:
    """Return one value as recipes read it: "1e-4" is a number.

    Raises:
        ValueError: The text is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"got {text!r}; expected a YAML value ({_reason(error)}).") from error


def read_files(path: Path, problems: list[str]) -> list[Layer]:
    """Read a recipe file and the files its ``base`` keys lead to, lowest first.

    Args:
        path: The recipe; each ``base`` is relative to the folder of the file that names it.
        problems: Gets a line for each duplicate key; reading goes on.

    Raises:
        RecipeError: A file is missing, unreadable or not a YAML mapping, or the ``base`` keys form a circle.
    """
    layers: list[Layer] = []
    seen: set[Path] = set()
    asked_by = ""
    while True:
        layer = _read_file(path, asked_by, problems)
        layers.insert(0, layer)
        seen.add(path.resolve())
        base = layer.data.pop("base", None)
        if base is None:
            return layers
        asked_by = f"{layer.places['base',]}: base: "
        if not isinstance(base, str):
            raise _error(problems, f"{asked_by}got {base!r}; expected the path of one file. Write base: other.yaml.")
        path = path.parent / base
        if path.resolve() in seen:
            raise _error(
                problems,
                f"{asked_by}got {base!r}, which leads back to itself; expected a chain that ends. Remove a base.",
            )


def read_overrides(overrides: Sequence[str], problems: list[str]) -> Layer:
    """Read settings such as ``"train.epochs=3"`` into one layer; a later one wins over an earlier one.

    Args:
        overrides: Dotted key, ``=``, value in YAML.
        problems: Gets a line for each setting that cannot be read; the others are still read.
    """
    if isinstance(overrides, str):
        raise TypeError(f"overrides: got the text {overrides!r}; expected a list of texts. Write [{overrides!r}].")
    layer = Layer({}, {})
    for override in overrides:
        name, equals, text = override.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            problems.append(f"command line: got {override!r}; expected section.key=value. Write e.g. train.epochs=3.")
            continue
        places: dict[Key, str] = {key[:end]: "command line" for end in range(1, len(key) + 1)}
        try:
            value = _parse(text, key, lambda _: "command line", places, problems)
        except (yaml.YAMLError, ValueError) as error:
            reason = _reason(error)
            problems.append(
                f"command line: {name}: got {text!r}; expected a YAML value ({reason}). Put quotes around it."
            )
            continue
        for part in reversed(key):
            value = {part: value}
        layer = merge(layer, Layer(value, places))
    return layer


def merge(below: Layer, above: Layer, default_names: Mapping[str, str] | None = None) -> Layer:
    """Return ``above`` laid on ``below``: mappings merge key by key, anything else is replaced.

    Args:
        below: The layer that loses.
        above: The layer that wins.
        default_names: ``name`` of each section of several kinds when none is written. Where ``above`` changes the
            kind, what ``below`` says about that section is dropped, for its keys belong to the other kind.
    """
    data, places = dict(below.data), dict(below.places)
    for section, default in (default_names or {}).items():
        old, new = data.get(section), above.data.get(section)
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            continue
        old_name = old.get("name", default)
        if new.get("name", old_name) != old_name:
            del data[section]
            places = {key: place for key, place in places.items() if key[:1] != (section,)}
    return Layer(_merge_mappings(data, above.data), places | above.places)


def _merge_mappings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new dict of ``below`` with ``above`` laid on it, all the way down."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping):
            inherited = merged.get(key)
            value = _merge_mappings(inherited if isinstance(inherited, Mapping) else {}, value)
        merged[key] = value
    return merged


def _read_file(path: Path, asked_by: str, problems: list[str]) -> Layer:
    """Read one file; ``asked_by`` opens the error when there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        line = f"{asked_by}got {str(path)!r} ({reason}); expected a readable YAML file. Check the path."
        raise _error(problems, line) from error
    places: dict[Key, str] = {(): str(path)}
    try:
        data = _parse(text, (), lambda node: f"{path}:{node.start_mark.line + 1}", places, problems)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        line = f"{place}: got text that is not YAML ({_reason(error)}); expected key: value lines. Correct that line."
        raise _error(problems, line) from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise _error(problems, f"{path}: got a {type(data).__name__}; expected sections such as train: {{epochs: 20}}.")
    return Layer(data, places)


def _parse(text: str, key: Key, place: Callable[[yaml.Node], str], places: dict[Key, str], problems: list[str]) -> Any:
    """Return the data in ``text``; enter the place of every key below ``key`` and report duplicate keys."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _note_places(node, key, (), place, places, problems)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _note_places(
    node: yaml.Node,
    key: Key,
    around: tuple[yaml.Node, ...],
    place: Callable[[yaml.Node], str],
    places: dict[Key, str],
    problems: list[str],
) -> None:
    """Walk the mappings below ``node``: enter the place of each key, report a key that is written twice."""
    if any(node is outer for outer in around):
        raise ValueError("an anchor that contains itself")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:  # for duplicates only: an item is found on the line of its list
            _note_places(item, (*key, "[]"), (*around, node), place, places, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, str] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue  # a list as a key: the constructor says so
        name, here = key_node.value, place(key_node)
        child = (*key, name)
        if name in first:
            problems.append(
                f"{here}: {'.'.join(child)}: got the key a second time (first: {first[name]}); "
                "expected each key once. Delete one of the two."
            )
        first.setdefault(name, here)
        places[child] = here
        _note_places(value_node, child, (*around, node), place, places, problems)


def _reason(error: Exception) -> str:
    """Return what the YAML reader complained about, in one line."""
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _error(problems: Sequence[str], last: str) -> RecipeError:
    """Return the error for a problem that ends the reading, after those found before it."""
    return RecipeError("\n".join([*problems, last]))
