"""First and second derivatives of the robust (or clean) loss, in the weights and in the images.

Legend: N examples, K chunks, n_k examples of chunk k; ℓ_n(x) loss of example n as a function of its image, g
gradient and H Hessian of R = (1/N) Σ_n ℓ_n in all selected tensors together, g_k and H_k those of chunk k; h
a step, λ an eigenvalue of H, v its vector of length one; W [C, D] the last layer's weight, rows w_s, H_ss'
[D, D] the Hessian's blocks between rows, f_n [D] the layer's inputs, p softmax.

    gradient norm         ||g||,   with     stderr ≈ stderr of mean_k ⟨g, g_k⟩ / ||g||                     (1)
    input gradient norm   (1/N) Σ_n ||∇_x ℓ_n||_*                                                          (2)
    input curvature       (1/N) Σ_n ||∇_x ℓ_n(x_n + h z_n) − ∇_x ℓ_n(x_n)||_2 / h                          (3)
                          → (1/N) Σ_n ||∇²_x ℓ_n z_n||_2   as h → 0

(3) is the quantity that CURE penalises (Moosavi-Dezfooli et al., arXiv 1811.09716, section 3.2), with its z_n
= sign ∇_x ℓ_n / ||sign ∇_x ℓ_n||_2. The paper squares the norm and does not divide by h; the published code
does neither, takes h up to 3, and the gradient of the *mean* loss, N times smaller.

    ||H v − λ v|| = r   ⟹   H has an eigenvalue in [λ − r, λ + r]                     (H symmetric)        (4)
    λ = vᵀ H v = Σ_k (n_k/N) vᵀ H_k v,     stderr(λ) ≈ that of a mean of K chunks                          (5)

(4) is the numerical error, rigorous up to rounding; (5) that of the examples as a sample, to first order. The
maximum over v of a noisy mean is biased upwards, which (5) leaves out: few examples look sharp. The code
of Stutz et al. (ICCV 2021) *sums* the Hessians of its batches' mean losses: of 4 batches 4 times this λ_max.

    κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr(H_ss') = (1/N) Σ_n ||f_n||² [ Σ_s p_s ||w_s||² − ||Wᵀ p||² ]              (6)

(6) is exact for cross-entropy of outputs that are linear in W, without any Hessian, and does not change when
scale moves between layers. Adversarial examples are found once and held fixed (Danskin).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wcitrain.attacks.ascent import input_gradient
from wcitrain.curvature.estimator import twice_differentiable
from wcitrain.curvature.loss import Output, gradients_with_graph, hvp
from wcitrain.curvature.top_layer import features_of, find_head, head_calls
from wcitrain.measures import means
from wcitrain.measures.means import Chunks, chunk_mean_and_error, count_examples, example_losses
from wcitrain.measures.problem import Measure, Problem, Taken, attack_text
from wcitrain.method import InnerShare, Positive, PositiveCount, Text, method, setting
from wcitrain.params import logits_of, select_layers, wide
from wcitrain.seeding import generator_from

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
MAX_RESTARTS = 100  # of ARPACK, each of about 20 products

Vector = NDArray[np.float64]


@method
class LossGradientNorm(Measure):
    """Length ||∇_W R(W)|| of the gradient of the robust loss in the weights.

    The standard error is that of the projection on the gradient, over chunks (the delta method). It leaves
    out the bias: the norm of a noisy mean is too large. ``parts``: the norm of each layer's own gradient.
    """

    layers: Text = setting("all", "Which tensors count, see params.select_layers.")
    name = "gradient_norm"
    source = "definition; as a predictor of generalisation in Jiang et al., arXiv 1912.02178"
    cost = "1 attack, 2 forward and backward passes"

    def take(self, problem: Problem) -> Taken:
        """Return (1)."""
        selected, chunks = select_layers(problem.model, self.layers), problem.adversarial()
        _, g = means.mean_gradient(problem.model, chunks, selected.tensors)
        squares = selected.dots(g, g)
        norm = float(squares.sum().sqrt())
        along = [0.0] * len(chunks)
        if norm:
            parts = (means.mean_gradient(problem.model, [chunk], selected.tensors)[1] for chunk in chunks)
            along = [float(selected.dots(g, part).sum()) / norm for part in parts]
        value = norm, chunk_mean_and_error(along, chunks)[1], count_examples(chunks)
        by_layer = dict(zip(selected, squares.sqrt().tolist(), strict=True))
        return value, f"layers {self.layers}, {attack_text(problem.attack)}", by_layer


@method
class InputGradientNorm(Measure):
    """Mean length of the gradient of each example's loss in its image.

    The norm is the dual of the threat's (l2 without one): eps times it is what the loss can rise by to first
    order. ``parts``: all three norms. The standard error is over examples.
    """

    name = "input_gradient_norm"
    source = "definition; first-order term of the robust loss"
    cost = "1 attack, 1 forward and backward pass"

    def take(self, problem: Problem) -> Taken:
        """Return (2) by example."""
        norm = DUAL[problem.attack.threat.norm] if problem.attack else "l2"
        g = [_input_gradient(problem, x, y).flatten(1) for x, y in problem.adversarial()]
        lengths = {
            name: torch.cat([torch.linalg.vector_norm(part, order, dim=1) for part in g]).double().cpu()
            for name, order in ORDERS.items()
        }
        parts = {name: float(values.mean()) for name, values in lengths.items()}
        return lengths[norm], f"{norm}, {attack_text(problem.attack)}", parts


@method
class InputCurvature(Measure):
    """How fast the loss's slope in the image turns along it.

    On networks with kinks (ReLU) (3) also counts those that the step crosses. x + h z is not clipped, as in
    the published code. An example without gradient counts as zero. The standard error is over examples.
    """

    step: Positive = setting(1.5, "h, an l2 length in pixel units; the paper's for CIFAR-10.")
    name = "input_curvature"
    source = "Moosavi-Dezfooli et al., arXiv 1811.09716, section 3.2"
    cost = "1 attack, 2 forward and backward passes"

    def take(self, problem: Problem) -> Taken:
        """Return (3) by example."""
        turned = []
        for x, y in problem.adversarial():
            g = _input_gradient(problem, x, y)
            z = g.sign()
            lengths = z.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
            z = torch.where(lengths > 0, z / lengths, 0.0)
            there = _input_gradient(problem, x + self.step * z, y)
            turned.append(((there - g) / self.step).flatten(1).norm(dim=1))
        settings = f"h {self.step:g}, along the sign, {attack_text(problem.attack)}"
        return torch.cat(turned).double().cpu(), settings, {}


def _input_gradient(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each example's loss in its image."""
    return input_gradient(partial(example_losses, problem.model, y=y), x)


@method
class LambdaMax(Measure):
    """Largest eigenvalue of the Hessian of the loss, by ARPACK's restarted Lanczos method.

    It is *not* invariant under rescaling: weights before a normalisation times c divide their block by c².
    The standard error is (5) over chunks (NaN for a single one). ``parts``: ``residual``, the r of (4).

    Of at most 20 parameters the matrix is formed, at no more cost. Attention takes its plain formula. An
    operation whose second derivative torch gets wrong, and a Hessian that is not finite, are refused.
    """

    layers: Text = setting("all", "Which tensors, together as one vector, see params.select_layers.")
    tolerance: InnerShare = setting(1e-4, "Of ARPACK, relative; float32 models cannot go below some 1e-6.")
    name = "lambda_max"
    source = "definition; Lehoucq, Sorensen & Yang, ARPACK Users' Guide, SIAM 1998"
    cost = "1 attack, some 20 to 100 products with the Hessian of 1 forward, 2 backward passes"

    def take(self, problem: Problem) -> Taken:
        """Return λ."""
        tensors, chunks = select_layers(problem.model, self.layers).tensors, problem.adversarial()
        means.mean_gradient(problem.model, chunks[:1], tensors)  # refuses layers whose gradient is hidden
        generator = generator_from("cpu", problem.seed, "hessian_spectrum")
        first = torch.randn(sum(t.numel() for t in tensors), generator=generator, dtype=torch.float64).numpy()
        product = partial(_product, problem.model, chunks, tensors)
        λ, v = self._largest(lambda u: product(u)[0], first)
        Hv, forms = product(v)
        residual = float(np.linalg.norm(Hv - λ * v))
        value = λ, chunk_mean_and_error(forms, chunks)[1], count_examples(chunks)
        settings = f"LA, layers {self.layers}, residual {residual:.1e}, {attack_text(problem.attack)}"
        return value, settings, {"residual": residual}

    def _largest(self, product: Callable[[Vector], Vector], first: Vector) -> tuple[float, Vector]:
        """Return the largest eigenvalue and its vector."""
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
        try:
            λ, vectors = eigsh(operator, 1, which="LA", v0=first, tol=self.tolerance, maxiter=MAX_RESTARTS)
        except ArpackNoConvergence as error:
            rule = f"expected one after {MAX_RESTARTS} restarts. Raise the tolerance."
            raise RuntimeError(f"lambda_max: got no eigenvalue to {self.tolerance:g}; {rule}") from error
        return float(λ[0]), vectors[:, 0]


def _product(
    model: nn.Module, chunks: Chunks, tensors: Sequence[Tensor], v: Vector
) -> tuple[Vector, list[float]]:
    """Return H v, and vᵀ H_k v for every chunk."""
    parts = torch.from_numpy(np.ascontiguousarray(v)).to(tensors[0]).split([t.numel() for t in tensors])
    vectors = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    total, forms = np.zeros_like(v), []
    for x, y in chunks:
        with twice_differentiable():
            loss = example_losses(model, x, y).mean()
            products = hvp(gradients_with_graph(loss, tensors), tensors, vectors)
        Hv = torch.cat([t.flatten() for t in products]).double().cpu().numpy()
        total += len(y) / count_examples(chunks) * Hv
        forms.append(float(v @ Hv))
    return total, forms


@method
class RelativeFlatness(Measure):
    """Relative flatness κ of the last layer: curvature weighted by products of its rows.

    By the closed form (6); a head that is no ``nn.Linear`` or whose outputs are not the model's is refused.
    The standard error is over examples. ``parts``: the layer's name.
    """

    chunk_size: PositiveCount = setting(25, "Examples at once.")
    name = "relative_flatness"
    source = "Petzka et al., arXiv 2001.00939, definition 3"
    cost = "1 attack, 1 forward pass"

    def take(self, problem: Problem) -> Taken:
        """Return (6) by example."""
        (name, head), terms = find_head(problem.model), []  # raises before the attack
        W = wide(head.weight.detach())
        for x, _ in problem.adversarial(self.chunk_size):
            with torch.no_grad(), head_calls(problem.model) as calls:
                logits = logits_of(problem.model(x))
            f = features_of(Output(logits), calls)
            p = wide(logits).softmax(1)
            spread = p @ W.square().sum(1) - (p @ W).square().sum(1)
            terms.append((wide(f).square().sum(1) * spread).double().cpu())
        values = torch.cat(terms)
        parts = {f"{name}.weight".lstrip("."): float(values.mean())}  # the model may be the layer
        return values, f"layers head, closed form, {attack_text(problem.attack)}", parts
