"""``wcitrain train``: train what a recipe says, or go on with a run."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from wcitrain.commands.options import recipe_and_settings
from wcitrain.listing import recipe_file
from wcitrain.monitoring import try_measures
from wcitrain.progress import refuse_another_run
from wcitrain.recipe import Recipe, load_recipe
from wcitrain.run import start_run
from wcitrain.summary import cost
from wcitrain.train import fit, train_epoch


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    names, settings = recipe_and_settings(options.recipe)
    base = [recipe_file(options.base, ["bases"])] if options.base else []
    files = [*base, *(recipe_file(name, ["bases", "methods"]) for name in names)]
    if options.resume:
        if files:
            raise ValueError(f"--resume: got a recipe as well ({files[0]}); expected the run folder alone.")
        files = [str(Path(options.resume) / "recipe.yaml")]
        if not Path(files[0]).exists():
            rule = "a run folder, which holds recipe.yaml."
            raise FileNotFoundError(f"--resume: got {options.resume}; expected {rule}")
    elif not files:
        raise ValueError("got no recipe; expected YAML files, or --resume RUN. `wcitrain list recipes`.")
    recipe = load_recipe(files, settings)
    if options.resume:
        refuse_another_run(load_recipe(files), recipe, Path(options.resume))
    if int(os.environ.get("RANK", 0)) == 0:
        print(recipe.to_yaml(), flush=True)
    if options.dry_run:
        print(dry_run(recipe))
    else:
        fit(recipe, resume=bool(options.resume), folder=options.resume)
    return 0


def dry_run(recipe: Recipe) -> str:
    """Make the first step of a run in memory and return what it cost; nothing is written or logged.

    Raises:
        ValueError, NonFiniteLossError: As in ``train.fit``.
    """
    silent = recipe.tracking.model_copy(update={"wandb": "disabled", "tensorboard": False})
    # As if resumed: a folder that holds a run already is no reason to refuse.
    built = start_run(recipe.model_copy(update={"tracking": silent}), resume=True)
    try_measures(built)
    run = replace(built, updates=1)  # of the epoch, so that it ends after the first
    train_epoch(run)
    passes = cost(run)
    forward, backward = (f"{passes[f'{kind}_passes']:g} {kind}" for kind in ("forward", "backward"))
    multiple = f"{passes['relative_to_pgd10_at']:.2f} x PGD-10 adversarial training"
    seconds = f"{run.progress.epoch_seconds:.2f} s on {run.device.type}, the first, which is slower"
    lines = [
        f"{recipe.method}: {built.updates} steps an epoch, {recipe.train.epochs} epochs",
        f"a step: {forward} and {backward} passes, {multiple}, {passes['relative']:.2f} x its objective",
        f"it took {seconds}",
    ]
    return "\n".join(lines)
