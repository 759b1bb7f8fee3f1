"""Adversarial training against several threat models at once.

Legend: B batch, T threat models, C classes.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from wcitrain.attacks import Attack, ThreatModel, attack_loss, msd
from wcitrain.curvature.loss import Loss
from wcitrain.objectives.objective import AttackMode, OneStepPerBatch, attacked, check_settings
from wcitrain.objectives.terms import class_loss

Strategy = Literal["max", "average", "msd"]


@dataclass(frozen=True)
class UnionAT(OneStepPerBatch):
    """Robustness to the union of T balls (Tramèr & Boneh 2019, arXiv 1904.13000, eq. 2, 3; Maini et al. 2020, 1909.04068).

        "max":      CE at the worst of the T PGD adversaries' images, chosen for each example by its cross-entropy          (1)
        "average":  the mean of the CE at all T images                                                                      (2)
        "msd":      CE at one adversary's image, whose every step is the best of T steps (``attacks.msd``)                  (3)

    For "average", ``perturb`` returns the images of all adversaries one after the other, [T·B, *dims].
    What differs: Maini et al. attack l1 with 5 to 20 coordinates a step, drawn at random, and with 50 to 100 steps; here with a
    fixed share, and every adversary takes as many steps. Their radii on CIFAR-10 are the defaults, with linf 0.03.

    Cost of the loss: (1, 1) passes, for "average" (T, T). Gauss–Newton: exact.

    Args:
        threats: Pairs of a threat model and its step size (None: 2.5 eps / num_steps), at least one.
        strategy: As above.
        num_steps, random_start, num_restarts: Of every adversary, see ``attacks.pgd``; "msd" has no restarts.
        attack_bn, label_smoothing, attack_loss, l1_share: See ``PGDAttacked``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> threats = ((ThreatModel("linf", 0.1), None), (ThreatModel("l2", 0.5), None))
        >>> [UnionAT(threats, strategy, num_steps=2).perturb(model, x, y).shape[0] for strategy in ("max", "average", "msd")]
        [8, 16, 8]
    """

    threats: tuple[tuple[ThreatModel, float | None], ...] = (
        (ThreatModel("linf", 8 / 255), None),
        (ThreatModel("l2", 0.5), None),
        (ThreatModel("l1", 12.0), None),
    )
    strategy: Strategy = "max"
    num_steps: int = 10
    random_start: bool = True
    num_restarts: int = 1
    attack_bn: AttackMode = "eval"
    label_smoothing: float = 0.0
    attack_loss: str = "ce"
    l1_share: float = 0.05

    def __post_init__(self) -> None:
        check_settings(self)
        if self.strategy not in get_args(Strategy):
            raise ValueError(
                f"UnionAT.strategy: got {self.strategy!r}; expected one of {', '.join(get_args(Strategy))}."
            )
        if not self.threats:
            raise ValueError("UnionAT.threats: got none; expected at least one pair of a threat model and a step size.")
        if self.strategy == "msd" and (self.num_restarts != 1 or self.attack_loss == "kl"):
            raise ValueError(
                f"UnionAT: got strategy='msd' with num_restarts={self.num_restarts}, attack_loss={self.attack_loss!r}; expected "
                "1 restart and a loss of the labels. Choose another strategy."
            )
        _ = self.attacks  # refuses what it cannot run

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """One adversary for each threat model."""
        return tuple(
            Attack(
                threat,
                num_steps=self.num_steps,
                step_size=2.5 * threat.eps / max(self.num_steps, 1) if step_size is None else step_size,
                start="uniform" if self.random_start else "none",
                num_restarts=self.num_restarts,
                loss=self.attack_loss,
                l1_share=self.l1_share,
            )
            for threat, step_size in self.threats
        )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the images of (1), (2) or (3); the model is left exactly as it was."""
        with attacked(model, self.attack_bn):
            if self.strategy == "msd":
                loss = attack_loss(self.attack_loss)
                return msd(
                    lambda x_adv: loss(model(x_adv), y),
                    x,
                    threats=[attack.threat for attack in self.attacks],
                    step_sizes=[attack.step_size for attack in self.attacks],
                    num_steps=self.num_steps,
                    random_start=self.random_start,
                    l1_share=self.l1_share,
                    generator=generator,
                )
            found = torch.stack([attack(model, x, y, generator) for attack in self.attacks])
            if self.strategy == "average" or len(found) == 1:
                return found.flatten(0, 1)
            with torch.no_grad():
                worst = torch.stack([attack_loss("ce")(model(x_adv), y) for x_adv in found]).argmax(0)
            return found[worst, torch.arange(len(x), device=x.device)]

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x_adv``, held fixed; the targets are repeated to as many."""
        times = len(x_adv) // len(y)
        return class_loss(model(x_adv), y.repeat(times, *[1] * (y.ndim - 1)), self.label_smoothing)

    def attack_passes(self) -> tuple[int, int]:
        """The sum over the adversaries, and T forward passes to choose the worst; "msd": K (1 + T) and K."""
        num = len(self.threats)
        if self.strategy == "msd":
            return self.num_steps * (1 + num), self.num_steps
        passes = [attack.passes() for attack in self.attacks]
        compare = num if self.strategy == "max" and num > 1 else 0
        return sum(forward for forward, _ in passes) + compare, sum(backward for _, backward in passes)

    def loss_passes(self) -> tuple[int, int]:
        """One forward and backward pass; for "average" over T batches."""
        times = len(self.threats) if self.strategy == "average" else 1
        return times, times

    def scaled(self, factor: float) -> Self:
        """Return the objective with all radii and steps times ``factor``; 1 returns the objective itself."""
        if factor == 1:
            return self
        threats = tuple((t.scaled(factor), None if step is None else step * factor) for t, step in self.threats)
        return replace(self, threats=threats)
