"""``wcitrain evaluate``: robust accuracy of a run, an export or a file of weights: table, files and a curve.

Data, model and threat come from a recipe: the run's own, or one that is given. One process only.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch

from wcitrain.attacks import ThreatModel
from wcitrain.data import ImageSet, StreamSet
from wcitrain.digest import digest
from wcitrain.evaluation import Evaluation, PreflightWarning, compare, evaluate, parse_attack
from wcitrain.evaluation.corruptions import chosen_corruptions
from wcitrain.images import images_of, open_splits
from wcitrain.recipe import Recipe
from wcitrain.seeding import generator_from
from wcitrain.targets import Target, device_of, find_target, load_model, recipe_of

ATTACKS = ("pgd-20", "margin-20")
BATCH_SIZE = 200
LONGEST = 120  # characters of a file's name without its ending; file systems take 255 bytes


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
    recipe: str | Path | Sequence[str | Path] | None = None,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    preflight: str = "raise",
) -> Evaluated:
    """Evaluate one model on images of a split without augmentation, and write the result.

    Fewer than all are chosen at random, the same for every model and seed: splits are often sorted by class.
    A stream cannot be shuffled: its first images are taken, and the title says so.

    The state of every attack is kept in ``state/`` beside the results, under a digest of weights, images and
    settings: the same call goes on where a killed one was, and takes what is finished from there.

    Args:
        target: ``targets.KINDS``.
        attacks, num_examples, corruptions, seed, batch_size, preflight: See ``evaluation.evaluate``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``; by default the recipe's. Another than that needs ``eps``.
        eps: Radii such as ``"8/255"``, or with a norm of their own ``"l2:0.5"``; by default the recipe's.
        at: ``"last"`` (default), ``"best"`` or the number of an epoch that was kept, for a run.
        split: ``"test"``, ``"val"`` or ``"train"``.
        recipe: YAML that says data, model and threat; by default the run's own.
        settings: Settings such as ``"data.root=/data"`` that override the recipe's.
        out: Folder of the files; by default ``evaluations/`` of the run, or beside the file or export.
        device: ``"auto"``, or a device of torch.

    Raises:
        ValueError: The target is none of ``targets.KINDS``, weights do not fit, an argument or a check fails.
        OSError: The files cannot be written; the message has the table.
        CheckpointError: The run's checkpoint is missing or damaged.
        ModuleNotFoundError: AutoAttack without the package pyautoattack.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"got {os.environ['WORLD_SIZE']} processes; expected one. Start it without a launcher."
        )
    plans = [parse_attack(name).name for name in attacks]
    found = find_target(Path(target), at)
    settled = recipe_of(found, recipe, settings)
    threats = _threats(settled, norm, eps)
    if corruptions:
        chosen_corruptions(corruptions, 3)  # says what there is, before anything is loaded
    if batch_size < 1 or (num_examples is not None and num_examples < 1):
        raise ValueError(
            f"evaluate: got num_examples={num_examples}, batch_size={batch_size}; expected at least 1."
        )
    place = device_of(device, settled)
    splits = open_splits(settled)
    model = load_model(found, settled, splits)
    whole = images_of(splits, split)
    images, index = _chosen(whole, num_examples)
    folder = Path(out) if out else (found.run or found.path.parent) / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)  # where that fails, it does so before the attacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)  # the text has them
        evaluation = evaluate(
            model.to(place),
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
    evaluation = replace(evaluation, index=index)
    num = evaluation.num_examples
    name = "-".join(
        [
            f"{found.at}-{split}",
            *([] if plans == list(ATTACKS) else ["+".join(plans) or "clean"]),
            *([str(t) for t in threats] if norm or eps else []),
            *([f"n{num}"] if num < len(whole) else []),
            *(
                ["corruptions" if list(corruptions) == ["all"] else "+".join(corruptions)]
                if corruptions
                else []
            ),
            *([f"b{batch_size}"] if batch_size != BATCH_SIZE else []),
            *([f"s{seed}"] if seed else []),
            *([f"r{digest([settled.model_dump_json()])[:8]}"] if recipe or settings else []),
        ]
    )
    name = re.sub(r"[^\w+.]+", "-", name.replace("/", "_"))
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 17]}-{digest([name])}"
    order = (
        "" if num == len(whole) else ", in random order" if index is not None else ", the first of a stream"
    )
    title = f"{_name(found)}, {num} images of {split}{order}"
    document = {
        "target": str(found.path),
        "at": found.at,
        "split": split,
        "recipe": None
        if recipe is None
        else " ".join(map(str, [recipe] if isinstance(recipe, str | Path) else recipe)),
        "overrides": list(settings),
        "data": settled.data.model_dump(mode="json"),
        "threat": asdict(settled.threat),
        **evaluation.as_dict(),
    }
    try:
        written = _write(evaluation, document, folder / name, title)
    except OSError as error:
        raise OSError(
            f"{error}\nThe state of every attack is kept; here is what was not written:\n{evaluation.table()}"
        ) from error
    return Evaluated(evaluation, title, written)


def compare_files(a: str | Path, b: str | Path) -> str:
    """Return the comparison of two .npz files of ``evaluate_run``, model A and model B, as text.

    Raises:
        ValueError: They are other files, of other examples, or share no attack.
    """
    result = compare(Evaluation.load(a), Evaluation.load(b))
    return f"A = {a}\nB = {b}\n{result.num_examples} images\n\n{result.table()}"


def _chosen(
    images: ImageSet | StreamSet, num: int | None
) -> tuple[ImageSet | StreamSet, torch.Tensor | None]:
    """Return ``num`` images, in an order that depends on the size of the split alone, and their places.

    All of them, and those of a stream, keep their order: places are None.
    """
    if num is None or num >= len(images) or isinstance(images, StreamSet):
        return images, None
    places = torch.randperm(len(images), generator=generator_from("cpu", "evaluate"))[:num]
    return images.take(places), places


def _name(found: Target) -> str:
    """Return the name of the run, or of the file, and the epoch as far as it is known."""
    name = (found.run or found.path).resolve().name
    epoch = "" if found.epoch is None or found.at == f"epoch-{found.epoch}" else f", epoch {found.epoch}"
    return f"{name} ({found.at}{epoch})"


def _write(evaluation: Evaluation, document: dict[str, Any], path: Path, title: str) -> tuple[Path, ...]:
    """Write flags, numbers, and a curve of each norm with several radii; ``path`` has no ending yet."""
    written = [evaluation.save(path.with_name(f"{path.name}.npz")), path.with_name(f"{path.name}.json")]
    written[1].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
    norms = [threat.norm for threat in evaluation.threats]
    for norm in dict.fromkeys(norms):
        if norms.count(norm) > 1:
            from wcitrain.evaluation.drawing import DPI, accuracy_curve  # matplotlib takes a second to import

            ending = ".png" if len(set(norms)) == 1 else f"-{norm}.png"
            written.append(path.with_name(path.name + ending))
            accuracy_curve(evaluation, norm, title).savefig(written[-1], dpi=DPI)
    return tuple(written)


def _threats(recipe: Recipe, norm: str | None, eps: Sequence[str | float]) -> list[ThreatModel]:
    """Return the balls that were asked for, each once, or the recipe's."""
    kind: str = norm or recipe.threat.norm
    if not eps and kind != recipe.threat.norm:
        raise ValueError(
            f"--norm: got {norm} without --eps, and a recipe whose radius {recipe.threat.eps:g} is for "
            f"{recipe.threat.norm}; expected a radius for it. Give --eps."
        )
    pairs = []
    for text in map(str, eps or [recipe.threat.eps]):
        own, _, radius = text.rpartition(":")
        try:
            pairs.append((own or kind, float(Fraction(radius)) if "/" in radius else float(radius)))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(
                f"--eps: got {text}; expected a radius in pixel units such as 8/255, or with its norm l2:0.5."
            ) from None
    return list(dict.fromkeys(ThreatModel(cast(Any, own), radius) for own, radius in pairs))
