"""``Study``: which measures are taken of models, and how; ``measure_all`` takes and keeps them."""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from tqdm import tqdm

from wcitrain import files
from wcitrain.attacks import Attack
from wcitrain.commands.output import attack_part, file_name
from wcitrain.digest import digest
from wcitrain.measures import MEASURES, Measure, Problem
from wcitrain.method import Count, PositiveCount, Text, fields_of, method, refuse
from wcitrain.models import Classifier
from wcitrain.recipe.reading import read_yaml
from wcitrain.targets import Target, attack_of, kept_epochs

GAP = "robust_gap"
NUM_EXAMPLES = 500  # by default


def _every(names: Any) -> Any:
    return [*MEASURES] if names in ("all", ["all"]) else names


def _text(epoch: Any) -> Any:
    return str(epoch) if type(epoch) is int else epoch


@method
class Study:
    """What is measured and how, of every model alike: options, or an item of a sweep's ``measure``."""

    measures: Annotated[list[Text], BeforeValidator(_every)] = Field(
        default=["wci"], min_length=1, description="Names of measures, or all."
    )
    at: Annotated[Text | None, BeforeValidator(_text)] = Field(
        default=None, description="last, best, all or the number of a kept epoch."
    )
    split: Literal["train", "val", "test"] = "train"
    examples: PositiveCount | None = Field(default=None, description="Images, at least one.")
    gap_examples: PositiveCount = Field(default=1000, description="Images of each split in robust_gap.")
    clean: bool = False
    norm: Literal["linf", "l2"] | None = None
    eps: str | float | None = None
    steps: Count | None = Field(default=None, description="Steps of PGD.")
    seed: int = 0
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Settings by measure.")
    correlate: bool = False

    def __post_init__(self) -> None:
        for name in (*self.measures, *self.settings):
            if name not in MEASURES:
                rule = f"names of {', '.join(MEASURES)}. Correct the spelling."
                refuse("measures", f"got {name!r}; expected {rule}")
            if name not in self.names:
                rule = "those of measures that are. Add it, or drop them."
                refuse("settings", f"got settings of {name}, which is not measured; expected {rule}")
        try:
            self.made()
        except ValueError as error:
            refuse("settings", str(error))

    @property
    def names(self) -> list[str]:
        """The measures, each once; with the gap where they are correlated with it."""
        return list(dict.fromkeys([*self.measures, *[GAP] * self.correlate]))

    def made(self) -> dict[str, Measure]:
        """Return the measures with their settings, and ``steps`` for those with an attack of their own."""
        steps = {} if self.steps is None else {"num_steps": self.steps}
        shared = {name: steps if "num_steps" in fields_of(MEASURES[name]) else {} for name in self.names}
        return {name: MEASURES[name](**shared[name] | self.settings.get(name, {})) for name in self.names}


@dataclass(frozen=True)
class Measured:
    """The measures of one model, and the file they are in."""

    target: Target
    measures: Mapping[str, Mapping[str, Any]]  # by name, as ``Measurement.as_dict``
    path: Path

    def value(self, name: str, part: str | None = None) -> float:
        """Return a measure, or a part of one; NaN where it has no finite value."""
        measurement = self.measures.get(name, {})
        number = measurement.get("value") if part is None else measurement.get("parts", {}).get(part)
        return math.nan if number is None else float(number)


def read_study(content: Mapping[str, Any], name_of: Callable[[str], str]) -> Study:
    """Return ``Study(**content)``; errors call a key ``name_of(key)``."""
    try:
        return Study(**content)
    except ValueError as error:
        text = re.sub(r"^Study\.(\w+)", lambda key: name_of(key[1]), str(error), flags=re.MULTILINE)
        raise ValueError(text) from error


def settings_by_measure(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return settings such as ``"average_flatness.xi=0.25"`` by measure and name; values are YAML."""
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        name, dot, key = place.partition(".")
        if not (equals and dot and key):
            rule = "measure.setting=value, such as average_flatness.xi=0.25."
            raise ValueError(f"--set: got {text!r}; expected {rule}")
        settings.setdefault(name, {})[key] = read_yaml(value)
    return settings


def epochs(path: str | Path, at: str | None) -> list[str | None]:
    """Return the epochs that ``at`` means for a run: one, or with ``"all"`` every kept one."""
    if at != "all":
        return [at]
    kept = kept_epochs(Path(path))
    if not kept:
        rule = "a run with checkpoint.keep_every."
        raise ValueError(f"--at: got all with {path}, which kept no epoch; expected {rule}")
    return list(map(str, kept))


def measure_all(targets: Sequence[Target], study: Study, out: str | Path | None = None) -> list[Measured]:
    """Take measures of models and write ``measures-<at>-<split>[...].json`` for each.

    What a file holds already, taken of the same weights in the same way, is not taken again.

    Raises:
        ValueError: Before anything is measured: too few models to correlate, or a wrong attack.
    """
    if study.correlate and len(targets) < 3:
        rule = "at least three. Name more runs, or --at all."
        raise ValueError(f"correlate: got {len(targets)} models; expected {rule}")
    attacks = [attack_of(target.recipe, study) for target in targets]
    models: list[Measured] = []
    bar = tqdm(targets, unit="model", disable=not sys.stderr.isatty())
    for target, attack in zip(bar, attacks, strict=True):
        bar.set_postfix_str(f"{target.short_name} {target.at}")
        if models:
            target.share_images(models[-1].target)
        models.append(_measure(target, study, attack, out))
    return models


def _measure(target: Target, study: Study, attack: Attack | None, out: str | Path | None) -> Measured:
    """Take the measures that are not there yet, saving after each."""
    model = target.load_model()
    num = study.examples or NUM_EXAMPLES
    data = target.recipe.model_dump(mode="json")["data"]
    header: dict[str, Any] = {
        "at": target.at,
        "epoch": target.epoch,
        "split": study.split,
        "seed": study.seed,
        "num_examples": num,
        "data": {key: data[key] for key in data if key not in ("crop_padding", "flip", "num_workers")},
        "threat": attack and str(attack.threat),
        "attack": lengths(attack),
        "weights": digest(part for item in model.state_dict().items() for part in item),
    }
    header = json.loads(json.dumps(header))
    folder = Path(out) / target.short_name if out else target.folder("measures")
    name = file_name(
        f"measures-{target.at}-{study.split}",
        attack_part(study, attack),
        "" if num == NUM_EXAMPLES else f"n{num}",
        f"s{study.seed}" if study.seed else "",
    )
    path = folder / f"{name}.json"
    if (before := _read(path)) and {key: before.get(key) for key in header} != header:
        path = folder / f"{name}-{digest([header])[:8]}.json"  # other weights or data: that file stays
        before = _read(path)
    document: dict[str, Any] = {"target": str(target.path), **header, "measures": {}} | before
    taken = document["measures"]
    given = {name: study.settings.get(name, {}) for name in study.names}
    if GAP in given:
        given[GAP] = {"num_examples": study.gap_examples}
    made = study.made()
    if study.steps is not None:  # of measures with an attack of their own
        own = {name for name, one in made.items() if "num_steps" in fields_of(type(one))}
        given = {
            name: ({"num_steps": study.steps} if name in own else {}) | one for name, one in given.items()
        }
    missing = {name: made[name] for name in given if taken.get(name, {}).get("given") != given[name]}
    initial = target.initial_weights() if any(one.needs_initial for one in missing.values()) else None
    problem = Problem(
        model, target.batches(study.split, study.seed), attack, study.seed, num, initial=initial
    )
    for name, one in missing.items():
        here = _gap_problem(target, model, study, attack) if name == GAP else problem
        taken[name] = {**one.measure(here).as_dict(), "given": given[name]}
        files.write_json(path, document)
    return Measured(target, {name: taken[name] for name in study.names}, path)


def _gap_problem(target: Target, model: Classifier, study: Study, attack: Attack | None) -> Problem:
    """Return the problem on training images, with test images beside them."""
    train, test = (target.batches(split, study.seed) for split in ("train", "test"))
    return Problem(model, train, attack, study.seed, study.gap_examples, test_batches=test)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def lengths(attack: Attack | None) -> dict[str, Any]:
    """Return the steps of an attack as JSON has them; nothing for the clean loss."""
    return {"num_steps": attack.num_steps, "step_size": attack.step_size} if attack else {}
