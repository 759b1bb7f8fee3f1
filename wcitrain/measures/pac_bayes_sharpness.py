"""PAC-Bayes sharpness: how much Gaussian noise the weights bear before the accuracy falls.

Legend: w weights, w⁰ before training, ω their number, m examples, u noise, K draws, acc the accuracy.

    σ = the largest in [0, σ_max] with  |E acc(w + u) − acc(w)| <= 0.1,   u_i ~ N(0, σ²)                   (1)
    sharpness = 1 / σ²                                                                                     (2)
    bound = ‖w‖² / (4 σ²) + ln(m / σ) + 10,     with w − w⁰ for w beside it                                (3)

    magnitude-aware:  u_i ~ N(0, σ'² w_i² + e²),   e = 1e-3,   sharpness = 1 / σ'²                         (4)
    bound = ¼ Σ_i ln [ (e² + (σ'² + 1) ‖r‖² / ω) / (e² + σ'² r_i²) ] + ln(m / σ') + 10,  r = w, or w − w⁰  (5)

Definitions of Jiang et al. 2020, as Dziugaite et al. 2020 compute them: bisection, ten draws; but u has
variance σ² (their code hands σ² to a sampler that expects a deviation), and normalisation is neither folded
into convolutions nor moved. The K draws are the same at every σ, only scaled. The accuracy may be robust:
then the attack is run anew on every perturbed model.
"""

import math

import torch
from torch import Tensor, nn

from wcitrain.measures.losses import output_margins
from wcitrain.measures.means import Chunks, count_examples, mean_and_error
from wcitrain.measures.norms import initial_weights
from wcitrain.measures.problem import Measure, Problem, Taken, attack_text
from wcitrain.method import InnerShare, Positive, PositiveCount, Text, method, setting
from wcitrain.params import Layers, select_layers
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

FLOOR = 1e-3  # e


@method
class PACBayesSharpness(Measure):
    """Sharpness 1/σ²: σ is the deviation of the noise that costs a tenth of the accuracy.

    Infinite where even the smallest σ tried is too much. ``parts``: ``sigma`` (known to max_sigma /
    2^num_bisections; where it is ``max_sigma`` itself the value is an upper end, and the settings say so),
    ``accuracy``, ``perturbed_accuracy`` at σ with its standard error over draws, ``bound_origin`` and, where
    the initial weights are known, ``bound_initial`` by (3), ``rate_...`` = sqrt(bound / m). The value's own
    error is unknown: NaN.
    """

    max_drop: InnerShare = setting(0.1, "Accuracy that may be lost.")
    num_draws: PositiveCount = setting(10, "K, draws of the noise.")
    max_sigma: Positive = setting(2.0, "σ_max, the largest deviation.")
    num_bisections: PositiveCount = setting(15, "Halvings of [0, σ_max].")
    layers: Text = setting("weights", "Which weights move, see params.select_layers.")
    needs_initial = can_lack_initial = True
    name = "pac_bayes_sharpness"
    noise = "isotropic"  # for humans
    source = "Jiang et al., arXiv 1912.02178; Dziugaite et al., arXiv 2010.11924"
    cost = "num_bisections · num_draws attacks and forward passes"

    def take(self, problem: Problem) -> Taken:
        """Return (2) or (4)."""
        layers = select_layers(problem.model, self.layers)
        centres = {"origin": [torch.zeros_like(t) for t in layers.tensors]}
        if problem.initial is not None:
            centres["initial"] = initial_weights(layers, problem.initial, self.name)
        reference = _accuracy(problem.model, problem.adversarial())
        m = count_examples(problem.clean())
        if reference <= self.max_drop:
            note = f"accuracy {reference:.3g} is at most max_drop {self.max_drop:g}"
            return (math.nan, math.nan, m), f"{note}: no noise can lose that much", {"accuracy": reference}
        sigma, borne = self._largest_sigma(problem, layers, reference)
        mean, error = mean_and_error(borne)
        parts = {"sigma": sigma, "accuracy": reference}
        parts |= {"perturbed_accuracy": mean, "perturbed_accuracy_stderr": error}
        for name, centre in centres.items() if sigma > 0 else ():
            pairs = zip(layers.tensors, centre, strict=True)
            r = torch.cat([(w.detach() - w0).flatten().double().cpu() for w, w0 in pairs])
            bound = self.divergence(r, sigma) + math.log(m / sigma) + 10
            parts |= {f"bound_{name}": bound, f"rate_{name}": math.sqrt(max(bound, 0.0) / m)}
        limit = f", sigma at its limit {self.max_sigma:g}" if sigma == self.max_sigma else ""
        kind = f"{self.noise}, drop {self.max_drop:g}, {self.num_draws} draws"
        value = 1 / sigma**2 if sigma > 0 else math.inf
        return (value, math.nan, m), f"{kind}, {attack_text(problem.attack)}{limit}", parts

    def scaled(self, standard: Tensor, w: Tensor, sigma: float) -> Tensor:
        """Return u by (1), from standard normal numbers."""
        return sigma * standard

    def divergence(self, r: Tensor, sigma: float) -> float:
        """Return the first term of (3) for weights ``r`` [ω] relative to the prior's mean."""
        return float(r.square().sum() / (4 * sigma**2))

    def _largest_sigma(self, problem: Problem, layers: Layers, reference: float) -> tuple[float, Tensor]:
        """Return σ of (1), zero where none is borne, and the accuracies [K] at it, or that of w [1]."""
        sigma, limit, tried = 0.0, self.max_sigma, self.max_sigma
        borne = torch.tensor([reference], dtype=torch.float64)
        for _ in range(self.num_bisections + 1):
            values = [self._perturbed_accuracy(problem, layers, tried, k) for k in range(self.num_draws)]
            accuracies = torch.tensor(values, dtype=torch.float64)
            # A drop that is exactly allowed, such as 2 of 20, must not fall to rounding.
            if abs(float(accuracies.mean()) - reference) <= self.max_drop + 1e-9:
                sigma, borne = tried, accuracies
            else:
                limit = tried
            if sigma == limit:  # even the largest is borne
                break
            tried = (sigma + limit) / 2
        return sigma, borne

    def _perturbed_accuracy(self, problem: Problem, layers: Layers, sigma: float, draw: int) -> float:
        """Return the accuracy at w + u for draw number ``draw``: the same numbers at every σ, scaled."""
        noise = []
        for name, tensor in zip(layers.names, layers.tensors, strict=True):
            w = tensor.detach()
            generator = generator_from(w.device, problem.seed, "noise", draw, name)
            standard = torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype)
            noise.append(self.scaled(standard, w, sigma))
        with perturbed(layers.tensors, noise) as move:
            move(1)
            return _accuracy(problem.model, problem.attacked_anew(problem.clean()))


@method
class MagnitudeAwareSharpness(PACBayesSharpness):
    """PAC-Bayes sharpness 1/σ'² with noise in proportion to the weights, (4) and (5)."""

    name = "magnitude_aware_sharpness"
    noise = "magnitude-aware"

    def scaled(self, standard: Tensor, w: Tensor, sigma: float) -> Tensor:
        """Return u by (4), from standard normal numbers."""
        return standard * (sigma**2 * w.square() + FLOOR**2).sqrt()

    def divergence(self, r: Tensor, sigma: float) -> float:
        """Return the first term of (5)."""
        spread = FLOOR**2 + (sigma**2 + 1) * r.square().mean()
        return float((spread / (FLOOR**2 + sigma**2 * r.square())).log().sum() / 4)


def _accuracy(model: nn.Module, chunks: Chunks) -> float:
    return float((output_margins(model, chunks) > 0).double().mean())
