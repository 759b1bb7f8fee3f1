"""Build a recipe from settings laid on one another: files, what they say for a base, the command line.

    wcitrain train bases/cifar10.yaml methods/wci.yaml train.epochs=3

Mappings merge key by key; anything else, an empty mapping too, replaces what was there. When a higher layer
changes the ``name`` of a method, the settings that both methods have are kept and the others dropped. What a
method file says for one base alone stands under ``by_base``, by the name of the base.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from wcitrain.method import Choice, SettingError, fields_of, nearest, rule, show
from wcitrain.recipe.reading import Key, Layer, RecipeError, parse, read_file
from wcitrain.recipe.recipe import Recipe

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "not_here")  # pydantic's names, and Choice's


def load_recipe(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from files laid on one another, lowest first, and settings from the command line.

        load_recipe(["bases/cifar10.yaml", "methods/wci.yaml"], ["train.epochs=3"])

    Raises:
        RecipeError: The files or settings are wrong; the message has a line for each problem, such as
            ``<file:line>: <dotted key>: got <value>; expected <rule>. <what to do>.``
    """
    paths = [path] if isinstance(path, str | Path) else path
    return _build([*_read_files([Path(one) for one in paths]), _read_overrides(overrides)])


def recipe_from_dict(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Build a recipe from nested mappings; ``overrides`` and errors are those of ``load_recipe``.

    The keys ``base`` and ``by_base`` are for files only.
    """
    return _build([Layer(data), _read_overrides(overrides)])


def _build(layers: Sequence[Layer]) -> Recipe:
    """Lay ``layers`` on one another, lowest first, and build the recipe, or say all that is wrong."""
    layer = reduce(_lay, layers, Layer({}))
    for key, (_, default) in CHOICES.items():
        if isinstance(settings := _value_at(layer.data, key), dict):
            _value_at(layer.data, key[:-1])[key[-1]] = {"name": default} | settings
    problems = list(layer.problems)
    try:
        recipe = Recipe.model_validate(layer.data)
    except ValidationError as error:
        problems += [_line(layer, one) for one in error.errors()]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


# ---- the layers --------------------------------------------------------------------------------------------


def _read_files(paths: Sequence[Path]) -> list[Layer]:
    """Read recipe files and those their ``base`` keys lead to; return all layers, lowest first.

    Several files name the run together: ``cifar10`` and ``wci`` train ``cifar10-wci``. Bases, which say the
    data, come first, and two methods that are one choice (``wci`` and ``awp``) are refused.
    """
    layers: list[Layer] = []
    bases: list[str] = []  # names of what lies below
    names: list[str] = []
    chosen: dict[Key, tuple[str, Path]] = {}  # by the method files so far
    has_base = False
    for path in paths:
        own: list[str] = []
        stack = _with_bases(path)
        is_base = any("data" in layer.data for layer in stack)
        if is_base and path != paths[0] and not has_base:
            rule = "bases before methods, which may depend on them. Change the order."
            raise RecipeError(f"{path}: got a base after a method; expected {rule}")
        has_base = has_base or is_base
        for key in [key for key in CHOICES if len(key) == 1 and not is_base]:
            values = [value for layer in stack if (value := _value_at(layer.data, key)) is not None]
            named = [one.get("name") if isinstance(one, Mapping) else one for one in values]
            for name in (one for one in named if isinstance(one, str)):
                before, other = chosen.setdefault(key, (name, path))
                if before != name and other != path:
                    text = f"got {name}, and {before} by {other}; expected one. Leave one of the two out."
                    raise RecipeError(f"{path}: {'.'.join(key)}: {text}")
        for layer in stack:
            layers += [layer, *_for_bases(layer, bases + own)]
            own += [str(layer.data["name"])] if "name" in layer.data else []
        names += own[-1:]
        bases += own
    return [*layers, Layer({"name": "-".join(names)})] if len(names) > 1 else layers


def _with_bases(path: Path | None) -> list[Layer]:
    """Return a file and those its ``base`` keys lead to, lowest first; a path is relative to its file."""
    layers: list[Layer] = []
    seen: set[Path] = set()
    while path:
        seen.add(path.resolve())
        layer = read_file(path)
        base = layer.data.pop("base", None)
        if base is not None and (not isinstance(base, str) or (path.parent / base).resolve() in seen):
            rule = "the path of one file, which does not lead back here. Correct it."
            raise RecipeError(f"{layer.place(('base',))}: base: got {base!r}; expected {rule}")
        layers = [layer, *layers]
        path = path.parent / base if base else None
    return layers


def _for_bases(layer: Layer, names: Sequence[str]) -> list[Layer]:
    """Take ``by_base`` out of a layer and return what it says for the bases below, as layers of their own."""
    own = layer.data.pop("by_base", {})
    if not isinstance(own, Mapping) or not all(isinstance(value, Mapping) for value in own.values()):
        rule = "sections for each base. Write by_base: {NAME: {...}}."
        layer.problems.append(f"{layer.place(('by_base',))}: by_base: got {own!r}; expected {rule}")
        return []
    layers = []
    for name in names:
        if name in own:
            places = {key[2:]: place for key, place in layer.places.items() if key[:2] == ("by_base", name)}
            layers.append(Layer(own[name], places))
    return layers


def _read_overrides(overrides: Sequence[str]) -> Layer:
    """Read settings such as ``"train.epochs=3"`` into one layer; a later one wins over an earlier one."""
    whole = Layer({})
    for override in overrides:
        name, equals, text = override.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        try:
            if not equals or not all(key):
                rule = "section.key=value. Write seed=3."
                raise RecipeError(f"command line: got {override!r}; expected {rule}")
            layer = parse(text, lambda line: "command line", key)
        except RecipeError as error:
            whole.problems.append(str(error))
            continue
        value = layer.data
        for part in reversed(key):
            value = {part: value}
        whole.problems.extend(layer.problems)
        whole.places.update({key[:end]: "command line" for end in range(1, len(key) + 1)} | layer.places)
        whole.data.update(_laid(whole.data, value, (), None))
    return whole


# ---- laying one on the other -------------------------------------------------------------------------------


def _choice(metadata: Sequence[Any]) -> Choice | None:
    return next((part for part in metadata if isinstance(part, Choice)), None)


def _all_keys(fields: Mapping[str, Any], around: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every key, and those inside it, with its field; outer keys come before inner ones."""
    for name, field in fields.items():
        key, choice = (*around, name), _choice(field.metadata)
        yield key, field
        for kind in choice.table.values() if choice else [field.annotation]:
            if hasattr(kind, "__pydantic_fields__"):
                yield from _all_keys(choice.keys(kind) if choice else fields_of(kind), key)


KEYS = list(_all_keys(fields_of(Recipe)))
CHOICES = {  # keys whose value is one of several methods, and the name of the default one
    key: (choice, choice.name_of(field.get_default(call_default_factory=True, validated_data={})))
    for key, field in KEYS
    if (choice := _choice(field.metadata))
}


def _lay(below: Layer, above: Layer) -> Layer:
    """Return ``above`` laid on ``below``."""
    gone: list[Key] = []
    data = _laid(below.data, above.data, (), gone)
    kept = {key: place for key, place in below.places.items() if not any(key[: len(k)] == k for k in gone)}
    return Layer(data, kept | above.places, below.problems + above.problems)


def _laid(below: Any, above: Any, key: Key, gone: list[Key] | None) -> Any:
    """Return the value ``above`` of ``key`` laid on the one ``below``; a method becomes a mapping.

    Keys of a method that another replaces are dropped and added to ``gone``, unless it is None.
    """
    choice, default = CHOICES.get(key, (None, ""))
    if choice and (isinstance(above, str) or (above is None and choice.can_be_none)):
        above = {"name": "none" if above is None else above}
    if not isinstance(above, Mapping):
        return above
    below = below if isinstance(below, Mapping) and (above or not key) else {}
    old = below.get("name", default)
    if gone is not None and choice and above.get("name", old) != old:
        kind = choice.kind(above["name"])
        settings = choice.keys(kind) if kind else {}
        # Free arguments, kwargs, are another method's under the same key.
        shared = [one for one, field in settings.items() if get_origin(field.annotation) is not dict]
        gone += [(*key, one) for one in ("name", *below) if one not in shared]
        below = {one: below[one] for one in below if one in shared}
    return below | {one: _laid(below.get(one), value, (*key, one), gone) for one, value in above.items()}


def _value_at(data: Any, key: Key) -> Any:
    """Return the value at a key, None where there is none."""
    for part in key:
        if isinstance(data, list) and part.isdigit():
            data = data[int(part)]
        else:
            data = data.get(part) if isinstance(data, Mapping) else None
    return data


# ---- what is wrong with a single setting -------------------------------------------------------------------


def _line(layer: Layer, error: Any) -> str:
    """Return the line for one pydantic error."""
    kind, value, key = error["type"], error["input"], tuple(str(part) for part in error["loc"])
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SettingError):  # of a section, or of the whole
        key = (*key, *cause.key.split("."))
        return f"{layer.place(key)}: {'.'.join(key)}: {cause.text}"
    if kind == "choice_name":
        key, value = (*key, "name"), error["ctx"]["name"]
    fields = _fields(layer.data, key[:-1])
    meaning = getattr(fields.get(key[-1]), "description", None) or ""
    if kind in UNKNOWN:
        text = f"got an unknown key; expected one of {', '.join(fields)}. {_right_place(key, list(fields))}"
    elif kind == "missing":
        text = f"got nothing; expected a value. {meaning} Set it."
    else:
        text = f"got {show(value)}; expected {rule(error)}. {meaning} Correct it.".replace("  ", " ")
    return f"{layer.place(key)}: {'.'.join(key)}: {text}"


def _right_place(key: Key, known: list[str]) -> str:
    """Say which key an unknown one may mean: of a near name, or of the same name elsewhere."""
    if near := nearest(key[-1], known):
        return f"Did you mean {near}?"
    homes = {".".join(other[:-1]) or "no section": None for other, _ in KEYS if other[-1] == key[-1]}
    if (own := ".".join(key[:-1])) in homes:
        return f"It belongs to another {own}.name."
    return f"It belongs under {' or '.join(homes)}." if homes else "Remove it."


def _fields(data: Any, section: Key) -> dict[str, Any]:
    """Return the keys of a section as it is now, with their fields; the name of a method first."""
    fields: dict[str, Any] = fields_of(Recipe)
    annotation: Any = Recipe
    for end, part in enumerate(section, 1):
        if part.isdigit() and (item := get_args(annotation)):  # of a list of Annotated[class, ...]
            annotation, *metadata = get_args(item[0]) or item
        else:
            field = fields.get(part)
            annotation, metadata = getattr(field, "annotation", None), getattr(field, "metadata", [])
        kind, choice = annotation, _choice(metadata)
        if choice:
            settings = _value_at(data, section[:end])
            kind = choice.kind(settings.get("name") if isinstance(settings, Mapping) else settings)
        fields = {"name": None} if choice else {}
        if hasattr(kind, "__pydantic_fields__"):
            fields |= choice.keys(kind) if choice else fields_of(kind)
    return fields
