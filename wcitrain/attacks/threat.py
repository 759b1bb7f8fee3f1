"""Threat models: which perturbations an adversary may use, and the geometry an attack needs of them.

Legend: B batch, D pixels times channels, x images [B, *dims] in [0, 1], delta = x_adv - x, g gradient, z a
perturbation before projection, r_i the room of coordinate i: how far it can move in the direction of z_i (a
step: of g_i) before it leaves the box, ||.||_0 the number of coordinates that are not zero. Every function
treats each example on its own.
"""

from dataclasses import replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from wcitrain.method import Radius, fraction_text, method, refuse, setting
from wcitrain.params import precise

Norm = Literal["linf", "l2", "l1"]
LARGEST_EPS = {"linf": 1, "l2": 100, "l1": 10000}  # beyond it pixels were meant to be in [0, 255]


@method
class ThreatModel:
    """The perturbations an adversary may use: a ball of radius ``eps`` in ``norm``, cut at [0, 1]."""

    norm: Norm = setting("linf", "Norm of the perturbation over all pixels and channels of an image.")
    eps: Radius = setting(8 / 255, "Radius in [0, 1] pixel units: 8/255, not 8; e.g. 0.5 under l2.")

    def __post_init__(self) -> None:
        if self.eps > LARGEST_EPS[self.norm]:
            rule = f"at most {LARGEST_EPS[self.norm]} under {self.norm}: pixels lie in [0, 1]"
            refuse("eps", f"got {self.eps:g}; expected {rule}. Did you mean {self.eps:g}/255?")

    def __str__(self) -> str:
        radius = fraction_text(self.eps)
        is_share = isinstance(radius, str) and self.norm != "l1"  # l1 is a sum over the image
        return f"{self.norm} {radius if is_share else f'{self.eps:g}'}"

    def scaled(self, factor: float) -> Self:
        """Return the same norm with radius ``factor * eps``; 1 returns itself."""
        return self if factor == 1 else replace(self, eps=self.eps * factor)

    def step_for(self, num_steps: int, step_size: float | None = None) -> float:
        """Return ``step_size``, or where it is None 2.5 eps / num_steps, which crosses the ball; l1: or eps.

        An l1 step of less than eps is shared by coordinates of which the projection keeps few.
        """
        if step_size is not None:
            return step_size
        return self.eps * max(2.5 / max(num_steps, 1), 1.0 if self.norm == "l1" else 0.0)


def project(delta: Tensor, threat: ThreatModel, x: Tensor | None = None) -> Tensor:
    """Return the closest perturbation (Euclidean) inside the ball of radius ``threat.eps`` around zero.

    linf: clamp every coordinate. l2: rescale each example whose norm exceeds eps.                         (1)
    l1:   sign(z_i) min( max(|z_i| - mu, 0), r_i ),  r_i infinite without ``x`` (Duchi et al. 2008)        (2)

    with mu = 0 where that lies in the ball, else the mu > 0 that puts it on the sphere. With images ``x``,
    which linf and l2 ignore, (2) is the closest point of ball *and* box: projecting on one after the other
    makes l1 attacks weak (Croce & Hein 2021, arXiv 2103.01208, section 3.1). The dtype is kept.
    """
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    if threat.norm == "l2":
        return delta * (threat.eps / norms(delta, threat).clamp_min(_TINY)).clamp(max=1.0)
    z = precise(delta).flatten(1)
    size = z.abs()
    room = torch.full_like(z, torch.inf) if x is None else _room(z, precise(x).flatten(1))
    kept = torch.minimum((size - _l1_threshold(size, room, threat.eps)).clamp_min(0), room)
    return (z.sign() * kept).reshape(delta.shape).to(delta.dtype)


def steepest_step(gradient: Tensor, threat: ThreatModel, *, x: Tensor, x_adv: Tensor) -> Tensor:
    """Return the step of unit norm from ``x_adv`` along which the loss rises; zero for a zero gradient.

    linf: sign(g). l2: g / ||g|| per example. Only l1 needs the images, as one coordinate a step is too slow:

        d_i = sign(g_i) / k on the k coordinates of largest |g_i|, 0 elsewhere                             (3)
        k = min( 2 K, ||x_adv - x||_0 / 1.5 ),  at x itself 2 K                                            (4)

    with K coordinates, of the same order, that use eps up when each goes to the border of the box (the
    steepest ascent there), and k at least so large that one of them can move. The projection sets small
    coordinates to zero, so (4) grows sparse from step to step, as in Croce & Hein 2021 (arXiv 2103.01208).
    Theirs begins with a fifth of the coordinates in place of 2 K, counts those of the best iterate at
    checkpoints, and shortens its steps. Ties at the last place count.
    """
    if threat.norm == "linf":
        return gradient.sign()
    if threat.norm == "l2":
        return gradient / norms(gradient, threat).clamp_min(_TINY)
    order = gradient.abs().flatten(1).argsort(1, descending=True)
    room, room_left = (_room(gradient, precise(z)).flatten(1).gather(1, order) for z in (x, x_adv))
    most = 2 + 2 * (room.cumsum(1) < threat.eps).sum(1)
    least = 1 + (room_left > 1e-6).int().argmax(1)  # the first that is off the border by more than a rounding
    moved = (x_adv != x).flatten(1).sum(1)
    sparser = (moved / 1.5).long().clamp(max=most)
    return sparse_sign(gradient, torch.where(moved > 0, sparser, most).maximum(least))


def sparse_sign(gradient: Tensor, num_moves: Tensor) -> Tensor:
    """Return (3) for k = ``num_moves`` [B], at least 1 and at most D."""
    size = gradient.abs().flatten(1)
    place = (size.shape[1] - num_moves).clamp(0, size.shape[1] - 1).unsqueeze(1)
    moves = (size >= size.sort(1).values.gather(1, place)) & (size > 0)
    share = shaped(moves.sum(1).clamp_min(1), gradient)
    return gradient.sign() * moves.reshape(gradient.shape) / share


def uniform_in_ball(x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None) -> Tensor:
    """Return perturbations like ``x``, uniform in the ball of ``threat``; the image box is not applied.

    l2: a uniform direction times eps U^(1/D). l1: D of D + 1 exponentials over the sum of all, times eps, of
    random signs (Dirichlet with D + 1 equal parts).
    """
    device = generator.device if generator is not None else x.device
    draw: dict[str, Any] = {"generator": generator, "device": device}
    if threat.norm == "linf":
        unit = torch.rand(x.shape, dtype=x.dtype, **draw) * 2 - 1
    elif threat.norm == "l2":
        normal = torch.randn(x.shape, dtype=x.dtype, **draw)
        radius = torch.rand(len(x), dtype=x.dtype, **draw) ** (1 / x[0].numel())
        unit = normal / norms(normal, threat).clamp_min(_TINY) * shaped(radius, x)
    else:
        flat = precise(x).flatten(1)
        parts = torch.empty(len(x), flat.shape[1] + 1, device=device, dtype=flat.dtype)
        parts.exponential_(generator=generator)
        sign = torch.randint(0, 2, flat.shape, **draw) * 2 - 1
        unit = (sign * parts[:, :-1] / parts.sum(1, keepdim=True)).reshape(x.shape)
    return (unit * threat.eps).to(x)


_TINY = 1e-12  # floor of a norm before division; far below any pixel difference


def norms(delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return the norm of every example, shaped [B, 1, ...] to broadcast against ``delta``."""
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    return shaped(torch.linalg.vector_norm(delta.flatten(1), order, dim=1), delta)


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per example [B] as [B, 1, ...], to broadcast against ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _room(z: Tensor, x: Tensor) -> Tensor:
    """Return how far every pixel of ``x`` can move in the direction of ``z``."""
    return torch.where(z > 0, 1 - x, x).clamp_min(0)


def _l1_threshold(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """Return mu [B, 1] of (2) for magnitudes ``size`` and ``room`` [B, D], exactly.

    f(mu) = sum_i min( max(|z_i| - mu, 0), r_i ) is piecewise linear: going down from inf, coordinate i begins
    to add at mu = |z_i| and is full at |z_i| - r_i. Sorting these points finds the piece in which f(mu) =
    eps.
    """
    ends = torch.cat([size, (size - room).clamp_min(0)], 1)
    begins = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)
    mu, order = ends.sort(dim=1, descending=True)
    slope = begins.gather(1, order).cumsum(1)[:, :-1]  # between mu_j and mu_{j+1}
    f = F.pad((slope * (mu[:, :-1] - mu[:, 1:])).cumsum(1), (1, 0))  # at mu_j
    num_below = (f < eps).sum(1, keepdim=True)  # the piece begins at the last of them
    piece = (num_below - 1).clamp(0, slope.shape[1] - 1)
    solved = mu.gather(1, piece) - (eps - f.gather(1, piece)) / slope.gather(1, piece).clamp_min(1)
    return solved.maximum(mu.gather(1, piece + 1))  # the last piece's end, 0, where z lies in the ball
