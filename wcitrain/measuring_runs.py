"""``wcitrain measure``: the WCI of a run, an export or a checkpoint file, as a table, JSON and a figure.

Data, model and threat come from a recipe: the run's own, or one that is given. One process only.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wcitrain.data import ImageSet
from wcitrain.images import images_of, open_splits
from wcitrain.measures import PACBayesBound, WCIMeasurement, measure_wci, pac_bayes_bound
from wcitrain.seeding import seed_from
from wcitrain.targets import attack_of, device_of, find_target, load_model, recipe_of


@dataclass(frozen=True)
class Measured:
    """The result of the command: the measurement, the surrogate where it applies, and what was written."""

    wci: WCIMeasurement
    bound: PACBayesBound | None
    split: str
    written: tuple[Path, ...]

    def text(self) -> str:
        """Return the table, the total and, labelled as a surrogate, the PAC-Bayes value."""
        beta = self.bound.beta if self.bound else 1.0
        lines = [self.wci.table(beta), "", self.wci.headline(self.split)]
        lines += [str(self.bound)] if self.bound else []
        return "\n".join([*lines, f"Written: {', '.join(map(str, self.written))}"])


def measure_run(
    target: str | Path,
    *,
    at: str | None = None,
    split: str = "train",
    recipe: str | Path | Sequence[str | Path] | None = None,
    settings: Sequence[str] = (),
    estimator: str = "auto",
    layers: str = "weights",
    split_qkv: bool = False,
    num_examples: int | None = None,
    target_relative_error: float | None = None,
    clean: bool = False,
    norm: str | None = None,
    eps: str | float | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
) -> Measured:
    """Measure one model on images of its recipe's data, shuffled and not augmented, and write the result.

    Args:
        target: ``targets.KINDS``.
        at: ``"last"`` (default), ``"best"`` or the number of an epoch that was kept, for a run.
        split: ``"train"`` (what the index is defined on), ``"val"`` or ``"test"``.
        recipe: YAML that says data, model and threat; by default the run's own.
        settings: Settings such as ``"data.root=/data"`` that override the recipe's.
        estimator, layers, split_qkv, num_examples, target_relative_error, seed: See ``measure_wci``.
        clean: Measure the clean loss instead of the robust one.
        norm, eps, num_steps: Of the attack; by default the recipe's evaluation attack. With any of them the
            step is 2.5 eps / num_steps.
        out: Folder of the two files; by default ``measures/`` of the run, or beside the file or export.
        device: ``"auto"``, or a device of torch.

    Returns:
        The measurement. For the training split of a loss >= 0 also the PAC-Bayes surrogate with the mean loss
        over the measured examples as its risk and the size of the training set as N.

    Raises:
        ValueError: The target is none of ``targets.KINDS``, weights do not fit, or an argument is wrong.
        CheckpointError: The run's checkpoint is missing or damaged.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"got {os.environ['WORLD_SIZE']} processes; expected one. Start it without a launcher."
        )
    found = find_target(Path(target), at)
    settled = recipe_of(found, recipe, settings)
    threat, attack = attack_of(settled, clean, norm, eps, num_steps)
    place = torch.device(device_of(device, settled))
    splits = open_splits(settled)
    model = load_model(found, settled, splits)
    images = images_of(splits, split)
    measurement = measure_wci(
        model.to(place),
        images.batches(
            min(100, len(images)),
            shuffle=isinstance(images, ImageSet),
            seed=seed_from(seed, "measure"),
            device=place,
        ),
        threat,
        estimator=estimator,
        layers=layers,
        split_qkv=split_qkv,
        num_examples=num_examples,
        target_relative_error=target_relative_error,
        seed=seed,
        **attack,
    )
    changed = any(value is not None for value in (norm, eps, num_steps))
    bound = None
    if split == "train" and measurement.total >= 0:
        bound = pac_bayes_bound(
            measurement.mean_loss,
            measurement.total,
            len(splits.train),
            wci_stderr=measurement.total_stderr if math.isfinite(measurement.total_stderr) else None,
        )
    name = "-".join(
        [
            f"wci-{found.at}-{split}",
            *(["clean"] if threat is None else []),
            *(
                [f"{threat}-PGD-{attack['num_steps']}".replace("/", "_").replace(" ", "-")]
                if changed and threat
                else []
            ),
            *([measurement.estimator] if measurement.estimator != "gauss_newton" else []),
            *([re.sub(r"[^\w+.]+", "_", layers).strip("_")] if layers != "weights" else []),
            *(["qkv"] if split_qkv else []),
            *([f"s{seed}"] if seed else []),
        ]
    )
    folder = Path(out) if out else (found.run or found.path.parent) / "measures"
    document = {
        "target": str(found.path),
        "at": found.at,
        "split": split,
        "seed": seed,
        "layers_counted": layers,
        "split_qkv": split_qkv,
        "threat": asdict(threat) if threat else None,
        "attack": attack,
        **measurement.as_dict(),
        "pac_bayes_surrogate": asdict(bound) if bound else None,
    }
    title = f"{found.path.name}: {measurement.headline(split)}"
    return Measured(measurement, bound, split, _write(folder, name, document, measurement, title))


def _write(
    folder: Path, name: str, document: Mapping[str, Any], measurement: WCIMeasurement, title: str
) -> tuple[Path, ...]:
    """Write JSON and figure; files of the same name are replaced: they can be measured again."""
    from wcitrain.measures.drawing import DPI, layer_bars  # matplotlib takes a second to import

    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"{name}.json", folder / f"{name}.png")
    paths[0].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
    layer_bars(measurement, title).savefig(paths[1], dpi=DPI)
    return paths
