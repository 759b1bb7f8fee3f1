"""``wcitrain`` = ``python -m wcitrain`` = ``accelerate launch -m wcitrain``: train, sweep, report, measure."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 stopped by an error, 2 wrong input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="wcitrain", description="Robust training with the Weight-Curvature Index as a training knob."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train what a recipe says",
        description="Train what a recipe says. `accelerate launch -m wcitrain train RECIPE` is the same program.",
    )
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file")
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the recipe's")
    train.add_argument("--resume", metavar="RUN", help="run folder to go on with, instead of a recipe")

    sweep = commands.add_parser("sweep", help="train several recipes and seeds, then report")
    sweep.add_argument("sweep", metavar="SWEEP", help="YAML file with `recipes` and `seeds`")
    sweep.add_argument("settings", nargs="*", metavar="key=value", help="settings that override every recipe's")

    report = commands.add_parser("report", help="a table and figures from run folders")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    report.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: figures/ of the run, or report/ beside several)"
    )
    report.add_argument("--at", choices=("last", "best"), default="last", help="epoch the table shows (default: last)")

    _add_measure(commands)

    parser.add_argument("--version", action="version", version=f"wcitrain {version('wcitrain')}")
    options = parser.parse_args(arguments)
    from wcitrain.checkpoint import CheckpointError  # after parsing: --help needs no torch
    from wcitrain.train import Interrupted, NonFiniteLossError

    try:
        commands_by_name = {"train": _train, "sweep": _sweep, "report": _report, "measure": _measure}
        return commands_by_name[options.command](options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"wcitrain {options.command}: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, NonFiniteLossError) as error:
        print(f"wcitrain {options.command}: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"wcitrain {options.command}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"wcitrain {options.command}: stopped at once; what was saved before stays.", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    from wcitrain.recipe import load_recipe
    from wcitrain.train import fit

    settings, path = options.settings, options.recipe
    if options.resume:
        settings, path = [path, *settings] if path else settings, Path(options.resume) / "recipe.yaml"
        if any(s and "=" not in s for s in settings):
            raise ValueError(f"--resume: got a recipe as well ({settings[0]}); expected the run folder alone.")
        if not path.exists():
            raise FileNotFoundError(f"--resume: got {options.resume}; expected a run folder, which holds recipe.yaml.")
    elif path is None:
        raise ValueError("got no recipe; expected a YAML file, or --resume RUN. `recipes/` holds some.")
    recipe = load_recipe(path, settings)
    if options.resume:
        _check_resumed(load_recipe(path).model_dump(), recipe.model_dump())
    if int(os.environ.get("RANK", 0)) == 0:
        print(recipe.to_yaml(), flush=True)
    fit(recipe, resume=bool(options.resume), folder=options.resume)
    return 0


def _check_resumed(saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse settings that would make the resumed run another run than the one its recipe describes."""
    free = {
        ("train", "num_threads"),
        ("train", "device"),
        ("checkpoint", "every"),
        *(("tracking", k) for k in saved["tracking"]),
    }
    for section, values in saved.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        for key, value in pairs:
            other = asked[section].get(key) if isinstance(values, dict) else asked[section]
            if other != value and (section, key) not in free:
                raise ValueError(
                    f"--resume: got {section}{'.' * bool(key)}{key}={other!r}; expected the run's own {value!r}: a resumed run is "
                    "the run its recipe.yaml describes. Start a new one with another name= for other settings."
                )


def _sweep(options: argparse.Namespace) -> int:
    from wcitrain.report import load_run, results_table, write_report
    from wcitrain.sweep import run_sweep

    folders = run_sweep(options.sweep, options.settings)
    runs = [load_run(folder) for folder in folders]
    out = folders[0].parent / f"{Path(options.sweep).stem}-report"
    paths = write_report(runs, out)
    print(f"\n{results_table(runs)}\n\nWritten: {', '.join(map(str, paths))}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from wcitrain.report import load_run, results_table, write_report

    folders = [Path(run) for run in options.runs]
    if len(folders) > 1:  # runs/* also matches the reports beside them
        skipped = [folder for folder in folders if folder.is_dir() and not (folder / "recipe.yaml").exists()]
        folders = [folder for folder in folders if folder not in skipped]
        if skipped:
            print(f"Left out, no runs: {', '.join(map(str, skipped))}", file=sys.stderr)
    runs = [load_run(folder) for folder in folders]
    first = Path(options.runs[0])
    out = Path(options.out) if options.out else first / "figures" if len(runs) == 1 else first.parent / "report"
    paths = write_report(runs, out, at=options.at)
    print(f"{results_table(runs, at=options.at)}\n\nWritten: {', '.join(map(str, paths))}")
    return 0


def _add_measure(commands: Any) -> None:
    """Declare the options of ``wcitrain measure``."""
    measure = commands.add_parser(
        "measure",
        help="measure the WCI of a trained model",
        description=(
            "Measure the Weight-Curvature Index of a model in eval mode and float32, print it layer by layer with standard "
            "errors, and write wci-<at>-<split>.json and .png (a bar a layer); what differs from the default (clean, attack, "
            "estimator, layers, seed) is appended to the name. Files of the same name are replaced. One process only."
        ),
    )
    measure.add_argument(
        "target",
        metavar="TARGET",
        help="a run folder; an exported model folder (runs/NAME-s0/model/last); or a file .pt, .pth or .safetensors with a state "
        "dict of the model or of its timm backbone, with --recipe",
    )
    measure.add_argument(
        "--measures", nargs="+", choices=("wci",), default=["wci"], help="what to measure (default: wci)"
    )
    measure.add_argument("--at", choices=("last", "best"), help="epoch of a run (default: last)")
    measure.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="train",
        help="images to measure on, in random order and without augmentation (default: train, whose loss the index is about)",
    )
    measure.add_argument(
        "--estimator",
        choices=("auto", "gauss_newton", "hutchinson", "two_point"),
        default="auto",
        help="of the Hessian's trace; auto is gauss_newton, the Hessian itself for ReLU networks",
    )
    measure.add_argument(
        "--layers", default="weights", help="weights, weights+biases, all, or a glob over parameter names"
    )
    measure.add_argument(
        "--split-qkv", action="store_true", help="count query, key and value of fused attention as three layers"
    )
    measure.add_argument(
        "--examples", type=int, metavar="N", help="images (default: 1000); with --target-error the most to read"
    )
    measure.add_argument(
        "--target-error",
        type=float,
        metavar="SHARE",
        help="measure until standard error / WCI is at most this, such as 0.05",
    )
    measure.add_argument("--clean", action="store_true", help="the loss without an attack")
    measure.add_argument("--norm", choices=("linf", "l2"), help="of the attack (default: the recipe's threat)")
    measure.add_argument("--eps", help="radius such as 8/255 (default: the recipe's threat)")
    measure.add_argument("--steps", type=int, help="of PGD (default: the recipe's evaluation attack)")
    measure.add_argument("--seed", type=int, default=0, help="of image order, random starts and probes (default: 0)")
    measure.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar=("RECIPE", "key=value"),
        help="recipe that says data, model and threat (default: the run's own), and settings that override it",
    )
    measure.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: measures/ of the run, or beside the file or export)"
    )
    measure.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")


def _measure(options: argparse.Namespace) -> int:
    from wcitrain.measuring_runs import measure_run

    recipe = [text for text in options.recipe if "=" not in text]
    if len(recipe) > 1:
        raise ValueError(
            f"--recipe: got {len(recipe)} files ({', '.join(recipe)}); expected one. Settings are key=value."
        )
    result = measure_run(
        options.target,
        at=options.at,
        split=options.split,
        recipe=recipe[0] if recipe else None,
        settings=[text for text in options.recipe if "=" in text],
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


if __name__ == "__main__":
    sys.exit(main())
