"""``wcitrain measure`` with several measures, models or epochs: a table, and one JSON beside each run.

Data, model and threat come from a recipe: the run's own, or one that is given. One process only. What a file
holds already, taken of the same weights in the same way, is not taken again: an interrupted study goes on.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from wcitrain.attacks import ThreatModel
from wcitrain.build import initial_model
from wcitrain.data import ImageSet, Splits
from wcitrain.digest import digest
from wcitrain.images import images_of, open_splits
from wcitrain.measures.adversarial import reused_attacks
from wcitrain.measures.by_name import MEASURES, NEED_INITIAL, OWN_PROTOCOL, Shared, check_settings, measure
from wcitrain.measures.losses import robust_gap
from wcitrain.measures.measurement import Measurement
from wcitrain.measures.wci import with_error
from wcitrain.models import Classifier
from wcitrain.preserve import kept_random_state
from wcitrain.recipe import Recipe
from wcitrain.recipe.reading import read_yaml
from wcitrain.seeding import seed_from
from wcitrain.targets import Target, attack_of, device_of, find_target, kept_epochs, load_model, recipe_of

GAP = "robust_gap"  # needs both splits, unlike the measures by name
NAMES = (*MEASURES, GAP)
BATCH = 100


@dataclass(frozen=True)
class How:
    """How measures are taken, of every model alike.

    Args:
        names: Of ``NAMES``.
        split: Images of ``"train"``, ``"val"`` or ``"test"``, in random order and without augmentation.
        num_examples: Of the measures; fewer where the split has fewer.
        gap_examples: Of each split in the robust gap.
        clean, norm, eps, num_steps: Of the attack, see ``targets.attack_of``.
        settings: Further arguments of single measures, by name.
        seed: Of image order, random starts and probes.
        device: ``"auto"``, or a device of torch.
    """

    names: Sequence[str]
    split: str = "train"
    num_examples: int = 500
    gap_examples: int = 1000
    clean: bool = False
    norm: str | None = None
    eps: str | float | None = None
    num_steps: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_settings([name for name in self.names if name != GAP], self.settings)
        if min(self.num_examples, self.gap_examples) < 1 or self.split not in ("train", "val", "test"):
            raise ValueError(
                f"measure: got split={self.split!r}, {self.num_examples} and {self.gap_examples} examples; "
                "expected train, val or test and at least one example."
            )


@dataclass(frozen=True)
class MeasuredModel:
    """The measures of one model at one epoch, and the file they are in."""

    target: Path
    run: Path | None
    at: str
    epoch: int | None
    measures: Mapping[str, Mapping[str, Any]]  # by name, as ``Measurement.as_dict``
    path: Path

    def value(self, name: str, part: str | None = None) -> float:
        """Return a measure, or a part of one; NaN where it has no finite value."""
        found = self.measures.get(name, {})
        number = found.get("value") if part is None else found.get("parts", {}).get(part)
        return float("nan") if number is None else float(number)


def measure_many(
    targets: Sequence[str | Path],
    how: How,
    *,
    at: str | None = None,
    recipe: str | Path | Sequence[str | Path] | None = None,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    progress: bool = True,
) -> list[MeasuredModel]:
    """Take measures of models, and write ``measures-<at>-<split>[...].json`` for each.

    Args:
        targets: ``targets.KINDS``.
        how: What and how.
        at: ``"last"`` (default), ``"best"``, the number of a kept epoch, or ``"all"``: every kept epoch.
        recipe, settings: See ``measuring_runs.measure_run``.
        out: Folder of the files, one folder a model; by default ``measures/`` of the run, or beside the file.
        progress: Show a bar, on a terminal.

    Raises:
        ValueError: A target is none of ``KINDS``, an epoch was not kept, an argument is wrong; before
            anything is measured.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"got {os.environ['WORLD_SIZE']} processes; expected one. Start it without a launcher."
        )
    found = [target for path in targets for target in _targets(Path(path), at)]
    recipes = [recipe_of(target, recipe, settings) for target in found]
    for settled in recipes:
        attack_of(settled, how.clean, how.norm, how.eps, how.num_steps)
    places = [device_of(how.device, settled) for settled in recipes]
    results: list[MeasuredModel] = []
    data, splits = None, None
    bar = tqdm(found, unit="model", disable=not (progress and sys.stderr.isatty()))
    for target, settled, place in zip(bar, recipes, places, strict=True):
        bar.set_postfix_str(f"{(target.run or target.path).name} {target.at}")
        if splits is None or settled.data != data:  # runs of one study share their images
            data, splits = settled.data, open_splits(settled)
        results.append(_measure_one(target, settled, splits, how, place, out))
    return results


def table(models: Sequence[MeasuredModel]) -> str:
    """Return aligned text: a line a measure and a column a model, or the other way if that is narrower."""
    names = list(dict.fromkeys(name for model in models for name in model.measures))
    header = ["", *(f"{(m.run or m.target).name} {m.at}" for m in models)]
    rows = [[name, *(_cell(m.measures.get(name)) for m in models)] for name in names]
    if len(models) > len(names):
        (header, *rows) = map(list, zip(header, *rows, strict=True))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (header, *rows)
    )


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "–"
    return f"{found['value']:.4g}" if found["stderr"] is None else with_error(found["value"], found["stderr"])


def _targets(path: Path, at: str | None) -> list[Target]:
    """Return what ``path`` and ``at`` mean, one target an epoch."""
    if at != "all":
        return [find_target(path, at)]
    epochs = kept_epochs(path)
    if not epochs:
        raise ValueError(
            f"--at: got all with {path}, which kept no epoch; expected a run with checkpoint.keep_every."
        )
    return [find_target(path, str(epoch)) for epoch in epochs]


def _measure_one(
    target: Target, recipe: Recipe, splits: Splits, how: How, device: str, out: str | Path | None
) -> MeasuredModel:
    """Take the measures that are not there yet, saving after each."""
    model = load_model(target, recipe, splits)
    threat, attack = attack_of(recipe, how.clean, how.norm, how.eps, how.num_steps)
    header: dict[str, Any] = {
        "at": target.at,
        "epoch": target.epoch,
        "split": how.split,
        "seed": how.seed,
        "num_examples": how.num_examples,
        "data": recipe.data.model_dump(mode="json", exclude={"crop_padding", "flip", "num_workers"}),
        "threat": None if threat is None else str(threat),
        "attack": attack,
        "weights": digest(part for item in model.state_dict().items() for part in item),
    }
    folder = (
        Path(out) / (target.run or target.path).resolve().name
        if out
        else (target.run or target.path.parent) / "measures"
    )
    path = folder / f"{_file_name(target, how, threat)}.json"
    header = json.loads(json.dumps(header))
    document: dict[str, Any] = {"target": str(target.path), **header, "measures": {}}
    if (before := _document(path)) and {key: before.get(key) for key in header} != header:
        # Other weights or data: that file stays.
        path = path.with_name(f"{path.stem}-{digest([header])[:8]}.json")
        before = _document(path)
    document |= before
    taken: dict[str, Any] = document["measures"]
    given = {n: dict(how.settings.get(n, {})) for n in how.names}
    if GAP in given:
        given[GAP] = {"num_examples": how.gap_examples}
    missing = [n for n in how.names if n not in taken or taken[n].get("given") != given[n]]
    if missing:
        model = model.to(device)
        with reused_attacks(model):
            for name in missing:
                taken[name] = {
                    **_take(name, model, recipe, splits, threat, attack, how).as_dict(),
                    "given": given[name],
                }
                _write(path, document)
    measures = {name: taken[name] for name in how.names}
    return MeasuredModel(target.path, target.run, target.at, target.epoch, measures, path)


def _document(path: Path) -> dict[str, Any]:
    """Return what a file of measures holds; nothing where there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _take(
    name: str,
    model: Classifier,
    recipe: Recipe,
    splits: Splits,
    threat: ThreatModel | None,
    attack: Mapping[str, Any],
    how: How,
) -> Measurement:
    """Take one measure."""
    if name == GAP:
        train, test = (
            _batches(splits, split, how.gap_examples, how.seed, model) for split in ("train", "test")
        )
        return robust_gap(model, train, test, threat, **attack, seed=how.seed)
    initial = None
    if name in NEED_INITIAL:
        with kept_random_state(torch.device("cpu")):
            initial = initial_model(recipe, splits).state_dict()
    data = _batches(splits, how.split, how.num_examples, how.seed, model)
    steps = {"num_steps": attack.get("num_steps"), "step_size": attack.get("step_size")}
    shape = tuple(data[0][0].shape[1:])
    shared = Shared(num_examples=how.num_examples, **steps, seed=how.seed, initial=initial, image_shape=shape)
    given = dict(how.settings.get(name, {}))
    if how.num_steps is not None and name in OWN_PROTOCOL:
        given = {"num_steps": how.num_steps} | given
    return measure(name, model, data, threat, shared, given)


def _batches(
    splits: Splits, split: str, num: int, seed: int, model: nn.Module
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the first images of a split, shuffled by the seed alone, on the model's device."""
    images = images_of(splits, split)
    device = next(model.parameters()).device
    batches, left = [], num
    order = seed_from(seed, "measure")
    for x, y, _ in images.batches(
        min(BATCH, len(images)), shuffle=isinstance(images, ImageSet), seed=order, device=device
    ):
        batches.append((x[:left], y[:left]))
        left -= len(x)
        if left <= 0:
            break
    return batches


def _file_name(target: Target, how: How, threat: ThreatModel | None) -> str:
    """Return a name that says what differs from the default."""
    changed = any(value is not None for value in (how.norm, how.eps, how.num_steps))
    parts = [
        f"measures-{target.at}-{how.split}",
        *(["clean"] if threat is None else []),
        *([f"{threat}".replace("/", "_").replace(" ", "-")] if changed and threat else []),
        *([f"PGD-{how.num_steps}"] if how.num_steps is not None else []),
        *([f"n{how.num_examples}"] if how.num_examples != How.num_examples else []),
        *([f"s{how.seed}"] if how.seed else []),
    ]
    return re.sub(r"[^\w.+-]", "_", "-".join(parts))


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON so that a crash leaves the former file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
    os.replace(partial, path)


def settings_by_measure(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return settings such as ``"average_flatness.xi=0.25"`` by measure and name; values are YAML.

    Raises:
        ValueError: A text that is no ``measure.setting=value``.
    """
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        name, dot, key = place.partition(".")
        if not (equals and dot and key):
            raise ValueError(
                f"--set: got {text!r}; expected measure.setting=value, such as average_flatness.xi=0.25."
            )
        settings.setdefault(name, {})[key] = read_yaml(value)
    return settings
