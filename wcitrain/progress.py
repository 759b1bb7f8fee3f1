"""How far a run is, where it lives, and the lines it prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.recipe import Recipe

# Settings that say where and how often, not what is computed: a run may go on with others.
FREE: Any = {"train": {"num_threads", "device"}, "checkpoint": {"every"}, "tracking": True}


@dataclass
class Progress:
    """How far the run is; saved as it stands."""

    epoch: int = 0  # finished epochs
    update: int = 0  # finished optimizer steps of the epoch under way
    step: int = 0  # finished optimizer steps
    loss_sum: float = 0.0  # over the updates of the epoch under way
    epoch_seconds: float = 0.0  # training time of the epoch under way
    train_seconds: float = 0.0  # without evaluation
    seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -1.0  # validation robust accuracy
    stop_reason: str = ""  # why training ended before its last epoch


def run_folder(recipe: Recipe) -> Path:
    """Return where a recipe's run lives: ``<output>/<name>-s<seed>``."""
    return Path(recipe.output) / f"{recipe.name}-s{recipe.seed}"


def has_started(folder: Path) -> bool:
    """Tell whether a folder holds results of a run, and not only its recipe."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "summary.json"))


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a run can be gone on with: the first epoch may end before anything is saved."""
    return any((folder / "checkpoints" / name).exists() for name in ("last", "previous"))


def refuse_another_run(saved: Recipe, asked: Recipe, folder: Path) -> None:
    """Raise ValueError where the settings of the run in ``folder`` and those asked for differ.

    `FREE` settings may differ. A run that went on with others would not be the one its recipe describes.
    """
    own, other = (_by_key(recipe.model_dump(mode="json", exclude=FREE)) for recipe in (saved, asked))
    for key in own | other:
        if (here := own.get(key)) != (there := other.get(key)):
            advice = "Start another run with another name= or output=, or move the folder away."
            raise ValueError(f"{folder}: got {key}={there!r}; expected {here!r}, as this run has. {advice}")


def _by_key(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe by dotted key."""
    sections = {name: one if isinstance(one, dict) else {"": one} for name, one in recipe.items()}
    pairs = ((f"{name}.{key}", value) for name, keys in sections.items() for key, value in keys.items())
    return {key.rstrip("."): value for key, value in pairs}


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """Return one epoch as a line of text."""
    parts = [f"epoch {metrics['epoch']}/{epochs}", f"loss {metrics['train/loss']:.3f}"]
    if "val/robust_accuracy" in metrics:
        for split in ("train", "val"):
            clean, robust = (100 * metrics[f"{split}/{kind}_accuracy"] for kind in ("clean", "robust"))
            parts.append(f"{split} {clean:.1f}/{robust:.1f} %")
        parts.append(f"gap {100 * metrics['robust_gap']:.1f}")
    if "wci/total" in metrics:
        parts.append(f"WCI {metrics['wci/total']:.3g}")
    parts += [f"lr {metrics['lr']:.2g}", f"{metrics['images_per_second']:.0f} img/s"]
    return "  ".join([*parts, f"{metrics['seconds']:.0f} s"])


def last_line(summary: dict[str, Any], folder: Path) -> str:
    """Return what is printed at the end of a run."""
    clean, robust = (100 * summary["last"]["test"][f"{kind}_accuracy"] for kind in ("clean", "robust"))
    accuracy = f"test clean {clean:.1f} %, robust {robust:.1f} % ({summary['attack']}, last epoch)"
    return f"{folder.name}: {summary['method']}, {accuracy} -> {folder}"
