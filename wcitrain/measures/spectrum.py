"""The largest eigenvalue of the Hessian of the robust (or clean) loss, by Lanczos, with its error.

Legend: N examples, K chunks, n_k examples of chunk k, P parameters, H = Σ_k (n_k/N) H_k Hessian of the mean
loss over all N examples in all selected tensors together, λ an eigenvalue, v its vector of length one.

    ||H v − λ v|| = r   ⟹   H has an eigenvalue in [λ − r, λ + r]                     (H symmetric)        (1)
    λ = vᵀ H v = Σ_k (n_k/N) vᵀ H_k v,     stderr(λ) ≈ that of a mean of K chunks                          (2)

(1) is the numerical error, rigorous up to rounding; (2) the error of the examples as a sample, to first order
(v moves at second order). The maximum over v of a noisy mean is biased upwards, which (2) leaves out: few
examples look sharp.

Adversarial examples are found once and held fixed (Danskin). The code of Stutz et al. (ICCV 2021) *sums* the
Hessians of its batches' mean losses, so its λ_max of 4 batches is about 4 times this one; it takes the clean
loss, ``layers="weights"`` and 500 test examples.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.curvature.hvp import hvp
from wcitrain.measures.means import Chunks, chunk_mean_and_error, count_examples, example_losses
from wcitrain.measures.problem import Measure, Problem, Taken
from wcitrain.method import InnerShare, PositiveCount, Text, method
from wcitrain.params import select_layers
from wcitrain.seeding import generator_from

Vector = NDArray[np.float64]


@method
class LambdaMax(Measure):
    """Largest eigenvalue of the Hessian of the loss, by ARPACK's restarted Lanczos method.

    It is *not* invariant under rescaling: weights before a normalisation times c divide their block by c².
    The standard error is (2) over chunks (NaN for a single one). ``parts``: ``residual``, the r of (1).

    Where P <= 20 the matrix is formed, at no more cost. Attention takes its plain formula. An
    operation whose second derivative torch gets wrong, and a Hessian that is not finite, are refused.
    """

    layers: Text = Field(
        default="all", description="Which tensors, together as one vector, see params.select_layers."
    )
    tolerance: InnerShare = Field(
        default=1e-4, description="Of ARPACK, relative; float32 models cannot go below some 1e-6."
    )
    max_iterations: PositiveCount = Field(
        default=100, description="Restarts of ARPACK, each of about 20 products."
    )
    name = "lambda_max"
    source = "definition; Lehoucq, Sorensen & Yang, ARPACK Users' Guide, SIAM 1998"
    cost = "1 attack, some 20 to 100 products with the Hessian of 1 forward, 2 backward passes"

    def take(self, problem: Problem) -> Taken:
        """Return the eigenvalue."""
        tensors, chunks = select_layers(problem.model, self.layers).tensors, problem.adversarial()
        generator = generator_from("cpu", problem.seed, "hessian_spectrum")
        first = torch.randn(sum(t.numel() for t in tensors), generator=generator, dtype=torch.float64).numpy()
        product = partial(_product, problem.model, chunks, tensors)
        λ, v = self._largest(lambda u: product(u)[0], first)
        Hv, forms = product(v)
        residual = float(np.linalg.norm(Hv - λ * v))
        value = λ, chunk_mean_and_error(forms, chunks)[1], count_examples(chunks)
        settings = f"LA, layers {self.layers}, residual {residual:.1e}, {problem.attack_text}"
        return value, settings, {"residual": residual}

    def _largest(self, product: Callable[[Vector], Vector], first: Vector) -> tuple[float, Vector]:
        """Return the largest eigenvalue and its vector [P]."""
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

        num, image = len(first), product(first)
        if not np.isfinite(image).all():
            rule = "expected numbers. Has the model diverged?"
            raise ValueError(f"lambda_max: got a Hessian that is not finite; {rule}")
        if not image.any():  # no curvature at all: Lanczos' vectors would have length zero
            return 0.0, np.eye(1, num)[0]
        if num <= 20:
            H = np.stack([product(row) for row in np.eye(num)])
            λ, vectors = np.linalg.eigh((H + H.T) / 2)
            return float(λ[-1]), vectors[:, -1]
        operator = LinearOperator((num, num), matvec=lambda v: product(v.ravel()), dtype=np.float64)
        limits = {"tol": self.tolerance, "maxiter": self.max_iterations}
        try:
            λ, vectors = eigsh(operator, 1, which="LA", v0=first, **limits)
        except ArpackNoConvergence as error:
            got = f"got no eigenvalue to {self.tolerance:g} after {self.max_iterations} iterations"
            rule = "expected one. Raise max_iterations or tolerance."
            raise RuntimeError(f"lambda_max: {got}; {rule}") from error
        return float(λ[0]), vectors[:, 0]


def _product(
    model: nn.Module, chunks: Chunks, tensors: Sequence[Tensor], v: Vector
) -> tuple[Vector, list[float]]:
    """Return H v, and vᵀ H_k v for every chunk."""
    parts = torch.from_numpy(np.ascontiguousarray(v)).to(tensors[0]).split([t.numel() for t in tensors])
    vectors = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    total, forms = np.zeros_like(v), []
    for x, y in chunks:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            loss = example_losses(model, x, y).mean()
        Hv = torch.cat([t.flatten() for t in hvp(loss, tensors, vectors)]).double().cpu().numpy()
        total += len(y) / count_examples(chunks) * Hv
        forms.append(float(v @ Hv))
    return total, forms
