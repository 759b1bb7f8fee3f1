"""``evaluate``: clean, robust and corrupted accuracy of any model, example by example."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain.attacks import ThreatModel, attack_loss
from wcitrain.digest import digest
from wcitrain.evaluation import preflight as checks
from wcitrain.evaluation.autoattack import autoattack_stages, require_autoattack
from wcitrain.evaluation.corruptions import SEVERITIES, chosen_corruptions, corrupt
from wcitrain.evaluation.evaluation import AttackResult, Evaluation
from wcitrain.evaluation.findings import Finding, PreflightWarning
from wcitrain.evaluation.naming import EnsemblePlan, GradientPlan, Plan, parse_attack
from wcitrain.evaluation.stages import gradient_stages, is_right, run_stages
from wcitrain.evaluation.state import AttackState, model_digest
from wcitrain.measures.examples import Examples
from wcitrain.params import unwrapped
from wcitrain.preserve import full_precision, undisturbed
from wcitrain.seeding import seed_from

Preflight = Literal["raise", "warn", "off"]


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    threats: ThreatModel | Sequence[ThreatModel],
    *,
    attacks: Sequence[str] | str = ("pgd-20", "margin-20"),
    corruptions: Sequence[str] | str = (),
    num_examples: int | None = None,
    batch_size: int = 200,
    seed: int = 0,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    preflight: Preflight = "raise",
) -> Evaluation:
    """Measure a model's accuracy: clean, under every attack within every threat model, and corrupted.

    An example is robust when the model is right on it without an attack and at the final iterate of every
    restart; only examples that are still robust are attacked further (the first restart attacks all, for the
    mean loss). Logits that are not finite are wrong. The model is run in eval mode and float32 and left as it
    was: modes, buffers, gradients, ``requires_grad``, random state, also on exceptions.

    Args:
        model: Maps images in [0, 1] to logits [B, C], C >= 2; DDP and ``torch.compile`` are looked through.
        data: Iterable of (x, y, ...); all of it, or the first ``num_examples``, is kept in memory.
        threats: One threat model or several; several radii of one norm are a curve.
        attacks: Names, see ``parse_attack``: ``"pgd-20"``, ``"margin-100x5"``, ``"autoattack"``, ...
        corruptions: Names, see ``CORRUPTIONS``, or ``"all"``; all five severities are taken.
        num_examples: At least 1; None for all.
        batch_size: At least 1. Gradient attacks do not depend on it beyond rounding; AutoAttack draws random
            numbers by batch and does, a little.
        seed: Of starts, AutoAttack and corruptions.
        folder: Where the state of every attack is kept; the same call goes on from there after a kill, if
            weights, images, settings, versions and the losses without an attack are the same.
        device: Where to compute; by default where the model is. A model that is moved for it is moved back.
        progress: Show bars on a terminal.
        preflight: ``"raise"``: findings that make the numbers meaningless stop before any attack, the others
            warn. ``"warn"``: all warn. ``"off"``: no checks. All findings are in the result.

    Raises:
        ValueError: Unknown attack or corruption, no or wrong examples, another precision, a finding.
        TypeError: Threats that are none.
        ModuleNotFoundError: AutoAttack without the package pyautoattack.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x = torch.rand(20, 1, 4, 4)
        >>> y = model(x).argmax(1)
        >>> threat = ThreatModel("linf", 0.1)
        >>> result = evaluate(model, [(x, y)], threat, attacks="pgd-5", preflight="off", progress=False)
        >>> result.clean_accuracy, result.robust_accuracy() < 1
        (1.0, True)
    """
    plans = _plans(attacks)
    balls: tuple[Any, ...] = (
        (threats,) if isinstance(threats, ThreatModel | str) else tuple(dict.fromkeys(threats))
    )
    _check_settings(balls, plans, num_examples, batch_size, preflight)
    x, y = _examples(data, num_examples, batch_size)
    names = chosen_corruptions(corruptions, x.shape[1]) if corruptions else ()
    with _attackable(model, device) as (module, place, flags):
        found: list[Finding] = [] if preflight == "off" else checks.check_images(x)
        _tell(found, preflight)
        first, labels = x[:batch_size].to(place), y[:batch_size].to(place)
        num_classes = _num_classes(module, first, y, plans)
        is_clean, clean_losses, is_finite = _clean(module, x, y, batch_size, seed, place)
        if preflight != "off":
            some = [
                *checks.check_logits(is_finite),
                *checks.before(module, first, labels, plans, flags, seed),
            ]
            found += some
            _tell(some, preflight)
        versions = {"torch": torch.__version__, "wcitrain": version("wcitrain")}
        settings = {"seed": seed, "batch_size": batch_size, **versions}
        if any(isinstance(plan, EnsemblePlan) for plan in plans):
            settings["pyautoattack"] = version("pyautoattack")
        images = digest([x, y])
        key = [model_digest(module), images, clean_losses, settings] if folder is not None else []
        results = []
        for threat in balls:
            for plan in plans:
                path = _state_path(Path(folder), plan, threat, key) if folder is not None else None
                state = AttackState(is_clean, path)
                results.append(
                    _attack(module, x, y, threat, plan, state, batch_size, num_classes, seed, place, progress)
                )
        corrupted = _corrupted(module, x, y, names, batch_size, seed, place, progress)
    evaluation = Evaluation(
        y, is_clean, clean_losses, tuple(results), corrupted, images, settings, tuple(found)
    )
    if preflight == "off":
        return evaluation
    _tell(some := checks.after(evaluation, num_classes), "warn")
    return Evaluation(**(vars(evaluation) | {"findings": (*found, *some)}))


def _plans(attacks: Sequence[str] | str) -> list[Plan]:
    """Return the attacks, each once."""
    plans = [parse_attack(name) for name in ((attacks,) if isinstance(attacks, str) else attacks)]
    if any(isinstance(plan, EnsemblePlan) for plan in plans):
        require_autoattack()
    return list(dict.fromkeys(plans))


def _check_settings(
    threats: Sequence[Any], plans: Sequence[Plan], num_examples: int | None, batch_size: int, preflight: str
) -> None:
    """Refuse settings that say nothing."""
    for threat in threats:
        if not isinstance(threat, ThreatModel):
            raise TypeError(
                f"threats: got {threat!r}; expected a ThreatModel, or several. "
                'Give ThreatModel("linf", 8 / 255).'
            )
    if plans and not threats:
        raise ValueError(
            "threats: got none; expected a ThreatModel, or several. Give one, or attacks=() for none."
        )
    if (num_examples is not None and num_examples < 1) or batch_size < 1:
        raise ValueError(
            f"evaluate: got num_examples={num_examples}, batch_size={batch_size}; expected at least 1 "
            "(num_examples=None for all)."
        )
    if preflight not in ("raise", "warn", "off"):
        raise ValueError(f"preflight: got {preflight!r}; expected 'raise', 'warn' or 'off'. Choose one.")


def _examples(data: Iterable[Any], num_examples: int | None, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return images [N, *dims] in float32 and labels [N], on the CPU."""
    pairs = [(x.detach().cpu(), y.detach().cpu()) for x, y in Examples(data, num_examples).chunks(batch_size)]
    if not pairs:
        raise ValueError("data: got no images; expected at least one batch. Is the data set empty?")
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    if not x.is_floating_point() or x.ndim != 4 or y.ndim != 1 or y.is_floating_point():
        raise ValueError(
            f"data: got images {tuple(x.shape)} of {x.dtype} and labels {tuple(y.shape)} of {y.dtype}; "
            "expected [B, C, H, W] in [0, 1], and class numbers [B]. Divide levels by 255."
        )
    return x.float(), y.long()


@contextmanager
def _attackable(
    model: nn.Module, device: torch.device | str | None
) -> Iterator[tuple[nn.Module, torch.device, list[bool]]]:
    """Yield the user's own module in eval mode, float32 and frozen, and its modes; put all back."""
    module = unwrapped(model)
    parameters = list(module.parameters())
    home = next((p.device for p in parameters), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    others = sorted({str(p.dtype) for p in parameters if p.is_floating_point() and p.dtype != torch.float32})
    if others:
        raise ValueError(
            f"model: got parameters in {', '.join(others)}; expected float32. Call model.float() first."
        )
    flags = [m.training for m in module.modules()]
    frozen = [p.requires_grad for p in parameters]
    if place != home:
        module.to(place)
    try:
        with torch.inference_mode(False), undisturbed(module, training=False), full_precision(module):
            for p in parameters:
                p.requires_grad_(False)
            yield module, place, flags
    finally:
        for p, flag in zip(parameters, frozen, strict=True):
            p.requires_grad_(flag)
        if place != home:
            module.to(home)


@torch.no_grad()
def _num_classes(model: nn.Module, x: Tensor, y: Tensor, plans: Sequence[Plan]) -> int:
    """Return C; refuse outputs that are no logits, labels outside, and losses that need more classes."""
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"model: got {got} for {len(x)} images; expected logits [{len(x)}, C], C >= 2. Wrap it."
        )
    if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"data: got labels {int(y.min())} to {int(y.max())} for a model of {logits.shape[1]} classes; "
            f"expected 0 to {logits.shape[1] - 1}. Is this the data it was trained on?"
        )
    for loss in {plan.loss for plan in plans if isinstance(plan, GradientPlan)}:
        attack_loss(loss)(logits[:1], y[:1].to(logits.device))
    return logits.shape[1]


@torch.no_grad()
def _clean(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return without an attack, [N] each: is it right, the cross-entropy, are the logits finite."""
    torch.manual_seed(seed_from(seed, "clean"))  # a randomised model: the same after a kill
    rows = []
    for images, labels in zip(x.split(batch_size), y.to(device).split(batch_size), strict=True):
        logits = model(images.to(device))
        losses = F.cross_entropy(logits, labels, reduction="none")
        rows.append([is_right(logits, labels).cpu(), losses.cpu(), logits.isfinite().all(1).cpu()])
    flags, clean_losses, is_finite = (torch.cat(column) for column in zip(*rows, strict=True))
    return flags, clean_losses, is_finite


def _attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    plan: Plan,
    state: AttackState,
    batch_size: int,
    num_classes: int,
    seed: int,
    device: torch.device,
    progress: bool,
) -> AttackResult:
    """Run what is left of one attack."""
    notes: tuple[str, ...] = ()
    if isinstance(plan, EnsemblePlan):
        stages, notes = autoattack_stages(
            plan, model, threat, num_classes=num_classes, seed=seed, device=device
        )
    else:
        stages = gradient_stages(plan, model, threat, seed)
    with tqdm(unit=" images", desc=f"{plan.name} {threat}", disable=None if progress else True) as bar:
        run_stages(
            stages,
            model,
            x,
            y,
            state,
            threat=threat,
            batch_size=batch_size,
            device=device,
            seed=seed,
            bar=bar,
        )
    # Not strict: stages stop when no robust example is left.
    after = {stage.name: share for stage, share in zip(stages, state.after, strict=False)}
    return AttackResult(threat, plan.name, state.is_robust, state.losses, after, state.furthest, notes)


@torch.no_grad()
def _corrupted(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    names: Sequence[str],
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: bool,
) -> dict[tuple[str, int], Tensor]:
    """Return truth values [N] by corruption and severity."""
    keys = [(name, severity) for name in names for severity in SEVERITIES]
    result = {}
    for name, severity in tqdm(keys, desc="corruptions", disable=None if progress and keys else True):
        flags = []
        for places in torch.arange(len(x)).split(batch_size):
            images = corrupt(x[places].to(device), name, severity, places=places, seed=seed)
            flags.append(is_right(model(images).cpu(), y[places]))
        result[name, severity] = torch.cat(flags)
    return result


def _state_path(folder: Path, plan: Plan, threat: ThreatModel, key: Sequence[object]) -> Path:
    """Return the file of one attack's state: another model, other images or settings have another."""
    name = f"{plan.name}-{threat}".replace("/", "_").replace(" ", "-").replace(":", "-")
    return folder / f"{name}-{digest([*key, repr(plan), repr(threat)])}.npz"


def _tell(findings: Sequence[Finding], preflight: str) -> None:
    """Raise or warn."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and preflight == "raise":
        raise ValueError(
            "preflight: " + " ".join(map(str, errors)) + " (preflight='warn' evaluates nevertheless.)"
        )
    for finding in findings:
        warnings.warn(str(finding), PreflightWarning, stacklevel=3)
