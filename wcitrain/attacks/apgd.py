"""``APGD``: ascent that chooses its own steps, the gradient attack of AutoAttack.

Croce & Hein 2020, arXiv 2003.01690, algorithm 1; for l1 Croce & Hein 2021, arXiv 2103.01208.
Legend: as in ``ascent``; N steps, x_k an iterate, x_max that of the highest loss so far, g_k the gradient,
s(.) the step of ``steepest_step``, P the projection on ball and box. On the same starts the iterates are
those of the authors' code (package ``autoattack``) up to rounding; in l1 theirs counts coordinates that only
rounding has moved.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks.ascent import (
    Mode,
    PerExampleLoss,
    Threat,
    ascend,
    attacking,
    check_images,
    loss_and_gradient,
    starting_point,
    worst_of,
)
from wcitrain.attacks.losses import ATTACK_LOSSES, targeted_dlr
from wcitrain.attacks.threat import LARGEST_EPS, ThreatModel, norms, project, shaped, sparse_sign
from wcitrain.method import PositiveCount, method, setting
from wcitrain.preserve import normal, watched

# images -> losses [B], and whether each fools the model [B]
Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
APGDLoss = Annotated[
    Literal["ce", "margin", "dlr", "targeted-dlr"],
    Field(description="What it maximises: cross-entropy, margin, DLR, or DLR towards each of num_targets."),
]
LEAST_CLASSES = {"dlr": 3, "targeted-dlr": 4}  # they sort out the third and the fourth largest logit


@method
class APGD:
    """Gradient ascent with momentum, whose steps are halved where the loss no longer rises.

    linf and l2, with step η = 2 eps at first and a = 0.75 (a = 1 in the first step):

        z = P( x_k + η s(g_k) ),   x_{k+1} = P( x_k + a (z − x_k) + (1 − a) (x_k − x_{k−1}) )              (1)

    At checkpoints, 0.22 N steps apart at first and 0.03 N closer each time, down to 0.06 N, η is halved and
    the ascent goes on from x_max, with its gradient, where either holds:

        1. the loss rose in at most 0.75 of the steps since the last checkpoint
        2. η was not halved at the last checkpoint, and x_max has not changed since then                   (2)

    l1: no momentum, η = eps at first, and ``sparse_sign`` steps on ||x_max − x||_0 / 1.5 coordinates,
    as counted at the start and every 0.04 N steps. Where x_max has lost 5 % of them since the last count, η
    is eps again and the ascent goes on from x_max; else η is divided by 1.5, down to eps / 10. Balls of 3 eps
    and 2 eps come first, with 0.3 N steps each, every one from the x_max of the last.

    Starts lie on the sphere (l1: as in ``starting_point``). Restarts and targets attack what is not fooled
    yet. For each example the last iterate that fools the model is returned, or else the one of highest loss.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    >>> x_adv = APGD(ThreatModel("l2", 0.5), 10, loss="dlr")(model, x, y)
    >>> bool((x_adv - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6)
    True
    """

    threat: Threat
    num_steps: PositiveCount = setting(100, "Gradient steps N of a restart.")
    num_restarts: PositiveCount = setting(1, "Independent attacks, for each target.")
    loss: APGDLoss = "ce"
    num_targets: PositiveCount = setting(9, "Target classes, the likeliest wrong ones; at most C − 1.")

    def __call__(
        self,
        model_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        generator: Generator | None = None,
        attack_bn: Mode = "eval",
    ) -> Tensor:
        """Return adversarial images for ``x`` [B, *dims] with class indices ``y`` [B], as ``Attack`` does."""
        check_images(x, "APGD")
        if y.shape != x.shape[:1] or y.is_floating_point():
            got = f"got labels {tuple(y.shape)} of {y.dtype} for {len(x)} images"
            raise ValueError(f"APGD: {got}; expected class indices [{len(x)}]. Use y.argmax(1) of soft ones.")
        with attacking(model_fn, x, generator, attack_bn) as starts:
            x, y, model_fn = normal(x).detach(), normal(y), watched(model_fn, "APGD(...)")
            with torch.no_grad():
                clean = model_fn(x)
            x_adv, is_right = x, clean.argmax(1) == y
            for target in self.targets(clean.shape[1]):
                for _ in range(self.num_restarts):
                    if not (todo := is_right.nonzero().flatten()).numel():
                        return x_adv
                    judge = self.judge(model_fn, clean[todo], y[todo], target)
                    found, is_found = self.climb(judge, x[todo], self.start(x[todo], starts))
                    x_adv = x_adv.index_put((todo,), found)
                    is_right[todo[is_found]] = False
            return x_adv

    def maximise(
        self,
        loss_fn: PerExampleLoss,
        x: Tensor,
        generator: Generator | None = None,
        model: nn.Module | None = None,
        attack_bn: Mode = "eval",
    ) -> Tensor:
        """Return the images of the highest loss [B], of any kind, as ``Attack.maximise``."""
        check_images(x, "APGD")
        with attacking(model, x, generator, attack_bn) as starts:
            x, loss_fn = normal(x).detach(), watched(loss_fn, "APGD(...)")
            nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            climbed = partial(self.climb, lambda z: (loss_fn(z), nothing), x)
            return worst_of(loss_fn, x, lambda: climbed(self.start(x, starts))[0], self.num_restarts)

    def targets(self, num_classes: int) -> range:
        """Return the places of the target classes in the order of the clean logits, 0 for no target."""
        if num_classes < (least := LEAST_CLASSES.get(self.loss, 2)):
            rule = f"at least {least}. Use the loss ce."
            raise ValueError(f"APGD, {self.loss}: got {num_classes} classes; expected {rule}")
        return range(1, min(self.num_targets, num_classes - 1) + 1) if "target" in self.loss else range(1)

    def judge(self, model_fn: Callable[[Tensor], Tensor], clean: Tensor, y: Tensor, target: int) -> Judge:
        """Return what ``climb`` climbs, for one of ``targets`` in the order of the logits ``clean``."""
        goal = clean.argsort(1, descending=True)[:, target]

        def judged(images: Tensor) -> tuple[Tensor, Tensor]:
            logits = model_fn(images)
            aimed = self.loss == "targeted-dlr"
            loss = targeted_dlr(logits, y, goal) if aimed else ATTACK_LOSSES[self.loss](logits, y)
            return loss, logits.detach().argmax(1) != y

        return judged

    def start(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Return random images on the sphere around ``x``; l1: of the first ball."""
        if self.threat.norm == "l1":
            return starting_point(x, self._balls()[0][0], "uniform", generator)
        draw = torch.rand if self.threat.norm == "linf" else torch.randn
        device = generator.device if generator is not None else x.device
        noise = draw(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        noise = 2 * noise - 1 if self.threat.norm == "linf" else noise
        return (x + self.threat.eps * noise / norms(noise, self.threat).clamp_min(1e-12)).clamp(0, 1)

    def climb(self, judge: Judge, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of one restart from ``x_adv``, and whether each fools the model [B]."""
        for threat, num_steps in self._balls():
            x_adv = (x + project(x_adv - x, threat, x)).clamp(0, 1)
            rule = (_Sparse if threat.norm == "l1" else _Momentum)(threat, num_steps, x, x_adv)
            x_adv, found, is_found = _climb(judge, x, x_adv, rule, num_steps)
        return torch.where(shaped(is_found, x), found, x_adv), is_found

    def _balls(self) -> list[tuple[ThreatModel, int]]:
        """Return the balls of one restart with the steps in each; fewer than three steps have one ball."""
        share = -(-3 * self.num_steps // 10)
        if self.threat.norm != "l1" or self.num_steps < 3:
            return [(self.threat, self.num_steps)]
        most = LARGEST_EPS["l1"] / max(self.threat.eps, 1e-12)
        wide = [(self.threat.scaled(min(factor, most)), share) for factor in (3.0, 2.0)]
        return [*wide, (self.threat, self.num_steps - 2 * share)]

    def passes(self) -> tuple[int, int]:
        """Return the most forward and backward passes of a call, as on a batch that nothing fools."""
        runs = self.num_restarts * (self.num_targets if "target" in self.loss else 1)
        return 1 + runs * (self.num_steps + len(self._balls())), runs * self.num_steps


def _climb(
    judge: Judge, x: Tensor, x_adv: Tensor, rule: "_Momentum | _Sparse", num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the iterate of highest loss, the last that fools the model, and where there is one [B]."""
    (loss, is_found), gradient = loss_and_gradient(judge, x_adv)
    highest, best, best_gradient, found = loss, x_adv, gradient, x_adv
    for step in range(num_steps):
        x_adv = rule.move(x, x_adv, gradient)
        if step < num_steps - 1:
            (loss, fools), gradient = loss_and_gradient(judge, x_adv)
        else:
            with torch.no_grad():
                loss, fools = judge(x_adv)
        found, is_found = torch.where(shaped(fools, x), x_adv, found), is_found | fools
        is_better = shaped(loss > highest, x)
        best, highest = torch.where(is_better, x_adv, best), torch.where(loss > highest, loss, highest)
        best_gradient = torch.where(is_better, gradient, best_gradient)
        if (goes_back := rule.check(x, best, loss, highest)) is not None:
            goes_back = shaped(goes_back, x)
            x_adv = torch.where(goes_back, best, x_adv)
            gradient = torch.where(goes_back, best_gradient, gradient)
    return best, found, is_found


class _Momentum:
    """The steps (1) and checkpoints (2), under linf and l2."""

    def __init__(self, threat: ThreatModel, num_steps: int, x: Tensor, x_adv: Tensor) -> None:
        self.threat, self.num_steps = threat, num_steps
        self.previous: Tensor | None = None
        self.size = x.new_full((len(x),), 2 * threat.eps)
        self.length = self.left = max(int(0.22 * num_steps), 1)
        # As in the authors' code, the first loss is compared with 0.
        self.rises = self.last = x.new_zeros(len(x))
        self.was_cut, self.before = torch.ones_like(self.rises, dtype=torch.bool), self.rises

    def move(self, x: Tensor, x_adv: Tensor, gradient: Tensor) -> Tensor:
        """Return (1)."""
        z = ascend(x, x_adv, gradient, self.threat, shaped(self.size, x))
        if self.previous is not None:
            z = x_adv + 0.75 * (z - x_adv) + 0.25 * (x_adv - self.previous)
            z = (x + project(z - x, self.threat)).clamp(0, 1)
        self.previous = x_adv
        return z

    def check(self, x: Tensor, best: Tensor, loss: Tensor, highest: Tensor) -> Tensor | None:
        """Return which examples go back to their best iterate [B], at a checkpoint."""
        self.rises, self.last, self.left = self.rises + (loss > self.last), loss, self.left - 1
        if self.left:
            return None
        is_cut = (self.rises <= 0.75 * self.length) | (~self.was_cut & (highest <= self.before))
        self.size = torch.where(is_cut, self.size / 2, self.size)
        self.was_cut, self.before, self.rises = is_cut, highest, torch.zeros_like(self.rises)
        closer, closest = (max(int(share * self.num_steps), 1) for share in (0.03, 0.06))
        self.length = self.left = max(self.length - closer, closest)
        return is_cut


class _Sparse:
    """The steps and checkpoints of l1."""

    def __init__(self, threat: ThreatModel, num_steps: int, x: Tensor, x_adv: Tensor) -> None:
        self.threat, self.dims = threat, x[0].numel()
        self.size = x.new_full((len(x),), threat.eps)
        self.length = self.left = max(int(0.04 * num_steps), 1)
        self.support = _support(x_adv, x)
        self.share = self.support / self.dims / 1.5

    def move(self, x: Tensor, x_adv: Tensor, gradient: Tensor) -> Tensor:
        """Return P( x_k + η (3) )."""
        kept = ((1 - self.share) * self.dims).long()  # rounded as in the authors' code
        step = shaped(self.size, x) * sparse_sign(gradient, self.dims - kept)
        return (x + project(x_adv + step - x, self.threat, x)).clamp(0, 1)

    def check(self, x: Tensor, best: Tensor, loss: Tensor, highest: Tensor) -> Tensor | None:
        """Return which examples go back to their best iterate [B], at a checkpoint."""
        self.left -= 1
        if self.left:
            return None
        support, eps = _support(best, x), self.threat.eps
        is_sparser = support < 0.95 * self.support
        self.size = torch.where(is_sparser, eps, (self.size / 1.5).clamp_min(eps / 10))
        self.share, self.support, self.left = support / self.dims / 1.5, support, self.length
        return is_sparser


def _support(x_adv: Tensor, x: Tensor) -> Tensor:
    """Return ||x_adv − x||_0 of every example [B]."""
    return (x_adv != x).flatten(1).sum(1).to(x.dtype)
