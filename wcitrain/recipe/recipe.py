"""The recipe: all settings of a run, read from YAML and the command line and checked before any data is read.

``sections``, ``objectives`` and ``regularizers`` hold the keys and their defaults; here they become one ``Recipe``, and
settings that contradict each other (``contradictions``) are refused. The command line wins over the file, the file over its
``base``, that over the defaults.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from wcitrain.recipe.base import Section
from wcitrain.recipe.contradictions import contradictions
from wcitrain.recipe.errors import ContradictionError, build
from wcitrain.recipe.objectives import (
    InputRegularizer,
    NoInputRegularizer,
    Objective,
    PgdAtObjective,
)
from wcitrain.recipe.reading import Layer, RecipeError, read_files, read_overrides, to_yaml_text
from wcitrain.recipe.regularizers import (
    FrobeniusPenalty,
    NoPenalty,
    NoPerturbation,
    Penalty,
    Perturbation,
)
from wcitrain.recipe.sections import (
    Augment,
    Checkpoint,
    Data,
    Evaluation,
    Extra,
    LabelNoise,
    Measures,
    Mixing,
    Model,
    Optimizer,
    PiecewiseSchedule,
    Schedule,
    Threat,
    Tracking,
    Train,
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
    augment: Augment = Field(
        default_factory=Augment, description="What happens to a training image after crop and flip."
    )
    mixing: Mixing = Field(default_factory=Mixing, description="How the images of a batch are mixed.")
    extra: Extra = Field(default_factory=Extra, description="Generated or unlabelled training images.")
    label_noise: LabelNoise = Field(default_factory=LabelNoise, description="Random training labels.")
    model: Model = Field(default_factory=Model, description="The timm backbone.")
    threat: Threat = Field(default_factory=Threat, description="What the adversary may do.")
    objective: Objective = Field(
        default_factory=PgdAtObjective, discriminator="name", description="The loss that is minimised."
    )
    input_regularizer: InputRegularizer = Field(
        default_factory=NoInputRegularizer, discriminator="name", description="What is asked of the input gradient."
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
    measures: Measures = Field(default_factory=Measures, description="What else is measured while training.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="When the run is saved.")
    tracking: Tracking = Field(default_factory=Tracking, description="Where metrics go.")

    @model_validator(mode="after")
    def _refusecontradictions(self) -> "Recipe":
        """Refuse settings that are fine alone and wrong together."""
        if problems := list(contradictions(self)):
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


_DEFAULT_NAMES: dict[str, str] = {  # the kind of a section that does not write its name
    section: getattr(Recipe(), section).name
    for section in ("objective", "input_regularizer", "perturbation", "penalty", "optimizer", "schedule")
}
