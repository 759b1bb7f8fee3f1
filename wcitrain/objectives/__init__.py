"""Training objectives: what the adversary does with a batch, and the differentiable loss at what it found.

`objective` has the contract. Each objective is a class with its settings; the functions below are for one's own loop:

    loss = trades(model, x, y, beta=6.0, threat=ThreatModel("linf", 8 / 255))
    loss.total.backward()
"""

from typing import Any

import torch
from torch import Tensor, nn

from wcitrain.curvature.loss import Loss
from wcitrain.objectives.free import FreeAT
from wcitrain.objectives.input_regularizers import CURE, InputGradient, InputRegularizer, WithInputRegularizer
from wcitrain.objectives.misclassification import MART
from wcitrain.objectives.objective import Objective
from wcitrain.objectives.overfitting import CatastrophicOverfittingGuard
from wcitrain.objectives.pairing import ALP, TRADES
from wcitrain.objectives.plain import PGDAT, Standard
from wcitrain.objectives.rotation import RotationAT
from wcitrain.objectives.single_step import FGSMRS, GradAlign
from wcitrain.objectives.union import UnionAT

OBJECTIVES: dict[str, type] = {
    "standard": Standard,
    "pgd_at": PGDAT,
    "trades": TRADES,
    "mart": MART,
    "alp": ALP,
    "fgsm_rs": FGSMRS,
    "grad_align": GradAlign,
    "free": FreeAT,
    "rotation": RotationAT,
    "union": UnionAT,
}


def pgd_at(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, **settings: Any
) -> Loss:
    """Return the loss of PGD adversarial training on one batch; ``settings`` are those of ``PGDAT``.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> pgd_at(model, torch.rand(8, 1, 4, 4), torch.arange(8) % 3, num_steps=2).total.requires_grad
    True
    """
    return PGDAT(**settings)(model, x, y, generator)


def trades(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, **settings: Any
) -> Loss:
    """Return the TRADES loss on one batch; ``settings`` are those of ``TRADES``.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> trades(model, torch.rand(8, 1, 4, 4), torch.arange(8) % 3, beta=6.0, num_steps=2).total.requires_grad
    True
    """
    return TRADES(**settings)(model, x, y, generator)


def mart(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, **settings: Any) -> Loss:
    """Return the MART loss on one batch; ``settings`` are those of ``MART``.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> mart(model, torch.rand(8, 1, 4, 4), torch.arange(8) % 3, beta=5.0, num_steps=2).total.requires_grad
    True
    """
    return MART(**settings)(model, x, y, generator)


def alp(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, **settings: Any) -> Loss:
    """Return the loss of adversarial logit pairing on one batch; ``settings`` are those of ``ALP``.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> alp(model, torch.rand(8, 1, 4, 4), torch.arange(8) % 3, weight=0.5, num_steps=2).total.requires_grad
    True
    """
    return ALP(**settings)(model, x, y, generator)


__all__ = [
    "ALP",
    "CURE",
    "FGSMRS",
    "MART",
    "OBJECTIVES",
    "PGDAT",
    "TRADES",
    "CatastrophicOverfittingGuard",
    "FreeAT",
    "GradAlign",
    "InputGradient",
    "InputRegularizer",
    "Objective",
    "RotationAT",
    "Standard",
    "UnionAT",
    "WithInputRegularizer",
    "alp",
    "mart",
    "pgd_at",
    "trades",
]
