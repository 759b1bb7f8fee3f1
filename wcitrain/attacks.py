"""Threat models and gradient attacks: pure functions on images in [0, 1] that return ``x_adv``.

Legend: B batch, x images [B, *dims], delta = x_adv - x. An attack maximises ``loss_fn(x_adv)``, a function that returns
one loss per example [B]. Gradients are taken with respect to the input alone; no parameter's ``.grad`` is touched.
What a *model* must be protected from while it is attacked (mode, statistics, random state) is ``preserve.undisturbed``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PerExampleLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ThreatModel:
    """The set of perturbations an adversary may use: a ball of radius ``eps`` in ``norm``, cut with the image box [0, 1].

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: Radius in [0, 1] pixel units (8/255, not 8); for ``"l2"`` the Euclidean length over all pixels and channels.

    Raises:
        ValueError: Unknown norm, or an ``eps`` outside its range.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"threat.norm: got {self.norm!r}; expected 'linf' or 'l2'. Choose one of the two.")
        if not (math.isfinite(self.eps) and self.eps >= 0) or (self.norm == "linf" and self.eps > 1):
            hint = f" Did you mean {self.eps:g}/255?" if self.norm == "linf" and 1 < self.eps <= 255 else ""
            raise ValueError(
                f"threat.eps: got {self.eps!r}; expected a finite radius >= 0 in [0, 1] pixel units"
                f"{' and at most 1 under linf' if self.norm == 'linf' else ''}.{hint or ' Give it as a fraction of 255.'}"
            )

    def __str__(self) -> str:
        pixels = self.eps * 255
        return f"{self.norm} {f'{pixels:.0f}/255' if abs(pixels - round(pixels)) < 1e-9 else f'{self.eps:g}'}"


def project(delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return the closest perturbation inside the ball of radius ``threat.eps`` around zero.

    linf: clamp every coordinate. l2: rescale each example whose norm exceeds eps.                              (1)

    Args:
        delta: Perturbation [B, *dims] in pixel units; not modified.
        threat: Norm and radius; the [0, 1] image box is applied by the caller, who knows x.

    Returns:
        Same shape and dtype as ``delta``.
    """
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    return delta * (threat.eps / _norms(delta).clamp_min(_TINY)).clamp(max=1.0)


def steepest_step(gradient: Tensor, threat: ThreatModel) -> Tensor:
    """Return the unit step (in the threat's norm) along which the linearised loss rises fastest.

    linf: sign(g). l2: g / ||g|| per example, zero where g is zero.                                             (2)
    """
    if threat.norm == "linf":
        return gradient.sign()
    return gradient / _norms(gradient).clamp_min(_TINY)


def uniform_in_ball(x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None) -> Tensor:
    """Return perturbations [B, *dims] drawn uniformly from the ball of ``threat`` (l2: radius eps * U^(1/D))."""
    device = generator.device if generator is not None else x.device
    if threat.norm == "linf":
        unit = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype) * 2 - 1
        return (unit * threat.eps).to(x.device)
    normal = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    radius = torch.rand(len(x), generator=generator, device=device, dtype=x.dtype) ** (1 / x[0].numel())
    radius = radius.reshape(-1, *[1] * (x.ndim - 1))
    return (normal / _norms(normal).clamp_min(_TINY) * radius * threat.eps).to(x.device)


def pgd(
    loss_fn: PerExampleLoss,
    x: Tensor,
    *,
    threat: ThreatModel,
    num_steps: int = 10,
    step_size: float = 2 / 255,
    random_start: bool = True,
    num_restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the loss (Madry et al., arXiv 1706.06083, eq. 2.1; l2 steps are normalised).

        x_{k+1} = Box[ x + Project( x_k + step_size * steepest_step(grad_x loss(x_k)) - x ) ]                    (3)

    The last iterate is returned; with several restarts, for each example the one with the highest loss. The gradient is
    that of the *sum* of the losses, so it does not shrink with the batch. Cost: ``num_steps`` forward and backward passes a
    restart, and one more forward a restart when there is more than one.

    Args:
        loss_fn: Maps images [B, *dims] to losses [B].
        x: Images in [0, 1]; not modified.
        threat: Norm and radius.
        num_steps: Gradient steps, >= 0 (0 returns the starting point).
        step_size: Length of a step in the threat's norm, pixel units.
        random_start: Start uniformly in the ball instead of at ``x``.
        num_restarts: Independent runs, >= 1.
        generator: Source of the starting points; on any device.

    Returns:
        Adversarial images, detached, same shape and dtype as ``x``, in [0, 1] and within eps of ``x`` (up to rounding).

    Raises:
        ValueError: ``num_steps < 0``, ``num_restarts < 1``, images outside [0, 1], or a loss that is not one number per
            example.
    """
    if num_steps < 0 or num_restarts < 1:
        raise ValueError(
            f"pgd: got num_steps={num_steps}, num_restarts={num_restarts}; expected num_steps >= 0 and num_restarts >= 1."
        )
    if x.numel() and (x.min() < -1e-6 or x.max() > 1 + 1e-6):  # rounding of a resized image is fine
        raise ValueError(
            f"pgd: got images from {float(x.min()):.3g} to {float(x.max()):.3g}; expected [0, 1], where eps is measured. Put the "
            "normalisation inside the model (create_model does)."
        )
    worst, worst_loss = x.detach(), None
    for _ in range(num_restarts):
        x_adv = x.detach()
        if random_start:
            x_adv = (x_adv + uniform_in_ball(x_adv, threat, generator)).clamp(0, 1)
        for _ in range(num_steps):
            gradient = _input_gradient(loss_fn, x_adv)
            x_adv = x_adv + step_size * steepest_step(gradient, threat)
            x_adv = (x.detach() + project(x_adv - x.detach(), threat)).clamp(0, 1)
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
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One steepest step of length ``step_size`` (default eps): the fast gradient method (Goodfellow et al., 1412.6572).

    With ``random_start=True`` and ``step_size=1.25 * eps`` it is FGSM-RS (Wong et al., 2001.03994). See ``pgd``.
    """
    return pgd(
        loss_fn,
        x,
        threat=threat,
        num_steps=1,
        step_size=threat.eps if step_size is None else step_size,
        random_start=random_start,
        generator=generator,
    )


_TINY = 1e-12  # floor of a norm before division; far below any pixel difference


def _norms(x: Tensor) -> Tensor:
    """Return the l2 norm of every example, shaped [B, 1, ...] to broadcast against ``x``."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))


def _input_gradient(loss_fn: PerExampleLoss, x: Tensor) -> Tensor:
    """Return d(sum of losses)/dx, also when called under ``no_grad``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = loss_fn(x)
        if losses.shape != x.shape[:1]:
            raise ValueError(
                f"pgd: loss_fn returned shape {tuple(losses.shape)}; expected one loss per example, ({len(x)},). "
                "Use reduction='none'."
            )
        return torch.autograd.grad(losses.sum(), x)[0]
