"""The base of every type in a profile."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """No unknown keys, no value taken for another type's, no NaN or infinity, and no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
