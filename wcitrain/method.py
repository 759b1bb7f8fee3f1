"""What a method is: one frozen class, the Python constructor and the recipe section alike.

    @method
    class AWP(Ascent):
        gamma: Positive = setting(0.01, "Perturbation norm over weight norm, for a layer.")
        label = "AWP γ={gamma:g}"

``AWP(0.02)`` and, in YAML, ``{name: awp, gamma: 0.02}`` have the same defaults and checks. A room lists its
methods in one literal table of names; `Choice` makes a recipe key of such a table.
"""

import difflib
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs, PydanticCustomError, core_schema

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Method:
    """Base of the methods: ``str`` gives the label, filled with the settings, for tables and figures."""

    label: ClassVar[str] = ""
    source: ClassVar[str] = ""  # of its definition, such as "Wu et al., arXiv 2004.05884, eq. 9 to 12"
    cost: ClassVar[str] = ""  # in passes, such as "1 forward and 1 backward a step"

    def __str__(self) -> str:
        return (self.label or type(self).__name__).format(**vars(self))


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def method(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass that checks its settings: ValueError, ``AWP.gamma: got -1; ...``."""
    made: Any = pydantic_dataclass(cls, frozen=True, config=STRICT)
    init = made.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise ValueError("\n".join(_line(cls, one) for one in error.errors())) from None

    made.__init__ = __init__
    return made


class SettingError(ValueError):
    """Settings of one method that are fine alone and wrong together; ``key`` is the one to blame first."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key}: {text}")
        self.key, self.text = key, text


def setting(default: Any, meaning: str) -> Any:
    """Return the field of a setting: its default, or the class to make one of, and what it means."""
    kind = "default_factory" if isinstance(default, type) else "default"
    return Field(**{kind: default}, description=meaning)


def refuse(key: str, text: str) -> NoReturn:
    """Refuse a setting in ``__post_init__``; ``text`` is ``got ...; expected ... . <what to do>.``"""
    raise SettingError(key, text)


@dataclass(frozen=True, eq=False)
class Choice:
    """A recipe key whose value is one of several methods: ``{name: awp, gamma: 0.02}``, or ``awp`` alone."""

    table: Mapping[str, type]
    can_be_none: bool = False  # {name: none} stands for None
    without: tuple[str, ...] = ()  # settings that the recipe says elsewhere: no keys here
    fallback: type | None = None  # a method for all other names, which it takes as its setting "name"

    def kind(self, name: object) -> type | None:
        """Return the method called ``name``."""
        return self.table.get(name, self.fallback) if isinstance(name, str) else None

    def keys(self, kind: type) -> dict[str, Any]:
        """Return the settings of a method that are keys of the recipe, by name."""
        return {name: field for name, field in fields_of(kind).items() if name not in self.without}

    def name_of(self, value: Any) -> str:
        """Return the name of a method; "none" for None."""
        if value is None:
            return "none"
        names = (name for name, kind in self.table.items() if type(value) is kind)
        return next(names, getattr(value, "name", ""))

    def read(self, value: Any) -> Any:
        """Return the method that a value of a recipe, or of a constructor, stands for."""
        if (value is None and self.can_be_none) or type(value) in (*self.table.values(), self.fallback):
            return value
        if not isinstance(value, str | Mapping):
            raise PydanticCustomError("choice_type", "a mapping with a name")
        settings = {"name": value} if isinstance(value, str) else dict(value)
        name = settings.pop("name", None)
        kind = self.kind(name)
        if kind is None and not (name == "none" and self.can_be_none):
            names = [*["none"] * self.can_be_none, *self.table]
            names += [f"a name for {self.fallback.__name__}"] if self.fallback else []
            known = {"names": ", ".join(names), "name": name}
            raise PydanticCustomError("choice_name", "one of {names}", known)
        if wrong := [key for key in settings if kind is None or key in self.without]:
            unknown = PydanticCustomError("not_here", "a setting it has")
            errors: Any = [{"type": unknown, "loc": (str(key),), "input": settings[key]} for key in wrong]
            raise ValidationError.from_exception_data(str(name), errors)
        if kind is None:
            return None
        return construct(kind, settings | {"name": name} if kind is self.fallback else settings)

    def write(self, value: Any) -> dict[str, Any]:
        """Return the value as a recipe has it: its name, then its settings."""
        settings = {} if value is None else TypeAdapter(type(value)).dump_python(value, mode="json")
        own = {key: one for key, one in settings.items() if key not in (*self.without, "name")}
        return {"name": self.name_of(value), **own}

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return _plain_schema(self.read, self.write)


class Nested:
    """A setting that is a small class of settings itself: ``Annotated[StrengthSchedule, Nested()]``."""

    def __get_pydantic_core_schema__(self, source: type, handler: Any) -> Any:
        def read(value: Any) -> Any:
            if isinstance(value, source):
                return value
            if not isinstance(value, Mapping):
                raise PydanticCustomError("dataclass_type", "a mapping of keys")
            return construct(source, value)

        return _plain_schema(read, functools.partial(TypeAdapter(source).dump_python, mode="json"))


def _plain_schema(read: Callable[[Any], Any], write: Callable[[Any], Any]) -> Any:
    serialization = core_schema.plain_serializer_function_ser_schema(write)
    return core_schema.no_info_plain_validator_function(read, serialization=serialization)


def construct(kind: type[T], settings: Mapping[str, Any]) -> T:
    """Return ``kind(**settings)``; what is wrong is pydantic's ``ValidationError``, with places."""
    made = object.__new__(kind)
    validator: Any = kind.__pydantic_validator__  # type: ignore[attr-defined]
    validator.validate_python(ArgsKwargs((), dict(settings)), self_instance=made)
    return made


def fields_of(kind: type) -> dict[str, Any]:
    """Return pydantic's descriptions of a method's or section's settings, by name."""
    return dict(kind.__pydantic_fields__)  # type: ignore[attr-defined]


_EXPECTED = {  # rules that read better than pydantic's; the others are its own "Input should be <rule>"
    "model_type": "a mapping of keys",
    "dataclass_type": "a mapping of keys",
    "tuple_type": "a list",
    "invalid_key": "a key that is text",
    "invalid-json-value": "plain YAML data: texts, numbers, lists, mappings",
    "value_error": "{error}",
    "unexpected_keyword_argument": "a setting it has",
    "missing": "a value",
    "unexpected_positional_argument": "fewer arguments",
}


def rule(error: Any) -> str:
    """Return what pydantic expected, in words that follow "expected"."""
    if error["type"] in _EXPECTED:
        return _EXPECTED[error["type"]].format(**error.get("ctx", {}))
    text = re.sub(r"^\w+ should (be|have) ", "", error["msg"])
    return f"a number {text}" if text.startswith(("less ", "greater ")) else text


def nearest(word: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """Return the known word closest to ``word``, if any is close."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=cutoff)), None)


def show(value: Any) -> str:
    """Return ``value`` as it is written in YAML, cut to one readable line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(cls: type, error: Any) -> str:
    """Return one line for one of pydantic's errors in a constructor."""
    cause, fields, loc = error.get("ctx", {}).get("error"), fields_of(cls), list(error["loc"])
    if loc and loc[0] in range(len(fields)):  # a positional argument
        loc[0] = list(fields)[loc[0]]
    place = ".".join(map(str, [cls.__name__, *loc]))
    if isinstance(cause, SettingError):
        return f"{place}.{cause.key}: {cause.text}"
    got = "nothing" if error["type"] == "missing" else repr(error["input"])
    advice = fields[loc[0]].description if loc and loc[0] in fields else f"It has {', '.join(fields)}."
    return f"{place}: got {got}; expected {rule(error)}. {advice or 'Correct it.'}"


def fraction_text(value: float) -> str | float:
    """Return ``"8/255"`` for exactly 8/255, and any other number, whole ones and 0.2 too, as it is."""
    numerator = round(value * 255)
    is_short = float(f"{value:.3g}") == value
    return f"{numerator}/255" if value < 100 and not is_short and numerator / 255 == value else value


def _read_fraction(value: Any) -> Any:
    """Turn a text such as "8/255" or "1.5/255" into the nearest float; leave the rest to the next check."""
    if not isinstance(value, str):
        return value
    try:
        numerator, denominator = value.split("/") if "/" in value else (value, "1")
        return float(Fraction(numerator) / Fraction(denominator))
    except (ValueError, ZeroDivisionError, OverflowError):  # place, key and value are put before this text
        raise ValueError("a finite number such as 8/255 or 0.03. Write a share of the pixel range") from None


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
InnerShare = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
_FractionText = PlainSerializer(fraction_text, return_type=str | float, when_used="json")
Radius = Annotated[float, BeforeValidator(_read_fraction), Field(ge=0), _FractionText]  # in pixels of [0, 1]
StepSize = Annotated[float, BeforeValidator(_read_fraction), Field(gt=0), _FractionText]
