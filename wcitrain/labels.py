"""The short name of what a recipe trains, for tables and figures: "AT", "TRADES β=6 + AWP γ=0.005", "WCI r=1", ..."""

from typing import Any

from wcitrain.recipe import Recipe

OBJECTIVES = {
    "standard": "standard",
    "pgd_at": "AT",
    "trades": "TRADES β={beta:g}",
    "mart": "MART λ={beta:g}",
    "alp": "ALP {weight:g}",
    "fgsm_rs": "FGSM-RS",
    "grad_align": "GradAlign λ={weight:g}",
    "free": "free AT m={num_replays}",
    "rotation": "AT + rotations {weight:g}",
    "union": "AT {strategy} of {norms}",
}
INPUT_REGULARIZERS = {"cure": "CURE {weight:g}", "input_gradient": "{norm} input gradient {weight:g}"}
PERTURBATIONS = {
    "sam": "SAM ρ={rho:g}",
    "asam": "ASAM ρ={rho:g}",
    "awp": "AWP γ={gamma:g}",
    "vasso": "VaSSO ρ={rho:g} θ={theta:g}",
    "gsam": "GSAM ρ={rho:g} α={alpha:g}",
    "gradient_norm": "gradient norm {strength:g}",
    "cr_sam": "CR-SAM ρ={rho:g}",
    "wci_adversary": "worst-case WCI r={relative_size:g}",
    "noise": "noise r={relative_size:g}",
    "noise_stability": "NSO σ={sigma:g}",
    "rwp": "RWP σ={sigma:g} α={mixing:g}",
}


def method_label(recipe: Recipe) -> str:
    """Return the name; plain adversarial training is left out where something else names the method."""
    objective = recipe.objective.model_dump()
    if recipe.objective.name == "union":
        objective["norms"] = ", ".join(threat["norm"] for threat in objective["threats"])
    first = OBJECTIVES[recipe.objective.name].format(**objective)
    if recipe.threat.norm != "linf" and recipe.objective.name not in ("standard", "union"):
        first += f" {recipe.threat.norm}"
    parts = [*_regularizers(recipe), *_penalty(recipe.penalty), *_training(recipe)]
    return " + ".join(parts if first == "AT" and parts else [first, *parts])


def _regularizers(recipe: Recipe) -> list[str]:
    """Return the input-space regulariser and the weight perturbation."""
    parts, p = [], recipe.perturbation
    if recipe.input_regularizer.name != "none":
        parts.append(INPUT_REGULARIZERS[recipe.input_regularizer.name].format(**recipe.input_regularizer.model_dump()))
    if p.name == "wci":
        size = f"WCI r={p.relative_size:g}" if p.relative_size else f"WCI λ={p.strength:g}"
        parts.append(size + (" +F" if p.frobenius else ""))
    elif p.name != "none":
        parts.append(PERTURBATIONS[p.name].format(**p.model_dump()))
    return parts


def _penalty(q: Any) -> list[str]:
    """Return the penalty, unless it only monitors."""
    if q.name == "frobenius_trace" and (q.frobenius_weight or q.trace_weight):
        return [f"F+T penalty {q.frobenius_weight:g}, {q.trace_weight:g}"]
    if q.name in ("wci", "frobenius", "trace") and q.strength:
        return [f"{q.name} penalty {q.strength:g}"]
    return []


def _training(recipe: Recipe) -> list[str]:
    """Return what is special about images, labels and averaging."""
    augment, mixing, train = recipe.augment, recipe.mixing, recipe.train
    parts: list[str] = []
    if recipe.threat.warmup_epochs:
        parts.append("eps warm-up")
    if augment.policy != "none":
        parts.append(augment.policy)
    parts += [name for name, alpha in (("mixup", mixing.mixup_alpha), ("CutMix", mixing.cutmix_alpha)) if alpha]
    if recipe.extra.path:
        parts.append(f"extra {recipe.extra.labels} {recipe.extra.fraction:g}")
    if recipe.label_noise.share:
        parts.append(f"label noise {recipe.label_noise.share:g}")
    if smoothing := getattr(recipe.objective, "label_smoothing", 0.0):
        parts.append(f"label smoothing {smoothing:g}")
    if train.ema_decay:
        parts.append(f"EMA {train.ema_decay:g}")
    if train.swa_start_epoch is not None:
        parts.append("SWA")
    if train.patience:
        parts.append("early stopping")
    return parts
