"""The largest eigenvalues of the Hessian of the robust (or clean) loss, by Lanczos, with the error of each.

Legend: N examples, K chunks, n_k examples of chunk k, P parameters, H = Σ_k (n_k/N) H_k Hessian of the mean
loss over all N examples in all selected tensors together, λ an eigenvalue, v its vector of length one.

    ||H v − λ v|| = r   ⟹   H has an eigenvalue in [λ − r, λ + r]                     (H symmetric)        (1)
    λ = vᵀ H v = Σ_k (n_k/N) vᵀ H_k v,     stderr(λ) ≈ that of a mean of K chunks                          (2)

(1) is the numerical error, rigorous up to rounding; (2) the error of the examples as a sample, to first order
(v moves at second order). The maximum over v of a noisy mean is biased upwards, which (2) leaves out: few
examples look sharp.

Adversarial examples are found once and held fixed (Danskin). Batch sums: H weighs every example equally. The
code of Stutz et al. (ICCV 2021) *sums* the Hessians of the mean losses of its batches, so its λ_max of 4
batches is about 4 times this one; it takes the clean loss, tensors of two or more dimensions
(``layers="weights"`` here) and 500 test examples.

Cost of one product with H: a forward and a backward with graph of every example, one backward through both.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.attacks import ThreatModel
from wcitrain.curvature.hvp import hvp
from wcitrain.measures.adversarial import Chunks, attack_text, attacked, example_losses, held, measuring
from wcitrain.measures.chunk_sums import chunk_mean_and_error, count_examples, sizes
from wcitrain.measures.measurement import Measurement
from wcitrain.params import select_layers, unwrapped
from wcitrain.seeding import generator_from

WHICH = ("LA", "LM", "SA")
Vector = NDArray[np.float64]


def hessian_spectrum(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    k: int = 5,
    layers: str = "all",
    which: str = "LA",
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure k eigenvalues at one end of the spectrum of the Hessian, by ARPACK's restarted Lanczos method.

    Where P <= 20 or P <= k + 1 it is the dense matrix, at no more cost. Attention takes its plain formula.

    Args:
        model: Gives logits [N, C] for images in [0, 1].
        data: Iterable of (x, y, ...).
        threat: The adversary; None measures the clean loss.
        num_examples: How many, by default all.
        k: Number of eigenvalues, >= 1; no more than P are returned.
        layers: Which tensors, all together as one vector, see ``params.select_layers``.
        which: ``"LA"`` the largest, ``"SA"`` the smallest (most negative), ``"LM"`` the largest in size.
        tolerance: Of ARPACK, relative to the eigenvalue, > 0; float32 models cannot go below some 1e-6.
        max_iterations: Restarts of ARPACK, each about ``max(k + 1, 20 - k)`` products.
        num_steps, step_size, num_restarts: Of PGD; the step is 2.5 eps / num_steps by default.
        chunk_size: Examples at once; chunks of any size give the same H where the images are the same.
        seed: Of the attack's starts and of Lanczos' first vector.

    Returns:
        The first eigenvalue, with the error (2) over chunks (NaN for a single one). ``parts``:
        ``eigenvalue_1``, ... in the order of ``which``, and ``residual_1``, ..., the r of (1).

    Raises:
        ValueError: An argument out of range; an operation whose second derivative torch gets wrong; a Hessian
            that is not finite.
        RuntimeError: No convergence.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> list(hessian_spectrum(model, [(x, y)], None, k=2).parts)
    ['eigenvalue_1', 'residual_1', 'eigenvalue_2', 'residual_2']
    """
    if which not in WHICH:
        raise ValueError(
            f"hessian_spectrum.which: got {which!r}; expected one of {', '.join(WHICH)}. Choose one of them."
        )
    if k < 1 or max_iterations < 1 or not 0 < tolerance < 1:
        raise ValueError(
            f"hessian_spectrum: got k={k}, max_iterations={max_iterations}, tolerance={tolerance}; expected "
            "counts of at least 1 and a tolerance in (0, 1). Correct them."
        )
    model = unwrapped(model)
    with measuring(model):
        tensors = select_layers(model, layers).tensors
        chunks = attacked(
            model,
            held(model, data, num_examples, chunk_size),
            threat,
            num_steps=num_steps,
            step_size=step_size,
            num_restarts=num_restarts,
            seed=seed,
        )
        num = sum(t.numel() for t in tensors)
        first = torch.randn(
            num, generator=generator_from("cpu", seed, "hessian_spectrum"), dtype=torch.float64
        ).numpy()
        λ, vectors = _eigenpairs(
            lambda v: _product(model, chunks, tensors, v)[0],
            first,
            min(k, num),
            which,
            tolerance,
            max_iterations,
        )
        parts: dict[str, float] = {}
        stderr = math.nan
        for i, (value, v) in enumerate(zip(λ, vectors.T, strict=True), 1):
            Hv, forms = _product(model, chunks, tensors, v)
            parts |= {f"eigenvalue_{i}": float(value), f"residual_{i}": float(np.linalg.norm(Hv - value * v))}
            if i == 1:
                _, stderr = chunk_mean_and_error(forms, sizes(chunks))
    settings = (
        f"{which}, layers {layers}, residual {parts['residual_1']:.1e}, "
        f"{attack_text(threat, num_steps, num_restarts)}"
    )
    return Measurement("hessian_spectrum", float(λ[0]), stderr, count_examples(chunks), settings, parts)


def lambda_max(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    layers: str = "all",
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure the largest eigenvalue of the Hessian: ``hessian_spectrum`` with ``k=1`` and ``which="LA"``.

    It is *not* invariant under rescaling: weights before a normalisation times c divide their block by c².

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> lambda_max(model, [(x, y)], ThreatModel(eps=0.1)).value > 0
    True
    """
    found = hessian_spectrum(
        model,
        data,
        threat,
        num_examples=num_examples,
        k=1,
        layers=layers,
        tolerance=tolerance,
        max_iterations=max_iterations,
        num_steps=num_steps,
        step_size=step_size,
        num_restarts=num_restarts,
        chunk_size=chunk_size,
        seed=seed,
    )
    return replace(found, name="lambda_max", parts={"residual": found.parts["residual_1"]})


def _eigenpairs(
    product: Callable[[Vector], Vector],
    first: Vector,
    k: int,
    which: str,
    tolerance: float,
    max_iterations: int,
) -> tuple[Vector, Vector]:
    """Return k eigenvalues [k] in the order of ``which`` and their vectors [P, k]."""
    num = len(first)
    image = product(first)
    if not np.isfinite(image).all():
        raise ValueError(
            "hessian_spectrum: got a Hessian that is not finite; expected numbers. Has the model diverged?"
        )
    if not image.any():  # no curvature at all: Lanczos' vectors would have length zero
        λ, vectors = np.zeros(k), np.eye(num, k)
    elif num <= max(20, k + 1):
        H = np.stack([product(row) for row in np.eye(num)])
        λ, vectors = np.linalg.eigh((H + H.T) / 2)
    else:
        operator = LinearOperator((num, num), matvec=lambda v: product(v.ravel()), dtype=np.float64)
        try:
            λ, vectors = eigsh(operator, k, which=which, v0=first, tol=tolerance, maxiter=max_iterations)
        except ArpackNoConvergence as error:
            raise RuntimeError(
                f"hessian_spectrum: got {len(error.eigenvalues)} of {k} eigenvalues to {tolerance:g} after "
                f"{max_iterations} iterations; expected all. Raise max_iterations or tolerance."
            ) from error
    key = {"LA": -λ, "LM": -np.abs(λ), "SA": λ}[which]
    order = np.argsort(key, kind="stable")[:k]
    return λ[order], vectors[:, order]


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
