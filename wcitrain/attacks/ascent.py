"""Gradient attacks: pure functions on images in [0, 1] that return ``x_adv``.

Legend: B batch, x images [B, *dims], delta = x_adv - x. An attack maximises ``loss_fn(x_adv)``, one loss per
example [B]. Gradients are taken with respect to the input alone; no parameter's ``.grad`` is touched. What a
*model* must be protected from while it is attacked (mode, statistics, random state): see ``preserve``.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from wcitrain.attacks.threat import ThreatModel, project, steepest_step, uniform_in_ball

PerExampleLoss = Callable[[Tensor], Tensor]
Start = Literal["uniform", "gaussian", "none"]

GAUSSIAN_START = 0.001  # standard deviation of TRADES' start, pixel units


def pgd(
    loss_fn: PerExampleLoss,
    x: Tensor,
    *,
    threat: ThreatModel,
    num_steps: int = 10,
    step_size: float = 2 / 255,
    start: Start = "uniform",
    num_restarts: int = 1,
    l1_share: float = 0.05,
    generator: Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the loss (Madry et al., 1706.06083, eq. 2.1; l2 steps are normalised).

        x_{k+1} = Box[ x + Project( x_k + step_size * steepest_step(grad_x loss(x_k)) - x ) ]              (1)

    linf: Box[Project(.)] is the closest point of ball and box. l2: it lies in both, but is not the closest
    point; this is what published l2 attacks do. l1: the steps are ``sparse_step`` and the closest point of
    ball and box is taken, without which l1 attacks are weak.

    The last iterate is returned; with several restarts, for each example the one with the highest loss. The
    gradient is that of the *sum* of the losses, so it does not shrink with the batch. Cost: ``num_steps``
    forward and backward passes a restart, and one more forward a restart when there is more than one.

    Args:
        loss_fn: Maps images [B, *dims] to losses [B].
        x: Images in [0, 1]; not modified.
        threat: Norm and radius.
        num_steps: Gradient steps, >= 0 (0 returns the starting point).
        step_size: Length of a step in the threat's norm, pixel units; the default suits linf and 8/255 only,
            ``threat.step_for(num_steps)`` every threat.
        start: First iterate, see ``starting_point``.
        num_restarts: Independent runs, >= 1.
        l1_share: Share of the coordinates that an l1 step moves, in (0, 1]; other norms ignore it.
        generator: Source of the starting points; on any device.

    Returns:
        Images like ``x``, detached, in [0, 1] and within eps of ``x`` (up to rounding).

    Raises:
        ValueError: ``num_steps < 0``, ``num_restarts < 1``, images outside [0, 1], or a loss that is not one
            number per example.

    Example:
        >>> x = torch.full((2, 1, 4, 4), 0.5)
        >>> x_adv = pgd(lambda images: images.flatten(1).sum(1), x, threat=ThreatModel("linf", 8 / 255))
        >>> bool(((x_adv - x - 8 / 255).abs() < 1e-6).all())  # every pixel rises by eps
        True
    """
    if num_steps < 0 or num_restarts < 1:
        raise ValueError(
            f"pgd: got num_steps={num_steps}, num_restarts={num_restarts}; expected at least 0 and 1."
        )
    check_images(x, "pgd")
    x = x.detach()
    worst, worst_loss = x, None
    for _ in range(num_restarts):
        x_adv = starting_point(x, threat, start, generator)
        for _ in range(num_steps):
            x_adv = ascend(x, x_adv, input_gradient(loss_fn, x_adv), threat, step_size, l1_share)
        if num_restarts == 1:
            return x_adv
        with torch.no_grad():
            loss = loss_fn(x_adv)
        if worst_loss is None:
            worst, worst_loss = x_adv, loss
        else:
            is_worse = loss > worst_loss
            worst = torch.where(is_worse.reshape(-1, *[1] * (x.ndim - 1)), x_adv, worst)
            worst_loss = torch.where(is_worse, loss, worst_loss)
    return worst


def fgsm(
    loss_fn: PerExampleLoss,
    x: Tensor,
    *,
    threat: ThreatModel,
    step_size: float | None = None,
    start: Start = "none",
    l1_share: float = 0.05,
    generator: Generator | None = None,
) -> Tensor:
    """One step of ``pgd`` of length ``step_size``, default eps: FGSM (Goodfellow et al., arXiv 1412.6572).

    With ``start="uniform"`` and ``step_size=1.25 * eps`` it is FGSM-RS (Wong et al., 2001.03994).

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    >>> losses = lambda z: torch.nn.functional.cross_entropy(model(z), y, reduction="none")
    >>> bool((fgsm(losses, x, threat=ThreatModel("linf", 0.1)) - x).abs().max() <= 0.1 + 1e-6)
    True
    """
    return pgd(
        loss_fn,
        x,
        threat=threat,
        num_steps=1,
        step_size=threat.eps if step_size is None else step_size,
        start=start,
        l1_share=l1_share,
        generator=generator,
    )


def msd(
    loss_fn: PerExampleLoss,
    x: Tensor,
    *,
    threats: Sequence[ThreatModel],
    step_sizes: Sequence[float],
    num_steps: int = 10,
    start: Start = "uniform",
    l1_share: float = 0.05,
    generator: Generator | None = None,
) -> Tensor:
    """Multi steepest descent on a union of balls (Maini, Wong & Kolter 2020, arXiv 1909.04068, eq. 7 to 9).

        x_{k+1} = argmax over t of loss( x_k^t ),  x_k^t = step (1) of ``pgd`` from x_k in the ball of t   (2)

    The choice is made for each example. The returned point lies in the ball of the threat whose step was the
    last, hence in the union. The l1 step is ``sparse_step`` with a fixed share (the authors draw 5 to 20
    coordinates at random). Cost for T threats: ``num_steps`` (1 + T) forward, ``num_steps`` backward passes.

    Args:
        loss_fn, x, num_steps, l1_share, generator: See ``pgd``.
        threats: The balls, at least one.
        step_sizes: One for each threat, in its norm.
        start: See ``starting_point``; in the ball of a threat that is drawn for each example.

    Returns:
        Images like ``x``, detached, in [0, 1] and in one of the balls (up to rounding).

    Raises:
        ValueError: No threat, another number of step sizes than of threats, or what ``pgd`` refuses.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
        >>> losses = lambda z: torch.nn.functional.cross_entropy(model(z), y, reduction="none")
        >>> threats = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.3)]
        >>> msd(losses, x, threats=threats, step_sizes=[0.05, 0.15], num_steps=4).shape
        torch.Size([8, 1, 4, 4])
    """
    if not threats or len(threats) != len(step_sizes) or num_steps < 0:
        raise ValueError(
            f"msd: got {len(threats)} threats, {len(step_sizes)} step sizes, num_steps={num_steps}; "
            "expected one step size for each of at least one threat, and num_steps >= 0."
        )
    check_images(x, "msd")
    x = x_adv = x.detach()
    rows = torch.arange(len(x), device=x.device)
    if start != "none":
        starts = torch.stack([starting_point(x, threat, start, generator) for threat in threats])
        device = generator.device if generator is not None else x.device
        drawn = torch.randint(len(threats), (len(x),), generator=generator, device=device)
        x_adv = starts[drawn.to(x.device), rows]
    balls = list(zip(threats, step_sizes, strict=True))
    for _ in range(num_steps):
        gradient = input_gradient(loss_fn, x_adv)
        steps = [ascend(x, x_adv, gradient, threat, step_size, l1_share) for threat, step_size in balls]
        with torch.no_grad():
            best = torch.stack([loss_fn(step) for step in steps]).argmax(0)
        x_adv = torch.stack(steps)[best, rows]
    return x_adv


def starting_point(x: Tensor, threat: ThreatModel, start: Start, generator: Generator | None) -> Tensor:
    """Return the first iterate, in ball and box: ``"none"`` is x itself.

    ``"uniform"``: uniform in the ball, cut at the box. ``"gaussian"``: x + 0.001 N(0, I), TRADES' start.
    """
    if start == "none":
        return x
    if start == "uniform":
        return (x + uniform_in_ball(x, threat, generator)).clamp(0, 1)
    device = generator.device if generator is not None else x.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    return (x + project(GAUSSIAN_START * noise, threat)).clamp(0, 1)


def ascend(
    x: Tensor, x_adv: Tensor, gradient: Tensor, threat: ThreatModel, step_size: float, l1_share: float
) -> Tensor:
    """Return the next iterate (1) from ``x_adv``."""
    step = steepest_step(gradient, threat, x=x_adv, step_size=step_size, l1_share=l1_share)
    return (x + project(x_adv + step_size * step - x, threat, x)).clamp(0, 1)


def input_gradient(loss_fn: PerExampleLoss, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return d(sum of losses)/dx, also when called under ``no_grad``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = loss_fn(x)
        if losses.shape != x.shape[:1]:
            raise ValueError(
                f"pgd: loss_fn returned shape {tuple(losses.shape)}; expected one loss per example, "
                f"({len(x)},). Use reduction='none'."
            )
        return torch.autograd.grad(losses.sum(), x, create_graph=create_graph)[0]


def check_images(x: Tensor, where: str) -> None:
    """Refuse images outside [0, 1]; the rounding of a resized image is fine."""
    if x.numel() and (x.min() < -1e-6 or x.max() > 1 + 1e-6):
        raise ValueError(
            f"{where}: got images from {float(x.min()):.3g} to {float(x.max()):.3g}; expected [0, 1]. "
            "Put the normalisation inside the model (create_model does)."
        )
