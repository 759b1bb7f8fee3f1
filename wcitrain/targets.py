"""``open_run``: a trained model, however it is kept, with the recipe that says its data and threat.

target = open_run("runs/wci-s0")
model, images = target.load_model(), target.images("test")
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.build import initial_model, step_size
from wcitrain.checkpoint import load_checkpoint
from wcitrain.data import Images, Splits, load_splits
from wcitrain.models import Classifier, load_exported
from wcitrain.preserve import kept_random_state
from wcitrain.recipe import Recipe, load_recipe
from wcitrain.seeding import seed_from
from wcitrain.weights import load_weights, read_weights

FILES = (".pt", ".pth", ".safetensors")
RECIPES = (".yaml", ".yml")
KINDS = (
    "a run folder (recipe.yaml), a checkpoint of one (RUN/checkpoints/last), an exported model folder "
    f"(metadata.json), a file of weights ({', '.join(FILES)}) or a recipe ({', '.join(RECIPES)}) whose model "
    "is pretrained"
)
BATCH_SIZE = 100  # of ``Batches``
Recipes = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Place:
    """Where weights lie: kind ``"run"``, ``"export"``, ``"file"`` or ``"recipe"``, path, run folder, epoch.

    ``at`` is ``"last"``, ``"best"``, or the name of the export or file.
    """

    kind: str
    path: Path
    run: Path | None
    at: str

    @property
    def exported(self) -> Path | None:
        """The export that the model is loaded from, if it is: it says what the model is."""
        folder = self.path / "model" / self.at if self.kind == "run" else self.path
        return folder if self.kind in ("run", "export") and (folder / "metadata.json").is_file() else None

    @property
    def epoch(self) -> int | None:
        """The epoch of the weights, where the export says it."""
        if self.exported is None:
            return None
        written = json.loads((self.exported / "metadata.json").read_text("utf-8")).get("epoch")
        return None if written is None else int(written)

    @property
    def short_name(self) -> str:
        """The name of the run folder, or of the file or export."""
        return (self.run or self.path).resolve().name

    @property
    def name(self) -> str:
        """The name with the epoch as far as it is known: "wci-s0 (last, epoch 30)"."""
        epoch = "" if self.epoch is None or self.at == f"epoch-{self.epoch}" else f", epoch {self.epoch}"
        return f"{self.short_name} ({self.at}{epoch})"


@dataclass(frozen=True)
class Batches:
    """Batches (x, y) of images, shuffled by the seed alone, read anew whenever they are iterated over."""

    images: Images
    seed: int
    device: str

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, is_shuffled = min(BATCH_SIZE, len(self.images)), self.images.can_shuffle
        seed = seed_from(self.seed, "measure")
        batches = self.images.batches(size, shuffle=is_shuffled, seed=seed, device=self.device)
        return ((x, y) for x, y, _ in batches)


@dataclass(frozen=True)
class Target(Place):
    """A trained model: where it lies, its recipe, and the device to compute on."""

    recipe: Recipe
    device: str

    @cached_property
    def splits(self) -> Splits:
        """Training, validation and test images."""
        return load_splits(self.recipe.data)

    def share_images(self, other: "Target") -> None:
        """Take the images of another target, where they are the same: they are then read once."""
        if self.recipe.data == other.recipe.data:
            vars(self)["splits"] = other.splits

    def images(self, split: str) -> Images:
        """Return the images of ``"train"``, ``"val"`` or ``"test"``, without augmentation."""
        images: Images = getattr(self.splits, split)
        return images

    def batches(self, split: str, seed: int) -> Batches:
        """Return them as batches on the device, in an order that the seed alone decides."""
        return Batches(self.images(split), seed, self.device)

    def folder(self, kind: str, out: str | Path | None = None) -> Path:
        """Return ``out``, or the folder ``kind`` of the run, or of that name beside the file or export."""
        return Path(out) if out else (self.run or self.path.parent) / kind

    def load_model(self) -> Classifier:
        """Return the model with its weights, in eval mode, on the device.

        Raises:
            ValueError: Weights that do not fit the recipe's model or data.
            CheckpointError: The run's checkpoint is missing or damaged.
        """
        if self.exported:
            model = load_exported(self.exported)
            own = (model.mean.numel(), cast(int, model.backbone.num_classes))
            if own != (self.splits.in_chans, self.splits.num_classes):
                data = f"{self.splits.in_chans} and {self.splits.num_classes}"
                text = f"got a model for {own[0]} channels and {own[1]} classes, and data of {data}; expected"
                raise ValueError(f"{self.path}: {text} the same. Give the recipe it was trained by.")
        elif self.kind == "recipe":
            model = self._built(self.recipe)
            num, pretrained = self.splits.num_classes, getattr(model.backbone, "pretrained_cfg", None) or {}
            classes = pretrained.get("num_classes", num)  # for others timm replaces the head without a word
            if self.recipe.model.checkpoint_path is None and classes != num:
                text = f"got weights pretrained for {classes} classes, and data of {num}; expected the same"
                raise ValueError(f"{self.path}: {text}: the head would be random. Choose other weights.")
        else:
            own_weights = {"pretrained": False, "checkpoint_path": None}
            bare = self.recipe.model.model_copy(update=own_weights)
            model = self._built(self.recipe.model_copy(update={"model": bare}))
            if self.kind == "run":
                state, source = load_checkpoint(self.path / "checkpoints", self.at)
                weights = (state.get("average") or {}).get("module") or state["model"]
            else:
                weights, source = read_weights(self.path), self.path
            load_weights(model, weights, str(source))
        return model.eval().to(self.device)

    def initial_weights(self) -> dict[str, Tensor]:
        """Return the state dict before the first step."""
        return self._built(self.recipe).state_dict()

    def _built(self, recipe: Recipe) -> Classifier:
        with kept_random_state(torch.device("cpu")):
            return initial_model(recipe, self.splits)


def open_run(
    target: str | Path,
    at: str | None = None,
    recipe: Recipes | None = None,
    settings: Sequence[str] = (),
    device: str = "auto",
) -> Target:
    """Find a trained model and check what is asked of it; images and weights are read when they are used.

    Args:
        target: ``KINDS``.
        at: ``"last"`` (default), ``"best"`` or the number of an epoch that was kept, for a run.
        recipe: YAML that says data, model and threat; by default the run's own.
        settings: Settings such as ``"data.root=/data"`` that override the recipe's.
        device: ``"auto"``, or a device of torch.

    Raises:
        ValueError: The target is none of ``KINDS``, its recipe is missing or contradicts it, or the device is
            not there.
    """
    place = _find(Path(target), at)
    settled = _recipe_of(place, recipe, settings)
    return Target(**vars(place), recipe=settled, device=device_of(device, settled))


def kept_epochs(run: Path) -> list[int]:
    """Return the epochs whose weights a run kept (``checkpoint.keep_every``), in order."""
    folders = (run / "model").glob("epoch-*/metadata.json")
    return sorted(int(file.parent.name.removeprefix("epoch-")) for file in folders)


def _find(path: Path, at: str | None) -> Place:
    """Return what ``path`` is; ``at`` is ``"last"``, ``"best"`` or the number of a kept epoch."""
    if path.is_dir() and (path / "recipe.yaml").is_file():
        if at in (None, "last", "best"):
            return Place("run", path, path, at or "last")
        kept = path / "model" / f"epoch-{at}"
        if not (kept / "metadata.json").is_file():
            there = ", ".join(map(str, kept_epochs(path))) or "none: set checkpoint.keep_every in its recipe"
            rule = f"last, best, or an epoch that {path} kept ({there})."
            raise ValueError(f"--at: got {at!r}; expected {rule}")
        return Place("export", kept, path, kept.name)
    run = path.parent.parent
    is_checkpoint = path in (run / "checkpoints" / "last", run / "checkpoints" / "best")
    if path.is_dir() and (path / "metadata.json").is_file():
        above = path.resolve().parent.parent
        owner = above if (above / "recipe.yaml").is_file() else None
        place = Place("export", path, owner, path.resolve().name)
    elif is_checkpoint and (run / "recipe.yaml").is_file():
        place = Place("run", run, run, path.name)
    elif path.is_file() and path.suffix in (*FILES, *RECIPES):
        place = Place("recipe" if path.suffix in RECIPES else "file", path, None, path.stem)
    else:
        got = "another folder" if path.is_dir() else f"a {path.suffix or 'plain'} file"
        got = got if path.exists() else "nothing"
        raise ValueError(f"{path}: got {got}; expected {KINDS}. Check the path.")
    if at is not None:
        text = f"got {at!r} with {path}, one epoch already; expected a run folder. Leave it out."
        raise ValueError(f"--at: {text}")
    return place


def _recipe_of(place: Place, recipe: Recipes | None, settings: Sequence[str]) -> Recipe:
    """Return the recipe that was given, or the one of the run that the weights belong to."""
    changed = [text for text in settings if text.partition("=")[0].strip().partition(".")[0] == "model"]
    if place.exported and changed:
        text = f"got {', '.join(changed)} with the export {place.exported}, which says what its model is"
        raise ValueError(f"--recipe: {text}; expected settings of other sections. Leave them out.")
    if place.kind == "recipe" and recipe:
        text = f"got {recipe} with the recipe {place.path}; expected one of them. Leave it out."
        raise ValueError(f"--recipe: {text}")
    if place.kind == "recipe":
        settled = load_recipe(place.path, settings)
        if not (settled.model.pretrained or settled.model.checkpoint_path):
            rule = "model.pretrained or model.checkpoint_path. Set one, or give the run it trained."
            raise ValueError(f"{place.path}: got a recipe whose model is untrained; expected {rule}")
        return settled
    if not recipe and place.run is None:
        needs = "data" if place.kind == "export" else "data and model"
        rule = f"one that says its {needs}. Give --recipe RECIPE."
        raise ValueError(f"{place.path}: got no recipe; expected {rule}")
    return load_recipe(recipe or cast(Path, place.run) / "recipe.yaml", settings)


def device_of(device: str, recipe: Recipe) -> str:
    """Return the device; ``"auto"``: cuda where there is one and the recipe does not ask for the CPU."""
    if device == "auto":
        return "cuda" if recipe.train.device == "auto" and torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()  # fails on "meta", too
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        rule = f"auto, {', '.join(there)}. Choose one of them."
        raise ValueError(f"--device: got {device!r}; expected {rule}") from error
    return device


# ---- the attack --------------------------------------------------------------------------------------------


def radius(text: str | float) -> float:
    """Return the radius that a text such as "8/255" or "0.03" stands for, in pixel units."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        rule = "a radius in pixel units such as 8/255 or 0.03, or with its norm l2:0.5 in `evaluate`."
        raise ValueError(f"--eps: got {text!r}; expected {rule}") from None


def attack_of(recipe: Recipe, options: Any) -> Attack | None:
    """Return the recipe's evaluation attack with the changes in ``options``; None is the clean loss.

    ``options`` has ``clean``, ``norm``, ``eps`` and ``steps``; the last three make the step 2.5 eps / steps.
    """
    given = changes_of_attack(options)
    if options.clean:
        if given:
            rule = "no attack. Leave out one or the other."
            raise ValueError(f"--clean: got {', '.join(given)} as well; expected {rule}")
        return None
    eps = recipe.threat.eps if options.eps is None else radius(options.eps)
    threat = ThreatModel(options.norm or recipe.threat.norm, eps)
    steps = recipe.evaluation.num_steps if options.steps is None else options.steps
    length = threat.step_for(steps) if given else step_size(recipe, recipe.evaluation)
    return Attack(threat, steps, length)


def changes_of_attack(options: Any) -> list[str]:
    """Return the options that ask for another attack than the recipe's."""
    return [f"--{name}" for name in ("norm", "eps", "steps") if getattr(options, name) is not None]
