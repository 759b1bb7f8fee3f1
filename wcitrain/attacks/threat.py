"""Threat models: which perturbations an adversary may use, and the geometry an attack needs of them.

Legend: B batch, D pixels times channels, x images [B, *dims] in [0, 1], delta = x_adv - x, g gradient, z a
perturbation before projection, r_i the room of coordinate i: how far it can move in the direction of z_i (a
step: of g_i) before it leaves the box, 1 - x_i upwards and x_i downwards. Every function treats each example
on its own, without a loop over examples.
"""

import math
from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from wcitrain.attacks.losses import precise
from wcitrain.method import Radius, method, refuse

Norm = Literal["linf", "l2", "l1"]
LARGEST_EPS = {"linf": 1, "l2": 100, "l1": 10000}  # beyond it pixels were meant to be in [0, 255]


@method
class ThreatModel:
    """The perturbations an adversary may use: a ball of radius ``eps`` in ``norm``, cut with the box [0, 1].

    Raises:
        ValueError: Unknown norm, or an ``eps`` outside its range: at most 1, 100, 10000 under linf, l2, l1.

    Example:
        >>> print(ThreatModel("linf", 8 / 255), "|", ThreatModel("l1", 12.0).scaled(0.5))
        linf 8/255 | l1 6
    """

    norm: Norm = Field(
        default="linf",
        description="Norm of the image perturbation: l2 and l1 over all pixels and channels of an image.",
    )
    eps: Radius = Field(
        default=8 / 255,
        description="Radius in [0, 1] pixel units: 8/255, not 8, under linf; e.g. 0.5 under l2, 12 under l1.",
    )

    def __post_init__(self) -> None:
        largest = LARGEST_EPS[self.norm]
        if self.eps > largest:
            hint = f"Did you mean {self.eps:g}/255?" if self.norm == "linf" else "Write e.g. 128/255."
            rule = f"expected at most {largest} under {self.norm}: pixels lie in [0, 1]"
            refuse("eps", f"got {self.eps:g}; {rule}. {hint}")

    def __str__(self) -> str:
        pixels = self.eps * 255
        is_whole = abs(pixels - round(pixels)) < 1e-9 and self.norm != "l1"  # l1 is a sum over the image
        return f"{self.norm} {f'{pixels:.0f}/255' if is_whole else f'{self.eps:g}'}"

    def scaled(self, factor: float) -> Self:
        """Return the same norm with radius ``factor * eps``; ``factor`` in [0, 1], 1 returns itself."""
        if not 0 <= factor <= 1:
            raise ValueError(f"ThreatModel.scaled: got {factor!r}; expected 0 to 1. Give a larger eps.")
        return self if factor == 1 else replace(self, eps=self.eps * factor)

    def step_for(self, num_steps: int, step_size: float | None = None) -> float:
        """Return ``step_size``, or where it is None 2.5 eps / num_steps: such steps cross the ball."""
        return 2.5 * self.eps / max(num_steps, 1) if step_size is None else step_size


def project(delta: Tensor, threat: ThreatModel, x: Tensor | None = None) -> Tensor:
    """Return the closest perturbation (Euclidean) inside the ball of radius ``threat.eps`` around zero.

    linf: clamp every coordinate. l2: rescale each example whose norm exceeds eps.                         (1)
    l1:   sign(z_i) min( max(|z_i| - mu, 0), r_i ),  r_i infinite without ``x`` (Duchi et al. 2008)        (2)

    with mu = 0 where that lies in the ball, else the mu > 0 that puts it on the sphere. With ``x``, (2) is
    the closest point of ball *and* box. Projecting on one after the other is another point, too short by so
    much that l1 attacks become weak (Croce & Hein 2021, arXiv 2103.01208, section 3.1).

    Args:
        delta: Perturbation [B, *dims] in pixel units; its dtype is kept.
        threat: Norm and radius.
        x: Images in [0, 1], same shape; linf and l2 ignore them.

    Example:
        >>> project(torch.tensor([[3.0, 1.0, -2.0]]), ThreatModel("l1", 3.0))
        tensor([[ 2.,  0., -1.]])
        >>> x = torch.tensor([[0.9, 0.5, 0.5]])  # the first has room for 0.1: more is left for the second
        >>> project(torch.tensor([[3.0, 2.0, 0.2]]), ThreatModel("l1", 0.4), x)
        tensor([[0.1000, 0.3000, 0.0000]])
    """
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    if threat.norm == "l2":
        return delta * (threat.eps / _norms(delta).clamp_min(_TINY)).clamp(max=1.0)
    z = _flat(delta)
    size = z.abs()
    room = torch.full_like(z, torch.inf) if x is None else _room(z, _flat(x))
    kept = torch.minimum((size - _l1_threshold(size, room, threat.eps)).clamp_min(0), room)
    return (z.sign() * kept).reshape(delta.shape).to(delta.dtype)


def steepest_step(
    gradient: Tensor, threat: ThreatModel, *, x: Tensor, step_size: float, l1_share: float
) -> Tensor:
    """Return the step of unit norm from ``x`` along which the loss rises fastest; zero for a zero gradient.

    linf: sign(g). l2: g / ||g|| per example.                                                              (3)
    l1: ``sparse_step``, since one coordinate a step is too slow; only it needs the other arguments.
    """
    if threat.norm == "linf":
        return gradient.sign()
    if threat.norm == "l2":
        return gradient / _norms(gradient).clamp_min(_TINY)
    return sparse_step(gradient, l1_share, x=x, step_size=step_size)


def sparse_step(gradient: Tensor, share: float = 0.05, *, x: Tensor, step_size: float) -> Tensor:
    """Return the l1 step of unit norm that moves a ``share`` of the coordinates, those it gains most from.

        d_i = sign(g_i) / |S| on S = the K = ceil(share D) coordinates of largest gain > 0, 0 elsewhere    (4)
        gain_i = |g_i| min( r_i, step_size / K )

    The gain is what the linearised loss gains before the coordinate meets the border of the box. With |g_i|
    alone this is SLIDE (Tramèr & Boneh 2019, arXiv 1904.13000), where pixels on the border that would step
    outwards waste their share of the step; Maini et al. (2020, arXiv 1909.04068) pass over those near it.
    Ranking by |g_i| among the pixels strictly inside is not enough: full pixels that the projection has moved
    off the border by a hair would win every step anew, and the attack stalls. Ties at the last place count.

    Args:
        gradient: [B, *dims].
        share: Share of coordinates that move, in (0, 1]; at least one moves. The adversarial perturbation of
            a linear model moves about eps / room of them; steps on many more spread it thin.
        x: Current images, like ``gradient``.
        step_size: The factor the step will be given, in l1 length.

    Raises:
        ValueError: ``share`` outside (0, 1].

    Example:
        >>> g, x = torch.tensor([[3.0, -2.0, 1.0, 0.5]]), torch.tensor([[1.0, 0.5, 0.5, 0.5]])
        >>> sparse_step(g, 0.5, x=x, step_size=1.0)
        tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """
    if not 0 < share <= 1:
        raise ValueError(f"sparse_step: got share={share!r}; expected a number in (0, 1]. 0.05 is usual.")
    size, room = gradient.abs().flatten(1), _room(gradient, x).flatten(1)
    num_moves = math.ceil(share * size.shape[1])
    gain = size * room.clamp_max(step_size / num_moves)
    last = gain.topk(num_moves, dim=1).values[:, -1:]
    moves = ((gain >= last) & (gain > 0)).reshape(gradient.shape)
    return gradient.sign() * moves / _shaped(moves.flatten(1).sum(1).clamp_min(1), gradient)


def uniform_in_ball(x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None) -> Tensor:
    """Return perturbations like ``x``, uniform in the ball of ``threat``; the image box is not applied.

    l2: a uniform direction times eps U^(1/D). l1: D of D + 1 exponentials over the sum of all, times eps, of
    random signs (a uniform point of the simplex {d >= 0, sum d <= 1} is Dirichlet with D + 1 equal parts).
    """
    device = generator.device if generator is not None else x.device
    if threat.norm == "linf":
        unit = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype) * 2 - 1
        return (unit * threat.eps).to(x.device)
    if threat.norm == "l2":
        normal = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        radius = torch.rand(len(x), generator=generator, device=device, dtype=x.dtype) ** (1 / x[0].numel())
        return (normal / _norms(normal).clamp_min(_TINY) * _shaped(radius, x) * threat.eps).to(x.device)
    flat = _flat(x)
    parts = torch.empty(len(x), flat.shape[1] + 1, device=device, dtype=flat.dtype)
    parts.exponential_(generator=generator)
    sign = torch.randint(0, 2, flat.shape, generator=generator, device=device) * 2 - 1
    unit = sign * parts[:, :-1] / parts.sum(1, keepdim=True)
    return (unit * threat.eps).reshape(x.shape).to(x)


_TINY = 1e-12  # floor of a norm before division; far below any pixel difference


def _norms(x: Tensor) -> Tensor:
    """Return the l2 norm of every example, shaped [B, 1, ...] to broadcast against ``x``."""
    return _shaped(x.flatten(1).norm(dim=1), x)


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per example [B] as [B, 1, ...], to broadcast against ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _room(z: Tensor, x: Tensor) -> Tensor:
    """Return how far every pixel of ``x`` can move in the direction of ``z``."""
    return torch.where(z > 0, 1 - x, x).clamp_min(0)


def _flat(x: Tensor) -> Tensor:
    """Return ``x`` as [B, D] in float32 at least: sums over an image need it."""
    return precise(x).flatten(1)


def _l1_threshold(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """Return mu [B, 1] of (2) for magnitudes ``size`` and ``room`` [B, D], exactly.

    f(mu) = sum_i min( max(|z_i| - mu, 0), r_i ) is piecewise linear. Going down from mu = inf, coordinate i
    begins to add at mu = |z_i| and is full at |z_i| - r_i; the slope counts those in between. Sorting these
    points finds the piece in which f(mu) = eps, and the equation is solved inside it.
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
