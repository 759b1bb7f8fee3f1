"""``wcitrain landscape``: sections through the loss of a run, an export or a file, drawn and stored.

Data, model and threat come from a recipe: the run's own, or one that is given. One process only.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wcitrain.data import ImageSet
from wcitrain.images import images_of, open_splits
from wcitrain.measures.landscape import Landscape, landscape_1d, landscape_2d
from wcitrain.measures.landscape_drawing import draw
from wcitrain.seeding import seed_from
from wcitrain.targets import attack_of, device_of, find_target, load_model, recipe_of

POINTS, PLANE_POINTS, NUM_DIRECTIONS, NUM_EXAMPLES = 21, 11, 3, 200  # by default


@dataclass(frozen=True)
class Drawn:
    """The result of the command: the landscape and what was written."""

    landscape: Landscape
    split: str
    written: tuple[Path, ...]

    def text(self) -> str:
        """Return the losses in words and the files."""
        return f"{self.split}: {self.landscape}\nWritten: {', '.join(map(str, self.written))}"


def landscape_of_run(
    target: str | Path,
    *,
    directions: str = "random",
    two_d: bool = False,
    radius: float | None = None,
    num_points: int | None = None,
    num_directions: int | None = None,
    at: str | None = None,
    split: str = "test",
    recipe: str | Path | Sequence[str | Path] | None = None,
    settings: Sequence[str] = (),
    num_examples: int = NUM_EXAMPLES,
    clean: bool = False,
    norm: str | None = None,
    eps: str | float | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
) -> Drawn:
    """Draw the landscape of one model on images of its recipe's data, shuffled and not augmented.

    Args:
        target: ``targets.KINDS``.
        directions, radius, num_points, num_directions, num_examples, seed: See ``measures.landscape_1d``; 21
            points by default, 11 to a side of a plane, and 3 directions.
        two_d: A plane of two directions instead of sections along several.
        at: ``"last"`` (default), ``"best"`` or the number of an epoch that was kept, for a run.
        split: ``"test"``, ``"val"`` or ``"train"``.
        recipe: YAML that says data, model and threat; by default the run's own.
        settings: Settings such as ``"data.root=/data"`` that override the recipe's.
        clean: The clean loss alone.
        norm, eps, num_steps: Of the attack; by default the recipe's evaluation attack. With any of them the
            step is 2.5 eps / num_steps.
        out: Folder of the two files; by default ``landscapes/`` of the run, or beside the file or export.
        device: ``"auto"``, or a device of torch.

    Returns:
        The landscape; ``<name>.npz`` and ``<name>.png`` are written, and replaced where they were. The name
        says what differs from the default.

    Raises:
        ValueError: The target is none of ``targets.KINDS``, weights do not fit, or an argument is wrong.
        CheckpointError: The run's checkpoint is missing or damaged.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"got {os.environ['WORLD_SIZE']} processes; expected one. Start it without a launcher."
        )
    if two_d and num_directions is not None:
        raise ValueError(
            f"--num-directions: got {num_directions} with --two-d; expected two, always. Leave it out."
        )
    found = find_target(Path(target), at)
    settled = recipe_of(found, recipe, settings)
    threat, attack = attack_of(settled, clean, norm, eps, num_steps)
    place = torch.device(device_of(device, settled))
    splits = open_splits(settled)
    model = load_model(found, settled, splits).to(place)
    images = images_of(splits, split)
    batches = images.batches(
        min(100, len(images)),
        shuffle=isinstance(images, ImageSet),
        seed=seed_from(seed, "measure"),
        device=place,
    )
    usual = PLANE_POINTS if two_d else POINTS
    points = usual if num_points is None else num_points
    shared = {
        "directions": directions,
        "radius": radius,
        "num_points": points,
        "num_examples": num_examples,
        "seed": seed,
        **attack,
    }
    if two_d:
        landscape = landscape_2d(model, batches, threat, **shared)
    else:
        num = NUM_DIRECTIONS if num_directions is None else num_directions
        landscape = landscape_1d(model, batches, threat, num_directions=num, **shared)
    changed = any(value is not None for value in (norm, eps, num_steps))
    name = "-".join(
        [
            f"{directions}-{found.at}-{split}",
            *(["plane"] if two_d else []),
            *(["clean"] if threat is None else []),
            *(
                [f"{threat}-PGD-{attack['num_steps']}".replace("/", "_").replace(" ", "-")]
                if changed and threat
                else []
            ),
            *([f"r{radius:g}"] if radius is not None else []),
            *([f"p{points}"] if points != usual else []),
            *([f"d{num_directions}"] if num_directions not in (None, NUM_DIRECTIONS) else []),
            *([f"n{num_examples}"] if num_examples != NUM_EXAMPLES else []),
            *([f"s{seed}"] if seed else []),
        ]
    )
    folder = Path(out) if out else (found.run or found.path.parent) / "landscapes"
    folder.mkdir(parents=True, exist_ok=True)
    written = (folder / f"{name}.npz", folder / f"{name}.png")
    landscape.save(written[0])
    draw(landscape, f"{found.path.name}, {found.at}, {split}").savefig(written[1])
    return Drawn(landscape, split, written)
