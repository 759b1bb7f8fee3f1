"""What can be typed: every command and its options, from the standard library alone: help is there at once.

A command does its work in the module of its name in this folder.
"""

import argparse
from collections.abc import Callable
from typing import Any

import wcitrain

Add = Callable[..., Any]  # ``add_argument`` of a command
TARGET = (
    "a run folder; a checkpoint (runs/NAME-s0/checkpoints/last); an exported model folder "
    "(runs/NAME-s0/model/last); a recipe whose model is pretrained; with --data or --recipe a name of timm's "
    "(resnet18, hf-hub:OWNER/NAME, local-dir:FOLDER), module:function or file.py:function that returns an "
    "nn.Module, or a TorchScript or torch.export file (programs: open only what you trust); with --recipe a "
    "file .pt, .pth, .ckpt or .safetensors with a state dict of its model or backbone (FILE:ema: that part)"
)
SEVERAL: Any = {"nargs": "+", "action": "extend"}  # given again, they add up
EPOCH = "last (default), best, or a number of an epoch that the run kept"
NAMES = "What differs from the default is appended to the name. Files of the same name are replaced."
LISTS = ("objectives", "perturbations", "penalties", "estimators", "measures", "attacks", "recipes")


def recipe_and_settings(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the recipe files, and the settings ``key=value``, among texts."""
    return [text for text in texts if "=" not in text], [text for text in texts if "=" in text]


def _train(add: Add) -> None:
    text = "files laid on one another, or names (`list recipes`); then settings key=value that win"
    add("recipe", nargs="*", metavar="RECIPE", help=text)
    add("--base", metavar="BASE", help="base below them: a file or a name such as cifar10")
    add("--resume", metavar="RUN", help="run folder to go on with, instead of a recipe")
    add("--dry-run", action="store_true", help="make one step, print what it costs, write nothing")
    text = "decode every image of every split first; without it headers and ends of files are read"
    add("--check-data", action="store_true", help=text)


def _sweep(add: Add) -> None:
    text = "YAML file with `bases`, `methods` and `seeds`, or the name of one; see wcitrain/sweep.py"
    add("sweep", metavar="SWEEP", help=text)
    add("settings", nargs="*", metavar="key=value", help="settings that override every recipe's")
    add("--bases", **SEVERAL, help="bases instead of the file's: names or files beside it")


def _evaluate(add: Add) -> None:
    _add_target(add, "evaluations/", nargs="?", split="test")
    text = (
        "fgsm, pgd-STEPS, margin-STEPS (cw-STEPS), dlr-STEPS, apgd-ce, apgd-dlr, apgd-t, each with "
        "[-STEPS]xRESTARTS such as pgd-50x10; "
        "autoattack, autoattack-plus, autoattack-rand, autoattack:apgd-ce+square; nothing for none "
        "(default: pgd-20 margin-20)"
    )
    add("--attacks", nargs="*", default=["pgd-20", "margin-20"], metavar="ATTACK", help=text)
    add("--norm", choices=("linf", "l2", "l1"), help="of radii without their own (default: the recipe's)")
    text = "radii (default: the recipe's): 4/255 8/255 are a curve; linf:8/255 l2:0.5, with norms, a union"
    add("--eps", **SEVERAL, default=[], help=text)
    text = "largest radii (as for --eps): bisect for every image the smallest at which --attacks break it"
    add("--minimal-eps", **SEVERAL, default=[], metavar="MAX", help=text)
    text = "images that --save-images wrote for another model, as an attack on this one"
    add("--transfer-images", **SEVERAL, default=[], metavar="FILE", help=text)
    text = "write the adversarial images of every attack (.safetensors, float32); the JSON has their SHA-256"
    add("--save-images", action="store_true", help=text)
    text = "N images at random, the same for every model and seed (default: all, in the split's own order)"
    add("--examples", type=int, metavar="N", help=text)
    text = "all, or some of the common corruptions such as fog; five severities each (default: none)"
    add("--corruptions", **SEVERAL, default=[], help=text)
    add("--corruptions-root", metavar="FOLDER", help="the released CIFAR-10-C, CIFAR-100-C or ImageNet-C")
    add("--batch-size", type=int, default=200, help="images a pass (default: 200)")
    text = "checks of the model: stop at meaningless numbers, only say so, or none (default: raise)"
    add("--preflight", choices=("raise", "warn", "off"), default="raise", help=text)
    text = "means of K draws as gradients of a randomised model (expectation over transformation; default: 1)"
    add("--eot", type=int, default=1, metavar="K", help=text)
    text = "modules inside the model whose gradient is the identity's, such as a rounding (BPDA)"
    add("--bpda", **SEVERAL, default=[], metavar="MODULE", help=text)
    text = "another model: images of the first gradient attack on it are one more attack"
    add("--transfer", metavar="TARGET", help=text)
    text = "compare two evaluations on the same images; no TARGET"
    add("--compare", nargs=2, metavar=("A.npz", "B.npz"), help=text)


def _measure(add: Add) -> None:
    _add_target(add, "measures/", nargs="+", split="train", at=f"{EPOCH}, or all of those")
    _add_attack(add)
    add("--measures", **SEVERAL, help="what to measure: names (`list measures`), or all (default: wci)")
    text = "settings of single measures: MEASURE.SETTING=VALUE, such as wci.layers=all"
    add("--set", **SEVERAL, default=[], help=text)
    text = "correlate measures with the robust gap over models: correlation.{md,json} and scatter plots, in "
    add("--correlate", action="store_true", help=text + "--out or correlation/ beside the first run")
    text = "images (default: 1000, with several measures 500); with --target-error the most to read"
    add("--examples", type=int, metavar="N", help=text)
    text = "images of each split in robust_gap (default: 1000)"
    add("--gap-examples", type=int, default=1000, metavar="N", help=text)
    text = "measure wci until standard error / WCI is at most this, such as 0.05"
    add("--target-error", type=float, metavar="SHARE", help=text)


def _landscape(add: Add) -> None:
    _add_target(add, "landscapes/", nargs=None, split="test")
    _add_attack(add)
    text = "random: normalised by filter; layer: by layer; adversarial: where the robust loss rises most"
    add("--directions", choices=("random", "layer", "adversarial"), default="random", help=text)
    add("--two-d", action="store_true", help="the plane of two directions instead of single ones")
    add("--radius", type=float, help="relative to the weights' norm (default: 0.5, adversarial 0.025)")
    add("--points", type=int, metavar="P", help="on each axis, an odd number (default: 21, in a plane 11)")
    add("--num-directions", type=int, metavar="D", help="(default: 3; a plane has two)")
    add("--examples", type=int, default=200, metavar="N", help="images (default: 200)")


def _report(add: Add) -> None:
    add("runs", nargs="+", metavar="RUN", help="run folders")
    add("--out", metavar="FOLDER", help="(default: figures/ of the run, or report/ beside several)")
    add("--no-images", action="store_true", help="leave out images under attack, which load models and data")


def _export(add: Add) -> None:
    add("run", metavar="RUN", help="a run folder")
    add("folder", metavar="DIR", help="a new folder")
    add("--at", metavar="EPOCH", help=EPOCH)
    add("--onnx", action="store_true", help="also model.onnx; pip install onnx onnxscript onnxruntime")
    add("--torch-export", action="store_true", help="also model.pt2, a program of torch.export")
    add("--license", metavar="NAME", help="of the weights, as the hub abbreviates it: mit, apache-2.0, ...")
    add("--push", metavar="OWNER/NAME", help="upload to this new repository of the hub (HF_ENDPOINT)")
    add("--private", action="store_true", help="make that repository private")
    add("--force", action="store_true", help="replace an export in DIR, add a commit to a repository")


def _list(add: Add) -> None:
    add("kind", choices=LISTS, metavar="KIND", help=", ".join(LISTS))


def _add_target(add: Add, folder: str, nargs: str | None, split: str, at: str = EPOCH) -> None:
    """Declare which model, on which images and where: the same for every command that opens one."""
    add("targets" if nargs == "+" else "target", nargs=nargs, metavar="TARGET", help=TARGET)
    add("--at", metavar="EPOCH", help=at)
    text = "recipe files that say data, model and threat (default: the run's own), and settings that win"
    add("--recipe", **SEVERAL, default=[], help=text)
    text = "weights for a name of timm's (default: pretrained ones) or for the module of a function"
    add("--checkpoint", metavar="FILE", help=text)
    text = "digits, or cifar10, cifar100, svhn and their folder, or a folder DATA/{train,test}/CLASS/IMAGE"
    add("--data", nargs="+", metavar="DATA", help=f"{text}: short for --recipe data.source=... data.root=...")
    text = f"images, without augmentation (default: {split})"
    add("--split", choices=("train", "val", "test"), default=split, help=text)
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    text = f"where to write (default: {folder} of the run, or beside the file or export)"
    add("--out", metavar="FOLDER", help=text)
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")


def _add_attack(add: Add) -> None:
    """Declare the attack that losses are measured under."""
    add("--clean", action="store_true", help="the loss without an attack")
    text = "of the attack (default: the recipe's); another with --eps"
    add("--norm", choices=("linf", "l2", "l1"), help=text)
    add("--eps", help="radius such as 8/255 (default: the recipe's threat)")
    add("--steps", type=int, help="of PGD (default: the recipe's evaluation attack)")


COMMANDS = {  # name: (its options, in one line, at length)
    "train": (
        _train,
        "train what a recipe says",
        "On many GPUs: `accelerate launch -m wcitrain train RECIPE`.",
    ),
    "sweep": (_sweep, "train methods on bases with several settings and seeds, then report and measure", ""),
    "evaluate": (
        _evaluate,
        "measure the robust accuracy of a trained model, or compare two",
        "TARGET comes first: options with several values would take it. Writes <at>-<split>.npz (who "
        f"survived what), .json, and with several radii of a norm .png (the curve). {NAMES} A killed command "
        "goes on where it was when it is given again. --compare is McNemar's test of two such files.",
    ),
    "measure": (
        _measure,
        "measure the WCI, flatness, sharpness, norms, ... of trained models",
        "Measure the Weight-Curvature Index of a model layer by layer, with standard errors, and write "
        f"wci-<at>-<split>.json and .png (a bar a layer). {NAMES} With several models, several --measures, "
        "--at all or --correlate: a table, and measures-<at>-<split>.json beside each run, where what is "
        "measured already is kept.",
    ),
    "landscape": (
        _landscape,
        "draw the loss landscape of a trained model",
        "Clean and robust loss along directions through the weights, the attack run anew at every point: "
        f"<directions>-<at>-<split>.npz and .png. {NAMES}",
    ),
    "report": (_report, "a table, figures and one HTML page from run folders", ""),
    "export": (
        _export,
        "write a model that others load: timm's files, a card, RobustBench's entry; onto a hub",
        "DIR gets model.safetensors and config.json, which timm loads without wcitrain, README.md (the card: "
        "what was measured, and what was not), robustbench.json and metadata.json, which makes DIR a TARGET "
        "of evaluate and measure. What is written is compared with the model first.",
    ),
    "list": (_list, "print what can be named in recipes and options: meaning, settings, cost and source", ""),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``wcitrain``; the name of the command becomes ``command``."""
    text = "Robust training with the Weight-Curvature Index as a training knob."
    top = argparse.ArgumentParser(prog="wcitrain", description=text)
    top.add_argument("--version", action="version", version=f"wcitrain {wcitrain.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (declare, short, long) in COMMANDS.items():
        add = commands.add_parser(name, help=short, description=long or short).add_argument
        declare(add)
    return top
