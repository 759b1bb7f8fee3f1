"""What every section of a recipe is: frozen, without unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: frozen, without unknown keys, without conversions but those in ``values``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Kind(Section):
    """A section of several kinds, told apart by ``name``."""

    name: str
