"""From a checked recipe to the parts of a run: objective, optimizer, regularisation, learning rate, and their name."""

import difflib
import math
from typing import Any

import torch
from torch import nn

from wcitrain import data, objectives, optim
from wcitrain.attacks import ThreatModel
from wcitrain.data import Splits
from wcitrain.models import Classifier, create_model
from wcitrain.objectives import OBJECTIVES, Objective, WithInputRegularizer
from wcitrain.optim import RegularizedOptimizer, StrengthSchedule
from wcitrain.recipe import Recipe
from wcitrain.seeding import seed_from

PERTURBATIONS: dict[str, type[optim.WeightPerturbation]] = {
    "sam": optim.SAM,
    "asam": optim.ASAM,
    "awp": optim.AWP,
    "vasso": optim.VaSSO,
    "gsam": optim.GSAM,
    "gradient_norm": optim.GradientNorm,
    "cr_sam": optim.CRSAM,
    "wci_adversary": optim.WCIAdversary,
    "wci": optim.WCIPosterior,
    "noise": optim.UniformNoise,
    "noise_stability": optim.NoiseStability,
    "rwp": optim.RWP,
}
INPUT_REGULARIZERS = {"cure": objectives.CURE, "input_gradient": objectives.InputGradient}
WRAPPER_KEYS = {
    "name",
    "start_epoch",
    "ramp_epochs",
    "every",
    "layers",
    "split_qkv",
    "trace_decay",
}  # not the rule's own


def initial_model(recipe: Recipe, splits: Splits) -> Classifier:
    """Return the model as it is before the first step: a function of the recipe and its seed.

    Seeds torch's global generator; ``preserve.kept_random_state`` around it keeps the former state.
    """
    torch.manual_seed(seed_from(recipe.seed, "model"))
    settings = recipe.model.model_dump()
    return create_model(
        **{key: value for key, value in settings.items() if key != "kwargs"},
        num_classes=splits.num_classes,
        in_chans=splits.in_chans,
        rotation_head=recipe.objective.name == "rotation",
        **settings["kwargs"],
    )


def build_objective(recipe: Recipe) -> Objective:
    """Return the recipe's objective with its threat model, and its input-space regulariser around it."""
    settings = recipe.objective.model_dump(exclude={"name"})
    name = recipe.objective.name
    if name == "union":
        del settings["step_size"]
        settings["threats"] = tuple((ThreatModel(t["norm"], t["eps"]), t["step_size"]) for t in settings["threats"])
    elif name != "standard":
        settings["threat"] = ThreatModel(recipe.threat.norm, recipe.threat.eps)
    if name != "union" and "num_steps" in settings:
        settings["step_size"] = step_size(recipe, recipe.objective)
    objective: Objective = OBJECTIVES[name](**settings)
    regularizer = recipe.input_regularizer
    if regularizer.name == "none":
        return objective
    return WithInputRegularizer(
        objective, INPUT_REGULARIZERS[regularizer.name](**regularizer.model_dump(exclude={"name"}))
    )


def build_augmentation(recipe: Recipe) -> data.Augmentation | None:
    """Return what happens to single training images, None for nothing."""
    return None if recipe.augment.policy == "none" else data.Augmentation(**recipe.augment.model_dump())


def build_mixing(recipe: Recipe) -> data.Mixing | None:
    """Return how batches are mixed, None for not at all."""
    mixing = data.Mixing(**recipe.mixing.model_dump())
    return mixing if mixing.is_active else None


def step_size(recipe: Recipe, attack: Any) -> float:
    """Return the attack's step; where the recipe leaves it open, 2.5 eps / num_steps (2/255 for 8/255 in 10 steps)."""
    return 2.5 * recipe.threat.eps / attack.num_steps if attack.step_size is None else attack.step_size


def threat_factor(recipe: Recipe, epoch: float) -> float:
    """Return the share of the full radius that training attacks with at a (fractional) epoch, in (0, 1]."""
    warmup = recipe.threat.warmup_epochs
    return 1.0 if epoch >= warmup else epoch / warmup


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
    """Wrap ``base`` with the recipe's perturbation and penalty; epochs become ``updates`` optimizer steps each."""
    p, q = recipe.perturbation, recipe.penalty
    perturbation: optim.WeightPerturbation | None = None
    penalty: optim.penalty.Penalty | None = None
    if p.name != "none":
        perturbation = PERTURBATIONS[p.name](**p.model_dump(exclude=WRAPPER_KEYS), schedule=_schedule(p, updates))  # type: ignore[call-arg]
    if q.name == "wci":
        penalty = optim.WCIPenalty(q.strength, schedule=_schedule(q, updates), **_estimation(q))
    elif q.name == "frobenius":
        penalty = optim.FrobeniusTracePenalty(q.strength, None, schedule=_schedule(q, updates))
    elif q.name == "trace":
        penalty = optim.FrobeniusTracePenalty(0.0, q.strength, schedule=_schedule(q, updates), **_estimation(q))
    elif q.name == "frobenius_trace":
        # beside a perturbation: no extra passes only to monitor
        trace_weight = None if perturbation is not None and not q.trace_weight else q.trace_weight
        penalty = optim.FrobeniusTracePenalty(
            q.frobenius_weight, trace_weight, schedule=_schedule(q, updates), **_estimation(q)
        )
    return RegularizedOptimizer(
        base,
        model,
        perturbation=perturbation,
        penalty=penalty,
        layers=getattr(p, "layers", None) or getattr(q, "layers", None),
        split_qkv=getattr(p, "split_qkv", False) or getattr(q, "split_qkv", False),
        trace_decay=next((rule.trace_decay for rule in (p, q) if hasattr(rule, "trace_decay")), 0.9),
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


def _estimation(section: Any) -> dict[str, Any]:
    """Return how a penalty's traces are estimated; what the recipe leaves open is the penalty's own default."""
    settings = {key: getattr(section, key) for key in ("estimator", "num_probes", "radius", "gradient")}
    return {key: value for key, value in settings.items() if value is not None}


def _schedule(section: Any, updates: int) -> StrengthSchedule:
    """Return the schedule of a perturbation or penalty in optimizer steps."""
    return StrengthSchedule(section.start_epoch * updates, round(section.ramp_epochs * updates), section.every)
