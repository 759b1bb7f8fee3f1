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

Why it is a surrogate and not a certificate. (a) Cross-entropy is not bounded by one, as (1) asks. (b) The
Taylor remainder is dropped, and so is the linear term, whose mean is zero. (c) s_l* depends on the training
data through W_l and t_l, but the prior of (1) must not: the term that would pay for it (a hyperprior or a
union bound over a grid of every s_l) is not included. (d) R̂ and t_l are taken at fixed adversarial examples,
found by an attack that need not be the worst. (e) Where WCI or R̂ are estimated on fewer than N examples,
that error is reported beside the value, not added to it. It is good for comparing models trained on the same
data, and for seeing which β, hence which λ = 1/√β, the index asks for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PACBayesBound:
    """Equation (3): a surrogate, for the reasons in the module's docstring.

    Args:
        value: Stands for E_Q R, the mean risk over perturbed weights, in the unit of the loss.
        beta: The minimiser on the grid.
        terms: ``risk`` R̂, ``curvature`` WCI/√β, ``confidence`` [ln(1/δ) + ln|B|]/β, ``complexity`` β/(8N);
            they sum to value.
        delta: δ of all β together.
        num_betas: |B|.
        stderr: Of ``value`` as far as it comes from WCI's, at the chosen β; None when WCI came without one.
    """

    value: float
    beta: float
    terms: dict[str, float]
    delta: float
    num_betas: int
    stderr: float | None = None

    def __str__(self) -> str:
        """One line for the log, with the word surrogate in it."""
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        parts = " + ".join(f"{name} {term:.4g}" for name, term in self.terms.items())
        return (
            f"PAC-Bayes surrogate {self.value:.4g}{error} = {parts} (beta {self.beta:.4g}, delta "
            f"{self.delta:g})"
        )


def default_betas(num_examples: int) -> list[float]:
    """Return the powers of two from 1 to 64 N: a grid that depends on N alone, never on the data.

    Below 1 the confidence term exceeds ln(1/δ); at 64 N the complexity term is eight, beyond any useful value
    of a loss. With the confidence term small the best β is (4 N WCI)^(2/3), so the grid reaches it for WCI up
    to 128 √N. Its size grows like log₂ N, and the union bound costs ln|B| / β. Neighbours are a factor of two
    apart, so inside the grid the best of them is at most (√2 + 1/√2)/2 = 1.061 times worse than the best β of
    all; that is the worst case, without risk and curvature.
    """
    return [2.0**k for k in range(int(math.log2(64 * num_examples)) + 1)]


def pac_bayes_bound(
    risk: float,
    wci: float,
    num_examples: int,
    *,
    delta: float = 0.05,
    betas: Sequence[float] | None = None,
    wci_stderr: float | None = None,
) -> PACBayesBound:
    """Return the PAC-Bayes surrogate (3) at the best β of a grid, the union over the grid paid for.

    Args:
        risk: R̂, mean robust loss on the training set, >= 0.
        wci: The index of the same loss on the training set, >= 0.
        num_examples: N, size of the training set (not the number that was measured on).
        delta: δ in (0, 1).
        betas: B, > 0, chosen without looking at the data; by default ``default_betas(num_examples)``.
        wci_stderr: Standard error of ``wci``; propagated as wci_stderr/√β, exact to first order since the
            chosen β is a minimum.

    Raises:
        ValueError: A number out of range.

    >>> bound = pac_bayes_bound(1.2, 160.0, 50_000, wci_stderr=5.0)
    >>> bound.beta, round(bound.value, 3), round(bound.stderr, 3)
    (131072.0, 1.97, 0.014)
    """
    _require("risk", risk, math.isfinite(risk) and risk >= 0, "a finite number >= 0", "Pass the mean loss.")
    _require(
        "wci",
        wci,
        math.isfinite(wci) and wci >= 0,
        "a finite number >= 0",
        "A bias-corrected estimate can fall below zero: measure with more examples.",
    )
    _require(
        "num_examples", num_examples, num_examples >= 1, "at least 1", "Pass the size of the training set."
    )
    _require("delta", delta, 0 < delta < 1, "a probability in (0, 1)", "0.05 is usual.")
    grid = default_betas(num_examples) if betas is None else sorted(set(betas))
    _require(
        "betas",
        betas,
        len(grid) > 0 and all(math.isfinite(b) and b > 0 for b in grid),
        "at least one, all finite and > 0",
        "Leave it out for the default grid.",
    )
    _require(
        "wci_stderr",
        wci_stderr,
        wci_stderr is None or wci_stderr >= 0,
        ">= 0 or None",
        "Pass a standard error.",
    )

    def terms(beta: float) -> dict[str, float]:
        return {
            "risk": float(risk),
            "curvature": wci / math.sqrt(beta),
            "confidence": (math.log(1 / delta) + math.log(len(grid))) / beta,
            "complexity": beta / (8 * num_examples),
        }

    best = min(grid, key=lambda beta: sum(terms(beta).values()))
    stderr = None if wci_stderr is None else wci_stderr / math.sqrt(best)
    return PACBayesBound(sum(terms(best).values()), best, terms(best), delta, len(grid), stderr)


def posterior_sigma(a: Tensor | float, t: Tensor | float, beta: float) -> Tensor:
    """Return the optimal posterior's standard deviation (2), σ_l* = (a_l / (β t_l))^(1/4), in float64.

    How far each weight of layer l may move before the loss rises noticeably. Infinite where t_l <= 0: to
    second order nothing limits that layer.

    Args:
        a, t: ``a_l = ||W_l||_F²`` and ``t_l = Tr(H_l)``, any shape, the same.
        beta: Inverse temperature > 0; for a penalty λ·WCI it is 1/λ².

    Raises:
        ValueError: beta is not a positive number.
    """
    _require(
        "beta",
        beta,
        math.isfinite(beta) and beta > 0,
        "a finite number > 0",
        "For a penalty λ·WCI it is 1/λ².",
    )
    a, t = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(t, dtype=torch.float64)
    return torch.where(t > 0, a / (beta * t), torch.inf) ** 0.25


def _require(name: str, value: object, holds: bool, rule: str, advice: str) -> None:
    """Raise the error of an argument out of range."""
    if not holds:
        raise ValueError(f"pac_bayes.{name}: got {value!r}; expected {rule}. {advice}")
