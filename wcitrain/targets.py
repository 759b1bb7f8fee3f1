"""What ``measure``, ``evaluate`` and ``landscape`` are pointed at: a run, an export, a file or a recipe.

Data, model and threat come from a recipe: the run's own, or one that is given.
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor

from wcitrain.attacks import ThreatModel
from wcitrain.build import initial_model, step_size
from wcitrain.checkpoint import load_checkpoint
from wcitrain.data import Splits
from wcitrain.models import Classifier, create_model, load_exported
from wcitrain.preserve import kept_random_state
from wcitrain.recipe import Recipe, load_recipe

FILES = (".pt", ".pth", ".safetensors")
RECIPES = (".yaml", ".yml")
KINDS = (
    "a run folder (recipe.yaml), a checkpoint of one (RUN/checkpoints/last), an exported model folder "
    f"(metadata.json), a file of weights ({', '.join(FILES)}) or a recipe ({', '.join(RECIPES)}) whose model "
    "is pretrained"
)


class Target(NamedTuple):
    """What is measured: kind ``"run"``, ``"export"``, ``"file"`` or ``"recipe"``, path, run folder and epoch.

    ``at`` is ``"last"``, ``"best"``, or the name of the export or file.
    """

    kind: str
    path: Path
    run: Path | None
    at: str

    @property
    def epoch(self) -> int | None:
        """The epoch of the weights, where the export says it."""
        if self.exported is None:
            return None
        written = json.loads((self.exported / "metadata.json").read_text("utf-8")).get("epoch")
        return None if written is None else int(written)

    @property
    def exported(self) -> Path | None:
        """The export that the model is loaded from, if it is: it says what the model is."""
        folder = self.path / "model" / self.at if self.kind == "run" else self.path
        return folder if self.kind in ("run", "export") and (folder / "metadata.json").is_file() else None


def find_target(path: Path, at: str | None) -> Target:
    """Return what ``path`` is; ``at`` is ``"last"``, ``"best"`` or the number of a kept epoch."""
    if path.is_dir() and (path / "recipe.yaml").is_file():
        if at in (None, "last", "best"):
            return Target("run", path, path, at or "last")
        kept = path / "model" / f"epoch-{at}"
        if not (kept / "metadata.json").is_file():
            there = ", ".join(map(str, kept_epochs(path))) or "none: set checkpoint.keep_every in its recipe"
            raise ValueError(
                f"--at: got {at!r}; expected last, best, or an epoch that {path} kept ({there})."
            )
        return Target("export", kept, path, kept.name)
    run = path.parent.parent
    if path.is_dir() and (path / "metadata.json").is_file():
        above = path.resolve().parent.parent
        found = Target(
            "export", path, above if (above / "recipe.yaml").is_file() else None, path.resolve().name
        )
    elif (
        path in (run / "checkpoints" / "last", run / "checkpoints" / "best")
        and (run / "recipe.yaml").is_file()
    ):
        found = Target("run", run, run, path.name)
    elif path.is_file() and path.suffix in (*FILES, *RECIPES):
        found = Target("recipe" if path.suffix in RECIPES else "file", path, None, path.stem)
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
        raise ValueError(
            f"--at: got {at!r} with {path}, one epoch already; expected a run folder. Leave it out."
        )
    return found


def kept_epochs(run: Path) -> list[int]:
    """Return the epochs whose weights a run kept (``checkpoint.keep_every``), in order."""
    folders = (run / "model").glob("epoch-*/metadata.json")
    return sorted(int(file.parent.name.removeprefix("epoch-")) for file in folders)


def recipe_of(
    target: Target, recipe: str | Path | Sequence[str | Path] | None, settings: Sequence[str]
) -> Recipe:
    """Return the recipe that was given, or the one of the run that the target belongs to.

    Raises:
        ValueError: No recipe, two of them, one without weights, or settings that an export would overrule.
    """
    changed = [text for text in settings if text.partition("=")[0].strip().partition(".")[0] == "model"]
    if target.exported and changed:
        raise ValueError(
            f"--recipe: got {', '.join(changed)} with the export {target.exported}, which says what its "
            "model is; expected settings of other sections. Leave them out."
        )
    if target.kind == "recipe":
        if recipe is not None:
            raise ValueError(
                f"--recipe: got {recipe} with the recipe {target.path}; expected one of them. Leave it out."
            )
        settled = load_recipe(target.path, settings)
        if not (settled.model.pretrained or settled.model.checkpoint_path):
            raise ValueError(
                f"{target.path}: got a recipe whose model is untrained; expected model.pretrained or "
                "model.checkpoint_path. Set one of them, or give the run it trained."
            )
        return settled
    if recipe is None and target.run is None:
        needs = "data" if target.kind == "export" else "data and model"
        raise ValueError(
            f"{target.path}: got no recipe; expected one that says its {needs}. Give --recipe RECIPE."
        )
    return load_recipe(recipe or cast(Path, target.run) / "recipe.yaml", settings)


def load_model(target: Target, recipe: Recipe, splits: Splits) -> Classifier:
    """Return the model with its weights, in eval mode, on the CPU."""
    if target.exported:
        return _checked(load_exported(target.exported), splits, target.path)
    if target.kind == "recipe":
        return _pretrained(recipe, splits, target.path)
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
        rotation_head=recipe.objective.needs_rotation_head,
        **settings["kwargs"],
    )
    load_weights(model, weights, str(source))
    return model.eval()


def _checked(model: Classifier, splits: Splits, path: Path) -> Classifier:
    """Refuse an export that is for other images or classes."""
    own = (model.mean.numel(), cast(int, model.backbone.num_classes))
    if own != (splits.in_chans, splits.num_classes):
        raise ValueError(
            f"{path}: got a model for {own[0]} channels and {own[1]} classes, and data of {splits.in_chans} "
            f"and {splits.num_classes}; expected the same. Give the recipe it was trained by."
        )
    return model


def _pretrained(recipe: Recipe, splits: Splits, path: Path) -> Classifier:
    """Return the model as the recipe builds it; refuse a pretrained one whose head would be random."""
    with kept_random_state(torch.device("cpu")):
        model = initial_model(recipe, splits)
    classes = (getattr(model.backbone, "pretrained_cfg", None) or {}).get("num_classes", splits.num_classes)
    if recipe.model.checkpoint_path is None and classes != splits.num_classes:
        raise ValueError(
            f"{path}: got weights pretrained for {classes} classes, and data of {splits.num_classes}; "
            "expected the same: the head would be random. Choose other weights or data."
        )
    return model.eval()


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a file: bare, or under ``model`` or ``state_dict``, without ``module.``.

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
            f"{path}: got a file that torch cannot read as weights alone ({str(error).splitlines()[0]}); "
            "expected a state dict. Save one with torch.save(model.state_dict(), path)."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        got = (
            f"keys {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise ValueError(
            f"{path}: got {got}; expected a state dict, bare or under 'model' or 'state_dict'. Save "
            "model.state_dict()."
        )
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_weights(model: Classifier, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights of the classifier or its backbone, and refuse any that do not fit, normalisation too."""
    whole = any(name.startswith("backbone.") for name in weights)
    module = model if whole else model.backbone
    expected = module.state_dict()
    given = (
        {name: value for name, value in weights.items() if name not in ("mean", "std")}
        if whole
        else dict(weights)
    )
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
            f"{source}: got weights that do not fit the recipe's model: {found}; expected all of them to. "
            "Correct the recipe's model section (name, stem, kwargs) or its data (number of classes)."
        )
    for name in ("mean", "std") if whole else ():
        own = cast(Tensor, getattr(model, name)).flatten()
        other = weights.get(name, own).flatten().to(own)
        if len(other) not in (1, len(own)) or not torch.allclose(other, own, rtol=1e-4, atol=0):
            raise ValueError(
                f"{source}: got weights for images normalised with {name} {other.tolist()}, and the recipe's "
                f"model has {own.tolist()}; expected the same. Set model.{name} in the recipe."
            )
    module.load_state_dict(given)


def device_of(device: str, recipe: Recipe) -> str:
    """Return the device; ``"auto"``: cuda where there is one and the recipe does not ask for the CPU.

    Raises:
        ValueError: A device that torch does not know, or that is not there.
    """
    if device != "auto":
        try:
            torch.zeros(1, device=device).cpu()  # fails on "meta", too
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
            there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            there += ["mps"] * torch.backends.mps.is_available()
            raise ValueError(
                f"--device: got {device!r}; expected auto, {', '.join(there)}. Choose one of them."
            ) from error
        return device
    return "cuda" if recipe.train.device == "auto" and torch.cuda.is_available() else "cpu"


def attack_of(
    recipe: Recipe, clean: bool, norm: str | None, eps: str | float | None, num_steps: int | None
) -> tuple[ThreatModel | None, dict[str, Any]]:
    """Return the threat model, None for the clean loss, and the arguments of its attack."""
    given = [
        name
        for name, value in (("--norm", norm), ("--eps", eps), ("--steps", num_steps))
        if value is not None
    ]
    if clean:
        if given:
            raise ValueError(
                f"--clean: got {', '.join(given)} as well; expected no attack. Leave out one or the other."
            )
        return None, {}
    try:
        radius = recipe.threat.eps if eps is None else float(Fraction(eps))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"--eps: got {eps!r}; expected a radius such as 8/255 or 0.03. Give it in pixel units."
        ) from None
    threat = ThreatModel(cast(Any, norm or recipe.threat.norm), radius)
    steps = recipe.evaluation.num_steps if num_steps is None else num_steps
    length = threat.step_for(steps) if given else step_size(recipe, recipe.evaluation)
    return threat, {"num_steps": steps, "step_size": length}
