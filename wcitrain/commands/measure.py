"""``wcitrain measure``: the WCI of a trained model."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
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


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
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
