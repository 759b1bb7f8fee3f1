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
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.attacks import ThreatModel
from wcitrain.attacks.ascent import input_gradient
from wcitrain.measures.adversarial import (
    attack_text,
    attacked,
    example_losses,
    held,
    mean_and_error,
    measuring,
)
from wcitrain.measures.chunk_sums import chunk_mean_and_error, mean_gradient, sizes
from wcitrain.measures.measurement import Measurement
from wcitrain.params import select_layers, unwrapped

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
DIRECTIONS = ("sign", "gradient")


def gradient_norm(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    layers: str = "all",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure ||∇_W R(W)||, the length of the gradient of the robust loss in the weights, equation (1).

    The standard error is that of the projection on the gradient, over chunks (the delta method). It leaves
    out the bias: the norm of a mean over N examples is too large by about the variance of one example's
    gradient across g, over 2 N ||g||. Cost beside the attack: two forward and backward passes.

    Args:
        model: Gives logits [N, C] for images in [0, 1].
        data: Iterable of (x, y, ...).
        threat: The adversary; None measures the clean loss.
        num_examples: How many, by default all.
        layers: Which tensors count, see ``params.select_layers``.
        num_steps, step_size, num_restarts: Of PGD; the step is 2.5 eps / num_steps by default.
        chunk_size: Examples at once; the last chunk may be smaller and counts less.
        seed: Of the attack's starts.

    Returns:
        ``parts``: the norm of each layer's own gradient, by its name.

    Raises:
        ValueError: No examples, no layers, images outside [0, 1] under attack.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> list(gradient_norm(model, [(x, y)], None).parts)
    ['1.weight', '1.bias']
    """
    model = unwrapped(model)
    with measuring(model):
        selected = select_layers(model, layers)
        chunks = attacked(
            model,
            held(model, data, num_examples, chunk_size),
            threat,
            num_steps=num_steps,
            step_size=step_size,
            num_restarts=num_restarts,
            seed=seed,
        )
        _, g = mean_gradient(model, chunks, selected.tensors)
        squares = selected.dots(g, g)
        norm = float(squares.sum().sqrt())
        along = [
            float(selected.dots(g, mean_gradient(model, [chunk], selected.tensors)[1]).sum()) / norm
            if norm
            else 0.0
            for chunk in chunks
        ]
        _, stderr = chunk_mean_and_error(along, sizes(chunks))
    parts = dict(zip(selected, squares.sqrt().tolist(), strict=True))
    settings = f"layers {layers}, {attack_text(threat, num_steps, num_restarts)}"
    return Measurement("gradient_norm", norm, stderr, int(sizes(chunks).sum()), settings, parts)


def input_gradient_norm(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    norm: str | None = None,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure the mean length (2) of the gradient of each example's loss in its image.

    eps times it is what the loss can rise by to first order.

    Args:
        norm: ``"l1"``, ``"l2"`` or ``"linf"``; by default the dual of the threat's, l2 without a threat.
        The others are those of ``gradient_norm``.

    Returns:
        ``parts``: all three norms. The standard error is over examples.

    Raises:
        ValueError: An unknown norm, and as in ``gradient_norm``.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> result = input_gradient_norm(model, [(x, y)], ThreatModel("linf", 0.1))
    >>> result.value == result.parts["l1"]
    True
    """
    norm = norm or (DUAL[threat.norm] if threat else "l2")
    if norm not in ORDERS:
        raise ValueError(f"input_gradient_norm.norm: got {norm!r}; expected one of {', '.join(ORDERS)}.")
    model = unwrapped(model)
    with measuring(model):
        chunks = attacked(
            model,
            held(model, data, num_examples, chunk_size),
            threat,
            num_steps=num_steps,
            step_size=step_size,
            num_restarts=num_restarts,
            seed=seed,
        )
        g = [input_gradient(partial(example_losses, model, y=y), x).flatten(1) for x, y in chunks]
        lengths = {
            name: torch.cat([torch.linalg.vector_norm(part, order, dim=1) for part in g]).double().cpu()
            for name, order in ORDERS.items()
        }
    value, stderr = mean_and_error(lengths[norm])
    parts = {name: float(values.mean()) for name, values in lengths.items()}
    settings = f"{norm}, {attack_text(threat, num_steps, num_restarts)}"
    return Measurement("input_gradient_norm", value, stderr, len(lengths[norm]), settings, parts)


def input_curvature(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    step: float | None = 1.5,
    direction: str = "sign",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure how fast the loss's slope in the image turns along it: (3), or its limit (4).

    On networks with kinks (ReLU) (3) also counts those that the step crosses, (4) never sees them. x + h z is
    not clipped to [0, 1], as in the published code. An example whose gradient is zero counts as zero. The
    standard error is over examples.

    Args:
        step: h > 0, an l2 length in pixel units; the paper's is 1.5 for CIFAR-10. None: the limit (4).
        direction: z_n along the gradient's ``"sign"`` (CURE) or the ``"gradient"`` itself, of l2 length one.
        The others are those of ``gradient_norm``.

    Raises:
        ValueError: ``step <= 0``, an unknown direction, and as in ``gradient_norm``.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> input_curvature(model, [(x, y)], None).value > 0
    True
    """
    if step is not None and not 0 < step < math.inf:
        raise ValueError(
            f"input_curvature.step: got {step}; expected a length > 0, or None for the limit. 1.5 is usual."
        )
    if direction not in DIRECTIONS:
        raise ValueError(
            f"input_curvature.direction: got {direction!r}; expected one of {', '.join(DIRECTIONS)}."
        )
    model = unwrapped(model)
    with measuring(model):
        chunks = attacked(
            model,
            held(model, data, num_examples, chunk_size),
            threat,
            num_steps=num_steps,
            step_size=step_size,
            num_restarts=num_restarts,
            seed=seed,
        )
        values = torch.cat([_turning(model, x, y, step, direction) for x, y in chunks]).double().cpu()
    value, stderr = mean_and_error(values)
    how = "limit h -> 0" if step is None else f"h {step:g}"
    settings = f"{how}, along the {direction}, {attack_text(threat, num_steps, num_restarts)}"
    return Measurement("input_curvature", value, stderr, len(values), settings)


def _turning(model: nn.Module, x: Tensor, y: Tensor, step: float | None, direction: str) -> Tensor:
    """Return (3) or (4) for every example [B]."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        (g,) = torch.autograd.grad(example_losses(model, x, y).sum(), x, create_graph=step is None)
    z = g.detach().sign() if direction == "sign" else g.detach()
    lengths = z.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    z = torch.where(lengths > 0, z / lengths, 0.0)
    if step is None:
        turned = torch.autograd.grad(g, x, z)[0] if g.requires_grad else torch.zeros_like(x)
    else:
        there = input_gradient(lambda images: example_losses(model, images, y), x.detach() + step * z)
        turned = (there - g) / step
    return turned.flatten(1).norm(dim=1)
