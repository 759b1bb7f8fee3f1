"""What can be typed: every command and its options, from the standard library alone: help is there at once.

A command does its work in the module of its name in this folder.
"""

import argparse
from typing import Any

import wcitrain

TARGET = (
    "a run folder; a checkpoint (runs/NAME-s0/checkpoints/last); an exported model folder "
    "(runs/NAME-s0/model/last); a file .pt, .pth or .safetensors with a state dict of the model or of its "
    "timm backbone, with --recipe; or a recipe whose model is pretrained"
)
EPOCH = "last (default), best, or a number of an epoch that the run kept"
NAMES = "What differs from the default is appended to the name. Files of the same name are replaced."
LISTS = ("objectives", "perturbations", "penalties", "estimators", "measures", "attacks", "recipes")


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``wcitrain``; the name of the command becomes ``command``."""
    text = "Robust training with the Weight-Curvature Index as a training knob."
    top = argparse.ArgumentParser(prog="wcitrain", description=text)
    top.add_argument("--version", action="version", version=f"wcitrain {wcitrain.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for declare in (_train, _sweep, _evaluate, _measure, _landscape, _report, _list):
        declare(commands)
    return top


def recipe_and_settings(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the recipe files, and the settings ``key=value``, among texts."""
    return [text for text in texts if "=" not in text], [text for text in texts if "=" in text]


def _train(commands: Any) -> None:
    text = "Train what a recipe says. `accelerate launch -m wcitrain train RECIPE` is the same program."
    add = commands.add_parser("train", help="train what a recipe says", description=text).add_argument
    text = "YAML files laid on one another, such as a base and a method, or names of recipes that come along "
    add(
        "recipe",
        nargs="*",
        metavar="RECIPE",
        help=text + "(`list recipes`); then settings key=value that win",
    )
    add("--base", metavar="BASE", help="base below them: a file or a name such as cifar10")
    add("--resume", metavar="RUN", help="run folder to go on with, instead of a recipe")
    add(
        "--dry-run",
        action="store_true",
        help="make one step in memory, print what it costs, and write nothing",
    )


def _sweep(commands: Any) -> None:
    text = "train methods on bases with several settings and seeds, then report and measure"
    add = commands.add_parser("sweep", help=text).add_argument
    text = "YAML file with `bases`, `methods` and `seeds`, or the name of one; see wcitrain/sweep.py"
    add("sweep", metavar="SWEEP", help=text)
    add("settings", nargs="*", metavar="key=value", help="settings that override every recipe's")
    text = "bases instead of the file's: names or files beside it"
    add("--bases", nargs="+", action="extend", metavar="BASE", help=text)


def _evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the robust accuracy of a trained model, or compare two",
        description=(
            "TARGET comes first: options with several values would take it. Measure accuracy in eval mode "
            "and float32, clean and under attacks, with 95 % intervals, after checks of the model under "
            "attack. Writes <at>-<split>.npz (who survived what), .json, and with several radii of a norm "
            f".png (the curve). {NAMES} A killed command goes on where it was when it is given again. With "
            "--compare: McNemar's test of two such files. One process only."
        ),
    )
    _add_target(evaluate, "evaluations/", nargs="?", split="test")
    add = evaluate.add_argument
    text = (
        "fgsm, pgd-STEPS, margin-STEPS (cw-STEPS), dlr-STEPS, each with xRESTARTS such as pgd-50x10; "
        "autoattack, autoattack-plus, autoattack-rand, autoattack:apgd-ce+square; nothing for none "
        "(default: pgd-20 margin-20)"
    )
    add("--attacks", nargs="*", default=["pgd-20", "margin-20"], metavar="ATTACK", help=text)
    text = "of radii without their own (default: the recipe's)"
    add("--norm", choices=("linf", "l2", "l1"), help=text)
    text = "radii such as 4/255 8/255, several are a curve; with norms such as linf:8/255 l2:0.5, a union "
    add("--eps", nargs="+", action="extend", default=[], help=text + "(default: the recipe's)")
    text = "N images at random, the same for every model and seed (default: all, in the split's own order)"
    add("--examples", type=int, metavar="N", help=text)
    text = "all, or some of the common corruptions such as fog; five severities each (default: none)"
    add("--corruptions", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    text = "the released CIFAR-10-C, CIFAR-100-C or ImageNet-C"
    add("--corruptions-root", metavar="FOLDER", help=text)
    add("--batch-size", type=int, default=200, help="images a pass (default: 200)")
    text = "checks of the model: stop at meaningless numbers, only say so, or none (default: raise)"
    add("--preflight", choices=("raise", "warn", "off"), default="raise", help=text)
    text = "compare two evaluations on the same images; no TARGET"
    add("--compare", nargs=2, metavar=("A.npz", "B.npz"), help=text)


def _measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="measure the WCI, flatness, sharpness, norms, ... of trained models",
        description=(
            "Measure the Weight-Curvature Index of a model in eval mode and float32, print it layer by layer "
            f"with standard errors, and write wci-<at>-<split>.json and .png (a bar a layer). {NAMES} With "
            "several models, several --measures, --at all or --correlate: a table, and "
            "measures-<at>-<split>.json beside each run, where what is measured already is kept. One process "
            "only."
        ),
    )
    _add_target(measure, "measures/", nargs="+", split="train", at=f"{EPOCH}, or all of those")
    _add_attack(measure)
    add = measure.add_argument
    text = "what to measure: names (`list measures`), or all (default: wci)"
    add("--measures", nargs="+", action="extend", metavar="NAME", help=text)
    text = "settings of single measures, such as wci.layers=all wci.estimator=hutchinson"
    add("--set", nargs="+", action="extend", default=[], metavar="MEASURE.SETTING=VALUE", help=text)
    text = "correlate measures with the robust gap over models: correlation.{md,json} and scatter plots, in "
    add("--correlate", action="store_true", help=text + "--out or correlation/ beside the first run")
    text = "images (default: 1000, with several measures 500); with --target-error the most to read"
    add("--examples", type=int, metavar="N", help=text)
    text = "images of each split in robust_gap (default: 1000)"
    add("--gap-examples", type=int, default=1000, metavar="N", help=text)
    text = "measure wci until standard error / WCI is at most this, such as 0.05"
    add("--target-error", type=float, metavar="SHARE", help=text)


def _landscape(commands: Any) -> None:
    landscape = commands.add_parser(
        "landscape",
        help="draw the loss landscape of a trained model",
        description=(
            "Evaluate clean and robust loss along directions through the weights, the attack run anew at "
            f"every point, and write <directions>-<at>-<split>.npz and .png. {NAMES} One process only."
        ),
    )
    _add_target(landscape, "landscapes/", split="test")
    _add_attack(landscape)
    add = landscape.add_argument
    text = "random: normalised by filter; layer: by layer; adversarial: where the robust loss rises most"
    add("--directions", choices=("random", "layer", "adversarial"), default="random", help=text)
    add("--two-d", action="store_true", help="the plane of two directions instead of single ones")
    text = "relative to the weights' norm (default: 0.5, adversarial 0.025)"
    add("--radius", type=float, help=text)
    text = "on each axis, an odd number (default: 21, in a plane 11)"
    add("--points", type=int, metavar="P", help=text)
    add("--num-directions", type=int, metavar="D", help="(default: 3; a plane has two)")
    add("--examples", type=int, default=200, metavar="N", help="images (default: 200)")


def _report(commands: Any) -> None:
    text = "a table, figures and one HTML page from run folders"
    add = commands.add_parser("report", help=text).add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders")
    text = "where to write (default: figures/ of the run, or report/ beside several)"
    add("--out", metavar="FOLDER", help=text)
    text = "epoch the table shows (default: last)"
    add("--at", choices=("last", "best"), default="last", help=text)
    text = "leave out the images under attack, which load models and data"
    add("--no-images", action="store_true", help=text)


def _list(commands: Any) -> None:
    text = "print what can be named in recipes and options: meaning, settings, cost and source"
    add = commands.add_parser("list", help=text).add_argument
    add("kind", choices=LISTS, metavar="KIND", help=", ".join(LISTS))


def _add_target(
    command: argparse.ArgumentParser,
    folder: str,
    *,
    split: str,
    nargs: str | None = None,
    at: str = EPOCH,
) -> None:
    """Declare which model, on which images and where: the same for every command that opens one."""
    add = command.add_argument
    add("targets" if nargs == "+" else "target", nargs=nargs, metavar="TARGET", help=TARGET)
    add("--at", metavar="EPOCH", help=at)
    text = "recipe files that say data, model and threat (default: the run's own), and settings that win"
    add("--recipe", nargs="+", action="extend", default=[], metavar=("RECIPE", "key=value"), help=text)
    text = f"images, without augmentation (default: {split})"
    add("--split", choices=("train", "val", "test"), default=split, help=text)
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    text = f"where to write (default: {folder} of the run, or beside the file or export)"
    add("--out", metavar="FOLDER", help=text)
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")


def _add_attack(command: argparse.ArgumentParser) -> None:
    """Declare the attack that losses are measured under."""
    add = command.add_argument
    add("--clean", action="store_true", help="the loss without an attack")
    add("--norm", choices=("linf", "l2"), help="of the attack (default: the recipe's threat)")
    add("--eps", help="radius such as 8/255 (default: the recipe's threat)")
    add("--steps", type=int, help="of PGD (default: the recipe's evaluation attack)")
