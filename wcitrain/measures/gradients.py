"""How steep the loss is: in the weights, in the images, and how fast its slope in the images turns.

Legend: N examples, ℓ_n(x) loss of example n as a function of its image, g = ∇_W (1/N) Σ_n ℓ_n, h a step.

    gradient norm         ||g||,   with     stderr ≈ stderr of mean_k ⟨g, g_k⟩ / ||g||   over chunks k     (1)
    input gradient norm   (1/N) Σ_n ||∇_x ℓ_n||_*                                                          (2)
    input curvature       (1/N) Σ_n ||∇_x ℓ_n(x_n + h z_n) − ∇_x ℓ_n(x_n)||_2 / h                          (3)
                          → (1/N) Σ_n ||∇²_x ℓ_n z_n||_2   as h → 0                                        (4)

With a threat model all of them are taken at adversarial images that are held fixed (Danskin). (3) is the
quantity that CURE penalises (Moosavi-Dezfooli et al., arXiv 1811.09716, section 3.2), with its z_n = sign ∇_x
ℓ_n / ||sign ∇_x ℓ_n||_2. The paper squares the norm and does not divide by h; the published code does
neither, takes h up to 3, and the gradient of the *mean* loss, N times smaller.
"""

import math
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.attacks.ascent import input_gradient
from wcitrain.measures.means import chunk_mean_and_error, count_examples, example_losses, mean_gradient
from wcitrain.measures.problem import Measure, Problem, Taken
from wcitrain.method import Positive, Text, method
from wcitrain.params import select_layers

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


@method
class LossGradientNorm(Measure):
    """Length ||∇_W R(W)|| of the gradient of the robust loss in the weights.

    The standard error is that of the projection on the gradient, over chunks (the delta method). It leaves
    out the bias: the norm of a noisy mean is too large. ``parts``: the norm of each layer's own gradient.
    """

    layers: Text = Field(default="all", description="Which tensors count, see params.select_layers.")
    name = "gradient_norm"
    source = "definition; as a predictor of generalisation in Jiang et al., arXiv 1912.02178"
    cost = "1 attack, 2 forward and backward passes"

    def take(self, problem: Problem) -> Taken:
        """Return (1)."""
        selected, chunks = select_layers(problem.model, self.layers), problem.adversarial()
        _, g = mean_gradient(problem.model, chunks, selected.tensors)
        squares = selected.dots(g, g)
        norm = float(squares.sum().sqrt())
        along = [0.0] * len(chunks)
        if norm:
            parts = (mean_gradient(problem.model, [chunk], selected.tensors)[1] for chunk in chunks)
            along = [float(selected.dots(g, part).sum()) / norm for part in parts]
        value = norm, chunk_mean_and_error(along, chunks)[1], count_examples(chunks)
        by_layer = dict(zip(selected, squares.sqrt().tolist(), strict=True))
        return value, f"layers {self.layers}, {problem.attack_text}", by_layer


@method
class InputGradientNorm(Measure):
    """Mean length of the gradient of each example's loss in its image.

    eps times it is what the loss can rise by to first order. ``parts``: all three norms. The standard error
    is over examples.
    """

    norm: Literal["l1", "l2", "linf"] | None = Field(
        default=None, description="Of the gradient; null: the dual of the threat's, l2 without a threat."
    )
    name = "input_gradient_norm"
    source = "definition; first-order term of the robust loss"
    cost = "1 attack, 1 forward and backward pass"

    def take(self, problem: Problem) -> Taken:
        """Return (2) by example."""
        norm = self.norm or (DUAL[problem.threat.norm] if problem.threat else "l2")
        loss = partial(example_losses, problem.model)
        g = [input_gradient(partial(loss, y=y), x).flatten(1) for x, y in problem.adversarial()]
        lengths = {
            name: torch.cat([torch.linalg.vector_norm(part, order, dim=1) for part in g]).double().cpu()
            for name, order in ORDERS.items()
        }
        parts = {name: float(values.mean()) for name, values in lengths.items()}
        return lengths[norm], f"{norm}, {problem.attack_text}", parts


@method
class InputCurvature(Measure):
    """How fast the loss's slope in the image turns along it.

    On networks with kinks (ReLU) (3) also counts those that the step crosses, (4) never sees them. x + h z is
    not clipped to [0, 1], as in the published code. An example whose gradient is zero counts as zero. The
    standard error is over examples.
    """

    step: Positive | None = Field(
        default=1.5, description="h, an l2 length in pixel units; the paper's for CIFAR-10. null: limit (4)."
    )
    name = "input_curvature"
    source = "Moosavi-Dezfooli et al., arXiv 1811.09716, section 3.2"
    cost = "1 attack, 2 forward and backward passes"

    def take(self, problem: Problem) -> Taken:
        """Return (3) or (4) by example."""
        turned = [self._turning(problem.model, x, y) for x, y in problem.adversarial()]
        length = "limit h -> 0" if self.step is None else f"h {self.step:g}"
        settings = f"{length}, along the sign, {problem.attack_text}"
        return torch.cat(turned).double().cpu(), settings, {}

    def _turning(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return (3) or (4) for every example [B]."""
        x = x.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            (g,) = torch.autograd.grad(example_losses(model, x, y).sum(), x, create_graph=self.step is None)
        z = g.detach().sign()
        lengths = z.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        z = torch.where(lengths > 0, z / lengths, 0.0)
        if self.step is None:
            turned = torch.autograd.grad(g, x, z)[0] if g.requires_grad else torch.zeros_like(x)
        else:
            there = input_gradient(partial(example_losses, model, y=y), x.detach() + self.step * z)
            turned = (there - g) / self.step
        return turned.flatten(1).norm(dim=1)
