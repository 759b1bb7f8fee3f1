"""The report as one HTML page that needs nothing else: no server, no network, no script.

``page.html.j2`` beside this file has its form and style. A section says what the run folders say; one without
data is absent. Nothing is measured here.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.minimal import MINIMAL, minimal_cells
from wcitrain.evaluation.results import percent
from wcitrain.report import charts
from wcitrain.report.drawing import DARK, LIGHT, svg
from wcitrain.report.figures import minimal_curves
from wcitrain.report.runs import MISSING, Row, Run, cell, differing_settings, how_to_read, number, table_lines
from wcitrain.text import with_error

T = TypeVar("T")
MAX_STRIPS = 6
# Settings that change the task or the test and not only the method; rows that differ in one do not compare.
TASK = ("model.", "threat.", "evaluation.num_steps", "evaluation.step_size", "evaluation.num_restarts")
DATA = ("source", "root", "name", "test_split", "image_size", "max_train", "max_test")


@dataclass(frozen=True)
class Section:
    """What stands under one heading: a table whose lines are named by their first cell, notes and figures.

    Figures are by the name of their files, None where there are no numbers.
    """

    title: str
    caption: str = ""
    lines: Sequence[Sequence[str]] = ()  # the header first
    notes: Sequence[str] = ()
    figures: Mapping[str, Figure | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything under the heading."""
        return bool(len(self.lines) > 1 or self.notes or any(self.figures.values()))


def page_and_figures(
    rows: Sequence[Row], images: Callable[[Run], Figure] | None
) -> tuple[str, dict[str, Figure]]:
    """Return the page of these rows, and its figures by the name of their files; see ``write_report``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs = [run for row in rows for run in row.runs]
    overview = {"overview": charts.overview(rows)}
    caption = "Results at the last epoch, accuracies in percent"
    has_one_axis = len(charts.epoch_sizes(rows)) < 2  # else epochs of two runs are not the same training
    by_step = None if has_one_axis else charts.curves(rows, "Training curves by step", by="step")
    sections = [
        Section("Results", caption, table_lines(rows), how_to_read(rows), overview),
        _settings(runs),
        Section("Training curves", figures={"curves": charts.curves(rows), "curves_by_step": by_step}),
        Section("Weight-Curvature Index by layer", figures={"wci_layers": charts.layers(rows)}),
        Section("Measures during training", figures={"measures": charts.training_measures(rows)}),
        _images(rows, images),
        _evaluations(rows),
        _falls(runs),
        _minimal(runs),
        _measures(runs),
        _landscapes(runs),
        _every_run(runs),
    ]
    options: Any = dict.fromkeys(("autoescape", "trim_blocks", "lstrip_blocks"), True)
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, **options)
    page.filters["svg"] = svg
    text = page.get_template("page.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        lead=", ".join(dict.fromkeys(run.method for run in runs)),
        sections=[section for section in sections if section],
        themes=(LIGHT, DARK),
    )
    drawn = {name: figure for section in sections for name, figure in section.figures.items() if figure}
    return text, drawn


def _settings(runs: Sequence[Run]) -> Section:
    """Return the settings that differ, a column each, and a warning where accuracies do not compare."""
    differing, task = differing_settings(runs), []
    for key, column in differing.items():
        # Runs of one data set may have been started in different folders; a key that one lacks says nothing.
        known = {Path(v).name if key == "data.root" else v for v in column if v is not None}
        is_task = key.startswith(TASK) or key in [f"data.{name}" for name in DATA]
        task += [key] * (is_task and len(known) > 1)
    text = "These runs differ in what is learnt or how it is tested, not only in the method: "
    notes = [f"{text}{', '.join(task)}. Their accuracies do not compare directly."] if task else []
    lines = [["run", *differing]]
    for name, *values in zip([run.name for run in runs], *differing.values(), strict=True):
        lines += [[str(name), *(value or MISSING for value in values)]] if values else []
    caption = f"{len(differing)} settings that differ; {MISSING}: no such setting"
    return Section("Settings", caption, lines, notes)


def _images(rows: Sequence[Row], images: Callable[[Run], Figure] | None) -> Section:
    """Return the images of the first run of every method, or why there are none."""
    figures: dict[str, Figure | None] = {}
    notes = ["Label above; → the prediction, in colour where wrong."]
    for i, row in enumerate(rows[:MAX_STRIPS] if images else [], 1):
        run = row.runs[0]
        try:
            figures[f"images_{i}"] = images(run)  # type: ignore[misc]
        except (ValueError, OSError, RuntimeError) as error:
            notes.append(f"{run.name}: no images, {(str(error) or repr(error)).splitlines()[0]}")
    return Section("Images under attack", notes=notes if images else (), figures=figures)


def _landscapes(runs: Sequence[Run]) -> Section:
    """Return the landscapes in the run folders."""
    from wcitrain.measures.landscape import Landscape
    from wcitrain.report.figures import landscape

    figures: dict[str, Figure | None] = {}
    for run in runs:
        for path in sorted(run.folder.glob("landscapes/*.npz")):
            try:
                drawn = landscape(Landscape.load(path), f"{run.name}: {path.stem}")
                figures[f"landscape_{len(figures) + 1}"] = drawn
            except ValueError as error:
                warnings.warn(f"{error} It is left out of the report.", stacklevel=2)
    return Section("Landscapes", figures=figures)


def _every_run(runs: Sequence[Run]) -> Section:
    """Return one line a run: state, epochs, accuracies, cost."""
    header = [*("run", "method", "state", "epochs", "clean test", "robust test", "training")]
    header += ["× own objective", "× PGD-10 AT", "peak memory"]
    lines: list[list[str]] = [[*header]]
    for run in runs:
        now, last, stopped = run.measured(), run.metrics[-1], run.summary.get("stopped_early")
        planned, val = number(run.recipe, "train", "epochs"), "" if run.is_finished else " (val)"
        seconds = number(run.summary if run.is_finished else last, "train_seconds")
        costs = [number(run.summary, "cost", key) for key in ("relative", "relative_to_pgd10_at")]
        state = "finished" if run.is_finished else "unfinished"
        line = [run.name, run.method, f"stopped early: {stopped}" if stopped else state]
        line.append(f"{last['epoch']}" + (f" of {planned:g}" if math.isfinite(planned) else ""))
        line += [cell([now[kind]], percent, val) for kind in ("clean", "robust")]
        line += [cell([seconds], "{:.3g} s".format), *(cell([cost], "{:.2f}×".format) for cost in costs)]
        lines.append([*line, cell([number(run.summary, "peak_memory_mb") / 1000], "{:.2f} GB".format)])
    note = "Cost of a step in passes, a backward to the weights counts 2: as a multiple of the objective "
    note += "alone, without perturbation and penalty, and of PGD-10 AT. Times are wall-clock."
    return Section("Runs", "Every run; accuracies in percent at the last epoch", lines, [note])


# ---- what other commands wrote into run folders ------------------------------------------------------------


def _evaluations(rows: Sequence[Row]) -> Section:
    """Return the accuracies of ``wcitrain evaluate``, a column an attack, and what its checks say.

    Those of other images or another seed stand apart. Where several files of a run hold the same attack or
    worst case, the least counts: each is an upper bound.
    """
    taken: dict[str, dict[Path, dict[str, tuple[float, ...]]]] = {}  # by line, run and name
    notes = []
    for row in rows:
        for run in row.runs:
            folder = run.folder / "evaluations"
            for protocol, name, accuracy in read_all(folder, _accuracies):
                entries = taken.setdefault(f"{row.label}: {protocol}", {}).setdefault(run.folder, {})
                known = [one for one in (entries.get(name), accuracy) if one and math.isfinite(one[0])]
                entries[name] = min(known, default=accuracy)
            notes += [f"{run.name}: {text}" for text in read_all(folder, _findings)]
    names = list(dict.fromkeys(name for runs in taken.values() for some in runs.values() for name in some))
    lines = [["method", "runs", *names]]
    for label, runs in taken.items():
        lines.append([label, str(len(runs))])
        for name in names:
            shares = [some.get(name, (math.nan,)) for some in runs.values()]
            ends = next((share[1:] for share in shares if math.isfinite(share[0])), ())
            lines[-1].append(cell([share[0] for share in shares], percent, "", ends))
    caption = "Evaluations, accuracy in percent; one run: [95 % interval], several: mean (min to max)"
    return Section("Evaluations", caption, lines, list(dict.fromkeys(notes)))


def _falls(runs: Sequence[Run]) -> Section:
    """Return how many images each attack broke, it first, and it alone, where a threat met several."""
    lines = [["evaluation", "threat", "attack", "broken", "it first", "it alone"]]

    def read(document: Mapping[str, Any]) -> Iterator[list[str]]:
        threats = [one["threat"] for one in document["attacks"]]
        for one in document["attacks"]:
            if threats.count(one["threat"]) > 1 and "num_broken" in one:
                counts = (str(one[f"num_broken{which}"]) for which in ("", "_first", "_alone"))
                yield [_protocol(document), str(ThreatModel(**one["threat"])), one["attack"], *counts]

    for run in runs:
        rows = [
            [f"{run.name}: {name}", *cells] for name, *cells in read_all(run.folder / "evaluations", read)
        ]
        lines += [line for number, line in enumerate(rows) if line not in rows[:number]]  # of another file
    caption = "Who fell to which attack: images right at first, in the order of the attacks"
    return Section("Attacks in turn", caption, lines)


def _minimal(runs: Sequence[Run]) -> Section:
    """Return the median of the smallest radii that broke images, and the accuracy curves they make."""
    lines, curves = [["evaluation", *MINIMAL]], dict[str, dict[str, Any]]()

    def read(document: Mapping[str, Any]) -> Iterator[tuple[list[str], Any]]:
        for one in document.get("minimal_eps", ()):
            yield [_protocol(document), *minimal_cells(one)], (one["largest"]["norm"], one["curve"])

    for run in runs:
        for (name, *cells), (norm, curve) in read_all(run.folder / "evaluations", read):
            if (line := [f"{run.name}: {name}", *cells]) in lines:
                continue  # another file says it, too
            lines.append(line)
            known, short = curves.setdefault(norm, {}), f"{run.name}: {cells[1]}"
            known[f"{run.name}: {name}, {cells[1]}" if short in known else short] = curve
    figures = {"smallest_radii": minimal_curves(curves, "")} if curves else {}
    caption = "The smallest radius at which attacks break an image, by bisection; 0 where it is wrong at once"
    return Section("Smallest radii", caption, lines, figures=figures)


def _findings(document: Mapping[str, Any]) -> list[str]:
    return [f"{one['severity']}, {one['name']}: {one['text']}" for one in document["findings"]]


def _protocol(document: Mapping[str, Any]) -> str:
    """Return what tells evaluations of one model apart."""
    seed, where = document["settings"].get("seed"), f"{document['at']} {document['split']}"
    where += f", {document['num_examples']} examples" + f", seed {seed}" * bool(seed)
    return f"{where}, images {document['digest'][:6]}"


def _accuracies(document: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """Give protocol, name, and accuracy with its interval (NaN: unknown) of all that an evaluation holds."""
    where, attacked = _protocol(document), document["attacks"]
    entries = {"clean": document["clean"]}
    for one in attacked:
        entries[f"{ThreatModel(**one['threat'])}, {one['attack']}"] = one
    for one in document["worst_case"]:
        if sum(other["threat"] == one["threat"] for other in attacked) > 1:
            entries[f"{ThreatModel(**one['threat'])}, worst case"] = one
    for name, shares in document["corruptions"].items():
        entries[f"corruption {name}"] = {"accuracy": sum(shares.values()) / len(shares)}
    if document["corrupted_accuracy"] is not None:
        entries["corruptions, mean"] = {"accuracy": document["corrupted_accuracy"]}
    for name, one in entries.items():
        low, high = (number(one, "interval", i) for i in (0, 1))
        yield where, name, (number(one, "accuracy"), low, high)


def _measures(runs: Sequence[Run]) -> Section:
    """Return the measures of ``wcitrain measure``: a line a measure, a column a run.

    What two files of a run hold under one protocol (of other data, say) stands apart, numbered.
    """
    texts: list[dict[str, str]] = []
    for run in runs:
        taken: dict[str, str] = {}
        for protocol, value, stderr in read_all(run.folder / "measures", _measured):
            text = with_error(value, stderr) if math.isfinite(stderr) and stderr > 0 else f"{value:.4g}"
            same = sum(key == protocol or key.startswith(f"{protocol} (again") for key in taken)
            name = f"{protocol} (again, {same})" if same else protocol
            taken[name] = text if math.isfinite(value) else MISSING
        texts.append(taken)
    lines = [["measure", *(run.name for run, taken in zip(runs, texts, strict=True) if taken)]]
    for key in sorted({key for taken in texts for key in taken}):
        lines.append([key, *(taken.get(key, MISSING) for taken in texts if taken)])
    return Section("Measures", "Measures ± standard error, where one is known", lines)


def _measured(document: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    for name, entry in document["measures"].items():
        # The residual of an eigenvalue is a result, different in every run.
        settings = re.sub(r"(^|, )residual [-+.\de]+", "", entry["settings"]).removeprefix(", ")
        threat, num = document["threat"] or "", entry["num_examples"]
        parts = [f"{document['at']} {document['split']}", settings]
        parts += [threat] if num and threat not in settings else []
        parts += [f"{num} examples"] if num and "target_relative_error" not in settings else []
        parts += [f"seed {document['seed']}"] if document["seed"] else []
        yield f"{name}: {', '.join(filter(None, parts))}", number(entry, "value"), number(entry, "stderr")


def read_all(folder: Path, read: Callable[[Mapping[str, Any]], Iterable[T]]) -> list[T]:
    """Return what ``read`` finds in the JSON files of a folder; a damaged one is left out with a warning."""
    parts: list[T] = []
    for path in sorted(folder.glob("*.json")):
        try:
            parts += list(read(files.read_json(path)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"{path}: got {error!r}; expected what this version writes. It is left out of the report."
            warnings.warn(text, stacklevel=3)
    return parts
