"""The report as one HTML page that needs nothing else: no server, no network, no script.

``page.html.j2`` beside this file has its form and style. A section says what the run folders say; one without
data is absent.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from wcitrain.report import charts, table
from wcitrain.report.drawing import DARK, LIGHT, svg
from wcitrain.report.runs import Row, Run, number
from wcitrain.report.settings import compare_settings, task_differences
from wcitrain.report.stored import Evaluations, checks, evaluations, measures
from wcitrain.report.table import MISSING, cell, duration, few, percent
from wcitrain.text import with_error

Cell = str | tuple[str, str]  # a text, or a text over a smaller one
FEW = 6  # up to here settings are lines and runs columns
MAX_STRIPS, MAX_LANDSCAPES = 6, 12


@dataclass(frozen=True)
class Table:
    """A table whose lines are named by their first cell; a folded one opens under its caption."""

    caption: str
    header: Sequence[Cell]
    lines: Sequence[Sequence[Cell]]
    is_folded: bool = False


@dataclass(frozen=True)
class Section:
    """What stands under one heading, in this order; figures by the name of their files, None: no numbers."""

    title: str
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    figures: Mapping[str, Figure | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything under the heading."""
        return bool(any(t.lines for t in self.tables) or self.notes or any(self.figures.values()))


def report_sections(rows: Sequence[Row], at: str, images: Callable[[Run], Figure] | None) -> list[Section]:
    """Return the sections of the page, with the table of ``at`` open; see ``write_report``."""
    runs = [run for row in rows for run in row.runs]
    return [
        _results(rows, at),
        _settings(runs),
        Section("Training curves", figures={"curves": charts.curves(rows)}),
        Section("Weight-Curvature Index by layer", figures={"wci_layers": charts.layers(rows)}),
        Section("Measures during training", figures={"measures": charts.training_measures(rows)}),
        _images(rows, images),
        _evaluations(rows, evaluations(rows)),
        _measures(runs),
        _landscapes(runs),
        _every_run(runs),
    ]


def render(rows: Sequence[Row], sections: Sequence[Section]) -> str:
    """Return the page of these rows with the sections that have content."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs = [run for row in rows for run in row.runs]
    methods = {run.group: run.method for run in sorted(runs, key=lambda run: run.is_finished)}
    title = (
        runs[0].name
        if len(runs) == 1
        else f"{len(runs)} runs, {len(methods)} recipe{'s' * (len(methods) > 1)}"
    )
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"svg": svg, "parts": _parts}
    return environment.get_template("page.html.j2").render(
        title=title,
        lead=few(list(dict.fromkeys(methods.values())), 12),
        cautions=_cautions(rows),
        sections=[section for section in sections if section],
        themes=(LIGHT, DARK),
    )


def _parts(text: Cell) -> tuple[str, str]:
    """Return a cell's text and what is printed smaller: "80.0 [78.0, 82.0]" has its range so."""
    if isinstance(text, tuple):
        return text
    match = re.fullmatch(r"([^\[(±]+) ([\[(±][^a-z].*)", text)
    return (match[1], match[2]) if match else (text, "")


def _results(rows: Sequence[Row], at: str) -> Section:
    """Return the results table at ``at``, and the other epoch's folded."""
    epochs = {"last": "the last epoch", "best": "the epoch best by robust validation accuracy"}
    captions = {epoch: f"Results at {text}, accuracies in percent" for epoch, text in epochs.items()}
    tables = [Table(captions[at], table.HEADER, table.table_cells(rows, at))]
    tables += [Table(captions[e], table.HEADER, table.table_cells(rows, e), True) for e in epochs if e != at]
    return Section("Results", tables, table.how_to_read(rows, at), {"overview": charts.overview(rows)})


def _settings(runs: Sequence[Run]) -> Section:
    """Return the settings that differ, and those that are equal folded away."""
    equal, differing = compare_settings(runs)
    shared = Table(
        f"{len(equal)} settings that all runs share", ("setting", "value"), list(equal.items()), True
    )
    if not differing:
        note = ["Seeds and names aside, these runs have the same settings."] * (len(runs) > 1)
        return Section("Settings", [shared], note)
    alike: dict[tuple[str | None, ...], list[Run]] = {}  # seeds of a method share a column
    for i, run in enumerate(runs):
        alike.setdefault((run.group, *(values[i] for values in differing.values())), []).append(run)
    heads = [(members[0].method, few([run.name for run in members], 4)) for members in alike.values()]
    lines: list[list[Cell]] = [["setting", *heads]]
    columns = zip(*alike, strict=True)
    next(columns)  # the groups
    lines += [[key, *(v or MISSING for v in values)] for key, values in zip(differing, columns, strict=True)]
    if len(heads) > FEW:
        lines = [list(line) for line in zip(*lines, strict=True)]
    caption = f"{len(differing)} settings that differ; {MISSING}: no such setting"
    return Section("Settings", [Table(caption, lines[0], lines[1:]), shared])


def _images(rows: Sequence[Row], images: Callable[[Run], Figure] | None) -> Section:
    """Return the images of every run, of the first of each method where there are many runs, or why not."""
    runs = [run for row in rows for run in row.runs]
    runs = runs if len(runs) <= MAX_STRIPS else [row.runs[0] for row in rows]
    figures: dict[str, Figure | None] = {}
    notes = ["Label above; → the prediction, in colour where wrong."]
    if len(runs) > MAX_STRIPS:
        notes.append(f"The first {MAX_STRIPS} of {len(runs)} methods.")
    for i, run in enumerate(runs[:MAX_STRIPS] if images else [], 1):
        try:
            figures[f"images_{i}"] = images(run)  # type: ignore[misc]
        except (ValueError, OSError, RuntimeError) as error:
            notes.append(f"{run.name}: no images, {(str(error) or repr(error)).splitlines()[0]}")
    return Section("Images under attack", (), notes if images else (), figures)


def _evaluations(rows: Sequence[Row], taken: Evaluations) -> Section:
    """Return the accuracies of ``wcitrain evaluate``, a column an attack, and what its checks say."""
    names = list(dict.fromkeys(name for per_run in taken.values() for some in per_run for name in some))
    lines: list[list[Cell]] = []
    for (i, where), per_run in taken.items():
        cells = []
        for name in names:
            known = [some[name] for some in per_run if name in some]
            text = cell([one.value for one in known] + [math.nan] * (len(per_run) - len(known)), percent)
            cells.append(text + (table.interval(known[0].low, known[0].high) if len(known) == 1 else ""))
        lines.append([(rows[i].label, where), str(len(per_run)), *cells])
    caption = "Evaluations, accuracy in percent; one run: [95 % interval], several: mean (min to max)"
    notes = [f"{run.name}: {text}" for row in rows for run in row.runs for text in checks(run)]
    return Section("Evaluations", [Table(caption, ("method", "runs", *names), lines)], notes)


def _measures(runs: Sequence[Run]) -> Section:
    """Return the measures of ``wcitrain measure``: a line a measure, a column a run."""
    values: dict[tuple[str, str], dict[int, str]] = {}
    for i, run in enumerate(runs):
        for name, protocol, value, stderr in measures(run):
            has_error = math.isfinite(stderr) and stderr > 0
            text = with_error(value, stderr) if has_error else f"{value:.4g}"
            values.setdefault((name, protocol), {})[i] = text if math.isfinite(value) else MISSING
    places = sorted({i for cells in values.values() for i in cells})
    lines: list[list[Cell]] = [
        [k, *(cells.get(i, MISSING) for i in places)] for k, cells in sorted(values.items())
    ]
    header = ("measure", *(runs[i].name for i in places))
    return Section("Measures", [Table("Measures ± standard error, where one is known", header, lines)])


def _landscapes(runs: Sequence[Run]) -> Section:
    """Return the landscapes in the run folders, as many as ``MAX_LANDSCAPES``; the others are named."""
    from wcitrain.measures.landscape import Landscape
    from wcitrain.report.figures import landscape

    paths = {f"{run.name}: {p.stem}": p for run in runs for p in sorted(run.folder.glob("landscapes/*.npz"))}
    figures: dict[str, Figure | None] = {}
    for i, (name, path) in enumerate(list(paths.items())[:MAX_LANDSCAPES], 1):
        try:
            figures[f"landscape_{i}"] = landscape(Landscape.load(path), name)
        except ValueError as error:
            warnings.warn(f"{error} It is left out of the report.", stacklevel=2)
    left_out = list(paths)[MAX_LANDSCAPES:]
    notes = [f"Left out to keep the page small: {', '.join(left_out)}."] * bool(left_out)
    return Section("Landscapes", (), notes, figures)


def _every_run(runs: Sequence[Run]) -> Section:
    """Return one line a run: state, epochs, accuracies, cost."""
    header = [*("run", "seed", "state", "epochs", "clean test", "robust test", "training")]
    header += ["× own objective", "× PGD-10 AT", "peak memory"]
    lines: list[list[Cell]] = []
    for run in runs:
        now = run.measured("last")
        planned, val = number(run.recipe, "train", "epochs"), "" if run.is_finished else " (val)"
        stopped = run.summary.get("stopped_early")
        state: Cell = "finished" if run.is_finished else "unfinished"
        costs = [number(run.summary, "cost", key) for key in ("relative", "relative_to_pgd10_at")]
        lines.append(
            [
                (run.name, run.method),
                str(run.seed),
                ("stopped early", str(stopped)) if stopped else state,
                f"{run.metrics[-1]['epoch']}" + (f" of {planned:g}" if math.isfinite(planned) else ""),
                *(cell([value], percent, val) for value in (now["clean"], now["robust"])),
                duration(run.train_seconds),
                *(cell([cost], "{:.2f}×".format) for cost in costs),
                cell([number(run.summary, "peak_memory_mb") / 1000], "{:.2f} GB".format),
            ]
        )
    note = "Cost of a step in passes, a backward to the weights counts 2: as a multiple of the objective "
    note += "alone, without perturbation and penalty, and of PGD-10 AT. Times are wall-clock."
    caption = "Every run; accuracies in percent at the last epoch"
    return Section("Runs", [Table(caption, header, lines)], [note])


def _cautions(rows: Sequence[Row]) -> list[str]:
    """Return why accuracies on this page do not compare directly."""
    runs, cautions = [run for row in rows for run in row.runs], []
    if differing := task_differences(runs):
        text = "These runs differ in what is learnt or how it is tested, not only in the method: "
        cautions.append(f"{text}{', '.join(differing)}. Their accuracies do not compare directly.")
    if unfinished := [run.name for run in runs if not run.is_finished]:
        text = "Unfinished runs show validation accuracies and are never averaged with finished ones."
        cautions.append(f"Unfinished: {few(unfinished, 8)}. {text}")
    return cautions
