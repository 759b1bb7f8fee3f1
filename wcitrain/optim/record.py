"""The wrapper's own numbers: running averages of the layers' traces and what they were made of.

They live in the base optimizer's first group under ``KEY``, so they survive every checkpoint path. An average over n
estimates is Σ_k decay^(n−k) (1 − decay) t_k, divided by the same sum of ones, which removes its start-up bias. An estimate
that is not finite (layer off the graph, zero weights) leaves its layer's average alone.
"""

from typing import Any

import torch
from torch import Tensor

from wcitrain.params import Layers

KEY = "regularizer"


def fresh_record(layers: Layers) -> dict[str, Any]:
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


def averages(record: dict[str, Any]) -> Tensor | None:
    """Return the bias-corrected running averages of t_l [L], NaN for a layer not measured yet; None before any."""
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


def refuse_other_layers(record: dict[str, Any], layers: Layers) -> None:
    """Raise ``ValueError`` where saved averages belong to another choice of layers."""
    if record["layers"] != list(layers):
        other = sorted(set(record["layers"]) ^ set(layers))[:6]
        raise ValueError(
            f"load_state_dict: got running averages of {len(record['layers'])} layers; expected this model's {len(layers)}. "
            f"They differ in {', '.join(other) or 'order'}. Was the choice of layers changed?"
        )
