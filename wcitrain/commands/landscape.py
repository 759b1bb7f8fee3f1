"""``wcitrain landscape``: sections through the loss of a trained model along directions in weight space."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    landscape = commands.add_parser(
        "landscape",
        help="draw the loss landscape of a trained model",
        description=(
            "Evaluate clean and robust loss along directions through the weights, the attack run anew at every point, and write "
            "<directions>-<at>-<split>.npz and .png; what differs from the default (plane, clean, attack, radius, seed) is "
            "appended to the name. Files of the same name are replaced. One process only."
        ),
    )
    landscape.add_argument(
        "target",
        metavar="TARGET",
        help="a run folder; an exported model folder (runs/NAME-s0/model/last); or a file .pt, .pth or .safetensors with a state "
        "dict of the model or of its timm backbone, with --recipe",
    )
    landscape.add_argument(
        "--directions",
        choices=("random", "layer", "adversarial"),
        default="random",
        help="random: filter-normalised; layer: relative to each layer; adversarial: where the robust loss rises most",
    )
    landscape.add_argument("--two-d", action="store_true", help="the plane of two directions instead of single ones")
    landscape.add_argument(
        "--radius", type=float, help="relative to the weights' norm (default: 0.5, adversarial 0.025)"
    )
    landscape.add_argument(
        "--points", type=int, metavar="P", help="on each axis, an odd number (default: 21, in a plane 11)"
    )
    landscape.add_argument("--num-directions", type=int, default=3, metavar="D", help="(default: 3)")
    landscape.add_argument(
        "--at", metavar="EPOCH", help="last (default), best, or a number of an epoch that a run kept"
    )
    landscape.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="images, without augmentation (default: test)"
    )
    landscape.add_argument("--examples", type=int, default=200, metavar="N", help="images (default: 200)")
    landscape.add_argument("--clean", action="store_true", help="the loss without an attack only")
    landscape.add_argument("--norm", choices=("linf", "l2"), help="of the attack (default: the recipe's threat)")
    landscape.add_argument("--eps", help="radius such as 8/255 (default: the recipe's threat)")
    landscape.add_argument("--steps", type=int, help="of PGD (default: the recipe's evaluation attack)")
    landscape.add_argument("--seed", type=int, default=0, help="of image order, starts and directions (default: 0)")
    landscape.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar=("RECIPE", "key=value"),
        help="recipe that says data, model and threat (default: the run's own), and settings that override it",
    )
    landscape.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: landscapes/ of the run, or beside the file or export)"
    )
    landscape.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.landscape_of_runs import landscape_of_run

    recipe = [text for text in options.recipe if "=" not in text]
    if len(recipe) > 1:
        raise ValueError(
            f"--recipe: got {len(recipe)} files ({', '.join(recipe)}); expected one. Settings are key=value."
        )
    result = landscape_of_run(
        options.target,
        directions=options.directions,
        two_d=options.two_d,
        radius=options.radius,
        num_points=options.points,
        num_directions=options.num_directions,
        at=options.at,
        split=options.split,
        recipe=recipe[0] if recipe else None,
        settings=[text for text in options.recipe if "=" in text],
        num_examples=options.examples,
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
