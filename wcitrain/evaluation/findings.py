"""What a check of a model under attack found."""

from dataclasses import dataclass
from typing import Literal


class PreflightWarning(UserWarning):
    """A finding that may make the numbers wrong."""


@dataclass(frozen=True)
class Finding:
    """One finding: its name, how bad it is, and what was found and what to do.

    ``"error"``: the numbers would mean nothing. ``"warning"``: they may mislead.
    """

    name: str
    severity: Literal["error", "warning"]
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"
