"""``wcitrain measure``: the WCI of a run, of an exported model or of a checkpoint file, as a table, JSON and a figure.

Data, model and threat come from a recipe: the run's own, or one that is given. One process only.
"""

import json
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor

from wcitrain.attacks import ThreatModel
from wcitrain.build import step_size
from wcitrain.checkpoint import load_checkpoint
from wcitrain.data import ImageSet, Splits, load_splits
from wcitrain.measures import PACBayesBound, WCIMeasurement, measure_wci, pac_bayes_bound
from wcitrain.models import Classifier, create_model, load_exported
from wcitrain.recipe import Recipe, load_recipe
from wcitrain.seeding import seed_from

FILES = (".pt", ".pth", ".safetensors")
KINDS = f"a run folder (recipe.yaml), an exported model folder (metadata.json) or a file ({', '.join(FILES)})"


class Target(NamedTuple):
    """What is measured: kind ``"run"``, ``"export"`` or ``"file"``, its path, its run's folder if it has one, its epoch."""

    kind: str
    path: Path
    run: Path | None
    at: str


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
    recipe: str | Path | None = None,
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
    """Measure one model on images of its recipe's data, in random order and without augmentation, and write the result.

    Args:
        target: ``KINDS``.
        at: ``"last"`` (default) or ``"best"``, for a run.
        split: ``"train"`` (what the index is defined on), ``"val"`` or ``"test"``.
        recipe: YAML that says data, model and threat; by default the run's own.
        settings: Settings such as ``"data.root=/data"`` that override the recipe's.
        estimator, layers, split_qkv, num_examples, target_relative_error, seed: See ``measure_wci``.
        clean: Measure the clean loss instead of the robust one.
        norm, eps, num_steps: Of the attack; by default the recipe's evaluation attack. With any of them the step is
            2.5 eps / num_steps.
        out: Folder of the two files; by default ``measures/`` of the run, or beside the file or export.
        device: ``"auto"``, or a device of torch.

    Returns:
        The measurement. For the training split of a loss >= 0 also the PAC-Bayes surrogate with the mean loss over the measured
        examples as its risk and the size of the training set as N.

    Raises:
        ValueError: The target is none of ``KINDS``, weights and model differ, or an argument is wrong.
        CheckpointError: The run's checkpoint is missing or damaged.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"got {os.environ['WORLD_SIZE']} processes; expected one. Start it without a launcher.")
    found = find_target(Path(target), at)
    settled = _recipe_of(found, recipe, settings)
    splits = load_splits(**settled.data.model_dump(exclude={"crop_padding", "flip"}))
    model = _load_model(found, settled, splits)
    place = torch.device(_device(device, settled))
    images = {"train": lambda: splits.train, "val": lambda: splits.val, "test": lambda: splits.test}[split]()
    threat, attack = _attack(settled, clean, norm, eps, num_steps)
    measurement = measure_wci(
        model.to(place),
        images.batches(
            min(100, len(images)), shuffle=isinstance(images, ImageSet), seed=seed_from(seed, "measure"), device=place
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
            *([measurement.estimator] if estimator not in ("auto", "gauss_newton") else []),
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


def find_target(path: Path, at: str | None) -> Target:
    """Return what ``path`` is."""
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return Target("run", path, path, at or "last")
    if path.is_dir() and (path / "metadata.json").is_file():
        above = path.resolve().parent.parent
        found = Target("export", path, above if (above / "recipe.yaml").is_file() else None, path.resolve().name)
    elif path.is_file() and path.suffix in FILES:
        found = Target("file", path, None, path.stem)
    else:
        got = (
            "nothing"
            if not path.exists()
            else "another folder"
            if path.is_dir()
            else f"a {path.suffix or 'plain'} file"
        )
        raise ValueError(f"{path}: got {got}; expected {KINDS}. Check the path.")
    if at is not None:
        raise ValueError(f"--at: got {at!r} with {path}, one epoch already; expected a run folder. Leave it out.")
    return found


def _recipe_of(target: Target, recipe: str | Path | None, settings: Sequence[str]) -> Recipe:
    """Return the recipe that was given, or the one of the run that the target belongs to."""
    if recipe is None and target.run is None:
        needs = "data" if target.kind == "export" else "data and model"
        raise ValueError(f"{target.path}: got no recipe; expected one that says its {needs}. Give --recipe RECIPE.")
    return load_recipe(recipe or cast(Path, target.run) / "recipe.yaml", settings)


def _load_model(target: Target, recipe: Recipe, splits: Splits) -> Classifier:
    """Return the model with its weights, in eval mode, on the CPU."""
    if target.kind == "run" and (target.path / "model" / target.at / "metadata.json").is_file():
        return _checked(load_exported(target.path / "model" / target.at), splits, target.path)
    if target.kind == "export":
        return _checked(load_exported(target.path), splits, target.path)
    if target.kind == "run":
        state, source = load_checkpoint(target.path / "checkpoints", target.at)
        weights = (state.get("average") or {}).get("module") or state["model"]
    else:
        weights, source = read_weights(target.path), target.path
    settings = recipe.model.model_dump()
    model = create_model(
        **{k: v for k, v in settings.items() if k not in ("kwargs", "pretrained", "checkpoint_path")},
        num_classes=splits.num_classes,
        in_chans=splits.in_chans,
        rotation_head=recipe.objective.name == "rotation",
        **settings["kwargs"],
    )
    load_weights(model, weights, str(source))
    return model.eval()


def _checked(model: Classifier, splits: Splits, path: Path) -> Classifier:
    """Refuse an export that is for other images."""
    channels = model.mean.numel()
    if channels != splits.in_chans:
        raise ValueError(
            f"{path}: got a model for {channels} channels, and images of {splits.in_chans}; expected the same. "
            "Give the recipe it was trained by."
        )
    return model


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a file: bare, or under ``"model"`` or ``"state_dict"``; a prefix ``module.`` is dropped.

    Nothing in the file is executed (``weights_only=True``).
    """
    try:
        content: Any = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path}: got a file that torch cannot read as weights alone ({str(error).splitlines()[0]}); expected a state dict. "
            "Save one with torch.save(model.state_dict(), path)."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        got = (
            f"keys {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise ValueError(
            f"{path}: got {got}; expected a state dict, bare or under 'model' or 'state_dict'. Save model.state_dict()."
        )
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_weights(model: Classifier, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights of the classifier, or of its backbone alone, and refuse any that do not fit."""
    whole = any(name.startswith("backbone.") for name in weights)
    module = model if whole else model.backbone
    expected = module.state_dict()
    given = {name: value for name, value in weights.items() if name not in ("mean", "std")} if whole else dict(weights)
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in given and given[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in problems.items()
            if names
        )
        raise ValueError(
            f"{source}: got weights that do not fit the recipe's model: {found}; expected all of them to. Correct the recipe's "
            "model section (name, stem, kwargs) or its data (number of classes)."
        )
    module.load_state_dict(given)


def _attack(
    recipe: Recipe, clean: bool, norm: str | None, eps: str | float | None, num_steps: int | None
) -> tuple[ThreatModel | None, dict[str, Any]]:
    """Return the threat model, None for the clean loss, and the arguments of its attack."""
    given = [name for name, value in (("--norm", norm), ("--eps", eps), ("--steps", num_steps)) if value is not None]
    if clean:
        if given:
            raise ValueError(
                f"--clean: got {', '.join(given)} as well; expected no attack. Leave out one or the other."
            )
        return None, {}
    try:
        radius = recipe.threat.eps if eps is None else float(Fraction(eps))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--eps: got {eps!r}; expected a radius such as 8/255 or 0.03. Give it in pixel units."
        ) from None
    threat = ThreatModel(cast(Any, norm or recipe.threat.norm), radius)
    steps = recipe.evaluation.num_steps if num_steps is None else num_steps
    length = 2.5 * radius / max(1, steps) if given else step_size(recipe, recipe.evaluation)
    return threat, {"num_steps": steps, "step_size": length}


def _device(device: str, recipe: Recipe) -> str:
    if device != "auto":
        return device
    return "cuda" if recipe.train.device == "auto" and torch.cuda.is_available() else "cpu"


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
