"""The table of what shares claims: a new rule or base optimizer is a row here, and all claims run on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from wcitrain import optim
from wcitrain.curvature import ESTIMATORS, GaussNewton, Hutchinson, cross_entropy
from wcitrain.objectives import INPUT_REGULARIZERS, OBJECTIVES
from wcitrain.optim import RegularizedOptimizer

BASES: dict[str, Callable] = {
    "sgd": lambda params, lr=0.05: torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params, lr=0.01: torch.optim.AdamW(params, lr=lr, weight_decay=0.1),
}

LATER = optim.StrengthSchedule(start=10**6)


@dataclass(frozen=True)
class Rule:
    """Constructor arguments of the wrapper, and the documented cost of a step beyond a plain one (BatchNorm).

    ``gradients``: how often a leaf's gradient is computed beyond once; a differentiated backward counts
    double in ``backwards`` but shows once at the leaf. ``is_random``: whether the seed matters.
    """

    kwargs: dict
    forwards: int
    backwards: int
    gradients: int | None = None
    is_random: bool = True


GAUSS_NEWTON = optim.WCIPenalty(1e-3, estimator="gauss_newton")
TOP_LAYER = optim.WCIPenalty(1e-3, estimator="top_layer")
FROBENIUS = optim.FrobeniusPenalty(1e-3)
BOTH = optim.FrobeniusTracePenalty(1e-3, 1e-4, estimator="gauss_newton")
FROM_INITIAL = optim.WCIPenalty(1e-3, estimator="gauss_newton", center="initial")
L2_SP = optim.FrobeniusPenalty(1e-3, center="initial")
BOUND = optim.WCIPosterior(strength=1e-3, frobenius=True, center="initial")
ONE_PASS_FROM_INITIAL = optim.WCIPosterior(0.5, passes=1, center="initial")
WHOLE = optim.WCIPosterior(0.7, power=1.5, cap=None, size_of="network")
UNMIXED = optim.RWP(0.05, mixing=1.0)
ON_WEIGHTS = {"penalty": GAUSS_NEWTON, "layers": "weights"}
TABLES: dict[str, dict[str, type]] = {
    "perturbation": optim.PERTURBATIONS,
    "penalty": optim.PENALTIES,
    "estimator": ESTIMATORS,
    "objective": OBJECTIVES,
    "input_regularizer": INPUT_REGULARIZERS,
}

RULES: dict[str, Rule] = {
    "none": Rule({}, 0, 0, is_random=False),
    "sam": Rule({"perturbation": optim.SAM(0.05)}, 1, 1, is_random=False),
    "asam": Rule({"perturbation": optim.ASAM(0.1)}, 1, 1, is_random=False),
    "awp": Rule({"perturbation": optim.AWP(0.02)}, 1, 1, is_random=False),
    "vasso": Rule({"perturbation": optim.VaSSO(0.05)}, 1, 1, is_random=False),
    "gsam": Rule({"perturbation": optim.GSAM(0.05)}, 1, 1, is_random=False),
    "gradient norm": Rule({"perturbation": optim.GradientNorm(0.03)}, 1, 1, is_random=False),
    "cr-sam": Rule({"perturbation": optim.CRSAM()}, 2, 2, is_random=False),
    "wci adversary": Rule({"perturbation": optim.WCIAdversary(0.02)}, 1, 2),
    "rwp": Rule({"perturbation": optim.RWP(0.05)}, 1, 1),
    "rwp, unmixed": Rule({"perturbation": UNMIXED}, 0, 0),
    "noise stability": Rule({"perturbation": optim.NoiseStability(0.05)}, 1, 1),
    "wci": Rule({"perturbation": optim.WCIPosterior(0.5)}, 1, 1),
    "wci by strength": Rule({"perturbation": optim.WCIPosterior(strength=1e-3)}, 1, 1),
    "wci with frobenius": Rule({"perturbation": optim.WCIPosterior(0.5, frobenius=True)}, 1, 1),
    "wci, one pass": Rule({"perturbation": optim.WCIPosterior(0.5, passes=1)}, 0, 0),
    "wci, gauss_newton": Rule({"perturbation": optim.WCIPosterior(0.5, traces="gauss_newton")}, 1, 2),
    "wci, both": Rule({"perturbation": optim.WCIPosterior(0.5, passes=1, traces="gauss_newton")}, 0, 1),
    "wci of the network": Rule({"perturbation": WHOLE}, 1, 1),
    "wci from initial, one pass": Rule({"perturbation": ONE_PASS_FROM_INITIAL}, 0, 0),
    "wci from initial, by strength": Rule({"perturbation": BOUND}, 1, 1),
    "noise": Rule({"perturbation": optim.UniformNoise(0.5)}, 1, 1),
    "noise, one pass": Rule({"perturbation": optim.UniformNoise(0.5, passes=1)}, 0, 0),
    "wci penalty, gauss_newton": Rule({"penalty": GAUSS_NEWTON}, 0, 3, 1),
    "wci penalty, hutchinson": Rule({"penalty": optim.WCIPenalty(1e-4, estimator="hutchinson")}, 2, 6, 4),
    "wci penalty, auto": Rule({"penalty": optim.WCIPenalty(1e-3)}, 0, 3, 1),
    "wci penalty, 2 probes": Rule({"penalty": optim.WCIPenalty(1e-3, estimator=GaussNewton(2))}, 0, 6, 2),
    "wci penalty from initial": Rule({"penalty": FROM_INITIAL}, 0, 3, 1),
    "frobenius penalty from initial": Rule({"penalty": L2_SP}, 0, 0, is_random=False),
    "top layer penalty": Rule({"penalty": TOP_LAYER}, 0, 0, is_random=False),
    "frobenius penalty": Rule({"penalty": FROBENIUS}, 0, 0, is_random=False),
    "trace penalty, 2 probes": Rule({"penalty": optim.TracePenalty(1e-4, estimator=Hutchinson(2))}, 4, 12, 8),
    "frobenius and trace penalty": Rule({"penalty": BOTH}, 0, 3, 1),
    "awp and frobenius": Rule({"perturbation": optim.AWP(0.02), "penalty": FROBENIUS}, 1, 1, is_random=False),
    "wci and frobenius": Rule({"perturbation": optim.WCIPosterior(0.5), "penalty": FROBENIUS}, 1, 1),
    "awp and wci penalty": Rule({"perturbation": optim.AWP(0.02), "penalty": GAUSS_NEWTON}, 1, 4, 2),
    "sam and wci penalty": Rule({"perturbation": optim.SAM(0.05), **ON_WEIGHTS}, 1, 4, 2),
    "rwp and wci penalty": Rule({"perturbation": UNMIXED, **ON_WEIGHTS}, 0, 3, 1),
}

# Everything that must change nothing: strengths at zero, monitors, and rules whose time has not come.
IDLE: dict[str, dict] = {
    "no rule": {},
    "monitor wci": {"penalty": optim.WCIPenalty(0.0)},
    "monitor by hutchinson": {"penalty": optim.WCIPenalty(0.0, estimator=Hutchinson(2))},
    "monitor by top_layer": {"penalty": optim.WCIPenalty(0.0, estimator="top_layer")},
    "monitor trace": {"penalty": optim.TracePenalty()},
    "monitor both": {"penalty": optim.FrobeniusTracePenalty()},
    "frobenius 0": {"penalty": optim.FrobeniusPenalty()},
    "awp later": {"perturbation": optim.AWP(0.01, LATER)},
    "vasso later": {"perturbation": optim.VaSSO(schedule=LATER)},
    "gsam later": {"perturbation": optim.GSAM(schedule=LATER)},
    "wci later": {"perturbation": optim.WCIPosterior(1.0, schedule=LATER)},
    "wci later, one pass": {"perturbation": optim.WCIPosterior(0.5, passes=1, schedule=LATER)},
    "noise later": {"perturbation": optim.UniformNoise(1.0, schedule=LATER)},
    "rwp later": {"perturbation": optim.RWP(schedule=LATER)},
    "penalty later": {"penalty": optim.WCIPenalty(0.1, schedule=LATER)},
}


class BatchNormNet(nn.Module):
    """Small, with everything that has hidden state: BatchNorm, dropout, and a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(4 * 16, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + self.training
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).flatten(1))


class SmoothNet(nn.Module):
    """Small, smooth and without hidden state: every expansion holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def image_batch(n: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, 4, 4] in [0, 1] and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def wrapped(model: nn.Module, lr: float = 0.0, **options) -> RegularizedOptimizer:
    """The wrapped plain SGD of a model."""
    return RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr), model, **options)


def make(rule: dict, base: str = "sgd", seed: int = 0, **kwargs) -> tuple[nn.Module, RegularizedOptimizer]:
    """A fresh BatchNormNet (the same for the same seed) and its wrapped optimizer."""
    torch.manual_seed(seed)
    model = BatchNormNet()
    optimizer = BASES[base](model.parameters(), **kwargs)
    return model, RegularizedOptimizer(optimizer, model, **rule)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, start: int = 0) -> list[float]:
    """Train on fresh batches with the wrapper; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        x, y = image_batch(seed=100 + step)
        torch.manual_seed(1000 + step)
        losses.append(float(optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y))))
    return losses


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Clone every parameter and buffer."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bitwise, with the name of what differs."""
    assert left.keys() == right.keys()
    different = [k for k in left if not torch.equal(left[k], right[k])]
    assert not different, f"differ: {different}"
