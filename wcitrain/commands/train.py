"""``wcitrain train``: train what a recipe says, or go on with a run."""

import argparse
import os
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    text = "Train what a recipe says. `accelerate launch -m wcitrain train RECIPE` is the same program."
    train = commands.add_parser("train", help="train what a recipe says", description=text)
    text = "YAML files laid on one another, such as a base and a method; then settings key=value that win"
    train.add_argument("recipe", nargs="*", metavar="RECIPE", help=text)
    train.add_argument("--resume", metavar="RUN", help="run folder to go on with, instead of a recipe")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.progress import refuse_another_run
    from wcitrain.recipe import load_recipe
    from wcitrain.train import fit

    files = [text for text in options.recipe if "=" not in text]
    settings = [text for text in options.recipe if "=" in text]
    if options.resume:
        if files:
            raise ValueError(f"--resume: got a recipe as well ({files[0]}); expected the run folder alone.")
        files = [str(Path(options.resume) / "recipe.yaml")]
        if not Path(files[0]).exists():
            rule = "a run folder, which holds recipe.yaml."
            raise FileNotFoundError(f"--resume: got {options.resume}; expected {rule}")
    elif not files:
        raise ValueError("got no recipe; expected YAML files, or --resume RUN. `recipes/` holds some.")
    recipe = load_recipe(files, settings)
    if options.resume:
        refuse_another_run(load_recipe(files), recipe, Path(options.resume))
    if int(os.environ.get("RANK", 0)) == 0:
        print(recipe.to_yaml(), flush=True)
    fit(recipe, resume=bool(options.resume), folder=options.resume)
    return 0
