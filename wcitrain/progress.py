"""How far a run is, where it lives, and the lines it prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.recipe import Recipe


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


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """Return one epoch as a line of text."""
    parts = [f"epoch {metrics['epoch']}/{epochs}", f"loss {metrics['train/loss']:.3f}"]
    if "val/robust_accuracy" in metrics:
        parts += [
            f"{split} {100 * metrics[f'{split}/clean_accuracy']:.1f}/{100 * metrics[f'{split}/robust_accuracy']:.1f} %"
            for split in ("train", "val")
        ]
        parts.append(f"gap {100 * metrics['robust_gap']:.1f}")
    if "wci/total" in metrics:
        parts.append(f"WCI {metrics['wci/total']:.3g}")
    parts += [f"lr {metrics['lr']:.2g}", f"{metrics['images_per_second']:.0f} img/s", f"{metrics['seconds']:.0f} s"]
    return "  ".join(parts)


def last_line(summary: dict[str, Any], folder: Path) -> str:
    """Return what is printed at the end of a run."""
    test = summary["last"]["test"]
    return (
        f"{folder.name}: {summary['method']}, test clean {100 * test['clean_accuracy']:.1f} %, robust "
        f"{100 * test['robust_accuracy']:.1f} % ({summary['attack']}, last epoch) -> {folder}"
    )
