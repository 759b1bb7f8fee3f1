"""What the Weight-Curvature Index says about generalisation, as one number: a PAC-Bayes *surrogate*.

Legend: R̂ mean robust loss on N training examples, δ failure probability, β inverse temperature, B a grid of
them, a_l = ||W_l||_F², t_l = Tr(H_l), s_l posterior variance of layer l, σ_l = √s_l.

The linear PAC-Bayes bound for a loss in [0, 1] (Germain et al. 2016) holds for one β with probability 1 − δ;
for all β of a grid fixed in advance by spending δ/|B| on each (union bound):

    E_Q R  ≤  E_Q R̂  +  [ KL(Q‖P) + ln(1/δ) + ln|B| ] / β  +  β / (8N)                                     (1)

With Q_l = N(W_l, s_l I) and P_l = N(0, s_l I), KL = Σ_l a_l / (2 s_l), and to second order in the weights
E_Q R̂ ≈ R̂ + ½ Σ_l s_l t_l. The variances that minimise this are

    s_l* = sqrt( a_l / (β t_l) ),       and there     ½ Σ_l [ s_l t_l + a_l / (β s_l) ] = WCI / √β         (2)

    surrogate  =  min_{β in B}  R̂  +  WCI / √β  +  [ ln(1/δ) + ln|B| ] / β  +  β / (8N)                   (3)

Why it is a surrogate and not a certificate: cross-entropy is not bounded by one, as (1) asks; the Taylor
remainder is dropped, and the linear term, whose mean is zero; s_l* depends on the training data through W_l
and t_l, which the prior of (1) must not, and no hyperprior or union over a grid of s_l pays for it; R̂ and t_l
are taken at fixed adversarial examples of an attack that need not be the worst; where WCI or R̂ are estimated
on fewer than N examples, that error is reported beside the value. It is good for comparing models trained on
the same data, and for seeing which β, hence which λ = 1/√β, the index asks for.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PACBayesBound:
    """The minimum (3), a surrogate for the mean risk over perturbed weights, in the unit of the loss."""

    value: float
    beta: float  # the minimiser on the grid
    terms: dict[str, float]  # of (3) by name; they sum to the value
    delta: float  # δ of all β together
    stderr: float | None = None  # as far as it comes from WCI's

    def __str__(self) -> str:
        """One line for the log, with the word surrogate in it."""
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        parts = " + ".join(f"{name} {term:.4g}" for name, term in self.terms.items())
        at = f"beta {self.beta:.4g}, delta {self.delta:g}"
        return f"PAC-Bayes surrogate {self.value:.4g}{error} = {parts} ({at})"


def default_betas(num_examples: int) -> list[float]:
    """Return the powers of two from 1 to 64 N: a grid that depends on N alone, never on the data.

    The best β, about (4 N WCI)^(2/3), is inside for WCI up to 128 √N, and there the best of the grid is at
    most (√2 + 1/√2)/2 = 1.061 times worse.
    """
    return [2.0**k for k in range(int(math.log2(64 * num_examples)) + 1)]


def pac_bayes_bound(
    risk: float, wci: float, num_examples: int, *, delta: float = 0.05, wci_stderr: float | None = None
) -> PACBayesBound:
    """Return the PAC-Bayes surrogate (3) at the best β of `default_betas`, the union over the grid paid for.

    Args:
        risk: R̂, mean robust loss on the training set, >= 0.
        wci: The index of the same loss on the training set, >= 0.
        num_examples: N, size of the training set (not the number that was measured on).
        delta: δ in (0, 1).
        wci_stderr: Standard error of ``wci``; divided by √β, exact to first order at a minimum.

    >>> bound = pac_bayes_bound(1.2, 160.0, 50_000, wci_stderr=5.0)
    >>> bound.beta, round(bound.value, 3), round(bound.stderr, 3)
    (131072.0, 1.97, 0.014)
    """
    _require("num_examples", num_examples, num_examples >= 1, "at least 1. Pass the size of the training set")
    _require("risk", risk, 0 <= risk < math.inf, "a finite number >= 0. Pass the mean loss")
    advice = "An estimate without bias can fall below zero: measure with more examples"
    _require("wci", wci, 0 <= wci < math.inf, f"a finite number >= 0. {advice}")
    _require("delta", delta, 0 < delta < 1, "a probability in (0, 1). 0.05 is usual")
    grid = default_betas(num_examples)

    def terms(beta: float) -> dict[str, float]:
        return {
            "risk": float(risk),
            "curvature": wci / math.sqrt(beta),
            "confidence": (math.log(1 / delta) + math.log(len(grid))) / beta,
            "complexity": beta / (8 * num_examples),
        }

    best = min(grid, key=lambda beta: sum(terms(beta).values()))
    stderr = None if wci_stderr is None else wci_stderr / math.sqrt(best)
    return PACBayesBound(sum(terms(best).values()), best, terms(best), delta, stderr)


def posterior_sigma(a: Tensor | float, t: Tensor | float, beta: float) -> Tensor:
    """Return the optimal posterior's standard deviation (2), σ_l* = (a_l / (β t_l))^(1/4), in float64.

    How far each weight of layer l may move before the loss rises noticeably; infinite where t_l <= 0. For a
    penalty λ·WCI the inverse temperature ``beta`` is 1/λ².
    """
    _require("beta", beta, 0 < beta < math.inf, "a finite number > 0. For a penalty λ·WCI it is 1/λ²")
    a, t = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(t, dtype=torch.float64)
    return torch.where(t > 0, a / (beta * t), torch.inf) ** 0.25


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    """Raise the error of an argument out of range."""
    if not holds:
        raise ValueError(f"pac_bayes.{name}: got {value!r}; expected {rule}.")
