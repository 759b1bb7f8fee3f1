"""Tables, figures and a page from run folders: what ``wcitrain report`` writes.

A run folder holds ``recipe.yaml``, ``metrics.jsonl`` (one object an epoch) and, once finished,
``summary.json``. Runs of one group (the same recipe under several seeds) share a table row and a curve. An
unfinished run is never averaged with finished ones: it has a row of its own, and its accuracies are marked as
validation accuracies, since the test set is measured at the end of a run.

Nothing here trains, measures or selects; figures use matplotlib's objects and change no global state.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from wcitrain.report.axes import DPI
from wcitrain.report.figures import curves, tradeoff, wci_layers
from wcitrain.report.page import report_page
from wcitrain.report.runs import Run, group_rows, load_run
from wcitrain.report.table import results_table

__all__ = ["Run", "load_run", "results_table", "write_report"]


def write_report(runs: Sequence[Run], out: str | Path, *, at: str = "last") -> list[Path]:
    """Write table.md, report.html, curves.png and, with numbers for them, tradeoff.png and wci_layers.png.

    report.html is one page with everything in it. tradeoff.png needs two groups with test accuracies,
    wci_layers.png the layer-wise WCI. These five names are overwritten in ``out``; nothing else is touched,
    and a figure left over from an earlier report is warned about. ``at`` is the table's epoch, last or best.

    Raises:
        ValueError: No runs, a run twice, or ``out`` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(
            f"write_report: got out={out}, which is a file; expected a folder. Choose another path."
        )
    rows = group_rows(runs)
    figures = {"curves.png": curves(rows), "tradeoff.png": tradeoff(rows), "wci_layers.png": wci_layers(rows)}
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "table.md", out / "report.html"]
    written[0].write_text(results_table(runs, at=at), "utf-8")
    written[1].write_text(report_page(rows, at=at), "utf-8")
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(out / name, dpi=DPI)
            written.append(out / name)
        elif (out / name).exists():
            warnings.warn(
                f"{out / name} is from an earlier report: these runs lack the numbers for it", stacklevel=2
            )
    return written
