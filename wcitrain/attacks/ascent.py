"""``Attack``: gradient ascent with its settings, for any model; losses; attacks as functions; pieces.

Legend: B batch, C classes, x images [B, *dims] in [0, 1], delta = x_adv - x; ``loss_fn(x_adv)`` is one loss
an example [B]; z logits [B, C], p = softmax(z), y class indices [B] or soft targets [B, C] that sum to one
(mixup). Losses are in float32 at least; margin and dlr are positive where the model is wrong, and take the
class of the largest soft target.

An attack on a module leaves it as it was: modes, buffers, gradients, random state (``preserve``). A function
whose module it is not told is watched once, and refused where it moves any of that. All work under
``no_grad`` and ``inference_mode`` too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks.threat import ThreatModel, project, shaped, steepest_step, uniform_in_ball
from wcitrain.digest import digest
from wcitrain.method import Count, Nested, NonNegative, PositiveCount, PositiveShare, method, refuse, setting
from wcitrain.params import precise
from wcitrain.preserve import differentiating, is_undisturbed, normal, undisturbed, watched
from wcitrain.seeding import generator_from

PerExampleLoss = Callable[[Tensor], Tensor]
Target = nn.Module | PerExampleLoss
Start = Literal["uniform", "gaussian", "none"]
Mode = Literal["eval", "train"]  # of BatchNorm and dropout during an attack
Threat = Annotated[ThreatModel, Nested(), Field(description="Norm and radius of the attack.")]
LOSS = "What the attack maximises: cross-entropy, margin, DLR"
LossName = Annotated[
    Literal["ce", "margin", "dlr", "kl"], Field(description=f"{LOSS}, or KL from the clean output.")
]
LabelLossName = Annotated[Literal["ce", "margin", "dlr"], Field(description=f"{LOSS}.")]
L1Share = Annotated[PositiveShare, Field(description="Share of the coordinates that an l1 step moves.")]


def ce(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the cross-entropy, −Σ_c y_c log p_c."""
    logits = precise(logits)
    return F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y, reduction="none")


def margin(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the largest wrong logit minus the true one, max_{k≠y} z_k − z_y, not clipped at a confidence."""
    logits = precise(logits)
    true = (y.argmax(1) if y.ndim == 2 else y).unsqueeze(1)
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


def dlr(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio, (max_{k≠y} z_k − z_y) / (z_π1 − z_π3), z_π1 ≥ z_π2 ≥ z_π3.

    Shifts and scales of the logits leave it, so it has gradients where an overconfident cross-entropy has
    none. Once z_y is z_π3 it is 1, without a gradient: with three classes such examples stay where they are.
    ValueError for fewer than three classes.
    """
    logits = precise(logits)
    if logits.shape[1] < 3:
        raise ValueError(f"dlr: got {logits.shape[1]} classes; expected at least 3. Use the loss ce.")
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2] + 1e-12  # the floor of the authors' code, for constant logits
    return margin(logits, y) / spread


def kl(logits: Tensor, y: Tensor, reference_logits: Tensor) -> Tensor:
    """Return the divergence KL(p_clean ‖ p) from the clean prediction, which is fixed; flat at the image."""
    return kl_divergence(precise(reference_logits.detach()), precise(logits))


# (logits [B, C], y, reference_logits [B, C] or None) -> losses [B]
ATTACK_LOSSES: dict[str, Callable[..., Tensor]] = {"ce": ce, "margin": margin, "dlr": dlr, "kl": kl}
for _name, _source in {
    "ce": "Madry et al., arXiv 1706.06083",
    "margin": "Carlini & Wagner, arXiv 1608.04644",
    "dlr": "Croce & Hein, arXiv 2003.01690, eq. 6",
    "kl": "TRADES: Zhang et al., arXiv 1901.08573",
}.items():
    _cost = "1 forward pass at the clean images" if _name == "kl" else "no pass of its own"
    vars(ATTACK_LOSSES[_name]).update(source=_source, cost=_cost)  # as every entry of a table of choices has


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_c p_c (log p_c − log q_c) for every example [B]; differentiable in both logits."""
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@method
class Attack:
    """Projected gradient ascent on the loss (Madry et al., arXiv 1706.06083, eq. 2.1), with its settings.

        x_{k+1} = Box[ x + Project( x_k + step_size * steepest_step(grad_x loss(x_k)) - x ) ]              (1)

    linf: Box[Project(.)] is the closest point of ball and box. l2: it lies in both, but is not the closest,
    as in published l2 attacks. l1: the steps are sparse, and it is the closest. The last iterate is returned;
    of several restarts, for each example the one with the highest loss.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    >>> attack = Attack(ThreatModel("linf", 0.1), 5, step_size=0.05, start="gaussian", loss="kl")
    >>> bool((attack(model, x, y) - x).abs().max() <= 0.1 + 1e-6), attack.passes()
    (True, (6, 5))
    """

    threat: Threat
    num_steps: Count = setting(10, "Gradient steps of a restart; 0 returns the start.")
    step_size: NonNegative = setting(None, "Length of a step in the threat's norm; else 2.5 eps / num_steps.")
    start: Start = setting("uniform", "uniform in the ball; gaussian: x + 0.001 N(0, I); none: x itself.")
    num_restarts: PositiveCount = setting(1, "Independent attacks; the worst for each image counts.")
    loss: LossName = "ce"
    l1_share: L1Share = 0.05

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
        worst, worst_loss = x, None
        for _ in range(self.num_restarts):
            x_adv = starting_point(x, self.threat, self.start, generator)
            for _ in range(self.num_steps):
                gradient = input_gradient(loss_fn, x_adv)
                x_adv = ascend(x, x_adv, gradient, self.threat, self.step_size, self.l1_share)
            if self.num_restarts == 1:
                return x_adv
            with torch.no_grad():
                loss = loss_fn(x_adv)
            is_worse = torch.ones_like(loss, dtype=torch.bool) if worst_loss is None else loss > worst_loss
            worst = torch.where(shaped(is_worse, x), x_adv, worst)
            worst_loss = loss if worst_loss is None else torch.where(is_worse, loss, worst_loss)
        return worst

    def passes(self) -> tuple[int, int]:
        """Return the forward and backward passes of a call; to compare restarts takes a forward each."""
        compare = self.num_restarts if self.num_restarts > 1 else 0
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


def msd(
    target: Target,
    x: Tensor,
    y: Tensor | None = None,
    attacks: Sequence[Attack] = (),
    generator: Generator | None = None,
    *,
    model: nn.Module | None = None,
    attack_bn: Mode = "eval",
) -> Tensor:
    """Multi steepest descent on a union of balls (Maini, Wong & Kolter 2020, arXiv 1909.04068, eq. 7 to 9).

        x_{k+1} = argmax over t of loss( x_k^t ),  x_k^t = step (1) of attack t from x_k, in its ball      (2)

    for each example, so the result lies in the union. ``num_steps`` and ``start`` are the first attack's; an
    example starts in the ball of an attack drawn for it, and a model has the first attack's loss. What is
    attacked, and how it is protected: as in ``pgd``, ``msd(loss_fn, x, attacks=...)`` without labels. Cost
    for T attacks: ``num_steps`` (1 + T) forward, ``num_steps`` backward passes.
    """
    check_target(target, y, "msd")
    if not attacks:
        raise ValueError("msd: got no attacks; expected at least one. Use msd(loss_fn, x, attacks=[...]).")
    check_images(x, "msd")
    with attacking(model if y is None else target, x, generator, attack_bn) as starts:
        loss_fn = watched(target, "msd") if y is None else attacks[0].loss_of(target, x, y)
        return _msd(loss_fn, normal(x), attacks, starts)


def _msd(
    loss_fn: PerExampleLoss, x: Tensor, attacks: Sequence[Attack], generator: Generator | None
) -> Tensor:
    """Return (2) for a loss that leaves no trace."""
    x = x_adv = x.detach()
    rows = torch.arange(len(x), device=x.device)
    if (start := attacks[0].start) != "none":
        starts = torch.stack([starting_point(x, a.threat, start, generator) for a in attacks])
        device = generator.device if generator is not None else x.device
        drawn = torch.randint(len(attacks), (len(x),), generator=generator, device=device)
        x_adv = starts[drawn.to(x.device), rows]
    for _ in range(attacks[0].num_steps):
        gradient = input_gradient(loss_fn, x_adv)
        steps = [ascend(x, x_adv, gradient, a.threat, a.step_size, a.l1_share) for a in attacks]
        with torch.no_grad():
            best = torch.stack([loss_fn(step) for step in steps]).argmax(0)
        x_adv = torch.stack(steps)[best, rows]
    return x_adv


def check_target(target: object, y: Tensor | None, where: str) -> None:
    """Refuse a model without labels and labels without a model."""
    if isinstance(target, nn.Module) != isinstance(y, Tensor):
        got = f"got {type(target).__name__} with y a {type(y).__name__}"
        rule = "expected a module with labels, or a loss [B] of images without"
        raise TypeError(f"{where}: {got}; {rule}. Write {where}(model, x, y, ...).")


def starting_point(x: Tensor, threat: ThreatModel, start: Start, generator: Generator | None) -> Tensor:
    """Return the first iterate, in ball and box: uniform in the ball, TRADES' x + 0.001 N(0, I), or x."""
    if start == "none":
        return x
    if start == "uniform":
        return (x + uniform_in_ball(x, threat, generator)).clamp(0, 1)
    device = generator.device if generator is not None else x.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    return (x + project(0.001 * noise, threat)).clamp(0, 1)


def ascend(
    x: Tensor, x_adv: Tensor, gradient: Tensor, threat: ThreatModel, step_size: float, l1_share: float
) -> Tensor:
    """Return ``Box[x + Project(x_adv + step_size * steepest_step(gradient) - x)]``, the next iterate."""
    step = steepest_step(gradient, threat, x=x_adv, step_size=step_size, l1_share=l1_share)
    return (x + project(x_adv + step_size * step - x, threat, x)).clamp(0, 1)


def input_gradient(loss_fn: PerExampleLoss, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return d(sum of losses)/dx, also under ``no_grad``; ValueError unless it is one loss an example."""
    with differentiating():
        x = normal(x).detach().requires_grad_()
        losses = loss_fn(x)
        if losses.shape != x.shape[:1]:
            rule = f"one loss per example, ({len(x)},). Use reduction='none'."
            raise ValueError(f"pgd: got a loss of shape {tuple(losses.shape)}; expected {rule}")
        return torch.autograd.grad(losses.sum(), x, create_graph=create_graph)[0]


def check_images(x: Tensor, where: str) -> None:
    """Refuse images outside [0, 1]; the rounding of a resized image is fine."""
    if x.numel() and (x.min() < -1e-6 or x.max() > 1 + 1e-6):
        got = f"got images from {float(x.min()):.3g} to {float(x.max()):.3g}"
        raise ValueError(f"{where}: {got}; expected [0, 1]. Put the normalisation inside the model.")
