"""``wcitrain evaluate``: clean, robust and corrupted accuracy of a trained model."""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.commands.options import recipe_and_settings
from wcitrain.commands.output import file_name, opened, refuse_several_processes
from wcitrain.data import Images, ImageSet
from wcitrain.digest import digest
from wcitrain.evaluation import Corruptions, Evaluation, PreflightWarning, compare, evaluate, parse_attack
from wcitrain.recipe import Recipe
from wcitrain.seeding import generator_from
from wcitrain.targets import Target, radius


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    if (options.target is None) == (options.compare is None):
        got = "neither" if options.target is None else "both"
        advice = "Give a model as the first word, before options with several values, or two .npz files."
        raise ValueError(f"got {got} of TARGET and --compare; expected one. {advice}")
    if options.compare:
        a, b = options.compare
        result = compare(Evaluation.load(a), Evaluation.load(b))
        print(f"A = {a}\nB = {b}\n{result.num_examples} images\n\n{result.table()}")
        return 0
    refuse_several_processes()
    options.attacks = [parse_attack(name).name for name in options.attacks]
    target = opened(options, options.target, options.at)
    threats = _threats(target.recipe, options.norm, options.eps)
    corrupted = _corruptions(options)
    if options.batch_size < 1 or (options.examples is not None and options.examples < 1):
        got = f"num_examples={options.examples}, batch_size={options.batch_size}"
        raise ValueError(f"evaluate: got {got}; expected at least 1.")
    evaluation = _evaluated(target, threats, corrupted, options)
    order = ", in random order" if evaluation.index is not None else ", the first of a stream"
    order = "" if evaluation.num_examples == len(target.images(options.split)) else order
    title = f"{target.name}, {evaluation.num_examples} images of {options.split}{order}"
    notes = dict.fromkeys(note for result in evaluation.attacks for note in result.notes)
    findings = (f"{finding.severity}: {finding}" for finding in evaluation.findings)
    table = evaluation.table()
    try:
        written = _write(evaluation, target, title, options)
    except OSError as error:
        text = "The state of every attack is kept; here is what was not written:"
        raise OSError(f"{error}\n{text}\n{table}") from error
    print("\n".join([title, "", table, "", *notes, *findings]))
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def _corruptions(options: argparse.Namespace) -> Corruptions | None:
    """Return the corrupted images that were asked for: files, of the test images only."""
    if not options.corruptions:
        return None
    root, split = options.corruptions_root, options.split
    if root is None or split != "test":
        got = f"{' '.join(options.corruptions)} with --corruptions-root {root} and --split {split}"
        rule = "expected the folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C, and test images. Give both."
        raise ValueError(f"--corruptions: got {got}; {rule}")
    return Corruptions.find(root, options.corruptions)


def _evaluated(
    target: Target, threats: Sequence[ThreatModel], corrupted: Corruptions | None, options: argparse.Namespace
) -> Evaluation:
    """Attack the images that were asked for.

    The state of every attack is kept in ``state/`` beside the results, under a digest of weights, images and
    settings: the same command goes on where a killed one was.
    """
    folder = target.folder("evaluations", options.out)
    images, index = chosen(target.images(options.split), options.examples)
    if corrupted:
        if not isinstance(images, ImageSet):
            text = "got images that are read front to back; expected ones with places. Use other data."
            raise ValueError(f"--corruptions: {text}")
        corrupted = replace(corrupted, places=images.positions)
    model = target.load_model()
    folder.mkdir(parents=True, exist_ok=True)  # where that fails, it does so before the attacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)  # the text has them
        evaluation = evaluate(
            model,
            images.batches(min(options.batch_size, len(images)), device="cpu"),
            threats,
            attacks=options.attacks,
            corruptions=corrupted,
            num_examples=options.examples,
            batch_size=options.batch_size,
            seed=options.seed,
            folder=folder / "state",
            preflight=options.preflight,
        )
    return replace(evaluation, index=index)


def chosen(images: Images, num: int | None) -> tuple[Images, torch.Tensor | None]:
    """Return ``num`` images at random, the same for every model and seed, and their places.

    Splits are often sorted by class. All of them, and those of a stream, keep their order: places are None.
    """
    if num is None or num >= len(images) or not isinstance(images, ImageSet):
        return images, None
    places = torch.randperm(len(images), generator=generator_from("cpu", "evaluate"))[:num]
    return images.take(places), places


def _write(evaluation: Evaluation, target: Target, title: str, options: argparse.Namespace) -> list[Path]:
    """Write flags, numbers, and a curve of each norm with several radii."""
    recipe, settings = recipe_and_settings(options.recipe)
    num, num_all = evaluation.num_examples, len(target.images(options.split))
    name = file_name(
        f"{target.at}-{options.split}",
        "" if options.attacks == ["pgd-20", "margin-20"] else "+".join(options.attacks) or "clean",
        "-".join(map(str, evaluation.threats)) if options.norm or options.eps else "",
        "" if num == num_all else f"n{num}",
        "corruptions" if options.corruptions == ["all"] else "+".join(options.corruptions),
        "" if options.batch_size == 200 else f"b{options.batch_size}",
        f"s{options.seed}" if options.seed else "",
        f"r{digest([target.recipe.model_dump_json()])[:8]}" if options.recipe else "",
    )
    document: dict[str, Any] = {
        "target": str(target.path),
        "at": target.at,
        "split": options.split,
        "recipe": " ".join(recipe) or None,
        "overrides": settings,
        "data": target.recipe.model_dump(mode="json")["data"],
        "threat": asdict(target.recipe.threat),
        **evaluation.as_dict(),
    }
    folder = target.folder("evaluations", options.out)
    written = [evaluation.save(folder / f"{name}.npz"), files.write_json(folder / f"{name}.json", document)]
    norms = [threat.norm for threat in evaluation.threats]
    for norm in dict.fromkeys(norms):
        if norms.count(norm) > 1:
            from wcitrain.report.figures import accuracy_curve  # matplotlib takes a second to import

            written.append(folder / (f"{name}.png" if len(set(norms)) == 1 else f"{name}-{norm}.png"))
            accuracy_curve(evaluation, norm, title).savefig(written[-1])
    return written


def _threats(recipe: Recipe, norm: str | None, eps: Sequence[str]) -> list[ThreatModel]:
    """Return the balls that were asked for, each once, or the recipe's."""
    own = recipe.threat
    if not eps and norm not in (None, own.norm):
        text = f"got {norm} without --eps, and a recipe whose radius {own.eps:g} is for {own.norm}"
        raise ValueError(f"--norm: {text}; expected a radius for it. Give --eps.")
    pairs = [text.rpartition(":") for text in eps]
    threats = [ThreatModel(cast(Any, first or norm or own.norm), radius(last)) for first, _, last in pairs]
    return list(dict.fromkeys(threats)) or [own]
