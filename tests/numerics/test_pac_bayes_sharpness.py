"""PAC-Bayes sharpness on a classifier whose accuracy under noise is known in closed form."""

import math

import pytest
import torch
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.pac_bayes_sharpness import pac_bayes_sharpness


class Bias(nn.Module):
    """Logits (w, 0) for every image: right for class 0 while w > 0. One weight, so noise is one number."""

    def __init__(self, w: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[w]], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.flatten(1).mean(1, keepdim=True) * self.weight
        return torch.cat([score, torch.zeros_like(score)], 1)


DATA = [(torch.full((10, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(10, dtype=torch.long))]


def normal_quantile(share: float) -> float:
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))


def test_sigma_is_where_the_expected_accuracy_has_dropped_by_a_tenth():
    """P(w + σ u <= 0) = Φ(−w/σ) = 0.1 at σ = 0.780 for w = 1; a variance taken for a deviation gives 0.883.

    400 draws: the quantile's standard error is sqrt(0.1 · 0.9 / 400) / φ(1.2816) = 0.085 of 1.28, 6.7 %; one
    of them and the last bisection, 1/32 of 0.78, make 10.7 %; the seed is fixed.
    """
    found = pac_bayes_sharpness(Bias(), DATA, num_draws=400, max_sigma=1.0, num_bisections=5)
    truth = -1 / normal_quantile(0.1)
    assert found.parts["sigma"] == pytest.approx(truth, rel=0.107)
    assert found.value == pytest.approx(1 / found.parts["sigma"] ** 2, rel=1e-12)
    assert found.parts["accuracy"] == 1
    assert found.parts["perturbed_accuracy"] >= 0.9 - 1e-9
    assert math.isnan(found.stderr)


def test_sigma_is_found_to_the_last_bisection():
    """With these draws expected accuracy is a known step function of σ: bracket its step to 2 / 2^15."""
    found = pac_bayes_sharpness(Bias(), DATA, num_draws=20)
    sigma = found.parts["sigma"]
    # Allowed: 2 wrong draws of 20; the third goes wrong at σ = w / |third lowest draw|.
    fails = [
        pac_bayes_sharpness(Bias(), DATA, num_draws=20, max_sigma=s, num_bisections=1).parts["sigma"] < s
        for s in (sigma + 2 / 2**15, sigma)
    ]
    assert fails == [True, False]
    assert found.parts["perturbed_accuracy"] == pytest.approx(0.9)


def test_magnitude_aware_noise_scales_with_the_weight():
    """Ten times the weight bears ten times the isotropic noise, the same relative one: σ' stays."""
    isotropic = [pac_bayes_sharpness(Bias(w), DATA, max_sigma=20.0).parts["sigma"] for w in (1.0, 10.0)]
    aware = [pac_bayes_sharpness(Bias(w), DATA, magnitude_aware=True).parts["sigma"] for w in (1.0, 10.0)]
    assert isotropic[1] / isotropic[0] == pytest.approx(10, rel=2e-3)  # bisection: 20 / 2^15
    assert aware[0] == pytest.approx(isotropic[0], rel=2e-3)
    assert aware[1] == pytest.approx(aware[0], rel=1e-3)


def test_bounds_are_the_published_formulas():
    """Numbers users compare between papers; by hand for two weights and their initial values."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False).double()
    x = torch.rand(40, 2).double()
    y = model(x).argmax(1)  # so that noise costs accuracy
    initial = {"weight": model.weight.detach() - torch.tensor([[0.1, 0.2], [0.0, -0.3]])}
    w, r = model.weight.detach(), model.weight.detach() - initial["weight"]
    for aware in (False, True):
        found = pac_bayes_sharpness(model, [(x, y)], magnitude_aware=aware, initial=initial, max_drop=0.05)
        s = found.parts["sigma"]
        assert 0 < s < 2
        for name, v in (("origin", w), ("initial", r)):
            if aware:
                top = 1e-6 + (s**2 + 1) * float(v.square().sum()) / 4
                size = sum(0.25 * math.log(top / (1e-6 + s**2 * e**2)) for e in v.flatten().tolist())
            else:
                size = float(v.square().sum()) / (4 * s**2)
            bound = size + math.log(40 / s) + 10
            assert found.parts[f"bound_{name}"] == pytest.approx(bound, rel=1e-9)
            assert found.parts[f"rate_{name}"] == pytest.approx(math.sqrt(bound / 40), rel=1e-9)
    assert "bound_initial" not in pac_bayes_sharpness(model, [(x, y)], max_drop=0.05).parts


def test_the_robust_sharpness_attacks_every_perturbed_model_anew():
    """Two linear classes at margin 1: noise must also beat the attack's 2 eps: robust accuracy falls earlier.

    Under linf attack the score falls to (0.5 − eps) w for w > 0 and stays wrong for w < 0: the sign decides
    alone, and sharpness is equal; with a fixed bias b = −0.2 the clean score is 0.5 w − 0.2 and the robust
    one (0.5 − eps) w − 0.2.
    """

    class Shifted(Bias):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) - torch.tensor([0.2, 0.0], dtype=torch.float64)

    clean = pac_bayes_sharpness(Shifted(), DATA, num_draws=10).parts["sigma"]
    robust = pac_bayes_sharpness(Shifted(), DATA, ThreatModel("linf", 0.1), num_draws=10, num_steps=3).parts[
        "sigma"
    ]
    # Fails at w + σu = 0.4 (clean), 0.5 (robust): σ in the ratio 0.6 : 0.5, to the bisection's 6e-5.
    assert clean / robust == pytest.approx(0.6 / 0.5, rel=1e-3)


def test_ends_of_the_range_are_told():
    """An upper limit reported as if it were the answer would rank the flattest models at random."""
    found = pac_bayes_sharpness(Bias(100.0), DATA)
    assert (found.parts["sigma"], found.value) == (2.0, 0.25)
    assert "sigma at its limit 2" in found.settings
    never = pac_bayes_sharpness(Bias(1e-9), DATA, num_bisections=3)
    assert never.value == math.inf
    assert never.parts["sigma"] == 0
    assert never.parts["perturbed_accuracy"] == 1  # of the model itself
    assert "bound_origin" not in never.parts


def test_nothing_is_left_behind_and_the_seed_decides():
    """Weights move hundreds of times: they must come back bit for bit, also when the model breaks midway."""
    model = BatchNormNet().train()
    x, _ = image_batch(40)
    data, threat = [(x, model.eval()(x).argmax(1))], ThreatModel("linf", 1e-4)
    model.train()
    options = {"num_draws": 3, "num_bisections": 10, "num_steps": 1}
    before, random = everything(model), torch.get_rng_state()
    first = pac_bayes_sharpness(model, data, threat, **options)
    assert str(first) == str(pac_bayes_sharpness(model, data, threat, **options))
    assert 0 < first.parts["sigma"] < 2
    assert str(first.parts) != str(pac_bayes_sharpness(model, data, threat, seed=1, **options).parts)
    calls = []

    def fail(module, args):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("stop")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        pac_bayes_sharpness(model, data, **options)
    hook.remove()
    assert_same(before, everything(model))
    assert model.training
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_drop": 1.0}, "max_drop=1.0"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"initial": {}}, "none of the right shape for weight"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    """Before the first of hundreds of evaluations."""
    with pytest.raises(ValueError, match=message):
        pac_bayes_sharpness(Bias(), DATA, **change)
