"""Cross-entropy alone: on clean images, or at the images of a PGD adversary."""

from torch import Generator, Tensor, nn

from wcitrain.method import method
from wcitrain.objectives.objective import LabelSmoothing, Objective, PGDAttacked


@method
class Standard(Objective):
    """Cross-entropy on clean images: no adversary."""

    label_smoothing: LabelSmoothing = 0.0
    label = "standard"
    source = "empirical risk minimisation"
    cost = "1 forward and 1 backward pass"

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return ``x`` itself."""
        return x


@method
class PGDAT(PGDAttacked):
    """Adversarial training: cross-entropy at the images of a PGD adversary.

        min_w  (1/B) Σ_n  max_{‖δ_n‖ ≤ eps}  CE( f_w(x_n + δ_n), y_n )                                     (1)

    Gauss–Newton: exact.
    """

    label = "AT"
    source = "Madry et al., arXiv 1706.06083, eq. 2.1"
