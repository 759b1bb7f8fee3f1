"""The recipe: all settings of a run, read from YAML and the command line and checked before any data is read.

Files are laid on one another, the command line on top: a base says data, model, threat and schedule, a method
file changes what its method changes.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import model_validator

from wcitrain.method import fields_of
from wcitrain.optim import FrobeniusPenalty
from wcitrain.recipe.checks import ContradictionError, contradictions
from wcitrain.recipe.errors import build
from wcitrain.recipe.fields import RecipeFields
from wcitrain.recipe.layers import read_files, read_overrides
from wcitrain.recipe.reading import Layer, to_yaml_text


def load_recipe(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> "Recipe":
    """Read a recipe from files laid on one another, lowest first, and settings from the command line.

        load_recipe(["bases/cifar10.yaml", "methods/wci.yaml"], ["train.epochs=3"])

    Raises:
        RecipeError: The files or settings are wrong; the message has a line for each problem.
    """
    paths = [path] if isinstance(path, str | Path) else path
    return build(Recipe, [*read_files([Path(one) for one in paths]), read_overrides(overrides)])


def recipe_from_dict(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> "Recipe":
    """Build a recipe from nested mappings; ``overrides`` and errors are those of ``load_recipe``.

    The keys ``base`` and ``by_base`` are for files only.
    """
    return build(Recipe, [Layer(dict(data)), read_overrides(overrides)])


class Recipe(RecipeFields):
    """All settings of a run. Build one with ``load_recipe`` or ``recipe_from_dict``."""

    @model_validator(mode="after")
    def _complete_and_check(self) -> "Recipe":
        """Give the objective its threat; refuse settings that are fine alone and wrong together."""
        own = getattr(self.objective, "threat", self.threat)
        if own not in (self.threat, type(own)()):
            text = f"got {own}, which is not the recipe's threat, {self.threat}; expected that one."
            raise ContradictionError([(("objective.threat", "threat"), f"{text} Set threat.")])
        if "threat" in fields_of(type(self.objective)):
            self.__dict__["objective"] = replace(self.objective, threat=self.threat)  # type: ignore[type-var]
        if problems := contradictions(self):
            raise ContradictionError(problems)
        penalty, decay = self.penalty, self.optimizer.weight_decay
        if isinstance(penalty, FrobeniusPenalty) and penalty.strength > 0 and decay > 0:
            text = f"got frobenius with optimizer.weight_decay={decay}; expected one of the two:"
            advice = "both decay the same tensors. Set optimizer.weight_decay to 0 unless this is meant."
            warnings.warn(f"penalty.name: {text} {advice}", UserWarning, stacklevel=2)
        return self

    def to_yaml(self) -> str:
        """Return the resolved recipe, every default written out; loading the text gives an equal recipe."""
        return to_yaml_text(self.model_dump(mode="json"))
