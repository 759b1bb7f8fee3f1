"""Adversarial training against several threat models at once.

Legend: B batch, T threat models, C classes.
"""

from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks import Attack, L1Share, LossName, Norm, NumRestarts, Start, ThreatModel, msd
from wcitrain.attacks.losses import ATTACK_LOSSES, ce
from wcitrain.curvature.loss import Loss
from wcitrain.method import Nested, Radius, StepSize, method, refuse, setting
from wcitrain.objectives import objective
from wcitrain.objectives.objective import AttackMode, LabelSmoothing, NumSteps, Objective, RandomStart


@method
class UnionThreat(ThreatModel):
    """One ball of a union, and the length of the steps in it."""

    norm: Norm = Field(description="Norm of the image perturbation.")
    eps: Radius = Field(description="Radius of the ball in [0, 1] pixel units.")
    step_size: StepSize | None = setting(None, "Length of a step; null: 2.5 eps / num_steps.")

    def scaled(self, factor: float) -> Self:
        """Return the same ball with radius and step times ``factor``; 1 returns the ball itself."""
        step_size = None if self.step_size is None else self.step_size * factor or None  # no step: no radius
        return self if factor == 1 else replace(super().scaled(factor), step_size=step_size)


@method
class UnionAT(Objective):
    """Adversarial training on the union of several balls.

        "max":      CE at the one of the T PGD adversaries' images where it is largest, for each example   (1)
        "average":  the mean of the CE at all T images                                                     (2)
        "msd":      CE at one adversary's image, every step the best of T steps (``attacks.msd``)          (3)

    For "average", ``perturb`` returns the images of all adversaries one after the other, [T·B, *dims].
    Maini et al. attack l1 with 5 to 20 coordinates a step, drawn at random, and with 50 to 100 steps; their
    CIFAR-10 radii are linf 0.03, l2 0.5, l1 12. Gauss–Newton: exact.
    """

    threats: Annotated[tuple[Annotated[UnionThreat, Nested()], ...], Field(strict=False)] = Field(
        default=(UnionThreat("linf", 8 / 255), UnionThreat("l2", 0.5)),
        description="The threat models of training, at least two; threat is that of the evaluation.",
    )
    strategy: Literal["max", "average", "msd"] = setting(
        "max", "Worst of each image, mean, or steepest step."
    )
    num_steps: NumSteps = 10
    random_start: RandomStart = True
    num_restarts: NumRestarts = 1
    attack_bn: AttackMode = "eval"
    label_smoothing: LabelSmoothing = 0.0
    attack_loss: LossName = "ce"
    l1_share: L1Share = 0.05
    label = "AT {strategy} of {norms}"
    source = "Tramèr & Boneh, arXiv 1904.13000; Maini et al., arXiv 1909.04068 (msd)"
    cost = "1 forward and 1 backward pass, for the average one for each ball; and the attacks'"

    def __post_init__(self) -> None:
        if len(self.threats) < 2:
            refuse("threats", f"got {len(self.threats)}; expected at least 2 balls. For one, use PGDAT.")
        for ball in self.threats:
            shortest, longest = ball.eps / self.num_steps * (1 - 1e-9), 2 * ball.eps * (1 + 1e-9)  # rounding
            if ball.step_size is not None and not shortest <= ball.step_size <= longest:
                text = f"got {ball.norm} with step_size {ball.step_size:g}; expected eps / num_steps to 2 eps"
                refuse("threats", f"{text}, eps = {ball.eps:g}. Change it, or leave it out.")
        if self.strategy == "msd" and (self.num_restarts != 1 or self.attack_loss == "kl"):
            got = f"got 'msd' with num_restarts {self.num_restarts}, attack_loss {self.attack_loss!r}"
            refuse("strategy", f"{got}; expected 1 restart and a loss of the labels. Change one of them.")
        objective.check_start(self.random_start, self.attack_loss)

    def __str__(self) -> str:
        return self.label.format(strategy=self.strategy, norms=", ".join(ball.norm for ball in self.threats))

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """One adversary for each threat model."""
        start: Start = "uniform" if self.random_start else "none"
        settings = start, self.num_restarts, self.attack_loss, self.l1_share
        return tuple(
            Attack(ball, self.num_steps, ball.step_for(self.num_steps, ball.step_size), *settings)
            for ball in self.threats
        )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the images of (1), (2) or (3); the model is left exactly as it was."""
        attacks, loss = self.attacks, ATTACK_LOSSES[self.attack_loss]
        with objective.attack_mode(model, self.attack_bn):
            if self.strategy == "msd":
                return msd(lambda x_adv: loss(model(x_adv), y), x, attacks, generator)
            candidates = torch.stack([attack(model, x, y, generator) for attack in attacks])
            if self.strategy == "average":
                return candidates.flatten(0, 1)
            with torch.no_grad():
                worst = torch.stack([ce(model(x_adv), y) for x_adv in candidates]).argmax(0)
            return candidates[worst, torch.arange(len(x), device=x.device)]

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x_adv``, held fixed; the targets are repeated to as many."""
        times = len(x_adv) // len(y)
        return super().loss(model, x, x_adv, y.repeat(times, *[1] * (y.ndim - 1)))

    def attack_passes(self) -> tuple[int, int]:
        """The sum over the adversaries, and T forward passes to choose the worst; "msd": K (1 + T) and K."""
        num = len(self.threats)
        if self.strategy == "msd":
            return self.num_steps * (1 + num), self.num_steps
        passes = [attack.passes() for attack in self.attacks]
        compare = num if self.strategy == "max" else 0
        return sum(forward for forward, _ in passes) + compare, sum(backward for _, backward in passes)

    def loss_passes(self) -> tuple[int, int]:
        """One forward and backward pass; for "average" over T batches."""
        times = len(self.threats) if self.strategy == "average" else 1
        return times, times

    def _lengths(self, factor: float) -> dict[str, object]:
        return {"threats": tuple(ball.scaled(factor) for ball in self.threats)}
