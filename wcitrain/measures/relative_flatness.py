"""Relative flatness of a layer: curvature weighted by products of its rows, blind to scale between layers.

Legend: W [C, D] a layer's weight, rows w_s; H_ss' [D, D] blocks of the Hessian of the mean loss between rows
s and s'; h [N, D] features entering the last layer, p softmax of its outputs; Z random signs; L Lᵀ = W Wᵀ.

    κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr(H_ss')                                                                     (1)

Cross-entropy at the last layer, exact without any Hessian, where z is linear in W:

    κ = (1/N) Σ_n ||h_n||² [ Σ_s p_s ||w_s||² − ||Wᵀ p||² ]                                                (2)

Any linear layer, by random signs Z [r, D] (r = min(C, D)); never negative where H is positive semidefinite:

    κ = E ⟨U, H U⟩,   U = L Z                                                                              (3)

since the covariance of U is (W Wᵀ) ⊗ I. L is the triangular factor of Wᵀ = Q Lᵀ. Convolutions count as
matrices [out, in·k·k], an extension of ours. The bias does not enter. The code of FAM (a regulariser) has
||W|| Tr(H) in place of (1).
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.curvature.hvp import gradients_with_graph, hvp, signs
from wcitrain.curvature.top_layer import HeadFeatures
from wcitrain.measures.means import chunk_mean_and_error, count_examples, example_losses
from wcitrain.measures.problem import Measure, Problem, Taken
from wcitrain.method import PositiveCount, Text, method
from wcitrain.params import Layers, select_layers, wide
from wcitrain.seeding import generator_from


@method
class RelativeFlatness(Measure):
    """Relative flatness κ of the last layer exactly, or of any layers by random probes.

    The sum of κ over the layers, ``parts``: each layer's. The standard error is over examples for the head;
    otherwise over chunks (NaN for a single one). Adversarial examples are held fixed (Danskin).
    """

    layers: Text = Field(
        default="head", description="head: the last nn.Linear by (2); else matrices of select_layers by (3)."
    )
    num_probes: PositiveCount = Field(default=8, description="Probes a chunk and layer; the head needs none.")
    chunk_size: PositiveCount = Field(
        default=25, description="Examples at once; with probes, chunks are the samples of the error."
    )
    name = "relative_flatness"
    source = "Petzka et al., arXiv 2001.00939, definition 3"
    cost = "1 attack, 1 forward pass; with probes a Hessian product a probe and layer"

    def take(self, problem: Problem) -> Taken:
        """Return (1). A head whose outputs are not the model's and layers of one dimension are refused."""
        if self.layers == "head":
            name = HeadFeatures(problem.model).name  # raises before the attack
            terms = [_head_terms(problem.model, x) for x, _ in problem.adversarial(self.chunk_size)]
            values = torch.cat(terms)
            parts = {f"{name}.weight".lstrip("."): float(values.mean())}  # the model may be the layer
            return values, f"layers head, closed form, {problem.attack_text}", parts
        layers = select_layers(problem.model, self.layers)
        if flat := [name for name, t in layers.items() if t.ndim < 2]:
            rule = (
                "expected weight matrices. Use 'weights', or a glob such as '*weight' without normalisation."
            )
            raise ValueError(
                f"relative_flatness.layers: got {flat[0]} (+{len(flat) - 1}) of one dimension; {rule}"
            )
        chunks = problem.adversarial(self.chunk_size)
        generator = generator_from(layers.tensors[0].device, problem.seed, "relative_flatness")
        rows = torch.stack([self._chunk(problem.model, x, y, layers, generator) for x, y in chunks])  # [K, L]
        columns = zip(layers, rows.unbind(1), strict=True)
        parts = {name: chunk_mean_and_error(column, chunks)[0] for name, column in columns}
        value = *chunk_mean_and_error(rows.sum(1), chunks), count_examples(chunks)
        settings = f"layers {self.layers}, {self.num_probes} probes a chunk, {problem.attack_text}"
        return value, settings, parts

    def _chunk(
        self, model: nn.Module, x: Tensor, y: Tensor, layers: Layers, generator: torch.Generator
    ) -> Tensor:
        """Return the mean of (3) over the probes on one chunk, a number a layer [L]."""
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            loss = example_losses(model, x, y).mean()
        values = []
        for tensor, gradient in zip(layers.tensors, gradients_with_graph(loss, layers.tensors), strict=True):
            W = tensor.detach().flatten(1)
            L = torch.linalg.qr(W.T, mode="r").R.T  # [C, r]
            draws = []
            for _ in range(self.num_probes):
                (Z,) = signs([W.new_empty(L.shape[1], W.shape[1])], generator)
                U = (L @ Z).reshape(tensor.shape)
                (HU,) = hvp([gradient], [tensor], [U])
                draws.append(wide(U * HU).sum())
            values.append(torch.stack(draws).mean())
        return torch.stack(values).cpu()


def _head_terms(model: nn.Module, x: Tensor) -> Tensor:
    """Return the terms of (2) [B]."""
    with torch.no_grad(), HeadFeatures(model) as head:
        logits = model(x)
        (h,) = head.features_of(logits)
        p, W = wide(logits).softmax(1), wide(head.head.weight)
        spread = p @ W.square().sum(1) - (p @ W).square().sum(1)
        return (wide(h).square().sum(1) * spread).double().cpu()
