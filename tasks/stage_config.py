"""The part of a stage's config that every job which loads the base model shares."""

from typing import Any

from profiles.schema import Recipe
from tasks.artifacts import Artifact


def with_model(recipe: Recipe, base: Artifact, **own: Any) -> dict[str, Any]:
    """Return a stage's own settings with the base model's dtype and digest."""
    return own | {"dtype": recipe.base_model.dtype, "base_digest": base.digest}


def with_release(recipe: Recipe, base: Artifact, **own: Any) -> dict[str, Any]:
    """Return the same for what is released, which may keep more bits than the training did."""
    return with_model(recipe, base, **own) | {"dtype": recipe.export.dtype or recipe.base_model.dtype}
