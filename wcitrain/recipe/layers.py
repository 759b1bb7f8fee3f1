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
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from wcitrain.method import Choice, fields_of, nearest
from wcitrain.recipe.reading import Key, Layer, read_file, read_override, stop

log = logging.getLogger("wcitrain.recipe")


class Kind(NamedTuple):
    """The methods that a key chooses from, and the name of the default one."""

    choice: Choice
    default: str


Kinds = dict[Key, Kind]  # of the keys whose value is one of several methods; outer keys before inner ones


def kinds_of(model: type, around: Key = ()) -> Kinds:
    """Return the keys of a model, and of the methods in it, whose value is one of several methods."""
    kinds: Kinds = {}
    for name, field in fields_of(model).items():
        for choice in (part for part in field.metadata if isinstance(part, Choice)):
            key = (*around, name)
            kinds[key] = Kind(choice, choice.name_of(field.get_default(call_default_factory=True)))
            for method in choice.table.values():
                kinds |= kinds_of(method, key)
    return kinds


def lay_files(paths: Sequence[Path], problems: list[str]) -> list[Layer]:
    """Read recipe files and those their ``base`` keys lead to; return all layers, lowest first.

    Several files name the run together: ``cifar10`` and ``wci`` train ``cifar10-wci``.

    Raises:
        RecipeError: A file is missing, unreadable or not a YAML mapping, or the ``base`` keys form a circle.
    """
    layers: list[Layer] = []
    bases: list[str] = []  # names of what lies below
    names: list[Any] = []
    for path in paths:
        own: list[Any] = []
        for layer in _with_bases(path, problems):
            layers.append(layer)
            layers += _for_bases(layer, bases + own, problems)
            if "name" in layer.data:
                own.append(layer.data["name"])
        names += own[-1:]
        bases += own
    if len(names) > 1:
        wrong = next((name for name in names if not isinstance(name, str)), None)
        together = "-".join(names) if wrong is None else wrong
        layers.append(Layer({"name": together}, {("name",): "the files' names"}))
    return layers


def _for_bases(layer: Layer, names: Sequence[str], problems: list[str]) -> list[Layer]:
    """Take ``by_base`` out of a layer and return what it says for the bases below, as layers of their own."""
    own = layer.data.pop("by_base", {})
    here = f"{layer.place(('by_base',))}: by_base"
    is_right = isinstance(own, Mapping) and all(isinstance(name, str) for name in own)
    if not is_right or not all(isinstance(value, Mapping) for value in own.values()):
        rule = "sections for each base. Write by_base: {NAME: {...}}."
        problems.append(f"{here}: got {own!r}; expected {rule}")
        return []
    if any("name" in value for value in own.values()):
        problems.append(f"{here}: got a name; expected other keys: bases and methods name a run. Remove it.")
    if not set(own) & set(names):
        likely = {name: near for name in own if (near := nearest(name, [*map(str, names)], 0.8))}
        for name, near in likely.items():
            log.warning("%s: nothing is said for %s, which lies below; is %s meant?", here, near, name)
    layers = []
    for name in (name for name in names if name in own):
        places = {key[2:]: place for key, place in layer.places.items() if key[:2] == ("by_base", name)}
        layers.append(Layer(dict(own[name]), places))
    return layers


def _with_bases(
    path: Path, problems: list[str], asked_by: str = "", above: tuple[Path, ...] = ()
) -> list[Layer]:
    """Return a file and those its ``base`` keys lead to, lowest first; a path is relative to its file."""
    layer, above = read_file(path, asked_by, problems), (*above, path.resolve())
    base = layer.data.pop("base", None)
    if base is None:
        return [layer]
    asked_by = f"{layer.places['base',]}: base: "
    if not isinstance(base, str):
        stop(problems, f"{asked_by}got {base!r}; expected the path of one file. Write base: other.yaml.")
    if (path.parent / base).resolve() in above:
        rule = "a chain that ends. Remove a base."
        stop(problems, f"{asked_by}got {base!r}, which leads back to itself; expected {rule}")
    return [*_with_bases(path.parent / base, problems, asked_by, above), layer]


def read_overrides(overrides: Sequence[str], problems: list[str], kinds: Kinds) -> Layer:
    """Read settings such as ``"train.epochs=3"`` into one layer; a later one wins over an earlier one.

    Args:
        overrides: Dotted key, ``=``, value in YAML.
        problems: Gets a line for each setting that cannot be read; the others are still read.
        kinds: The keys whose value may be a name alone.
    """
    if isinstance(overrides, str):
        rule = f"a list of texts. Write [{overrides!r}]."
        raise TypeError(f"overrides: got the text {overrides!r}; expected {rule}")
    layer = Layer({}, {}, is_override=True)
    for override in overrides:
        if one := read_override(override, problems):
            for key, kind in kinds.items():  # perturbation=awp beside perturbation.gamma=0.1
                name = value_at(one.data, key)
                if name is None and key in one.places and kind.choice.can_be_none:
                    name = "none"
                if isinstance(name, str):
                    value_at(one.data, key[:-1])[key[-1]] = {"name": name}
            layer = Layer(_merged(layer.data, one.data), layer.places | one.places, is_override=True)
    return layer


def lay(below: Layer, above: Layer, kinds: Kinds) -> Layer:
    """Return ``above`` laid on ``below``."""
    data, places, added = _merged({}, below.data), below.places, _merged({}, above.data)
    for key, (choice, default) in kinds.items():
        old, new = _named(value_at(data, key)), _named(value_at(added, key))
        if old is None or new is None:
            continue
        name = old.get("name", default)
        if new.get("name", name) != name:
            method = choice.kind(new["name"])
            settings = choice.keys(method) if method else {}
            # Free arguments, kwargs, are another method's under the same key.
            shared = {one for one, field in settings.items() if get_origin(field.annotation) is not dict}
            kept = {one: value for one, value in old.items() if one in shared and one != "name"}
            places = {
                place: text
                for place, text in places.items()
                if place[: len(key)] != key or (len(place) > len(key) and place[len(key)] in kept)
            }
            if above.is_override:
                _say(".".join(key), {"name": name} | old, new, kept, list(settings))
            old = kept
        value_at(data, key[:-1])[key[-1]] = old
        value_at(added, key[:-1])[key[-1]] = new
    return Layer(_merged(data, added), places | above.places)


def named(layer: Layer, kinds: Kinds) -> Layer:
    """Return ``layer`` with every method as a mapping with its name."""
    data = _merged({}, layer.data)
    for key, kind in kinds.items():
        if (settings := _named(value_at(data, key))) is not None:
            value_at(data, key[:-1])[key[-1]] = {"name": kind.default} | settings
    return Layer(data, layer.places, layer.is_override)


def _say(key: str, old: dict[str, Any], new: dict[str, Any], kept: dict[str, Any], known: list[str]) -> None:
    """Tell what becomes of a method's settings when its name is changed on the command line."""

    def listed(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    parts = {
        "kept": listed({name: value for name, value in kept.items() if name not in new}),
        f"dropped, as {new['name']} has no such key": listed(
            {name: value for name, value in old.items() if name not in (*kept, "name")}
        ),
        "at the default": ", ".join(name for name in known if name not in (*kept, *new)),
    }
    text = "; ".join(f"{what}: {names}" for what, names in parts.items() if names)
    log.warning("%s.name: %s became %s; %s", key, old["name"], new["name"], text or "nothing else was set")


def _named(value: Any) -> dict[str, Any] | None:
    """Return a method as a mapping; a text is its name. None for anything else."""
    if isinstance(value, str):
        return {"name": value}
    return dict(value) if isinstance(value, Mapping) else None


def value_at(data: Any, key: Key) -> Any:
    """Return the value at a key, None where there is none."""
    for part in key:
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
