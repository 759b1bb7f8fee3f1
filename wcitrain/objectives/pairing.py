"""Losses that tie the prediction at the adversarial image to the one at the clean image: TRADES and logit pairing.

Legend: B batch, C classes, z = f(x) and z' = f(x_adv) logits [B, C], J = ∂z/∂w, J' = ∂z'/∂w.

What Gauss–Newton sees of the term between the two is computed from what the term compares, so it vanishes where x_adv = x, as
the Hessian of the term itself does:

    ‖z' − z‖²       2 (J' − J)ᵀ (J' − J) and the curvature of the network times z' − z, which is left out                (1)
    KL(z ‖ z')      as for 2 ‖√softmax(z') − √softmax(z)‖², which equals it to second order: ``terms.kl_output``        (2)
"""

from dataclasses import dataclass

from torch import Tensor, nn

from wcitrain.attacks import Start
from wcitrain.attacks.losses import precise
from wcitrain.curvature.loss import Loss, Output
from wcitrain.objectives.objective import PGDAttacked
from wcitrain.objectives.terms import class_loss, kl_divergence, kl_output


@dataclass(frozen=True)
class TRADES(PGDAttacked):
    """TRADES (Zhang et al. 2019, arXiv 1901.08573, eq. 5): accuracy on clean images, and the same prediction around them.

        CE(f(x), y) + beta (1/B) Σ_n KL( f(x_n) ‖ f(x_adv,n) ),   x_adv maximises the KL                               (3)

    As in the authors' code: the KL is summed over classes and averaged over the batch; gradients flow through both its
    branches; the attack runs in eval mode and starts from x + 0.001 N(0, I), since at x itself the KL has no gradient; clean
    and adversarial images take separate forward passes, clean first, so that BatchNorm sees them as separate batches. Their
    code runs the clean one twice (the same numbers without dropout). Their CIFAR-10 settings: eps 0.031, 10 steps of 0.007.

    Cost of the loss: (2, 2) passes. Gauss–Newton: the clean cross-entropy exactly, the KL by (2) above: an
    approximation, positive semi-definite.

    Args:
        beta: Weight of the KL, the paper's 1/λ; >= 0.
        attack_loss: ``"kl"`` as published; any of ``attacks.ATTACK_LOSSES``.
        random_start: True is the Gaussian start; False (from x) needs another ``attack_loss``.

    The other arguments: see ``PGDAttacked``; ``label_smoothing`` is that of the cross-entropy.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> sorted(TRADES(beta=6.0, num_steps=3)(model, x, y).parts)
        ['cross_entropy', 'kl']
    """

    attack_loss: str = "kl"
    beta: float = 6.0

    def _start(self) -> Start:
        return "gaussian" if self.random_start else "none"

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (3) with the images held fixed."""
        logits, logits_adv = precise(model(x)), precise(model(x_adv))
        clean = class_loss(logits, y, self.label_smoothing)
        kl = kl_divergence(logits, logits_adv).mean()
        return Loss(
            clean.total + self.beta * kl,
            {**clean.parts, "kl": kl.detach()},
            (*clean.outputs, kl_output(logits, logits_adv, self.beta)),
        )

    def loss_passes(self) -> tuple[int, int]:
        """Forward at x and at x_adv, and backward through both."""
        return 2, 2


@dataclass(frozen=True)
class ALP(PGDAttacked):
    """Adversarial logit pairing (Kannan et al. 2018, arXiv 1803.06373, eq. 2 to 4) on mixed minibatches.

        ½ CE(f(x), y) + ½ CE(f(x_adv), y) + weight (1/(B C)) Σ_n ‖ f(x_n) − f(x_adv,n) ‖²                               (4)

    As in the authors' code: the squared distance is a mean over elements, so over classes too (others sum over them: multiply
    ``weight`` by C); gradients flow through both branches. Theirs runs one forward pass over clean and adversarial images
    together, so BatchNorm sees them as one batch, and attacks a random or the least likely target; here there are two passes,
    clean first, and the attack is untargeted, as for the other objectives.

    Cost of the loss: (2, 2) passes. Gauss–Newton: exact; for networks that are piecewise linear in a
    layer's weights it is that layer's Hessian, as for the cross-entropy.

    Args:
        weight: Of the pairing; 0.5 for ImageNet in the paper; >= 0.

    The other arguments: see ``PGDAttacked``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> sorted(ALP(num_steps=3)(model, x, y).parts)
        ['cross_entropy', 'pairing']
    """

    weight: float = 0.5

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (4) with the images held fixed."""
        logits, logits_adv = precise(model(x)), precise(model(x_adv))
        clean = class_loss(logits, y, self.label_smoothing)
        adversarial = class_loss(logits_adv, y, self.label_smoothing)
        classes = (clean.total + adversarial.total) / 2
        pairing = (logits_adv - logits).square().mean()
        return Loss(
            classes + self.weight * pairing,
            {"cross_entropy": classes.detach(), "pairing": pairing.detach()},
            (
                Output(logits, weight=0.5),
                Output(logits_adv, weight=0.5),
                Output(logits_adv - logits, "mse", self.weight / logits.shape[1]),
            ),
        )

    def loss_passes(self) -> tuple[int, int]:
        """Forward at x and at x_adv, and backward through both."""
        return 2, 2
