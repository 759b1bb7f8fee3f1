"""``msd``: one attack on a union of balls. Legend: as in ``ascent``."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from wcitrain.attacks.ascent import (
    Attack,
    Mode,
    PerExampleLoss,
    Target,
    ascend,
    attacking,
    check_images,
    check_target,
    input_gradient,
    starting_point,
)
from wcitrain.preserve import normal, watched


def msd(
    target: Target,
    x: Tensor,
    y: Tensor | None = None,
    attacks: Sequence[Attack] = (),
    generator: Generator | None = None,
    *,
    model: nn.Module | None = None,
    attack_bn: Mode = "eval",
) -> Tensor:
    """Multi steepest descent on a union of balls (Maini, Wong & Kolter 2020, arXiv 1909.04068, eq. 7 to 9).

        x_{k+1} = argmax over t of loss( x_k^t ),  x_k^t = step (1) of attack t from x_k, in its ball      (2)

    for each example, so the result lies in the union. ``num_steps`` and ``start`` are the first attack's; an
    example starts in the ball of an attack drawn for it, and a model has the first attack's loss. What is
    attacked, and how it is protected: as in ``pgd``, ``msd(loss_fn, x, attacks=...)`` without labels. Cost
    for T attacks: ``num_steps`` (1 + T) forward, ``num_steps`` backward passes.
    """
    check_target(target, y, "msd")
    if not attacks:
        raise ValueError("msd: got no attacks; expected at least one. Use msd(loss_fn, x, attacks=[...]).")
    check_images(x, "msd")
    with attacking(model if y is None else target, x, generator, attack_bn) as starts:
        loss_fn = watched(target, "msd") if y is None else attacks[0].loss_of(target, x, y)
        return _msd(loss_fn, normal(x), attacks, starts)


def _msd(
    loss_fn: PerExampleLoss, x: Tensor, attacks: Sequence[Attack], generator: Generator | None
) -> Tensor:
    """Return (2) for a loss that leaves no trace."""
    x = x_adv = x.detach()
    rows = torch.arange(len(x), device=x.device)
    if (start := attacks[0].start) != "none":
        starts = torch.stack([starting_point(x, a.threat, start, generator) for a in attacks])
        device = generator.device if generator is not None else x.device
        drawn = torch.randint(len(attacks), (len(x),), generator=generator, device=device)
        x_adv = starts[drawn.to(x.device), rows]
    for _ in range(attacks[0].num_steps):
        gradient = input_gradient(loss_fn, x_adv)
        steps = [ascend(x, x_adv, gradient, a.threat, a.step_size) for a in attacks]
        with torch.no_grad():
            best = torch.stack([loss_fn(step) for step in steps]).argmax(0)
        x_adv = torch.stack(steps)[best, rows]
    return x_adv
