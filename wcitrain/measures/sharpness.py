"""Sharpness along one ascent step: what SAM, ASAM and AWP see of the loss.

Legend: g gradient of the mean loss L of all examples in the selected tensors, W_l a layer's weights.

    sharpness = L(W + u) − L(W)                                                                            (1)

| measure          | u                                            | length                                  |
|------------------|----------------------------------------------|-----------------------------------------|
| `sam_sharpness`  | ρ g / ||g||                                  | ρ over all tensors together             |
| `asam_sharpness` | ρ T² g / ||T g||, T = |W| + η (1 for biases) | ρ, each weight in units of its own size |
| `awp_sharpness`  | γ ||W_l|| g_l / ||g_l||                      | γ ||W_l|| in every layer                |

The steps are those of the optimizers of the same name (`optim.ascent`), which take the gradient of a batch;
here it is that of all examples, in eval mode. At a point that is not stationary the first is about ρ ||g||.

With a threat model and ``reattack=True`` the attack is run anew at W + u: (1) is the rise of the robust loss.
With ``reattack=False`` the adversarial examples found at W are kept, as optimizers do within a step.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import (
    Chunks,
    attack_text,
    attacked,
    held,
    losses_of,
    mean_and_error,
    measuring,
)
from wcitrain.measures.chunk_sums import mean_gradient
from wcitrain.measures.measurement import Measurement
from wcitrain.optim.ascent import ASAM, AWP, SAM, Ascent
from wcitrain.params import select_layers, unwrapped
from wcitrain.preserve import perturbed


def sam_sharpness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    rho: float = 0.05,
    reattack: bool = True,
    layers: str = "all",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure the rise (1) at SAM's ascent step u = ρ g/||g|| (Foret et al., arXiv 2010.01412, eq. 2).

    Cost: two attacks and three passes, one of them backward.

    Args:
        model: Gives logits [N, C] for images in [0, 1].
        data: Iterable of (x, y, ...).
        threat: The adversary; None measures the clean loss.
        num_examples: How many, by default all.
        rho: ρ > 0, length of the step.
        reattack: Run the attack again at W + u.
        layers: Which tensors move, see ``params.select_layers``.
        num_steps, step_size, num_restarts: Of PGD; the step is 2.5 eps / num_steps by default.
        chunk_size: Examples at once.
        seed: Of the attack's starts, the same at W and at W + u.

    Returns:
        ``parts``: ``loss``, ``perturbed_loss``. The standard error is over examples of their own rise, the
        step taken as given.

    Raises:
        ValueError: A radius that is not positive; no examples; images outside [0, 1] under attack.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> sam_sharpness(model, [(x, y)], None).value > 0
    True
    """
    _check("sam_sharpness.rho", rho)
    attack = partial(
        attacked,
        threat=threat,
        num_steps=num_steps,
        step_size=step_size,
        num_restarts=num_restarts,
        seed=seed,
    )
    text = f"rho {rho:g}, {attack_text(threat, num_steps, num_restarts)}"
    return _rise(
        "sam_sharpness", SAM(rho), model, data, attack, num_examples, layers, chunk_size, reattack, text
    )


def asam_sharpness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    rho: float = 0.5,
    eta: float = 0.0,
    reattack: bool = True,
    layers: str = "all",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure the rise (1) at ASAM's ascent step u = ρ T² g/||T g|| (Kwon et al., arXiv 2102.11600, eq. 9).

    With ``eta=0`` and ``layers="weights"`` it is unchanged by rescalings of weights that keep the function.

    Args:
        rho: ρ > 0, length of the step in units of T = |W| + η; T is 1 for tensors not named weight.
        eta: η >= 0; training uses 0.01.
        The others, the result and the errors are those of ``sam_sharpness``.
    """
    _check("asam_sharpness.rho", rho)
    attack = partial(
        attacked,
        threat=threat,
        num_steps=num_steps,
        step_size=step_size,
        num_restarts=num_restarts,
        seed=seed,
    )
    text = f"rho {rho:g}, eta {eta:g}, {attack_text(threat, num_steps, num_restarts)}"
    return _rise(
        "asam_sharpness",
        ASAM(rho, eta),
        model,
        data,
        attack,
        num_examples,
        layers,
        chunk_size,
        reattack,
        text,
    )


def awp_sharpness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    gamma: float = 0.01,
    reattack: bool = True,
    layers: str = "weights",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure the rise (1) at AWP's step u_l = γ ||W_l|| g_l/||g_l|| (Wu et al., arXiv 2004.05884, eq. 9-12).

    Unchanged when scale moves between layers. Model in eval mode, where AWP's proxy is in train mode.

    Args:
        gamma: γ > 0, relative to each layer's norm.
        The others, the result and the errors are those of ``sam_sharpness``.
    """
    _check("awp_sharpness.gamma", gamma)
    attack = partial(
        attacked,
        threat=threat,
        num_steps=num_steps,
        step_size=step_size,
        num_restarts=num_restarts,
        seed=seed,
    )
    text = f"gamma {gamma:g}, {attack_text(threat, num_steps, num_restarts)}"
    return _rise(
        "awp_sharpness", AWP(gamma), model, data, attack, num_examples, layers, chunk_size, reattack, text
    )


def _rise(
    name: str,
    rule: Ascent,
    model: nn.Module,
    data: Iterable[Any],
    attack: Callable[[nn.Module, Chunks], Chunks],
    num_examples: int | None,
    layers: str,
    chunk_size: int,
    reattack: bool,
    settings: str,
) -> Measurement:
    """Return (1) for the rule's ascent step."""
    model = unwrapped(model)
    with measuring(model):
        selected = select_layers(model, layers)
        clean = held(model, data, num_examples, chunk_size)
        images = attack(model, clean)
        before = losses_of(model, images)
        _, g = mean_gradient(model, images, selected.tensors)
        with perturbed(selected.tensors, rule.displacement(selected, g, 1.0, None)) as move:
            move(+1)
            after = losses_of(model, attack(model, clean) if reattack else images)
    value, stderr = mean_and_error(after - before)
    parts = {"loss": float(before.mean()), "perturbed_loss": float(after.mean())}
    return Measurement(
        name,
        value,
        stderr,
        len(before),
        f"layers {layers}, {settings}{'' if reattack else ', images held'}",
        parts,
    )


def _check(where: str, radius: float) -> None:
    """Refuse a step that is none."""
    if not 0 < radius < math.inf:
        raise ValueError(
            f"{where}: got {radius}; expected a radius > 0. 0.05 (sam), 0.5 (asam), 0.01 (awp) are usual."
        )
