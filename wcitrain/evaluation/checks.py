"""Checks of a model before it is attacked, and of the results: what makes robust accuracies wrong unnoticed.

After Carlini et al. 2019 (arXiv 1902.06705, section 5), Athalye et al. 2018 (arXiv 1802.00420, section 3.1)
and the checks of AutoAttack. Cost: 7 forward passes, 2 backward ones and, for the attack with a huge radius,
40 more of both, on one batch. Findings on results are warnings, as the numbers are there.
"""

from collections.abc import Iterator, Sequence
from itertools import permutations

import torch
from torch import Tensor

from wcitrain.attacks import ATTACK_LOSSES, Attack, ThreatModel
from wcitrain.evaluation.autoattack import EnsemblePlan
from wcitrain.evaluation.evaluation import AttackResult, Evaluation, Finding, percent
from wcitrain.evaluation.intervals import mcnemar, wilson_interval
from wcitrain.evaluation.plans import GradientPlan, Plan, parse_attack
from wcitrain.evaluation.victim import Victim, is_right
from wcitrain.preserve import undisturbed
from wcitrain.seeding import generator_from

SAME = 1e-4  # relative difference of two outputs below which they are the same: float32 on a GPU reaches 1e-5
HUGE = ThreatModel("linf", 0.5)  # every image can be made plain gray: nothing is left to be robust about
SIGNIFICANT = 0.05  # p-value below which "the stronger attack is weaker" is not chance


class PreflightWarning(UserWarning):
    """A finding that may make the numbers wrong."""


def check_images(x: Tensor) -> Iterator[Finding]:
    """Images outside [0, 1], where eps is measured and attacks clip, or not finite; all are looked at."""
    low, high = float(x.min()), float(x.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        text = f"got images from {low:.3g} to {high:.3g}; expected [0, 1]. Normalise inside the model."
        yield Finding("images_outside_box", "error", text)


def check_model(victim: Victim, plans: Sequence[Plan]) -> Iterator[Finding]:
    """Logits of all clean images; then all else, on one batch, before the attacks ``plans``."""
    if num := int((~victim.clean.is_finite).sum()):
        text = f"NaN or infinite logits on {num} of {len(victim.x)} clean images, which count as wrong."
        yield Finding("not_finite", "error", f"{text} Check the weights.")
    x, y = victim.batch(slice(victim.batch_size))
    with torch.no_grad():
        logits = victim.model(x)
        if not bool(logits.isfinite().all()):
            return
        again = torch.stack([victim.model(x) for _ in range(3)])
    yield from _probabilities(logits)
    yield from _random(logits, again, plans)
    yield from _modes(victim, x, logits)
    gradients = list(_gradients(victim, x, y))
    yield from gradients
    if not any(finding.severity == "error" for finding in gradients):
        yield from _huge_radius(victim, x, y)


def _probabilities(logits: Tensor) -> Iterator[Finding]:
    """Outputs that another softmax, in the loss, flattens so that attacks fail; log-probabilities."""
    is_bounded = float(logits.min()) >= 0 and float(logits.max()) <= 1
    if is_bounded and bool(((logits.sum(1) - 1).abs() < SAME).all()):
        text = "the outputs are between 0 and 1 and sum to one; expected logits. Remove the softmax."
        yield Finding("probabilities", "error", text)
    elif is_bounded:
        text = "the outputs are all between 0 and 1; expected logits. Remove what bounds them."
        yield Finding("probabilities", "warning", text)
    elif bool(((logits.double().exp().sum(1) - 1).abs() < SAME).all()):
        text = "the outputs are log-probabilities, whose gradient may vanish. Return the logits."
        yield Finding("probabilities", "warning", text)


def _random(logits: Tensor, again: Tensor, plans: Sequence[Plan]) -> Iterator[Finding]:
    """Outputs [B, C] that are others each time: one draw misleads the attack, and luck counts as robust."""
    if (difference := _difference(logits, again)) > SAME:
        text = f"four passes over the same images differ by {difference:.1g} of the largest output."
        advice = "Switch the randomness off, or use only autoattack-rand, which averages over 20 draws."
        has_eot = all(isinstance(plan, EnsemblePlan) and plan.version == "rand" for plan in plans)
        yield Finding("randomised", "warning" if has_eot else "error", f"{text} {advice}")


def _modes(victim: Victim, x: Tensor, logits: Tensor) -> Iterator[Finding]:
    """Train mode that the user left on, where it changes anything."""
    if not any(victim.modes):
        return
    modules = list(zip(victim.model.modules(), victim.modes, strict=True))
    with undisturbed(victim.model, training=None), torch.no_grad():  # batch norm would move its statistics
        for module, flag in modules:
            module.training = flag
        trained = victim.model(x)
    if _difference(logits, trained) > SAME:
        text = "the model was in train mode, where its outputs are others; it is evaluated in eval mode."
        yield Finding("train_mode", "warning", f"{text} Call model.eval().")


def _gradients(victim: Victim, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """Input gradients that are missing, not finite or exactly zero."""
    shares = {}
    for name in ("ce", "margin"):
        with torch.enable_grad():
            images = x.detach().requires_grad_()
            losses = ATTACK_LOSSES[name](victim.model(images), y).sum()
            grad = None
            if losses.requires_grad:
                (grad,) = torch.autograd.grad(losses, images, allow_unused=True)
        if grad is None:
            text = "no differentiable path leads from the images to the outputs. Look for detach or rounding."
            yield Finding("no_gradient", "error", text)
            return
        if num := int((~grad.flatten(1).isfinite().all(1)).sum()):
            text = f"the {name} loss has NaN or infinite gradients in {num} of {len(x)} images."
            yield Finding("gradient_not_finite", "error", f"{text} Find the operation and make it finite.")
            return
        shares[name] = float((grad.flatten(1) == 0).all(1).float().mean())
    loss = "margin" if shares["margin"] > 0 else "ce"
    if (share := shares[loss]) > 0:
        text = f"the gradient of the {loss} loss is exactly zero in {100 * share:.0f} % of the first batch."
        advice = "Add autoattack:square." if loss == "margin" else "Add margin-20, dlr-20 or autoattack."
        is_error = loss == "margin" and share > 0.5
        yield Finding("zero_gradient", "error" if is_error else "warning", f"{text} {advice}")


def _huge_radius(victim: Victim, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """An attack that may turn any image into plain gray must succeed; else gradients lead nowhere."""
    with torch.no_grad():
        is_left = is_right(victim.model(x), y)
    if not bool(is_left.any()):
        return
    for loss in ("ce", "margin"):
        attack = Attack(HUGE, num_steps=20, step_size=HUGE.step_for(20), loss=loss)
        x_adv = attack(victim.model, x, y, generator_from(x.device, victim.seed, "preflight", loss))
        with torch.no_grad():
            is_left = is_left & is_right(victim.model(x_adv), y)
    if (share := float(is_left.float().mean())) > 0.1:
        text = f"PGD-20 within {HUGE} leaves {100 * share:.0f} % of the first batch right, not about none."
        advice = "Gradients are masked: do not trust gradient attacks here. Add autoattack."
        yield Finding("huge_radius", "warning", f"{text} {advice}")


def _difference(logits: Tensor, others: Tensor) -> float:
    """Return the largest difference of two outputs over the largest output."""
    return float((others - logits).abs().amax() / logits.abs().amax().clamp_min(1e-12))


# ---- results -----------------------------------------------------------------------------------------------


def check_results(evaluation: Evaluation, num_classes: int) -> Iterator[Finding]:
    """Clean accuracy that guessing would reach; what is odd about each attack, and about each two."""
    share, num = evaluation.clean_accuracy, evaluation.num_examples
    if wilson_interval(share, num)[0] <= 1 / num_classes:
        text = f"clean accuracy is {percent(share)} % on {num} examples, not above chance."
        yield Finding("chance", "warning", f"{text} Check weights, labels and normalisation.")
    for result in evaluation.attacks:
        yield from _attack_alone(evaluation, result)
    for weak, strong in permutations(evaluation.attacks, 2):
        yield from _pair(weak, strong)


def _attack_alone(evaluation: Evaluation, result: AttackResult) -> Iterator[Finding]:
    """No effect; perturbations too long; an attack without gradients that finds what others missed."""
    who, eps = f"{result.attack} ({result.threat})", result.threat.eps
    if eps > 0 and evaluation.is_clean.any() and torch.equal(result.is_robust, evaluation.is_clean):
        text = f"{who} breaks no example; is the radius tiny, or are there few examples?"
        yield Finding("no_effect", "warning", f"{text} Check eps (in [0, 1] units) and gradients.")
    if result.furthest > 1.001 * eps + 1e-6:
        text = f"{who} used a perturbation of length {result.furthest:.6g}; expected at most {eps:.6g}."
        yield Finding("outside_ball", "warning", f"{text} The accuracy is too low; report this.")
    shares = list(result.after.values())
    place = list(result.after).index("square") if "square" in result.after else 0
    if place and (gain := shares[place - 1] - shares[place]) > max(0.002, 1.5 / evaluation.num_examples):
        text = f"{who}: the square attack, without gradients, lowers robust accuracy by {percent(gain)} %."
        yield Finding("square_helps", "warning", f"{text} Gradients mislead; attack by hand as well.")


def _pair(weak: AttackResult, strong: AttackResult) -> Iterator[Finding]:
    """The stronger attack of two that leaves significantly more examples right."""
    test, why = mcnemar(strong.is_robust, weak.is_robust), _why_stronger(strong, weak)
    if why and test.only_a > test.only_b and test.p_value < SIGNIFICANT:
        shares = [percent(float(result.is_robust.float().mean())) for result in (strong, weak)]
        text = f"{strong.attack} ({strong.threat}) leaves {shares[0]} % right, {weak.attack} ({weak.threat})"
        text = f"{text} {shares[1]} %, although the first {why}. Report the worst case."
        yield Finding("stronger_is_weaker", "warning", text)


def _why_stronger(strong: AttackResult, weak: AttackResult) -> str:
    """Return why the first attack should leave no more examples right than the second, or ""."""
    a, b = parse_attack(strong.attack), parse_attack(weak.attack)
    if strong.threat.norm == weak.threat.norm and a == b and strong.threat.eps > weak.threat.eps:
        return "has the larger radius"
    if strong.threat != weak.threat or not isinstance(b, GradientPlan):
        return ""
    if isinstance(a, EnsemblePlan):
        return "" if a.components else "is an ensemble"
    return "has more steps or restarts" if a.includes(b) else ""
