"""``wcitrain landscape``: sections through the loss of a trained model along directions in weight space."""

import argparse
from functools import partial

from wcitrain.commands.output import attack_part, file_name, opened, refuse_several_processes
from wcitrain.measures import Problem, landscape_1d, landscape_2d
from wcitrain.targets import attack_of

POINTS, PLANE_POINTS, NUM_DIRECTIONS, NUM_EXAMPLES = 21, 11, 3, 200  # by default


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    refuse_several_processes()
    if options.two_d and options.num_directions is not None:
        text = f"got {options.num_directions} with --two-d; expected two, always. Leave it out."
        raise ValueError(f"--num-directions: {text}")
    target = opened(options, options.target, options.at)
    attack = attack_of(target.recipe, options)
    usual = PLANE_POINTS if options.two_d else POINTS
    points = usual if options.points is None else options.points
    num_directions = NUM_DIRECTIONS if options.num_directions is None else options.num_directions
    batches = target.batches(options.split, options.seed)
    problem = Problem(target.load_model(), batches, attack, options.seed, options.examples)
    along = landscape_2d if options.two_d else partial(landscape_1d, num_directions=num_directions)
    landscape = along(problem, directions=options.directions, radius=options.radius, num_points=points)
    name = file_name(
        f"{options.directions}-{target.at}-{options.split}",
        "plane" if options.two_d else "",
        attack_part(options, attack),
        "" if options.radius is None else f"r{options.radius:g}",
        "" if points == usual else f"p{points}",
        "" if options.two_d or num_directions == NUM_DIRECTIONS else f"d{num_directions}",
        "" if options.examples == NUM_EXAMPLES else f"n{options.examples}",
        f"s{options.seed}" if options.seed else "",
    )
    folder = target.folder("landscapes", options.out)
    folder.mkdir(parents=True, exist_ok=True)
    written = (folder / f"{name}.npz", folder / f"{name}.png")
    landscape.save(written[0])
    from wcitrain.report.figures import landscape as draw  # matplotlib takes a second to import

    draw(landscape, f"{target.name}, {options.split}").savefig(written[1])
    print(f"{options.split}: {landscape}\nWritten: {', '.join(map(str, written))}")
    return 0
