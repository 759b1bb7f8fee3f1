"""Tables, figures and a page from run folders: what ``wcitrain report`` writes.

Runs of one group (the same recipe under several seeds) share a table row and a curve. An unfinished run is
never averaged with finished ones: it has a row of its own, and its accuracies are marked as validation
accuracies, since the test set is measured at the end of a run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wcitrain.report.runs import Run, group_rows, load_run, results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    runs: Sequence[Run], out: str | Path, *, images: "Callable[[Run], Figure] | None" = None
) -> list[Path]:
    """Write ``table.md``, ``report.html`` and each figure of the page as a PNG; return their paths.

    Files of these names are overwritten in the folder ``out``; nothing else is touched. ``images`` draws a
    run's images under attack (``figures.strip``); where it raises, the page says why. ValueError: no runs, or
    a run twice.
    """
    import matplotlib

    from wcitrain.report.drawing import SETTINGS
    from wcitrain.report.page import page_and_figures

    out = Path(out)
    table, rows = results_table(runs), group_rows(runs)
    written = [out / "table.md", out / "report.html"]
    with matplotlib.rc_context(SETTINGS):
        page, figures = page_and_figures(rows, images)
        out.mkdir(parents=True, exist_ok=True)
        written[0].write_text(table, "utf-8")
        written[1].write_text(page, "utf-8")
        for name, figure in figures.items():
            written.append(out / f"{name}.png")
            figure.savefig(written[-1])
    return written
