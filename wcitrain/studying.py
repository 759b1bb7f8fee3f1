"""What a sweep measures once its runs are trained: the ``measure`` key of a sweep file, a list of studies::

measure:
  - at: all                                # every kept epoch: curves through training
    split: test
    measures: [average_flatness, wci]
    examples: 100
    seeds: [0]                             # of the sweep's; by default all
    settings: {average_flatness: {num_draws: 3}}
  - at: last
    measures: all
    correlate: true                        # with the robust gap, over runs
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.correlating_runs import study, write_study
from wcitrain.measuring_many import GAP, NAMES, How, MeasuredModel, measure_many
from wcitrain.recipe import Recipe
from wcitrain.targets import attack_of

KEYS = {
    "at",
    "split",
    "measures",
    "examples",
    "gap_examples",
    "clean",
    "norm",
    "eps",
    "steps",
    "seed",
    "seeds",
    "settings",
    "correlate",
}


@dataclass(frozen=True)
class SweepStudy:
    """One study of a sweep's runs: how, at which epochs, of which seeds, and whether to correlate."""

    how: How
    at: str
    seeds: Sequence[int] | None
    correlates: bool


def read_studies(content: Any, where: str) -> list[SweepStudy]:
    """Return the studies of a sweep file's ``measure`` key; none where it is missing.

    Raises:
        ValueError: Not a list of mappings, unknown keys, names or settings.
    """
    if content is None:
        return []
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ValueError(
            f"{where}: got {content!r}; expected a list of studies, such as [{{at: last, measures: [wci]}}]."
        )
    return [_read(item, f"{where}[{number}]") for number, item in enumerate(content)]


def _read(item: Mapping[str, Any], where: str) -> SweepStudy:
    if unknown := set(item) - KEYS:
        raise ValueError(
            f"{where}: got the keys {sorted(unknown)}; expected some of {', '.join(sorted(KEYS))}."
        )
    names = item.get("measures", ["wci"])
    names = list(NAMES) if names == "all" else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}.measures: got {names!r}; expected a list of names, or all.")
    correlates = bool(item.get("correlate", False))
    if correlates and GAP not in names:
        names = [*names, GAP]
    at, seeds = str(item.get("at", "last")), item.get("seeds")
    if not (at in ("last", "best", "all") or at.isdecimal()):
        raise ValueError(f"{where}.at: got {at!r}; expected last, best, all or the number of a kept epoch.")
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise ValueError(f"{where}.seeds: got {seeds!r}; expected a list of integers such as [0].")
    if not names or type(item.get("correlate", False)) is not bool:
        raise ValueError(
            f"{where}: got measures={names!r}, correlate={item.get('correlate', False)!r}; expected at least "
            "one measure, and true or false."
        )
    renamed = {"examples": "num_examples", "steps": "num_steps"}
    arguments = {
        renamed.get(key, key): value
        for key, value in item.items()
        if key not in ("at", "measures", "seeds", "correlate")
    }
    try:
        return SweepStudy(How(names, **arguments), at, seeds, correlates)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def check_studies(studies: Sequence[SweepStudy], recipes: Sequence[Recipe], where: str) -> None:
    """Refuse, before anything is trained, studies of seeds or epochs that the sweep's runs will not have.

    Raises:
        ValueError: With what is missing.
    """
    seeds = {recipe.seed for recipe in recipes}
    for number, asked in enumerate(studies):
        if asked.seeds is not None and not set(asked.seeds) <= seeds:
            raise ValueError(
                f"{where}[{number}].seeds: got {asked.seeds}; expected some of the sweep's {sorted(seeds)}."
            )
        every = [recipe.checkpoint.keep_every for recipe in recipes]
        if asked.at not in ("last", "best") and not all(every):
            raise ValueError(
                f"{where}[{number}].at: got {asked.at!r}; expected last, best, or checkpoint.keep_every set."
            )
        for recipe in recipes:
            attack_of(recipe, asked.how.clean, asked.how.norm, asked.how.eps, asked.how.num_steps)


def run_studies(studies: Sequence[SweepStudy], folders: Mapping[Path, int], out: Path) -> list[Path]:
    """Measure what the studies ask for, draw it and return the paths written.

    Args:
        studies: From ``read_studies``.
        folders: The sweep's run folders with their seeds.
        out: Where figures and tables go; measures lie beside each run.
    """
    written: list[Path] = []
    for number, asked in enumerate(studies, start=1):
        chosen = [folder for folder, seed in folders.items() if asked.seeds is None or seed in asked.seeds]
        print(f"\n== study {number} of {len(studies)}: {len(chosen)} runs, epochs: {asked.at} ==", flush=True)
        models = measure_many(chosen, asked.how, at=asked.at)
        if asked.at == "all":
            written += _draw_training(models, out)
        if asked.correlates:
            folder = out / f"correlation-{asked.at}-{asked.how.split}"
            found = study(models, seed=asked.how.seed)
            written += write_study(found, folder)
            print(found.text())
    return written


def _draw_training(models: Sequence[MeasuredModel], out: Path) -> list[Path]:
    """Draw every measure against the epoch, and against the robust loss where that was measured."""
    from wcitrain.report.through_training import Point, measures_against_loss, measures_through_training

    points = [
        Point(m.run or m.target, m.epoch or 0, {name: m.value(name) for name in m.measures}) for m in models
    ]
    out.mkdir(parents=True, exist_ok=True)
    figures = {"measures-through-training": measures_through_training(points)}
    if any("robust_loss" in m.measures for m in models):
        figures["measures-against-loss"] = measures_against_loss(points)
    drawn = {out / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        figure.savefig(path)
    return list(drawn)
