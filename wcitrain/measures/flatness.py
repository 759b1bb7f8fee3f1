"""Robust flatness: how much the robust loss rises when the weights move at random, or in the worst way.

Legend: N examples, D draws, L layers, W_l weights, a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l), ν
perturbation of the weights, δ of the images, ξ relative radius, ℓ cross-entropy, B_ξ(W) ball of `strongest`.

    R(W) = (1/N) Σ_n max_{δ_n} ℓ(x_n + δ_n; W)                                                             (1)
    average flatness = E_ν R(W + ν) − R(W),     worst flatness = max_{ν in B_ξ(W)} R(W + ν) − R(W)         (2)

(Stutz, Hein & Schiele, "Relating Adversarially Robust Generalization to Flat Minima", ICCV 2021, section 3.)
With the adversarial examples held fixed, and up to order ξ⁴ since odd orders vanish in the mean,

    average flatness = (ξ²/2) Σ_l k_l a_l t_l / d_l,  k_l = 1 (sphere), d_l/(d_l + 2) (ball), 1/3 (radius) (3)

whose summand is WCI_l² / d_l (smooth networks; kinks that ν crosses add to it). Both measures are unchanged
when scale moves between layers of a network of piecewise linear units.

The paper's text and the code behind its figures differ; ``protocol`` sets these options, a given one wins.

| option        | ``"paper"``                             | ``"code"``                        |
|---------------|-----------------------------------------|-----------------------------------|
| ``sampler``   | ``"ball"``: ||ν_l|| <= ξ ||W_l||        | ``"sphere"``: ||ν_l|| = ξ ||W_l|| |
| ``shared_nu`` | False: a new ν for every chunk          | True: one ν for all examples      |
| ``weight_lr`` | 0.001                                   | 0.01 (both beyond the default ξ)  |
| ``keep``      | ``"best"`` iterate (the text is silent) | ``"last"`` iterate                |

Both: cross-entropy, eval mode, weights and biases as layers of their own, no normalisation parameters, PGD-20
with step 0.007 at eps 8/255 (0.223 eps here), one start, reference R(W) by ten, the best iterate of each
example kept, chunks of 128 examples.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import attack_text, held, mean_and_error, measuring
from wcitrain.measures.flatness_protocol import check_choice, check_numbers, protocol_options
from wcitrain.measures.measurement import Measurement
from wcitrain.measures.strongest import Adversary, attack_step, draw_perturbation, joint_ascent
from wcitrain.params import select_layers, unwrapped
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

STATISTICS = ("mean", "max")


def average_flatness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    xi: float = 0.5,
    num_draws: int = 10,
    protocol: str = "paper",
    sampler: str | None = None,
    shared_nu: bool | None = None,
    statistic: str = "mean",
    layers: str = "weights+biases",
    num_steps: int = 20,
    step_size: float | None = None,
    num_restarts: int = 1,
    reference_restarts: int = 10,
    chunk_size: int = 128,
    seed: int = 0,
) -> Measurement:
    """Measure the mean rise (2) of the robust loss under random weight perturbations, each attacked anew.

    All attacks on a chunk begin at the same random starts. Cost: ``num_draws * num_restarts +
    reference_restarts`` attacks of ``num_steps`` forward and backward passes.

    The standard error adds the variance over examples, of each one's mean rise, to the variance over draws,
    of each one's mean rise: both the examples and the perturbations are samples. (Their interaction counts
    twice, slightly too much.)

    Args:
        model: Gives logits [N, C] for images in [0, 1].
        data: Iterable of (x, y, ...).
        threat: The adversary; None measures the flatness of the clean loss.
        num_examples: How many, by default all; 1000 in the paper.
        xi: ξ, relative radius, > 0.
        num_draws: D, >= 1.
        protocol: ``"paper"`` or ``"code"``: defaults of the next two, see the table above.
        sampler: ``"sphere"``, ``"ball"`` or ``"radius"``, (3) of `strongest`.
        shared_nu: Whether a draw is one ν for all examples, or one for each chunk.
        statistic: ``"mean"`` over draws, or their ``"max"`` (of means over examples, with that error).
        layers: See ``params.select_layers``.
        num_steps, step_size, num_restarts: Of the attack; the step is 0.223 eps by default.
        reference_restarts: Restarts of the attack at W.
        chunk_size: Examples attacked at once, and sharing a ν where it is not shared by all.
        seed: Of starts and perturbations.

    Returns:
        ``parts``: ``reference_loss`` R(W), ``perturbed_loss`` mean of R(W + ν), ``max`` over draws of the
        rise, ``stderr_examples``, ``stderr_draws``. With one draw the error of the mean is unknown (NaN).

    Raises:
        ValueError: An argument out of range; no examples; images outside [0, 1] under attack.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> result = average_flatness(model, [(x, y)], ThreatModel(eps=0.1), num_steps=2)
    >>> result.num_examples, sorted(result.parts)[0]
    (64, 'max')
    """
    options = protocol_options("average_flatness", protocol, sampler=sampler, shared_nu=shared_nu)
    check_choice("average_flatness.statistic", statistic, STATISTICS)
    check_numbers(
        "average_flatness",
        xi,
        num_draws=num_draws,
        num_steps=num_steps,
        num_restarts=num_restarts,
        reference_restarts=reference_restarts,
        chunk_size=chunk_size,
    )
    model = unwrapped(model)
    with measuring(model):
        selected = select_layers(model, layers)
        chunks = held(model, data, num_examples, chunk_size)
        attack = Adversary(threat, num_steps, attack_step(threat, step_size), seed)
        reference = torch.cat([attack(model, chunks, k, reference_restarts) for k in range(len(chunks))])
        rows = []
        for draw in range(num_draws):
            losses = []
            for k in range(len(chunks)):
                place = 0 if options["shared_nu"] else k
                generator = generator_from(selected.tensors[0].device, seed, "average_flatness", draw, place)
                with perturbed(
                    selected.tensors, draw_perturbation(selected, xi, options["sampler"], generator)
                ) as move:
                    move(+1)
                    losses.append(attack(model, chunks, k, num_restarts))
            rows.append(torch.cat(losses))
    rises = torch.stack(rows) - reference  # [D, N]
    by_example, by_draw = mean_and_error(rises.mean(0)), mean_and_error(rises.mean(1))
    largest = rises[rises.mean(1).argmax()]
    parts = {
        "reference_loss": float(reference.mean()),
        "perturbed_loss": float(torch.stack(rows).mean()),
        "max": float(largest.mean()),
        "stderr_examples": by_example[1],
        "stderr_draws": by_draw[1],
    }
    value, stderr = by_example[0], math.hypot(by_example[1], by_draw[1])
    if statistic == "max":
        value, stderr = mean_and_error(largest)
    kind = f"one nu a {'draw' if options['shared_nu'] else 'chunk'}"
    settings = f"xi {xi:g}, {statistic} of {num_draws} draws, {options['sampler']}, {kind}, " + attack_text(
        threat, num_steps, num_restarts
    )
    return Measurement("average_flatness", value, stderr, len(reference), settings, parts)


def worst_flatness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    xi: float = 0.00075,
    num_restarts: int = 10,
    protocol: str = "paper",
    sampler: str | None = None,
    shared_nu: bool | None = None,
    weight_lr: float | None = None,
    keep: str | None = None,
    layers: str = "weights+biases",
    num_steps: int = 20,
    step_size: float | None = None,
    reference_restarts: int = 10,
    chunk_size: int = 128,
    seed: int = 0,
) -> Measurement:
    """Measure the largest rise (2) of the robust loss in the ball: joint ascent on ν and δ, `strongest` (4).

    Both steps use the gradients at the same (ν, δ). With one ν for all examples the chunks take turns,
    ``num_steps`` rounds. Of the restarts the one with the highest mean loss counts: of the chunk where a
    chunk has its own ν, of all examples otherwise.

    The value is a lower estimate of the maximum; where 2 ξ > ``weight_lr * num_steps`` the ball is not even
    crossed, which the result's ``settings`` say: raise one of the two with ξ. It can be negative for small ξ:
    the reference has more restarts, and an example its own best iterate. The standard error is that over
    examples of the rise at the ν found, ν taken as given: what another search would find is not in it.

    Args:
        model, data, threat, num_examples, layers, reference_restarts, chunk_size: As in ``average_flatness``.
        xi: ξ > 0; 0.00075 in the paper's main table, 0.003 in its supplement.
        num_restarts: Attempts, >= 1.
        protocol, sampler (of the first ν), shared_nu, weight_lr, keep: See the table above.
        num_steps, step_size: Of the ascent and the reference's attack; default step on images 0.223 eps.
        seed: Of starts.

    Returns:
        ``parts``: ``reference_loss``, ``perturbed_loss``.

    Raises:
        ValueError: As ``average_flatness``.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> result = worst_flatness(model, [(x, y)], None, xi=0.1, num_restarts=1)
    >>> result.value > 0
    True
    """
    options = protocol_options(
        "worst_flatness", protocol, sampler=sampler, shared_nu=shared_nu, weight_lr=weight_lr, keep=keep
    )
    check_numbers(
        "worst_flatness",
        xi,
        num_steps=num_steps,
        num_restarts=num_restarts,
        reference_restarts=reference_restarts,
        chunk_size=chunk_size,
    )
    model = unwrapped(model)
    with measuring(model):
        selected = select_layers(model, layers)
        chunks = held(model, data, num_examples, chunk_size)
        attack = Adversary(threat, num_steps, attack_step(threat, step_size), seed)
        reference = torch.cat([attack(model, chunks, k, reference_restarts) for k in range(len(chunks))])
        groups = [list(chunks)] if options["shared_nu"] else [[chunk] for chunk in chunks]
        found = []
        for number, group in enumerate(groups):
            attempts = torch.stack(  # [R, n]
                [
                    joint_ascent(
                        model,
                        selected,
                        group,
                        attack,
                        xi=xi,
                        sampler=options["sampler"],
                        weight_lr=options["weight_lr"],
                        keep=options["keep"],
                        generator=generator_from(
                            selected.tensors[0].device, seed, "worst_flatness", number, restart
                        ),
                    )
                    for restart in range(num_restarts)
                ]
            )
            found.append(attempts[attempts.mean(1).argmax()])
    worst = torch.cat(found)
    value, stderr = mean_and_error(worst - reference)
    parts = {"reference_loss": float(reference.mean()), "perturbed_loss": float(worst.mean())}
    kind = f"one nu {'for all' if options['shared_nu'] else 'a chunk'}"
    reach = f"weight_lr {options['weight_lr']:g}"
    if options["weight_lr"] * num_steps < 2 * xi:
        reach += " (too short to cross the ball)"
    settings = (
        f"xi {xi:g}, {num_restarts} restarts, {kind}, {options['keep']} iterate, {reach}, joint "
        + attack_text(threat, num_steps)
    )
    return Measurement("worst_flatness", value, stderr, len(worst), settings, parts)
