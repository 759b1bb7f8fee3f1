"""``wcitrain report``: a table, figures and one HTML page from run folders."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    report = commands.add_parser("report", help="a table, figures and one HTML page from run folders")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    report.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write (default: figures/ of the run, or report/ beside several)",
    )
    report.add_argument(
        "--at", choices=("last", "best"), default="last", help="epoch the table shows (default: last)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.report import load_run, results_table, write_report

    folders = [Path(run) for run in options.runs]
    if len(folders) > 1:  # runs/* also matches the reports beside them
        skipped = [folder for folder in folders if folder.is_dir() and not (folder / "recipe.yaml").exists()]
        folders = [folder for folder in folders if folder not in skipped]
        if skipped:
            print(f"Left out, no runs: {', '.join(map(str, skipped))}", file=sys.stderr)
    runs = [load_run(folder) for folder in folders]
    first = Path(options.runs[0])
    out = (
        Path(options.out) if options.out else first / "figures" if len(runs) == 1 else first.parent / "report"
    )
    paths = write_report(runs, out, at=options.at)
    print(f"{results_table(runs, at=options.at)}\n\nWritten: {', '.join(map(str, paths))}")
    return 0
