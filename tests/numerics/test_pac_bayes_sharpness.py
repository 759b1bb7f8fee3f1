"""PAC-Bayes sharpness on a classifier whose accuracy under noise is known in closed form."""

import math

import pytest
import torch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.pac_bayes_sharpness import MagnitudeAwareSharpness, PACBayesSharpness
from wcitrain.measures.problem import Problem


class Bias(nn.Module):
    """Logits (w x, shift): right for class 0 while w x > shift. One weight, so noise is one number."""

    def __init__(self, w: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.weight = nn.Parameter(torch.tensor([[w]], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.flatten(1).mean(1, keepdim=True) * self.weight
        return torch.cat([score, torch.full_like(score, self.shift)], 1)


DATA = [(torch.full((10, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(10, dtype=torch.long))]


def test_sigma_is_where_the_expected_accuracy_has_dropped_by_a_tenth():
    """P(w + σ u <= 0) = Φ(−w/σ) = 0.1 at σ = 0.780 for w = 1; a variance taken for a deviation gives 0.883.

    400 draws: the quantile's standard error is sqrt(0.1 · 0.9 / 400) / φ(1.2816) = 0.085 of 1.28, 6.7 %; one
    of them and the last bisection, 1/32 of 0.78, make 10.7 %; the seed is fixed.
    """
    measure = PACBayesSharpness(num_draws=400, max_sigma=1.0, num_bisections=5)
    result = measure.measure(Problem(Bias(), DATA))
    truth = -1 / float(torch.special.ndtri(torch.tensor(0.1).double()))
    assert result.parts["sigma"] == pytest.approx(truth, rel=0.107)
    assert result.value == pytest.approx(1 / result.parts["sigma"] ** 2, rel=1e-12)
    assert result.parts["accuracy"] == 1
    assert result.parts["perturbed_accuracy"] >= 0.9 - 1e-9
    assert math.isnan(result.stderr)


def test_sigma_is_found_to_the_last_bisection():
    """With these draws expected accuracy is a known step function of σ: bracket its step to 2 / 2^15."""
    problem = Problem(Bias(), DATA)
    result = PACBayesSharpness(num_draws=20).measure(problem)
    sigma = result.parts["sigma"]
    # Allowed: 2 wrong draws of 20; the third goes wrong at σ = w / |third lowest draw|.
    for top, is_borne in ((sigma + 2 / 2**15, False), (sigma, True)):
        again = PACBayesSharpness(num_draws=20, max_sigma=top, num_bisections=1).measure(problem)
        assert (again.parts["sigma"] == top) == is_borne
    assert result.parts["perturbed_accuracy"] == pytest.approx(0.9)


def test_magnitude_aware_noise_scales_with_the_weight():
    """Ten times the weight bears ten times the isotropic noise, the same relative one: σ' stays."""
    problems = [Problem(Bias(w), DATA) for w in (1.0, 10.0)]
    isotropic = [PACBayesSharpness(max_sigma=20.0).measure(p).parts["sigma"] for p in problems]
    aware = [MagnitudeAwareSharpness().measure(p).parts["sigma"] for p in problems]
    assert isotropic[1] / isotropic[0] == pytest.approx(10, rel=2e-3)  # bisection: 20 / 2^15
    assert aware[0] == pytest.approx(isotropic[0], rel=2e-3)
    assert aware[1] == pytest.approx(aware[0], rel=1e-3)


@pytest.mark.parametrize("kind", [PACBayesSharpness, MagnitudeAwareSharpness])
def test_bounds_are_the_published_formulas(kind):
    """Numbers users compare between papers; by hand for four weights and their initial values."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False).double()
    x = torch.rand(40, 2).double()
    y = model(x).argmax(1)  # so that noise costs accuracy
    w, change = model.weight.detach(), torch.tensor([[0.1, 0.2], [0.0, -0.3]]).double()
    measure = kind(max_drop=0.05)
    parts = measure.measure(Problem(model, [(x, y)], initial={"weight": w - change})).parts
    s = parts["sigma"]
    assert 0 < s < 2
    for name, v in (("origin", w), ("initial", w - (w - change))):
        if kind is MagnitudeAwareSharpness:
            top = 1e-6 + (s**2 + 1) * float(v.square().sum()) / 4
            size = sum(0.25 * math.log(top / (1e-6 + s**2 * e**2)) for e in v.flatten().tolist())
        else:
            size = float(v.square().sum()) / (4 * s**2)
        bound = size + math.log(40 / s) + 10
        assert parts[f"bound_{name}"] == pytest.approx(bound, rel=1e-9)
        assert parts[f"rate_{name}"] == pytest.approx(math.sqrt(bound / 40), rel=1e-9)
    assert "bound_initial" not in measure.measure(Problem(model, [(x, y)])).parts


def test_the_robust_sharpness_attacks_every_perturbed_model_anew():
    """With a shift of 0.2 the clean score is 0.5 w − 0.2 and the robust one (0.5 − eps) w − 0.2.

    They fail at w + σu = 0.4 (clean) and 0.5 (robust): σ in the ratio 0.6 : 0.5, to the bisection's 6e-5.
    """
    problems = [Problem(Bias(shift=0.2), DATA, threat) for threat in (None, ThreatModel("linf", 0.1))]
    clean, robust = (PACBayesSharpness().measure(problem).parts["sigma"] for problem in problems)
    assert clean / robust == pytest.approx(0.6 / 0.5, rel=1e-3)


def test_ends_of_the_range_are_told():
    """An upper limit reported as if it were the answer would rank the flattest models at random."""
    result = PACBayesSharpness().measure(Problem(Bias(100.0), DATA))
    assert (result.parts["sigma"], result.value) == (2.0, 0.25)
    assert "sigma at its limit 2" in result.settings
    never = PACBayesSharpness(num_bisections=3).measure(Problem(Bias(1e-9), DATA))
    assert never.value == math.inf
    assert never.parts["sigma"] == 0
    assert never.parts["perturbed_accuracy"] == 1  # of the model itself
    assert "bound_origin" not in never.parts
    wrong = PACBayesSharpness().measure(Problem(Bias(-1.0), DATA))  # bears every noise
    assert math.isnan(wrong.value)
    assert "at most max_drop" in wrong.settings
