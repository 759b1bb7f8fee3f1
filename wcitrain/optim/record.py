"""The wrapper's own numbers: running averages of the layers' traces and what they were made of.

They live in the base optimizer's first group under ``KEY``, so they survive every checkpoint path. With
estimates y_k and weights w_k = (1 − decay) decay^(n−k) the average and its error are, without start-up bias,

    t = Σ w y / Σ w,    se² = Σ w² / (Σ w)² · [Σ w y² / Σ w − t²] / [1 − Σ w² / (Σ w)²].                   (1)

The error takes the estimates for independent draws around one value: where the traces move it is too large.

Rules with ``center: initial`` have the layers' tensors W⁰ here too, as they were when the wrapper was made:
one more copy of them in memory and in checkpoints, from which a resumed run takes it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from wcitrain.curvature.estimator import NEGATIVE
from wcitrain.curvature.passes import Passes
from wcitrain.params import Layers

KEY = "regularizer"
SUMS = ("trace_sum", "square_sum", "trace_weight", "weight_square")  # Σ w y, Σ w y², Σ w, Σ w²
COUNTS = ("num_estimates", "num_negative")
NUM_IDLE = 100  # steps without gradient until a layer counts as unused: heads may take turns


def fresh(layers: Layers, has_memory: bool = False) -> dict[str, Any]:
    """Return the record before the first step, whole: torch's distributed checkpoint fills what is there."""
    like = layers.squared_norms()
    zeros = {name: torch.zeros_like(like) for name in (*SUMS, *COUNTS)}
    is_active = torch.ones_like(like, dtype=torch.bool)
    unknown = {name: like.new_full((), torch.nan) for name in ("relative_size", "lambda")}
    unknown["half"] = torch.full_like(like, torch.nan)  # the first estimate of a pair
    memory = {"memory": [torch.zeros_like(t) for t in layers.tensors]} if has_memory else {}
    numbers = {"step": 0, "draws": 0, "is_measured": False, "is_active": is_active}
    unknown["num_idle"] = torch.full_like(like, NUM_IDLE - 1)  # one never seen is unused after a step
    return {"layers": list(layers), **numbers, **zeros, **unknown, **memory}


def begun(found: dict[str, Any] | None, layers: Layers, *rules: Any) -> dict[str, Any]:
    """Return the record that these rules (or None) need: the one found, where it is of these layers."""
    if found is None or found["layers"] != list(layers):
        found = fresh(layers, any(getattr(rule, "has_memory", False) for rule in rules))
    if any(rule and rule.center == "initial" for rule in rules):
        found.setdefault("initial", initial(layers))
    return found


def initial(layers: Layers) -> dict[str, Tensor]:
    """Return W⁰, copies of the layers' tensors as they are, by name."""
    return {name: t.detach().clone() for name, t in zip(layers.names, layers.tensors, strict=True)}


def initial_tensors(record: dict[str, Any], layers: Layers) -> list[Tensor]:
    """Return W⁰ of the layers' tensors, where they are now; none where no rule needs it."""
    if (start := record.get("initial")) is None:
        return []
    start |= {name: start[name].to(t) for name, t in zip(layers.names, layers.tensors, strict=True)}
    return [start[name] for name in layers.names]


def loaded(saved: dict[str, Any] | None, own: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """Return a saved record with its tensors where the layers are; ValueError for other layers.

    None is a bare optimizer's: all begins anew, but W⁰ stays what the wrapper's ``own`` record has.
    """
    start = {key: own[key] for key in ("initial",) if key in own}
    if saved is None:
        return fresh(layers, "memory" in own) | start
    if start and "initial" not in saved:
        got = "got a state without initial weights, of a rule with center: origin"
        raise ValueError(f"load_state_dict: {got}; expected that of center: initial. Load the base's alone.")
    if saved["layers"] != list(layers):
        got = f"got averages of {len(saved['layers'])} other layers"
        raise ValueError(f"load_state_dict: {got}; expected these {len(layers)}. Was the choice changed?")
    like, record = layers.squared_norms(), fresh(layers)
    record["square_sum"] += torch.nan  # of older records: their errors are not known
    for key, value in saved.items():
        if isinstance(value, Tensor):
            value = value.to(like.device if value.dtype == torch.bool else like).clone()
        record[key] = value
    if "memory" in saved:
        record["memory"] = [m.to(t).clone() for m, t in zip(saved["memory"], layers.tensors, strict=True)]
    if record.pop("initial", None) and start:
        record["initial"] = {name: w.clone() for name, w in saved["initial"].items()}
    return record


def moved_to(record: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """Return the record for other layers, of which those that stay keep their numbers, all their W⁰."""
    places = {name: place for place, name in enumerate(record["layers"])}
    kept = [(new, places[name]) for new, name in enumerate(layers) if name in places]
    kept_numbers = {key: record[key] for key in ("step", "draws", "is_measured")}
    result = record | fresh(layers, "memory" in record) | kept_numbers
    if "initial" in record:  # also of layers that are frozen for a while
        result["initial"] = initial(layers) | record["initial"]
    for key in (*SUMS, *COUNTS, "is_active", "num_idle"):
        for new, old in kept:
            result[key][new] = record[key][old]
    if "memory" in record:  # one for a whole tensor
        whole = list(dict.fromkeys(name.partition("[")[0] for name in record["layers"]))
        former = dict(zip(whole, record["memory"], strict=True))
        result["memory"] = [former.get(n, m) for n, m in zip(layers.names, result["memory"], strict=True)]
    return result


def fold(
    record: dict[str, Any], estimate: Tensor, decay: float, is_paired: bool = False, weight: Any = None
) -> None:
    """Fold one estimate of all traces [L] into the averages, in place; NaN for a layer without one.

    With ``is_paired`` it is half of one: the first of two steps waits for the second, the decay is of a step.
    ``weight`` [L], its inverse variance up to a factor, multiplies w_k: the error of (1) is then too large.
    """
    if is_paired:
        first, record["half"] = record["half"].to(estimate), torch.full_like(estimate, torch.nan)
        if record["draws"] % 2 == 0:
            record["half"] = estimate
            return
        estimate, decay = (first + estimate) / 2, decay**2
    is_good = torch.isfinite(estimate)
    value, kept = torch.where(is_good, estimate, 0.0), torch.where(is_good, decay, 1.0)
    added: tuple[Tensor | float, ...] = (value, value.square(), 1.0, 1 - kept)
    if weight is not None:
        added = tuple(one * weight for one in (*added[:3], added[3] * weight))
    for key, one in zip(SUMS, added, strict=True):
        factor = kept.square() if key == "weight_square" else kept
        record[key] = factor * record[key].to(estimate) + (1 - kept) * one
    record["num_estimates"] = record["num_estimates"].to(estimate) + is_good
    record["num_negative"] = record["num_negative"].to(estimate) + (estimate < 0)
    record["is_measured"] = True


def see(record: dict[str, Any], is_seen: Tensor) -> None:
    """Note which layers [L] got a gradient in this step."""
    record["num_idle"] = torch.where(is_seen, 0.0, record["num_idle"].to(is_seen.device) + 1)
    record["is_active"] = record["num_idle"] < NUM_IDLE


def averages(record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the running averages of t_l [L], NaN for none, and their standard errors by (1)."""
    t, square, weight, weight_square = (record[key] for key in SUMS)
    mean, share = t / weight, weight_square / weight.square()
    spread = (square / weight - mean.square()).clamp_min(0) / (1 - share)
    return mean, torch.where(record["num_estimates"] > 1, (share * spread).sqrt(), torch.inf)


def metrics(record: dict[str, Any], passes: Passes, perturbation: Any, penalty: Any) -> dict[str, float]:
    """Return what ``RegularizedOptimizer.metrics`` says, from the centre of the rule that takes traces."""
    rule = perturbation if perturbation and perturbation.measures_traces else penalty
    center = rule.center if rule else "origin"
    a, start = passes.squared_norms(center), "" if center == "origin" else "_from_initial"
    columns, numbers = {f"frobenius{start}": a}, {}
    if record["is_measured"]:
        traces, errors = averages(record)
        index = (a * traces.nan_to_num().clamp_min(0)).sqrt()
        index = torch.where(traces < -NEGATIVE * errors, torch.nan, index)  # it has none
        columns |= {"curvature/trace": traces, "curvature/trace_stderr": errors, f"wci{start}": index}
        numbers[f"wci{start}/total"] = float(index.sum())
        share = record["num_negative"].sum() / record["num_estimates"].sum().clamp_min(1)
        numbers["curvature/negative"] = float(share)
    latest = {key: record[key] for key in ("relative_size", "lambda")}
    numbers |= {key: float(value) for key, value in latest.items() if value is not None}
    by_layer: dict[str, float] = {}
    for kind, column in columns.items():
        by_layer |= zip([f"{kind}/{name}" for name in passes.layers], column.tolist(), strict=True)
    return {name: value for name, value in (by_layer | numbers).items() if math.isfinite(value)}
