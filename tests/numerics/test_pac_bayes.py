"""The PAC-Bayes surrogate against closed forms and a minimisation over the posterior variances."""

import math

import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from wcitrain.measures.pac_bayes import default_betas, pac_bayes_bound, posterior_sigma


def test_with_curvature_the_value_is_the_minimum_over_the_posterior_variances():
    """WCI/√β must be what the best Gaussian posterior reaches: a wrong factor makes the bound too good."""
    a, t = torch.tensor([2.0, 50.0, 9.0]).double(), torch.tensor([0.3, 4.0, 100.0]).double()
    n, wci = 1000, float((a * t).sqrt().sum())
    bound = pac_bayes_bound(0.7, wci, n, delta=0.1)
    beta, num_betas = bound.beta, len(default_betas(n))

    def free_energy(log_s) -> float:
        s = torch.tensor(log_s).double().exp()
        # KL of the two Gaussians from its definition, d_l = 1: variances agree, means differ by ||W_l||
        kl = sum(
            torch.distributions.kl_divergence(
                torch.distributions.Normal(a_l.sqrt(), s_l.sqrt()),
                torch.distributions.Normal(torch.zeros(()).double(), s_l.sqrt()),
            )
            for a_l, s_l in zip(a, s, strict=True)
        )
        return float(0.5 * (s * t).sum() + kl / beta)

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    best = minimize(free_energy, [0.0, 0.0, 0.0], method="Nelder-Mead", options=options)
    union = math.log(10 * num_betas) / beta  # each β of the grid has a share of δ
    assert bound.value == pytest.approx(0.7 + best.fun + union + beta / (8 * n), rel=1e-9)
    sigma = torch.tensor(best.x).exp().sqrt()  # the minimiser is less sharp than the minimum: √fatol
    torch.testing.assert_close(posterior_sigma(a, t, beta), sigma, rtol=1e-5, atol=0)


def test_the_terms_are_the_value_and_the_error_is_that_of_the_curvature():
    """A report that prints the terms must add up; the error of the index divides by √β like the index."""
    bound = pac_bayes_bound(1.1, 150.0, 50_000, wci_stderr=6.0)
    assert list(bound.terms) == ["risk", "curvature", "confidence", "complexity"]
    assert math.isclose(sum(bound.terms.values()), bound.value, rel_tol=1e-15)
    step = 1e-3  # the chosen β stays chosen
    higher, lower = (pac_bayes_bound(1.1, 150 + sign * step, 50_000).value for sign in (1, -1))
    slope = (higher - lower) / (2 * step)
    assert bound.stderr == pytest.approx(6 * slope, rel=1e-9)
    assert pac_bayes_bound(1.1, 150.0, 50_000).stderr is None
    assert pac_bayes_bound(1.1, 150.0, 50_000, wci_stderr=math.inf).stderr == math.inf
    assert "surrogate" in str(bound)


@pytest.mark.parametrize("n", [1, 1000, 1797, 50_000, 1_281_167])
def test_the_default_grid_is_fine_and_wide_enough(n):
    """It depends on N alone, and loses at most 6.1 % against the best β for any index up to 128 √N."""
    grid = default_betas(n)
    assert grid[0] == 1
    assert 32 * n < grid[-1] <= 64 * n
    for wci in [0.0, *(10.0**k for k in range(-3, 8)), 64 * n**0.5]:
        if wci > 90 * n**0.5:  # 128 √N, less the last, incomplete factor of two
            continue
        bound = pac_bayes_bound(0.0, wci, n)
        cost = math.log(1 / 0.05) + math.log(len(grid))
        if math.sqrt(8 * n * cost) > grid[-1]:
            continue  # a handful of examples: nothing to bound
        best = minimize_scalar(
            lambda b, w=wci, c=cost: w * math.exp(-b / 2) + c * math.exp(-b) + math.exp(b) / (8 * n),
            bounds=(0, 40),
        )
        assert bound.value <= best.fun * (2**0.5 + 0.5**0.5) / 2 * (1 + 1e-9)


def test_a_flat_layer_may_move_without_limit_and_an_empty_one_not_at_all():
    """Trace estimates can be negative; a NaN would spread through the table."""
    sigma = posterior_sigma(torch.tensor([4.0, 4.0, 0.0, 16.0]), torch.tensor([0.0, -1.0, 2.0, 1.0]), 1.0)
    assert sigma.tolist() == [math.inf, math.inf, 0.0, 2.0]
    assert sigma.dtype == torch.float64
    assert float(posterior_sigma(16.0, 1.0, 16.0)) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"risk": math.nan}, "pac_bayes.risk: got nan"),
        ({"wci": -0.1}, "pac_bayes.wci: got -0.1"),
        ({"num_examples": 0}, "pac_bayes.num_examples"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(change, message):
    """min() over NaN returns whatever comes first."""
    with pytest.raises(ValueError, match=message):
        pac_bayes_bound(**({"risk": 0.5, "wci": 1.0, "num_examples": 100} | change))
