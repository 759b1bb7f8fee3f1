"""``wcitrain report``: a table, figures and one HTML page from run folders."""

import argparse
import sys
from pathlib import Path
from typing import Any

from wcitrain.attacks import Attack
from wcitrain.build import step_size
from wcitrain.report import load_run, results_table, write_report
from wcitrain.targets import open_run


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    folders = [Path(run) for run in options.runs]
    first = folders[0]
    if len(folders) > 1:  # runs/* also matches the reports beside them
        skipped = [folder for folder in folders if folder.is_dir() and not (folder / "recipe.yaml").exists()]
        folders = [folder for folder in folders if folder not in skipped]
        if skipped:
            print(f"Left out, no runs: {', '.join(map(str, skipped))}", file=sys.stderr)
    runs = [load_run(folder) for folder in folders]
    usual = first / "figures" if len(runs) == 1 else first.parent / "report"
    images = None if options.no_images else images_under_attack
    paths = write_report(runs, Path(options.out or usual), at=options.at, images=images)
    print(f"{results_table(runs, at=options.at)}\n\nWritten: {', '.join(map(str, paths))}")
    return 0


def images_under_attack(run: Any) -> Any:
    """Return a figure of a run's first test images under its recipe's evaluation attack."""
    from wcitrain.report.strip import NUM_IMAGES, strip  # matplotlib takes a second to import

    target = open_run(run.folder, device="cpu")
    recipe = target.recipe
    x, y, _ = next(iter(target.images("test").batches(NUM_IMAGES)))
    attack = Attack(recipe.threat, recipe.evaluation.num_steps, step_size(recipe, recipe.evaluation))
    return strip(target.load_model(), x, y, attack, title=run.name, seed=recipe.seed)
