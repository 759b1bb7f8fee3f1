"""``Measurement``: the value of one measure with its error, and how it was taken."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wcitrain.measures.wci import with_error


@dataclass(frozen=True)
class Measurement:
    """One number about a model.

    Args:
        name: Of the measure, such as ``"average_flatness"``.
        value: The number; may be infinite, NaN only where there is no value (``settings`` say why).
        stderr: Its standard error over examples, draws or both, as the measure documents; NaN where nothing
            is random or the error is unknown.
        num_examples: Examples behind it; 0 where no data is needed.
        settings: How it was taken, for humans: ``"xi 0.5, 10 draws, PGD-20 linf 8/255"``.
        parts: Further numbers by name, such as the layers' contributions.
    """

    name: str
    value: float
    stderr: float = math.nan
    num_examples: int = 0
    settings: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return "average_flatness 1.21 ± 0.04 (xi 0.5, 10 draws, PGD-20 linf 8/255, 1000 examples)"."""
        number = with_error(self.value, self.stderr) if math.isfinite(self.stderr) else f"{self.value:.4g}"
        notes = [self.settings, f"{self.num_examples} examples" if self.num_examples else ""]
        context = ", ".join(note for note in notes if note)
        return f"{self.name} {number}" + (f" ({context})" if context else "")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is not finite becomes None."""
        numbers = {"value": self.value, "stderr": self.stderr}
        return {
            "name": self.name,
            **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
            "num_examples": self.num_examples,
            "settings": self.settings,
            "parts": {key: value if math.isfinite(value) else None for key, value in self.parts.items()},
        }
