"""What can be named: methods with their settings from the classes, and the recipe files that come along."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.method import fields_of, fraction_text, nearest, show


@dataclass(frozen=True)
class Entry:
    """Something that has a name in recipes and options."""

    name: str
    summary: str
    settings: Sequence[tuple[str, str, str]] = ()  # name, default as YAML has it, meaning and unit
    cost: str = ""
    source: str = ""


def describe(table: Mapping[Any, Any]) -> list[Entry]:
    """Return what a room's table of names says of itself: classes made by ``@method``, or functions."""
    notes = {name: (getattr(kind, "cost", ""), getattr(kind, "source", "")) for name, kind in table.items()}
    return [Entry(name, _first_line(kind), _settings(kind), *notes[name]) for name, kind in table.items()]


def describe_recipes() -> list[Entry]:
    """Return the recipe files that come along, with the first sentence of their headers."""
    paths = [path for folder in FOLDERS for path in sorted((recipe_folder() / folder).glob("*.yaml"))]
    return [Entry(f"{path.parent.name}/{path.stem}", _header(path)) for path in paths]


def as_text(entries: Sequence[Entry]) -> str:
    """Return a block of lines for each."""
    return "\n".join(line for entry in entries for line in _lines(entry))


def _lines(entry: Entry) -> list[str]:
    widths = [max((len(row[column]) for row in entry.settings), default=0) for column in (0, 1)]
    settings = [
        f"{name:{widths[0]}}  {value:{widths[1]}}  {meaning}" for name, value, meaning in entry.settings
    ]
    notes = [f"{key}: {text}" for key, text in (("cost", entry.cost), ("source", entry.source)) if text]
    return [f"{entry.name}: {entry.summary}", *(f"    {line}".rstrip() for line in [*settings, *notes])]


def _settings(kind: Any) -> list[tuple[str, str, str]]:
    fields = fields_of(kind) if hasattr(kind, "__pydantic_fields__") else {}
    meanings = {name: " ".join((field.description or "").split()) for name, field in fields.items()}
    return [(name, _default(field), meanings[name]) for name, field in fields.items()]


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = fraction_text(value) if isinstance(value, float) else value
    if hasattr(value, "__pydantic_fields__") and type(value).__str__ is object.__str__:  # settings inside
        return f"{{{', '.join(f'{name}: {one}' for name, one in vars(value).items())}}}"
    return show(value) if value is None or isinstance(value, bool | list | dict) else str(value)


def _first_line(kind: Any) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((kind.__doc__ or "").strip().partition("\n\n")[0].split())


# ---- recipe files ------------------------------------------------------------------------------------------

FOLDERS = ("bases", "methods", "sweeps")


def recipe_folder() -> Path:
    """Return where the recipes that come along are: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(
        (folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()),
        package / "recipes",
    )


def recipe_file(name: str, folders: Sequence[str]) -> str:
    """Return ``name`` itself where such a file exists, or the path of the recipe that comes along.

    Raises:
        ValueError: Neither; the message lists what there is.
    """
    is_path = name.endswith((".yaml", ".yml"))  # of one that is not there, reading says what is wrong
    if is_path or (Path(name).exists() and not Path(name).is_dir()):
        return name
    files = {path.stem: path for folder in folders for path in (recipe_folder() / folder).glob("*.yaml")}
    if name not in files:
        near = nearest(name, list(files))
        advice = f"Did you mean {near}?" if near else "Correct it."
        raise ValueError(
            f"{name}: got no file; expected a path, or one of {', '.join(sorted(files))}. {advice}"
        )
    return str(files[name])


def _header(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):  # the end, or a command
            break
        lines.append(line.removeprefix("# "))
    return re.split(r"(?<=\.)(?<!al\.) ", " ".join(lines))[0]
