"""Numbers and lists in words: durations, memory, counts, names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wcitrain.report.runs import MISSING


def duration(seconds: float) -> str:
    """Return "42 s", "7 min 37 s" or "2 h 05 min"."""
    if not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s"
        if whole < 3600
        else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def memory(megabytes: float) -> str:
    """Return "850 MB" or "1.28 GB"."""
    if not math.isfinite(megabytes):
        return MISSING
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.2f} GB"


def count(number_: int, noun: str) -> str:
    """Return "1 run" or "3 runs"."""
    return f"{number_} {noun}{'s' * (number_ != 1)}"


def few(names: Sequence[str], most: int = 3) -> str:
    """Return the names, or the first of them and the number of the others."""
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
