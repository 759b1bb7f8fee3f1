"""Pieces that several losses are made of: a weighted term, and input gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.attacks import ascent
from wcitrain.attacks.losses import ce
from wcitrain.curvature.loss import Loss, Output
from wcitrain.preserve import full_precision

TINY = 1e-30  # floor of a squared norm under a root; far below the square of any gradient that matters


def with_term(loss: Loss, weight: float, name: str, term: Tensor, *outputs: Output) -> Loss:
    """Return ``loss`` + weight · term; the term is logged without the weight and depends on ``outputs``."""
    parts = {**loss.parts, name: term.detach()}
    return Loss(loss.total + weight * term, parts, (*loss.outputs, *outputs))


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of every example [B]."""
    return (left * right).flatten(1).sum(1)


def norm(x: Tensor) -> Tensor:
    """Return the l2 norm of every example [B]; its derivative at zero is zero, not NaN."""
    return dot(x, x).clamp_min(TINY).sqrt()


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, *, create_graph: bool) -> Tensor:
    """Return ∇_x ℓ_n for every example [B, *dims], ℓ the cross-entropy: the gradient of the losses' *sum*.

    In float32, with attention by its plain formula; running statistics are left alone.
    """
    with full_precision(model), statistics_left_alone(model), sdpa_kernel(SDPBackend.MATH):
        return ascent.input_gradient(lambda images: ce(model(images), y), x, create_graph=create_graph)


@contextmanager
def statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """Let the forward passes inside update copies of the buffers (running statistics) instead of the buffers.

    Putting values back afterwards would write to them, and autograd refuses to go back through such a graph.
    """
    own = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name, buffer in own:
        module._buffers[name] = buffer.detach().clone()
    try:
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer
