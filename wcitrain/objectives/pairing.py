"""Losses of two predictions: at adversarial *and* clean images (TRADES, MART, ALP), or of two heads.

Legend: B batch, C classes, z = f(x) and z' = f(x_adv) logits [B, C], p = softmax(z), q = softmax(z'),
J = ∂z/∂w, J' = ∂z'/∂w; r_n ∈ {0, 1, 2, 3} quarter turns of image n, R_r the rotation by r of them, f the
class head, g the rotation head of one network.

Two forward passes, clean first, so that BatchNorm sees separate batches; gradients flow through both. What
Gauss–Newton sees of the term between z and z' is computed from what the term compares, so it vanishes where
x_adv = x, as the Hessian of the term itself does:

    ‖z' − z‖²    2 (J' − J)ᵀ (J' − J) and the curvature of the network times z' − z, which is left out     (1)
    KL(p ‖ q)    as for 2 ‖√q − √p‖², equal to second order: ``kl_output``                                 (2)
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from wcitrain.attacks.losses import ATTACK_LOSSES, LabelLossName, LossName, ce, kl_divergence
from wcitrain.curvature.loss import Loss, Output, cross_entropy
from wcitrain.method import NonNegative, method, setting
from wcitrain.objectives.objective import PGDAT, with_term
from wcitrain.params import logits_of, precise

TWICE = "2 forward and 2 backward passes, and the attack's"


@method
class TRADES(PGDAT):
    """Clean accuracy, and the same prediction everywhere around.

        CE(f(x), y) + beta (1/B) Σ_n KL( f(x_n) ‖ f(x_adv,n) ),   x_adv maximises the KL                   (3)

    As in the authors' code the KL is summed over classes and averaged over the batch; the attack starts from
    x + 0.001 N(0, I), since at x itself the KL has no gradient. Their CIFAR-10 settings: eps 0.031, 10 steps
    of 0.007. Gauss–Newton: the cross-entropy exactly, the KL by (2).

    Their code runs the clean images, x_adv, and the clean images again for the KL, all in train mode: of the
    running statistics after a step, m + m (1 − m)² is of clean images and m (1 − m) of x_adv, with m the
    momentum of BatchNorm. ``clean_passes=2`` has these statistics; the second pass is without a gradient,
    which is theirs wherever both clean passes give the same logits (no dropout). With one it is m (1 − m) and
    m, more of x_adv than of clean images. (TRADES-AWP runs x_adv first, then the clean images twice.)
    """

    attack_loss: LossName = "kl"
    beta: NonNegative = setting(6.0, "Weight of the divergence, the paper's 1/lambda.")
    clean_passes: Literal[1, 2] = setting(1, "Clean passes a step that move running statistics; authors: 2.")
    label = "TRADES β={beta:g}"
    source = "Zhang et al., arXiv 1901.08573, eq. 5"
    cost = TWICE
    start = "gaussian"
    passes = (2, 2)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (3) with ``x_adv`` held fixed."""
        z, z_adv = precise(model(x)), precise(model(x_adv))
        clean = cross_entropy(z, y, label_smoothing=self.label_smoothing)
        kl = kl_divergence(z, z_adv).mean()
        if self.clean_passes == 2 and model.training:
            with torch.no_grad():
                model(x)
        return with_term(clean, self.beta, "kl", kl, kl_output(z, z_adv, self.beta))

    def loss_passes(self) -> tuple[int, int]:
        """One forward pass more for the second of clean images."""
        return 1 + self.clean_passes, 2


@method
class MART(PGDAT):
    """Misclassification-aware adversarial training: what the model gets wrong weighs more.

        (1/B) Σ_n  BCE(q_n, y_n)  +  beta (1/B) Σ_n KL(p_n ‖ q_n) (1 − p_n,y)                              (4)
        BCE(q, y) = −log q_y − log( 1.0001 − max_{k≠y} q_k )                                               (5)

    As in the authors' code: gradients flow through the weight (1 − p_y) too; the attack maximises the
    cross-entropy from x + 0.001 N(0, I); and 1.0001 stands where the paper has 1, which bounds the margin
    term by 9.2. Their code adds 1e-12 inside the logarithms; here the KL comes from logits. Soft targets: the
    mean of (4) over classes drawn from y; label smoothing applies to −log q_y only. Gauss–Newton: −log q_y
    exactly, the KL at a given weight by (2); the margin term and what the weight does through f(x) are left
    out, as their Hessians are indefinite. Running statistics are the authors': clean images, then x_adv.
    """

    beta: NonNegative = setting(5.0, "Weight of the divergence, the paper's lambda.")
    label = "MART λ={beta:g}"
    source = "Wang et al., ICLR 2020, eq. 8 to 11"
    cost = TWICE
    start = "gaussian"
    passes = (2, 2)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (4) with ``x_adv`` held fixed."""
        z, z_adv = precise(model(x)), precise(model(x_adv))
        num_classes = z.shape[1]
        targets = (y if y.ndim == 2 else F.one_hot(y, num_classes)).to(z.dtype)
        first, second = z_adv.softmax(1).topk(2, dim=1).values.split(1, dim=1)
        is_first = F.one_hot(z_adv.argmax(1), num_classes).to(z.dtype)
        largest_other = is_first * second + (1 - is_first) * first  # [B, C]: max_{k≠c} q_k for every class c
        margin = -((1.0001 - largest_other).log() * targets).sum(1).mean()
        bce = cross_entropy(z_adv, y, label_smoothing=self.label_smoothing).total + margin
        doubt = 1 - (z.softmax(1) * targets).sum(1)  # 1 − p_y
        kl = (kl_divergence(z, z_adv) * doubt).mean()
        seen = kl_output(z, z_adv, self.beta * doubt.detach().clamp_min(0))
        return with_term(Loss(bce, {"bce": bce.detach()}, (Output(z_adv),)), self.beta, "kl", kl, seen)


@method
class ALP(PGDAT):
    """Adversarial logit pairing: clean and adversarial logits are drawn together.

        ½ CE(f(x), y) + ½ CE(f(x_adv), y) + weight (1/(B C)) Σ_n ‖ f(x_n) − f(x_adv,n) ‖²                  (6)

    As in the authors' code the squared distance is a mean over classes too. Theirs makes one forward pass
    over both batches and attacks a random or the least likely target; here there are two, and the attack is
    untargeted. Gauss–Newton: exact, where the network is piecewise linear in a layer's weights.
    """

    weight: NonNegative = setting(0.5, "Weight of the mean squared distance of the logits.")
    label = "ALP {weight:g}"
    source = "Kannan et al., arXiv 1803.06373, eq. 2 to 4"
    cost = TWICE
    passes = (2, 2)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (6) with ``x_adv`` held fixed."""
        z, z_adv = precise(model(x)), precise(model(x_adv))
        smoothing = {"label_smoothing": self.label_smoothing}
        classes = (cross_entropy(z, y, **smoothing).total + cross_entropy(z_adv, y, **smoothing).total) / 2
        outputs = Output(z, weight=0.5), Output(z_adv, weight=0.5)
        seen = Output(z_adv - z, "mse", self.weight / z.shape[1])
        both = Loss(classes, {"cross_entropy": classes.detach()}, outputs)
        return with_term(both, self.weight, "pairing", (z_adv - z).square().mean(), seen)


def kl_output(z: Tensor, z_adv: Tensor, weight: float | Tensor) -> Output:
    """Return what Gauss–Newton sees of ``weight`` · KL(p ‖ q), both branches trained: 2 weight ‖√q − √p‖².

    The two agree to second order in q − p. Unlike the Hessian of the KL in (z, z') this one is positive
    semi-definite, equal where p = q, and vanishes where the two outputs move as one.
    """
    root, root_adv = (z.log_softmax(1) / 2).exp(), (z_adv.log_softmax(1) / 2).exp()
    return Output(root_adv - root, "mse", 2 * weight)


@method
class RotationAT(PGDAT):
    """Adversarial training with self-supervision: telling which of four ways an image was turned.

        CE( f(x + δ), y ) + weight · CE( g(R_r(x + δ)), r ),   δ maximises the sum                         (7)

    The authors' code turns every image all four ways, each copy with a perturbation of its own (five passes a
    step; in their attack the rotation term has weight 1/8 a copy). Here one δ serves both terms and image n
    is turned n mod 4 times. Gauss–Newton: exact. The model must answer ``model(x, head="rotation")``.
    """

    attack_loss: LabelLossName = "ce"  # for the classes
    weight: NonNegative = setting(0.5, "Weight of the rotation term in loss and attack.")
    label = "AT + rotations {weight:g}"
    source = "Hendrycks et al., arXiv 1906.12340, eq. 1"
    cost = "2 forward and 2 backward passes, and the attack's, whose steps cost as much"
    needs_rotation_head = True
    passes = (2, 2)

    def search(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None) -> Tensor:
        """Return PGD examples against the sum in (7)."""

        def both(x_adv: Tensor) -> Tensor:
            logits, turns = rotation_logits(model, x_adv)
            rotation = ce(logits, turns)
            return ATTACK_LOSSES[self.attack_loss](model(x_adv), y) + self.weight * rotation

        return self.attack.maximise(both, x, generator)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (7) with ``x_adv`` held fixed."""
        classes = cross_entropy(model(x_adv), y, label_smoothing=self.label_smoothing)
        logits, turns = rotation_logits(model, x_adv)
        rotation = cross_entropy(logits, turns).total
        return with_term(classes, self.weight, "rotation", rotation, Output(logits, weight=self.weight))

    def attack_passes(self) -> tuple[int, int]:
        """Twice those of ``PGDAT``: one pass for each head."""
        forward, backward = super().attack_passes()
        return 2 * forward, 2 * backward


def rotation_logits(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotation head's logits [B, 4] for image n turned n mod 4 times, and these numbers [B].

    ValueError for images that are not square, for fewer than four, and for a head of other outputs.
    """
    if x.ndim != 4 or x.shape[-1] != x.shape[-2] or len(x) < 4:
        rule = "[B, C, H, W] with H = W and B >= 4. Crop them, or use larger micro-batches."
        raise ValueError(f"RotationAT: got images {tuple(x.shape)}; expected {rule}")
    turned = x.clone()
    for turns in (1, 2, 3):
        turned[turns::4] = torch.rot90(x[turns::4], turns, (-2, -1))
    logits = logits_of(model(turned, head="rotation"))
    if logits.shape != (len(x), 4):
        rule = f"({len(x)}, 4). Use create_model(..., rotation_head=True)."
        raise ValueError(f"RotationAT: got rotation logits of shape {tuple(logits.shape)}; expected {rule}")
    return precise(logits), torch.arange(len(x), device=x.device) % 4
