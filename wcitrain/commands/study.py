"""``Study``: which measures are taken of models, and how; ``measure_all`` takes and keeps them."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from tqdm import tqdm

from wcitrain import files
from wcitrain.attacks import Attack, Norm
from wcitrain.commands.common import attack_asked, attack_part, file_name, number_parts, writable
from wcitrain.digest import digest
from wcitrain.finding import kept_epochs
from wcitrain.measures import MEASURES, Measure, Problem
from wcitrain.method import Count, PositiveCount, Text, fields_of, method, refuse
from wcitrain.models import Classifier, load_exported
from wcitrain.params import logits_of
from wcitrain.preserve import kept_random_state
from wcitrain.recipe import load_recipe
from wcitrain.recipe.reading import read_yaml
from wcitrain.targets import Target

GAP = "robust_gap"
NUM_EXAMPLES = 500  # by default
NUM_GAP_EXAMPLES = 1000  # of each split, by default


def _every(names: Any) -> Any:
    return [*MEASURES] if names in ("all", ["all"]) else names


def _epoch(at: Any) -> Any:
    at = str(at) if type(at) is int else at
    if at not in (None, "last", "best", "all") and not (isinstance(at, str) and at.isdecimal()):
        raise ValueError("last, best, all or the number of a kept epoch")
    return at


@method
class Study:
    """What is measured and how, of every model alike: options, or an item of a sweep's ``measure``."""

    measures: Annotated[list[Text], BeforeValidator(_every)] = Field(
        default=["wci"], min_length=1, description="Names of measures, or all."
    )
    at: Annotated[str | None, BeforeValidator(_epoch)] = None
    split: Literal["train", "val", "test"] = "train"
    examples: PositiveCount | None = Field(default=None, description="Images, at least one.")
    gap_examples: PositiveCount = Field(
        default=NUM_GAP_EXAMPLES, description="Images of each split in robust_gap."
    )
    clean: bool = False
    norm: Norm | None = None
    eps: str | float | None = None
    steps: Count | None = Field(default=None, description="Steps of PGD.")
    seed: int = 0
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Settings by measure.")
    correlate: bool = False

    def __post_init__(self) -> None:
        if wrong := [name for name in (*self.measures, *self.settings) if name not in MEASURES]:
            refuse("measures", f"got {wrong[0]!r}; expected names of {', '.join(MEASURES)}.")
        if idle := [name for name in self.settings if name not in self.given()]:
            rule = "those of measures that are. Add it, or drop them."
            refuse("settings", f"got settings of {idle[0]}, which is not measured; expected {rule}")
        try:
            self.made()
        except ValueError as error:
            refuse("settings", str(error))
        if self.gap_examples != NUM_GAP_EXAMPLES and GAP not in self.given():
            rule = f"{GAP} among the measures, or correlations with it. Add it, or leave this out"
            refuse("gap_examples", f"got {self.gap_examples} without effect; expected {rule}.")

    def given(self) -> dict[str, dict[str, Any]]:
        """Return the measures, with the gap where they are correlated with it, and what is set of each.

        ``steps`` are also those of measures with an attack of their own.
        """
        given = {}
        for name in dict.fromkeys([*self.measures, *[GAP] * self.correlate]):
            has_steps = self.steps is not None and "num_steps" in fields_of(MEASURES[name])
            steps = {"num_steps": self.steps} if has_steps else {}
            given[name] = steps | self.settings.get(name, {})
        return given

    def made(self) -> dict[str, Measure]:
        """Return the measures by name."""
        return {name: MEASURES[name](**settings) for name, settings in self.given().items()}


@dataclass(frozen=True)
class Measured:
    """The measures of one model, and the file they are in."""

    target: Target
    measures: Mapping[str, Mapping[str, Any]]  # by name, as ``Measurement.as_dict``
    path: Path

    def value(self, name: str, part: str | None = None) -> float:
        """Return a measure, or a part of one; NaN where it has no finite value."""
        measurement = self.measures[name]
        number = measurement["value"] if part is None else measurement["parts"].get(part)
        return math.nan if number is None else float(number)

    def without_value(self) -> list[str]:
        """Return a line for every measure that has no finite value, with its settings, which say why."""
        where, missing = f"{self.target.name} {self.target.at}", "no finite value"
        rows = ((name, one) for name, one in self.measures.items() if one["value"] is None)
        return [f"{name} of {where}: {missing} ({one['settings']})" for name, one in rows]


def settings_by_measure(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return settings such as ``"average_flatness.xi=0.25"`` by measure and name; values are YAML.

    ValueError for other texts.
    """
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
    """Return the epochs that ``at`` means for a run: one, or with ``"all"`` every kept one, if there is any.

    ValueError for ``"all"`` of a run that kept none.
    """
    if at != "all":
        return [at]
    if kept := kept_epochs(Path(path)):
        return list(map(str, kept))
    raise ValueError(f"--at: got all with {path}, which kept no epoch; expected checkpoint.keep_every in it.")


def measure_all(targets: Sequence[Target], study: Study, out: str | Path | None = None) -> list[Measured]:
    """Take measures of models and write ``measures-<at>-<split>[...].json`` for each.

    What a file holds already, taken of the same weights in the same way, is not taken again. Before anything
    is measured a ValueError: too few models to correlate or one of them twice, a wrong attack, nowhere to
    write, unknown weights before training.
    """
    if study.correlate:
        _refuse_too_few(targets)
    needing = [name for name, one in study.made().items() if one.needs_initial and not one.can_lack_initial]
    for target in targets:
        refuse_unknown_start(target, needing)
    attacks = [attack_asked(target.recipe, study) for target in targets]
    folders = [writable(Path(out) / target.name if out else target.folder("measures")) for target in targets]
    models: list[Measured] = []
    bar = tqdm(targets, unit="model", disable=not sys.stderr.isatty())
    for target, attack, folder in zip(bar, attacks, folders, strict=True):
        if models and models[-1].target.recipe.data == target.recipe.data:  # then they are read once
            vars(target)["loaded"] = models[-1].target.loaded
        models.append(_measure(target, study, attack, folder))
    return models


def _refuse_too_few(targets: Sequence[Target]) -> None:
    """Refuse fewer than three models to correlate, and the same one again: it would count as another run."""
    known: dict[tuple[Path, object], Target] = {}
    for target in targets:
        epoch = target.at if target.epoch is None else target.epoch
        twin = known.setdefault((target.home.resolve(), epoch), target)
        if twin is not target:
            got = f"{target.path} ({target.at}) and {twin.path} ({twin.at}), which are the same model"
            raise ValueError(f"correlate: got {got}; expected each model once. Leave one out.")
    if len(targets) < 3:
        raise ValueError(f"correlate: got {len(targets)} models; expected at least three. Name more runs.")


def refuse_unknown_start(target: Target, needing: Sequence[str]) -> None:
    """Refuse a model whose weights before training nobody knows, where measures are of the way from there."""
    if needing and (unknown := _unknown_start(target)):
        rule = "a run with its own seed and model, which make its weights before training again"
        text = f"got {target.path} {unknown}; expected {rule}. Give one, or leave this out."
        raise ValueError(f"{', '.join(needing)}: {text}")


def weights_before(target: Target) -> dict[str, Tensor] | None:
    """Return the weights before training, made again, or None where nobody knows them.

    ValueError where the run kept others as its epoch 0: another version of torch or timm makes others.
    """
    if _unknown_start(target):
        return None
    made, kept = target.initial_weights(), target.home / "model" / "epoch-0"
    there = load_exported(kept).state_dict() if (kept / "metadata.json").is_file() else {}
    if other := [name for name, weight in there.items() if not torch.allclose(weight, made[name], atol=1e-6)]:
        text = f"got {other[0]} of {kept} unlike that which the seed makes here; expected the same"
        raise ValueError(f"weights before training: {text}. Use the torch and timm that trained the run.")
    return made


def _unknown_start(target: Target) -> str:
    """Return why nobody knows a model's weights before training; empty where its run does."""
    if target.run is None:
        return "without its run"
    own, given = load_recipe(target.run / "recipe.yaml"), target.recipe
    is_own = (own.seed, own.model) == (given.seed, given.model)
    return "" if is_own else "with another seed or model than its run"


def header(
    target: Target, study: Study, attack: Attack | None, num: int | None, model: Classifier
) -> dict[str, Any]:
    """Return what a file of measures says of how they were taken."""
    data = target.recipe.model_dump(mode="json")["data"]
    document = {
        "target": str(target.path),
        "checkpoint": target.checkpoint,
        "at": target.at,
        "epoch": target.epoch,
        "split": study.split,
        "seed": study.seed,
        "num_examples": num,
        "data": {key: data[key] for key in data if key not in ("crop_padding", "flip", "num_workers")},
        "threat": attack and str(attack.threat),
        "attack": {"num_steps": attack.num_steps, "step_size": attack.step_size} if attack else {},
        "weights": _digest_of(model, target),
    }
    return json.loads(json.dumps(document))


def _digest_of(model: Classifier, target: Target) -> str:
    """Return the digest of weights and normalisation; of other people's code also of what it does."""
    parts: list[object] = [part for item in model.state_dict().items() for part in item]
    parts += [model.mean, model.std]
    if target.kind:
        x = torch.rand(2, *target.splits.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), kept_random_state(torch.device(target.device)):
            parts.append(logits_of(model(x.to(target.device))))
    return digest(parts)


def file_of(kind: str, target: Target, study: Study, attack: Attack | None, usual: int, *more: str) -> str:
    """Return the name of a file of measures: ``<kind>-<at>-<split>`` and what differs from the defaults."""
    numbers = number_parts(study, study.examples, usual)
    return file_name(f"{kind}-{target.at}-{study.split}", attack_part(study, attack), *numbers, *more)


def _measure(target: Target, study: Study, attack: Attack | None, folder: Path) -> Measured:
    """Take the measures that are not there yet, saving after each."""
    model, num = target.load_model(), study.examples or NUM_EXAMPLES
    document = header(target, study, attack, num, model)
    path = folder / f"{file_of('measures', target, study, attack, NUM_EXAMPLES)}.json"
    before = files.read_json(path) if path.is_file() else {}
    same = {key: value for key, value in document.items() if key not in ("target", "checkpoint")}
    if before and {key: before.get(key) for key in same} != same:
        path = path.with_name(f"{path.stem}-{digest([same])[:8]}.json")  # that file stays
        before = files.read_json(path) if path.is_file() else {}
    document = document | {"measures": {}} | before
    taken, given, made = document["measures"], study.given(), study.made()
    if GAP in given:
        given[GAP] = {"num_examples": study.gap_examples}
    missing = {name: made[name] for name in given if taken.get(name, {}).get("given") != given[name]}
    initial = weights_before(target) if any(one.needs_initial for one in missing.values()) else None
    batches = target.batches(study.split, study.seed, num)
    problem = Problem(model, batches, attack, study.seed, num, initial=initial)
    for name, one in missing.items():
        asked = problem
        if name == GAP:  # of training images, with test images beside them
            train, test = (
                target.batches(split, study.seed, study.gap_examples) for split in ("train", "test")
            )
            asked = Problem(model, train, attack, study.seed, study.gap_examples, test)
        taken[name] = {**one.measure(asked).as_dict(), "given": given[name]}
        files.write_json(path, document | ({"notes": target.notes} if target.notes else {}))
    return Measured(target, {name: taken[name] for name in given}, path)
