"""The types of single values in a recipe: fractions of the pixel range, numbers with bounds, guarded choices.

A ``ValueError`` here reads ``<rule>. <what to do>.``; ``recipe_errors`` puts place, key and value before it.
"""

import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer


def fraction_text(value: float) -> str | float:
    """Return ``"8/255"`` for exactly 8/255, and any other number, whole ones too, as it is."""
    if value >= 100:  # beyond any radius
        return value
    numerator = round(value * 255)
    return f"{numerator}/255" if numerator % 255 and numerator / 255 == value else value


def _read_fraction(value: Any) -> Any:
    """Turn a text such as "8/255" or "1.5/255" into the nearest float; leave the rest to the check for a number."""
    if not isinstance(value, str):
        return value
    try:
        numerator, denominator = value.split("/") if "/" in value else (value, "1")
        return float(Fraction(numerator) / Fraction(denominator))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError("a finite number such as 8/255 or 0.03. Write it as a share of the pixel range") from None


def _read_number(value: Any) -> Any:
    """Turn "1e-4" into a float: PyYAML itself reads it as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _read_precision(value: Any) -> Any:
    """Accept the ``no`` that YAML 1.1 reads as false; refuse fp16 with its reason."""
    if value == "fp16":
        raise ValueError("'no' or 'bf16'. Differences of gradients overflow in fp16: use bf16")
    return "no" if value is False else value


def _check_auto(value: Any) -> Any:
    """Refuse the 0 and 1 that would pass for truth values."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError("true, false or 'auto'. Choose one of them")
    return value


def _check_folder_name(value: str) -> str:
    """Refuse names that are no plain folder name, such as ``a/b`` and ``..``."""
    if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("letters, digits, '-', '_' and '.' with at least one letter or digit. It names a folder")
    return value


Real = Annotated[float, BeforeValidator(_read_number)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
InnerShare = Annotated[Real, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
FolderName = Annotated[str, AfterValidator(_check_folder_name)]
_FractionText = PlainSerializer(fraction_text, return_type=str | float, when_used="json")
Fraction255 = Annotated[float, BeforeValidator(_read_fraction), Field(ge=0), _FractionText]
StepSize = Annotated[float, BeforeValidator(_read_fraction), Field(gt=0), _FractionText]
Precision = Annotated[Literal["no", "bf16"], BeforeValidator(_read_precision)]
AutoBool = Annotated[Literal[True, False, "auto"], BeforeValidator(_check_auto)]
