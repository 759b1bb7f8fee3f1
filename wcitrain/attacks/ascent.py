"""``Attack``: gradient ascent with its settings, for any model; attacks as functions; pieces.

Legend: B batch, C classes, x images [B, *dims] in [0, 1], delta = x_adv - x; ``loss_fn(x_adv)`` is one loss
an example [B]; y class indices [B] or soft targets [B, C] that sum to one (mixup), see ``losses``.

An attack on a module leaves it as it was: modes, buffers, gradients, random state (``preserve``). A function
whose module it is not told is watched once, and refused where it moves any of that. All work under
``no_grad`` and ``inference_mode`` too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks.losses import ATTACK_LOSSES, LossName
from wcitrain.attacks.threat import ThreatModel, project, shaped, steepest_step, uniform_in_ball
from wcitrain.digest import digest
from wcitrain.method import Count, Nested, NonNegative, PositiveCount, method, refuse, setting
from wcitrain.preserve import differentiating, is_undisturbed, naming_reentrant, normal, undisturbed, watched
from wcitrain.seeding import generator_from

T = TypeVar("T")
PerExampleLoss = Callable[[Tensor], Tensor]
Target = nn.Module | PerExampleLoss
Start = Literal["uniform", "gaussian", "none"]
Mode = Literal["eval", "train"]  # of BatchNorm and dropout during an attack
Threat = Annotated[ThreatModel, Nested(), Field(description="Norm and radius of the attack.")]


@method
class Attack:
    """Projected gradient ascent on the loss (Madry et al., arXiv 1706.06083, eq. 2.1), with its settings.

        x_{k+1} = Box[ x + Project( x_k + step_size * steepest_step(grad_x loss(x_k)) - x ) ]              (1)

    linf: Box[Project(.)] is the closest point of ball and box. l2: it lies in both, but is not the closest,
    as in published l2 attacks. l1: the steps are sparse (``steepest_step``), and it is the closest. The last
    iterate is returned (l1: ``climb``); of several restarts, for each example that with the highest loss.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    >>> attack = Attack(ThreatModel("linf", 0.1), 5, step_size=0.05, start="gaussian", loss="kl")
    >>> bool((attack(model, x, y) - x).abs().max() <= 0.1 + 1e-6), attack.passes()
    (True, (6, 5))
    """

    threat: Threat
    num_steps: Count = setting(10, "Gradient steps of a restart; 0 returns the start.")
    step_size: NonNegative = setting(
        None, "Length of a step in the threat's norm; else 2.5 eps / num_steps (l1: at least eps)."
    )
    start: Start = setting(
        "uniform", "uniform in the ball (l1: sparse); gaussian: x + 0.001 N(0, I); none: x."
    )
    num_restarts: PositiveCount = setting(1, "Independent attacks; the worst for each image counts.")
    loss: LossName = "ce"

    def __post_init__(self) -> None:
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.threat.step_for(self.num_steps))
        if self.loss == "kl" and self.start == "none":
            text = "got 'none' with loss='kl'; expected a start beside x, where the KL's gradient is zero."
            refuse("start", f"{text} Use start='gaussian'.")

    def __call__(
        self,
        model_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        generator: Generator | None = None,
        attack_bn: Mode = "eval",
    ) -> Tensor:
        """Return adversarial images for ``x`` [B, *dims], for the loss of the logits ``model_fn(x)`` [B, C].

        ``y`` are class indices [B] or soft targets [B, C]. The rest is as in ``maximise``; a module is the
        model that it protects.
        """
        with attacking(model_fn, x, generator, attack_bn) as starts:
            return self._climb(self.loss_of(model_fn, x, y), normal(x), starts)

    def loss_of(self, model_fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> PerExampleLoss:
        """Return what the attack on ``x`` climbs: ``loss`` of the logits at ``y``, for the KL from here."""
        loss, y, reference = ATTACK_LOSSES[self.loss], normal(y), None
        model_fn = watched(model_fn, "pgd")
        if self.loss == "kl":
            with torch.no_grad():
                reference = model_fn(x)
        return lambda x_adv: loss(model_fn(x_adv), y, reference)

    def maximise(
        self,
        loss_fn: PerExampleLoss,
        x: Tensor,
        generator: Generator | None = None,
        model: nn.Module | None = None,
        attack_bn: Mode = "eval",
    ) -> Tensor:
        """Return adversarial images for any loss [B] of images with these settings; ``loss`` is ignored.

        They are detached, in [0, 1], and within eps of ``x`` up to rounding.

        Args:
            generator: Draws the starts, else torch's global one does; with a model, whose attack leaves that
                as it was, they are a function of its state and of ``x``.
            model: What ``loss_fn`` calls, which is left as it was.
            attack_bn: The model's mode meanwhile: eval, or train: as it is. Inside ``preserve.undisturbed``
                the caller has chosen, and has its generator used.

        Raises:
            ValueError: Images outside [0, 1], a loss that is not one number per example, or one that calls
                a module in train mode that such a call changes.
        """
        with attacking(model, x, generator, attack_bn) as starts:
            return self._climb(watched(loss_fn, "pgd"), normal(x), starts)

    def _climb(self, loss_fn: PerExampleLoss, x: Tensor, generator: Generator | None) -> Tensor:
        """Return ``maximise``, of a loss that leaves no trace."""
        check_images(x, "pgd")
        x = x.detach()

        def restart() -> Tensor:
            x_adv = starting_point(x, self.threat, self.start, generator)
            return climb(loss_fn, x, x_adv, self.threat, self.num_steps, self.step_size)

        return restart() if self.num_restarts == 1 else worst_of(loss_fn, x, restart, self.num_restarts)

    def passes(self) -> tuple[int, int]:
        """Return the forward and backward passes of a call; to compare restarts takes a forward each.

        In l1 one more each, for the loss of the last iterate.
        """
        compare = self.num_restarts * (
            (self.num_restarts > 1) + (self.threat.norm == "l1" and self.num_steps > 0)
        )
        steps = self.num_steps * self.num_restarts
        return steps + compare + (self.loss == "kl"), steps


@contextmanager
def attacking(model: object, x: Tensor, generator: Generator | None, mode: str) -> Iterator[Generator | None]:
    """Allow gradients and protect the model, unless a caller does; yield what draws the starts."""
    with differentiating():
        if not isinstance(model, nn.Module) or is_undisturbed(model):
            yield generator
            return
        if mode not in ("eval", "train"):
            raise ValueError(f"attack_bn: got {mode!r}; expected eval or train. Choose one of them.")
        if generator is None:  # other images have other starts, though no state moves
            generator = generator_from(x.device, "attack", digest([torch.get_rng_state(), x]))
        with undisturbed(model, training=None if mode == "train" else False):
            yield generator


def pgd(
    target: Target,
    x: Tensor,
    y: Tensor | None = None,
    *,
    model: nn.Module | None = None,
    generator: Generator | None = None,
    attack_bn: Mode = "eval",
    **settings: Any,
) -> Tensor:
    """Return images of projected gradient ascent, ``Attack(**settings)``, on a model or on any loss.

        pgd(model, x, y, threat=ThreatModel())             Attack(...)(model, x, y, generator, attack_bn)
        pgd(loss_fn, x, model=model, threat=...)           Attack(...).maximise(loss_fn, x, generator, ...)

    Either way the model is left as it was. TypeError for a model without labels, or labels without one.
    """
    check_target(target, y, "pgd")
    if y is not None:
        return Attack(**settings)(target, x, y, generator, attack_bn)
    return Attack(**settings).maximise(target, x, generator, model, attack_bn)


def fgsm(
    target: Target, x: Tensor, y: Tensor | None = None, *, threat: ThreatModel, **settings: Any
) -> Tensor:
    """Return one step of ``pgd``, by default from x and of length eps (Goodfellow et al., arXiv 1412.6572).

    With ``start="uniform"`` and ``step_size=1.25 * eps`` it is FGSM-RS (Wong et al., arXiv 2001.03994).
    """
    own: dict[str, Any] = {"num_steps": 1, "step_size": threat.eps, "start": "none"}
    return pgd(target, x, y, threat=threat, **own | settings)


def check_target(target: object, y: Tensor | None, where: str) -> None:
    """Refuse a model without labels and labels without a model."""
    if isinstance(target, nn.Module) != isinstance(y, Tensor):
        got = f"got {type(target).__name__} with y a {type(y).__name__}"
        rule = "expected a module with labels, or a loss [B] of images without"
        raise TypeError(f"{where}: {got}; {rule}. Write {where}(model, x, y, ...).")


def starting_point(x: Tensor, threat: ThreatModel, start: Start, generator: Generator | None) -> Tensor:
    """Return the first iterate, in ball and box: uniform in the ball, TRADES' x + 0.001 N(0, I), or x.

    In l1 a uniform one moves every coordinate by about nothing, so restarts repeat each other: there it is
    the closest point to x + N(0, I), which is sparse (Croce & Hein 2021, arXiv 2103.01208).
    """
    if start == "none":
        return x
    if start == "uniform" and threat.norm != "l1":
        return (x + uniform_in_ball(x, threat, generator)).clamp(0, 1)
    device = generator.device if generator is not None else x.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    return (x + project((1 if start == "uniform" else 0.001) * noise, threat, x)).clamp(0, 1)


def climb(
    loss_fn: PerExampleLoss, x: Tensor, x_adv: Tensor, threat: ThreatModel, num_steps: int, step_size: float
) -> Tensor:
    """Return the last iterate from ``x_adv``; l1: the one of highest loss, as long steps swing."""
    best, highest = x_adv, x.new_full((len(x),), -torch.inf)
    for step in range(num_steps + (threat.norm == "l1" and num_steps > 0)):
        if step == num_steps:
            with torch.no_grad():
                loss = loss_fn(x_adv)
        else:
            (loss, _), gradient = loss_and_gradient(lambda z: (loss_fn(z), None), x_adv)
        best = torch.where(shaped(loss > highest, x), x_adv, best)
        highest = torch.where(loss > highest, loss, highest)
        if step < num_steps:
            x_adv = ascend(x, x_adv, gradient, threat, step_size)
    return best if threat.norm == "l1" else x_adv


def worst_of(loss_fn: PerExampleLoss, x: Tensor, restart: Callable[[], Tensor], number: int) -> Tensor:
    """Return for each example of ``x`` the images of highest loss, the earliest, of ``number`` restarts."""
    with torch.no_grad():
        highest = loss_fn(worst := restart())
        for _ in range(number - 1):
            loss = loss_fn(x_adv := restart())
            worst = torch.where(shaped(loss > highest, x), x_adv, worst)
            highest = torch.where(loss > highest, loss, highest)
    return worst


def ascend(
    x: Tensor, x_adv: Tensor, gradient: Tensor, threat: ThreatModel, step_size: float | Tensor
) -> Tensor:
    """Return ``Box[x + Project(x_adv + step_size * steepest_step(gradient) - x)]``, the next iterate."""
    step = steepest_step(gradient, threat, x=x, x_adv=x_adv)
    return (x + project(x_adv + step_size * step - x, threat, x)).clamp(0, 1)


def input_gradient(loss_fn: PerExampleLoss, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return d(sum of losses)/dx, also under ``no_grad``; ValueError unless it is one loss an example."""
    return loss_and_gradient(lambda z: (loss_fn(z), None), x, create_graph=create_graph)[1]


def loss_and_gradient(
    judge: Callable[[Tensor], tuple[Tensor, T]], x: Tensor, *, create_graph: bool = False
) -> tuple[tuple[Tensor, T], Tensor]:
    """Return what ``judge`` returns, losses [B] and anything else, and ``input_gradient`` of the losses."""
    with differentiating():
        x = normal(x).detach().requires_grad_()
        losses, rest = judge(x)
        if getattr(losses, "shape", None) != x.shape[:1]:
            shape = getattr(losses, "shape", None)
            got = type(losses).__name__ if shape is None else f"loss of shape {tuple(shape)}"
            rule = f"one loss per example, ({len(x)},). Use reduction='none'."
            raise ValueError(f"pgd: got a {got}; expected {rule}")
        with naming_reentrant():
            gradient = torch.autograd.grad(losses.sum(), x, create_graph=create_graph)[0]
        return (losses.detach(), rest), gradient


def check_images(x: Tensor, where: str) -> None:
    """Refuse images outside [0, 1]; the rounding of a resized image is fine."""
    if x.numel() and (x.min() < -1e-6 or x.max() > 1 + 1e-6):
        low, high = float(x.min()), float(x.max())
        raise ValueError(f"{where}: got images from {low:.3g} to {high:.3g}; {outside_box(low, high)}")


def outside_box(low: float, high: float) -> str:
    """Return the rule and what to do about images of another range: 8-bit levels, or standardised ones."""
    if low >= 0 and high > 16:
        return "expected [0, 1]. Divide levels by 255."
    return "expected [0, 1]. Normalise inside the model: wcitrain.models.Classifier(model, mean, std)."
