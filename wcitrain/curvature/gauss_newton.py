"""The trace of the Gauss–Newton matrix of cross-entropy, layer by layer, from one backward pass.

Legend: N examples, C classes, z logits [N, C], p = softmax(z), J_nl = dz_n / dW_l, G_l the Gauss–Newton block of layer l.

The Hessian of cross-entropy in the logits is diag(p) − p pᵀ = S Sᵀ with S = diag(√p) − p √pᵀ. With independent signs
ε_n in {−1, +1}^C and u_n = S ε_n = √p·ε − p (√p·ε),

    t_l = Tr(G_l) = (1/N) Σ_n ||J_nlᵀ S_n||_F²  =  E (1/N) || Σ_n J_nlᵀ u_n ||²                                  (1)

The signs remove the terms between examples, so no per-example gradients are needed; the estimate is never negative. For
networks of piecewise linear units with normalisation in eval mode Tr(G_l) *is* the trace of the layer's Hessian block; with
GELU, SiLU or train-mode normalisation it is only its positive part. Labels do not enter. Cost: one forward, one backward.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from wcitrain.params import wide


def gauss_newton_trace(
    logits: Tensor, layers: Mapping[str, Tensor], *, generator: torch.Generator | None = None
) -> Tensor:
    """Return one unbiased draw of ``Tr(G_l)`` of the *mean* cross-entropy, equation (1).

    Args:
        logits: [N, C] with the graph back to the layers; examples must not interact (eval-mode normalisation).
        layers: Tensors by name; one that the logits do not depend on gets zero.
        generator: Source of the signs; on any device.

    Returns:
        Estimates [L] in float64 (float32 on MPS), in the order of ``layers``, without graph. Average several draws.
    """
    device = generator.device if generator is not None else logits.device
    p = logits.detach().float().softmax(-1)
    eps = torch.randint(0, 2, p.shape, generator=generator, device=device).to(p) * 2 - 1
    u = p.sqrt() * eps - p * (p.sqrt() * eps).sum(-1, keepdim=True)
    gradients = torch.autograd.grad(logits, list(layers.values()), u.to(logits.dtype), allow_unused=True)
    zero = wide(torch.zeros((), device=logits.device))
    return torch.stack([zero if g is None else wide(g).square().sum() for g in gradients]) / len(logits)
