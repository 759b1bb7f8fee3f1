"""``evaluate``: clean, robust and corrupted accuracy of any model, example by example."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.digest import digest
from wcitrain.evaluation.attacking import AttackState, Victim, attackable, run_stages
from wcitrain.evaluation.checks import PreflightWarning, check_model, check_results
from wcitrain.evaluation.corruptions import Corruptions
from wcitrain.evaluation.plans import EnsemblePlan, parse_attack
from wcitrain.evaluation.results import AttackResult, Evaluation, Finding
from wcitrain.measures.means import in_chunks, read_pairs
from wcitrain.preserve import normal


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
    and left as it was, random state included, also on exceptions.

    Args:
        model: Maps images in [0, 1] to logits [B, C], C >= 2; DDP and ``torch.compile`` are looked through.
        data: Iterable of (x, y, ...); all of it, or the first ``num_examples``, is kept in memory.
        attacks: Names, see ``parse_attack``: ``"pgd-20"``, ``"margin-100x5"``, ``"autoattack"``, ...
        batch_size: Gradient attacks do not depend on it beyond rounding; AutoAttack does, a little.
        folder: Where the state of every attack is kept: the same call goes on from there after a kill.
        preflight: ``"raise"``: findings that make the numbers meaningless raise ValueError before any attack,
            the others warn. ``"warn"``: all warn. ``"off"``: no checks. All findings are in the result.

    >>> model, x, y = nn.Flatten(), torch.rand(20, 1, 2, 2), torch.zeros(20).long()
    >>> result = evaluate(model, [(x, y)], ThreatModel("linf", 0.1), attacks="pgd-5", preflight="off")
    >>> result.robust_accuracy() <= result.clean_accuracy
    True
    """
    plans = list(dict.fromkeys(map(parse_attack, (attacks,) if isinstance(attacks, str) else attacks)))
    balls = (threats,) if isinstance(threats, ThreatModel) else tuple(dict.fromkeys(threats))
    if plans and not balls:
        raise ValueError("threats: got none; expected at least one. Give one, or attacks=() for none.")
    settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    settings |= {"torch": torch.__version__, "wcitrain": version("wcitrain")}
    if batch_size < 1 or (num_examples is not None and num_examples < 1):
        got = f"got num_examples={num_examples}, batch_size={batch_size}"
        raise ValueError(f"evaluate: {got}; expected at least 1.")
    chunks = in_chunks(read_pairs(data, num_examples), batch_size)
    pairs = [(x.detach().cpu(), y.detach().cpu()) for x, y in chunks]
    if not pairs:
        raise ValueError("data: got no images; expected at least one. Is the data set empty?")
    x, y = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    if not x.is_floating_point() or x.ndim != 4 or y.ndim != 1 or y.is_floating_point():
        got = f"images {tuple(x.shape)} of {x.dtype} and labels {tuple(y.shape)} of {y.dtype}"
        rule = "expected [B, C, H, W] in [0, 1], and class numbers [B]. Divide levels by 255."
        raise ValueError(f"data: got {got}; {rule}")
    with attackable(model) as module:
        x, y = normal(x).float(), normal(y).long()
        victim = Victim(module, x, y, batch_size, seed)
        clean = victim.clean
        runs = [(threat, plan, plan.stages(victim, threat)) for threat in balls for plan in plans]
        if any(isinstance(plan, EnsemblePlan) for plan in plans):
            settings["pyautoattack"] = version("pyautoattack")
        findings = _told(check_model(victim, plans), preflight)
        corrupted = {} if corruptions is None else corruptions.evaluate(victim)
        key = [victim.digest(), images := digest([x, y]), clean.losses, settings]
        results = []
        for threat, plan, stages in runs:
            path = None
            if folder is not None:  # another model, other images or settings have another file
                name = f"{plan.name}-{threat}".replace("/", "_").replace(" ", "-").replace(":", "-")
                path = Path(folder, f"{name}-{digest([*key, repr(plan), repr(threat)])}.npz")
            state = AttackState(clean.is_right, path)
            run_stages(stages, victim, threat, state, f"{plan.name} {threat}")
            # Not strict: stages stop when no robust example is left.
            after = dict(zip((stage.name for stage in stages), state.after, strict=False))
            flags, losses = state.is_robust, state.losses
            results.append(AttackResult(threat, plan.name, flags, losses, after, state.furthest))
    evaluation = Evaluation(y, clean.is_right, clean.losses, tuple(results), corrupted, images, settings)
    findings += _told(check_results(evaluation, clean.num_classes), preflight)
    return replace(evaluation, findings=tuple(findings))


def _told(findings: Iterable[Finding], preflight: str) -> list[Finding]:
    """Return findings after warning of them, or raise; nothing is looked for where checks are off."""
    told = [] if preflight == "off" else list(findings)
    errors = [finding for finding in told if finding.severity == "error"]
    if errors and preflight != "warn":
        text = " ".join(map(str, errors))
        raise ValueError(f"preflight: {text} (preflight='warn' evaluates nevertheless.)")
    for finding in told:
        warnings.warn(str(finding), PreflightWarning, stacklevel=3)
    return told
