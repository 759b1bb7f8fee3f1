"""The recipe: every setting of a run with its default, read from YAML and the command line, checked before any data."""

from wcitrain.recipe.reading import RecipeError
from wcitrain.recipe.recipe import Recipe, load_recipe, recipe_from_dict
from wcitrain.recipe.values import fraction_text

__all__ = ["Recipe", "RecipeError", "fraction_text", "load_recipe", "recipe_from_dict"]
