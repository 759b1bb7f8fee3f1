"""Linear logistic regression, trained adversarially, in closed form (Yamada et al. 2021, arXiv 2102.02950).

Legend: N examples, d features, x [N, d], y in {−1, +1} [N], w [d], no bias; p the threat's norm, q its dual
(l2: 2, linf: 1); s = sigmoid(t) [N], ŵ = w / ‖w‖, K random draws or directions.

The worst example of the loss softplus(−y w·x) in the ball of radius ε is known, so the robust loss is a
function of w alone:

    L(w) = mean softplus(t),   t = −y w·x + ε ‖w‖_q                                                        (1)
    x_a = x − ε y ŵ  (l2),   x − ε y sign(w)  (linf);   x for w = 0, where all are equal                   (2)
    ∇L = mean −s y x_a                                                                                     (3)
    ∇²L = F + R,   F = mean s (1 − s) x_a x_aᵀ,   R = mean s · (ε / ‖w‖) (I − ŵ ŵᵀ)  (l2),   0  (linf)     (4)
    WCI = sqrt( ‖w‖² Tr ∇²L )                                                                              (5)

F is the Hessian at adversarial examples held fixed, which an autograd index at stored examples sees; R is how
the attack follows the weights. Under linf, (4) holds where no weight is zero: at w_i = 0 the loss has a kink,
whose curvature no Hessian shows (the normalised rise does), and sign(0) = 0.

Weight decay in ``fit`` is (λ/2) ‖w‖², without which separable data have no minimiser. The curvature is that
of L alone.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wcitrain.seeding import generator_from

TOLERANCE = 1e-7  # where L-BFGS stops, on the largest coordinate of the (projected) gradient


@dataclass(frozen=True)
class LogisticCurvature:
    """Curvature of the robust loss at w by (4) and (5)."""

    loss: float
    weight_norm: float
    lambda_max: float  # the largest eigenvalue of ∇²L
    trace: float
    fixed_trace: float  # of F alone
    wci: float


@dataclass(frozen=True, eq=False)
class RobustLogistic:
    """The robust logistic loss (1) of fixed examples, in float64 on the CPU.

    Args:
        x: Examples [N, d].
        y: Labels −1 and +1 [N].
        eps: Radius of the threat in the units of ``x``, >= 0.
        norm: Of the threat.

    Raises:
        ValueError: ``eps`` or ``norm`` is out of range, shapes or labels do not fit.

    >>> problem = RobustLogistic(torch.ones(1, 2), torch.ones(1), eps=0.5)
    >>> f"{problem.loss(torch.tensor([3.0, 4.0]).double()):.10f}"
    '0.0110477448'
    """

    x: Tensor
    y: Tensor
    eps: float = 0.0
    norm: Literal["l2", "linf"] = "l2"

    def __post_init__(self) -> None:
        x, y = self.x.detach().double().cpu(), self.y.detach().double().cpu()
        if x.ndim != 2 or not len(x) or y.shape != x.shape[:1]:
            raise ValueError(
                f"logistic: got x {tuple(x.shape)}, y {tuple(y.shape)}; expected [N, d], [N]. Flatten images."
            )
        if not bool((y.abs() == 1).all()):
            raise ValueError(f"logistic: got labels {y.unique()[:4].tolist()}; expected −1 and +1.")
        if self.norm not in ("l2", "linf") or not 0 <= self.eps < math.inf:
            got = f"norm={self.norm!r}, eps={self.eps}"
            raise ValueError(f"logistic: got {got}; expected 'l2' or 'linf' and a finite radius >= 0.")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def loss(self, w: Tensor) -> Tensor:
        """Return (1) at w [d] as a scalar, or at many weights [..., d] as [...]; differentiable."""
        return F.softplus(self._exponent(w)).mean(-1)

    def worst_examples(self, w: Tensor) -> Tensor:
        """Return the worst case x_a [N, d] of every example by (2)."""
        direction = w / _length(w) if self.norm == "l2" else w.sign()
        return self.x - self.eps * self.y[:, None] * direction

    def hessian(self, w: Tensor, *, fixed: bool = False) -> Tensor:
        """Return the Hessian (4) [d, d]; with ``fixed`` its part F, at examples held fixed."""
        t = self._exponent(w)
        s, x_a = t.sigmoid(), self.worst_examples(w)
        hessian = (x_a * (s * (-t).sigmoid())[:, None]).T @ x_a / len(x_a)
        if fixed or self.norm == "linf" or self.eps == 0:
            return hessian
        unit, rate = w / _length(w), s.mean() * self.eps / _length(w)
        return hessian + rate * (torch.eye(len(w), dtype=w.dtype) - unit[:, None] * unit)

    def curvature(self, w: Tensor) -> LogisticCurvature:
        """Return the curvature at w [d], float64, in O(N d² + d³); w = 0 is refused under l2 attack."""
        from scipy.linalg import eigh  # slow to import

        if self.eps > 0 and self.norm == "l2" and not w.any():
            raise ValueError("logistic: got w = 0, where ‖w‖ has no curvature; expected another. Lower eps.")
        H, length, last = self.hessian(w), float(w.norm()), len(w) - 1
        trace, fixed_trace = float(H.trace()), float(self.hessian(w, fixed=True).trace())
        largest = float(eigh(H.numpy(), eigvals_only=True, subset_by_index=(last, last))[0])
        wci = length * math.sqrt(max(trace, 0.0))
        return LogisticCurvature(float(self.loss(w)), length, largest, trace, fixed_trace, wci)

    def largest_eps(self) -> float:
        """Return the radius from which on w = 0 minimises the loss: ‖mean y x‖_p, where 0 ∈ ∂L(0)."""
        mean = (self.y[:, None] * self.x).mean(0)
        return float(mean.norm() if self.norm == "l2" else mean.abs().max())

    def fit(self, *, weight_decay: float = 1e-3, max_iterations: int = 20_000) -> Tensor:
        """Return the weights [d] that minimise L(w) + (λ/2) ‖w‖², found by full-batch L-BFGS-B.

        The problem is convex. Under linf it has kinks at w_i = 0: with w = u − v, u, v >= 0 and ‖w‖_1 = Σ (u
        + v) it is smooth in (u, v) and bounded below by zero, so weights that the attack makes useless are
        zero exactly. Line searches may end at up to a hundred times ``TOLERANCE``, which is still accepted.

        Raises:
            ValueError: ``weight_decay`` λ <= 0, or w = 0 is best at this ``eps`` (``largest_eps``).
            RuntimeError: The tolerance was not reached.
        """
        from scipy.optimize import minimize  # slow to import

        if not 0 < weight_decay < math.inf:
            raise ValueError(f"logistic: got weight_decay={weight_decay}; expected a number > 0. Take 1e-3.")
        if self.eps >= (limit := self.largest_eps()):
            raise ValueError(
                f"logistic: got eps={self.eps:g}; expected less than {limit:.4g}, from where on w = 0 is "
                "best. Take a smaller eps."
            )
        x, y, d, is_split = self.x, self.y, self.x.shape[1], self.norm == "linf" and self.eps > 0

        def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
            z = torch.from_numpy(v)
            w = z[:d] - z[d:] if is_split else z
            length = z.sum() if is_split else w.norm()
            t = -y * (x @ w) + self.eps * length
            s = t.sigmoid()
            slope, rise = -(s * y) @ x / len(x) + weight_decay * w, self.eps * s.mean()
            value = F.softplus(t).mean() + weight_decay / 2 * w.square().sum()
            # (3) in pieces: the data's part, and that of ε times the length.
            gradient = torch.cat([slope + rise, rise - slope]) if is_split else slope + rise * w / _length(w)
            return float(value), gradient.numpy()

        start = (y[:, None] * x).mean(0)
        start = start / start.norm()
        first = torch.cat([start.clamp_min(0), (-start).clamp_min(0)]) if is_split else start
        bounds = [(0, None)] * (2 * d) if is_split else None
        limits = {"maxiter": max_iterations, "maxfun": 2 * max_iterations}
        options = limits | {"maxcor": 30, "ftol": 0, "gtol": TOLERANCE}
        end = minimize(objective, first.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        # The projected gradient: a coordinate at its bound may only want to go further down.
        residual = np.where(end.x > 0, end.jac, np.minimum(end.jac, 0)) if is_split else end.jac
        if (largest := float(np.abs(residual).max())) > 100 * TOLERANCE:
            raise RuntimeError(
                f"logistic: got a gradient of {largest:.2g} after {end.nit} iterations; expected at most "
                f"{100 * TOLERANCE:g}. Raise max_iterations or the weight decay."
            )
        z = torch.from_numpy(end.x)
        return z[:d] - z[d:] if is_split else z

    def noisy(self, *, num_draws: int = 10, seed: int = 0) -> "RobustLogistic":
        """Return the loss without threat of K copies of every example with noise of norm ε, [K N, d].

        The control: training on it meets noise of the adversary's size without its direction. l2: uniform on
        the sphere. linf: independent signs times ε, the corners of the cube.
        """
        generator = generator_from("cpu", seed, "random noise", self.norm)
        noise = torch.randn(num_draws, *self.x.shape, generator=generator, dtype=self.x.dtype)
        noise = noise / noise.norm(dim=-1, keepdim=True) if self.norm == "l2" else noise.sign()
        x = (self.x + self.eps * noise).flatten(0, 1)
        return RobustLogistic(x, self.y.repeat(num_draws), 0.0, self.norm)

    def rise(
        self, w: Tensor, *, relative_size: float = 1.0, num_directions: int = 100, seed: int = 0
    ) -> float:
        """Return the mean over K directions of (L(w₊) + L(w₋))/2 − L(w), w± = w ± a ‖w‖ u/‖u‖, u ~ N(0, I).

        The landscape along normalised directions, its odd part removed. To second order it is a² ‖w‖² Tr(H) /
        (2 d) = a² WCI² / (2 d). The directions are the same for equal d and seed.
        """
        generator = generator_from("cpu", seed, "directions")
        u = torch.randn(num_directions, len(w), generator=generator, dtype=w.dtype)
        step = relative_size * w.norm() * u / u.norm(dim=1, keepdim=True)
        return float((self.loss(w + step) + self.loss(w - step)).mean() / 2 - self.loss(w[None])[0])

    def _exponent(self, w: Tensor) -> Tensor:
        """Return t [..., N] of (1)."""
        length = w.norm(dim=-1) if self.norm == "l2" else w.abs().sum(-1)
        return -self.y * (w @ self.x.T) + self.eps * length[..., None]


def _length(w: Tensor) -> Tensor:
    """Return ‖w‖, one where it is zero."""
    length = w.norm()
    return length if length > 0 else torch.ones_like(length)
