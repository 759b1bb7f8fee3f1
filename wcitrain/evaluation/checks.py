"""Checks of a model before it is attacked, and of the results: what makes robust accuracies wrong unnoticed.

After Carlini et al. 2019 (arXiv 1902.06705, section 5), Athalye et al. 2018 (arXiv 1802.00420, section 3.1)
and the checks of AutoAttack. Cost on one batch, F forward passes and FB forward and backward ones:

    before  outputs: 4 F repeated, 1 F a grey level away, 1 F of an eighth of the images, 1 F recorded
            gradients: 2 FB of two losses, 1 FB and 3 F of finite differences (in batches below 100 more F,
            where they say nothing twice and thrice), 1 F of pixels that have none, 40 FB in a huge radius
            randomised models: 2 FB more
    after   for each threat 2 S FB with twice the S steps of the longest attack, 60 FB of targeted APGD, and
            100 F of random squares

Findings on results are warnings, as the numbers are there.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from wcitrain.attacks import APGD, ATTACK_LOSSES, ThreatModel
from wcitrain.attacks.ascent import outside_box
from wcitrain.attacks.threat import project, shaped
from wcitrain.evaluation.attacking import Victim, is_right
from wcitrain.evaluation.gradient_checks import LEVEL, check_gradients, margin_gradient, random_signs
from wcitrain.evaluation.intervals import mcnemar, wilson_interval
from wcitrain.evaluation.plans import EnsemblePlan, GradientPlan, Plan, parse_attack
from wcitrain.evaluation.results import THIS_MODEL, AttackResult, Evaluation, Finding, percent
from wcitrain.seeding import generator_from

SAME = 1e-4  # relative difference of two outputs below which they are the same: float32 on a GPU reaches 1e-5

MASKED = "attacks are weak, or gradients masked."
SURVIVORS = {  # what breaks them, what it means, and from how much accuracy on it is said
    "more_steps": ("twice the steps break", "the attack has not converged. Take more.", 0.005),
    # A point or so is what PGD and margin leave to it where nothing is wrong.
    "targeted_helps": ("APGD towards other classes breaks", f"{MASKED} Add apgd-t or autoattack.", 0.02),
    "random_search": ("100 random steps break", f"{MASKED} Add autoattack.", 0.005),
}


class PreflightWarning(UserWarning):
    """A finding that may make the numbers wrong."""


def check_model(victim: Victim, plans: Sequence[Plan], threats: Sequence[ThreatModel]) -> Iterator[Finding]:
    """All images, in whose box eps is measured, and their logits; on one batch, what misleads attacks."""
    low, high = float(victim.x.min()), float(victim.x.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        text = f"got images from {low:.3g} to {high:.3g}; {outside_box(low, high)}"
        yield Finding("images_outside_box", "error", text)
        return
    if num := int((~victim.clean.is_finite).sum()):
        text = f"NaN or infinite logits on {num} of {len(victim.x)} clean images, which count as wrong."
        yield Finding("not_finite", "error", text)
    x, y = victim.batch(slice(max(victim.batch_size, 2)))  # two: a batch of one hides what others do to it
    with torch.no_grad():
        logits = victim.model(x)
        if not bool(logits.isfinite().all()):
            return
    if float(logits.min()) >= 0 and float(logits.max()) <= 1:
        is_softmax = bool(((logits.sum(1) - 1).abs() < SAME).all())
        text = "the outputs are all between 0 and 1; expected logits. Remove the softmax or what bounds them."
        yield Finding("probabilities", "error" if is_softmax else "warning", text)
    outputs = list(_outputs(victim, plans, x, y, logits))
    yield from outputs
    yield from check_gradients(victim, threats, x, y, {finding.name for finding in outputs})


def _outputs(
    victim: Victim, plans: Sequence[Plan], x: Tensor, y: Tensor, logits: Tensor
) -> Iterator[Finding]:
    """Outputs that differ between passes, with the other images of the batch, or with autograd's recording.

    The last two may differ by what random steps of one grey level in the image itself change: that is far
    above rounding in float32, above it in bfloat16, and far below what an attack may do.
    """

    def difference(other: Tensor, own: Tensor = logits) -> float:
        return float((other - own).abs().amax() / logits.abs().amax().clamp_min(1e-12))

    with torch.no_grad():
        repeated = max(difference(victim.model(x)) for _ in range(3))
        if repeated > SAME:  # one draw misleads the attack, and luck counts as robust
            is_rand = all(plan.name == "autoattack-rand" for plan in plans)
            used = 20 if is_rand and victim.eot == 1 else victim.eot
            cosine, num = _noise(victim, x, y)
            text = f"four passes differ by {repeated:.1g} of the largest output: luck counts as robust, and"
            text += f" gradients of two draws have a cosine of {cosine:.2f}. Means of {num} have 0.9 with the"
            text += f" expected one: {f'these are of {used}' if used > 1 else f'use --eot {num}'}."
            yield Finding("randomised", "warning" if used > 1 else "error", text)
            return
        if victim.eot > 1:
            text = f"four passes agree: {victim.eot} draws of a gradient are the same. Leave --eot out."
            yield Finding("eot_without_noise", "warning", text)
        level = difference(victim.model((x + LEVEL * random_signs(victim, x)).clamp(0, 1)))
        some = torch.arange(0, len(x), max(2, len(x) // 8), device=x.device).flip(0)
        moved = difference(victim.model(x[some]), logits[some])
    if moved > max(SAME, level):
        text = f"outputs move by {moved:.1g} of the largest with the other images of the batch, which attacks"
        text += " change too: accuracies depend on the batch size. Look for batch statistics in eval mode."
        yield Finding("batch_dependent", "error", text)
    with torch.enable_grad():
        recorded = difference(victim.model(x.detach().requires_grad_()).detach())
    if recorded > max(SAME, level):
        text = f"outputs move by {recorded:.1g} of the largest where autograd records: attacks climb another"
        text += " model than the one that is judged. Remove what asks for requires_grad or the grad mode."
        yield Finding("recorded", "error", text)


def _noise(victim: Victim, x: Tensor, y: Tensor) -> tuple[float, int]:
    """Return the mean cosine c of two draws of the margin's gradient, and the K whose mean is good.

    With signal S and noise N, c = S / (S + N), and that of a mean of K with the expectation is the root of
    K S / (K S + N): at least .9 for K = .81 / .19 (1 − c) / c.
    """
    a, b = (margin_gradient(victim, x, y).flatten(1) for _ in range(2))
    cosine = float(torch.cosine_similarity(a, b).mean())
    return cosine, max(2, math.ceil(4.26 * (1 - cosine) / max(cosine, 0.005)))


@torch.no_grad()
def check_survivors(
    victim: Victim, plans: Sequence[Plan], threats: Sequence[ThreatModel], is_robust: Sequence[Tensor]
) -> Iterator[Finding]:
    """One batch of what survived all plans within each threat: other attacks must break few.

    They are more steps, steps of adaptive length towards each of three classes, and no gradients at all. A
    finding is where the lower end of the 95 % interval says that robust accuracy is half a point too high, of
    the second two points. AutoAttack has all, and is not followed; nor is a randomised model, which new draws
    break.
    """
    if not plans or any(plan.name in ("autoattack", "autoattack-plus") for plan in plans):
        return
    iterated = [plan for plan in plans if isinstance(plan, GradientPlan) and plan.num_steps > 1]
    for threat, flags in zip(threats, is_robust, strict=True):
        places, broken = flags.nonzero().flatten()[: victim.batch_size], {}
        if not len(places) or threat.eps == 0:
            continue
        x, y = victim.batch(places)
        if iterated:
            longest = max(iterated, key=lambda plan: plan.num_steps)
            more = replace(longest, num_steps=2 * longest.num_steps, num_restarts=1)
            broken["more_steps"] = more.stages(victim, threat)[0].attack(x, y, places)
        if bool((x >= -1e-6).all() and (x <= 1 + 1e-6).all()):  # else that is said already
            aimed: dict[str, Any] = {"loss": "targeted-dlr"} if victim.clean.num_classes > 3 else {}
            generator = generator_from(x.device, victim.seed, "targeted")
            broken["targeted_helps"] = APGD(threat, 20, num_targets=3, **aimed)(victim.model, x, y, generator)
        broken["random_search"] = random_squares(victim, x, y, threat)
        for name, x_adv in broken.items():
            num = int((~is_right(victim.model(x_adv), y)).sum())
            what, cause, least = SURVIVORS[name]
            if _is_many(num, len(places), float(flags.double().mean()), least):
                text = f"{what} {num} of {len(places)} images that survived {threat}: {cause}"
                yield Finding(name, "warning", text)


def random_squares(victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, num_steps: int = 100) -> Tensor:
    """Return images of a random search for a higher margin loss: no gradients, ``num_steps`` forward passes.

    After the Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): stripes, then squares of one sign
    a channel, ever smaller, each kept for the images whose loss it raises. Here all images of a batch share
    the places, and l2 and l1 have the same squares, as long as the ball's diameter before the projection.
    """
    generator = generator_from("cpu", victim.seed, "random squares")
    num, channels, height, width = x.shape
    order = {"linf": math.inf, "l2": 2, "l1": 1}[threat.norm]
    best, best_loss = x, torch.full((num,), -math.inf, device=x.device)
    for step in range(num_steps):
        side = math.ceil(0.8 * min(height, width) * (1 - step / num_steps))
        window = torch.zeros(height, width)
        row, column = (int(torch.randint(n - side + 1, (), generator=generator)) for n in (height, width))
        window[row : row + side, column : column + side] = 1
        shape = (num, channels, 1, width if step == 0 else 1)
        signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
        move = (signs if step == 0 else signs * window).expand(x.shape).to(x)
        move = move * 2 * threat.eps / torch.linalg.vector_norm(move[0], order)
        candidate = (x + project(best - x + move, threat, x)).clamp(0, 1)
        loss = ATTACK_LOSSES["margin"](victim.model(candidate), y)
        is_better = loss > best_loss
        best, best_loss = torch.where(shaped(is_better, x), candidate, best), loss.maximum(best_loss)
    return best


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
    yield from _transferred(evaluation)
    for weak, strong in permutations([r for r in evaluation.attacks if not r.is_transferred], 2):
        if _is_stronger(strong, weak):
            more, fewer, p_value = mcnemar(strong.is_robust, weak.is_robust)
            if more > fewer and p_value < 0.05:  # not chance
                who, other = (f"{result.attack} ({result.threat})" for result in (strong, weak))
                text = f"{who} leaves more right than {other}, which is weaker. Report the worst case."
                yield Finding("stronger_is_weaker", "warning", text)


def _transferred(evaluation: Evaluation) -> Iterator[Finding]:
    """Images made on another model, or by another attack on this one, must break few that attacks left."""
    for result in evaluation.attacks:
        own = [r.is_robust for r in evaluation.attacks if r.threat == result.threat and not r.is_transferred]
        if result.is_transferred and own:
            left = torch.stack(own).all(0)
            num, total = int((left & ~result.is_robust).sum()), int(left.sum())
            if _is_many(num, total, total / len(left)):
                is_own = result.attack.endswith(THIS_MODEL)
                name, what = ("weak_attack", "this") if is_own else ("transfer_helps", "another")
                text = f"images made on {what} model break {num} of {total} that the attacks left within"
                cause = "these attacks are weak" if is_own else "gradients are masked"
                text += f" {result.threat}: {cause}. Report the worst case, and add autoattack."
                yield Finding(name, "warning", text)


def _is_many(num: int, total: int, share: float, least: float = 0.005) -> bool:
    """Whether ``num`` broken of ``total`` survivors, the ``share`` of all, are ``least`` of the accuracy.

    By the lower end of the 95 % interval: chance is not enough.
    """
    return total > 0 and share * wilson_interval(num / total, total)[0] > least


def _is_stronger(strong: AttackResult, weak: AttackResult) -> bool:
    """Tell whether the first should leave no more examples right: by its radius, steps, restarts or parts."""
    (first, *how), (second, *other) = strong.attack.split(), weak.attack.split()
    a, b = parse_attack(first), parse_attack(second)
    if how != other:
        return False
    if strong.threat != weak.threat:
        return a == b and strong.threat.norm == weak.threat.norm and strong.threat.eps > weak.threat.eps
    if isinstance(b, EnsemblePlan):
        return False
    if isinstance(a, EnsemblePlan):
        return not a.components
    has_no_less = a.num_steps >= b.num_steps and a.num_restarts >= b.num_restarts
    return a.loss == b.loss and a != b and has_no_less
