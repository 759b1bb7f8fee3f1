"""Checks of a model's input gradients: missing, wrong, blind, or leading nowhere.

The costs are in ``checks``, whose part this is.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wcitrain.attacks import ATTACK_LOSSES, Attack, ThreatModel
from wcitrain.attacks.ascent import input_gradient
from wcitrain.attacks.threat import shaped
from wcitrain.evaluation.attacking import Victim, is_right
from wcitrain.evaluation.results import Finding, percent
from wcitrain.preserve import naming_reentrant
from wcitrain.seeding import generator_from, seed_from

HUGE = ThreatModel("linf", 0.5)  # every image can be made plain gray: nothing is left to be robust about
LEVEL = 1 / 255  # of grey, of an 8-bit image


def check_gradients(
    victim: Victim, threats: Sequence[ThreatModel], x: Tensor, y: Tensor, known: set[str]
) -> Iterator[Finding]:
    """What makes gradients useless to an attack, on one batch; ``known`` are names of earlier findings."""
    findings = list(_gradients(victim, x, y))
    yield from findings
    if any(finding.severity == "error" for finding in findings):
        return
    if "batch_dependent" not in known:  # else every image has a part in the gradient of the others
        yield from _finite_differences(victim, x, y)
    yield from _blind_pixels(victim, threats, x, y)
    yield from _huge_radius(victim, x, y)


def random_signs(victim: Victim, x: Tensor, *parts: object) -> Tensor:
    """Return random signs like ``x``."""
    generator = generator_from("cpu", victim.seed, "preflight", *parts)
    return (torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1).to(x)


def margin_gradient(victim: Victim, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the margin loss."""
    return input_gradient(lambda images: ATTACK_LOSSES["margin"](victim.model(images), y), x)


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
            text = "no differentiable path leads from the images to the outputs. Look for detach or rounding,"
            text += " and go around the module that does it: --bpda MODULE."
            yield Finding("no_gradient", "error", text)
            return
        if num := int((~grad.flatten(1).isfinite().all(1)).sum()):
            text = f"the {loss} loss has NaN or infinite gradients in {num} of {len(x)} images."
            yield Finding("gradient_not_finite", "error", text)
            return
        if share := float((grad.flatten(1) == 0).all(1).float().mean()):
            text = f"the gradient of the {loss} loss is zero in {100 * share:.0f} % of the first batch."
            advice = "Add margin-20, dlr-20 or autoattack."
            if loss == "margin":
                advice = "Add autoattack:square, or go around what rounds or clips: --bpda MODULE."
            is_error = loss == "margin" and share > 0.5
            yield Finding("zero_gradient", "error" if is_error else "warning", f"{text} {advice}")


def _finite_differences(victim: Victim, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """The gradient g of f = z_k − z_y, k the strongest wrong class, against steps of random signs v.

        Δ± = f(x ± h v) − f(x),   e± = Δ± ∓ h g·v                                                          (1)
        R  = − mean of 2 e₊ e₋ / ( 2 h² ‖g‖² + Δ₊² + Δ₋² )                                                 (2)

    What a wrong g leaves out is odd, e± = ± h (∇f − g)·v, so R > 0: 1.4 where the sign is wrong, near 1 for
    an unrelated one, .1 where about a sixth of the squared gradient is missing. Curvature is even, R < 0.
    The kinks of a piecewise linear network on either side have nothing to do with each other, nor have two
    roundings in whatever precision: R = 0 on average, up to third order in h, and needs no threshold of its
    own but its standard error. Where the e are as large as the Δ nothing is known, and h grows. The images
    are shrunk by h towards gray, so that no step leaves the box.
    """
    for h in (LEVEL, 4 * LEVEL, 16 * LEVEL):
        product, square, jump = _differences(victim, x * (1 - 2 * h) + h, y, h)
        mean, error = -float(product.mean()), float(product.std() / math.sqrt(len(product)))
        if mean > max(0.1, 4 * error):
            text = f"steps of {255 * h:.0f}/255 contradict it (R = {mean:.2f} ± {error:.2f}): attacks go"
            text = f"{text} astray. Look for detach, custom backward passes, oscillations. --bpda MODULE goes"
            text = f"{text} around a module, autoattack:square needs no gradient."
            yield Finding("gradient_wrong", "warning" if victim.has_stand_ins else "error", text)
            return
        if float(square.mean()) < 0.25:  # what the gradient predicts stands out
            return
    if jump > 8 * 2**-8:  # less may be bfloat16, which rounds by up to 2^-9 a layer
        text = "the outputs are too rough for gradients to predict steps of 16/255: rounded coarsely, or"
        yield Finding("rough", "warning", f"{text} shattered. Add autoattack:square, or --bpda MODULE.")


def _differences(victim: Victim, x: Tensor, y: Tensor, h: float) -> tuple[Tensor, Tensor, float]:
    """Return 2 e₊ e₋ and e₊² + e₋² over the denominator of (2) for at least 100 pairs of image and signs.

    And the root mean square of the e over the largest logit.
    """

    def logits(images: Tensor) -> Tensor:
        torch.manual_seed(seed_from(victim.seed, "preflight"))  # a randomised model: one function
        return victim.model(images).float()

    def f(z: Tensor) -> Tensor:
        return (z.gather(1, wrong) - z.gather(1, y[:, None])).squeeze(1)

    rows = []
    with torch.no_grad():
        at_x = logits(x)
        wrong = at_x.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
        g, start = h * input_gradient(lambda images: f(logits(images)), x), f(at_x)
        for draw in range(math.ceil(100 / len(x))):
            v = random_signs(victim, x, h, draw)
            up, down = (f(logits(x + sign * h * v)) - start for sign in (1, -1))
            slope = (g * v).flatten(1).sum(1)
            size = 2 * g.flatten(1).square().sum(1) + up**2 + down**2
            errors = up - slope, down + slope
            products = 2 * errors[0] * errors[1], errors[0] ** 2 + errors[1] ** 2, size
            rows.append(torch.stack(products))
    product, square, size = torch.cat(rows, 1)
    jump = float((square.mean() / 2).sqrt() / at_x.abs().amax().clamp_min(1e-12))
    return product / size.clamp_min(1e-30), square / size.clamp_min(1e-30), jump


def _blind_pixels(victim: Victim, threats: Sequence[ThreatModel], x: Tensor, y: Tensor) -> Iterator[Finding]:
    """Pixels whose gradient is exactly zero must not matter: moved to gray by eps (l2, l1: 8/255)."""
    gradient = margin_gradient(victim, x, y)
    size = gradient.flatten(1).norm(dim=1)
    is_blind = (gradient == 0) & shaped(size > 0, x)
    if not threats or not bool(is_blind.any()):
        return
    step = max(t.eps if t.norm == "linf" else min(t.eps, 8 * LEVEL) for t in threats)
    with torch.no_grad():
        before, after = (
            ATTACK_LOSSES["margin"](victim.model(images), y)
            for images in (x, x + is_blind * (0.5 - x).clamp(-step, step))
        )
    ratio = (after - before) ** 2 / ((after - before) ** 2 + (step * size) ** 2).clamp_min(1e-30)
    if (mean := float(ratio.mean())) > 0.1:
        share = 100 * float(is_blind.float().mean())
        text = f"{share:.0f} % of the pixels have a gradient of exactly zero, but matter (R = {mean:.2f}):"
        text += " attacks do not see what is clipped or detached. Add autoattack:square, or --bpda MODULE."
        yield Finding("blind_pixels", "warning", text)


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
