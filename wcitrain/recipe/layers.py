"""Lay settings on one another: files, what they say for a base, the command line.

    wcitrain train bases/cifar10.yaml methods/wci.yaml train.epochs=3

Mappings merge key by key; anything else, an empty mapping too, replaces what was there. When a higher layer
changes the ``name`` of a method, the settings that both methods have are kept and the others dropped. What a
method file says for one base alone stands under ``by_base``:

    augment: {policy: cutout, cutout_size: 14}
    by_base:
      cifar10-small: {augment: {cutout_size: 7}}      # by the name of the base
"""

import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from wcitrain.method import Choice, fields_of, nearest
from wcitrain.recipe.fields import RecipeFields
from wcitrain.recipe.reading import COMMAND_LINE, Key, Layer, RecipeError, read_file, read_override

log = logging.getLogger("wcitrain.recipe")


class Kind(NamedTuple):
    """The methods that a key chooses from, and the name of the default one."""

    choice: Choice
    default: str


ITEM = "*"  # stands for any number in a key: for any item of a list


def _kinds_of(model: type, around: Key = ()) -> dict[Key, Kind]:
    """Return the keys of a model, and of what is inside it, whose value is one of several methods."""
    kinds: dict[Key, Kind] = {}
    for name, field in fields_of(model).items():
        key = (*around, name)
        items = [((*key, ITEM), get_args(item)) for item in get_args(field.annotation)]
        for place, parts in [(key, field.metadata), *items]:
            for choice in (part for part in parts if isinstance(part, Choice)):
                default = field.get_default(call_default_factory=True)
                kinds[place] = Kind(choice, choice.name_of(default) if place == key else "")
                for method in choice.table.values():
                    kinds |= _kinds_of(method, place)
        if hasattr(field.annotation, "__pydantic_fields__"):
            kinds |= _kinds_of(field.annotation, key)
    return kinds


def kind_at(key: Key) -> Kind | None:
    """Return the methods that a key, or an item of a list, chooses from."""
    return KINDS.get(tuple(ITEM if part.isdigit() else part for part in key))


KINDS = _kinds_of(RecipeFields)  # outer keys before inner ones


# ---- the layers --------------------------------------------------------------------------------------------


def read_files(paths: Sequence[Path]) -> list[Layer]:
    """Read recipe files and those their ``base`` keys lead to; return all layers, lowest first.

    Several files name the run together: ``cifar10`` and ``wci`` train ``cifar10-wci``.

    Raises:
        RecipeError: A file is missing, unreadable or not a YAML mapping, or the ``base`` keys form a circle.
    """
    layers: list[Layer] = []
    bases: list[Any] = []  # names of what lies below
    names: list[Any] = []
    for path in paths:
        own: list[Any] = []
        for layer in _with_bases(path):
            layers += [layer, *_for_bases(layer, bases + own)]
            if "name" in layer.data:
                own.append(layer.data["name"])
        names += own[-1:]
        bases += own
    if len(names) > 1:
        wrong = next((name for name in names if not isinstance(name, str)), None)
        together = "-".join(names) if wrong is None else wrong
        layers.append(Layer({"name": together}, {("name",): "the files' names"}))
    return layers


def _with_bases(path: Path, asked_by: str = "", above: tuple[Path, ...] = ()) -> list[Layer]:
    """Return a file and those its ``base`` keys lead to, lowest first; a path is relative to its file."""
    layer, above = read_file(path, asked_by), (*above, path.resolve())
    base = layer.data.pop("base", None)
    if base is None:
        return [layer]
    asked_by = f"{layer.places['base',]}: base: "
    if not isinstance(base, str):
        raise RecipeError(f"{asked_by}got {base!r}; expected the path of one file. Write base: other.yaml.")
    if (path.parent / base).resolve() in above:
        rule = "a chain that ends. Remove a base."
        raise RecipeError(f"{asked_by}got {base!r}, which leads back to itself; expected {rule}")
    return [*_with_bases(path.parent / base, asked_by, above), layer]


def _for_bases(layer: Layer, names: Sequence[Any]) -> list[Layer]:
    """Take ``by_base`` out of a layer and return what it says for the bases below, as layers of their own."""
    own = layer.data.pop("by_base", {})
    here = f"{layer.place(('by_base',))}: by_base"
    is_right = isinstance(own, Mapping) and all(isinstance(name, str) for name in own)
    if not is_right or not all(isinstance(value, Mapping) for value in own.values()):
        rule = "sections for each base. Write by_base: {NAME: {...}}."
        layer.problems.append(f"{here}: got {own!r}; expected {rule}")
        return []
    if any("name" in value for value in own.values()):
        rule = "other keys: bases and methods name a run. Remove it."
        layer.problems.append(f"{here}: got a name; expected {rule}")
    for name in () if set(own) & set(names) else own:
        if near := nearest(name, [*map(str, names)], 0.8):
            log.warning("%s: nothing is said for %s, which lies below; is %s meant?", here, near, name)
    layers = []
    for name in (name for name in names if name in own):
        places = {key[2:]: place for key, place in layer.places.items() if key[:2] == ("by_base", name)}
        layers.append(Layer(dict(own[name]), places))
    return layers


def read_overrides(overrides: Sequence[str]) -> Layer:
    """Read settings such as ``"train.epochs=3"`` into one layer; a later one wins over an earlier one."""
    if isinstance(overrides, str):
        rule = f"a list of texts. Write [{overrides!r}]."
        raise TypeError(f"overrides: got the text {overrides!r}; expected {rule}")
    return reduce(_joined, (_with_mappings(read_override(override)) for override in overrides), Layer({}))


# ---- laying one on the other -------------------------------------------------------------------------------


def lay_all(layers: Sequence[Layer]) -> Layer:
    """Return ``layers`` laid on one another, lowest first, with every method a mapping with its name."""
    layer = reduce(_lay, map(_with_mappings, layers), Layer({}))
    for key, kind in KINDS.items():
        if isinstance(settings := value_at(layer.data, key), dict):
            value_at(layer.data, key[:-1])[key[-1]] = {"name": kind.default} | settings
    return layer


def _lay(below: Layer, above: Layer) -> Layer:
    """Return ``above`` laid on ``below``."""
    data, places = _merged({}, below.data), below.places
    for key, (choice, default) in KINDS.items():
        old, new = value_at(data, key), value_at(above.data, key)
        if not (isinstance(old, Mapping) and isinstance(new, Mapping) and "name" in new):
            continue
        old_name, name = old.get("name", default), new["name"]
        if name == old_name:
            continue
        method = choice.kind(name)
        settings = choice.keys(method) if method else {}
        # Free arguments, kwargs, are another method's under the same key.
        shared = [one for one, field in settings.items() if get_origin(field.annotation) is not dict]
        kept = {one: value for one, value in old.items() if one in shared and one != "name"}
        dropped = {one: value for one, value in old.items() if one not in (*shared, "name")}
        if above.place((*key, "name")) == COMMAND_LINE:
            lists = {"kept": {one: kept[one] for one in kept if one not in new}, "dropped": dropped}
            texts = []
            for what, those in lists.items():
                listed = ", ".join(f"{one}={value}" for one, value in those.items())
                texts += [f"{what}: {listed}"] if those else []
            what = "; ".join(texts) or "nothing else was set"
            log.warning("%s.name: %s became %s; %s", ".".join(key), old_name, name, what)
        value_at(data, key[:-1])[key[-1]] = kept
        gone = {(*key, "name"), *((*key, one) for one in dropped)}
        places = {one: place for one, place in places.items() if one[: len(key) + 1] not in gone}
    return _joined(Layer(data, places, below.problems), above)


def _joined(below: Layer, above: Layer) -> Layer:
    """Return one layer on another, methods like any mapping."""
    data, problems = _merged(below.data, above.data), below.problems + above.problems
    return Layer(data, below.places | above.places, problems)


def _with_mappings(layer: Layer) -> Layer:
    """Return ``layer`` with a mapping for every method that is given by its name alone, or as null."""
    data = _merged({}, layer.data)
    for key, (choice, _) in KINDS.items():
        around = value_at(data, key[:-1])
        if isinstance(around, dict) and key[-1] in around:
            value = around[key[-1]]
            name = "none" if value is None and choice.can_be_none else value
            if isinstance(name, str):
                around[key[-1]] = {"name": name}
    return Layer(data, layer.places, layer.problems)


def value_at(data: Any, key: Key) -> Any:
    """Return the value at a key, None where there is none."""
    for part in key:
        if isinstance(data, list) and part.isdigit():
            data = data[int(part)]
        else:
            data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new dict of ``below`` with ``above`` laid on it; the mappings in ``above`` are copied."""
    merged = dict(below)
    for key, value in above.items():
        inherited = merged.get(key)
        if isinstance(value, Mapping):
            value = {} if not value else _merged(inherited if isinstance(inherited, Mapping) else {}, value)
        merged[key] = value
    return merged
