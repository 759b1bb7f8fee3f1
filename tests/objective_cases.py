"""The table of objectives: a new objective is a new row here, and all shared claims then run on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import BatchNormNet
from torch import nn

from wcitrain import ALP, CURE, FGSMRS, MART, PGDAT, TRADES, FreeAT, GradAlign, InputGradient
from wcitrain.attacks import ThreatModel
from wcitrain.objectives import RotationAT, Standard, UnionAT, UnionThreat, WithInputRegularizer

LINF = ThreatModel("linf", 0.1)
BALLS = (UnionThreat("linf", 0.1), UnionThreat("l2", 0.5), UnionThreat("l1", 2.0))
FEW = {"threat": LINF, "num_steps": 3, "step_size": 0.05}


@dataclass(frozen=True)
class Case:
    """How to make an objective, and its documented cost in forward and backward passes over B images."""

    make: Callable
    attack: tuple[int, int]
    loss: tuple[int, int]
    is_exact: bool = False  # Gauss–Newton is the Hessian where the network is piecewise linear in each layer
    is_gradient: bool = True  # nothing is detached that depends on the weights


OBJECTIVE_CASES: dict[str, Case] = {
    "standard": Case(Standard, (0, 0), (1, 1), True),
    "standard, smoothed": Case(lambda: Standard(label_smoothing=0.1), (0, 0), (1, 1), True),
    "pgd_at": Case(lambda: PGDAT(**FEW), (3, 3), (1, 1), True),
    "pgd_at, margin": Case(lambda: PGDAT(**FEW, attack_loss="margin"), (3, 3), (1, 1), True),
    "pgd_at, l1, train mode": Case(
        lambda: PGDAT(ThreatModel("l1", 2.0), 3, 1.0, attack_bn="train", attack_loss="dlr"),
        (4, 3), (1, 1), True
    ),
    "trades": Case(lambda: TRADES(**FEW), (4, 3), (2, 2)),
    "trades, l2, ce": Case(lambda: TRADES(ThreatModel("l2", 0.5), 3, 0.2, attack_loss="ce"), (3, 3), (2, 2)),
    "trades, 2 clean passes": Case(lambda: TRADES(**FEW, clean_passes=2), (4, 3), (3, 2)),
    "mart": Case(lambda: MART(**FEW), (3, 3), (2, 2)),
    "alp": Case(lambda: ALP(**FEW), (3, 3), (2, 2), True),
    "fgsm_rs": Case(lambda: FGSMRS(LINF), (1, 1), (1, 1), True),
    "grad_align": Case(lambda: GradAlign(LINF), (1, 1), (3, 4), is_gradient=False),
    "free": Case(lambda: FreeAT(LINF), (0, 0), (1, 1), True),
    "rotation": Case(lambda: RotationAT(**FEW), (6, 6), (2, 2), True),
    "union, max": Case(lambda: UnionAT(BALLS, "max", 3), (13, 9), (1, 1), True),
    "union, average": Case(lambda: UnionAT(BALLS, "average", 3), (10, 9), (3, 3), True),
    "union, msd": Case(lambda: UnionAT(BALLS, "msd", 3), (12, 3), (1, 1), True),
    "pgd_at with cure": Case(lambda: WithInputRegularizer(PGDAT(**FEW), CURE()), (3, 3), (3, 5)),
    "standard with input gradient": Case(
        lambda: WithInputRegularizer(Standard(), InputGradient()), (0, 0), (2, 3)
    ),
    "standard with l1 input gradient": Case(
        lambda: WithInputRegularizer(Standard(), InputGradient(norm="l1")), (0, 0), (2, 3)
    ),
    "trades with cure": Case(lambda: WithInputRegularizer(TRADES(**FEW), CURE()), (4, 3), (4, 6)),
}  # fmt: skip


class TwoHeads(BatchNormNet):
    """BatchNorm and dropout, and a head that tells rotations apart."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation = nn.Linear(4 * 16, 4)

    def forward(self, x: torch.Tensor, head: str = "classes") -> torch.Tensor:
        features = self.drop(torch.relu(self.bn(self.conv(x)))).flatten(1)
        return self.fc(features) if head == "classes" else self.rotation(features)


class SmallNet(nn.Module):
    """Two layers and heads without hidden state: smooth with ``tanh``, piecewise linear with ``relu``."""

    def __init__(self, activation: Callable = torch.tanh, scale: float = 1.0) -> None:
        super().__init__()
        self.activation, self.scale = activation, scale
        self.first, self.second, self.rotation = nn.Linear(16, 6), nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, head: str = "classes") -> torch.Tensor:
        features = self.activation(self.first(self.scale * x.flatten(1)))
        return self.second(features) if head == "classes" else self.rotation(features)


def balls_of(objective: object) -> list[ThreatModel]:
    """The threat models one of which every perturbation must obey."""
    if isinstance(objective, UnionAT):
        return list(objective.threats)
    threat = getattr(objective, "threat", None)
    return [ThreatModel("linf", 0.0) if threat is None else threat]


def is_in_ball(delta: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    """Whether each perturbation is in the ball, up to the float32 rounding of x + delta."""
    flat = delta.flatten(1)
    size = {"linf": flat.abs().amax(1), "l2": flat.norm(dim=1), "l1": flat.abs().sum(1)}[threat.norm]
    return size <= threat.eps + 1e-6 * (1 if threat.norm == "linf" else flat.shape[1])
