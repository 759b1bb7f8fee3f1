"""m-sharpness: how much the loss of small batches rises, under Gaussian noise or at worst in a ball.

Legend: S a batch of m examples, L_S its mean loss, H its Hessian, u perturbation of the weights, c scales (1,
or |W| if adaptive), ρ radius, ⊙ elementwise, e = u / c.

    average = mean_S E_u L_S(W + u) − L_S(W),  u ~ N(0, ρ² c²)              → (ρ²/2) Σ_i c_i² H_ii         (1)
    worst   = mean_S max { L_S(W + u) − L_S(W) : ||u / c||_p <= ρ }         → (ρ²/2) λ_max(H ⊙ c cᵀ)       (2)

(Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and Generalization", ICML 2023,
arXiv 2302.07011.) The limits are those of small ρ; that of (2) is for p = 2, where S's own gradient is zero.

As in their code the average draws Gaussian noise of standard deviation ρ, which is no radius: the length is
about ρ ||c||; and all trainable tensors move, normalisation included. Unlike theirs: adaptive l2 ascent is
steepest in e (their code multiplies by |W| but divides by ||g||); the search is `_ascent` (theirs: APGD, 20
steps from 2ρ, momentum 0.75, halving at fixed checkpoints); logits are not normalised; batches count by size.

With a threat model and ``reattack=True`` the attack is run anew at every W + u: the rise is that of the
robust loss. With ``reattack=False`` the adversarial examples found at W are kept.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import Chunks, attack_text, attacked, held, losses_of, measuring
from wcitrain.measures.chunk_sums import chunk_mean_and_error, mean_gradient, sizes
from wcitrain.measures.measurement import Measurement
from wcitrain.params import select_layers, unwrapped
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from, seed_from

RADII = {"l2": 0.5, "linf": 0.002}  # inside the grids of the paper


def average_sharpness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    rho: float = 0.1,
    adaptive: bool = False,
    m: int = 128,
    num_draws: int = 10,
    reattack: bool = True,
    layers: str = "all",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    seed: int = 0,
) -> Measurement:
    """Measure the mean of L_S(W + d) − L_S(W) over batches S of m, d Gaussian of deviation ρ (times |W|).

    Every batch has its own draws, so the error over batches holds examples and draws; NaN for one batch.

    Args:
        rho: ρ > 0; 0.05 to 0.4 in the paper.
        adaptive: Noise in proportion to every weight's own size.
        m: Examples a batch, >= 1.
        num_draws: Draws a batch, >= 1.
        reattack: Run the attack again at every W + d.
        The others are those of ``sam_sharpness``.

    Returns:
        ``parts``: ``loss``, the mean at W.

    Raises:
        ValueError: A number out of range, and as in ``sam_sharpness``.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> average_sharpness(model, [(x, y)], None, m=32).num_examples
    64
    """
    _check("average_sharpness", rho, m=m, num_draws=num_draws)
    model = unwrapped(model)
    attack = partial(
        attacked, threat=threat, num_steps=num_steps, step_size=step_size, num_restarts=num_restarts
    )
    rises, losses = [], []
    with measuring(model):
        tensors = select_layers(model, layers).tensors
        c = _scales(tensors, adaptive)
        chunks = held(model, data, num_examples, m)
        for number, chunk in enumerate(chunks):
            starts = seed_from(seed, number)
            images = attack(model, [chunk], seed=starts)
            losses.append(float(losses_of(model, images).mean()))
            generator = generator_from(tensors[0].device, seed, "average_sharpness", number)
            draws = []
            for _ in range(num_draws):
                with perturbed(tensors, _shaped(rho * c * _normal(c, generator), tensors)) as move:
                    move(+1)
                    there = attack(model, [chunk], seed=starts) if reattack else images
                    draws.append(float(losses_of(model, there).mean()))
            rises.append(sum(draws) / num_draws - losses[-1])
    kind = f"rho {rho:g}{', adaptive' if adaptive else ''}, m {m}, {num_draws} draws"
    return _over_batches(
        "average_sharpness",
        rises,
        losses,
        chunks,
        kind,
        reattack,
        attack_text(threat, num_steps, num_restarts),
    )


def worst_sharpness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    rho: float | None = None,
    norm: str = "l2",
    adaptive: bool = False,
    m: int = 128,
    ascent_steps: int = 20,
    reattack: bool = True,
    layers: str = "all",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    seed: int = 0,
) -> Measurement:
    """Measure the largest L_S(W + u) − L_S(W) found with ||u / c||_p <= ρ, averaged over batches S of m.

    A lower estimate of the maximum, never negative (u = 0 is in the ball). The standard error is over
    batches, NaN for one. Cost a batch: ``ascent_steps + 2`` forward and backward passes, and as many attacks
    with ``reattack``, two without.

    Args:
        rho: ρ > 0; by default 0.5 in l2 and 0.002 in linf. Adaptive radii are larger.
        norm: ``"l2"`` over all selected tensors together, or ``"linf"``.
        adaptive: c = |W| instead of 1; a weight that is zero does not move.
        m: Examples a batch, >= 1.
        ascent_steps: Of the search over u, >= 1.
        reattack: Run the attack again at every W + u of the search.
        num_steps, step_size, num_restarts: Of the attack on images.
        model, data, threat, num_examples, layers, seed: As in ``sam_sharpness``.

    Returns:
        ``parts``: ``loss``, the mean at W.

    Raises:
        ValueError: A number out of range or unknown norm, and as in ``sam_sharpness``.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> worst_sharpness(model, [(x, y)], None, m=32).value > 0
    True
    """
    if norm not in RADII:
        raise ValueError(
            f"worst_sharpness.norm: got {norm!r}; expected one of {', '.join(RADII)}. Choose one of them."
        )
    radius = RADII[norm] if rho is None else rho
    _check("worst_sharpness", radius, m=m, ascent_steps=ascent_steps)
    model = unwrapped(model)
    attack = partial(
        attacked, threat=threat, num_steps=num_steps, step_size=step_size, num_restarts=num_restarts
    )
    rises, losses = [], []
    with measuring(model):
        tensors = select_layers(model, layers).tensors
        c = _scales(tensors, adaptive)
        chunks = held(model, data, num_examples, m)
        for number, chunk in enumerate(chunks):
            attack_here = partial(attack, seed=seed_from(seed, number))
            images = attack_here(model, [chunk])
            losses.append(float(losses_of(model, images).mean()))
            reattacked = partial(attack_here, model, [chunk]) if reattack else None
            objective = partial(_rise_at, model, tensors, c, images, reattacked, losses[-1])
            start = _normal(c, generator_from(tensors[0].device, seed, "worst_sharpness", number))
            rises.append(_ascent(objective, start, radius, norm, ascent_steps))
    kind = f"rho {radius:g} {norm}{', adaptive' if adaptive else ''}, m {m}, {ascent_steps} ascent steps"
    return _over_batches(
        "worst_sharpness", rises, losses, chunks, kind, reattack, attack_text(threat, num_steps, num_restarts)
    )


def _ascent(
    rise_at: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, rho: float, norm: str, num_steps: int
) -> float:
    """Return the largest rise found in the ball ||e||_p <= ρ, at least zero.

        e' = Project( e + α s(∇) ),   s(∇) = ∇/||∇|| in l2, sign ∇ in linf,   α = 2ρ at first              (3)

    from a random point of the sphere (in linf: a corner). e' is taken if the loss is higher, else α halves.
    """

    def direction(x: Tensor) -> Tensor:
        return x.sign() if norm == "linf" else x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)

    def project(x: Tensor) -> Tensor:
        return x.clamp(-rho, rho) if norm == "linf" else x * (rho / x.norm().clamp_min(rho))

    e, α = rho * direction(start), 2 * rho
    best, gradient = rise_at(e)
    for _ in range(num_steps):
        trial = project(e + α * direction(gradient))
        rise, trial_gradient = rise_at(trial)
        if rise > best:
            e, best, gradient = trial, rise, trial_gradient
        else:
            α /= 2
    return best if math.isnan(best) else max(0.0, best)


def _rise_at(
    model: nn.Module,
    tensors: Sequence[Tensor],
    c: Tensor,
    images: Chunks,
    reattack: Callable[[], Chunks] | None,
    loss: float,
    e: Tensor,
) -> tuple[float, Tensor]:
    """Return L_S(W + c ⊙ e) − ``loss`` and its gradient in e [P], at fixed or at newly attacked images."""
    with perturbed(tensors, _shaped(c * e, tensors)) as move:
        move(+1)
        value, g = mean_gradient(model, reattack() if reattack else images, tensors)
    return value - loss, c * torch.cat([x.flatten() for x in g])


def _over_batches(
    name: str, rises: list[float], losses: list[float], chunks: Chunks, kind: str, reattack: bool, attack: str
) -> Measurement:
    """Return the mean over batches with its error."""
    value, stderr = chunk_mean_and_error(rises, sizes(chunks))
    parts = {"loss": chunk_mean_and_error(losses, sizes(chunks))[0]}
    settings = f"{kind}, {attack}{'' if reattack else ', images held'}"
    return Measurement(name, value, stderr, int(sizes(chunks).sum()), settings, parts)


def _scales(tensors: Sequence[Tensor], adaptive: bool) -> Tensor:
    """Return c [P]."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    return flat.abs() if adaptive else torch.ones_like(flat)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _shaped(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``flat`` [P] as tensors like the given ones."""
    return [
        part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
    ]


def _check(where: str, rho: float, **counts: int) -> None:
    """Refuse numbers out of range."""
    if not 0 < rho < math.inf:
        raise ValueError(
            f"{where}.rho: got {rho}; expected a radius > 0. 0.1 (average), 0.5 (worst, l2) are usual."
        )
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{where}.{name}: got {value}; expected at least 1. Raise it.")
