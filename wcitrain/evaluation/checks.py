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
from wcitrain.attacks.ascent import outside_box
from wcitrain.evaluation.attacking import Victim, is_right
from wcitrain.evaluation.images import TRANSFER
from wcitrain.evaluation.intervals import mcnemar, wilson_interval
from wcitrain.evaluation.plans import EnsemblePlan, Plan, parse_attack
from wcitrain.evaluation.results import AttackResult, Evaluation, Finding, percent
from wcitrain.preserve import naming_reentrant
from wcitrain.seeding import generator_from

SAME = 1e-4  # relative difference of two outputs below which they are the same: float32 on a GPU reaches 1e-5
HUGE = ThreatModel("linf", 0.5)  # every image can be made plain gray: nothing is left to be robust about


class PreflightWarning(UserWarning):
    """A finding that may make the numbers wrong."""


def check_model(victim: Victim, plans: Sequence[Plan]) -> Iterator[Finding]:
    """All images, in whose box eps is measured, and their logits; on one batch, what misleads attacks."""
    low, high = float(victim.x.min()), float(victim.x.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        text = f"got images from {low:.3g} to {high:.3g}; {outside_box(low, high)}"
        yield Finding("images_outside_box", "error", text)
        return
    if num := int((~victim.clean.is_finite).sum()):
        text = f"NaN or infinite logits on {num} of {len(victim.x)} clean images, which count as wrong."
        yield Finding("not_finite", "error", text)
    x, y = victim.batch(slice(victim.batch_size))
    with torch.no_grad():
        logits = victim.model(x)
        if not bool(logits.isfinite().all()):
            return
        again = torch.stack([victim.model(x) for _ in range(3)])
    if float(logits.min()) >= 0 and float(logits.max()) <= 1:
        is_softmax = bool(((logits.sum(1) - 1).abs() < SAME).all())
        text = "the outputs are all between 0 and 1; expected logits. Remove the softmax or what bounds them."
        yield Finding("probabilities", "error" if is_softmax else "warning", text)
    difference = float((again - logits).abs().amax() / logits.abs().amax().clamp_min(1e-12))
    if difference > SAME:  # one draw misleads the attack, and luck counts as robust
        has_eot = all(plan.name == "autoattack-rand" for plan in plans)
        text = f"four passes differ by {difference:.1g} of the largest output. Use autoattack-rand alone."
        yield Finding("randomised", "warning" if has_eot else "error", text)
    gradients = list(_gradients(victim, x, y))
    yield from gradients
    if not any(finding.severity == "error" for finding in gradients):
        yield from _huge_radius(victim, x, y)


def _gradients(victim: Victim, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """Input gradients that are missing, not finite or exactly zero."""
    for loss in ("ce", "margin"):
        with torch.enable_grad():
            images = x.detach().requires_grad_()
            total = ATTACK_LOSSES[loss](victim.model(images), y).sum()
            grad = None
            with naming_reentrant():
                if total.requires_grad:
                    grad = torch.autograd.grad(total, images, allow_unused=True)[0]
        if grad is None:
            text = "no differentiable path leads from the images to the outputs. Look for detach or rounding."
            yield Finding("no_gradient", "error", text)
            return
        if num := int((~grad.flatten(1).isfinite().all(1)).sum()):
            text = f"the {loss} loss has NaN or infinite gradients in {num} of {len(x)} images."
            yield Finding("gradient_not_finite", "error", text)
            return
        if share := float((grad.flatten(1) == 0).all(1).float().mean()):
            text = f"the gradient of the {loss} loss is zero in {100 * share:.0f} % of the first batch."
            advice = "Add margin-20, dlr-20 or autoattack." if loss == "ce" else "Add autoattack:square."
            is_error = loss == "margin" and share > 0.5
            yield Finding("zero_gradient", "error" if is_error else "warning", f"{text} {advice}")


def _huge_radius(victim: Victim, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """An attack that may turn any image into plain gray must succeed; else gradients lead nowhere."""
    with torch.no_grad():
        is_left = is_right(victim.model(x), y)
        for loss in ("ce", "margin") if bool(is_left.any()) else ():
            attack = Attack(HUGE, num_steps=20, step_size=HUGE.step_for(20), loss=loss)
            x_adv = attack(victim.model, x, y, generator_from(x.device, victim.seed, "preflight", loss))
            is_left = is_left & is_right(victim.model(x_adv), y)
    if (share := float(is_left.float().mean())) > 0.1:
        text = f"PGD-20 within {HUGE} leaves {percent(share)} % right: gradients are masked. Add autoattack."
        yield Finding("huge_radius", "warning", text)


def check_results(evaluation: Evaluation, num_classes: int) -> Iterator[Finding]:
    """Clean accuracy that guessing would reach; what is odd about each attack, and about each two."""
    share, num = evaluation.clean_accuracy, evaluation.num_examples
    if wilson_interval(share, num)[0] <= 1 / num_classes:
        text = f"clean accuracy is {percent(share)} %, not above chance. Check weights and labels."
        yield Finding("chance", "warning", text)
    for result in evaluation.attacks:
        who, eps = f"{result.attack} ({result.threat})", result.threat.eps
        if eps > 0 and evaluation.is_clean.any() and torch.equal(result.is_robust, evaluation.is_clean):
            text = f"{who} breaks no example. Check gradients and eps, in units of [0, 1]."
            yield Finding("no_effect", "warning", text)
        if result.furthest > 1.001 * eps + 1e-6:
            text = f"{who} used length {result.furthest:.6g} > {eps:.6g}: accuracy is too low. Report this."
            yield Finding("outside_ball", "warning", text)
        shares = list(result.after.values())
        place = list(result.after).index("square") if "square" in result.after else 0
        if place and (gain := shares[place - 1] - shares[place]) > max(0.002, 1.5 / num):
            text = f"{who}: square lowers accuracy by {percent(gain)} %: gradients mislead. Attack by hand."
            yield Finding("square_helps", "warning", text)
    for weak, strong in permutations(evaluation.attacks, 2):
        if _is_stronger(strong, weak):
            more, fewer, p_value = mcnemar(strong.is_robust, weak.is_robust)
            if more > fewer and p_value < 0.05:  # not chance
                who, other = (f"{result.attack} ({result.threat})" for result in (strong, weak))
                text = f"{who} leaves more right than {other}, which is weaker. Report the worst case."
                yield Finding("stronger_is_weaker", "warning", text)


def _is_stronger(strong: AttackResult, weak: AttackResult) -> bool:
    """Tell whether the first should leave no more examples right: by its radius, steps, restarts or parts."""
    if strong.attack.startswith(TRANSFER) or weak.attack.startswith(TRANSFER):  # made without this model
        return strong.threat == weak.threat and not strong.attack.startswith(TRANSFER)
    a, b = parse_attack(strong.attack), parse_attack(weak.attack)
    if strong.threat != weak.threat:
        return a == b and strong.threat.norm == weak.threat.norm and strong.threat.eps > weak.threat.eps
    if isinstance(b, EnsemblePlan):
        return False
    if isinstance(a, EnsemblePlan):
        return not a.components
    has_no_less = a.num_steps >= b.num_steps and a.num_restarts >= b.num_restarts
    return a.loss == b.loss and a != b and has_no_less
