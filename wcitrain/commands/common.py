"""What the commands that open a model have in common: opening it, and names of files."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.build import step_size
from wcitrain.commands.options import recipe_and_settings
from wcitrain.data.sources import SOURCES
from wcitrain.digest import digest
from wcitrain.listing import recipe_file
from wcitrain.recipe import Recipe
from wcitrain.targets import Target, open_run

LONGEST = 120  # characters of a file's name without its ending; file systems take 255 bytes


def opened(options: argparse.Namespace, target: str, at: str | None) -> Target:
    """Return the target of a command; a launcher is refused: every process would measure the same."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rule = "one. Start it without a launcher."
        raise ValueError(f"got {os.environ['WORLD_SIZE']} processes; expected {rule}")
    if options.data:  # the shorthand for settings
        if wrong := [text for text in options.data if "=" in text]:
            rule = "the name of a data set, its folder, or both. Settings go to --recipe"
            raise ValueError(f"--data: got {wrong[0]}; expected {rule}.")
        source, *root = options.data if options.data[0] in SOURCES else ("folder", *options.data)
        given = [f"data.source={source}", *(f"data.root={place}" for place in root)]
        options.recipe, options.data = [*given, *options.recipe], None
    files, settings = recipe_and_settings(options.recipe)
    files = [recipe_file(name, ["bases", "methods"]) for name in files]
    return open_run(target, at, files, settings, options.device, options.checkpoint)


def writable(folder: str | Path) -> Path:
    """Return the folder that results will go to; ValueError, before they cost anything, where they cannot."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return folder
    got = "which cannot be written" if there.is_dir() else "a file"
    raise ValueError(f"--out: got {there}, {got}; expected a folder that can be. Name another.")


def attack_asked(recipe: Recipe, options: Any) -> Attack | None:
    """Return the recipe's evaluation attack with the changes in ``options``; None is the clean loss.

    ``options`` has ``clean``, ``norm``, ``eps`` and ``steps``; the last three make the step 2.5 eps / steps.
    ValueError for ``clean`` beside one of them, and for another norm without a radius of its own.
    """
    own, given = recipe.threat, _changes(options)
    if options.eps is None and options.norm not in (None, own.norm):
        text = f"got {options.norm} without --eps, and a recipe whose radius {own.eps:g} is for {own.norm}"
        raise ValueError(f"--norm: {text}; expected a radius for it. Give --eps.")
    if options.clean:
        if given:
            raise ValueError(f"--clean: got {', '.join(given)} as well; expected no attack. Leave one out.")
        return None
    threat = ThreatModel(options.norm or own.norm, own.eps if options.eps is None else options.eps)
    steps = recipe.evaluation.num_steps if options.steps is None else options.steps
    return Attack(threat, steps, threat.step_for(steps) if given else step_size(recipe, recipe.evaluation))


def _changes(options: Any) -> list[str]:
    """Return the options that ask for another attack than the recipe's."""
    return [f"--{name}" for name in ("norm", "eps", "steps") if getattr(options, name) is not None]


def file_name(*parts: str) -> str:
    """Return the parts that are not empty as a name for a file, of at most ``LONGEST`` characters."""
    text = "-".join(part for part in parts if part).replace("/", "_")
    name = re.sub(r"[^\w+.]+", "-", text).strip("-")
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 17]}-{digest([name])}"


def attack_part(options: Any, attack: Attack | None) -> str:
    """Return what a file's name says about the attack: nothing for the recipe's."""
    if attack is None:
        return "clean"
    return f"{attack.threat}-PGD-{attack.num_steps}" if _changes(options) else ""


def number_parts(options: Any, num: int | None, usual: int) -> list[str]:
    """Return what it says about the number of examples and the seed, where they differ from the defaults."""
    return ["" if num in (None, usual) else f"n{num}", f"s{options.seed}" if options.seed else ""]


def recipe_part(options: argparse.Namespace, target: Target, settings: object = None) -> str:
    """Return a digest of the recipe, where another than the run's own was given, and of further settings."""
    parts = [target.recipe.model_dump_json()] if options.recipe else []
    parts += [repr(settings)] if settings else []
    return f"r{digest(parts)[:8]}" if parts else ""
