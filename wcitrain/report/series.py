"""Numbers against epochs: what the PNG figures and the page draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from wcitrain.report.runs import Row, Run, number

# An axis is logarithmic when its largest value exceeds its smallest by more than this factor.
LOG_RATIO = 30.0


def spans_decades(values: Iterable[float]) -> bool:
    """Whether the values are better read on a logarithmic axis; never when one is zero or negative."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > LOG_RATIO * min(finite)


def series(runs: Sequence[Run], key: str) -> tuple[list[int], np.ndarray]:
    """Return the epochs at which every run has a finite ``key``, and its values [runs, epochs]."""
    per_run = [
        {m["epoch"]: number(m, key) for m in run.metrics if math.isfinite(number(m, key))} for run in runs
    ]
    epochs = sorted(set.intersection(*(set(values) for values in per_run)))
    return epochs, np.array([[values[epoch] for epoch in epochs] for values in per_run])


def band(
    runs: Sequence[Run], key: str, stderr: str = ""
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Return epochs, mean, and the band around it: min to max over runs, for one run ± its ``stderr``."""
    epochs, values = series(runs, key)
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    if stderr and len(runs) == 1:
        errors = {m["epoch"]: number(m, stderr) for m in runs[0].metrics}
        error = np.nan_to_num([errors[epoch] for epoch in epochs], posinf=0.0)
        low, high = mean - error, mean + error
    return epochs, mean, low, high


def layer_series(row: Row) -> tuple[list[int], dict[str, np.ndarray]]:
    """Return the epochs and every layer's WCI at them, mean over the row's runs, NaN where one lacks it."""
    keys = dict.fromkeys(key for m in row.runs[0].metrics for key in m if is_layer(key))
    values: dict[str, dict[int, float]] = {}
    for key in keys:
        epochs, numbers = series(row.runs, key)
        values[key] = dict(zip(epochs, numbers.mean(0).tolist(), strict=True))
    every = sorted({epoch for numbers in values.values() for epoch in numbers})
    return every, {key: np.array([numbers.get(e, np.nan) for e in every]) for key, numbers in values.items()}


def is_layer(key: str) -> bool:
    """Whether a metric is the WCI of one layer."""
    return key.startswith("wci/") and key not in ("wci/total", "wci/total_stderr")


def short_names(keys: Sequence[str]) -> list[str]:
    """Drop what all the names share: the metric, a leading module path, a trailing ``.weight``."""
    paths = [key.removeprefix("wci/").removesuffix(".weight").split(".") for key in keys]
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return [".".join(path) for path in paths]
