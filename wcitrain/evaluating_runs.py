"""``wcitrain evaluate``: robust accuracy of a run, of an exported model or of a file of weights, as a table, files and a curve.

Data, model and threat come from a recipe: the run's own, or one that is given. One process only.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from wcitrain.attacks import ThreatModel
from wcitrain.data import load_splits
from wcitrain.evaluation import Evaluation, PreflightWarning, compare, evaluate, parse_attack
from wcitrain.evaluation.corruptions import CORRUPTIONS, chosen_corruptions
from wcitrain.recipe import Recipe
from wcitrain.targets import device_of, find_target, load_model, recipe_of

ATTACKS = ("pgd-20", "margin-20")
BATCH_SIZE = 200


@dataclass(frozen=True)
class Evaluated:
    """The result of the command, and what was written."""

    evaluation: Evaluation
    title: str
    written: tuple[Path, ...]

    def text(self) -> str:
        """Return the table, what was left out, what the checks found, and the files."""
        notes = dict.fromkeys(note for result in self.evaluation.attacks for note in result.notes)
        lines = [self.title, "", self.evaluation.table(), "", *notes]
        lines += [f"{finding.severity}: {finding}" for finding in self.evaluation.findings]
        return "\n".join([*lines, f"Written: {', '.join(map(str, self.written))}"])


def evaluate_run(
    target: str | Path,
    *,
    attacks: Sequence[str] = ATTACKS,
    norm: str | None = None,
    eps: Sequence[str | float] = (),
    at: str | None = None,
    split: str = "test",
    num_examples: int | None = None,
    corruptions: Sequence[str] = (),
    seed: int = 0,
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    preflight: str = "raise",
) -> Evaluated:
    """Evaluate one model on the first images of a split, in its own order and without augmentation, and write the result.

    The state of every attack is kept in ``state/`` beside the results, under a digest of weights, images and settings: the same
    call goes on where a killed one was, and takes what is finished from there.

    Args:
        target: ``targets.KINDS``.
        attacks, num_examples, corruptions, seed, batch_size, preflight: See ``evaluation.evaluate``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``; by default the recipe's. Another norm than the recipe's needs ``eps``.
        eps: Radii such as ``"8/255"``; by default the recipe's.
        at: ``"last"`` (default) or ``"best"``, for a run.
        split: ``"test"``, ``"val"`` or ``"train"``.
        recipe: YAML that says data, model and threat; by default the run's own.
        settings: Settings such as ``"data.root=/data"`` that override the recipe's.
        out: Folder of the files; by default ``evaluations/`` of the run, or beside the file or export.
        device: ``"auto"``, or a device of torch.

    Raises:
        ValueError: The target is none of ``targets.KINDS``, weights and model differ, an argument is wrong, or a check fails.
        CheckpointError: The run's checkpoint is missing or damaged.
        ModuleNotFoundError: AutoAttack without the package pyautoattack.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"got {os.environ['WORLD_SIZE']} processes; expected one. Start it without a launcher.")
    plans = [parse_attack(name).name for name in attacks]
    found = find_target(Path(target), at)
    settled = recipe_of(found, recipe, settings)
    threats = _threats(settled, norm, eps)
    for name in corruptions:
        if name not in ("all", *CORRUPTIONS):
            chosen_corruptions([name], 3)  # says what there is, before anything is loaded
    splits = load_splits(**settled.data.model_dump(exclude={"crop_padding", "flip"}))
    model = load_model(found, settled, splits)
    images = {"train": lambda: splits.train, "val": lambda: splits.val, "test": lambda: splits.test}[split]()
    folder = Path(out) if out else (found.run or found.path.parent) / "evaluations"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)  # the text has them
        evaluation = evaluate(
            model.to(device_of(device, settled)),
            images.batches(min(batch_size, len(images)), device="cpu"),
            threats,
            attacks=plans,
            corruptions=corruptions,
            num_examples=num_examples,
            batch_size=batch_size,
            seed=seed,
            folder=folder / "state",
            preflight=cast(Any, preflight),
        )
    name = "-".join(
        [
            f"{found.at}-{split}",
            *([] if plans == list(ATTACKS) else ["+".join(plans) or "clean"]),
            *([str(t) for t in threats] if norm or eps else []),
            *([f"n{num_examples}"] if num_examples else []),
            *(["corruptions" if corruptions == ["all"] else "+".join(corruptions)] if corruptions else []),
            *([f"b{batch_size}"] if batch_size != BATCH_SIZE else []),
            *([f"s{seed}"] if seed else []),
        ]
    )
    name = re.sub(r"[^\w+.]+", "-", name.replace("/", "_"))
    title = f"{found.path.name} ({found.at}), {evaluation.num_examples} images of {split}"
    document = {"target": str(found.path), "at": found.at, "split": split, **evaluation.as_dict()}
    written = [evaluation.save(folder / f"{name}.npz"), folder / f"{name}.json"]
    written[1].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
    if len(threats) > 1 and plans:
        from wcitrain.evaluation.drawing import DPI, accuracy_curve  # matplotlib takes a second to import

        written.append(folder / f"{name}.png")
        accuracy_curve(evaluation, threats[0].norm, title).savefig(written[-1], dpi=DPI)
    return Evaluated(evaluation, title, tuple(written))


def compare_files(a: str | Path, b: str | Path) -> str:
    """Return the comparison of two .npz files of ``evaluate_run``, model A and model B, as text.

    Raises:
        ValueError: They are other files, of other examples, or share no attack.
    """
    result = compare(Evaluation.load(a), Evaluation.load(b))
    return f"A = {a}\nB = {b}\n{result.num_examples} images\n\n{result.table()}"


def _threats(recipe: Recipe, norm: str | None, eps: Sequence[str | float]) -> list[ThreatModel]:
    """Return the balls that were asked for, each once, or the recipe's."""
    kind = norm or recipe.threat.norm
    if not eps and kind != recipe.threat.norm:
        raise ValueError(
            f"--norm: got {norm} without --eps, and a recipe whose radius {recipe.threat.eps:g} is for {recipe.threat.norm}; "
            "expected a radius for it. Give --eps."
        )
    try:
        radii = [float(Fraction(value)) for value in eps] or [recipe.threat.eps]
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--eps: got {' '.join(map(str, eps))}; expected radii such as 8/255 or 0.03. Give them in pixel units."
        ) from None
    return list(dict.fromkeys(ThreatModel(cast(Any, kind), radius) for radius in radii))
