"""Pieces that several losses are made of: targets, divergences, input gradients that can be differentiated in the weights.

Legend: B batch, C classes, z logits [B, C], p = softmax(z), q = softmax(z'), y class indices [B] or soft targets [B, C].
Everything is computed in float32 at least, whatever autocast made of the logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.attacks.losses import attack_loss, precise
from wcitrain.curvature.loss import Loss, Output, cross_entropy
from wcitrain.preserve import full_precision

TINY = 1e-30  # floor of a squared norm under a root; far below the square of any gradient that matters


def class_loss(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Return the mean cross-entropy, for classes [B] or soft targets [B, C] of any floating dtype."""
    logits = precise(logits)
    return cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y, label_smoothing=label_smoothing)


def soft_targets(y: Tensor, logits: Tensor) -> Tensor:
    """Return the targets as probabilities [B, C] in the dtype of ``logits``."""
    return (y if y.ndim == logits.ndim else F.one_hot(y, logits.shape[1])).to(logits.dtype)


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_c p_c (log p_c − log q_c) for every example [B]; differentiable in both."""
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def kl_output(logits: Tensor, other: Tensor, weight: float | Tensor) -> Output:
    """Return what Gauss–Newton sees of ``weight`` · KL(p ‖ q), both branches differentiated: 2 weight ‖√q − √p‖².

    The two agree to second order in q − p. The Hessian of the KL in the joint logits (z, z') is indefinite; that of the right
    hand side, without the curvature of the square roots, is positive semi-definite, has the blocks diag(p) − p pᵀ and
    diag(q) − q qᵀ on the diagonal, as the KL has where p = q, and together they vanish where the two networks' outputs move as
    one. With the branch of z' alone they would not: that is the Hessian of another loss, which stops the gradient at p.
    """
    root, other_root = (logits.log_softmax(1) / 2).exp(), (other.log_softmax(1) / 2).exp()
    return Output(other_root - root, "mse", 2 * weight)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of every example [B]."""
    return (left * right).flatten(1).sum(1)


def norm(x: Tensor) -> Tensor:
    """Return the l2 norm of every example [B]; its derivative at zero is zero, not NaN."""
    return dot(x, x).clamp_min(TINY).sqrt()


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, *, create_graph: bool) -> Tensor:
    """Return ∇_x ℓ_n for every example [B, *dims], ℓ the cross-entropy: the gradient of the *sum* of the losses.

    In float32, with attention by its plain formula (fused kernels have no second derivatives), and in the mode the model is
    in; running statistics are left alone. Cost: one forward and one backward pass; with ``create_graph`` its derivative in the
    weights costs another backward.
    """
    with full_precision(model), statistics_left_alone(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = attack_loss("ce")(model(x), y)
        return torch.autograd.grad(losses.sum(), x, create_graph=create_graph)[0]


@contextmanager
def statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """Let the forward passes inside update copies of the buffers (running statistics) instead of the buffers.

    ``preserve.kept_buffers`` would write to the buffers afterwards, and autograd refuses to go back through a graph whose
    saved buffers were written to.
    """
    own = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name, buffer in own:
        module._buffers[name] = buffer.detach().clone()
    try:
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer
