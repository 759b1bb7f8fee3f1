"""What gradient attacks are made of: a starting point, the gradient in the image, a step back into the ball.

Legend: B batch, x images [B, *dims] in [0, 1], delta = x_adv - x; ``loss_fn(x_adv)`` is one loss an example
[B]. Gradients are taken in the input alone. What a model must be protected from meanwhile: see ``preserve``.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

from wcitrain.attacks.threat import ThreatModel, project, steepest_step, uniform_in_ball

PerExampleLoss = Callable[[Tensor], Tensor]
Start = Literal["uniform", "gaussian", "none"]


def starting_point(x: Tensor, threat: ThreatModel, start: Start, generator: Generator | None) -> Tensor:
    """Return the first iterate, in ball and box: uniform in the ball, TRADES' x + 0.001 N(0, I), or x."""
    if start == "none":
        return x
    if start == "uniform":
        return (x + uniform_in_ball(x, threat, generator)).clamp(0, 1)
    device = generator.device if generator is not None else x.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    return (x + project(0.001 * noise, threat)).clamp(0, 1)


def ascend(
    x: Tensor, x_adv: Tensor, gradient: Tensor, threat: ThreatModel, step_size: float, l1_share: float
) -> Tensor:
    """Return ``Box[x + Project(x_adv + step_size * steepest_step(gradient) - x)]``, the next iterate."""
    step = steepest_step(gradient, threat, x=x_adv, step_size=step_size, l1_share=l1_share)
    return (x + project(x_adv + step_size * step - x, threat, x)).clamp(0, 1)


def input_gradient(loss_fn: PerExampleLoss, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return d(sum of losses)/dx, also when called under ``no_grad``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = loss_fn(x)
        if losses.shape != x.shape[:1]:
            got = f"got a loss of shape {tuple(losses.shape)}; expected one loss per example, ({len(x)},)"
            raise ValueError(f"pgd: {got}. Use reduction='none'.")
        return torch.autograd.grad(losses.sum(), x, create_graph=create_graph)[0]


def check_images(x: Tensor, where: str) -> None:
    """Refuse images outside [0, 1]; the rounding of a resized image is fine."""
    if x.numel() and (x.min() < -1e-6 or x.max() > 1 + 1e-6):
        raise ValueError(
            f"{where}: got images from {float(x.min()):.3g} to {float(x.max()):.3g}; expected [0, 1]. "
            "Put the normalisation inside the model (create_model does)."
        )
