"""Build a checked recipe from layers of settings, or say in one error everything that is wrong with them.

A line reads ``<file:line>: <dotted key>: got <value>; expected <rule>. <what to do>.``
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from wcitrain.method import SettingError, fields_of, nearest, rule, show
from wcitrain.recipe.checks import ContradictionError, Problem
from wcitrain.recipe.fields import RecipeFields
from wcitrain.recipe.layers import KINDS, kind_at, lay_all, value_at
from wcitrain.recipe.reading import Key, Layer, RecipeError

R = TypeVar("R", bound=RecipeFields)
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "not_here")  # pydantic's names, and Choice's


def build(recipe: type[R], layers: Sequence[Layer]) -> R:
    """Lay ``layers`` on one another, lowest first, and build the recipe from them.

    Raises:
        RecipeError: There was any problem; the message has a line for each. Contradictions show only between
            right values.
    """
    layer = lay_all(layers)
    problems = list(layer.problems)
    try:
        result = recipe.model_validate(layer.data)
    except ValidationError as error:
        for one in error.errors():
            cause: Any = one.get("ctx", {}).get("error")
            is_contradiction = isinstance(cause, ContradictionError)
            problems += _contradictions(layer, cause.problems) if is_contradiction else [_line(layer, one)]
    if problems:
        raise RecipeError("\n".join(problems))
    return result


def _contradictions(layer: Layer, problems: Sequence[Problem]) -> Iterator[str]:
    """Yield a line for each contradiction, placed at the first of its keys that is written."""
    for keys, text in problems:
        paths = [tuple(key.split(".")) for key in keys]
        written = next((path for path in paths if path in layer.places), paths[0])
        yield f"{layer.place(written)}: {keys[0]}: {text}"


# ---- what is wrong with a single setting -------------------------------------------------------------------


def _line(layer: Layer, error: Any) -> str:
    """Return the line for one pydantic error."""
    kind, value, key = error["type"], error["input"], tuple(str(part) for part in error["loc"])
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SettingError):
        key = (*key, *cause.key.split("."))
        return f"{layer.place(key)}: {'.'.join(key)}: {cause.text}"
    if kind == "choice_name":
        key, value = (*key, "name"), error["ctx"]["name"]
    fields = _fields(layer, key[:-1])
    if kind in UNKNOWN:
        text = f"an unknown key; expected one of {', '.join(fields)}. {_right_place(key, fields)}"
    elif kind == "missing":
        text = f"nothing; expected a value. {fields[key[-1]].description} Set it."
    else:
        text = f"{show(value)}; expected {rule(error)}."
        if kind != "value_error":  # that rule brings its own advice
            text += f" {_advice(layer, kind, value, rule(error), key)}"
    return f"{layer.place(key)}: {'.'.join(key)}: got {text}"


def _advice(layer: Layer, kind: str, value: Any, expected: str, key: Key) -> str:
    """Say what to do about a value that is not allowed."""
    if kind in ("literal_error", "choice_name"):
        choices = expected.removeprefix("one of ").replace(" or ", ", ").split(",")
        near = nearest(value, [one.strip(" '") for one in choices]) if isinstance(value, str) else None
        return f"Did you mean {near}?" if near else "Choose one of them."
    if kind == "invalid_key" or (kind == "string_type" and value is not None):
        return "Put quotes around it."
    if kind in ("choice_type", "dataclass_type", "model_type"):
        if key[-1].isdigit():
            return "Write {name: ...}."
        first = next(iter(_fields(layer, key)), "name")
        return f"Write {key[-1]}: {{{first}: ...}}, or leave {key[-1]} out."
    is_item = key[-1].isdigit()
    while key and key[-1].isdigit():  # an item of a list
        key = key[:-1]
    field = _fields(layer, key[:-1]).get(key[-1])
    if field is None or not field.description:
        return "Correct it."
    if field.is_required() or is_item:
        return f"{field.description} Correct it."
    default = show(field.get_default(call_default_factory=True))
    return f"{field.description} Correct it, or leave it out for the default, {default}."


def _right_place(key: Key, known: dict[str, Any]) -> str:
    """Say which key an unknown one may mean: of the same name elsewhere, or the nearest."""
    section, name, path = key[:-1], key[-1], ".".join(key[:-1])
    for one, field in known.items():
        if name in (getattr(field, "json_schema_extra", None) or {}).get("was", ()):
            return f"{path}.{one} has taken its place. {field.description}"
    choice = here.choice if (here := kind_at(section)) else None
    if choice and (others := [one for one, kind in choice.table.items() if name in choice.keys(kind)]):
        return f"It belongs to {path}.name {' or '.join(others)}: set that name, or remove the key."
    if section and name in fields_of(RecipeFields):
        return "It belongs under no section."
    everywhere = [(path, one) for one in known] + list(_everywhere(fields_of(RecipeFields)))
    inside = [(home, one) for home, one in everywhere if f"{home}.".startswith(f"{path}.")]
    for pairs in (inside, everywhere):
        if homes := dict.fromkeys(home for home, one in pairs if one == name):
            return f"It belongs under {' or '.join(homes)}."
        if near := nearest(name, [one for _, one in pairs]):
            home = next(home for home, one in pairs if one == near)
            return f"Did you mean {near}{'' if home == path else f' under {home}'}?"
    return "Remove it."


def _fields(layer: Layer, section: Key) -> dict[str, Any]:
    """Return the keys of a section as it is now, with their fields; the name of a choice first."""
    kind: Any = RecipeFields
    fields = fields_of(kind)
    for end, part in enumerate(section, 1):
        if here := kind_at(section[:end]):
            settings = value_at(layer.data, section[:end])
            name = settings.get("name", here.default) if isinstance(settings, dict) else here.default
            method = here.choice.kind(name)
            fields = {"name": None} | (here.choice.keys(method) if method else {})
        else:
            kind = _item(kind) if part.isdigit() else getattr(fields.get(part), "annotation", None)
            fields = fields_of(kind) if hasattr(kind, "__pydantic_fields__") else {}
    return fields


def _everywhere(fields: dict[str, Any], place: Key = ()) -> Iterator[tuple[str, str]]:
    """Yield every key of these fields, and of what is inside them, with its section."""
    for name, field in fields.items():
        here = (*place, name)
        yield ".".join(place), name
        choice = KINDS[here].choice if here in KINDS else None
        for kind in choice.table.values() if choice else [field.annotation]:
            if hasattr(kind, "__pydantic_fields__"):
                yield from _everywhere(choice.keys(kind) if choice else fields_of(kind), here)


def _item(kind: Any) -> Any:
    """Return the class of a list's items, such as UnionThreat of tuple[Annotated[UnionThreat, ...], ...]."""
    item = next(iter(get_args(kind)), None)
    return get_args(item)[0] if get_args(item) else item
