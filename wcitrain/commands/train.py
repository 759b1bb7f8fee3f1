"""``wcitrain train``: train what a recipe says, or go on with a run."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from wcitrain.commands.options import recipe_and_settings
from wcitrain.data import check_images, load_extra, load_splits, parts_of
from wcitrain.listing import recipe_file
from wcitrain.monitoring import cost, try_measures
from wcitrain.progress import refuse_another_run
from wcitrain.recipe import Recipe, load_recipe
from wcitrain.run import start_run
from wcitrain.train import fit, train_epoch


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    names, settings = recipe_and_settings(options.recipe)
    base = [recipe_file(options.base, ["bases"])] if options.base else []
    files = [*base, *(recipe_file(name, ["bases", "methods"]) for name in names)]
    if bool(options.resume) == bool(files):
        raise ValueError("got no recipe, or one with --resume RUN; expected YAML files, or --resume alone.")
    if options.resume:
        files = [str(Path(options.resume) / "recipe.yaml")]
    recipe = load_recipe(files, settings)
    if "data" not in recipe.model_fields_set:  # a method alone would train on the default images
        rule = "a base below them. Give --base, such as --base digits, or set data.source."
        raise ValueError(f"{' '.join(files)}: got a recipe without a data section; expected {rule}")
    if options.resume:
        refuse_another_run(load_recipe(files), recipe, Path(options.resume))
    if int(os.environ.get("RANK", 0)) == 0:
        print(recipe.to_yaml(), flush=True)
    if options.check_data:
        splits = load_splits(recipe.data)
        parts = parts_of(splits, load_extra(recipe.extra, recipe.data, splits) if recipe.extra.path else None)
        check_images(parts, decode=True)
        print(f"data: all {sum(map(len, parts.values()))} images can be decoded", flush=True)
    if options.dry_run:
        print(dry_run(recipe))
    else:
        fit(recipe, resume=bool(options.resume), folder=options.resume)
    return 0


def dry_run(recipe: Recipe) -> str:
    """Make the first step of a run in memory and return what it cost; nothing is written or logged."""
    silent = recipe.tracking.model_copy(update={"wandb": "disabled", "tensorboard": False})
    # As if resumed: a folder that holds a run already is no reason to refuse.
    built = start_run(recipe.model_copy(update={"tracking": silent}), resume=True)
    try_measures(built)
    run = replace(built, updates=1)  # of the epoch, so that it ends after the first
    train_epoch(run)
    passes = cost(run)
    return (
        f"{recipe.method}: {built.updates} steps an epoch, {recipe.train.epochs} epochs\n"
        f"a step: {passes['forward_passes']:g} forward and {passes['backward_passes']:g} backward passes, "
        f"{passes['relative_to_pgd10_at']:.2f} x PGD-10 adversarial training, "
        f"{passes['relative']:.2f} x its objective\n"
        f"it took {run.progress.epoch_seconds:.2f} s on {run.device.type}, the first, which is slower"
    )
