"""``Attack``: one adversary with all its settings, to be run on any model; and the attacks as functions."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Generator, Tensor

from wcitrain.attacks import ascent
from wcitrain.attacks.ascent import PerExampleLoss, Start
from wcitrain.attacks.losses import ATTACK_LOSSES, LossName
from wcitrain.attacks.threat import ThreatModel
from wcitrain.method import Count, Nested, NonNegative, PositiveCount, PositiveShare, method, refuse, setting

Threat = Annotated[ThreatModel, Nested(), Field(description="Norm and radius of the attack.")]
NumRestarts = Annotated[
    PositiveCount, Field(description="Independent attacks; the worst for each image counts.")
]
L1Share = Annotated[
    PositiveShare, Field(description="Share of the coordinates that an l1 step moves; other norms ignore it.")
]


@method
class Attack:
    """Projected gradient ascent on the loss (Madry et al., arXiv 1706.06083, eq. 2.1), with its settings.

        x_{k+1} = Box[ x + Project( x_k + step_size * steepest_step(grad_x loss(x_k)) - x ) ]              (1)

    linf: Box[Project(.)] is the closest point of ball and box. l2: it lies in both, but is not the closest,
    as in published l2 attacks. l1: the steps are ``sparse_step`` and the closest point of ball and box is
    taken. The last iterate is returned; of several restarts, for each example the one with the highest loss.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    >>> attack = Attack(ThreatModel("linf", 0.1), 5, step_size=0.05, start="gaussian", loss="kl")
    >>> bool((attack(model, x, y) - x).abs().max() <= 0.1 + 1e-6), attack.passes()
    (True, (6, 5))
    """

    threat: Threat
    num_steps: Count = setting(10, "Gradient steps of a restart; 0 returns the start.")
    step_size: NonNegative = setting(2 / 255, "Length of a step in the threat's norm, in pixel units.")
    start: Start = setting("uniform", "uniform in the ball; gaussian: x + 0.001 N(0, I); none: x itself.")
    num_restarts: NumRestarts = 1
    loss: LossName = "ce"
    l1_share: L1Share = 0.05

    def __post_init__(self) -> None:
        if self.loss == "kl" and self.start == "none":
            text = "got 'none' with loss='kl'; expected a start beside x, where the KL's gradient is zero."
            refuse("start", f"{text} Use start='gaussian'.")

    def __call__(
        self, model_fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """Return adversarial images for ``x`` [B, *dims], for the loss of the logits ``model_fn(x)`` [B, C].

        ``y`` are class indices [B] or soft targets [B, C]. The model's mode and statistics are the caller's.
        """
        loss, reference = ATTACK_LOSSES[self.loss], None
        if self.loss == "kl":
            with torch.no_grad():
                reference = model_fn(x)
        return self.maximise(lambda x_adv: loss(model_fn(x_adv), y, reference), x, generator)

    def maximise(self, loss_fn: PerExampleLoss, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Return adversarial images for any loss [B] of images with these settings; ``loss`` is ignored.

        They are detached, in [0, 1], and within eps of ``x`` up to rounding. ``generator`` draws the starts.

        Raises:
            ValueError: Images outside [0, 1], or a loss that is not one number per example.
        """
        ascent.check_images(x, "pgd")
        x = x.detach()
        worst, worst_loss = x, None
        for _ in range(self.num_restarts):
            x_adv = ascent.starting_point(x, self.threat, self.start, generator)
            for _ in range(self.num_steps):
                gradient = ascent.input_gradient(loss_fn, x_adv)
                x_adv = ascent.ascend(x, x_adv, gradient, self.threat, self.step_size, self.l1_share)
            if self.num_restarts == 1:
                return x_adv
            with torch.no_grad():
                loss = loss_fn(x_adv)
            if worst_loss is None:
                worst, worst_loss = x_adv, loss
            else:
                is_worse = loss > worst_loss
                worst = torch.where(is_worse.reshape(-1, *[1] * (x.ndim - 1)), x_adv, worst)
                worst_loss = torch.where(is_worse, loss, worst_loss)
        return worst

    def passes(self) -> tuple[int, int]:
        """Return the forward and backward passes of a call; to compare restarts takes a forward each."""
        compare = self.num_restarts if self.num_restarts > 1 else 0
        steps = self.num_steps * self.num_restarts
        return steps + compare + (self.loss == "kl"), steps


def pgd(loss_fn: PerExampleLoss, x: Tensor, *, generator: Generator | None = None, **settings: Any) -> Tensor:
    """Return ``Attack(**settings).maximise(loss_fn, x, generator)``, projected gradient ascent."""
    return Attack(**settings).maximise(loss_fn, x, generator)


def fgsm(loss_fn: PerExampleLoss, x: Tensor, *, threat: ThreatModel, **settings: Any) -> Tensor:
    """Return one step of ``pgd``, by default from x and of length eps (Goodfellow et al., arXiv 1412.6572).

    With ``start="uniform"`` and ``step_size=1.25 * eps`` it is FGSM-RS (Wong et al., arXiv 2001.03994).
    """
    own: dict[str, Any] = {"num_steps": 1, "step_size": threat.eps, "start": "none"}
    return pgd(loss_fn, x, threat=threat, **own | settings)


def msd(
    loss_fn: PerExampleLoss, x: Tensor, attacks: Sequence[Attack], generator: Generator | None = None
) -> Tensor:
    """Multi steepest descent on a union of balls (Maini, Wong & Kolter 2020, arXiv 1909.04068, eq. 7 to 9).

        x_{k+1} = argmax over t of loss( x_k^t ),  x_k^t = step (1) of attack t from x_k, in its ball      (2)

    for each example, so the result lies in the union. The l1 step is ``sparse_step`` (the authors draw 5 to
    20 coordinates at random). ``num_steps`` and ``start`` are the first attack's; an example starts in the
    ball of an attack drawn for it. Cost for T attacks: ``num_steps`` (1 + T) forward, ``num_steps`` backward
    passes.
    """
    ascent.check_images(x, "msd")
    x = x_adv = x.detach()
    rows = torch.arange(len(x), device=x.device)
    if (start := attacks[0].start) != "none":
        starts = torch.stack([ascent.starting_point(x, a.threat, start, generator) for a in attacks])
        device = generator.device if generator is not None else x.device
        drawn = torch.randint(len(attacks), (len(x),), generator=generator, device=device)
        x_adv = starts[drawn.to(x.device), rows]
    for _ in range(attacks[0].num_steps):
        gradient = ascent.input_gradient(loss_fn, x_adv)
        steps = [ascent.ascend(x, x_adv, gradient, a.threat, a.step_size, a.l1_share) for a in attacks]
        with torch.no_grad():
            best = torch.stack([loss_fn(step) for step in steps]).argmax(0)
        x_adv = torch.stack(steps)[best, rows]
    return x_adv
