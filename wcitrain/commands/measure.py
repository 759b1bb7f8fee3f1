"""``wcitrain measure``: the WCI of a model in detail, any measures of any models, and their correlations."""

import argparse
from pathlib import Path
from typing import Any

from wcitrain.commands.options import TARGET_HELP, add_recipe, source
from wcitrain.curvature import ESTIMATORS


def add(commands: Any) -> None:
    """Declare the command."""
    measure = commands.add_parser(
        "measure",
        help="measure the WCI, flatness, sharpness, norms, ... of trained models",
        description=(
            "Measure the Weight-Curvature Index of a model in eval mode and float32, print it layer by layer "
            "with standard errors, and write wci-<at>-<split>.json and .png (a bar a layer); what differs "
            "from the default (clean, attack, estimator, layers, seed) is appended to the name. Files of the "
            "same name are replaced. With several models, several --measures, --at all or --correlate: a "
            "table, and measures-<at>-<split>.json beside each run, where what is measured already is kept. "
            "One process only."
        ),
    )
    measure.add_argument("targets", nargs="+", metavar="TARGET", help=TARGET_HELP)
    measure.add_argument(
        "--measures",
        nargs="+",
        default=["wci"],
        metavar="NAME",
        help="what to measure: names, or all; a wrong one prints them (default: wci)",
    )
    measure.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="MEASURE.SETTING=VALUE",
        help="settings of single measures, such as average_flatness.xi=0.25",
    )
    measure.add_argument(
        "--correlate",
        action="store_true",
        help="correlate measures with the robust gap over models: correlation.{md,json} and scatter plots",
    )
    measure.add_argument(
        "--at",
        metavar="EPOCH",
        help="last (default), best, a number of an epoch that a run kept, or all of those",
    )
    measure.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="train",
        help="images, shuffled, without augmentation (default: train, whose loss the index is about)",
    )
    measure.add_argument(
        "--estimator",
        choices=tuple(ESTIMATORS),
        default="auto",
        help="of the trace; auto is gauss_newton where possible, the Hessian itself for ReLU networks",
    )
    measure.add_argument(
        "--layers", default="weights", help="weights, weights+biases, all, or a glob over parameter names"
    )
    measure.add_argument(
        "--split-qkv",
        action="store_true",
        help="count query, key and value of fused attention as three layers",
    )
    measure.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="images (default: 1000, with several measures 500); with --target-error the most to read",
    )
    measure.add_argument(
        "--gap-examples",
        type=int,
        default=1000,
        metavar="N",
        help="images of each split in robust_gap (default: 1000)",
    )
    measure.add_argument(
        "--target-error",
        type=float,
        metavar="SHARE",
        help="measure until standard error / WCI is at most this, such as 0.05",
    )
    measure.add_argument("--clean", action="store_true", help="the loss without an attack")
    measure.add_argument(
        "--norm", choices=("linf", "l2"), help="of the attack (default: the recipe's threat)"
    )
    measure.add_argument("--eps", help="radius such as 8/255 (default: the recipe's threat)")
    measure.add_argument("--steps", type=int, help="of PGD (default: the recipe's evaluation attack)")
    measure.add_argument(
        "--seed", type=int, default=0, help="of image order, random starts and probes (default: 0)"
    )
    add_recipe(measure)
    measure.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write (default: measures/ of the run, or beside the file or export; "
        "with --correlate correlation/ beside the first run)",
    )
    measure.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    is_one = len(options.targets) == 1 and options.measures == ["wci"] and options.at != "all"
    if is_one and not options.correlate and not options.set:
        return _in_detail(options)
    return _many(options)


def _in_detail(options: argparse.Namespace) -> int:
    """Measure the index of one model, layer by layer."""
    from wcitrain.measuring_runs import measure_run

    result = measure_run(
        options.targets[0],
        **source(options),
        split=options.split,
        estimator=options.estimator,
        layers=options.layers,
        split_qkv=options.split_qkv,
        num_examples=options.examples,
        target_relative_error=options.target_error,
        clean=options.clean,
        norm=options.norm,
        eps=options.eps,
        num_steps=options.steps,
        seed=options.seed,
        out=options.out,
        device=options.device,
    )
    print(result.text())
    return 0


def _many(options: argparse.Namespace) -> int:
    """Take several measures of models, and correlate them where that is asked for."""
    from wcitrain.correlating_runs import study, write_study
    from wcitrain.measuring_many import GAP, NAMES, How, measure_many, settings_by_measure, table

    single = {"estimator": "auto", "layers": "weights", "split_qkv": False, "target_error": None}
    for name, default in single.items():
        if getattr(options, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')}: got {getattr(options, name)!r} with several models or "
                "measures; expected none: it is for one index. Use --set wci.estimator=hutchinson."
            )
    names = NAMES if options.measures == ["all"] else tuple(dict.fromkeys(options.measures))
    if options.correlate and GAP not in names:
        names = (*names, GAP)
    how = How(
        names,
        split=options.split,
        **({} if options.examples is None else {"num_examples": options.examples}),
        gap_examples=options.gap_examples,
        clean=options.clean,
        norm=options.norm,
        eps=options.eps,
        num_steps=options.steps,
        settings=settings_by_measure(options.set),
        seed=options.seed,
        device=options.device,
    )
    models = measure_many(
        options.targets, how, **source(options), out=None if options.correlate else options.out
    )
    written = [model.path for model in models]
    if options.correlate:
        first = Path(options.targets[0])
        found = study(models, seed=options.seed)
        written = [*write_study(found, Path(options.out) if options.out else first.parent / "correlation")]
        print(found.text())
    else:
        print(table(models))
    files = list(dict.fromkeys(written))
    shown = ", ".join(map(str, files[:6])) + (f" and {len(files) - 6} more" if len(files) > 6 else "")
    print(f"Written: {shown}")
    return 0
