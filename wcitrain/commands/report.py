"""``wcitrain report``: a table, figures and one HTML page from run folders."""

import argparse
import sys
from pathlib import Path
from typing import Any

from wcitrain.attacks import Attack
from wcitrain.build import step_size
from wcitrain.commands.common import writable
from wcitrain.report import Run, load_run, results_table, write_report
from wcitrain.targets import open_run


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    folders = [Path(folder) for folder in options.runs]
    first = folders[0]  # runs/* also matches the reports beside them
    others = [folder for folder in folders if folder.is_dir() and not (folder / "recipe.yaml").exists()]
    if others and len(others) < len(folders):
        print(f"Left out, no runs: {', '.join(map(str, others))}", file=sys.stderr)
        folders = [folder for folder in folders if folder not in others]
    runs = [load_run(folder) for folder in folders]
    usual = first / "figures" if len(runs) == 1 else first.parent / "report"
    images = None if options.no_images else images_under_attack
    paths = write_report(runs, writable(options.out or usual), images=images)
    print(f"{results_table(runs)}\n\nWritten: {', '.join(map(str, paths))}")
    return 0


def images_under_attack(run: Run) -> Any:
    """Return a figure of a run's first test images under its recipe's evaluation attack."""
    from wcitrain.report.figures import NUM_IMAGES, strip  # matplotlib takes a second to import

    target = open_run(run.folder, device="cpu")
    recipe = target.recipe
    x, y, _ = next(iter(target.images("test").batches(NUM_IMAGES)))
    attack = Attack(recipe.threat, recipe.evaluation.num_steps, step_size(recipe, recipe.evaluation))
    return strip(target.load_model(), x, y, attack, title=run.name, seed=recipe.seed)
