"""``wcitrain measure``: the WCI of a model in detail, any measures of any models, and their correlations."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wcitrain import files
from wcitrain.commands.common import attack_asked, opened, recipe_part, writable
from wcitrain.commands.correlation import correlated
from wcitrain.commands.study import (
    Measured,
    Study,
    epochs,
    file_of,
    header,
    measure_all,
    refuse_unknown_start,
    settings_by_measure,
    weights_before,
)
from wcitrain.measures import Problem, WeightCurvatureIndex, pac_bayes_bound
from wcitrain.targets import Target
from wcitrain.text import aligned, with_error

NUM_EXAMPLES = 1000  # of the index in detail, by default


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    study = _study(options)
    targets = [opened(options, path, at) for path in options.targets for at in epochs(path, study.at)]
    if [*study.given()] == ["wci"] and study.at != "all" and len(targets) == 1:
        text, written = _in_detail(targets[0], study, options)
    elif study.correlate:
        folder = writable(options.out or Path(options.targets[0]).parent / "correlation")
        text, written = correlated(measure_all(targets, study), folder, study.seed)
    else:
        models = measure_all(targets, study, options.out)
        text, written = _table(models), [model.path for model in models]
    more = f" and {len(written) - 6} more" if len(written) > 6 else ""
    print(f"{text}\nWritten: {', '.join(map(str, written[:6]))}{more}")
    return 0


def _study(options: argparse.Namespace) -> Study:
    """Return what the options ask for."""
    settings = settings_by_measure(options.set)
    measures = options.measures or ["wci"]
    if options.target_error is not None:
        if len(options.targets) > 1 or measures != ["wci"] or options.at == "all":
            rule = "one model and wci alone, which then reads as many examples as it takes"
            raise ValueError(f"--target-error: got several models or measures; expected {rule}.")
        settings.setdefault("wci", {})["target_relative_error"] = options.target_error
    same = ("at", "split", "examples", "gap_examples", "clean", "norm", "eps", "steps", "seed", "correlate")
    return Study(measures=measures, settings=settings, **{name: getattr(options, name) for name in same})


def _table(models: Sequence[Measured]) -> str:
    """Return aligned text: a line a measure and a column a model, or the other way if that is narrower."""
    names = list(dict.fromkeys(name for model in models for name in model.measures))
    rows = [["", *(f"{model.target.name} {model.target.at}" for model in models)]]
    rows += [[name, *(_cell(model.measures[name]) for model in models)] for name in names]
    table = aligned([list(row) for row in zip(*rows, strict=True)] if len(models) > len(names) else rows)
    return "\n".join([table, *(line for model in models for line in model.without_value())])


def _cell(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "–"
    return f"{one['value']:.4g}" if one["stderr"] is None else with_error(one["value"], one["stderr"])


def _in_detail(target: Target, study: Study, options: argparse.Namespace) -> tuple[str, list[Path]]:
    """Measure the index layer by layer; return its table, and the JSON and figure written.

    For the training split of a loss >= 0 also the PAC-Bayes surrogate, with the mean loss over the measured
    examples as its risk and the size of the training set as N.
    """
    from wcitrain.report.figures import layer_bars  # matplotlib takes a second to import

    given = study.given()["wci"]
    measure, attack = WeightCurvatureIndex(**given), attack_asked(target.recipe, study)
    folder = writable(target.folder("measures", options.out))
    num = study.examples or (None if measure.target_relative_error else NUM_EXAMPLES)
    if measure.needs_initial:
        refuse_unknown_start(target, ["wci.center"])
    model, batches = target.load_model(), target.batches(study.split, study.seed, num)
    initial = weights_before(target) if measure.needs_initial else None
    problem = Problem(model, batches, attack, study.seed, num, initial=initial)
    result = measure.by_layer(problem, progress=True)
    bound = None
    if study.split == "train" and result.total >= 0 and not target.kind:  # N is not known of others' models
        stderr = result.total_stderr if math.isfinite(result.total_stderr) else None
        num_train = len(target.splits.train)
        bound = pac_bayes_bound(result.mean_loss, result.total, num_train, wci_stderr=stderr)
    settings = [result.loss, result.estimator, *(f"{k} {v}" for k, v in given.items() if k != "estimator")]
    entry = {"value": result.total, "stderr": result.total_stderr, "num_examples": result.num_examples}
    document = {
        **header(target, study, attack, num, model),
        **result.as_dict(),
        "measures": {"wci": entry | {"settings": ", ".join(settings), "given": given}},
        "pac_bayes_surrogate": asdict(bound) if bound else None,
        "notes": target.notes,
    }
    name = file_of("wci", target, study, attack, NUM_EXAMPLES, recipe_part(options, target, study.settings))
    written = [files.write_json(folder / f"{name}.json", document), folder / f"{name}.png"]
    headline = result.headline(study.split)
    layer_bars(result, f"{target.title}: {headline}").savefig(written[1])
    lines = [result.table(bound.beta if bound else 1.0), "", headline, *([str(bound)] if bound else [])]
    return "\n".join(lines), written
