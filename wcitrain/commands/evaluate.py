"""``wcitrain evaluate``: clean, robust and corrupted accuracy of a trained model."""

import argparse
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.commands.common import file_name, number_parts, opened, recipe_part
from wcitrain.commands.options import parser, recipe_and_settings
from wcitrain.data import Images, ImageSet
from wcitrain.data.sets import class_order
from wcitrain.data.splits import is_count
from wcitrain.digest import digest
from wcitrain.evaluation import (
    Corruptions,
    Evaluation,
    PreflightWarning,
    Transfer,
    compare,
    evaluate,
    parse_attack,
    save_images,
)
from wcitrain.finding import find
from wcitrain.recipe import Recipe
from wcitrain.seeding import seed_from
from wcitrain.targets import Target
from wcitrain.text import name_some


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    if (options.target is None) == (options.compare is None):
        got = "neither" if options.target is None else "both"
        advice = "Give a model as the first word, before options with several values, or two .npz files."
        raise ValueError(f"got {got} of TARGET and --compare; expected one. {advice}")
    _refuse_without_effect(options)
    if options.compare:
        a, b = options.compare
        first, second = Evaluation.load(a), Evaluation.load(b)
        result = compare(first, second)
        print(f"A = {a}\nB = {b}\n{result.num_examples} images\n\n{result.table()}\n")
        for name, evaluation in (("A", first), ("B", second)):
            for finding in evaluation.findings:
                print(f"{name}: {finding.severity}: {finding}")
        return 0
    options.attacks = [parse_attack(name).name for name in options.attacks]
    options.transfer_images = [Transfer.load(path) for path in options.transfer_images]
    target = opened(options, options.target, options.at)
    evaluation = _evaluated(target, options)
    num_images = f"{evaluation.num_examples} of {len(target.images(options.split))} images"
    title = f"{target.title}, {num_images} of {options.split}"
    table = evaluation.table()
    try:
        written = _write(evaluation, target, title, options)
    except OSError as error:
        text = "The state of every attack is kept; here is what was not written:"
        raise OSError(f"{error}\n{text}\n{table}") from error
    print("\n".join([title, "", table, ""]))
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def _evaluated(target: Target, options: argparse.Namespace) -> Evaluation:
    """Attack the images that were asked for; a killed command goes on from ``state/`` beside the results."""
    threats, minimal = _threats(target.recipe, options)
    root, corrupted = options.corruptions_root, None
    if options.corruptions and (root is None or options.split != "test"):
        got = f"{' '.join(options.corruptions)} with --corruptions-root {root} and --split {options.split}"
        rule = "the folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C, and test images. Give both."
        raise ValueError(f"--corruptions: got {got}; expected {rule}")
    if min(options.batch_size, options.eot) < 1 or (options.examples is not None and options.examples < 1):
        got = f"--examples {options.examples}, --eot {options.eot} and --batch-size {options.batch_size}"
        raise ValueError(f"evaluate: got {got}; expected at least 1.")
    if options.corruptions:
        corrupted = Corruptions.find(root, options.corruptions)
    images, index = chosen(target.images(options.split), options.examples)
    if corrupted:
        if not isinstance(images, ImageSet):
            text = "got images that are read front to back; expected ones with places. Use other data."
            raise ValueError(f"--corruptions: {text}")
        names = target.splits.class_names
        corrupted = replace(corrupted, places=images.positions, classes=None if is_count(names) else names)
    source = _source(options, target).load_model() if options.transfer else None
    model, folder = target.load_model(), target.folder("evaluations", options.out)
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
            minimal=minimal,
            transfer_images=options.transfer_images,
            keep_images=options.save_images,
            eot=options.eot,
            bpda=options.bpda,
            transfer=source,
        )
    return replace(evaluation, index=index)


def _source(options: argparse.Namespace, target: Target) -> Target:
    """Return the model of --transfer; ValueError where its classes are not known to be the target's."""
    own = argparse.Namespace(**vars(options) | {"checkpoint": None})  # that is of the target
    if not options.recipe and find(options.transfer, None)[1] is None:  # no run, whose recipe says its data
        own.recipe = [f"data={json.dumps(target.recipe.model_dump(mode='json')['data'])}"]
    source = opened(own, options.transfer, None)
    names, wanted = source.class_names, target.class_names
    if names is not None and wanted is not None and names != wanted:
        got = f"got {options.transfer} with the classes {name_some(names)}"
        raise ValueError(f"--transfer: {got}; expected the target's, {name_some(wanted)}. Give another.")
    return source


def chosen(images: Images, num: int | None) -> tuple[Images, torch.Tensor | None]:
    """Return ``num`` images at random, in class shares, the same for every model and seed, and their places.

    Splits are often sorted by class. All of them, and those of a stream, keep their order: places are None.
    """
    if num is None or num >= len(images):
        return images, None
    if not isinstance(images, ImageSet):
        return images.subset(num), None
    places = class_order(images.y, seed_from("evaluate"))[:num]
    return images.take(places), places


def _write(evaluation: Evaluation, target: Target, title: str, options: argparse.Namespace) -> list[Path]:
    """Write flags, numbers, and a curve of each norm with several radii."""
    recipe, settings = recipe_and_settings(options.recipe)
    number, seed = number_parts(options, evaluation.num_examples, len(target.images(options.split)))
    name = file_name(
        f"{target.at}-{options.split}",
        "" if options.attacks == ["pgd-20", "margin-20"] else "+".join(options.attacks) or "clean",
        "-".join(map(str, evaluation.threats)) if options.norm or options.eps else "",
        number,
        "-".join(["minimal"] * bool(evaluation.minimal) + [str(one.largest) for one in evaluation.minimal]),
        "+".join(one.name for one in options.transfer_images),
        "corruptions" if options.corruptions == ["all"] else "+".join(options.corruptions),
        "" if options.batch_size == 200 else f"b{options.batch_size}",
        "" if options.eot == 1 else f"eot{options.eot}",
        "-".join(["bpda", *options.bpda]) if options.bpda else "",
        f"transfer-{digest([options.transfer])[:8]}" if options.transfer else "",
        seed,
        recipe_part(options, target),
    )
    document: dict[str, Any] = {
        "target": str(target.path),
        "checkpoint": target.checkpoint,
        "at": target.at,
        "epoch": target.epoch,
        "split": options.split,
        "recipe": " ".join(recipe) or None,
        "overrides": settings,
        "data": target.recipe.model_dump(mode="json")["data"],
        "threat": asdict(target.recipe.threat),
        "notes": target.notes,
        **({"transfer": options.transfer} if options.transfer else {}),
        **evaluation.as_dict(),
    }
    folder = target.folder("evaluations", options.out)
    images = []
    for result, row in zip(evaluation.attacks, document["attacks"], strict=True):
        if options.save_images:
            images.append(folder / f"{file_name(name, result.attack, str(result.threat))}.safetensors")
            sha256 = save_images(images[-1], evaluation, result, f"{target.name} {target.at}")
            row["images"] = {"file": images[-1].name, "sha256": sha256}
    written = [evaluation.save(folder / f"{name}.npz"), files.write_json(folder / f"{name}.json", document)]
    written += images
    if evaluation.minimal:
        from wcitrain.report.figures import minimal_curves  # matplotlib takes a second to import

        written.append(folder / f"{name}-minimal.png")
        curves: Any = {one.largest.norm: {one.attacks: one.curve(256)} for one in evaluation.minimal}
        minimal_curves(curves, title).savefig(written[-1])
    norms = [threat.norm for threat in evaluation.threats]
    for norm in dict.fromkeys(norms):
        if norms.count(norm) > 1:
            from wcitrain.report.figures import accuracy_curve  # matplotlib takes a second to import

            written.append(folder / (f"{name}.png" if len(set(norms)) == 1 else f"{name}-{norm}.png"))
            accuracy_curve(evaluation, norm, title).savefig(written[-1])
    return written


def _threats(recipe: Recipe, options: argparse.Namespace) -> tuple[list[ThreatModel], list[ThreatModel]]:
    """Return the balls that were asked for, each once, or the recipe's; and those to bisect in."""
    own, norm = recipe.threat, options.norm
    if not options.eps and norm not in (None, own.norm) and not options.minimal_eps:
        text = f"got {norm} without --eps, and a recipe whose radius {own.eps:g} is for {own.norm}"
        raise ValueError(f"--norm: {text}; expected a radius for it. Give --eps.")
    balls: list[list[ThreatModel]] = []
    for texts in (options.eps, options.minimal_eps):
        pairs = [text.rpartition(":") for text in texts]
        made = [ThreatModel(cast(Any, name or norm or own.norm), cast(Any, eps)) for name, _, eps in pairs]
        balls.append(list(dict.fromkeys(made)))
    threats, minimal = balls
    if len({ball.norm for ball in minimal}) < len(minimal) or not all(ball.eps for ball in minimal):
        got = " ".join(options.minimal_eps)
        raise ValueError(f"--minimal-eps: got {got}; expected one radius above 0 a norm. Give the largest.")
    return threats or [own], minimal


def _refuse_without_effect(options: argparse.Namespace) -> None:
    """Refuse options that change nothing beside the others, each by name."""
    defaults = vars(parser().parse_args(["evaluate"]))
    given = [f"--{key.replace('_', '-')}" for key, value in vars(options).items() if value != defaults[key]]
    if options.compare and (others := [name for name in given if name != "--compare"]):
        got = f"got {', '.join(others)} as well"
        raise ValueError(f"--compare: {got}; expected two files alone. Leave it out.")
    for name in ("--eps", "--norm", "--minimal-eps"):
        if name in given and not options.attacks:
            rule = "expected an attack to use it in"
            raise ValueError(f"--attacks: got none, with {name}; {rule}. Name one, or leave {name} out.")
    radii = [*options.eps, *options.minimal_eps]
    all_named = radii and all(":" in text for text in radii)
    no_attack = not (options.attacks or options.transfer_images)
    idle = {
        "--corruptions-root": (not options.corruptions, "no --corruptions; expected some to read there"),
        "--norm": (all_named, "radii with norms of their own; expected one without"),
        "--save-images": (no_attack, "no attack; expected one to make them"),
    }
    for name, (is_idle, rule) in idle.items():
        if name in given and is_idle:
            raise ValueError(f"{name}: got it with {rule}. It has no effect here: leave it out.")
