"""``wcitrain sweep``: train several recipes and seeds, then report and measure.

The ``measure`` key of a sweep file is a list of studies, with the keys of ``commands.study.Study``::

    measure:
      - {at: all, split: test, measures: [average_flatness, wci], examples: 100, seeds: [0]}  # curves
      - {at: last, measures: all, correlate: true}    # with the robust gap, over runs
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wcitrain.commands.correlation import correlated
from wcitrain.commands.study import Measured, Study, epochs, measure_all, read_study
from wcitrain.listing import recipe_file
from wcitrain.recipe import Recipe
from wcitrain.report import load_run, results_table, write_report
from wcitrain.sweep import read_sweep, read_sweep_file, run_sweep
from wcitrain.targets import attack_of, open_run


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    path = recipe_file(options.sweep, ["sweeps"])
    recipes = read_sweep(path, options.settings, options.bases)
    studies = read_studies(read_sweep_file(path).measure, recipes, f"{path}: measure")
    folders = run_sweep(recipes)
    if not folders:
        print("no run has finished: nothing to report")
        return 1
    runs = [load_run(folder) for folder in folders]
    out = folders[0].parent / f"{Path(path).stem}-report"
    written = write_report(runs, out)
    print(f"\n{results_table(runs)}")
    written += run_studies(studies, {run.folder: run.seed for run in runs}, out)
    print(f"\nWritten: {', '.join(map(str, written))}")
    return 0


def read_studies(content: Any, recipes: Sequence[Recipe], where: str) -> list[Study]:
    """Return the studies of a sweep's ``measure`` key, checked before anything is trained.

    Raises:
        ValueError: Not a list of mappings, wrong keys, or seeds and epochs that no run will have.
    """
    if content is None:
        return []
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        rule = "a list of studies, such as [{at: last, measures: [wci]}]."
        raise ValueError(f"{where}: got {content!r}; expected {rule}")
    studies, seeds = [], {recipe.seed for recipe in recipes}
    for number, item in enumerate(content):
        here = f"{where}[{number}]"
        study = read_study(item, f"{here}.{{}}".format)
        if not set(study.seeds or ()) <= seeds:
            rule = f"some of the sweep's {sorted(seeds)}."
            raise ValueError(f"{here}.seeds: got {study.seeds}; expected {rule}")
        is_epoch = study.at == "all" or (study.at or "").isdecimal()
        if study.at not in (None, "last", "best") and not is_epoch:
            rule = "last, best, all or the number of a kept epoch."
            raise ValueError(f"{here}.at: got {study.at!r}; expected {rule}")
        if is_epoch and not all(recipe.checkpoint.keep_every for recipe in recipes):
            rule = "last, best, or checkpoint.keep_every set."
            raise ValueError(f"{here}.at: got {study.at!r}; expected {rule}")
        for recipe in recipes:
            attack_of(recipe, study)
        studies.append(study)
    return studies


def run_studies(studies: Sequence[Study], folders: Mapping[Path, int], out: Path) -> list[Path]:
    """Measure what the studies ask for of run folders with their seeds; return the paths written."""
    written: list[Path] = []
    for number, study in enumerate(studies, start=1):
        chosen = [folder for folder, seed in folders.items() if study.seeds is None or seed in study.seeds]
        at = study.at or "last"
        print(f"\n== study {number} of {len(studies)}: {len(chosen)} runs, epochs: {at} ==", flush=True)
        targets = [open_run(folder, epoch) for folder in chosen for epoch in epochs(folder, study.at)]
        models = measure_all(targets, study)
        if at == "all":
            written += _draw_training(models, out)
        if study.correlate:
            text, paths = correlated(models, out / f"correlation-{at}-{study.split}", study.seed)
            written += paths
            print(text)
    return written


def _draw_training(models: Sequence[Measured], out: Path) -> list[Path]:
    """Draw every measure against the epoch, and against the robust loss where that was measured."""
    from wcitrain.report.figures import Point, measures_against_loss, measures_through_training

    points = []
    for model in models:
        target, values = model.target, {name: model.value(name) for name in model.measures}
        points.append(Point(target.run or target.path, target.epoch or 0, values))
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "measures-through-training": measures_through_training(points),
        "measures-against-loss": measures_against_loss(points),
    }
    drawn = {out / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        figure.savefig(path)
    return list(drawn)
