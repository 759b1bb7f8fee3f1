"""Options that several commands share: what is measured, and the recipe that says how."""

import argparse
from typing import Any

TARGET_HELP = (
    "a run folder; a checkpoint (runs/NAME-s0/checkpoints/last); an exported model folder "
    "(runs/NAME-s0/model/last); a file .pt, .pth or .safetensors with a state dict of the model or of its "
    "timm backbone, with --recipe; or a recipe whose model is pretrained"
)
AT_HELP = "last (default), best, or a number of an epoch that the run kept"


def add_recipe(parser: Any) -> None:
    """Declare ``--recipe``."""
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar=("RECIPE", "key=value"),
        help="recipe files that say data, model and threat (default: the run's own), and settings that win",
    )


def source(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments ``recipe``, ``settings`` and ``at``."""
    return {
        "recipe": [text for text in options.recipe if "=" not in text] or None,
        "settings": [text for text in options.recipe if "=" in text],
        "at": options.at,
    }
