"""``open_run``: a trained model, however it is kept, with the recipe that says its data and threat.

target = open_run("runs/wci-s0")
model, images = target.load_model(), target.images("test")
"""

import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wcitrain import files
from wcitrain.build import initial_model, untrained
from wcitrain.checkpoint import CheckpointError, class_names_in, load_checkpoint
from wcitrain.data import Images, Pairs, Splits, identity, load_splits, match_classes
from wcitrain.finding import RECIPES, find
from wcitrain.foreign import call_function, check_outputs, check_scale, load_program
from wcitrain.models import Classifier, by_channel, load_exported, load_weights
from wcitrain.preserve import kept_random_state
from wcitrain.recipe import Recipe, load_recipe
from wcitrain.seeding import seed_from
from wcitrain.weights import read_weights, split_part, weights_of

SCALE_BATCHES = 3  # of validation images, on which the normalisation of other people's models is measured
BATCH_SIZE = 100


@dataclass(frozen=True)
class Target:
    """A trained model: where it lies, its recipe, and the device to compute on."""

    path: Path  # a run folder, an export, or a file of weights or a recipe; for others what was typed
    run: Path | None  # the run folder that it belongs to
    at: str  # "last", "best", or the name of the export or file
    export: Path | None  # what the model is loaded from, if it was exported: it says what the model is
    recipe: Recipe
    device: str
    kind: str = ""  # "timm", "function", "TorchScript" or "torch.export", for what is none of ours
    checkpoint: str | None = None  # weights for the first two
    notes: list[str] = field(default_factory=list, compare=False)  # what readers of its numbers have to know

    @property
    def home(self) -> Path:
        """The run folder, or else the file or export."""
        return self.run or self.path

    @property
    def name(self) -> str:
        """The name of its home, or of the model."""
        if self.kind in ("timm", "function"):
            return re.sub(r"[^\w.+-]+", "-", self.at).strip("-")
        return self.home.resolve().name

    @property
    def epoch(self) -> int | None:
        """The epoch of the weights, where the export says it."""
        written = files.read_json(self.export / "metadata.json").get("epoch") if self.export else None
        return None if written is None else int(written)

    @property
    def title(self) -> str:
        """The name with the epoch as far as it is known: "wci-s0 (last, epoch 30)"."""
        if self.kind:
            return self.at
        is_known = self.epoch is not None and self.at != f"epoch-{self.epoch}"
        return f"{self.name} ({self.at}{f', epoch {self.epoch}' * is_known})"

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the run says of its images, empty where it says nothing: class names, and an identity each."""
        if self.run is not None and (path := self.run / "data.json").is_file():
            return files.read_json(path)
        return {}

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the model's classes in order, None where they are not known."""
        start = self.recipe.model.checkpoint_path if self.path.suffix in RECIPES else None
        place = weights_of(start)[0] if start else self.export or self.path
        names = class_names_in(place) or self.record.get("class_names")
        return None if names is None else tuple(names)

    @cached_property
    def loaded(self) -> Splits:
        """The recipe's images; may be set to those of a target with the same data."""
        return load_splits(self.recipe.data)

    @cached_property
    def splits(self) -> Splits:
        """Training, validation and test images, their classes numbered by name as the model's.

        ValueError for classes that the model does not have.
        """
        splits, own = self.loaded, self.class_names
        numbers, note = match_classes(own, splits.class_names, str(self.path))
        self.say(note)
        is_named = own is not None and set(splits.class_names) <= set(own)
        return splits.renumbered(numbers, own) if own and is_named and own != splits.class_names else splits

    def images(self, split: str) -> Images:
        """Return the images of ``"train"``, ``"val"`` or ``"test"``, without augmentation.

        ValueError where the run's own are no longer there: images that it trained on may be among them.
        """
        images, run = getattr(self.splits, split), self.run
        if run is not None:
            known, found = self.record.get("images", {}).get(split), identity(self.loaded.part(split))
            if known is None:
                self.say(f"the run has no record of its {split} images: these may be others")
            elif known != found:
                text = f"got {split} images, {found}, that are not the run's, {known}"
                if split != "test" and self.recipe.data == load_recipe(run / "recipe.yaml").data:
                    rule = "expected its own: it may have trained on some. Put them back as they were."
                    raise ValueError(f"{run}: {text}; {rule}")
                self.say(text if split == "test" else f"{text}: it may have trained on some")
        return cast(Images, images)

    def say(self, text: str | None) -> None:
        """Print what a reader of the numbers has to know, once, and keep it for the files."""
        if text and text not in self.notes:
            self.notes.append(text)
            print(f"note: {self.name}: {text}", file=sys.stderr, flush=True)

    def batches(self, split: str, seed: int, num: int | None = None) -> Iterable[tuple[Tensor, Tensor]]:
        """Return them, or ``num`` of them, as batches on the device; the seed decides order and choice.

        Every beginning of the order keeps the shares of the classes.
        """
        images = self.images(split)
        subset = images.subset(num or len(images), "measure", seed)
        return Pairs(subset, min(BATCH_SIZE, len(subset)), self.device)

    def folder(self, kind: str, out: str | Path | None = None) -> Path:
        """Return ``out``, or the folder ``kind`` of the run, or of that name beside the file or export."""
        beside = Path(self.checkpoint or "") if self.kind in ("timm", "function") else self.path
        return Path(out) if out else (self.run or beside.parent) / kind

    def load_model(self) -> Classifier:
        """Return the model with its weights, in eval mode, on the device.

        Raises:
            ValueError: Weights that are damaged, or do not fit the recipe's model or data.
            CheckpointError: The run's checkpoint is missing or damaged.
        """
        num_classes, in_chans = self.splits.num_classes, self.splits.in_chans
        if self.kind and self.kind != "timm":
            model = self._wrapped(in_chans)
        elif self.export:
            model = load_exported(self.export)
            own = (model.mean.numel(), cast(int, model.backbone.num_classes))
            if own != (in_chans, num_classes):
                data = f"{in_chans} and {num_classes}"
                text = f"got a model for {own[0]} channels and {own[1]} classes, and data of {data}; expected"
                advice = "Set data.channels, or give the recipe it was trained by."
                raise ValueError(f"{self.path}: {text} the same. {advice}")
        elif self.kind or self.path.suffix in RECIPES:
            model = self._built(self.recipe, is_target=True)
            pretrained = getattr(model.backbone, "pretrained_cfg", None) or {}
            classes = pretrained.get("num_classes", num_classes)  # for others timm replaces the head
            if self.recipe.model.checkpoint_path is None and classes != num_classes:
                text = f"got weights pretrained for {classes} classes, and data of {num_classes}; expected"
                raise ValueError(f"{self.path}: {text} the same: the head would be random.")
        else:
            model = self._built(untrained(self.recipe))
            if self.path.is_dir():
                state, source = load_checkpoint(self.path / "checkpoints", self.at)
                weights = (state.get("average") or {}).get("module") or state["model"]
            else:
                weights, source = read_weights(self.path), self.path
            load_weights(model, weights, str(source))
        model = model.eval().to(self.device)
        if self.run is None and self.export is None:
            self._check(model)
        return model

    def _wrapped(self, in_chans: int) -> Classifier:
        """Return a program or the module of a function behind the recipe's normalisation, by default none."""
        is_function, settings = self.kind == "function", self.recipe.model
        with kept_random_state(torch.device("cpu")):
            torch.manual_seed(seed_from(self.recipe.seed, "model"))
            module = call_function(str(self.path)) if is_function else load_program(self.path)
        mean = by_channel("mean", settings.mean, [0.0], in_chans)
        std = by_channel("std", settings.std, [1.0], in_chans)
        model = Classifier(module, mean, std, resize_inside=settings.resize_inside)
        if self.checkpoint:
            load_weights(model, read_weights(self.checkpoint), self.checkpoint)
        return model

    def _check(self, model: Classifier) -> None:
        """Compare other people's model with the data: outputs and, measured and printed, normalisation."""
        batches = self.batches("val", 0)
        x, y = (torch.cat(parts) for parts in zip(*islice(batches, SCALE_BATCHES), strict=True))
        check_outputs(model, x, self.splits.num_classes, str(self.path))
        is_given = self.recipe.model.mean is not None
        print(f"{self.path}: {check_scale(model, x, y, str(self.path), is_given=is_given)}", flush=True)

    def initial_weights(self) -> dict[str, Tensor]:
        """Return the state dict before the first step; ValueError for a model that was not trained here."""
        if self.kind:
            got = "got a model whose weights before training are unknown, and a measure that needs them"
            rule = "a run, or weights with the recipe that trained them. Leave the measure out."
            raise ValueError(f"{self.path}: {got}; expected {rule}")
        if self.run is not None and self.recipe.model.starts_from_weights:
            with suppress(CheckpointError):  # the weights it began with may be gone
                if kept := load_checkpoint(self.run / "checkpoints")[0].get("initial"):
                    return cast(dict[str, Tensor], kept)
        return self._built(self.recipe).state_dict()

    def _built(self, recipe: Recipe, *, is_target: bool = False) -> Classifier:
        with kept_random_state(torch.device("cpu")):
            return initial_model(recipe, self.splits, is_target=is_target)


def open_run(
    target: str | Path,
    at: str | None = None,
    recipe: str | Path | Sequence[str | Path] | None = None,
    settings: Sequence[str] = (),
    device: str = "auto",
    checkpoint: str | None = None,
) -> Target:
    """Find a trained model and check what is asked of it; images and weights are read when they are used.

    Args:
        target: One of ``finding.KINDS``; for others, and without a recipe that fits it, a ValueError.
        at: ``"last"`` (default), ``"best"`` or the number of an epoch that was kept, for a run.
        recipe: YAML that says data, model and threat; by default the run's own.
        settings: Settings such as ``"data.root=/data"`` that override the recipe's.
        device: ``"auto"``, or a device of torch.
    """
    path, run, at, export, kind = find(str(target), at)
    if checkpoint and kind not in ("timm", "function"):
        rule = "a name of timm's or module:function, which say the model. Leave it out."
        raise ValueError(f"--checkpoint: got {checkpoint} with {path}; expected {rule}")
    keys = [text.partition("=")[0].strip() for text in settings]
    changed = [text for text, key in zip(settings, keys, strict=True) if key.partition(".")[0] == "model"]
    others = [text for text in settings if text not in changed]
    has_data = any(key.partition(".")[0] == "data" for key in keys)
    taken = ("model.mean", "model.std") if kind else ()
    is_whole = export or kind not in ("", "timm")
    if is_whole and (unused := [text for text in changed if text.partition("=")[0].strip() not in taken]):
        what = f"the export {export}" if export else f"{path} ({kind})"
        text = f"got {', '.join(unused)} with {what}, which says what its model is"
        raise ValueError(f"--recipe: {text}; expected settings of other sections. Leave them out.")
    if path.suffix in RECIPES and not kind:
        if recipe:
            raise ValueError(f"--recipe: got {recipe} with the recipe {path}; expected one. Leave it out.")
        settled = load_recipe(path, settings)
        if not (settled.model.pretrained or settled.model.checkpoint_path):
            rule = "model.pretrained or model.checkpoint_path. Set one, or give the run it trained."
            raise ValueError(f"{path}: got a recipe whose model is untrained; expected {rule}")
    elif not recipe and run is None and not (has_data and (kind or export or changed)):
        needs = "data" if export or kind else "data and model"
        advice = "Give --recipe RECIPE" + (", or --data." if export or kind else ".")
        if not export and not kind:
            advice += f" Or, with --data, name the model: NAME or module:function --checkpoint {path}."
        raise ValueError(f"{path}: got no recipe; expected its {needs}. {advice}")
    else:
        own = [] if run is None else [run / "recipe.yaml"]
        settled = load_recipe(recipe or own, others if kind else settings)
    if checkpoint:
        file, part = split_part(checkpoint)
        at += f"-{file.stem}" + f"-{part}" * bool(part)
    if kind:
        say = {"name": str(target), "pretrained": not checkpoint, "checkpoint_path": checkpoint}
        model = load_recipe([], changed).model.model_copy(update=say)
        settled = settled.model_copy(update={"model": model})
    return Target(path, run, at, export, settled, _device_of(device, settled), kind, checkpoint)


def _device_of(device: str, recipe: Recipe) -> str:
    """Return the device; ``"auto"``: cuda where there is one and the recipe does not ask for the CPU."""
    if device == "auto":
        return "cuda" if recipe.train.device == "auto" and torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()  # fails on "meta", too
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        rule = "auto, cpu, cuda, cuda:1 or another device that torch finds here."
        raise ValueError(f"--device: got {device!r}; expected {rule}") from error
    return device
