"""The wrapper's own numbers: running averages of the layers' traces and what they were made of.

They live in the base optimizer's first group under ``KEY``, so they survive every checkpoint path. An average
is Σ_k decay^(n−k) (1 − decay) t_k over the same sum of ones, which removes its start-up bias. An estimate
that is not finite leaves its layer's average alone.
"""

import math
from typing import Any

import torch
from torch import Tensor

from wcitrain.params import Layers

KEY = "regularizer"


def fresh(layers: Layers) -> dict[str, Any]:
    """Return the record before the first step."""
    zeros = torch.zeros_like(layers.squared_norms())
    return {
        "layers": list(layers),
        "step": 0,
        "is_measured": False,
        "trace_sum": zeros,
        "trace_weight": zeros.clone(),
        "num_estimates": zeros.clone(),
        "num_negative": zeros.clone(),
    }


def loaded(saved: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """Return a saved record with its tensors where the layers are; ValueError for other layers."""
    if saved["layers"] != list(layers):
        other = sorted(set(saved["layers"]) ^ set(layers))[:6]
        text = f"got averages of {len(saved['layers'])} layers; expected this model's {len(layers)}"
        advice = f"They differ in {', '.join(other) or 'order'}. Was the choice of layers changed?"
        raise ValueError(f"load_state_dict: {text}. {advice}")
    like = layers.squared_norms()
    record = {k: v.to(like).clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
    if "memory" in saved:
        record["memory"] = [m.to(t).clone() for m, t in zip(saved["memory"], layers.tensors, strict=True)]
    return record


def averages(record: dict[str, Any]) -> Tensor | None:
    """Return the running averages of t_l [L], NaN for a layer without an estimate; None before any."""
    return record["trace_sum"] / record["trace_weight"] if record["is_measured"] else None


def fold(record: dict[str, Any], estimate: Tensor, decay: float) -> None:
    """Fold one estimate of all traces [L] into the averages, in place."""
    is_good = torch.isfinite(estimate)
    kept = torch.where(is_good, decay, 1.0)
    for key, value in (("trace_sum", estimate), ("trace_weight", torch.ones_like(estimate))):
        record[key] = kept * record[key].to(estimate) + (1 - kept) * torch.where(is_good, value, 0.0)
    record["num_estimates"] = record["num_estimates"].to(estimate) + is_good
    record["num_negative"] = record["num_negative"].to(estimate) + (estimate < 0)
    record["is_measured"] = True


def metrics(record: dict[str, Any], layers: Layers) -> dict[str, float]:
    """Return what ``RegularizedOptimizer.metrics`` says."""
    a, traces = layers.squared_norms(), averages(record)
    by_layer = {"frobenius": a}
    if traces is not None:
        by_layer |= {"curvature/trace": traces, "wci": (a * traces.nan_to_num().clamp_min(0)).sqrt()}
    values = {
        f"{kind}/{name}": value
        for kind, numbers in by_layer.items()
        for name, value in zip(layers, numbers.tolist(), strict=True)
    }
    if traces is not None:
        values["wci/total"] = float(by_layer["wci"].sum())
        share = record["num_negative"].sum() / record["num_estimates"].sum().clamp_min(1)
        values["curvature/negative"] = float(share)
    latest = {name: float(record[name]) for name in ("relative_size", "lambda") if name in record}
    if math.isnan(latest.get("lambda", 0.0)):  # not known before the first traces
        del latest["lambda"]
    return values | latest
