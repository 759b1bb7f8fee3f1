"""Tables, figures and a page from run folders: what ``wcitrain report`` writes.

A run folder holds ``recipe.yaml``, ``metrics.jsonl`` (one object an epoch) and, once finished,
``summary.json``. Runs of one group (the same recipe under several seeds) share a table row and a curve. An
unfinished run is never averaged with finished ones: it has a row of its own, and its accuracies are marked as
validation accuracies, since the test set is measured at the end of a run.

Nothing here trains, measures or selects; figures use matplotlib's objects and change no global state.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wcitrain.report.runs import Run, group_rows, load_run
from wcitrain.report.table import results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    runs: Sequence[Run],
    out: str | Path,
    *,
    at: str = "last",
    images: "Callable[[Run], Figure] | None" = None,
) -> list[Path]:
    """Write ``table.md``, ``report.html`` and each figure of the page as a PNG; return their paths.

    A figure without numbers for it is left out. Files of these names are overwritten in ``out``; nothing else
    is touched, and a figure left over from an earlier report is warned about.

    Args:
        runs: At least one.
        out: Folder.
        at: Epoch of the table, ``"last"`` or ``"best"``.
        images: Draws a run's images under attack (``strip``); where it raises, the page says why.

    Raises:
        ValueError: No runs, a run twice, or ``out`` is a file.
    """
    import matplotlib

    from wcitrain.report.drawing import SETTINGS
    from wcitrain.report.page import render, report_sections

    out = Path(out)
    if out.exists() and not out.is_dir():
        text = f"got out={out}, which is a file; expected a folder. Choose another path."
        raise ValueError(f"write_report: {text}")
    table, rows = results_table(runs, at=at), group_rows(runs)
    written = [out / "table.md", out / "report.html"]
    with matplotlib.rc_context(SETTINGS):
        sections = report_sections(rows, at, images)
        page = render(rows, sections)
        out.mkdir(parents=True, exist_ok=True)
        written[0].write_text(table, "utf-8")
        written[1].write_text(page, "utf-8")
        for name, figure in [item for section in sections for item in section.figures.items()]:
            path = out / f"{name}.png"
            if figure is not None:
                figure.savefig(path)
                written.append(path)
            elif path.exists():
                text = f"{path} is from an earlier report: these runs lack the numbers for it"
                warnings.warn(text, stacklevel=2)
    return written
