"""From a checked recipe to the parts of a run: objective, optimizer, regularisation, learning rate, and their name."""

import difflib
import math
from typing import Any

import torch
from torch import nn

from wcitrain import optim
from wcitrain.attacks import ThreatModel
from wcitrain.objectives import PGDAT, Objective, Standard
from wcitrain.optim import RegularizedOptimizer, StrengthSchedule
from wcitrain.recipe import Recipe

OBJECTIVES = {"standard": Standard, "pgd_at": PGDAT}


def build_objective(recipe: Recipe) -> Objective:
    """Return the recipe's objective; ``pgd_at`` gets the threat model."""
    settings = recipe.objective.model_dump(exclude={"name"})
    if recipe.objective.name == "pgd_at":
        settings["threat"] = ThreatModel(recipe.threat.norm, recipe.threat.eps)
        settings["step_size"] = step_size(recipe, recipe.objective)
    return OBJECTIVES[recipe.objective.name](**settings)


def step_size(recipe: Recipe, attack: Any) -> float:
    """Return the attack's step; where the recipe leaves it open, 2.5 eps / num_steps (2/255 for 8/255 in 10 steps)."""
    return 2.5 * recipe.threat.eps / attack.num_steps if attack.step_size is None else attack.step_size


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return the base optimizer: torch's SGD and AdamW by their plain names, else what timm builds.

    (timm's "sgd" is Nesterov; ours is what torch and the robust-training literature call SGD.)

    Raises:
        ValueError: Unknown name (the nearest are listed) or arguments the optimizer refuses.
    """
    settings = recipe.optimizer
    decayed = [p for p in model.parameters() if p.requires_grad and (settings.decay_norm_and_bias or p.ndim > 1)]
    rest = [p for p in model.parameters() if p.requires_grad and not (settings.decay_norm_and_bias or p.ndim > 1)]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, **settings.kwargs}
    try:
        if settings.name == "sgd":
            return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **common)
        if settings.name == "adamw":
            return torch.optim.AdamW(groups, **common)
        from timm.optim import create_optimizer_v2, list_optimizers

        known = [str(name) for name in list_optimizers()]
        if settings.name not in known:
            near = difflib.get_close_matches(settings.name, ["sgd", "adamw", *known], n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "timm.optim.list_optimizers() lists them."
            raise ValueError(f"optimizer.name: got {settings.name!r}; expected sgd, adamw or a timm optimizer. {hint}")
        optimizer = create_optimizer_v2(groups, opt=settings.name, momentum=settings.momentum, **common)
    except (TypeError, AssertionError, ImportError) as error:
        raise ValueError(f"optimizer.kwargs: {settings.name} refuses {settings.kwargs}: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(
            f"optimizer.name: got {settings.name!r}, which needs second derivatives of its own; expected a first-order "
            "optimizer. Choose another."
        )
    return optimizer


def build_regularizer(
    recipe: Recipe, base: torch.optim.Optimizer, model: nn.Module, updates: int
) -> RegularizedOptimizer:
    """Wrap ``base`` with the recipe's perturbation and penalty; epochs become steps of ``updates`` an epoch."""
    p, q = recipe.perturbation, recipe.penalty
    perturbation: optim.perturbation.WeightPerturbation | None = None
    penalty: optim.penalty.Penalty | None = None
    if p.name == "awp":
        perturbation = optim.AWP(p.gamma, _schedule(p, updates))
    elif p.name == "wci":
        perturbation = optim.WCIPosterior(
            p.relative_size, p.strength, p.frobenius, p.statistics, p.floor, _schedule(p, updates)
        )
    elif p.name == "noise":
        perturbation = optim.UniformNoise(p.relative_size, p.statistics, _schedule(p, updates))
    if q.name == "wci":
        penalty = optim.WCIPenalty(q.strength, schedule=_schedule(q, updates), **_estimation(q))
    elif q.name == "frobenius":
        penalty = optim.FrobeniusTracePenalty(q.strength, None, schedule=_schedule(q, updates))
    elif q.name == "trace":
        penalty = optim.FrobeniusTracePenalty(0.0, q.strength, schedule=_schedule(q, updates), **_estimation(q))
    elif q.name == "frobenius_trace":
        trace_weight = (
            None if perturbation is not None else q.trace_weight
        )  # no extra passes to monitor beside another rule
        penalty = optim.FrobeniusTracePenalty(
            q.frobenius_weight, trace_weight, schedule=_schedule(q, updates), **_estimation(q)
        )
    rule = p if p.name != "none" else q
    return RegularizedOptimizer(
        base,
        model,
        perturbation=perturbation,
        penalty=penalty,
        layers=getattr(rule, "layers", "weights"),
        split_qkv=getattr(rule, "split_qkv", False),
        trace_decay=getattr(rule, "trace_decay", 0.9),
        seed=recipe.seed,
    )


def learning_rate_factor(recipe: Recipe, epoch: float) -> float:
    """Return the learning rate at a (fractional) epoch as a share of ``optimizer.lr``."""
    schedule, epochs = recipe.schedule, recipe.train.epochs
    if schedule.name == "one_cycle":
        peak = schedule.peak_epoch or 0.4 * epochs
        if epoch < peak:
            return epoch / peak
        return schedule.final_fraction + (1 - schedule.final_fraction) * (epochs - epoch) / max(epochs - peak, 1e-9)
    factor = 1.0
    if schedule.name == "piecewise":
        factor = schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    elif schedule.name == "cosine":
        share = min(1.0, max(0.0, (epoch - schedule.warmup_epochs) / max(epochs - schedule.warmup_epochs, 1e-9)))
        factor = schedule.final_fraction + (1 - schedule.final_fraction) * (1 + math.cos(math.pi * share)) / 2
    return factor * min(1.0, epoch / schedule.warmup_epochs) if schedule.warmup_epochs else factor


def method_label(recipe: Recipe) -> str:
    """Return the short name of what is trained, for tables: "AT", "AWP γ=0.01", "WCI r=1", ..."""
    p, q = recipe.perturbation, recipe.penalty
    label = {"standard": "standard", "pgd_at": "AT"}[recipe.objective.name]
    parts = []
    if p.name == "awp":
        parts.append(f"AWP γ={p.gamma:g}")
    elif p.name == "wci":
        parts.append(f"WCI r={p.relative_size:g}" if p.relative_size else f"WCI λ={p.strength:g}")
        parts[-1] += " +F" if p.frobenius else ""
    elif p.name == "noise":
        parts.append(f"noise r={p.relative_size:g}")
    if q.name == "frobenius_trace" and (q.frobenius_weight or q.trace_weight):
        parts.append(f"F+T penalty {q.frobenius_weight:g}, {q.trace_weight:g}")
    elif q.name in ("wci", "frobenius", "trace") and q.strength:
        parts.append(f"{q.name} penalty {q.strength:g}")
    if not parts:
        return label
    return " + ".join(parts if label == "AT" else [label, *parts])


def _estimation(section: Any) -> dict[str, Any]:
    """Return how a penalty's traces are estimated; what the recipe leaves open is the penalty's own default."""
    settings = {key: getattr(section, key) for key in ("estimator", "num_probes", "radius", "gradient")}
    return {key: value for key, value in settings.items() if value is not None}


def _schedule(section: Any, updates: int) -> StrengthSchedule:
    """Return the schedule of a perturbation or penalty in optimizer steps."""
    return StrengthSchedule(section.start_epoch * updates, round(section.ramp_epochs * updates), section.every)
