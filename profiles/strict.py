"""The base of every type in a profile."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """No unknown keys, no value taken for another type's, and no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
