"""Losses and margins of the outputs, on clean or adversarial examples, and how far test is from train.

Legend: z [C] logits, γ margin of an example, q quantile of the margins, A_l the linear map of layer l.

    γ(x, y) = z_y − max_{j ≠ y} z_j        (> 0: classified rightly)                                       (1)
    normalised margin = q(γ) / Π_l ‖A_l‖_σ                                                                 (2)

Margins alone grow with the scale of the weights; (2) divides it out, by the product of `norms.SpectralNorms`.
The bound of Bartlett et al. also has a factor from the distance to initialisation.
"""

import copy
import math

import torch
from torch import Tensor, nn

from wcitrain.measures.means import Chunks, losses_of, mean_and_error
from wcitrain.measures.norms import SpectralNorms
from wcitrain.measures.problem import Measure, Measurement, Problem, Taken, attack_text
from wcitrain.method import InnerShare, method, setting
from wcitrain.params import precise


@method
class RobustLoss(Measure):
    """Mean cross-entropy under the problem's attack; without one the clean loss.

    The standard error is over examples. ``parts``: ``accuracy`` in [0, 1].
    """

    name = "robust_loss"
    source = "Madry et al., arXiv 1706.06083, eq. 2.1"
    cost = "1 attack, 2 forward passes"

    def take(self, problem: Problem) -> Taken:
        """Return the losses at the adversarial images."""
        return _losses(problem, problem.adversarial(), attack_text(problem.attack))


@method
class CleanLoss(Measure):
    """Mean cross-entropy of the clean images, whatever the attack.

    The standard error is over examples. ``parts``: ``accuracy`` in [0, 1].
    """

    name = "clean_loss"
    source = "definition"
    cost = "2 forward passes"

    def take(self, problem: Problem) -> Taken:
        """Return the losses at the images themselves."""
        return _losses(problem, problem.clean(), "clean")


def _losses(problem: Problem, chunks: Chunks, settings: str) -> Taken:
    """Return losses [N] and accuracy at images."""
    losses = losses_of(problem.model, chunks)
    correct = sum(int((precise(problem.model(x)).argmax(1) == y).sum()) for x, y in chunks)
    return losses, settings, {"accuracy": correct / len(losses)}


@method
class RobustGap(Measure):
    """Robust generalisation gap: robust loss on test images minus that on the problem's own.

    The errors of the two sets are independent and add up in squares. ``parts``: ``accuracy_gap`` = robust
    accuracy on train minus that on test, and both losses and accuracies. Take training images without
    augmentation.
    """

    name = "robust_gap"
    source = "definition; Rice, Wong & Kolter, arXiv 2002.11569"
    cost = "1 attack, 2 forward passes; as much again for the test images"
    needs_test = True

    def measure(self, problem: Problem) -> Measurement:
        """Return the difference; without test images a ``ValueError``."""
        if not problem.test_batches:
            raise ValueError("test_batches: got none; expected batches (x, y). Give test images for the gap.")
        other = copy.copy(problem)  # what is known of the images is shared
        other.batches = problem.test_batches
        train, test = (RobustLoss().measure(one) for one in (problem, other))
        parts = {
            "train_loss": train.value,
            "test_loss": test.value,
            "train_accuracy": train.parts["accuracy"],
            "test_accuracy": test.parts["accuracy"],
            "accuracy_gap": train.parts["accuracy"] - test.parts["accuracy"],
        }
        value, stderr = test.value - train.value, math.hypot(train.stderr, test.stderr)
        num = train.num_examples + test.num_examples
        return Measurement(self.name, value, stderr, num, train.settings, parts)


@method
class Margins(Measure):
    """Quantile of the margins of the outputs: the right class over the best other one.

    ``parts``: ``mean``, ``mean_stderr``, ``median``, ``min``, ``accuracy``. The standard error is half the
    distance between the quantiles one binomial standard error, sqrt(q (1 − q) / N), to either side: of the
    examples as a sample.
    """

    quantile: InnerShare = setting(0.1, "q; the tenth percentile is what bounds use in place of the minimum.")
    name = "margins"
    source = "definition; the percentile as in Jiang et al., arXiv 1912.02178"
    cost = "1 attack, 1 forward pass"

    def take(self, problem: Problem) -> Taken:
        """Return the quantile of (1)."""
        values = output_margins(problem.model, problem.adversarial())
        q, num = self.quantile, len(values)
        spread = math.sqrt(q * (1 - q) / num)
        places = [min(max(share, 0.0), 1.0) for share in (q - spread, q, q + spread, 0.5)]
        low, value, high, median = (float(torch.quantile(values, place)) for place in places)
        mean, error = mean_and_error(values)
        accuracy = float((values > 0).double().mean())
        parts = {"mean": mean, "mean_stderr": error, "median": median, "min": float(values.min())}
        stderr = (high - low) / 2 if num > 1 else math.nan
        settings = f"{100 * q:g} % quantile, {attack_text(problem.attack)}"
        return (value, stderr, num), settings, parts | {"accuracy": accuracy}


@method
class NormalisedMargin(Margins):
    """Quantile of the margins over the product of the layers' spectral norms.

    ``parts``: ``margin``, ``log_spectral_product`` = Σ ln ‖A_l‖_σ (the product itself may overflow),
    ``log_complexity`` = 2 Σ ln ‖A_l‖_σ − 2 ln margin, NaN where the margin is not positive. The standard
    error is that of the margin.
    """

    name = "normalised_margin"
    source = "Bartlett, Foster & Telgarsky, arXiv 1706.08498"
    cost = "1 attack, 1 forward pass, and those of spectral_norms"

    def take(self, problem: Problem) -> Taken:
        """Return (2)."""
        (margin, stderr, num), settings, _ = super().take(problem)
        (value, *_), *_ = SpectralNorms().take(problem)
        log_product = value / 2
        scale = math.exp(-log_product) if log_product < 700 else 0.0
        log_complexity = 2 * log_product - 2 * math.log(margin) if margin > 0 else math.nan
        parts = {"margin": margin, "log_spectral_product": log_product, "log_complexity": log_complexity}
        return (margin * scale, stderr * scale, num), settings, parts


def output_margins(model: nn.Module, chunks: Chunks) -> Tensor:
    """Return the margins (1) of all examples [N], float64 on the CPU, no graph; ValueError for one output."""
    values = []
    with torch.no_grad():
        for x, y in chunks:
            z = precise(model(x)).double()
            if z.shape[1] < 2:
                raise ValueError("margins: got a single output; expected at least two. Use two classes.")
            right = z.gather(1, y[:, None]).squeeze(1)
            others = z.scatter(1, y[:, None], -math.inf).amax(1)
            values.append((right - others).cpu())
    return torch.cat(values)
