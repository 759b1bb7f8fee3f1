"""``wcitrain sweep``: train several recipes and seeds, then report and measure.

The ``measure`` key of a sweep file is a list of studies, with the keys of ``commands.study.Study``::

    measure:
      - {at: all, split: test, measures: [average_flatness, wci], examples: 100, seeds: [0]}  # curves
      - {at: last, measures: all, correlate: true}    # with the robust gap, over runs
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wcitrain.commands.common import attack_asked
from wcitrain.commands.correlation import correlated
from wcitrain.commands.study import Study, epochs, measure_all
from wcitrain.listing import recipe_file
from wcitrain.recipe import Recipe
from wcitrain.report import Run, load_run, results_table, write_report
from wcitrain.sweep import read_sweep, read_sweep_file, run_sweep
from wcitrain.targets import open_run


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
    for number, study in enumerate(studies, start=1):
        chosen = [run for run in runs if study.seeds is None or run.seed in study.seeds]
        print(f"\n== study {number} of {len(studies)}: {len(chosen)} runs ==", flush=True)
        written += _measured(study, chosen, out)
    print(f"\nWritten: {', '.join(map(str, written))}")
    return 0


def read_studies(content: Any, recipes: Sequence[Recipe], where: str) -> list[Study]:
    """Return the studies of a sweep's ``measure`` key, checked before anything is trained.

    ValueError, which begins with ``where``, for a wrong one.
    """
    content = [] if content is None else content
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        rule = "a list of studies, such as [{at: last, measures: [wci]}]."
        raise ValueError(f"{where}: got {content!r}; expected {rule}")
    studies, seeds = [], {recipe.seed for recipe in recipes}
    for number, item in enumerate(content):
        here = f"{where}[{number}]"
        try:
            study = Study(**item)
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from error
        if not set(study.seeds or ()) <= seeds:
            raise ValueError(f"{here}.seeds: got {study.seeds}; expected some of {sorted(seeds)}.")
        are_kept = all(recipe.checkpoint.keep_every for recipe in recipes)
        if study.at not in (None, "last", "best") and not are_kept:
            rule = "last, best, or checkpoint.keep_every set."
            raise ValueError(f"{here}.at: got {study.at!r}; expected {rule}")
        for recipe in recipes:
            attack_asked(recipe, study)
        studies.append(study)
    return studies


def _measured(study: Study, runs: Sequence[Run], out: Path) -> list[Path]:
    """Measure what a study asks for; return the paths of its figures and tables."""
    from wcitrain.report.figures import measures_against_loss, measures_through_training

    written: list[Path] = []
    targets = [open_run(run.folder, epoch) for run in runs for epoch in epochs(run.folder, study.at)]
    models = measure_all(targets, study)
    if study.at == "all":
        points = [
            (one.target.home, one.target.epoch or 0, {name: one.value(name) for name in one.measures})
            for one in models
        ]
        best = {run.folder: run.measured("best")["epoch"] for run in runs}
        figures = {
            "measures-through-training": measures_through_training(points, best),
            "measures-against-loss": measures_against_loss(points),
        }
        for name, figure in figures.items():
            if figure is not None:
                written.append(out / f"{name}.png")
                figure.savefig(written[-1])
    if study.correlate:
        name = f"correlation-{study.at or 'last'}-{study.split}"
        text, paths = correlated(models, out / name, study.seed)
        written += paths
        print(text)
    return written
