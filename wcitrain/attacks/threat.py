"""Threat models: which perturbations an adversary may use, and the geometry an attack needs of them.

Legend: B batch, D pixels times channels, x images [B, *dims] in [0, 1], delta = x_adv - x, g gradient, z a perturbation
before projection, r_i the room of coordinate i: how far it can move in the direction of z_i before it leaves the box
(1 - x_i where z_i > 0, x_i elsewhere). Every function treats each example on its own, without a loop over examples.

Projections are exact, by sorting: the projected point depends on one number per example (a threshold in l1, a scale in l2)
that solves a monotone piecewise linear (quadratic) equation; its breakpoints are known, so the piece is found by sorting
them and the equation is solved inside the piece.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["linf", "l2", "l1"]


@dataclass(frozen=True)
class ThreatModel:
    """The set of perturbations an adversary may use: a ball of radius ``eps`` in ``norm``, cut with the image box [0, 1].

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius in [0, 1] pixel units (8/255, not 8) under ``"linf"``; the Euclidean length over all pixels and channels
            under ``"l2"`` (such as 0.5); the sum of |delta| over all pixels and channels under ``"l1"`` (such as 12).

    Raises:
        ValueError: Unknown norm, or an ``eps`` outside its range.

    Example:
        >>> print(ThreatModel("linf", 8 / 255), "|", ThreatModel("l1", 12.0).scaled(0.5))
        linf 8/255 | l1 6
    """

    norm: Norm = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"threat.norm: got {self.norm!r}; expected 'linf', 'l2' or 'l1'. Choose one of the three.")
        if not (math.isfinite(self.eps) and self.eps >= 0) or (self.norm == "linf" and self.eps > 1):
            hint = f" Did you mean {self.eps:g}/255?" if self.norm == "linf" and 1 < self.eps <= 255 else ""
            raise ValueError(
                f"threat.eps: got {self.eps!r}; expected a finite radius >= 0 in [0, 1] pixel units"
                f"{' and at most 1 under linf' if self.norm == 'linf' else ''}.{hint or ' Give it as a fraction of 255.'}"
            )

    def __str__(self) -> str:
        pixels = self.eps * 255
        in_pixels = self.norm != "l1" and abs(pixels - round(pixels)) < 1e-9  # an l1 radius is a sum over the image
        return f"{self.norm} {f'{pixels:.0f}/255' if in_pixels else f'{self.eps:g}'}"

    def scaled(self, factor: float) -> "ThreatModel":
        """Return the same norm with radius ``factor * eps``; ``factor`` in [0, 1], 1 returns the model itself."""
        if not 0 <= factor <= 1:
            raise ValueError(f"threat.scaled: got factor {factor!r}; expected a number in [0, 1].")
        return self if factor == 1 else ThreatModel(self.norm, self.eps * factor)


def project(delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return the closest perturbation (Euclidean) inside the ball of radius ``threat.eps`` around zero.

    linf: clamp every coordinate. l2: rescale each example whose norm exceeds eps.                              (1)
    l1: sign(z) max(|z| - mu, 0), with the mu >= 0 that makes the norm eps where it exceeds eps (Duchi et al. 2008).

    Args:
        delta: Perturbation [B, *dims] in pixel units; not modified.
        threat: Norm and radius; the [0, 1] image box is not applied, see ``project_in_box``.

    Returns:
        Same shape and dtype as ``delta``.

    Example:
        >>> project(torch.tensor([[3.0, 1.0, -2.0]]), ThreatModel("l1", 3.0))
        tensor([[ 2.,  0., -1.]])
    """
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    if threat.norm == "l2":
        return delta * (threat.eps / _norms(delta).clamp_min(_TINY)).clamp(max=1.0)
    z = _flat(delta)
    size = z.abs()
    kept = (size - _l1_threshold(size, torch.full_like(size, torch.inf), threat.eps)).clamp_min(0)
    return (z.sign() * kept).reshape(delta.shape).to(delta.dtype)


def project_in_box(delta: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Return the closest perturbation (Euclidean) inside the ball that also keeps ``x + delta`` in [0, 1].

    linf: clamp to both; exact, as the two sets are boxes.
    l2:   delta_i = clip( z_i / (1 + mu), -x_i, 1 - x_i )                                                       (2)
    l1:   delta_i = sign(z_i) min( max(|z_i| - mu, 0), r_i )                                                    (3)

    with mu = 0 where that lies in the ball, else the mu > 0 that puts it on the sphere (the multiplier of the ball's
    constraint). Projecting on the ball and the box one after the other is another point in l2 and l1, too short in l1 by so
    much that attacks become weak (Croce & Hein 2021, arXiv 2103.01208, section 3.1).

    Args:
        delta: Perturbation [B, *dims] in pixel units; not modified.
        x: Images in [0, 1], same shape.
        threat: Norm and radius.

    Returns:
        Same shape and dtype as ``delta``.

    Example:
        >>> x = torch.tensor([[0.9, 0.5, 0.5]])  # the first pixel has room for 0.1 only: more is left for the second
        >>> project_in_box(torch.tensor([[3.0, 2.0, 0.2]]), x, ThreatModel("l1", 0.4))
        tensor([[0.1000, 0.3000, 0.0000]])
    """
    z, images = _flat(delta), _flat(x)
    size = z.abs()
    room = _room(z, images)
    if threat.norm == "linf":
        kept = size.clamp_max(threat.eps)
    elif threat.norm == "l2":
        kept = size * _l2_scale(size, room, threat.eps)
    else:
        kept = (size - _l1_threshold(size, room, threat.eps)).clamp_min(0)
    return (z.sign() * torch.minimum(kept, room)).reshape(delta.shape).to(delta.dtype)


def steepest_step(gradient: Tensor, threat: ThreatModel) -> Tensor:
    """Return the unit step (in the threat's norm) along which the linearised loss rises fastest: <g, d> = ||g||_dual.

    linf: sign(g). l2: g / ||g|| per example. l1: sign(g) on the largest |g_i|, shared among equal ones.        (4)
    Zero where the whole gradient is zero. One coordinate a step is too slow for an l1 attack: see ``sparse_step``.
    """
    if threat.norm == "linf":
        return gradient.sign()
    if threat.norm == "l2":
        return gradient / _norms(gradient).clamp_min(_TINY)
    size = gradient.abs().flatten(1)
    is_largest = (size == size.amax(1, keepdim=True)).reshape(gradient.shape)
    return gradient.sign() * is_largest / _shaped(is_largest.flatten(1).sum(1), gradient)


def sparse_step(
    gradient: Tensor, share: float = 0.05, *, x: Tensor | None = None, step_size: float = math.inf
) -> Tensor:
    """Return the l1 step of unit norm that moves a ``share`` of the coordinates equally, those it gains most from.

        d_i = sign(g_i) / |S| on S = the K = ceil(share * D) coordinates with the largest gain, 0 elsewhere     (5)
        gain_i = |g_i|, or with ``x``: |g_i| min( r_i, step_size / K )

    With the first gain it is SLIDE (Tramèr & Boneh 2019, arXiv 1904.13000). Pixels on the border of the box that would step
    outwards waste their share of the step, and Maini et al. (2020, arXiv 1909.04068) pass over those near it. The second
    gain does this without a threshold: it is what the linearised loss gains before the coordinate meets the border.
    Ranking by |g_i| among the pixels strictly inside is not enough: full pixels that the projection has moved off the
    border by a hair would win every step anew, and the attack stalls. Ties at the last place all count; coordinates without
    gain never do.

    Args:
        gradient: [B, *dims].
        share: Share of coordinates that move, in (0, 1]; at least one moves. The adversarial perturbation of a linear model
            moves about eps / room of them; steps on many more spread it thin.
        x: Current images, to know the border; None where there is no box.
        step_size: The factor the step will be given, in l1 length; used with ``x``.

    Returns:
        Steps like ``gradient``, of unit l1 norm; zero where no coordinate can gain.

    Raises:
        ValueError: ``share`` outside (0, 1].

    Example:
        >>> sparse_step(torch.tensor([[3.0, -2.0, 1.0, 0.5]]), 0.5, x=torch.tensor([[1.0, 0.5, 0.5, 0.5]]))
        tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """
    if not 0 < share <= 1:
        raise ValueError(f"sparse_step: got share={share!r}; expected a number in (0, 1]. 0.05 is usual.")
    gain = gradient.abs().flatten(1)
    num_moves = math.ceil(share * gain.shape[1])
    if x is not None:
        gain = gain * _room(gradient, x).flatten(1).clamp_max(step_size / num_moves)
    last = gain.topk(num_moves, dim=1).values[:, -1:]
    moves = ((gain >= last) & (gain > 0)).reshape(gradient.shape)
    return gradient.sign() * moves / _shaped(moves.flatten(1).sum(1).clamp_min(1), gradient)


def uniform_in_ball(x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None) -> Tensor:
    """Return perturbations like ``x`` drawn uniformly from the ball of ``threat``; the image box is not applied.

    l2: a uniform direction times eps U^(1/D). l1: D of D + 1 exponentials over the sum of all, times eps, with random signs
    (a uniform point of the simplex {d >= 0, sum d <= 1} is Dirichlet with D + 1 equal parts).
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
    parts = torch.empty(len(x), flat.shape[1] + 1, device=device, dtype=flat.dtype).exponential_(generator=generator)
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
    return (x if x.dtype == torch.float64 else x.float()).flatten(1)


def _l1_threshold(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """Return mu [B, 1] of (3) for magnitudes ``size`` and ``room`` [B, D].

    f(mu) = sum_i min( max(|z_i| - mu, 0), r_i ) falls piecewise linearly from its largest value at mu = 0. Going down from
    mu = inf, coordinate i begins to add at mu = |z_i| and is full at |z_i| - r_i; the slope counts those in between.
    """
    ends = torch.cat([size, (size - room).clamp_min(0)], 1)
    begins = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)
    mu, order = ends.sort(dim=1, descending=True)
    slope = begins.gather(1, order).cumsum(1)[:, :-1]  # between mu_j and mu_{j+1}
    f = F.pad((slope * (mu[:, :-1] - mu[:, 1:])).cumsum(1), (1, 0))  # at mu_j
    piece = ((f < eps).sum(1, keepdim=True) - 1).clamp(0, slope.shape[1] - 1)  # f(mu_piece) < eps <= f(mu_{piece+1})
    solved = mu.gather(1, piece) - (eps - f.gather(1, piece)) / slope.gather(1, piece).clamp_min(1)
    return solved.maximum(mu.gather(1, piece + 1))  # the last piece's end, 0, where z lies in the ball


def _l2_scale(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """Return 1 / (1 + mu) [B, 1] of (2) for magnitudes ``size`` and ``room`` [B, D].

    h(s) = sum_i min(s |z_i|, r_i)² rises in s; coordinate i is full from s = r_i / |z_i| on. With the full ones known,
    s = sqrt( (eps² - sum_full r_i²) / sum_free z_i² ).
    """
    fills_at, order = (room / size.clamp_min(_TINY)).clamp_max(2).sort(dim=1)  # beyond 1 nothing fills: mu >= 0
    square, room_square = size.square().gather(1, order), room.square().gather(1, order)
    free = square.flip(1).cumsum(1).flip(1)  # of this coordinate and those that fill later
    full = room_square.cumsum(1) - room_square  # of those that fill earlier
    num_full = (fills_at.square() * free + full < eps**2).sum(1, keepdim=True).clamp_max(size.shape[1] - 1)
    solved = ((eps**2 - full.gather(1, num_full)).clamp_min(0) / free.gather(1, num_full).clamp_min(_TINY**2)).sqrt()
    is_inside = torch.minimum(size, room).square().sum(1, keepdim=True) <= eps**2
    return torch.where(is_inside, 1, solved.clamp_max(1))
