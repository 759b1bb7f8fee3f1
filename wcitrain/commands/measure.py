"""``wcitrain measure``: the WCI of a model in detail, any measures of any models, and their correlations."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from wcitrain import files
from wcitrain.commands.correlation import correlated
from wcitrain.commands.output import attack_part, file_name, opened, refuse_several_processes
from wcitrain.commands.study import (
    Measured,
    Study,
    epochs,
    lengths,
    measure_all,
    read_study,
    settings_by_measure,
)
from wcitrain.measures import PACBayesBound, Problem, WeightCurvatureIndex, pac_bayes_bound
from wcitrain.targets import Target, attack_of
from wcitrain.text import aligned, with_error

NUM_EXAMPLES = 1000  # of the index in detail, by default
IN_DETAIL = {"estimator", "layers", "split_qkv", "target_relative_error"}  # what its files can tell apart


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    refuse_several_processes()
    study = _study(options)
    targets = [opened(options, path, at) for path in options.targets for at in epochs(path, study.at)]
    is_plain = study.names == ["wci"] and study.at != "all"
    if is_plain and len(targets) == 1 and study.settings.get("wci", {}).keys() <= IN_DETAIL:
        text, written = _in_detail(targets[0], study, options.out)
    elif study.correlate:
        folder = Path(options.out or Path(options.targets[0]).parent / "correlation")
        text, written = correlated(measure_all(targets, study), folder, study.seed)
    else:
        models = measure_all(targets, study, options.out)
        text, written = table(models), [model.path for model in models]
    print(text)
    more = f" and {len(written) - 6} more" if len(written) > 6 else ""
    print(f"Written: {', '.join(map(str, written[:6]))}{more}")
    return 0


def _study(options: argparse.Namespace) -> Study:
    """Return what the options ask for."""
    settings = settings_by_measure(options.set)
    options.measures = options.measures or ["wci"]
    if options.target_error is not None:
        if len(options.targets) > 1 or options.measures != ["wci"] or options.at == "all":
            rule = "one model and wci alone, which then reads as many examples as it takes"
            raise ValueError(f"--target-error: got several models or measures; expected {rule}.")
        settings.setdefault("wci", {})["target_relative_error"] = options.target_error
    same = ("measures", "at", "split", "examples", "gap_examples", "clean", "norm", "eps", "steps", "seed")
    content = {name: getattr(options, name) for name in (*same, "correlate")}
    typed = {"settings": "--set", "gap_examples": "--gap-examples"}
    return read_study(content | {"settings": settings}, lambda key: typed.get(key, f"--{key}"))


def table(models: Sequence[Measured]) -> str:
    """Return aligned text: a line a measure and a column a model, or the other way if that is narrower."""
    names = list(dict.fromkeys(name for model in models for name in model.measures))
    rows = [["", *(f"{model.target.short_name} {model.target.at}" for model in models)]]
    rows += [[name, *(_cell(model.measures.get(name)) for model in models)] for name in names]
    return aligned([list(row) for row in zip(*rows, strict=True)] if len(models) > len(names) else rows)


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None or one["value"] is None:
        return "–"
    return f"{one['value']:.4g}" if one["stderr"] is None else with_error(one["value"], one["stderr"])


# ---- the index in detail -----------------------------------------------------------------------------------


def _in_detail(target: Target, study: Study, out: str | None) -> tuple[str, list[Path]]:
    """Measure the index layer by layer; return its table, and the JSON and figure written.

    For the training split of a loss >= 0 also the PAC-Bayes surrogate, with the mean loss over the measured
    examples as its risk and the size of the training set as N.
    """
    measure = cast(WeightCurvatureIndex, study.made()["wci"])
    attack = attack_of(target.recipe, study)
    num = study.examples or (None if measure.target_relative_error else NUM_EXAMPLES)
    batches = target.batches(study.split, study.seed)
    problem = Problem(target.load_model(), batches, attack, study.seed, num)
    result = measure.by_layer(problem, progress=True)
    bound: PACBayesBound | None = None
    if study.split == "train" and result.total >= 0:
        stderr = result.total_stderr if math.isfinite(result.total_stderr) else None
        num_train = len(target.splits.train)
        bound = pac_bayes_bound(result.mean_loss, result.total, num_train, wci_stderr=stderr)
    document = {
        "target": str(target.path),
        "at": target.at,
        "split": study.split,
        "seed": study.seed,
        "layers_counted": measure.layers,
        "split_qkv": measure.split_qkv,
        "threat": asdict(attack.threat) if attack else None,
        "attack": lengths(attack),
        **result.as_dict(),
        "pac_bayes_surrogate": asdict(bound) if bound else None,
    }
    name = file_name(
        f"wci-{target.at}-{study.split}",
        attack_part(study, attack),
        "" if result.estimator == "gauss_newton" else result.estimator,
        "" if measure.layers == "weights" else measure.layers,
        "qkv" if measure.split_qkv else "",
        f"s{study.seed}" if study.seed else "",
    )
    folder = target.folder("measures", out)
    written = [files.write_json(folder / f"{name}.json", document), folder / f"{name}.png"]
    from wcitrain.report.figures import layer_bars  # matplotlib takes a second to import

    headline = result.headline(study.split)
    layer_bars(result, f"{target.name}: {headline}").savefig(written[1])
    lines = [result.table(bound.beta if bound else 1.0), "", headline, *([str(bound)] if bound else [])]
    return "\n".join(lines), written
