"""What is built, from what, and how the store will know it: all that another machine needs to build one artifact."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from profiles.schema import StagePlacement


class JobOrder(BaseModel):
    """The parameters of the flow `accelerate-job`; a worker's own settings decide nothing about the result.

    `inputs` maps a name to a reference that `Store.resolve` understands on any machine, `digests` to what must be found there,
    `made_of` to the name that a person finds it by;
    `work` is the stage's folder relative to the home folder; `store_id` is the asking store's, for a worker to see that its own
    is the same one.
    """

    model_config = ConfigDict(extra="forbid")

    stage: str
    module: str
    seed: int
    config: dict[str, Any]
    drift: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    digests: dict[str, str] = {}
    made_of: dict[str, str] = {}
    identity: dict[str, Any]
    fingerprint: str
    placement: StagePlacement
    work: str
    mlflow_run_id: str | None = None
    store_id: str
