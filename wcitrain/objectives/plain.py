"""Cross-entropy alone: on clean images, or at the images of a PGD adversary."""

from typing import ClassVar

from torch import Generator, Tensor, nn

from wcitrain.method import method
from wcitrain.objectives.objective import LabelSmoothing, Objective, PGDAttacked


@method
class Standard(Objective):
    """Cross-entropy on clean images: no adversary."""

    label_smoothing: LabelSmoothing = 0.0
    label: ClassVar[str] = "standard"

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return ``x`` itself."""
        return x


@method
class PGDAT(PGDAttacked):
    """Adversarial training (Madry et al., arXiv 1706.06083): cross-entropy at the PGD adversary's images.

        min_w  (1/B) Σ_n  max_{‖δ_n‖ ≤ eps}  CE( f_w(x_n + δ_n), y_n )                                     (1)

    ``attack_loss`` lets the adversary maximise something else than what is minimised. Cost of the loss:
    (1, 1) passes. Gauss–Newton: exact, see ``curvature.loss``.
    """

    label: ClassVar[str] = "AT"
