"""Build a checked model from layers of settings, or say in one error everything that is wrong with them.

A line reads ``<file:line>: <dotted key>: got <value>; expected <rule>. <what to do>.``
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from wcitrain.method import SettingError, fields_of, nearest, rule, show
from wcitrain.recipe.layers import Kinds, lay, named, value_at
from wcitrain.recipe.reading import Key, Layer, RecipeError

M = TypeVar("M", bound=BaseModel)
Problem = tuple[tuple[str, ...], str]  # dotted keys, the one to blame first; "got ...; expected ... ."


class ContradictionError(ValueError):
    """Settings of different sections that are fine alone and wrong together."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(f"{keys[0]}: {text}" for keys, text in problems))
        self.problems = problems


def build(model: type[M], layers: Sequence[Layer], problems: list[str], kinds: Kinds) -> M:
    """Lay ``layers`` on one another, lowest first, and build ``model`` from them.

    Args:
        model: Its validators raise ``ContradictionError`` for settings that are wrong together.
        layers: Settings and where they were written.
        problems: Lines found while reading; they go first in the error.
        kinds: The keys whose value is one of several methods.

    Raises:
        RecipeError: There was any problem; the message has a line for each.
    """
    layer = Layer({}, {})
    for above in layers:
        layer = lay(layer, above, kinds)
    layer = named(layer, kinds)
    result, errors, contradictions = _try(model, layer.data)
    wrong: set[str] = set()
    if errors:  # contradictions show only between right values: look again without the wrong ones
        sentences = _Sentences(model, layer, kinds)
        for error in errors:
            key, line = sentences.line(error)
            problems.append(line)
            wrong.add(key[0] if error["type"].startswith("choice") else ".".join(key[:2]))
        _, errors, contradictions = _try(model, _without(layer.data, wrong))
        if errors:  # the default is not right either: leave the section out
            wrong |= {str(error["loc"][0]) for error in errors}
            _, _, contradictions = _try(model, _without(layer.data, wrong))
    for keys, text in contradictions:
        if not any(f"{key}.".startswith(f"{part}.") for key in keys for part in wrong):
            written = next((key for key in keys if tuple(key.split(".")) in layer.places), keys[0])
            problems.append(f"{layer.place(tuple(written.split('.')))}: {keys[0]}: {text}")
    if problems or result is None:
        raise RecipeError("\n".join(problems))
    return result


def _try(model: type[M], data: dict[Any, Any]) -> tuple[M | None, list[Any], list[Problem]]:
    """Return the model, or pydantic's list of wrong values, or the contradictions between right ones."""
    try:
        return model.model_validate(data), [], []
    except ValidationError as error:
        errors = error.errors()
    cause = errors[0].get("ctx", {}).get("error")
    return (None, [], cause.problems) if isinstance(cause, ContradictionError) else (None, errors, [])


def _without(data: dict[Any, Any], wrong: set[str]) -> dict[Any, Any]:
    """Return ``data`` without the sections and keys in ``wrong``."""
    kept = {section: content for section, content in data.items() if str(section) not in wrong}
    for section, content in kept.items():
        if isinstance(content, dict):
            kept[section] = {key: one for key, one in content.items() if f"{section}.{key}" not in wrong}
    return kept


class _Sentences:
    """Says what is wrong with single settings of one recipe."""

    def __init__(self, model: type[BaseModel], layer: Layer, kinds: Kinds) -> None:
        self.model, self.layer, self.kinds = model, layer, kinds

    def line(self, error: Any) -> tuple[Key, str]:
        """Return the key of one pydantic error and its line."""
        kind, value, key = error["type"], error["input"], tuple(str(part) for part in error["loc"])
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, SettingError):
            key = (*key, *cause.key.split("."))
            return key, f"{self.layer.place(self._written(key, cause.text))}: {'.'.join(key)}: {cause.text}"
        if kind == "choice_name":
            key, value = (*key, "name"), error["ctx"]["name"]
        fields = self._fields(key[:-1])
        if kind in ("extra_forbidden", "unexpected_keyword_argument", "not_here"):
            text = f"an unknown key; expected one of {', '.join(fields)}. {self._unknown(key, list(fields))}"
        elif kind == "missing":
            text = f"nothing; expected a value. {fields[key[-1]].description} Set it."
        else:
            text = f"{show(value)}; expected {rule(error)}."
            if kind != "value_error":  # that rule brings its own advice
                text += f" {self._advice(kind, value, rule(error), key)}"
        return key, f"{self.layer.place(key)}: {'.'.join(key)}: got {text}"

    def _written(self, key: Key, text: str) -> Key:
        """Return ``key`` where it is written, else a key beside it that ``text`` speaks of."""
        spoken = re.findall(r"\w+", text)
        beside = (one for one in self.layer.places if one[:-1] == key[:-1] and one[-1:] and one[-1] in spoken)
        return key if key in self.layer.places else next(beside, key)

    def _advice(self, kind: str, value: Any, expected: str, key: Key) -> str:
        """Say what to do about a value that is not allowed."""
        if kind in ("literal_error", "choice_name"):
            choices = expected.removeprefix("one of ").replace(" or ", ", ").split(",")
            near = nearest(value, [one.strip(" '") for one in choices]) if isinstance(value, str) else None
            return f"Did you mean {near}?" if near else "Choose one of them."
        if kind == "invalid_key" or (kind == "string_type" and value is not None):
            return "Put quotes around it."
        if kind in ("choice_type", "dataclass_type", "model_type"):
            first = next(iter(self._fields(key)), "name")
            return f"Write {key[-1]}: {{{first}: ...}}, or leave {key[-1]} out."
        is_item = key[-1].isdigit()
        while key and key[-1].isdigit():  # an item of a list
            key = key[:-1]
        field = self._fields(key[:-1]).get(key[-1])
        if field is None or not field.description:
            return "Correct it."
        if field.is_required() or is_item:
            return f"{field.description} Correct it."
        default = field.get_default(call_default_factory=True)
        return f"{field.description} Correct it, or leave it out for the default, {show(default)}."

    def _unknown(self, key: Key, known: list[str]) -> str:
        """Say where an unknown key belongs, or which known one is meant."""
        section, name, path = key[:-1], key[-1], ".".join(key[:-1])
        if section in self.kinds:
            choice = self.kinds[section].choice
            if others := [one for one, method in choice.table.items() if name in choice.keys(method)]:
                return f"It belongs to {path}.name {' or '.join(others)}: set that name, or remove the key."
        if section and name in fields_of(self.model):
            return "It belongs at the top of the recipe, in no section."
        everywhere = list(self._everywhere(fields_of(self.model)))
        inside = [pair for pair in everywhere if pair[0].startswith(f"{path}.")]
        for pairs, cutoff in ((inside, 0.7), (everywhere, 0.6)):
            if homes := dict.fromkeys(home for home, one in pairs if one == name):
                full = [f"{one}_{name}" for one in known]  # threat's warmup_epochs may be eps_warmup_epochs
                also = next((f" Did you mean {one} under {home}?" for home, one in pairs if one in full), "")
                return f"It belongs under {' or '.join(homes)}.{also}"
            close = [(path, one) for one in known] + pairs
            names = [one for _, one in close]
            part = max((one for one in names if f"_{one}_" in f"_{name}_"), key=len, default=None)
            if near := part or nearest(name, names, cutoff):  # start for start_after, or a slip of the pen
                home = next(home for home, one in close if one == near)
                return f"Did you mean {near}{'' if home == path else f' under {home}'}?"
        return "Remove it."

    def _fields(self, section: Key) -> dict[str, Any]:
        """Return the keys of a section as it is now, with their fields; the name of a choice first."""
        kind: Any = self.model
        fields = fields_of(kind)
        for end, part in enumerate(section, 1):
            if here := self.kinds.get(section[:end]):
                settings = value_at(self.layer.data, section[:end])
                method = here.choice.kind(settings["name"] if isinstance(settings, dict) else here.default)
                fields = {"name": None} | (here.choice.keys(method) if method else {})
            else:
                kind = _item(kind) if part.isdigit() else getattr(fields.get(part), "annotation", None)
                fields = fields_of(kind) if hasattr(kind, "__pydantic_fields__") else {}
        return fields

    def _everywhere(self, fields: dict[str, Any], place: Key = ()) -> Iterator[tuple[str, str]]:
        """Yield every section of these fields, kind of it and class inside it, with each of its keys."""
        for name, field in fields.items():
            here = (*place, name)
            choice = self.kinds[here].choice if here in self.kinds else None
            for kind in choice.table.values() if choice else [field.annotation]:
                if hasattr(kind, "__pydantic_fields__"):
                    keys = choice.keys(kind) if choice else fields_of(kind)
                    yield from ((".".join(here), key) for key in keys)
                    yield from self._everywhere(keys, here)


def _item(kind: Any) -> Any:
    """Return the class of a list's items, such as UnionThreat of tuple[Annotated[UnionThreat, ...], ...]."""
    item = next(iter(get_args(kind)), None)
    return get_args(item)[0] if get_args(item) else item
