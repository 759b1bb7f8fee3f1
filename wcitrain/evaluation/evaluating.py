"""``evaluate``: clean, robust and corrupted accuracy of any model, example by example."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain.attacks import ThreatModel
from wcitrain.digest import digest
from wcitrain.evaluation.autoattack import EnsemblePlan, require_autoattack
from wcitrain.evaluation.checks import PreflightWarning, check_images, check_model, check_results
from wcitrain.evaluation.corruptions import SEVERITIES, Corruptions
from wcitrain.evaluation.evaluation import AttackResult, Evaluation, Finding
from wcitrain.evaluation.plans import parse_attack
from wcitrain.evaluation.stages import AttackState, run_stages
from wcitrain.evaluation.victim import Victim, attackable, is_right
from wcitrain.measures.examples import Examples
from wcitrain.seeding import seed_from


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    threats: ThreatModel | Sequence[ThreatModel],
    *,
    attacks: Sequence[str] | str = ("pgd-20", "margin-20"),
    corruptions: Corruptions | None = None,
    num_examples: int | None = None,
    batch_size: int = 200,
    seed: int = 0,
    folder: str | Path | None = None,
    preflight: Literal["raise", "warn", "off"] = "raise",
) -> Evaluation:
    """Measure a model's accuracy: clean, corrupted, and under every attack within every threat model.

    An example is robust when the model is right on it without an attack and at the final iterate of every
    restart; only examples that are still robust are attacked further (the first restart attacks all, for the
    mean loss). Logits that are not finite are wrong. The model is run where it is, in eval mode and float32,
    and left as it was: modes, gradients, ``requires_grad``, random state, also on exceptions.

    Args:
        model: Maps images in [0, 1] to logits [B, C], C >= 2; DDP and ``torch.compile`` are looked through.
        data: Iterable of (x, y, ...); all of it, or the first ``num_examples``, is kept in memory.
        threats: One threat model or several; several radii of one norm are a curve.
        attacks: Names, see ``parse_attack``: ``"pgd-20"``, ``"margin-100x5"``, ``"autoattack"``, ...
        corruptions: Released images, ``Corruptions.find(folder)``; all five severities are taken.
        batch_size: Gradient attacks do not depend on it beyond rounding; AutoAttack does, a little.
        seed: Of starts and AutoAttack.
        folder: Where the state of every attack is kept; the same call goes on from there after a kill, if
            weights, images, settings, versions and the losses without an attack are the same.
        preflight: ``"raise"``: findings that make the numbers meaningless stop before any attack, the others
            warn. ``"warn"``: all warn. ``"off"``: no checks. All findings are in the result.

    Raises:
        ValueError: Unknown attack, no or wrong examples or corrupted images, another precision, a finding.
        TypeError: Threats that are none.
        ModuleNotFoundError: AutoAttack without the package pyautoattack.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x = torch.rand(20, 1, 4, 4)
        >>> y = model(x).argmax(1)
        >>> threat = ThreatModel("linf", 0.1)
        >>> result = evaluate(model, [(x, y)], threat, attacks="pgd-5", preflight="off")
        >>> result.clean_accuracy, result.robust_accuracy() < 1
        (1.0, True)
    """
    names = (attacks,) if isinstance(attacks, str) else attacks
    plans = list(dict.fromkeys(map(parse_attack, names)))
    balls = (threats,) if isinstance(threats, ThreatModel | str) else tuple(dict.fromkeys(threats))
    settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    settings |= {"torch": torch.__version__, "wcitrain": version("wcitrain")}
    if any(isinstance(plan, EnsemblePlan) for plan in plans):
        require_autoattack()
        settings["pyautoattack"] = version("pyautoattack")
    if wrong := [threat for threat in balls if not isinstance(threat, ThreatModel)]:
        raise TypeError(f"threats: got {wrong[0]!r}; expected a ThreatModel, or several.")
    if plans and not balls:
        raise ValueError("threats: got none; expected at least one. Give one, or attacks=() for none.")
    if preflight not in ("raise", "warn", "off"):
        raise ValueError(f"preflight: got {preflight!r}; expected 'raise', 'warn' or 'off'. Choose one.")
    if (num_examples is not None and num_examples < 1) or batch_size < 1:
        got = f"num_examples={num_examples}, batch_size={batch_size}"
        raise ValueError(f"evaluate: got {got}; expected at least 1 (num_examples=None for all).")
    x, y = _examples(data, num_examples, batch_size)
    with attackable(model) as (module, modes):
        victim = Victim(module, x, y, batch_size, seed, modes)
        findings = _told(check_images(x), preflight)
        clean = victim.clean
        runs = [(threat, plan, *plan.stages(victim, threat)) for threat in balls for plan in plans]
        findings += _told(check_model(victim, plans), preflight)
        corrupted = {} if corruptions is None else _corrupted(victim, corruptions)
        key = [victim.digest(), images := digest([x, y]), clean.losses, settings]
        results = []
        for threat, plan, stages, notes in runs:
            path = None
            if folder is not None:  # another model, other images or settings have another file
                name = f"{plan.name}-{threat}".replace("/", "_").replace(" ", "-").replace(":", "-")
                path = Path(folder, f"{name}-{digest([*key, repr(plan), repr(threat)])}.npz")
            state = AttackState(clean.is_right, path)
            run_stages(stages, victim, threat, state, f"{plan.name} {threat}")
            # Not strict: stages stop when no robust example is left.
            after = dict(zip((stage.name for stage in stages), state.after, strict=False))
            result = state.is_robust, state.losses, after, state.furthest, notes
            results.append(AttackResult(threat, plan.name, *result))
    evaluation = Evaluation(y, clean.is_right, clean.losses, tuple(results), corrupted, images, settings)
    findings += _told(check_results(evaluation, clean.num_classes), "off" if preflight == "off" else "warn")
    return replace(evaluation, findings=tuple(findings))


def _examples(data: Iterable[Any], num_examples: int | None, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return images [N, *dims] in float32 and labels [N], on the CPU."""
    pairs = [(x.detach().cpu(), y.detach().cpu()) for x, y in Examples(data, num_examples).chunks(batch_size)]
    if not pairs:
        raise ValueError("data: got no images; expected at least one batch. Is the data set empty?")
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    if not x.is_floating_point() or x.ndim != 4 or y.ndim != 1 or y.is_floating_point():
        got = f"images {tuple(x.shape)} of {x.dtype} and labels {tuple(y.shape)} of {y.dtype}"
        rule = "expected [B, C, H, W] in [0, 1], and class numbers [B]. Divide levels by 255."
        raise ValueError(f"data: got {got}; {rule}")
    return x.float(), y.long()


@torch.no_grad()
def _corrupted(victim: Victim, corruptions: Corruptions) -> dict[tuple[str, int], Tensor]:
    """Return truth values [N] by corruption and severity."""
    keys = [(name, severity) for name in corruptions.names for severity in SEVERITIES]
    result = {}
    for name, severity in tqdm(keys, desc="corruptions", disable=None):
        torch.manual_seed(seed_from(victim.seed, "corruption", name, severity))  # a randomised model
        batches = corruptions.batches(name, severity, victim)
        result[name, severity] = torch.cat([is_right(victim.model(x), y).cpu() for x, y in batches])
    return result


def _told(findings: Iterable[Finding], preflight: str) -> list[Finding]:
    """Return findings after warning of them, or raise; nothing is looked for where checks are off."""
    told = [] if preflight == "off" else list(findings)
    errors = [finding for finding in told if finding.severity == "error"]
    if errors and preflight == "raise":
        text = " ".join(map(str, errors))
        raise ValueError(f"preflight: {text} (preflight='warn' evaluates nevertheless.)")
    for finding in told:
        warnings.warn(str(finding), PreflightWarning, stacklevel=3)
    return told
