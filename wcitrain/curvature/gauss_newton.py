"""The trace of the Gauss–Newton matrix, layer by layer: one backward pass, unbiased in value and in gradient.

Legend: N examples, C outputs, z logits [N, C], p = softmax(z), J_nl = dz_n / dW_l, S_n S_nᵀ the Hessian of
example n's loss in z_n (factors S in `loss`), w_n its weight, G_l the Gauss–Newton block of layer l.

With independent signs ε_n in {−1, +1}^C and u_n = √w_n S_n ε_n; for cross-entropy u_n = √p·ε − p (√p·ε),

    t_l = Tr(G_l) = (1/N) Σ_n w_n ||J_nlᵀ S_n||_F²  =  E (1/N) || Σ_n J_nlᵀ u_n ||²                        (1)

The signs remove the terms between examples, so examples may interact (BatchNorm in train mode). With p in the
graph the gradient of (1) is unbiased too; with sampled labels in place of signs (as in Sophia) it is not.
Several outputs share one backward pass, with independent signs.

For networks of piecewise linear units with normalisation in eval mode Tr(G_l) *is* the trace of the layer's
Hessian block; with GELU, SiLU or train-mode normalisation it is only its positive part. Targets do not enter.
Variance of one probe: about 2 ||G_l||_F², whatever N: several small batches tell more than one large one.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from wcitrain.curvature.estimator import Estimator, backward_with, twice_differentiable
from wcitrain.curvature.loss import Output, Outputs, outputs_of, refuse_wrong_derivatives
from wcitrain.curvature.passes import Passes, Step
from wcitrain.method import PositiveCount, method, setting
from wcitrain.params import Layers, precise
from wcitrain.preserve import naming_reentrant


@method
class GaussNewton(Estimator):
    """The trace of the Gauss–Newton blocks by random signs: unbiased, and never negative.

    Needs a loss that gives its outputs, and second derivatives for a penalty.
    """

    num_probes: PositiveCount = setting(1, "Independent sets of signs a batch.")
    label = "Gauss–Newton"
    source = "as in Sophia (Liu et al., arXiv 2305.14342), with signs in place of sampled labels"
    cost = "3 backward passes more a probe as a penalty, 1 to measure only"

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return draws of (1)."""
        loss = passes.evaluate()
        samples = gauss_newton_samples(loss, passes.layers, num_probes=num_probes, generator=generator)
        return samples, loss.total

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Differentiate the draws on the outputs of the one pass."""
        with twice_differentiable() if strength else nullcontext():
            loss, generator = passes.evaluate(), passes.generator("gauss_newton")
            draw = partial(gauss_newton_samples, num_probes=self.num_probes, generator=generator)
            traces = draw(loss, passes.layers, create_graph=strength > 0, retain_graph=True).mean(0)
            return backward_with(passes, loss.total, traces, shape, strength)

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return one backward a probe, three where it is differentiated."""
        return 0, (3 if is_active else 1) * self.num_probes


def gauss_newton_samples(
    outputs: Outputs,
    layers: Mapping[str, Tensor],
    *,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> Tensor:
    """Return independent unbiased draws of ``Tr(G_l)`` of the mean loss by (1), [K, L] in float64.

    ``outputs`` is a `Loss` with outputs, one or several `Output`, or bare logits [N, C] (cross-entropy); a
    layer that they do not depend on gets zero. The generator may be on any device. ``create_graph`` keeps the
    draws differentiable, ``retain_graph`` the graph of the logits for later.

    ValueError: no outputs; or ``create_graph`` and a second derivative that torch gets wrong.
    """
    terms, sized, samples = outputs_of(outputs, "gauss_newton"), Layers(layers), []
    logits = [term.logits for term in terms]
    if create_graph:
        for z in logits:
            refuse_wrong_derivatives(z)
    for probe in range(num_probes):
        cotangents = [_square_root_times_signs(term, generator, create_graph) for term in terms]
        keep = create_graph or retain_graph or probe + 1 < num_probes
        with naming_reentrant():
            gradients = torch.autograd.grad(
                logits, sized.tensors, cotangents, keep, create_graph=create_graph, allow_unused=True
            )
        samples.append(sized.squares(gradients))
    return torch.stack(samples)


def _square_root_times_signs(term: Output, generator: torch.Generator | None, create_graph: bool) -> Tensor:
    """Return u / √N [N, C] of equation (1) for one output, N its own number of examples."""
    z = precise(term.logits if create_graph else term.logits.detach())
    device = generator.device if generator is not None else z.device
    eps = (torch.randint(0, 2, z.shape, generator=generator, device=device) * 2 - 1).to(z)
    if term.kind == "cross_entropy":
        p = z.softmax(-1)
        root = (z.log_softmax(-1) / 2).exp()  # √p, differentiable where p underflows
        u = root * eps - p * (root * eps).sum(-1, keepdim=True)
    elif term.kind == "bce":
        u = ((logsigmoid(z) + logsigmoid(-z)) / 2).exp() * eps
    else:
        u = 2**0.5 * eps
    weight = term.weight
    if isinstance(weight, Tensor):
        u = weight.to(u).sqrt().reshape(-1, 1) * u
    elif weight != 1:
        u = weight**0.5 * u
    return (u / len(z) ** 0.5).to(term.logits.dtype)
