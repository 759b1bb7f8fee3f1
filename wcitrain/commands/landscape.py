"""``wcitrain landscape``: sections through the loss of a trained model along directions in weight space."""

import argparse
from typing import Any

from wcitrain.commands.options import AT_HELP, TARGET_HELP, add_recipe, source


def add(commands: Any) -> None:
    """Declare the command."""
    landscape = commands.add_parser(
        "landscape",
        help="draw the loss landscape of a trained model",
        description=(
            "Evaluate clean and robust loss along directions through the weights, the attack run anew at "
            "every point, and write <directions>-<at>-<split>.npz and .png; what differs from the default "
            "(plane, clean, attack, radius, points, directions, examples, seed) is appended to the name. "
            "Files of the same name are replaced. One process only."
        ),
    )
    landscape.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    landscape.add_argument(
        "--directions",
        choices=("random", "layer", "adversarial"),
        default="random",
        help="random: normalised by filter; layer: by layer; adversarial: where the robust loss rises most",
    )
    landscape.add_argument(
        "--two-d", action="store_true", help="the plane of two directions instead of single ones"
    )
    landscape.add_argument(
        "--radius", type=float, help="relative to the weights' norm (default: 0.5, adversarial 0.025)"
    )
    landscape.add_argument(
        "--points", type=int, metavar="P", help="on each axis, an odd number (default: 21, in a plane 11)"
    )
    landscape.add_argument("--num-directions", type=int, metavar="D", help="(default: 3; a plane has two)")
    landscape.add_argument("--at", metavar="EPOCH", help=AT_HELP)
    landscape.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="test",
        help="images, without augmentation (default: test)",
    )
    landscape.add_argument("--examples", type=int, default=200, metavar="N", help="images (default: 200)")
    landscape.add_argument("--clean", action="store_true", help="the loss without an attack only")
    landscape.add_argument(
        "--norm", choices=("linf", "l2"), help="of the attack (default: the recipe's threat)"
    )
    landscape.add_argument("--eps", help="radius such as 8/255 (default: the recipe's threat)")
    landscape.add_argument("--steps", type=int, help="of PGD (default: the recipe's evaluation attack)")
    landscape.add_argument(
        "--seed", type=int, default=0, help="of image order, starts and directions (default: 0)"
    )
    add_recipe(landscape)
    landscape.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write (default: landscapes/ of the run, or beside the file or export)",
    )
    landscape.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.landscape_of_runs import landscape_of_run

    result = landscape_of_run(
        options.target,
        directions=options.directions,
        two_d=options.two_d,
        radius=options.radius,
        num_points=options.points,
        num_directions=options.num_directions,
        split=options.split,
        **source(options),
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
