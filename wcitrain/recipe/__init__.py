"""The recipe: every setting of a run with its default, read from YAML and checked before any data."""

from wcitrain.recipe.loading import load_recipe, recipe_from_dict
from wcitrain.recipe.reading import RecipeError
from wcitrain.recipe.recipe import Recipe
