"""``wcitrain landscape``: sections through the loss of a trained model along directions in weight space."""

import argparse

from wcitrain.commands import common
from wcitrain.measures import Problem, take_landscape

POINTS, PLANE_POINTS, NUM_DIRECTIONS, NUM_EXAMPLES = 21, 11, 3, 200  # by default


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    num_directions, is_plane = options.num_directions, options.two_d
    if is_plane and num_directions is not None:
        raise ValueError(f"--num-directions: got {num_directions} with --two-d; expected two. Leave it out.")
    target = common.opened(options, options.target, options.at)
    attack = common.attack_asked(target.recipe, options)
    folder = common.writable(target.folder("landscapes", options.out))
    usual = PLANE_POINTS if is_plane else POINTS
    points = usual if options.points is None else options.points
    num_directions = NUM_DIRECTIONS if num_directions is None else num_directions
    batches = target.batches(options.split, options.seed, options.examples)
    problem = Problem(target.load_model(), batches, attack, options.seed, options.examples)
    shape = points, num_directions, is_plane
    landscape = take_landscape(problem, options.directions, options.radius, *shape)
    name = common.file_name(
        f"{options.directions}-{target.at}-{options.split}",
        "plane" if is_plane else "",
        common.attack_part(options, attack),
        "" if options.radius is None else f"r{options.radius:g}",
        "" if points == usual else f"p{points}",
        "" if is_plane or num_directions == NUM_DIRECTIONS else f"d{num_directions}",
        *common.number_parts(options, options.examples, NUM_EXAMPLES),
        common.recipe_part(options, target),
    )
    written = (folder / f"{name}.npz", folder / f"{name}.png")
    folder.mkdir(parents=True, exist_ok=True)
    landscape.save(written[0])
    from wcitrain.report.figures import landscape as draw  # matplotlib takes a second to import

    draw(landscape, f"{target.title}, {options.split}").savefig(written[1])
    print(f"{options.split}: {landscape}\nWritten: {', '.join(map(str, written))}")
    return 0
