"""Linear logistic regression, trained adversarially, in closed form (Yamada et al. 2021, arXiv 2102.02950).

Legend: N examples, d features, x [N, d], y in {−1, +1} [N], w [d], no bias; p the threat's norm, q its dual
(l2: 2, linf: 1); s = sigmoid(t) [N], ŵ = w / ‖w‖, K random draws or directions.

The worst example of the loss softplus(−y w·x) in the ball of radius ε is known, so the robust loss is a
function of w alone:

    L(w) = mean softplus(t),   t = −y w·x + ε ‖w‖_q                                                        (1)
    x_a = x − ε y ŵ  (l2),   x − ε y sign(w)  (linf)                                                       (2)
    ∇L = mean −s y x_a                                                                                     (3)
    ∇²L = F + R,   F = mean s (1 − s) x_a x_aᵀ,   R = mean s · (ε / ‖w‖) (I − ŵ ŵᵀ)  (l2),   0  (linf)     (4)
    WCI = sqrt( ‖w‖² Tr ∇²L )                                                                              (5)

F is the Hessian at adversarial examples held fixed, which an autograd index at stored examples sees; R is how
the attack follows the weights. Under linf, (4) holds where no weight is zero: at w_i = 0 the loss has a kink,
whose curvature no Hessian shows (the normalised rise does), and sign(0) = 0.

Weight decay in ``fit_logistic`` is (λ/2) ‖w‖², without which separable data have no minimiser. The curvature
is that of L alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from scipy.optimize import minimize
from torch import Tensor

from wcitrain.seeding import generator_from

LogisticNorm = Literal["l2", "linf"]


def logistic_loss(w: Tensor, x: Tensor, y: Tensor, eps: float = 0.0, norm: LogisticNorm = "l2") -> Tensor:
    """Return the robust loss (1) at w [d] as a scalar, or at many weights [..., d] as [...]; differentiable.

    Args:
        w: Weights.
        x: Examples [N, d].
        y: Labels −1 and +1 [N], in the dtype of ``x``.
        eps: Radius in the units of ``x``, >= 0.
        norm: Of the threat.

    >>> w, x, y = torch.tensor([3.0, 4.0]).double(), torch.ones(1, 2).double(), torch.ones(1).double()
    >>> f"{logistic_loss(w, x, y, eps=0.5):.10f}"
    '0.0110477448'
    """
    return F.softplus(_exponent(w, x, y, eps, norm)).mean(-1)


def worst_examples(w: Tensor, x: Tensor, y: Tensor, eps: float = 0.0, norm: LogisticNorm = "l2") -> Tensor:
    """Return the worst case x_a [N, d] of every example by (2); x itself for w = 0, where all are equal."""
    direction = w / _length(w) if norm == "l2" else w.sign()
    return x - eps * y[:, None] * direction


def logistic_gradient(w: Tensor, x: Tensor, y: Tensor, eps: float = 0.0, norm: LogisticNorm = "l2") -> Tensor:
    """Return the gradient (3) [d] of the robust loss."""
    s = _exponent(w, x, y, eps, norm).sigmoid()
    return -(s * y) @ worst_examples(w, x, y, eps, norm) / len(x)


def logistic_hessian(
    w: Tensor, x: Tensor, y: Tensor, eps: float = 0.0, norm: LogisticNorm = "l2", *, fixed: bool = False
) -> Tensor:
    """Return the Hessian (4) [d, d] of the robust loss; with ``fixed`` its part F, at examples held fixed."""
    t = _exponent(w, x, y, eps, norm)
    s, x_a = t.sigmoid(), worst_examples(w, x, y, eps, norm)
    hessian = (x_a * (s * (-t).sigmoid())[:, None]).T @ x_a / len(x)
    if fixed or norm == "linf" or eps == 0:
        return hessian
    unit = w / _length(w)
    return hessian + s.mean() * eps / _length(w) * (torch.eye(len(w), dtype=w.dtype) - unit[:, None] * unit)


@dataclass(frozen=True)
class LogisticCurvature:
    """Curvature of the robust loss at w by (4) and (5).

    ``fixed_trace`` and ``fixed_wci`` belong to F alone; ``lambda_max`` is the largest eigenvalue of ∇²L.
    """

    loss: float
    norm: float
    trace: float
    fixed_trace: float
    lambda_max: float
    wci: float
    fixed_wci: float


def logistic_curvature(
    w: Tensor, x: Tensor, y: Tensor, eps: float = 0.0, norm: LogisticNorm = "l2"
) -> LogisticCurvature:
    """Return all of ``LogisticCurvature``, in float64; O(N d² + d³).

    Raises:
        ValueError: ``eps`` or ``norm`` is out of range, shapes or labels do not fit, or w = 0 under l2
            attack, where (4) is infinite.
    """
    w, x, y = _checked("logistic_curvature", x, y, eps, norm, w)
    if eps > 0 and norm == "l2" and not w.any():
        raise ValueError(
            "logistic_curvature: got w = 0, where ‖w‖ has no curvature; expected another. Lower eps."
        )
    total = logistic_hessian(w, x, y, eps, norm)
    fixed_trace = float(logistic_hessian(w, x, y, eps, norm, fixed=True).trace())
    trace, length, last = float(total.trace()), float(w.norm()), len(w) - 1
    return LogisticCurvature(
        loss=float(logistic_loss(w, x, y, eps, norm)),
        norm=length,
        trace=trace,
        fixed_trace=fixed_trace,
        lambda_max=float(eigh(total.numpy(), eigvals_only=True, subset_by_index=(last, last))[0]),
        wci=length * math.sqrt(max(trace, 0.0)),
        fixed_wci=length * math.sqrt(max(fixed_trace, 0.0)),
    )


def largest_eps(x: Tensor, y: Tensor, norm: LogisticNorm = "l2") -> float:
    """Return the radius from which on w = 0 minimises the robust loss: ‖mean y x‖_p, where 0 ∈ ∂L(0)."""
    mean = (y[:, None] * x).mean(0)
    return float(mean.norm() if norm == "l2" else mean.abs().max())


def fit_logistic(
    x: Tensor,
    y: Tensor,
    eps: float = 0.0,
    norm: LogisticNorm = "l2",
    *,
    weight_decay: float = 1e-3,
    tolerance: float = 1e-7,
    max_iterations: int = 20_000,
) -> Tensor:
    """Return the weights [d], float64, that minimise L(w) + (λ/2) ‖w‖², found by full-batch L-BFGS-B.

    The problem is convex. Under linf it has kinks at w_i = 0: with w = u − v, u, v >= 0, ‖w‖_1 = Σ (u + v) it
    is smooth in (u, v) and bounded below by zero, so weights that the attack makes useless are zero exactly.

    Args:
        x, y: Examples [N, d] and their labels −1 and +1 [N].
        eps: Radius in the units of ``x``, >= 0.
        norm: Of the threat.
        weight_decay: λ > 0.
        tolerance: Where L-BFGS stops, on the largest coordinate of the (projected) gradient; line searches
            may end at up to a hundred times that, which is still accepted.
        max_iterations: Of L-BFGS.

    Raises:
        ValueError: An argument out of range, or an ``eps`` from which on w = 0 is best (``largest_eps``).
        RuntimeError: The tolerance was not reached.
    """
    _, x, y = _checked("fit_logistic", x, y, eps, norm)
    if not 0 < weight_decay < math.inf:
        raise ValueError(
            f"fit_logistic: got weight_decay={weight_decay}; expected a number > 0: separable data have no "
            "minimiser without. Take 1e-3."
        )
    if eps >= (limit := largest_eps(x, y, norm)):
        raise ValueError(
            f"fit_logistic: got eps={eps:g}; expected less than {limit:.4g}, from where on w = 0 is best. "
            "Take a smaller eps."
        )
    d, is_split = x.shape[1], norm == "linf" and eps > 0

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        z = torch.from_numpy(v)
        w = z[:d] - z[d:] if is_split else z
        length = z.sum() if is_split else w.norm()
        t = -y * (x @ w) + eps * length
        s = t.sigmoid()
        slope, rise = -(s * y) @ x / len(x) + weight_decay * w, eps * s.mean()
        value = F.softplus(t).mean() + weight_decay / 2 * w.square().sum()
        # (3) in pieces: the data's part, and that of ε times the length.
        gradient = torch.cat([slope + rise, rise - slope]) if is_split else slope + rise * w / _length(w)
        return float(value), gradient.numpy()

    start = (y[:, None] * x).mean(0)
    start = start / start.norm()
    first = torch.cat([start.clamp_min(0), (-start).clamp_min(0)]) if is_split else start
    found = minimize(
        objective,
        first.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * (2 * d) if is_split else None,
        options={
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "maxcor": 30,
            "ftol": 0,
            "gtol": tolerance,
        },
    )
    # The projected gradient: a coordinate at its bound may only want to go further down.
    residual = found.jac if not is_split else np.where(found.x > 0, found.jac, np.minimum(found.jac, 0))
    if (largest := float(np.abs(residual).max())) > 100 * tolerance:
        raise RuntimeError(
            f"fit_logistic: got a gradient of {largest:.2g} after {found.nit} iterations; expected at most "
            f"{100 * tolerance:g}. Raise max_iterations or the weight decay."
        )
    z = torch.from_numpy(found.x)
    return z[:d] - z[d:] if is_split else z


def random_noise(
    x: Tensor, y: Tensor, eps: float, norm: LogisticNorm = "l2", *, num_draws: int = 10, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return K copies of every example with noise of norm ``eps`` in random directions [K N, d], and labels.

    The control: training on them (with ``eps=0``) meets noise of the adversary's size without its direction.
    l2: uniform on the sphere. linf: independent signs times eps, the corners of the cube.
    """
    _checked("random_noise", x, y, eps, norm)
    generator = generator_from("cpu", seed, "random noise", norm)
    noise = torch.randn(num_draws, *x.shape, generator=generator, dtype=x.dtype)
    noise = noise / noise.norm(dim=-1, keepdim=True) if norm == "l2" else noise.sign()
    return (x + eps * noise).flatten(0, 1), y.repeat(num_draws)


def normalised_rise(
    loss: Callable[[Tensor], Tensor],
    w: Tensor,
    *,
    relative_size: float = 1.0,
    num_directions: int = 100,
    seed: int = 0,
) -> float:
    """Return the mean over directions of (L(w₊) + L(w₋))/2 − L(w), w± = w ± a ‖w‖ u/‖u‖, u ~ N(0, I).

    The landscape along normalised directions, its odd part removed. To second order it is a² ‖w‖² Tr(H) / (2
    d) = a² WCI² / (2 d).

    Args:
        loss: Maps weights [K, d] to losses [K].
        w: Weights [d].
        relative_size: a > 0.
        num_directions: K; the same for equal d and seed.
        seed: Of the directions.
    """
    u = torch.randn(
        num_directions, len(w), generator=generator_from("cpu", seed, "directions"), dtype=w.dtype
    )
    step = relative_size * w.norm() * u / u.norm(dim=1, keepdim=True)
    return float((loss(w + step) + loss(w - step)).mean() / 2 - loss(w[None])[0])


def _exponent(w: Tensor, x: Tensor, y: Tensor, eps: float, norm: LogisticNorm) -> Tensor:
    """Return t [..., N] of (1)."""
    length = w.norm(dim=-1) if norm == "l2" else w.abs().sum(-1)
    return -y * (w @ x.T) + eps * length[..., None]


def _length(w: Tensor) -> Tensor:
    """Return ‖w‖, one where it is zero."""
    length = w.norm()
    return length if length > 0 else torch.ones_like(length)


def _checked(
    where: str, x: Tensor, y: Tensor, eps: float, norm: LogisticNorm, w: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w (zeros by default), x, y in float64, after looking at them."""
    w = torch.zeros(x.shape[-1]) if w is None else w
    if x.ndim != 2 or not len(x) or y.shape != x.shape[:1] or w.shape != x.shape[1:]:
        raise ValueError(
            f"{where}: got x {tuple(x.shape)}, y {tuple(y.shape)}, w {tuple(w.shape)}; expected [N, d], [N], "
            "[d]. Flatten images."
        )
    if not bool((y.abs() == 1).all()):
        raise ValueError(
            f"{where}: got labels {sorted({float(v) for v in y[:1000]})[:4]}; expected −1 and +1."
        )
    if norm not in ("l2", "linf") or not 0 <= eps < math.inf:
        raise ValueError(
            f"{where}: got norm={norm!r}, eps={eps}; expected 'l2' or 'linf' and a finite radius >= 0."
        )
    return w.detach().double().cpu(), x.detach().double().cpu(), y.detach().double().cpu()
