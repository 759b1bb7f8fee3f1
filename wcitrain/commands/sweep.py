"""``wcitrain sweep``: train several recipes and seeds, then report."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    text = "train methods on bases with several settings and seeds, then report and measure"
    sweep = commands.add_parser("sweep", help=text)
    text = "YAML file with `bases`, `methods` and `seeds`; see wcitrain/sweep.py"
    sweep.add_argument("sweep", metavar="SWEEP", help=text)
    text = "settings that override every recipe's"
    sweep.add_argument("settings", nargs="*", metavar="key=value", help=text)
    text = "bases instead of the file's: names or files beside it"
    sweep.add_argument("--bases", nargs="+", metavar="BASE", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.report import load_run, results_table, write_report
    from wcitrain.studying import check_studies, read_studies, run_studies
    from wcitrain.sweep import read_sweep, run_sweep, sweep_content

    where = f"{options.sweep}: measure"
    studies = read_studies(sweep_content(options.sweep).get("measure"), where)
    recipes = read_sweep(options.sweep, options.settings, options.bases)
    check_studies(studies, recipes, where)
    folders = run_sweep(recipes)
    if not folders:
        print("no run has finished: nothing to report")
        return 1
    runs = [load_run(folder) for folder in folders]
    out = folders[0].parent / f"{Path(options.sweep).stem}-report"
    paths = write_report(runs, out)
    print(f"\n{results_table(runs)}")
    paths += run_studies(studies, {run.folder: run.seed for run in runs}, out)
    print(f"\nWritten: {', '.join(map(str, paths))}")
    return 0
