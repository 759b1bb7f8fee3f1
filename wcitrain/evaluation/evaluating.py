"""``evaluate``: clean, robust and corrupted accuracy of any model, example by example."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel
from wcitrain.digest import digest
from wcitrain.evaluation.attacking import AttackState, Stage, Victim, attackable, run_stages, stand_ins
from wcitrain.evaluation.checks import PreflightWarning, check_model, check_results, check_survivors
from wcitrain.evaluation.corruptions import Corruptions
from wcitrain.evaluation.images import Transfer, check_images
from wcitrain.evaluation.minimal import minimal_eps
from wcitrain.evaluation.plans import EnsemblePlan, GradientPlan, Plan, parse_attack
from wcitrain.evaluation.results import THIS_MODEL, AttackResult, Evaluation, Finding
from wcitrain.measures.means import in_chunks, read_pairs
from wcitrain.preserve import normal

STATE = 3  # the form of the files of states: those of another are left alone


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
    minimal: Sequence[ThreatModel] = (),
    transfer_images: Sequence[Transfer] = (),
    keep_images: bool = False,
    eot: int = 1,
    bpda: Mapping[str, Callable[[Tensor], Tensor]] | Sequence[str] = (),
    transfer: nn.Module | None = None,
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
        minimal: Balls up to which the smallest radius that all ``attacks`` together need is bisected.
        transfer_images: Adversarial images of other models, each an attack within its own threat model.
        keep_images: Whether the results have the adversarial images, see ``AttackState``.
        eot: Draws of a randomised model behind each gradient of PGD and AutoAttack's APGD; a verdict is one.
        bpda: Modules by name that gradients go straight through, or functions instead, see ``stand_ins``.
        transfer: Another model. The first gradient attack (else pgd-20) on it is one more attack on this.

    >>> model, x, y = nn.Flatten(), torch.rand(20, 1, 2, 2), torch.zeros(20).long()
    >>> result = evaluate(model, [(x, y)], ThreatModel("linf", 0.1), attacks="pgd-5", preflight="off")
    >>> result.robust_accuracy() <= result.clean_accuracy
    True
    """
    plans: list[Plan] = list(
        dict.fromkeys(map(parse_attack, (attacks,) if isinstance(attacks, str) else attacks))
    )
    balls = (threats,) if isinstance(threats, ThreatModel) else tuple(dict.fromkeys(threats))
    if plans and not balls:
        raise ValueError("threats: got none; expected at least one. Give one, or attacks=() for none.")
    if minimal and not plans:
        raise ValueError("minimal: got no attacks; expected one to find the smallest radius with. Name one.")
    if len({(one.name, one.threat) for one in transfer_images}) < len(transfer_images):
        got = ", ".join(one.name for one in transfer_images)
        raise ValueError(
            f"transfer_images: got {got}; expected names that differ. Give images of other runs."
        )
    settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    settings |= {"torch": torch.__version__, "wcitrain": version("wcitrain")}
    if min(batch_size, eot) < 1 or (num_examples is not None and num_examples < 1):
        got = f"got num_examples={num_examples}, eot={eot}, batch_size={batch_size}"
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
    suffix = f" eot-{eot}" * (eot > 1) + f" bpda-{'+'.join(bpda)}" * bool(bpda)
    settings |= {"eot": eot} if eot > 1 else {}
    settings |= {"bpda": list(bpda)} if bpda else {}
    with ExitStack() as stack:
        module = stack.enter_context(attackable(model))
        stack.enter_context(stand_ins(module, bpda))
        x, y = normal(x).float(), normal(y).long()
        victim = Victim(module, x, y, batch_size, seed, eot, bool(bpda))
        clean, own = victim.clean, victim.digest(is_attacked=bool(plans))
        settings["model"] = own
        runs: list[tuple[ThreatModel, str, list[object], list[Stage]]] = []
        for t in balls:
            runs += [(t, f"{p.name}{suffix}", [repr(p)], p.stages(victim, t)) for p in plans]
        if transfer is not None:
            other = stack.enter_context(attackable(transfer))
            names = [name for name, _ in other.named_modules() if name in bpda]
            stack.enter_context(
                stand_ins(other, {n: bpda[n] for n in names} if isinstance(bpda, Mapping) else names)
            )
            source = replace(victim, model=other)
            plan = next((p for p in plans if isinstance(p, GradientPlan)), parse_attack("pgd-20"))
            settings["transfer"] = source.digest(is_attacked=True)
            name = f"transfer {plan.name} of {settings['transfer'][:8]}"
            name += THIS_MODEL * (settings["transfer"] == own)
            runs += [(t, name, [name], plan.stages(source, t)) for t in balls]
        for one in transfer_images:
            name = one.name + THIS_MODEL * (one.model == own)
            runs += [(one.threat, name, [name, one.images], one.stages(victim, one.threat))]
        if any(isinstance(plan, EnsemblePlan) for plan in plans):
            settings["pyautoattack"] = version("pyautoattack")
        findings = _told(check_model(victim, plans, balls), preflight)
        corrupted = {} if corruptions is None else corruptions.evaluate(victim)
        key = [STATE, images := digest([x, y]), clean.losses, settings]

        def state_path(name: str, *parts: object) -> Path | None:
            """Return where a state is kept; another model, other images or settings have another file."""
            name = name.replace("/", "_").replace(" ", "-").replace(":", "-")
            return None if folder is None else Path(folder, f"{name}-{digest([*key, *parts])}.npz")

        results = []
        for threat, attack, parts, stages in runs:
            path = state_path(f"{attack}-{threat}", *parts, repr(threat), *["images"] * keep_images)
            state = AttackState(clean.is_right, path, x if keep_images else None)
            run_stages(stages, victim, threat, state, f"{attack} {threat}")
            # Not strict: stages stop when no robust example is left.
            after = dict(zip((stage.name for stage in stages), state.after, strict=False))
            kept = after, state.furthest, state.fell_in, state.images
            results.append(AttackResult(threat, attack, state.is_robust, state.losses, *kept))
        findings += _told(check_images(victim, results), preflight)
        smallest = []
        for largest in minimal:
            path = state_path(f"minimal-{largest.norm}", repr(plans), repr(largest))
            known = [(r.threat.eps, ~r.is_robust) for r in results if r.threat.norm == largest.norm]
            smallest.append(minimal_eps(victim, plans, largest, path, known))
        examples = y, clean.is_right, clean.losses, tuple(results), corrupted
        evaluation = Evaluation(*examples, images, settings, minimal=tuple(smallest))
        survivors = [evaluation.worst(threat) for threat in balls]
        if "randomised" not in {finding.name for finding in findings}:
            findings += _told(check_survivors(victim, plans, balls, survivors), preflight)
    findings += _told(check_results(evaluation, clean.num_classes), preflight)
    return replace(evaluation, findings=tuple(findings))


def _told(findings: Iterable[Finding], preflight: str) -> list[Finding]:
    """Return findings after warning of them, or raise; nothing is looked for where checks are off."""
    told = [] if preflight == "off" else list(findings)
    errors = [finding for finding in told if finding.severity == "error"]
    is_fatal = any(finding.name == "no_gradient" for finding in errors)
    if errors and (is_fatal or preflight != "warn"):
        hint = "" if is_fatal else " (preflight='warn' evaluates nevertheless.)"
        raise ValueError(f"preflight: {' '.join(map(str, errors))}{hint}")
    for finding in told:
        warnings.warn(str(finding), PreflightWarning, stacklevel=3)
    return told
