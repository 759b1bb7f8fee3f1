"""The recipe: all settings of a run, read from YAML and the command line and checked before any data is read.

``recipe_sections`` holds the keys and their defaults; here they become one ``Recipe``, and settings that contradict
each other are refused. The command line wins over the file, the file over its ``base``, that over the defaults.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from wcitrain.recipe.errors import ContradictionError, build
from wcitrain.recipe.reading import Layer, RecipeError, read_files, read_overrides, to_yaml_text
from wcitrain.recipe.sections import (
    Checkpoint,
    CurvaturePenalty,
    Data,
    Evaluation,
    FrobeniusPenalty,
    FrobeniusTracePenalty,
    Model,
    NoPenalty,
    NoPerturbation,
    Objective,
    Optimizer,
    Penalty,
    Perturbation,
    PgdAtObjective,
    PiecewiseSchedule,
    Schedule,
    Section,
    Threat,
    TimedKind,
    Tracking,
    Train,
    WciPerturbation,
)
from wcitrain.recipe.values import Count, FolderName, Text, fraction_text

__all__ = ["Recipe", "RecipeError", "fraction_text", "load_recipe", "recipe_from_dict"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
    """Read a recipe file, the files its ``base`` keys lead to, and settings from the command line.

    Args:
        path: YAML file; an empty one is the default recipe.
        overrides: Settings such as ``"train.epochs=3"`` or ``"model.kwargs.layers=[1, 1]"``; values are YAML.

    Raises:
        RecipeError: The files or settings are wrong; the message has a line for each problem.
    """
    problems: list[str] = []
    layers = [*read_files(Path(path), problems), read_overrides(overrides, problems)]
    return build(Recipe, layers, problems, _DEFAULT_NAMES)


def recipe_from_dict(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> "Recipe":
    """Build a recipe from nested mappings, checked as in ``load_recipe``; for notebooks.

    Args:
        data: Sections and their keys; ``base`` is for files only.
        overrides: As in ``load_recipe``.

    Raises:
        RecipeError: As in ``load_recipe``.
    """
    problems: list[str] = []
    layers = [Layer(dict(data), {}), read_overrides(overrides, problems)]
    return build(Recipe, layers, problems, _DEFAULT_NAMES)


class Recipe(Section):
    """All settings of a run. Build one with ``load_recipe`` or ``recipe_from_dict``."""

    name: FolderName = Field(default="run", description="Name of the run and of its folder.")
    seed: Count = Field(default=0, description="Seed of weights, batches, attacks and probes.")
    output: Text = Field(default="runs", description="Folder that holds the run folders.")
    data: Data = Field(default_factory=Data, description="Which images are read.")
    model: Model = Field(default_factory=Model, description="The timm backbone.")
    threat: Threat = Field(default_factory=Threat, description="What the adversary may do.")
    objective: Objective = Field(
        default_factory=PgdAtObjective, discriminator="name", description="The loss that is minimised."
    )
    perturbation: Perturbation = Field(
        default_factory=NoPerturbation, discriminator="name", description="How weights are moved for the gradient."
    )
    penalty: Penalty = Field(default_factory=NoPenalty, discriminator="name", description="What is added to the loss.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The base optimizer.")
    schedule: Schedule = Field(
        default_factory=PiecewiseSchedule, discriminator="name", description="The learning rate over time."
    )
    train: Train = Field(default_factory=Train, description="The training loop.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What is measured.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="When the run is saved.")
    tracking: Tracking = Field(default_factory=Tracking, description="Where metrics go.")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "Recipe":
        """Refuse settings that are fine alone and wrong together."""
        if problems := list(_contradictions(self)):
            raise ContradictionError(problems)
        penalty, decay = self.penalty, self.optimizer.weight_decay
        if isinstance(penalty, FrobeniusPenalty) and penalty.strength > 0 and decay > 0:
            warnings.warn(
                f"penalty.name: got 'frobenius' with optimizer.weight_decay={decay}; expected one of the two: "
                "both decay the same tensors. Set optimizer.weight_decay to 0 unless this is meant.",
                UserWarning,
                stacklevel=2,
            )
        return self

    def to_yaml(self) -> str:
        """Return the resolved recipe, every default written out; loading the text gives an equal recipe."""
        return to_yaml_text(self.model_dump(mode="json"))


Problem = tuple[tuple[str, ...], str]  # dotted keys that disagree, the one to blame first; "got ...; expected ... ."


def _contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Yield every pair of settings that cannot both be meant."""
    yield from _data_contradictions(recipe)
    yield from _attack_contradictions(recipe)
    yield from _regularizer_contradictions(recipe)
    yield from _time_contradictions(recipe)


def _data_contradictions(recipe: Recipe) -> Iterator[Problem]:
    data, model = recipe.data, recipe.model
    is_remote = data.source == "timm" and (data.name or "").split("/")[0].lower() in ("hfds", "hfids", "tfds")
    if data.source == "digits" and (data.root is not None or data.download):
        text = "got a folder with source digits, which are embedded; expected null. Set data.source, e.g. to folder."
        yield ("data.root" if data.root is not None else "data.download", "data.source"), text
    if data.source != "digits" and data.root is None and not is_remote:
        yield ("data.root", "data.source"), f"got null with source {data.source}; expected a folder. Set data.root."
    if data.source == "timm" and data.name is None:
        yield ("data.name", "data.source"), "got null with source timm; expected a data set name. Set data.name."
    if data.source != "timm" and data.name is not None:
        text = f"got {data.name!r} with source {data.source}; expected null. Remove it, or set data.source to timm."
        yield ("data.name", "data.source"), text
    if data.val_split is None and data.max_train is not None and data.val_size >= data.max_train:
        text = f"got {data.val_size}; expected fewer than data.max_train = {data.max_train}. Lower it or keep more."
        yield ("data.val_size", "data.max_train", "data.val_split"), text
    if reserved := sorted(
        {"model_name", "num_classes", "in_chans", "pretrained", "checkpoint_path"} & set(model.kwargs)
    ):
        text = f"got {', '.join(reserved)}; expected arguments that the recipe does not set itself. Remove them."
        yield ("model.kwargs",), text
    if reserved := sorted(
        {"lr", "weight_decay", "momentum", "nesterov", "params", "opt"} & set(recipe.optimizer.kwargs)
    ):
        text = f"got {', '.join(reserved)}; expected arguments without a key of their own. Set optimizer.{reserved[0]}."
        yield ("optimizer.kwargs",), text
    if recipe.optimizer.nesterov and (recipe.optimizer.name != "sgd" or recipe.optimizer.momentum == 0):
        text = f"got true with {recipe.optimizer.name}, momentum {recipe.optimizer.momentum:g}; expected sgd with momentum."
        yield ("optimizer.nesterov", "optimizer.name", "optimizer.momentum"), f"{text} Remove it."
    if (model.mean is None) != (model.std is None):
        missing, given = ("mean", "std") if model.mean is None else ("std", "mean")
        yield (f"model.{missing}", f"model.{given}"), f"got null; expected a list like model.{given}. Set both or none."
    elif model.mean and model.std and len(model.mean) != len(model.std):
        text = f"got {len(model.std)} values; expected {len(model.mean)} as in model.mean. Give one value per channel."
        yield ("model.std", "model.mean"), text


def _attack_contradictions(recipe: Recipe) -> Iterator[Problem]:
    threat, objective = recipe.threat, recipe.objective
    norm, eps = threat.norm, threat.eps
    largest = {"linf": 1, "l2": 100}[norm]
    if eps > largest:
        hint = f"Did you mean {eps:g}/255?" if norm == "linf" else "Write e.g. 128/255."
        text = f"got {eps:g}; expected at most {largest} under {norm}: pixels lie in [0, 1]. {hint}"
        yield ("threat.eps", "threat.norm"), text
    if eps > 0:
        yield from _step_contradictions("evaluation", recipe.evaluation.step_size, recipe.evaluation.num_steps, eps)
    if not isinstance(objective, PgdAtObjective):
        return
    if eps == 0:
        text = "got 0 with objective.name pgd_at; expected a positive radius. Set it, or objective.name to standard."
        yield ("threat.eps", "objective.name"), text
        return
    yield from _step_contradictions("objective", objective.step_size, objective.num_steps, eps)


def _step_contradictions(section: str, step: float | None, num_steps: int, eps: float) -> Iterator[Problem]:
    """Yield steps that leave the ball at once, or that do not reach its surface: such an attack flatters the model."""
    keys = (f"{section}.step_size", "threat.eps", f"{section}.num_steps")
    if step is None:
        return
    if step > 2 * eps:
        hint = f"Did you mean {step:g}/255?" if step >= 1 else "Lower it."
        rule = f"at most twice threat.eps = {fraction_text(eps)}: a longer step leaves the ball from any point"
        yield keys, f"got {fraction_text(step)}; expected {rule}. {hint}"
    # The relative slack is for rounding: 4 * (2/255) may fall short of 8/255 by its last bit.
    if step * num_steps < eps * (1 - 1e-9):
        rule = f"at least threat.eps = {fraction_text(eps)} over num_steps = {num_steps}"
        yield keys, f"got {fraction_text(step)}; expected {rule}. Take more or longer steps, or set it to null."


def _regularizer_contradictions(recipe: Recipe) -> Iterator[Problem]:
    perturbation, penalty = recipe.perturbation, recipe.penalty
    if isinstance(perturbation, WciPerturbation):
        keys = ("perturbation.strength", "perturbation.relative_size")
        if perturbation.strength is None and perturbation.relative_size is None:
            yield keys, "got null, and null for relative_size; expected exactly one of them. Set one to a number."
        elif perturbation.strength is not None and perturbation.relative_size is not None:
            yield (
                keys,
                f"got {perturbation.strength} beside relative_size; expected one of them. Set one to null.",
            )
    is_curvature = isinstance(penalty, CurvaturePenalty)
    if isinstance(penalty, FrobeniusTracePenalty):
        is_curvature = penalty.trace_weight > 0
    if is_curvature and perturbation.name != "none":
        text = (
            f"got {penalty.name} with perturbation.name {perturbation.name}; expected at most one of the two: "
            "both move the weights for the same pass. Choose one and set the other's name to none."
        )
        yield ("penalty.name", "perturbation.name", "penalty.trace_weight"), text

    if isinstance(penalty, CurvaturePenalty):
        yield from _estimator_contradictions(recipe, penalty)
    if perturbation.name != "none" and penalty.name != "none" and perturbation.layers != penalty.layers:
        text = (
            f"got {penalty.layers!r}, and {perturbation.layers!r} for the perturbation; expected the same. Change one."
        )
        yield ("penalty.layers", "perturbation.layers"), text
    if perturbation.name != "none" and penalty.name != "none" and perturbation.split_qkv != penalty.split_qkv:
        text = f"got {penalty.split_qkv}, and {perturbation.split_qkv} for the perturbation; expected the same. Change one."
        yield ("penalty.split_qkv", "perturbation.split_qkv"), text


def _estimator_contradictions(recipe: Recipe, penalty: CurvaturePenalty) -> Iterator[Problem]:
    """Yield settings that the chosen estimator of the traces has no use for, or cannot work with."""
    estimator = penalty.estimator
    if penalty.gradient is not None and estimator != "hutchinson":
        text = f"got {penalty.gradient!r} with estimator {estimator}; expected null: only hutchinson has a choice. Remove it."
        yield ("penalty.gradient", "penalty.estimator"), text
    if penalty.radius is not None and (estimator in ("gauss_newton", "top_layer") or penalty.gradient == "autograd"):
        text = f"got {penalty.radius:g}, but {estimator} makes no finite differences here; expected null. Remove it."
        yield ("penalty.radius", "penalty.estimator", "penalty.gradient"), text
    if estimator == "top_layer" and penalty.num_probes > 1:
        text = f"got {penalty.num_probes}, but top_layer is a closed form; expected 1. Remove it."
        yield ("penalty.num_probes", "penalty.estimator"), text
    if estimator == "top_layer" and (penalty.layers != "weights" or penalty.split_qkv):
        text = (
            f"got {penalty.layers!r}, but top_layer's only layer is the head's weight; expected 'weights'. Remove it."
        )
        yield ("penalty.layers", "penalty.estimator", "penalty.split_qkv"), text
    if recipe.train.compile and estimator not in ("auto", "two_point"):
        text = f"got {estimator} with train.compile; expected auto or two_point: compiled models differentiate once. Change one."
        yield ("penalty.estimator", "train.compile"), text


def _time_contradictions(recipe: Recipe) -> Iterator[Problem]:
    schedule, train = recipe.schedule, recipe.train
    epochs = f"train.epochs = {train.epochs}"
    for section in ("perturbation", "penalty"):
        kind = getattr(recipe, section)
        if isinstance(kind, TimedKind) and kind.start_epoch >= train.epochs:
            text = f"got {kind.start_epoch}; expected less than {epochs}, for the {section} would never act. Lower it."
            yield (f"{section}.start_epoch", "train.epochs"), text
    if isinstance(schedule, PiecewiseSchedule):
        marks, keys = schedule.milestones, ("schedule.milestones", "train.epochs")
        if marks != sorted(set(marks)):
            yield keys[:1], f"got {marks}; expected increasing epochs. Sort them."
        if marks and max(marks) >= train.epochs:
            yield keys, f"got {marks}; expected epochs before {epochs}. Remove the later ones, or train longer."
    for key in ("warmup_epochs", "peak_epoch"):
        if (getattr(schedule, key, None) or 0) > train.epochs:
            text = f"got {getattr(schedule, key):g}; expected at most {epochs}, or lr is never reached. Lower it."
            yield (f"schedule.{key}", "train.epochs"), text
    if train.batch_size % train.accumulate:
        text = (
            f"got {train.accumulate}; expected a divisor of train.batch_size = {train.batch_size}. Change one of them."
        )
        yield ("train.accumulate", "train.batch_size"), text


_DEFAULT_NAMES: dict[str, str] = {  # the kind of a section that does not write its name
    section: getattr(Recipe(), section).name
    for section in ("objective", "perturbation", "penalty", "optimizer", "schedule")
}
