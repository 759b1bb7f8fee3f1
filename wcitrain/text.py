"""Numbers and tables as text: in the terminal, in figures and on the page alike."""

import math
from collections.abc import Iterable, Sequence


def with_error(value: float, error: float) -> str:
    """Return "163.2 ± 5.1": the error with two significant digits, the value with as many decimals."""
    if not (math.isfinite(error) and math.isfinite(value)) or error <= 0:
        return f"{value:.4g} ± {error:.2g}"
    exponent = math.floor(math.log10(error))
    if exponent < -4 or abs(value) >= 1e6:  # too small or too large for plain decimals
        digits = max(0, math.floor(math.log10(max(abs(value), error))) - exponent + 1)
        return f"{value:.{digits}e} ± {error:.1e}"
    decimals = max(0, 1 - exponent)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of columns two blanks apart: the first to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def name_some(names: Iterable[object], most: int = 5) -> str:
    """Return the first few of many names: "cat, dog (+3)"."""
    texts = [str(name) for name in names]
    more = f" (+{len(texts) - most})" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
