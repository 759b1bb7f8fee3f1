"""Checks of a model under attack: what makes robust accuracies too high without anybody noticing.

After Carlini et al. 2019 (arXiv 1902.06705, section 5), Athalye et al. 2018 (arXiv 1802.00420, section 3.1)
and the checks of AutoAttack. ``before`` looks at one batch before any attack; ``after`` looks at the results,
and never stops. Cost of ``before``: 7 forward passes, 2 backward ones and, for the attack with a huge radius,
40 more of both, on one batch.
"""

from collections.abc import Iterator, Sequence
from itertools import permutations

import torch
from torch import Tensor, nn

from wcitrain.attacks import Attack, ThreatModel, attack_loss
from wcitrain.evaluation.evaluation import AttackResult, Evaluation
from wcitrain.evaluation.findings import Finding
from wcitrain.evaluation.intervals import mcnemar, wilson_interval
from wcitrain.evaluation.naming import EnsemblePlan, GradientPlan, Plan, parse_attack
from wcitrain.evaluation.stages import is_right
from wcitrain.preserve import undisturbed
from wcitrain.seeding import generator_from

SAME = 1e-4  # relative difference of two outputs below which they are the same: float32 on a GPU reaches 1e-5
HUGE = 0.5  # linf radius in which every image can be made plain gray: nothing is left to be robust about
SIGNIFICANT = 0.05  # p-value below which "the stronger attack is weaker" is not chance


def before(
    model: nn.Module, x: Tensor, y: Tensor, plans: Sequence[Plan], flags: Sequence[bool], seed: int
) -> list[Finding]:
    """Return what is found on one batch before any attack.

    Args:
        model: In eval mode.
        x: Images [B, *dims].
        y: Their classes [B].
        plans: The attacks to come.
        flags: ``training`` of every module as the user left it.
        seed: Of the attack with a huge radius.
    """
    with torch.no_grad():
        logits = model(x)
        if not bool(logits.isfinite().all()):  # ``check_logits`` has said so
            return []
        again = torch.stack([model(x) for _ in range(3)])
    findings = [*_probabilities(logits), *_random(logits, again, plans)]
    findings += _modes(model, x, logits, flags)
    gradients = list(_gradients(model, x, y))
    findings += gradients
    if not any(finding.severity == "error" for finding in gradients):
        findings += _huge_radius(model, x, y, seed)
    return findings


def check_images(x: Tensor) -> list[Finding]:
    """Return the finding of images outside [0, 1] or not finite; all of them are looked at."""
    low, high = float(x.min()), float(x.max())
    if low >= -1e-6 and high <= 1 + 1e-6:
        return []
    text = (
        f"got images from {low:.3g} to {high:.3g}; expected [0, 1], where eps is measured and attacks clip. "
        "Put the normalisation inside the model (create_model does), and give the images in [0, 1]."
    )
    return [Finding("images_outside_box", "error", text)]


def check_logits(is_finite: Tensor) -> list[Finding]:
    """Return the finding of clean images [N] whose logits are not finite; they count as wrong."""
    num = int((~is_finite).sum())
    text = (
        f"the model returns NaN or infinity on {num} of {len(is_finite)} clean images, which count as wrong. "
        "Check its weights."
    )
    return [Finding("not_finite", "error", text)] if num else []


def _probabilities(logits: Tensor) -> Iterator[Finding]:
    """Probabilities instead of logits, their logarithms, or other outputs that cannot leave [0, 1]."""
    is_bounded = float(logits.min()) >= 0 and float(logits.max()) <= 1
    if is_bounded and bool(((logits.sum(1) - 1).abs() < SAME).all()):
        yield Finding(
            "probabilities",
            "error",
            "the outputs are between 0 and 1 and sum to one, as after a softmax; expected logits. A second "
            "softmax in the loss flattens its gradient, so that attacks fail. Remove the softmax from the "
            "model.",
        )
    elif is_bounded:
        yield Finding(
            "probabilities",
            "warning",
            "the outputs are all between 0 and 1, as after a sigmoid; expected logits. The softmax in the "
            "loss flattens their gradient, so that attacks fail. Remove what bounds them from the model.",
        )
    elif bool(((logits.double().exp().sum(1) - 1).abs() < SAME).all()):
        yield Finding(
            "probabilities",
            "warning",
            "the outputs are log-probabilities: their exponentials sum to one. That changes nothing after "
            "log_softmax, but the logarithm of a softmax loses its gradient where the model is sure. Return "
            "the logits.",
        )


def _random(logits: Tensor, again: Tensor, plans: Sequence[Plan]) -> Iterator[Finding]:
    """Outputs [B, C] that are others each time."""
    size = logits.abs().amax().clamp_min(1e-12)
    difference = float((logits - again).abs().amax() / size)
    if difference > SAME:
        has_eot = all(isinstance(plan, EnsemblePlan) and plan.version == "rand" for plan in plans)
        yield Finding(
            "randomised",
            "warning" if has_eot else "error",
            f"four passes over the same images differ by {difference:.1g} of the largest output, in eval "
            "mode; expected the same. Gradients of one draw mislead the attack, and luck counts as "
            "robustness. Switch the randomness off, or use only autoattack-rand, which averages over 20 "
            "draws.",
        )


def _modes(model: nn.Module, x: Tensor, logits: Tensor, flags: Sequence[bool]) -> Iterator[Finding]:
    """Train mode that the user left on, where it changes anything."""
    modules = list(model.modules())
    if not any(flags):
        return
    with undisturbed(model, training=None), torch.no_grad():  # batch norm would move its statistics
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        trained = model(x)
    if float((trained - logits).abs().amax() / logits.abs().amax().clamp_min(1e-12)) > SAME:
        kinds = sorted(
            {type(m).__name__ for m, on in zip(modules, flags, strict=True) if on and not list(m.children())}
        )
        yield Finding(
            "train_mode",
            "warning",
            "the model was handed over in train mode, where its outputs are others (modules in train mode: "
            f"{', '.join(kinds)}); it is evaluated in eval mode, running statistics and no dropout. Call "
            "model.eval() if that is what you mean.",
        )


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """Input gradients that are missing, not finite or exactly zero."""
    shares = {}
    for name in ("ce", "margin"):
        with torch.enable_grad():
            images = x.detach().requires_grad_()
            losses = attack_loss(name)(model(images), y)
            grad = (
                torch.autograd.grad(losses.sum(), images, allow_unused=True)[0]
                if losses.requires_grad
                else None
            )
        if grad is None:
            yield Finding(
                "no_gradient",
                "error",
                "the outputs do not depend on the images by any differentiable path, so gradient attacks "
                "cannot move. Look for detach, no_grad, rounding or a quantiser in the model; replace it by "
                "a smooth stand-in, or attack with autoattack:square, which needs no gradient.",
            )
            return
        grad = grad.flatten(1)
        if not bool(grad.isfinite().all()):
            yield Finding(
                "gradient_not_finite",
                "error",
                f"the {name} loss has NaN or infinite gradients in {int((~grad.isfinite().all(1)).sum())} of "
                f"{len(x)} images. Find the operation (torch.autograd.set_detect_anomaly) and make it "
                "finite.",
            )
            return
        shares[name] = float((grad == 0).all(1).float().mean())
    if shares["margin"] > 0:
        yield Finding(
            "zero_gradient",
            "error" if shares["margin"] > 0.5 else "warning",
            f"the gradient of the margin is exactly zero in {100 * shares['margin']:.0f} % of the images of "
            "the first batch: gradient attacks do not move them. Look for rounding, saturation or dead units "
            "in the model; add autoattack:square.",
        )
    elif shares["ce"] > 0:
        yield Finding(
            "zero_gradient",
            "warning",
            f"the gradient of the cross-entropy is exactly zero in {100 * shares['ce']:.0f} % of the images "
            "of the first batch, as the logits are so large that it underflows; PGD does not move them. "
            "Attack with margin-20, dlr-20 or autoattack as well.",
        )


def _huge_radius(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Iterator[Finding]:
    """An attack that may turn any image into plain gray must succeed."""
    with torch.no_grad():
        is_left = is_right(model(x), y)
    if not bool(is_left.any()):
        return
    for loss in ("ce", "margin"):
        threat = ThreatModel("linf", HUGE)
        attack = Attack(threat, num_steps=20, step_size=threat.step_for(20), loss=loss)
        x_adv = attack(model, x, y, generator=generator_from(x.device, seed, "preflight", loss))
        with torch.no_grad():
            is_left = is_left & is_right(model(x_adv), y)
    share = float(is_left.float().mean())
    if share > 0.1:
        yield Finding(
            "huge_radius",
            "warning",
            f"PGD-20 within linf {HUGE:g}, where every image can be turned into plain gray, leaves "
            f"{100 * share:.0f} % of the first batch right; expected about none. The gradients do not lead "
            "to adversarial images (masked, shattered or vanishing); do not trust gradient attacks here. Add "
            "autoattack, whose square attack needs no gradient, or attack by hand.",
        )


def after(evaluation: Evaluation, num_classes: int) -> list[Finding]:
    """Return what is found in the results; all are warnings, as the numbers are there."""
    findings = list(_chance(evaluation, num_classes))
    for result in evaluation.attacks:
        findings += _attack_alone(evaluation, result)
    for weak, strong in permutations(evaluation.attacks, 2):
        if why := _is_stronger(strong, weak):
            test = mcnemar(strong.is_robust, weak.is_robust)
            if test.only_a > test.only_b and test.p_value < SIGNIFICANT:
                text = (
                    f"{strong.attack} ({strong.threat}) leaves {_percent(strong)} right and {weak.attack} "
                    f"({weak.threat}) {_percent(weak)}, although the first {why}; expected no more. Some "
                    "attack did not converge or gradients mislead: look at the loss along the steps, and "
                    "report the worst case."
                )
                findings.append(Finding("stronger_is_weaker", "warning", text))
    return findings


def _chance(evaluation: Evaluation, num_classes: int) -> Iterator[Finding]:
    """Clean accuracy that guessing would reach."""
    low, _ = wilson_interval(evaluation.clean_accuracy, evaluation.num_examples)
    if low <= 1 / num_classes:
        yield Finding(
            "chance",
            "warning",
            f"clean accuracy is {100 * evaluation.clean_accuracy:.1f} % on {evaluation.num_examples} "
            f"examples, not above chance ({100 / num_classes:.1f} %). Check weights, labels, the order of "
            "channels and the normalisation.",
        )


def _attack_alone(evaluation: Evaluation, result: AttackResult) -> Iterator[Finding]:
    """No effect; perturbations too long; an attack without gradients that finds what others missed."""
    if (
        result.threat.eps > 0
        and bool(evaluation.is_clean.any())
        and torch.equal(result.is_robust, evaluation.is_clean)
    ):
        yield Finding(
            "no_effect",
            "warning",
            f"{result.attack} ({result.threat}) breaks no example. Unless the radius is tiny or the examples "
            "are few, it does not work on this model. Check eps (in [0, 1] units) and gradients.",
        )
    if result.furthest > 1.001 * result.threat.eps + 1e-6:
        yield Finding(
            "outside_ball",
            "warning",
            f"{result.attack} ({result.threat}) used a perturbation of length {result.furthest:.6g}; "
            f"expected at most {result.threat.eps:.6g}. The accuracy is too low; report this.",
        )
    names, shares = list(result.after), list(result.after.values())
    if "square" in names[1:]:
        place = names.index("square")
        gain = shares[place - 1] - shares[place]
        if gain > max(0.002, 1.5 / evaluation.num_examples):
            yield Finding(
                "square_helps",
                "warning",
                f"{result.attack} ({result.threat}): the square attack, which needs no gradient, lowers "
                f"robust accuracy by another {100 * gain:.1f} points after the gradient attacks. Gradients "
                "mislead; give it more queries, or attack by hand.",
            )


def _is_stronger(strong: AttackResult, weak: AttackResult) -> str:
    """Return why the first attack should leave no more examples right than the second, or ""."""
    a, b = parse_attack(strong.attack), parse_attack(weak.attack)
    if strong.threat.norm != weak.threat.norm:
        return ""
    if strong.attack == weak.attack:
        return "has the larger radius" if strong.threat.eps > weak.threat.eps else ""
    if strong.threat != weak.threat:
        return ""
    if isinstance(a, EnsemblePlan):
        return "is an ensemble" if isinstance(b, GradientPlan) and not a.components else ""
    return "has more steps or restarts" if isinstance(b, GradientPlan) and a.includes(b) else ""


def _percent(result: AttackResult) -> str:
    """Return "41.2 %"."""
    return f"{100 * float(result.is_robust.float().mean()):.1f} %"
