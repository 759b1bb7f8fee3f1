"""``wcitrain train``: train what a recipe says, or go on with a run."""

import argparse
import os
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    train = commands.add_parser(
        "train",
        help="train what a recipe says",
        description="Train what a recipe says. `accelerate launch -m wcitrain train RECIPE` is the same program.",
    )
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file")
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the recipe's")
    train.add_argument("--resume", metavar="RUN", help="run folder to go on with, instead of a recipe")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
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
