"""``wcitrain sweep``: train several recipes and seeds, then report."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    sweep = commands.add_parser("sweep", help="train several recipes, settings and seeds, then report and measure")
    sweep.add_argument("sweep", metavar="SWEEP", help="YAML file with `recipes` and `seeds`; see wcitrain/sweep.py")
    sweep.add_argument("settings", nargs="*", metavar="key=value", help="settings that override every recipe's")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.report import load_run, results_table, write_report
    from wcitrain.studying import check_studies, read_studies, run_studies
    from wcitrain.sweep import read_sweep, run_sweep, sweep_content

    where = f"{options.sweep}: measure"
    studies = read_studies(sweep_content(options.sweep).get("measure"), where)
    check_studies(studies, read_sweep(options.sweep, options.settings), where)
    folders = run_sweep(options.sweep, options.settings)
    runs = [load_run(folder) for folder in folders]
    out = folders[0].parent / f"{Path(options.sweep).stem}-report"
    paths = write_report(runs, out)
    print(f"\n{results_table(runs)}")
    paths += run_studies(studies, {run.folder: run.seed for run in runs}, out)
    print(f"\nWritten: {', '.join(map(str, paths))}")
    return 0
