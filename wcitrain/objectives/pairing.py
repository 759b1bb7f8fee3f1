"""Losses of predictions at adversarial *and* clean images: TRADES, MART and logit pairing.

Legend: B batch, C classes, z = f(x) and z' = f(x_adv) logits [B, C], p = softmax(z), q = softmax(z'),
J = ∂z/∂w, J' = ∂z'/∂w.

What Gauss–Newton sees of the term between the two is computed from what the term compares, so it vanishes
where x_adv = x, as the Hessian of the term itself does:

    ‖z' − z‖²    2 (J' − J)ᵀ (J' − J) and the curvature of the network times z' − z, which is left out     (1)
    KL(p ‖ q)    as for 2 ‖√q − √p‖², equal to second order: ``kl_output``                                 (2)
"""

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from wcitrain.attacks import LossName
from wcitrain.attacks.losses import kl_divergence, precise
from wcitrain.curvature.loss import Loss, Output
from wcitrain.method import NonNegative, method
from wcitrain.objectives.objective import PGDAttacked
from wcitrain.objectives.terms import class_loss, with_term


@method
class TRADES(PGDAttacked):
    """TRADES (Zhang et al. 2019, arXiv 1901.08573, eq. 5): clean accuracy, and the same prediction around.

        CE(f(x), y) + beta (1/B) Σ_n KL( f(x_n) ‖ f(x_adv,n) ),   x_adv maximises the KL                   (3)

    As in the authors' code: the KL is summed over classes and averaged over the batch; gradients flow through
    both its branches; the attack runs in eval mode and starts from x + 0.001 N(0, I), since at x itself the
    KL has no gradient; clean and adversarial images take separate forward passes, clean first, so that
    BatchNorm sees them as separate batches. Their code runs the clean one twice (the same numbers without
    dropout). Their CIFAR-10 settings: eps 0.031, 10 steps of 0.007.

    ``random_start=False`` (from x) needs another ``attack_loss`` than the published "kl". Cost of the loss:
    (2, 2) passes. Gauss–Newton: the clean cross-entropy exactly, the KL by (2), positive semi-definite.
    """

    attack_loss: LossName = "kl"
    beta: NonNegative = Field(default=6.0, description="Weight of the divergence, the paper's 1/lambda.")
    label: ClassVar[str] = "TRADES β={beta:g}"
    start = "gaussian"
    passes = (2, 2)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (3) with the images held fixed."""
        logits, logits_adv = precise(model(x)), precise(model(x_adv))
        clean = class_loss(logits, y, self.label_smoothing)
        kl = kl_divergence(logits, logits_adv).mean()
        return with_term(clean, self.beta, "kl", kl, kl_output(logits, logits_adv, self.beta))


@method
class MART(PGDAttacked):
    """Misclassification-aware adversarial training (Wang et al., ICLR 2020, eq. 8 to 11).

        (1/B) Σ_n  BCE(q_n, y_n)  +  beta (1/B) Σ_n KL(p_n ‖ q_n) (1 − p_n,y)                              (4)
        BCE(q, y) = −log q_y − log( ceiling − max_{k≠y} q_k )                                              (5)

    As in the authors' code: gradients flow through everything, the weight (1 − p_y) included; the attack
    maximises the cross-entropy in eval mode and starts from x + 0.001 N(0, I); two forward passes, clean
    first; and ``ceiling`` is 1.0001 where the paper has 1, which bounds the margin term by 9.2. Their code
    also adds 1e-12 inside the logarithms and writes 1.0000001 − p_y; here the KL comes from logits, so
    nothing has to be added (the difference is below float32 rounding unless some q_c < 1e-5). The authors'
    function has beta 6 by default and is called with 5, the paper's.

    Soft targets (mixup): (4) is averaged over classes drawn from y. Label smoothing applies to −log q_y only.
    Cost of the loss: (2, 2) passes. Gauss–Newton covers −log q_y exactly, and the KL at a given weight
    (1 − p_y) by (2). Left out, as their Hessians in the logits are indefinite: the margin term, and what the
    weight does through f(x).
    """

    beta: NonNegative = Field(default=5.0, description="Weight of the divergence, the paper's lambda.")
    ceiling: float = Field(
        default=1.0001, ge=1, description="Bound of the margin term: minus its logarithm at 1 is infinite."
    )
    label: ClassVar[str] = "MART λ={beta:g}"
    start = "gaussian"
    passes = (2, 2)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (4) with the images held fixed."""
        logits, logits_adv = precise(model(x)), precise(model(x_adv))
        targets = soft_targets(y, logits)
        first, second = logits_adv.softmax(1).topk(2, dim=1).values.split(1, dim=1)
        is_first = soft_targets(logits_adv.argmax(1), logits_adv)
        largest_other = is_first * second + (1 - is_first) * first  # [B, C]: max_{k≠c} q_k for every class c
        margin = -((self.ceiling - largest_other).log() * targets).sum(1).mean()
        bce = class_loss(logits_adv, y, self.label_smoothing).total + margin
        doubt = 1 - (logits.softmax(1) * targets).sum(1)  # 1 − p_y
        kl = (kl_divergence(logits, logits_adv) * doubt).mean()
        seen = kl_output(logits, logits_adv, self.beta * doubt.detach().clamp_min(0))
        return with_term(Loss(bce, {"bce": bce.detach()}, (Output(logits_adv),)), self.beta, "kl", kl, seen)


@method
class ALP(PGDAttacked):
    """Adversarial logit pairing (Kannan et al. 2018, arXiv 1803.06373, eq. 2 to 4) on mixed minibatches.

        ½ CE(f(x), y) + ½ CE(f(x_adv), y) + weight (1/(B C)) Σ_n ‖ f(x_n) − f(x_adv,n) ‖²                  (6)

    As in the authors' code: the squared distance is a mean over elements, so over classes too (others sum
    over them: multiply ``weight`` by C); gradients flow through both branches. Theirs runs one forward pass
    over clean and adversarial images together, so BatchNorm sees them as one batch, and attacks a random or
    the least likely target; here there are two passes, clean first, and the attack is untargeted.

    Cost of the loss: (2, 2) passes. Gauss–Newton: exact; for networks that are piecewise linear in a
    layer's weights it is that layer's Hessian, as for the cross-entropy.
    """

    weight: NonNegative = Field(
        default=0.5,
        description="Weight of the mean squared distance of the logits; 0.5 for ImageNet in the paper.",
    )
    label: ClassVar[str] = "ALP {weight:g}"
    passes = (2, 2)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (6) with the images held fixed."""
        logits, logits_adv = precise(model(x)), precise(model(x_adv))
        clean, adversarial = (class_loss(z, y, self.label_smoothing).total for z in (logits, logits_adv))
        classes = (clean + adversarial) / 2
        outputs = Output(logits, weight=0.5), Output(logits_adv, weight=0.5)
        pairing = (logits_adv - logits).square().mean()
        seen = Output(logits_adv - logits, "mse", self.weight / logits.shape[1])
        both = Loss(classes, {"cross_entropy": classes.detach()}, outputs)
        return with_term(both, self.weight, "pairing", pairing, seen)


def soft_targets(y: Tensor, logits: Tensor) -> Tensor:
    """Return the targets as probabilities [B, C] in the dtype of ``logits``."""
    return (y if y.ndim == logits.ndim else F.one_hot(y, logits.shape[1])).to(logits.dtype)


def kl_output(logits: Tensor, other: Tensor, weight: float | Tensor) -> Output:
    """Return what Gauss–Newton sees of ``weight`` · KL(p ‖ q), both branches trained: 2 weight ‖√q − √p‖².

    The two agree to second order in q − p. The Hessian of the KL in the joint logits (z, z') is indefinite;
    that of the right hand side, without the curvature of the square roots, is positive semi-definite, has the
    blocks diag(p) − p pᵀ and diag(q) − q qᵀ on the diagonal, as the KL has where p = q, and together they
    vanish where the two networks' outputs move as one. With the branch of z' alone they would not: that is
    the Hessian of another loss, which stops the gradient at p.
    """
    root, other_root = (logits.log_softmax(1) / 2).exp(), (other.log_softmax(1) / 2).exp()
    return Output(other_root - root, "mse", 2 * weight)
