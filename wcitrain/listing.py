"""What can be named: methods with their settings from the classes, and the recipe files that come along."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.method import fields_of, fraction_text, show

FOLDERS = ("bases", "methods", "sweeps")


@dataclass(frozen=True)
class Entry:
    """Something that has a name in recipes and options."""

    name: str
    summary: str
    settings: Sequence[tuple[str, str, str]] = ()  # name, default as YAML has it, meaning and unit
    cost: str = ""
    source: str = ""

    def __str__(self) -> str:
        """A block of lines, the settings in columns."""
        widths = [max((len(row[column]) for row in self.settings), default=0) for column in (0, 1)]
        lines = [f"{name:{widths[0]}}  {value:{widths[1]}}  {text}" for name, value, text in self.settings]
        lines += [f"{key}: {text}" for key, text in (("cost", self.cost), ("source", self.source)) if text]
        return "\n".join([f"{self.name}: {self.summary}", *(f"    {line}".rstrip() for line in lines)])


def describe(table: Mapping[Any, Any]) -> list[Entry]:
    """Return what a room's table of names says of itself: classes made by ``@method``, or functions."""
    entries = []
    for name, kind in table.items():
        fields = fields_of(kind) if hasattr(kind, "__pydantic_fields__") else {}
        settings = [
            (key, _default(field), " ".join((field.description or "").split()))
            for key, field in fields.items()
        ]
        summary = " ".join((kind.__doc__ or "").strip().partition("\n\n")[0].split())
        notes = getattr(kind, "cost", ""), getattr(kind, "source", "")
        entries.append(Entry(name, summary, settings, *notes))
    return entries


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    value = fraction_text(value) if isinstance(value, float) else value
    if hasattr(value, "__pydantic_fields__") and type(value).__str__ is object.__str__:  # settings inside
        return f"{{{', '.join(f'{name}: {one}' for name, one in vars(value).items())}}}"
    return show(value) if value is None or isinstance(value, bool | list | dict) else str(value)


def describe_recipes() -> list[Entry]:
    """Return the recipe files that come along, with the first sentence of the comment they begin with."""
    entries = []
    for path in _recipes(FOLDERS):
        comment = re.match(r"(?:# (?! ).*\n)*", path.read_text("utf-8"))  # up to the end, or a command
        text = comment[0].replace("\n# ", " ").strip("# \n") if comment else ""
        sentence = re.split(r"(?<=\.)(?<!al\.) ", text)[0]
        entries.append(Entry(f"{path.parent.name}/{path.stem}", sentence))
    return entries


def recipe_file(name: str, folders: Sequence[str]) -> str:
    """Return ``name`` itself where such a file exists, or else the path of the recipe that comes along.

    ValueError for a name of neither.
    """
    is_path = name.endswith((".yaml", ".yml"))  # of one that is not there, reading says what is wrong
    if is_path or Path(name).is_file():
        return name
    files = {path.stem: str(path) for path in _recipes(folders)}
    if name not in files:
        raise ValueError(f"{name}: got no file; expected a path, or one of {', '.join(sorted(files))}.")
    return files[name]


def _recipes(folders: Sequence[str]) -> list[Path]:
    """Return the files of these folders of recipes, which lie in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    root = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return [path for folder in folders for path in sorted((root / folder).glob("*.yaml"))]
