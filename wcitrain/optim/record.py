"""The wrapper's own numbers: running averages of the layers' traces and what they were made of.

They live in the base optimizer's first group under ``KEY``, so they survive every checkpoint path. An average
is Σ_k decay^(n−k) (1 − decay) t_k over the same sum of ones, without start-up bias.
"""

import math
from typing import Any

import torch
from torch import Tensor

from wcitrain.params import Layers

KEY = "regularizer"


def fresh(layers: Layers) -> dict[str, Any]:
    """Return the record before the first step."""
    names = ("trace_sum", "trace_weight", "num_estimates", "num_negative")
    zeros = {name: torch.zeros_like(layers.squared_norms()) for name in names}
    return {"layers": list(layers), "step": 0, "is_measured": False, **zeros}


def loaded(saved: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """Return a saved record with its tensors where the layers are; ValueError for other layers."""
    if saved["layers"] != list(layers):
        got = f"got averages of {len(saved['layers'])} other layers"
        raise ValueError(f"load_state_dict: {got}; expected these {len(layers)}. Was the choice changed?")
    like = layers.squared_norms()
    record = {k: v.to(like).clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
    if "memory" in saved:
        record["memory"] = [m.to(t).clone() for m, t in zip(saved["memory"], layers.tensors, strict=True)]
    return record


def fold(record: dict[str, Any], estimate: Tensor, decay: float) -> None:
    """Fold one estimate of all traces [L] into the averages, in place."""
    is_good = torch.isfinite(estimate)
    kept = torch.where(is_good, decay, 1.0)
    for key, value in (("trace_sum", estimate), ("trace_weight", torch.ones_like(estimate))):
        record[key] = kept * record[key].to(estimate) + (1 - kept) * torch.where(is_good, value, 0.0)
    record["num_estimates"] = record["num_estimates"].to(estimate) + is_good
    record["num_negative"] = record["num_negative"].to(estimate) + (estimate < 0)
    record["is_measured"] = True


def metrics(record: dict[str, Any], layers: Layers, traces: Tensor | None) -> dict[str, float]:
    """Return what ``RegularizedOptimizer.metrics`` says."""
    columns, numbers = {"frobenius": layers.squared_norms()}, {}
    if traces is not None:
        index = (columns["frobenius"] * traces.nan_to_num().clamp_min(0)).sqrt()
        columns |= {"curvature/trace": traces, "wci": index}
        numbers["wci/total"] = float(index.sum())
        share = record["num_negative"].sum() / record["num_estimates"].sum().clamp_min(1)
        numbers["curvature/negative"] = float(share)
    for name in ("relative_size", "lambda"):
        value = record.get(name)
        if value is not None and not math.isnan(value):  # λ is NaN before the first traces
            numbers[name] = float(value)
    by_layer: dict[str, float] = {}
    for kind, column in columns.items():
        by_layer |= zip([f"{kind}/{name}" for name in layers], column.tolist(), strict=True)
    return by_layer | numbers
