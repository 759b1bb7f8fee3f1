"""How far a run is, where it lives, the lines it prints, and the signals that stop it."""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.recipe import Recipe, load_recipe
from wcitrain.recipe.reading import read_yaml

# Settings that say where, how fast and how often, not what is computed: a run may go on with others. Another
# evaluation batch draws other random starts of the evaluation's attack, as another seed of it would.
FREE = {"data.root", "data.num_workers", "data.in_memory", "data.download", "evaluation.batch_size"}
FREE |= {"train.num_threads", "train.device", "checkpoint.every"}
PLACES = ("extra.path",)  # free where both have one: with none there is something else


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


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield ``("a.b", 1)`` for ``{"a": {"b": 1}}``; lists and None as text: TensorBoard takes scalars."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)


def refuse_another_run(saved: Recipe, asked: Recipe, folder: Path) -> None:
    """Raise ValueError where the settings of the run in ``folder`` and those asked for differ.

    `FREE` settings may differ. A run that went on with others would not be the one its recipe describes, nor
    would one whose recipe lacks a setting that has come since: its default need not be what was trained.
    """
    own, other = (_fixed(recipe) for recipe in (saved, asked))
    if keys := [key for key in _changed(own, other) if key not in PLACES or "None" in (own[key], other[key])]:
        more = f", and other {', '.join(keys[1:])}" if keys[1:] else ""
        got = f"got {keys[0]}={other.get(keys[0])!r}; expected {own.get(keys[0])!r}, as this run has{more}"
        advice = "Start another run with another name= or output=, or move the folder away."
        raise ValueError(f"{folder}: {got}. {advice}")
    path = folder / "recipe.yaml"
    written = dict(flat(read_yaml(path.read_text("utf-8")))) if path.exists() else own
    if lacking := [key for key in own if key not in written]:
        got = f"got no {', '.join(lacking[:4])}, of an older version; expected every setting"
        raise ValueError(f"{path}: {got}. Train anew, or go on with that version.")


def as_it_began(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with what the run in ``folder`` took from weights: they need not be there again."""
    path, asked = folder / "recipe.yaml", recipe.model
    if not path.is_file() or not asked.starts_from_weights:
        return recipe
    began = load_recipe(path).model
    known = {key: getattr(began, key) for key in ("mean", "std") if getattr(asked, key) is None}
    if began.checkpoint_path in (asked.name, asked.name.removeprefix("local-dir:")):
        known |= {key: getattr(began, key) for key in ("name", "pretrained", "checkpoint_path")}
        known["kwargs"] = began.kwargs | asked.kwargs
    return recipe.model_copy(update={"model": asked.model_copy(update=known)})


def changed_settings(saved: Recipe, asked: Recipe) -> list[str]:
    """Return what a run that goes on with other settings has now: ``["data.root='/data' (was 'data')"]``."""
    own, other = (dict(flat(recipe.model_dump(mode="json"))) for recipe in (saved, asked))
    return [f"{key}={other.get(key)!r} (was {own.get(key)!r})" for key in _changed(own, other)]


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """Return the settings by key that may not change."""
    settings = flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in settings if key not in FREE and not key.startswith("tracking.")}


def _changed(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**own, **other} if own.get(key) != other.get(key)]


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
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


class StopRequest:
    """``with StopRequest() as stop``: ``stop.is_set`` turns true on the first Ctrl-C or SIGTERM.

    The second stops at once. Outside the main thread, where Python delivers no signals, it is never set.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._former: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
