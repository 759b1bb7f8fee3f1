"""Build a checked model from layers of settings, or say in one error everything that is wrong with them.

A line reads ``<file:line>: <dotted key>: got <value>; expected <rule>. <what to do>.``
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from wcitrain.recipe.reading import Layer, RecipeError, merge

M = TypeVar("M", bound=BaseModel)
Sections = dict[str, tuple[type[BaseModel], ...]]  # the models of each section: several where it has kinds

_TRUTH_HINT = "YAML reads unquoted on, off, yes and no as truth values: put quotes around the text."
_EXPECTED = {  # rules that read better than pydantic's; the others are its own "Input should be <rule>"
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "invalid_key": "a key that is text",
    "invalid-json-value": "plain YAML data: texts, numbers, lists, mappings",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number less than or equal to {le}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number greater than or equal to {ge}",
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "value_error": "{error}",
}


class ContradictionError(ValueError):
    """Settings that are fine alone and wrong together.

    Args:
        problems: For each, the dotted keys that disagree, the one to blame first, and ``got ...; expected ... .``.
    """

    def __init__(self, problems: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("\n".join(f"{keys[0]}: {text}" for keys, text in problems))
        self.problems = problems


def build(model: type[M], layers: Sequence[Layer], problems: list[str], default_names: Mapping[str, str]) -> M:
    """Lay ``layers`` on one another, lowest first, and build ``model`` from them.

    Args:
        model: Pydantic model of sections; its validators raise ``ContradictionError`` for settings wrong together.
        layers: Settings and where they were written.
        problems: Lines found while reading; they go first in the error.
        default_names: ``name`` of each section of several kinds when none is written.

    Raises:
        RecipeError: There was any problem; the message has a line for each.
    """
    layer = Layer({}, {})
    for above in layers:
        layer = merge(layer, above, default_names)
    data = layer.data
    for section, name in default_names.items():
        if isinstance(data.get(section), dict):
            data[section] = {"name": name} | data[section]
    result, errors, contradictions = _try(model, data)
    wrong: set[str] = set()
    if errors:
        # Contradictions show only between right values: take the wrong ones out, to their defaults, and look again.
        sections = _sections(model)
        for error in errors:
            key, line = _explain(error, layer, model, sections)
            problems.append(line)
            is_kind_unknown = error["type"].startswith("union_tag")
            wrong.add(key[0] if is_kind_unknown else ".".join(key[:2]))
        _, _, contradictions = _try(model, _without(data, wrong))
    for keys, text in contradictions:
        if not any(key in wrong or key.split(".")[0] in wrong for key in keys):
            written = next((key for key in keys if tuple(key.split(".")) in layer.places), keys[0])
            problems.append(f"{layer.place(tuple(written.split('.')))}: {keys[0]}: {text}")
    if problems or result is None:
        raise RecipeError("\n".join(problems))
    return result


def _try(model: type[M], data: dict[Any, Any]) -> tuple[M | None, list[Any], list[tuple[tuple[str, ...], str]]]:
    """Return the model, or pydantic's list of wrong values, or the contradictions between right ones."""
    try:
        return model.model_validate(data), [], []
    except ValidationError as error:
        errors = error.errors()
    cause = errors[0].get("ctx", {}).get("error")
    return (None, [], cause.problems) if isinstance(cause, ContradictionError) else (None, errors, [])


def _without(data: Mapping[Any, Any], wrong: set[str]) -> dict[Any, Any]:
    """Return ``data`` without the sections and keys in ``wrong``."""
    return {
        section: {key: value for key, value in content.items() if f"{section}.{key}" not in wrong}
        if isinstance(content, dict)
        else content
        for section, content in data.items()
        if str(section) not in wrong
    }


def _sections(model: type[BaseModel]) -> Sections:
    """Return the fields of ``model`` that are models, or unions of models, themselves."""
    sections: Sections = {}
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        if all(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
            sections[name] = kinds
    return sections


def _explain(error: Any, layer: Layer, model: type[BaseModel], sections: Sections) -> tuple[tuple[str, ...], str]:
    """Return the key of one pydantic error and its line."""
    kind, value, key = error["type"], error["input"], tuple(str(part) for part in error["loc"])
    owners = sections.get(key[0], ()) if len(key) > 1 else (model,)
    if len(owners) > 1:  # pydantic puts the name of the kind between the section and its key
        owners = tuple(owner for owner in owners if _kind_name(owner) == key[1])
        key = (key[0], *key[2:])
    if kind.startswith("union_tag"):
        value, key = value["name"], (key[0], "name")
    start = f"{layer.place(key)}: {'.'.join(key)}: got"
    if kind == "extra_forbidden":
        allowed = ", ".join(owners[0].model_fields)
        return key, f"{start} an unknown key; expected one of {allowed}. {_unknown_hint(key, owners[0], sections)}"
    if kind in _EXPECTED:
        rule = _EXPECTED[kind].format(**error.get("ctx", {}))
    else:
        rule = re.sub(r"^\w+ should (be|have) ", "", error["msg"])
    if kind == "value_error":  # the rule brings its own advice
        return key, f"{start} {_show(value)}; expected {rule}."
    hint = _value_hint(kind, value, rule, key, owners, sections)
    return key, f"{start} {_show(value)}; expected {rule}. {hint}"


def _value_hint(
    kind: str, value: Any, rule: str, key: tuple[str, ...], owners: tuple[type[BaseModel], ...], sections: Sections
) -> str:
    """Say what to do about a value that is not allowed."""
    is_choice = kind in ("literal_error", "union_tag_invalid")
    if isinstance(value, bool) and (is_choice or kind == "string_type"):
        return _TRUTH_HINT
    if is_choice:
        nearest = _nearest(value, re.findall(r"'([^']+)'", rule)) if isinstance(value, str) else None
        return f"Did you mean {nearest}?" if nearest else "Choose one of them."
    if kind == "invalid_key" or (kind == "string_type" and value is not None):
        return "Put quotes around it."
    if len(key) == 1 and (kinds := sections.get(key[0])):
        is_name = len(kinds) > 1 and value in map(_kind_name, kinds)
        example = f"name: {value}" if is_name else f"{next(iter(kinds[0].model_fields))}: ..."
        return f"Write {key[0]}: {{{example}}}, or leave {key[0]} out."
    field = owners[0].model_fields.get(key[-1]) if owners else None
    if field is None:
        return "Correct it."
    default = owners[0]().model_dump(mode="json")[key[-1]]
    return f"{field.description} Correct it, or leave it out for the default, {_show(default)}."


def _unknown_hint(key: tuple[str, ...], owner: type[BaseModel], sections: Sections) -> str:
    """Say where an unknown key belongs, or which known one is meant."""
    section, name = (key[0] if len(key) > 1 else ""), key[-1]
    if kinds := [_kind_name(kind) for kind in sections.get(section, ()) if name in kind.model_fields]:
        return f"It belongs to {section}.name {' or '.join(kinds)}: set that name, or remove the key."
    if homes := [home for home, kinds in sections.items() if any(name in kind.model_fields for kind in kinds)]:
        return f"It belongs under {' or '.join(homes)}."
    if nearest := _nearest(name, list(owner.model_fields)):
        return f"Did you mean {nearest}?"
    everywhere = {known: home for home, kinds in sections.items() for kind in kinds for known in kind.model_fields}
    if nearest := _nearest(name, list(everywhere)):
        return f"Did you mean {nearest} under {everywhere[nearest]}?"
    return "Remove it."


def _kind_name(kind: type[BaseModel]) -> str:
    return kind.model_fields["name"].default


def _nearest(word: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def _show(value: Any) -> str:
    """Return ``value`` as it is written in YAML, cut to one readable line."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
