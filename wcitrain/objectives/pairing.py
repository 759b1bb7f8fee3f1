"""Losses of predictions at adversarial *and* clean images: TRADES, MART and logit pairing.

Legend: B batch, C classes, z = f(x) and z' = f(x_adv) logits [B, C], p = softmax(z), q = softmax(z'),
J = ∂z/∂w, J' = ∂z'/∂w.

What Gauss–Newton sees of the term between the two is computed from what the term compares, so it vanishes
where x_adv = x, as the Hessian of the term itself does:

    ‖z' − z‖²    2 (J' − J)ᵀ (J' − J) and the curvature of the network times z' − z, which is left out     (1)
    KL(p ‖ q)    as for 2 ‖√q − √p‖², equal to second order: ``kl_output``                                 (2)
"""

from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from wcitrain.attacks import LossName
from wcitrain.attacks.losses import kl_divergence
from wcitrain.curvature.loss import Loss, Output, cross_entropy
from wcitrain.method import NonNegative, method, setting
from wcitrain.objectives.objective import PGDAttacked
from wcitrain.objectives.terms import with_term
from wcitrain.params import precise


class Paired(PGDAttacked):
    """An objective of both logits, z = f(x) and z' = f(x_adv): ``paired`` is its loss.

    Two forward passes, clean first, so that BatchNorm sees separate batches; gradients flow through both.
    """

    passes = (2, 2)
    cost = "2 forward and 2 backward passes, and the attack's"

    def paired(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Loss:
        """Return the loss of both logits [B, C]."""
        raise NotImplementedError

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the loss with the images held fixed."""
        return self.paired(precise(model(x)), precise(model(x_adv)), y)


@method
class TRADES(Paired):
    """Clean accuracy, and the same prediction everywhere around.

        CE(f(x), y) + beta (1/B) Σ_n KL( f(x_n) ‖ f(x_adv,n) ),   x_adv maximises the KL                   (3)

    As in the authors' code the KL is summed over classes and averaged over the batch; the attack starts from
    x + 0.001 N(0, I), since at x itself the KL has no gradient. Their code runs the clean images twice. Their
    CIFAR-10 settings: eps 0.031, 10 steps of 0.007. Gauss–Newton: the cross-entropy exactly, the KL by (2).
    """

    attack_loss: LossName = "kl"
    beta: NonNegative = setting(6.0, "Weight of the divergence, the paper's 1/lambda.")
    label = "TRADES β={beta:g}"
    source = "Zhang et al., arXiv 1901.08573, eq. 5"
    start = "gaussian"

    def paired(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Loss:
        """Return (3)."""
        clean = cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        kl = kl_divergence(logits, logits_adv).mean()
        return with_term(clean, self.beta, "kl", kl, kl_output(logits, logits_adv, self.beta))


@method
class MART(Paired):
    """Misclassification-aware adversarial training: what the model gets wrong weighs more.

        (1/B) Σ_n  BCE(q_n, y_n)  +  beta (1/B) Σ_n KL(p_n ‖ q_n) (1 − p_n,y)                              (4)
        BCE(q, y) = −log q_y − log( 1.0001 − max_{k≠y} q_k )                                               (5)

    As in the authors' code: gradients flow through the weight (1 − p_y) too; the attack maximises the
    cross-entropy from x + 0.001 N(0, I); and 1.0001 stands where the paper has 1, which bounds the
    margin term by 9.2. Their code adds 1e-12 inside the logarithms; here the KL comes from logits. Their
    function has beta 6 by default and is called with 5. Soft targets: the mean of (4) over classes drawn from
    y; label smoothing applies to −log q_y only. Gauss–Newton: −log q_y exactly, the KL at a given weight by
    (2); the margin term and what the weight does through f(x) are left out, as their Hessians are indefinite.
    """

    beta: NonNegative = setting(5.0, "Weight of the divergence, the paper's lambda.")
    label = "MART λ={beta:g}"
    source = "Wang et al., ICLR 2020, eq. 8 to 11"
    start = "gaussian"

    def paired(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Loss:
        """Return (4)."""
        targets = soft_targets(y, logits)
        first, second = logits_adv.softmax(1).topk(2, dim=1).values.split(1, dim=1)
        is_first = soft_targets(logits_adv.argmax(1), logits_adv)
        largest_other = is_first * second + (1 - is_first) * first  # [B, C]: max_{k≠c} q_k for every class c
        margin = -((1.0001 - largest_other).log() * targets).sum(1).mean()
        bce = cross_entropy(logits_adv, y, label_smoothing=self.label_smoothing).total + margin
        doubt = 1 - (logits.softmax(1) * targets).sum(1)  # 1 − p_y
        kl = (kl_divergence(logits, logits_adv) * doubt).mean()
        seen = kl_output(logits, logits_adv, self.beta * doubt.detach().clamp_min(0))
        return with_term(Loss(bce, {"bce": bce.detach()}, (Output(logits_adv),)), self.beta, "kl", kl, seen)


@method
class ALP(Paired):
    """Adversarial logit pairing: clean and adversarial logits are drawn together.

        ½ CE(f(x), y) + ½ CE(f(x_adv), y) + weight (1/(B C)) Σ_n ‖ f(x_n) − f(x_adv,n) ‖²                  (6)

    As in the authors' code the squared distance is a mean over classes too. Theirs makes one forward pass
    over both batches and attacks a random or the least likely target; here there are two, and the attack is
    untargeted. Gauss–Newton: exact, where the network is piecewise linear in a layer's weights.
    """

    weight: NonNegative = setting(0.5, "Weight of the mean squared distance of the logits.")
    label = "ALP {weight:g}"
    source = "Kannan et al., arXiv 1803.06373, eq. 2 to 4"

    def paired(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Loss:
        """Return (6)."""
        clean, adversarial = (
            cross_entropy(z, y, label_smoothing=self.label_smoothing).total for z in (logits, logits_adv)
        )
        classes = (clean + adversarial) / 2
        outputs = Output(logits, weight=0.5), Output(logits_adv, weight=0.5)
        pairing = (logits_adv - logits).square().mean()
        seen = Output(logits_adv - logits, "mse", self.weight / logits.shape[1])
        both = Loss(classes, {"cross_entropy": classes.detach()}, outputs)
        return with_term(both, self.weight, "pairing", pairing, seen)


def trades(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: Generator | None = None, **settings: Any
) -> Loss:
    """Return ``TRADES(**settings)(model, x, y, generator)``, for one's own loop."""
    return TRADES(**settings)(model, x, y, generator)


def soft_targets(y: Tensor, logits: Tensor) -> Tensor:
    """Return the targets as probabilities [B, C] in the dtype of ``logits``."""
    return (y if y.ndim == logits.ndim else F.one_hot(y, logits.shape[1])).to(logits.dtype)


def kl_output(logits: Tensor, other: Tensor, weight: float | Tensor) -> Output:
    """Return what Gauss–Newton sees of ``weight`` · KL(p ‖ q), both branches trained: 2 weight ‖√q − √p‖².

    The two agree to second order in q − p. Unlike the Hessian of the KL in (z, z') this one is positive
    semi-definite, equal where p = q, and vanishes where the two outputs move as one.
    """
    root, other_root = (logits.log_softmax(1) / 2).exp(), (other.log_softmax(1) / 2).exp()
    return Output(other_root - root, "mse", 2 * weight)
