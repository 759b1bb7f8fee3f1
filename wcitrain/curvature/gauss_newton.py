"""The trace of the Gauss–Newton matrix, layer by layer: one backward pass, unbiased in value and in gradient.

Legend: N examples, C outputs, z logits [N, C], p = softmax(z), J_nl = dz_n / dW_l, H_n = S_n S_nᵀ the Hessian of example n's
loss in z_n (factors S in `loss`), w_n its weight, G_l the Gauss–Newton block of layer l.

With independent signs ε_n in {−1, +1}^C and u_n = √w_n S_n ε_n; for cross-entropy u_n = √p·ε − p (√p·ε),

    t_l = Tr(G_l) = (1/N) Σ_n w_n ||J_nlᵀ S_n||_F²  =  E (1/N) || Σ_n J_nlᵀ u_n ||²                              (1)

The signs remove the terms between examples, so no per-example gradients are needed, and examples may interact (BatchNorm
in train mode): (1) is then the trace for the loss of that batch. The estimate is never negative. Differentiated with p in the
graph its gradient is unbiased for that of t_l; with sampled labels in place of signs (as in Sophia) it would not be, because
their score-function term is lost. Several outputs (clean and adversarial logits,
also of different N) share one backward pass, with independent signs.

For networks of piecewise linear units with normalisation in eval mode Tr(G_l) *is* the trace of the layer's Hessian block;
with GELU, SiLU or train-mode normalisation it is only its positive part. Targets do not enter.

Cost of one probe: the forward pass that made the logits, and one backward; with ``create_graph`` one double backward on top.

Variance of one probe: about 2 ||G_l||_F² from pairs of examples, whatever N, plus a term of order 1/N. So several small
batches tell more than one large one with as many examples.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.hvp import refuse_wrong_derivatives
from wcitrain.curvature.loss import Loss, Output, outputs_of
from wcitrain.params import Layers


def gauss_newton_samples(
    outputs: Tensor | Output | Loss | Sequence[Output],
    layers: Mapping[str, Tensor],
    *,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> Tensor:
    """Return independent unbiased draws of ``Tr(G_l)`` of the mean loss, equation (1), as a tensor [K, L].

    Args:
        outputs: A `Loss` with outputs, one or several `Output`, or bare logits [N, C] (cross-entropy); with their graph.
        layers: Tensors by name; one that the logits do not depend on gets zero.
        num_probes: K, independent sets of signs.
        generator: Source of the signs; on any device.
        create_graph: Keep the result differentiable (needs second derivatives of every operation).
        retain_graph: Keep the graph of the logits for a later backward.

    Returns:
        In float64 (float32 on MPS).

    Raises:
        ValueError: No outputs; or ``create_graph`` through an operation whose second derivative torch gets wrong.
    """
    terms = outputs_of(outputs, "gauss_newton")
    if create_graph:
        for term in terms:
            refuse_wrong_derivatives(term.logits, 2)
    sized = Layers(layers)
    samples = []
    for probe in range(num_probes):
        cotangents = [_square_root_times_signs(term, generator, create_graph) for term in terms]
        gradients = torch.autograd.grad(
            [term.logits for term in terms],
            sized.tensors,
            cotangents,
            allow_unused=True,
            create_graph=create_graph,
            retain_graph=create_graph or retain_graph or probe + 1 < num_probes,
        )
        samples.append(sized.squares(gradients))
    return torch.stack(samples)


def gauss_newton_trace(
    outputs: Tensor | Output | Loss | Sequence[Output],
    layers: Mapping[str, Tensor],
    *,
    num_probes: int = 8,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> TraceEstimate:
    """Return the estimate of ``Tr(G_l)`` on one batch from ``num_probes`` draws; see ``gauss_newton_samples``.

    The standard error is that of the probes on this batch, not that of the batch as a sample of the data.

    >>> model = torch.nn.Linear(2, 3, bias=False)
    >>> t = gauss_newton_trace(model(torch.ones(4, 2)), dict(model.named_parameters()), num_probes=16)
    >>> bool(t.mean > 0), t.num_probes
    (True, 16)
    """
    return TraceEstimate.from_samples(
        gauss_newton_samples(
            outputs, layers, num_probes=num_probes, generator=generator, create_graph=create_graph, retain_graph=True
        )
    )


def _square_root_times_signs(term: Output, generator: torch.Generator | None, create_graph: bool) -> Tensor:
    """Return u / √N [N, C] of equation (1) for one output, N its own number of examples."""
    z = term.logits if create_graph else term.logits.detach()
    z = z if z.dtype == torch.float64 else z.float()
    device = generator.device if generator is not None else z.device
    eps = (torch.randint(0, 2, z.shape, generator=generator, device=device) * 2 - 1).to(z)
    if term.kind == "cross_entropy":
        p = z.softmax(-1)
        root = (z.log_softmax(-1) / 2).exp()  # √p, differentiable where p underflows
        u = root * eps - p * (root * eps).sum(-1, keepdim=True)
    elif term.kind == "bce":
        u = ((torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z)) / 2).exp() * eps
    elif term.kind == "mse":
        u = 2**0.5 * eps
    else:
        raise ValueError(f"Output.kind: got {term.kind!r}; expected cross_entropy, bce or mse. Choose one of them.")
    weight = term.weight
    if isinstance(weight, Tensor):
        u = weight.to(u).sqrt().reshape(-1, *[1] * (u.ndim - 1 if weight.ndim else 0)) * u
    elif weight != 1:
        u = weight**0.5 * u
    return (u / len(z) ** 0.5).to(term.logits.dtype)
