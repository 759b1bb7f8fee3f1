"""Hutch++: traces with an error that falls faster than Hutchinson's, where a few directions hold most of the curvature.

Legend: n elements in all layers, m Hessian products, k = m/3; S, Q, G [n, k]; P = I − QQᵀ; ⟨·,·⟩_l the inner product over
layer l's elements alone.

Q = orth(HS), S random signs, spans directions of large curvature. They are summed exactly, and Hutchinson's estimator sees
only the rest. The identity H = QQᵀH + PHQQᵀ + PHP holds for every Q, so one sketch gives every layer's trace:

    t_l = Σ_k ⟨q_k, H q_k⟩_l + Σ_k ⟨q_k, P H q_k⟩_l + E ⟨g, P H P g⟩_l,    g random signs                        (1)

Given Q the first two sums are numbers: the estimate is unbiased for every Q, and its variance is the mean over Q of the
variance given Q. So the spread of the residual draws alone is a valid error.

For a positive semi-definite H the relative error falls as 1/m, not 1/√m: Meyer, Musco, Musco & Woodruff, arXiv 2010.09649,
for the whole trace; the split by layers is ours. The residual keeps the cross-layer terms of PHP in its variance.

For measurements only: memory for about n m numbers, and nothing is differentiable.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.hvp import gradients_with_graph, hvp
from wcitrain.curvature.loss import Loss
from wcitrain.curvature.probes import signs
from wcitrain.params import Layers


def hutchpp_samples(
    loss: Tensor | Loss,
    layers: Mapping[str, Tensor],
    *,
    num_matvecs: int = 30,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return draws of ``Tr(H_l)`` by equation (1) as a tensor [K, L], K = ``num_matvecs // 3``.

    All draws share one sketch: they are independent and unbiased given it, so ``TraceEstimate.from_samples`` gives the mean
    and a valid standard error, that of the residual.

    Cost: one backward with graph, then 3 K Hessian products.

    Args:
        loss: The scalar loss with its graph, which stays usable.
        layers: Tensors by name; one that the loss does not depend on gets zero.
        num_matvecs: m, at least 3; a multiple of 3 leaves none over, and 6 or more give an error bar.
        generator: Source of the signs; on any device.

    Returns:
        In float64 (float32 on MPS).

    Raises:
        ValueError: ``num_matvecs`` is below 3; or a derivative that PyTorch gets wrong (``hvp``).
    """
    if num_matvecs < 3:
        raise ValueError(
            f"num_matvecs: got {num_matvecs}; expected at least 3, best a multiple of 3. Use 6 or more for an error bar."
        )
    sized = Layers(layers)
    tensors = sized.tensors
    gradients = gradients_with_graph(loss, tensors)
    k = num_matvecs // 3

    def split(column: Tensor) -> list[Tensor]:
        parts = column.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def H(columns: Tensor) -> Tensor:
        return torch.stack([_flat(hvp(gradients, tensors, split(v))) for v in columns.unbind(1)], 1)

    def P(columns: Tensor) -> Tensor:
        return columns - Q @ (Q.T @ columns)

    def dots(left: Tensor, right: Tensor) -> Tensor:
        """Inner products of corresponding columns, layer by layer [k, L]."""
        pairs = zip(left.unbind(1), right.unbind(1), strict=True)
        return torch.stack([sized.dots(split(a), split(b)) for a, b in pairs])

    S, G = (torch.stack([_flat(signs(tensors, generator)) for _ in range(k)], 1) for _ in range(2))
    Q = torch.linalg.qr(H(S)).Q
    HQ = H(Q)
    return dots(Q, HQ + P(HQ)).sum(0) + dots(G, P(H(P(G))))


def hutchpp_trace(
    loss: Tensor | Loss,
    layers: Mapping[str, Tensor],
    *,
    num_matvecs: int = 30,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """Return the estimate of ``Tr(H_l)`` on one batch from ``num_matvecs`` products; see ``hutchpp_samples``."""
    return TraceEstimate.from_samples(hutchpp_samples(loss, layers, num_matvecs=num_matvecs, generator=generator))


def _flat(tensors: list[Tensor]) -> Tensor:
    """Return the tensors as one vector [n], at least in float32 (the factorisation knows no half precision)."""
    return torch.cat([t.flatten() if t.dtype.itemsize >= 4 else t.flatten().float() for t in tensors])
